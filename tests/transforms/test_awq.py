"""AWQ: the grid and the limits against loops in numpy, on real products."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.algorithms import AWQClipOptions, awq_clip
from angeljax.formats import make_spec
from angeljax.models import stack_layers
from angeljax.transforms import apply_transforms
from tests.transforms._models import MODEL, measured, same_logits, stacked

RULE = aj.Rule(format="int4", group_size=16, symmetric=False, scale_dtype="float32")
TWO = [{"from": "norm/scale", "to": ["[qk]/kernel"]}]


def rounded(w: np.ndarray, group: int) -> np.ndarray:
    """4 bits with a zero point, one group of one column after another."""
    out = np.zeros_like(w)
    for n in range(w.shape[1]):
        for g in range(0, w.shape[0], group):
            part = w[g : g + group, n]
            low, high = min(part.min(), 0), max(part.max(), 0)
            step = (high - low) / 15
            zero = np.round(-low / step)
            codes = np.clip(np.round(part / step) + zero, 0, 15)
            out[g : g + group, n] = (codes - zero) * step
    return out


def test_grid_by_loops() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 32)) * np.where(np.arange(32) % 9 == 2, 20.0, 1.0)
    q, k = rng.normal(size=(32, 12)), rng.normal(size=(32, 5))
    params = {
        "norm": {"scale": jnp.ones(32)},
        "q": {"kernel": jnp.asarray(q, jnp.float32)},
        "k": {"kernel": jnp.asarray(k, jnp.float32)},
    }
    recipe = aj.Recipe(rules=[RULE], transforms=[{"name": "awq", "pairs": TWO}])

    def model(p, x):
        h = x * p["norm"]["scale"]
        return aj.ops.dot(h, p["q"]["kernel"]), aj.ops.dot(h, p["k"]["kernel"])

    stats = aj.calibrate(model, params, [jnp.asarray(x, jnp.float32)], recipe)
    mean, best, least = np.abs(x).mean(0), np.ones(32), np.inf
    for i in range(20):
        s = np.maximum(mean ** (i / 20), 1e-4)
        s = s / np.sqrt(s.max() * s.min())
        error = 0.0
        for w in (q, k):
            new = rounded(w * s[:, None], 16) / s[:, None]
            error += np.square(x @ new - x @ w).sum()
        if error < least:
            best, least = s, error
    assert best.max() > 1.5
    new, _ = apply_transforms(params, recipe, stats)
    np.testing.assert_allclose(new["norm"]["scale"], 1 / best, rtol=1e-4)
    np.testing.assert_allclose(new["q"]["kernel"], q * best[:, None], rtol=1e-4)
    # What compress makes has the error that the search has promised.
    done = aj.compress(params, recipe, stats)
    got = model(done, jnp.asarray(x, jnp.float32))
    error = sum(
        np.square(np.asarray(y) - x @ w).sum() for y, w in zip(got, (q, k), strict=True)
    )
    np.testing.assert_allclose(error, least, rtol=1e-2)


def test_decoder_apart_and_stacked() -> None:
    params, stats = measured()
    recipe = aj.Recipe(
        rules=[RULE],
        transforms=[
            {"name": "awq", "grid": 4, "parts": ["norm", "value", "up"], "head_dim": 8}
        ],
    )
    new, after = apply_transforms(params, recipe, stats)
    same_logits(MODEL, params, new)
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), new, params)
    for part, leaf in (
        ("attn_norm", "scale"), ("mlp_norm", "scale"), ("attn", "o_proj"),
        ("mlp", "down_proj"),
    ):  # fmt: skip
        layers = moved["layers"].values()
        tops = [max(jax.tree.leaves(x[part][leaf])) for x in layers]
        assert max(tops) > 0.01, part
    # Later algorithms see the Hessian of the new inputs.
    path = "layers/0/mlp/down_proj/kernel"
    s = new["layers"][0]["mlp"]["down_proj"]["kernel"][:, 0]
    s = s / params["layers"][0]["mlp"]["down_proj"]["kernel"][:, 0]
    np.testing.assert_allclose(
        after[path]["hessian"], stats[path]["hessian"] / np.outer(s, s), rtol=1e-3
    )

    up = dataclasses.replace(recipe, transforms=[{"name": "awq", "parts": ["up"]}])
    one, _ = apply_transforms(params, up, stats)
    two, _ = apply_transforms(stack_layers(params), up, stacked(stats))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        stack_layers(one), two,
    )  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_by_loops(symmetric: bool) -> None:
    rng = np.random.default_rng(1)
    k, n, group = 40, 6, 16  # the last group is half empty
    x = rng.normal(size=(50, k)) * np.exp(rng.normal(size=k))
    w = rng.standard_t(3, size=(k, n))
    more = {"narrow_range": "yes"} if symmetric else {}
    spec = make_spec((k, n), "float32", format="int4", group_size=group,
                     symmetric=symmetric, scale_dtype="float32", **more)  # fmt: skip
    hessian = jnp.asarray(x.T @ x, jnp.float32)
    q = awq_clip(jnp.asarray(w, jnp.float32), spec, {"hessian": hessian})
    got, clipped = np.asarray(q.dequantize()), 0
    for col in range(n):
        for g in range(0, k, group):
            part, inputs = w[g : g + group, col], x[:, g : g + group]
            errors = []
            for i in range(10):
                top = np.abs(part).max() * (1 - i / 20)
                cut = np.clip(part, -top, top)
                if symmetric:
                    step = np.abs(cut).max() / 7
                    new = np.round(cut / step) * step
                else:
                    new = rounded(cut[:, None], group)[:, 0]
                errors.append(np.square(inputs @ (new - part)).sum())
            # By its error: a weight half way between two codes may go either way.
            error = np.square(inputs @ (got[g : g + group, col] - part)).sum()
            assert 0.9 * min(errors) < error < 1.01 * min(errors)
            clipped += int(np.argmin(errors)) > 0
    assert clipped > 3


def test_clip_of_experts_and_options() -> None:
    rng = np.random.default_rng(2)
    w = jnp.asarray(rng.standard_t(3, size=(3, 32, 8)), jnp.float32)
    x = rng.normal(size=(3, 20, 32))
    h = jnp.asarray(np.einsum("eti,etj->eij", x, x), jnp.float32)
    spec = make_spec(w.shape, w.dtype, format="mxfp4", batch_axes=1)
    clip = jax.jit(lambda w, h: awq_clip(w, spec, {"hessian": h}).dequantize())
    whole = clip(w, h)
    for e in range(3):
        np.testing.assert_array_equal(whole[e], clip(w[e], h[e]))
    assert AWQClipOptions(steps=4, lowest=0.5).ratios == (1.0, 0.75)
    with pytest.raises(ValueError, match="lowest=2.0"):
        AWQClipOptions(lowest=2.0)
    with pytest.raises(aj.RecipeError, match="grid=1"):
        aj.Recipe(rules=[RULE], transforms=[{"name": "awq", "grid": 1}])
