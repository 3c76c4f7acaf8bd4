"""Clips for the tests of audio methods."""

import numpy as np

N, D = 24, 16


def clips(number, *, seed=0):
    """Sequences that drift (AR(1)) at speeds of their own, with lengths and weights."""
    rng = np.random.default_rng(seed)
    x = np.zeros((number, N, D))
    for b in range(number):
        memory = rng.choice([0.0, 0.7, 0.9, 0.97])
        x[b, 0] = rng.normal(size=D)
        for i in range(1, N):
            fresh = rng.normal(size=D) * np.sqrt(1 - memory**2)
            jump = rng.random() < 0.1
            x[b, i] = rng.normal(size=D) if jump else memory * x[b, i - 1] + fresh
        x[b] *= rng.uniform(0.5, 2, size=(N, 1))  # cosines must not see lengths
    lengths = rng.integers(1, N + 1, size=number)
    lengths[0] = N
    received = rng.uniform(0, 1, size=(number, N))
    received[1] = 0  # plain means
    itself = rng.uniform(0.3, 1, size=(number, N))
    mask = np.arange(N) < lengths[:, None]
    return tuple(a.astype(np.float32) for a in (x, received, itself)) + (mask,)


def compare(chosen, b, want, *, margin=1e-5, places=None):
    """Row b of a selection against an oracle; False if a decision was too close."""
    first, rows, close = want
    if close < margin:
        return False
    first = first if places is None else [places[i] for i in first]
    used = int(chosen.count[b])
    np.testing.assert_array_equal(np.asarray(chosen.indices[b])[:used], first)
    np.testing.assert_array_equal(np.asarray(chosen.indices[b])[used:], N)
    merged = np.asarray(chosen.merged[b])
    np.testing.assert_allclose(merged[:used], rows, rtol=2e-5, atol=2e-5)
    assert not merged[used:].any()
    return True
