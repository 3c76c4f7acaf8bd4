"""Mixed precision: the solver against brute force, the rest on a tiny decoder."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.allocation import (
    AllocationError,
    _divergence,
    _knapsack,
    _latency,
    calibrate_for,
)
from angeljax.allocation._candidates import group_leaves, group_name
from angeljax.allocation._patterns import patterns
from angeljax.models import (
    DecoderConfig,
    LanguageModel,
    fuse_projections,
    stack_layers,
)

FORMATS = ["int3:32", "int4:32", "int8"]
CONFIG = DecoderConfig(
    model_type="llama", vocab_size=64, hidden_size=32, num_layers=2,
    intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16,
)  # fmt: skip
MODEL = LanguageModel(CONFIG)
TOKENS = jax.random.randint(jax.random.key(7), (4, 24), 0, 64)
HELD_OUT = jax.random.randint(jax.random.key(8), (4, 24), 0, 64)


def make_params() -> dict:
    """A decoder whose layer 1 writes eight times as much as layer 0."""
    params = MODEL.init(jax.random.key(0))
    layer = params["layers"][1]["attn"]["o_proj"]
    layer["kernel"] = 8 * layer["kernel"]
    return params


PARAMS = make_params()
LOGITS = jax.jit(MODEL.logits)


@pytest.fixture(scope="module")
def measured() -> aj.Allocation:
    return aj.allocate(
        MODEL, PARAMS, formats=FORMATS, batches=[TOKENS], budget_bits=4.5,
        progress=False,
    )  # fmt: skip


def brute_force(losses, costs, limits):
    """Every choice, one after another; the least loss, or None."""
    best = None
    for choice in itertools.product(*(range(len(g)) for g in losses)):
        spent = [0] * len(limits)
        loss = 0.0
        for g, o in enumerate(choice):
            loss += losses[g][o]
            for r in range(len(limits)):
                spent[r] += costs[g][o][r]
        fits = all(s <= limit for s, limit in zip(spent, limits, strict=True))
        if fits and (best is None or loss < best):
            best = loss
    return best


def measure_by_hand(recipe: aj.Recipe, tokens: jax.Array) -> float:
    """Mean KL(full || compressed) in float64 over every position."""
    small = jax.tree.map(
        lambda x: x.dequantize() if isinstance(x, aj.QTensor) else x,
        aj.compress(PARAMS, recipe),
        is_leaf=lambda x: isinstance(x, aj.QTensor),
    )
    full, small = (np.asarray(LOGITS(p, tokens), np.float64) for p in (PARAMS, small))
    logs = []
    for x in (full, small):
        x = x - x.max(-1, keepdims=True)
        logs.append(x - np.log(np.exp(x).sum(-1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


@pytest.mark.parametrize("resources", [1, 2])
def test_solver_equals_brute_force(rng: np.random.Generator, resources: int) -> None:
    infeasible = 0
    for trial in range(16):
        # Losses over many orders of magnitude, sizes with and without a common unit.
        unit = 1 if trial % 2 else 5184
        sizes = [int(rng.integers(1, 5)) for _ in range(6)]
        losses = [list(10 ** rng.uniform(-7, 1, n)) for n in sizes]
        costs = [
            [
                tuple(int(x) * unit for x in rng.integers(1, 60, resources))
                for _ in range(n)
            ]
            for n in sizes
        ]
        limits = [int(rng.integers(80, 200)) * unit for _ in range(resources)]
        want = brute_force(losses, costs, limits)
        if want is None:
            infeasible += 1
            with pytest.raises(_knapsack.InfeasibleError):
                _knapsack.solve(losses, costs, limits)
            continue
        got = _knapsack.solve(losses, costs, limits)
        total = sum(losses[g][o] for g, o in enumerate(got))
        assert total == pytest.approx(want, rel=1e-9)
        for r, limit in enumerate(limits):
            assert sum(costs[g][o][r] for g, o in enumerate(got)) <= limit
    assert infeasible < 14


def test_solver_is_exact_at_the_limit() -> None:
    """One unit decides, though it is 1e-8 of all."""
    losses = [[1.0, 0.0], [1.0, 0.5]]
    costs = [[(10**8,), (10**8 + 1,)], [(1,), (2,)]]
    assert _knapsack.solve(losses, costs, [10**8 + 2]) == [1, 0]
    assert _knapsack.solve(losses, costs, [10**8 + 3]) == [1, 1]
    assert _knapsack.solve(losses, costs, [10**8 + 1]) == [0, 0]


def test_dominated_options_are_left_out() -> None:
    losses, costs = [3, 1, 1, 0.5, 2], [(1,), (2,), (2,), (4,), (3,)]
    assert _knapsack.undominated(losses, costs) == [0, 1, 3]


def test_large_instance_between_the_lagrangian_bound_and_a_greedy_choice(
    rng: np.random.Generator,
) -> None:
    bits = np.array([3.25, 4.125, 4.5, 8.125])
    sizes = (rng.choice([331776, 884736], 120)[:, None] * bits / 8).astype(int)
    losses = 10 ** rng.uniform(-5, -1, (120, 1)) * [1, 0.2, 0.15, 0.001]
    losses = losses * rng.uniform(0.7, 1.3, (120, 4))
    limit = int(sizes[:, 2].sum())
    got = _knapsack.solve(losses.tolist(), sizes[..., None].tolist(), [limit])
    total = losses[np.arange(120), got].sum()
    bound, greedy = 0.0, np.inf
    for price in np.geomspace(1e-12, 1e-5, 400):
        priced = losses + price * sizes
        bound = max(bound, priced.min(1).sum() - price * limit)
        choice = priced.argmin(1)
        if sizes[np.arange(120), choice].sum() <= limit:
            greedy = min(greedy, losses[np.arange(120), choice].sum())
    assert bound * (1 - 1e-9) <= total <= greedy
    assert total < 1.02 * bound


def test_allocation_beats_uniform_at_the_same_size(measured: aj.Allocation) -> None:
    """Layer 1 matters most: it gets the bits, and the KL falls on other text too."""
    uniform = aj.Recipe(rules=[aj.Rule(format="int4", group_size=32)])
    size = aj.report(PARAMS, aj.compress(PARAMS, uniform)).nbytes
    assert measured.nbytes <= size
    for tokens in (TOKENS, HELD_OUT):
        mixed = measure_by_hand(measured.recipe, tokens)
        assert mixed < 0.8 * measure_by_hand(uniform, tokens)
    by_name = {g.name: g for g in measured.groups}
    before, heavy = (by_name[f"layers/{i}/attn/o_proj/kernel"] for i in (0, 1))
    assert heavy.choice.name == "int8"
    assert heavy.options[0].loss > 2 * before.options[0].loss


def test_losses_are_those_of_each_group_alone(measured: aj.Allocation) -> None:
    for group in (measured.groups[0], measured.groups[6]):
        for option, (format, size) in zip(
            group.options, (("int3", 32), ("int4", 32), ("int8", None)), strict=True
        ):
            rules = [
                aj.Rule(match=re.escape(path), format=format, group_size=size)
                for path in group.paths
            ]
            want = measure_by_hand(aj.Recipe(rules=rules), TOKENS)
            assert option.loss == pytest.approx(want, rel=1e-2, abs=1e-8)
    assert measured.kl == pytest.approx(
        measure_by_hand(measured.recipe, TOKENS), rel=1e-3
    )
    assert measured.loss == pytest.approx(measured.kl, rel=0.5)
    assert measured.passes == 3 * len(measured.groups) + 1


def test_sizes_are_those_of_compress_and_the_budget_is_met(
    measured: aj.Allocation, tmp_path
) -> None:
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(PARAMS))
    smallest, largest = (
        sum(f(o.nbytes for o in g.options) for g in measured.groups) for f in (min, max)
    )
    for share in (0.0, 0.37, 0.8, 1.0):
        limit = measured.other_nbytes + smallest + share * (largest - smallest)
        found = measured.at(budget_mb=limit / 1e6)
        assert found.nbytes <= limit < total
        cparams = aj.compress(PARAMS, found.recipe)
        assert aj.report(PARAMS, cparams).nbytes == found.nbytes
        # Tight: what is left is less than the next step of any group would take.
        steps = [
            o.nbytes - g.choice.nbytes
            for g in found.groups
            for o in g.options
            if o.nbytes > g.choice.nbytes and o.loss < g.choice.loss
        ]
        assert not steps or limit - found.nbytes < min(steps)
        fused = fuse_projections(cparams)
        assert "qkv_proj" in fused["layers"][0]["attn"]
    file = tmp_path / "mixed.yaml"
    measured.recipe.save(file)
    assert aj.Recipe.load(file) == measured.recipe
    assert "4.5 bits per weight" in measured.recipe.description
    json.dumps(measured.to_dict())
    by_bits = measured.at(budget_bits=4.5)
    assert by_bits.recipe.rules == measured.recipe.rules
    assert by_bits.bits_per_weight <= 4.5
    uniform = measured.uniform()["int4:32"]
    assert len(uniform.recipe.rules) == 1 or uniform.bits_per_weight == 4.5
    assert measured.loss < uniform.loss


def test_keep_and_everything_kept() -> None:
    found = aj.allocate(
        MODEL, PARAMS, formats=["int8", None], measure="error", budget_bits=32,
    )  # fmt: skip
    assert found.loss == 0 and found.kl is None and found.passes == 0
    cparams = aj.compress(PARAMS, found.recipe)
    jax.tree.map(np.testing.assert_array_equal, cparams, PARAMS)
    assert found.nbytes == aj.report(PARAMS, cparams).nbytes
    some = found.at(budget_bits=20)
    assert {g.choice.name for g in some.groups} == {"int8", "none"}
    assert aj.report(PARAMS, aj.compress(PARAMS, some.recipe)).nbytes == some.nbytes


def test_scanned_stack_has_one_choice_for_each_leaf() -> None:
    model, params = dataclasses.replace(MODEL, scan_layers=True), stack_layers(PARAMS)
    found = aj.allocate(
        model, params, formats=FORMATS, batches=[TOKENS], budget_bits=5.5,
        measure="linear", progress=False,
    )  # fmt: skip
    assert [g.name for g in found.groups] == [
        "layers/attn/{k_proj,q_proj,v_proj}/kernel",
        "layers/attn/o_proj/kernel",
        "layers/mlp/down_proj/kernel",
        "layers/mlp/{gate_proj,up_proj}/kernel",
    ]
    assert found.passes == len(found.groups) + 1
    cparams = aj.compress(params, found.recipe)
    assert aj.report(params, cparams).nbytes == found.nbytes
    assert found.loss == pytest.approx(found.kl, rel=0.5)


def test_errors_are_those_of_outputs(rng: np.random.Generator) -> None:
    """tr(dW' H dW) / tr(W' H W), by the products that H stands for."""
    w = {"a": {"kernel": jnp.asarray(rng.normal(size=(48, 8)), jnp.float32)}}
    x = jnp.asarray(rng.normal(size=(96, 48)) * np.arange(48), jnp.float32)

    def model(params, x):
        return aj.ops.dot(x, params["a"]["kernel"])

    for rotation in (None, 16):
        formats = [{"format": "int4", "group_size": 32, "rotation": rotation}]
        stats = calibrate_for(model, w, [x], formats, statistics=("hessian",))
        for found, inputs in ((stats, x), (None, jnp.eye(48))):
            got = aj.allocate(
                model, w, found, formats=formats, measure="error", budget_bits=8
            )
            q = aj.compress(w, aj.Recipe(rules=[aj.Rule(**formats[0])]))
            back = np.asarray(q["a"]["kernel"].dequantize(), np.float64)
            kernel, inputs = np.asarray(w["a"]["kernel"]), np.asarray(inputs)
            want = ((inputs @ (kernel - back)) ** 2).sum() / (
                (inputs @ kernel) ** 2
            ).sum()
            assert got.loss == pytest.approx(want, rel=1e-4)


def test_mask_and_largest_entries(rng: np.random.Generator) -> None:
    logits = jnp.asarray(rng.normal(size=(2, 5, 40)) * 3, jnp.float32)
    other = logits + jnp.asarray(rng.normal(size=logits.shape) * 0.5, jnp.float32)
    p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (logits, other))
    want = (p * np.log(p / q)).sum(-1)
    got = _divergence._kl(jax.nn.log_softmax(logits), jax.nn.log_softmax(other))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    # Far apart, where the naive sum meets 0 times infinity.
    apart = jnp.asarray([[0.0, -200.0], [-200.0, 0.0]])
    far = _divergence._kl(apart[:1], apart[1:])
    np.testing.assert_allclose(far, 200, rtol=1e-5)

    leaves = [aj._leaves.Leaf("x", logits, lambda v: v)]
    treedef = jax.tree.structure(0)
    mask = np.ones((2, 5), bool)
    mask[1, 3:] = False

    def model(params, tokens, mask):
        return params

    batch = {"tokens": jnp.zeros((2, 5), jnp.int32), "mask": mask}
    whole = _divergence.Divergence(model, leaves, treedef, [batch, batch])
    assert float(whole({0: other})) == pytest.approx(want[mask].mean(), rel=1e-5)
    order = np.argsort(-p, axis=-1)[..., :8]
    pk, qk = (np.take_along_axis(d, order, -1) for d in (p, q))
    pk, qk = (np.concatenate([d, 1 - d.sum(-1, keepdims=True)], -1) for d in (pk, qk))
    part = _divergence.Divergence(model, leaves, treedef, [batch], top_k=8)
    want = (pk * np.log(pk / qk)).sum(-1)[mask].mean()
    assert float(part({0: other})) == pytest.approx(want, rel=1e-4)


def test_groups() -> None:
    paths = [
        f"layers/{i}/{name}/kernel"
        for i in (0, 10)
        for name in ("attn/q_proj", "attn/k_proj", "attn/o_proj", "mlp/up_proj")
    ]
    leaves = [aj._leaves.Leaf(p, object(), lambda v: v) for p in paths]

    def names(group, fused):
        found = group_leaves(leaves, group, fused=fused)
        return [group_name([paths[i] for i in one]) for one in found]

    assert names("weight", False) == paths
    assert names("weight", True)[:2] == [
        "layers/0/attn/{q_proj,k_proj}/kernel",
        "layers/0/attn/o_proj/kernel",
    ]
    assert len(names("layer", True)) == 2
    assert len(names([r"layers/\d+/attn/.*"], False)) == 1 + 2
    assert len(names([r"layers/(\d+)/attn/.*"], False)) == 2 + 2
    linen = [
        aj._leaves.Leaf(f"params/h_{i}/Dense_{j}/kernel", object(), lambda v: v)
        for i in range(2)
        for j in range(2)
    ]
    assert [len(x) for x in group_leaves(linen, "layer", fused=True)] == [2, 2]
    # Tied weights share.
    tied = [dataclasses.replace(leaf, value=PARAMS) for leaf in leaves[:2]]
    assert len(group_leaves(tied, "weight", fused=False)) == 1
    with pytest.raises(ValueError, match="matches no weight"):
        names(["nothing"], True)


def test_patterns_match_what_they_should_and_nothing_else(
    rng: np.random.Generator,
) -> None:
    suffixes = ("attn/q_proj/kernel", "attn/o_proj/kernel", "mlp/down.proj/kernel")
    paths = [f"layers/{i}/{s}" for i in range(12) for s in (*suffixes, "mlp/down-proj")]
    paths += [f"params/h_{i}/Dense_0/kernel" for i in range(3)] + ["head/kernel", "w"]
    for _ in range(20):
        chosen = [p for p in paths if rng.random() < 0.5]
        found = patterns(chosen, paths)
        hits = {p: sum(bool(re.fullmatch(f, p)) for f in found) for p in paths}
        assert hits == {p: int(p in chosen) for p in paths}
    three = [f"layers/{i}/{s}" for i in (0, 3, 11) for s in suffixes[:2]]
    assert patterns(three, paths) == [r"layers/(0|3|11)/attn/(q_proj|o_proj)/kernel"]
    every = [f"layers/{i}/{suffixes[0]}" for i in range(12)]
    assert patterns(every, paths) == [r"layers/\d+/attn/q_proj/kernel"]


def test_budget_of_time(measured: aj.Allocation) -> None:
    shapes = [(32, 32), (32, 16), (32, 64), (64, 32)]
    each = {"int3:32": 3.0, "int4:32": 1.0, "int8": 2.0}
    found = aj.allocate(
        MODEL, PARAMS, formats=FORMATS, measure="error", budget_ms=20, budget_bits=6,
        latency=dict.fromkeys(shapes, each),
    )  # fmt: skip
    # 14 products: 6 of them may be int8, and the bits allow about half.
    assert found.ms <= 20 and found.bits_per_weight <= 6
    names = [g.choice.name for g in found.groups for _ in g.paths]
    assert set(names) == {"int4:32", "int8"}
    assert found.ms == sum(each[n] for n in names)
    with pytest.raises(AllocationError, match=r"least is .* 14.000000 ms"):
        found.at(budget_ms=13)
    with pytest.raises(AllocationError, match="pass latency="):
        measured.at(budget_ms=1)


def test_measured_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    from pallas_kernels import _timing

    monkeypatch.setattr(_timing, "rotation", lambda nbytes: 2)
    monkeypatch.setattr(_timing, "microseconds", lambda loop: loop.run(1) * 1e6)
    params = {
        "a": {"kernel": jnp.ones((2, 64, 32))},
        "b": {"kernel": jnp.ones((32, 64))},
    }
    times = aj.measure_latency(params, ["int4:32", None], progress=False)
    assert set(times) == {(64, 32), (32, 64)}
    for one in times.values():
        assert set(one) == {"int4:32", "none"} and min(one.values()) > 0
    # The entries of a stack count each.
    assert _latency.time_of(times, (64, 32), "none", 2) == 2 * times[64, 32]["none"]
    with pytest.raises(ValueError, match=r"latency\[\(64, 32\)\]\['int8'\]"):
        _latency.time_of(times, (64, 32), "int8", 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget_bits": 2}, r"budget of 2 bits per weight; the least is 3\.5000 bits"),
        ({"budget_bits": None}, "give budget_bits, budget_mb or budget_ms"),
        ({"budget_mb": 0.0}, "budget_mb must be a positive number"),
        ({"budget_ms": 1.0}, "budget_ms needs latency="),
        ({"formats": ["int4:x:y"]}, "format\\[:group_size\\]"),
        ({"formats": ["int9"]}, "int9"),
        ({"formats": "int4"}, "must be a list"),
        ({"formats": ["int8", {"format": "int8"}]}, "twice"),
        ({"formats": [None]}, "a candidate that is a format"),
        ({"measure": "kll"}, "measure='kll'"),
        ({"batches": []}, "needs batches"),
        ({"group": "block"}, "group='block'"),
        ({"top_k": 64}, "top_k must be from 1 to 63"),
        ({"measure": "linear", "formats": [{"format": "int8", "activation": "int8"}]},
         "weights alone"),
        ({"formats": [{"format": "float8_e4m3", "activation": "float8_e4m3",
                       "activation_scale": "amax"}]}, "needs calibration"),
    ],
)  # fmt: skip
def test_bad_arguments(change: dict, message: str) -> None:
    given = {"formats": FORMATS, "batches": [TOKENS], "budget_bits": 4.5}
    with pytest.raises(ValueError, match=message):
        aj.allocate(MODEL, PARAMS, **{**given, **change})


def test_a_weight_that_is_not_finite_is_named() -> None:
    w = {"a": {"kernel": jnp.ones((32, 8))}, "b": {"kernel": jnp.ones((32, 8))}}
    w["b"]["kernel"] = w["b"]["kernel"].at[0, 0].set(jnp.inf)

    def model(params, x):
        return x @ params["a"]["kernel"]

    with pytest.raises(AllocationError, match="loss of b/kernel with int8"):
        aj.allocate(model, w, formats=["int8"], measure="error", budget_bits=20)


def test_candidates_with_activations_run_as_they_are() -> None:
    w = {"a": {"kernel": jax.random.normal(jax.random.key(0), (64, 16)) / 8}}
    x = jax.random.normal(jax.random.key(1), (32, 64))

    def model(params, x):
        return aj.ops.dot(x, params["a"]["kernel"])

    formats = ["int8", {"format": "int8", "activation": "int4"}]
    found = aj.allocate(model, w, formats=formats, batches=[x], budget_bits=10)
    plain, rounded = found.groups[0].options
    assert rounded.loss > 10 * plain.loss > 0
    assert found.groups[0].choice.name == "int8"
