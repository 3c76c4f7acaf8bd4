"""Diagnostics of weight trapping on cases that can be counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.qat import diagnostics, plots


def trained(params, **rule):
    recipe = aj.Recipe(rules=[aj.Rule(match=".*kernel", **rule)])
    return aj.qat.make(recipe, total_steps=10).init(params)


def test_effective_rank_of_known_matrices(rng):
    orthogonal = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    rank_one = np.outer(rng.normal(size=6), rng.normal(size=6))
    mixed = orthogonal @ np.diag([2, 1, 1, 0, 0, 0]) @ orthogonal.T
    stack = np.stack([orthogonal, rank_one, np.zeros((6, 6)), mixed])
    found = jax.jit(diagnostics.effective_rank)(jnp.asarray(stack))
    # Of (1/2, 1/4, 1/4): the entropy is 3/2 ln 2.
    np.testing.assert_allclose(found, [6, 1, 0, 2**1.5], rtol=1e-4)


def test_gradient_ranks_of_a_stack_and_an_odd_length(rng):
    params = {"a": {"kernel": jnp.ones((3, 20, 4))}, "b": {"kernel": jnp.ones((64, 4))}}
    state = aj.qat.make(
        aj.Recipe(
            rules=[
                aj.Rule(match="a/.*", format="sherry", granularity="channel"),
                aj.Rule(format="t2"),
            ]
        ),
        total_steps=1,
    ).init(params)
    g = np.zeros((3, 20, 4), np.float32)
    g[0, :4] = np.eye(4)
    g[1] = 1
    found = diagnostics.gradient_ranks(
        {"a": {"kernel": jnp.asarray(g)}, "b": {"kernel": jnp.ones((64, 4))}},
        state,
        paths=("a/kernel",),
    )
    assert list(found) == ["a/kernel"]
    np.testing.assert_allclose(found["a/kernel"], [4, 1, 0], rtol=1e-3)
    with pytest.raises(ValueError, match="c/kernel is not trained; there are a/kernel"):
        diagnostics.gradient_ranks(params, state, paths=("c/kernel",))


def test_histogram_counts(rng):
    # absmean scales: 1 in the first column and 2 in the second.
    w = np.array([[1.0, 0.2, 2.6, -0.2], [-5.0, 1.0, -1.0, 1.0]], np.float32).T
    params = {"w": {"kernel": jnp.asarray(w)}, "norm": {"scale": jnp.ones(4)}}
    state = trained(params, format="t2", granularity="channel", scale_dtype="float32")
    count = jax.jit(diagnostics.histogram, static_argnames=("bins", "limit"))
    found = count(params, state, bins=4, limit=2.0)
    # 1, .2, 2.6, .2 and 2.5, .5, .5, .5 in halves up to 2, then what lies beyond.
    assert found.counts["w/kernel"].tolist() == [2, 3, 1, 0, 2]
    np.testing.assert_allclose(found.edges, [0, 0.5, 1, 1.5, 2])
    np.testing.assert_allclose(found.shares, np.array([2, 3, 1, 0, 2]) / 8)
    packed = aj.qat.finalize(params, state)["w"]["kernel"]
    ratio = diagnostics.scaled_magnitude(params["w"]["kernel"], packed)
    np.testing.assert_allclose(ratio, np.abs(w) / [1, 2], rtol=1e-6)
    with pytest.raises(ValueError, match="bins=0 and limit=3.0 must be positive"):
        diagnostics.histogram(params, state, bins=0)
    assert diagnostics.scaled_magnitude(jnp.array([0.0, 1.0]), 0).tolist() == [
        0,
        float("inf"),
    ]


RULES = [
    aj.Rule(match="sherry", format="sherry", group_size=32),
    aj.Rule(match="seq2", format="seq2", granularity="channel"),
    aj.Rule(match="int8", format="int8", granularity="channel"),
    aj.Rule(match="float8", format="float8_e4m3", granularity="channel"),
]


def test_codes_tell_levels_apart(rng):
    """Two weights of one granule have one code just if they are stored alike."""
    w = rng.normal(size=(320, 2)).astype(np.float32)
    params = {rule.match: jnp.asarray(w) for rule in RULES}
    qat = aj.qat.make(aj.Recipe(rules=RULES), total_steps=1)
    state = qat.init(params)
    found, fake = jax.jit(
        lambda p: (diagnostics.codes(p, state), qat.apply(p, state, 1))
    )(params)
    for name, rows, least in (
        ("sherry", 32, 3),
        ("seq2", 320, 4),
        ("int8", 320, 100),
        ("float8", 320, 50),
    ):
        code = np.asarray(found[name])
        assert code.dtype == np.int8 and code.shape == w.shape
        stored = np.asarray(fake[name])
        pairs = set(zip(code[:rows, 0], stored[:rows, 0], strict=True))
        assert len({c for c, _ in pairs}) == len({s for _, s in pairs}) == len(pairs)
        assert len(np.unique(code)) >= least


def test_flips_are_counted_every_so_many_steps():
    w = np.ones((8, 4), np.float32)
    params = {"a": {"kernel": jnp.asarray(w)}, "b": {"kernel": jnp.ones((8, 12))}}
    state = trained(params, format="binary", granularity="channel")
    moved = w.copy()
    moved[:2] = -1  # a quarter of the smaller leaf, which has a quarter of all weights
    later = {"a": {"kernel": jnp.asarray(moved)}, "b": params["b"]}
    flips = diagnostics.start_flips(params, state)
    update = jax.jit(diagnostics.update_flips, static_argnames="every")
    flips = update(flips, later, state, jnp.int32(4), every=5)
    assert flips.step == 0 and flips.rate == 0
    flips = update(flips, later, state, jnp.int32(5), every=5)
    assert flips.step == 5 and flips.rate == 0.25 / 4
    assert {k: float(v) for k, v in flips.rates.items()} == {
        "a/kernel": 0.25,
        "b/kernel": 0.0,
    }
    # Against the codes of step 5, nothing has changed.
    assert update(flips, later, state, jnp.int32(10), every=5).rate == 0
    with pytest.raises(ValueError, match="every must be positive, not 0"):
        diagnostics.update_flips(flips, later, state, 1, every=0)
    with pytest.raises(ValueError, match="of different trees: b/kernel"):
        diagnostics.flip_rates(flips.codes, {"a/kernel": flips.codes["a/kernel"]})


def test_what_cannot_be_looked_at():
    params = {"kernel": jnp.ones((64, 4))}
    state = trained(params, format="nf4")
    with pytest.raises(ValueError, match="no leaf is trained in a format with one"):
        diagnostics.codes(params, state)
    with pytest.raises(ValueError, match="another tree: kernel is not in it"):
        diagnostics.codes({"other": params["kernel"]}, state)
    packed = aj.quantize(params["kernel"], format="nf4")
    with pytest.raises(ValueError, match="nf4 g64 weights have no scale"):
        diagnostics.scaled_magnitude(params["kernel"], packed)


def test_plots(tmp_path):
    found = diagnostics.Histogram({"w": jnp.array([3, 5, 2])}, 2.0)
    figure = plots.trapping({"plain": found, "Arenas": found})
    assert [a.get_title() for a in figure.axes] == ["plain", "Arenas"]
    assert figure.axes[0].patches[0].get_data().values.tolist() == [
        pytest.approx(0.3),
        0.5,
    ]
    assert "20.0% beyond 2" in figure.axes[1].texts[0].get_text()
    figure.savefig(tmp_path / "trapping.png")
    assert (tmp_path / "trapping.png").stat().st_size > 1000

    rate = plots.flips({"a": ([1, 2], [0.1, 0.0])}, every=7).axes[0]
    assert np.isnan(rate.lines[0].get_ydata()[1]) and "7 steps" in rate.get_ylabel()
    assert len(plots.ranks({"a": ([1], [3.0])}, full=8).axes[0].lines) == 2
    curve = {"a": ([1e3, 1e4], [4.0, 2.0])}
    shown = plots.loss(curve, smooth=0.5, levels={"start": 5.0}).axes[0]
    np.testing.assert_allclose(shown.lines[0].get_ydata(), [4, 8 / 3])
    assert shown.get_xscale() == "log" and len(shown.lines) == 3
    with pytest.raises(ValueError, match="curve 'a' has 1 x and 2 y"):
        plots.loss({"a": ([1], [1, 2])})
    with pytest.raises(ValueError, match="no curve"):
        plots.ranks({})
    with pytest.raises(ValueError, match="no histogram"):
        plots.trapping({})
    with pytest.raises(ValueError, match=r"smooth must be in \[0, 1\), not 1"):
        plots.loss(curve, smooth=1)
