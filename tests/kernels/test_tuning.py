"""Tuning tables, the plans worth timing, what `angeljax tune` says without a GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType
from typer.testing import CliRunner

from angeljax.cli import app
from pallas_kernels import KernelError, WeightLayout, _tuning, prepare, tune
from pallas_kernels._dense import dense
from pallas_kernels.quantized_matmul import mosaic_gpu as quantized
from pallas_kernels.ternary_matmul import mosaic_gpu as ternary

CHANNEL = WeightLayout(format="sherry", k=4096, n=14336, group_size=4096)
GROUPS = WeightLayout(format="int4", k=512, n=256, group_size=128, symmetric=False)


def _table(plans: Any, device: str = "cpu") -> dict[str, Any]:
    return {"device": device, "versions": {}, "date": "2026-01-01", "plans": plans}


@pytest.fixture(autouse=True)
def no_cache() -> Any:
    _tuning.read.cache_clear()
    yield
    _tuning.read.cache_clear()


def _on_h100() -> Any:
    device = jax.sharding.AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda"
    )
    mesh = AbstractMesh(
        (1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device
    )
    return jax.sharding.use_abstract_mesh(mesh)


# Tables


def test_names_of_cases() -> None:
    assert _tuning.case_of(CHANNEL, False) == "sherry 4096x14336 channel int8"
    assert _tuning.case_of(GROUPS, True) == "int4+zero 512x256 g128 wide"


@pytest.mark.parametrize(
    ("m", "want"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (129, 256)]
)
def test_buckets_are_powers_of_two_from_above(m: int, want: int) -> None:
    assert _tuning.bucket(m) == want


def test_lookup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = "sherry 4096x14336 channel int8"
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    _tuning.write(first, _table({case: {"1": {"warps": 8}}}))
    _tuning.write(
        second, _table({case: {"1": {"warps": 16}, "4": {"tokens_first": True}}})
    )
    assert _tuning.lookup(1, CHANNEL, False) is None
    monkeypatch.setenv(_tuning.VARIABLE, f"{first}:{second}")
    plan = _tuning.lookup(1, CHANNEL, False)
    assert plan == {"warps": 8}, "the first table goes first"
    plan["warps"] = 99
    assert _tuning.lookup(1, CHANNEL, False) == {"warps": 8}, "a copy"
    assert _tuning.lookup(3, CHANNEL, False) == {"tokens_first": True}
    assert _tuning.lookup(2, CHANNEL, False) is None
    assert _tuning.lookup(1, CHANNEL, True) is None
    assert _tuning.lookup(1, CHANNEL.replace(n=8), False) is None
    monkeypatch.setattr(_tuning, "_shipped", lambda: ())
    with _on_h100():
        assert _tuning.lookup(1, CHANNEL, False) is None, "a table of another device"


def test_activations_may_have_plans_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    int8, inside = (_tuning.case_of(CHANNEL, False, i) for i in (False, True))
    assert inside == "sherry 4096x14336 channel a8"
    path = tmp_path / "table.json"
    plans = {int8: {"1": {"warps": 4}, "2": {"warps": 8}}, inside: {"1": {"warps": 16}}}
    _tuning.write(path, _table(plans))
    monkeypatch.setenv(_tuning.VARIABLE, str(path))
    assert _tuning.lookup(1, CHANNEL, False, True) == {"warps": 16}
    assert _tuning.lookup(2, CHANNEL, False, True) == {"warps": 8}, "else those of int8"
    assert _tuning.lookup(1, CHANNEL, False) == {"warps": 4}


def test_the_table_of_an_h100_comes_with_the_package() -> None:
    with _on_h100():
        plan = _tuning.lookup(1, CHANNEL, False)
        assert plan is not None and ternary.choose(1, CHANNEL, False) == plan
        assert next(iter(ternary.candidates(1, CHANNEL, False)))["kernel"] == "bits"


def test_shipped_tables_can_be_read() -> None:
    for path in _tuning._shipped():
        table = _tuning.read(path)
        for by_tokens in table["plans"].values():
            assert all(_tuning.bucket(int(m)) == int(m) for m in by_tokens)


def test_write_replaces_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.json"
    _tuning.write(path, _table({}))
    assert _tuning.read(str(path))["plans"] == {}
    _tuning.write(path, _table({"a": {"1": {"warps": 4}}}))
    assert _tuning.read(str(path))["plans"] == {"a": {"1": {"warps": 4}}}
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read the tuning table"),
        ("[]", "is no tuning table: no 'device' and 'plans' in it"),
        ("{}", "is no tuning table: no 'device' and 'plans' in it"),
        ('{"device": 3, "plans": {}}', "is no tuning table"),
        ('{"device": "cpu", "plans": []}', "is no tuning table"),
        ('{"device": "cpu", "plans": {"a": []}}', "'a' is no table of plans by tokens"),
        ('{"device": "cpu", "plans": {"a": {"1": 3}}}', "'a', 1 tokens: 3 is no plan"),
        (
            json.dumps(_table({"a": {"1": {"speed": 3}}})),
            "'a', 1 tokens: speed=3 is no parameter of a kernel; there are kernel, w",
        ),
        (
            json.dumps(_table({"a": {"1": {"warps": "8"}}})),
            "warps='8' is no parameter of a kernel",
        ),
        (
            json.dumps(_table({"a": {"1": {"warps": True}}})),
            "warps=True is no parameter of a kernel",
        ),
    ],
)
def test_malformed_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(KernelError, match=re.escape(message)) as caught:
        _tuning.read(str(path))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_table_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_tuning.VARIABLE, "nowhere.json")
    with pytest.raises(KernelError, match="cannot read the tuning table nowhere.json"):
        _tuning.lookup(1, CHANNEL, False)


# Plans


LAYOUTS = [
    (ternary, CHANNEL),
    (ternary, CHANNEL.replace(format="t2", group_size=128)),
    (ternary, WeightLayout(format="t2", k=576, n=192, group_size=576)),
    (quantized, GROUPS),
    (quantized, CHANNEL.replace(format="int8")),
    (quantized, CHANNEL.replace(format="int4", group_size=128)),
    (quantized, CHANNEL.replace(format="nvfp4", group_size=16)),
    (quantized, CHANNEL.replace(format="float8_e4m3")),
    # Three blocks of rows by rule, and more than eight.
    (ternary, CHANNEL.replace(n=11008)),
    (quantized, CHANNEL.replace(format="int8", n=128256)),
]


@pytest.mark.parametrize(
    ("module", "layout"), LAYOUTS, ids=lambda v: getattr(v, "format", "")
)
def test_candidates_hold_what_the_rule_gives(module: Any, layout: Any) -> None:
    for m in (1, 8, 16, 64, 300):
        for wide in (False, True):
            found = list(module.candidates(m, layout, wide))
            assert len(found) == len({json.dumps(p, sort_keys=True) for p in found})
            for plan in found:
                assert plan["kernel"] in ("bits", "bytes", "gemm", "expand")
                assert all(type(v) is _tuning._KEYS[k] for k, v in plan.items())
            # A gemm plan may leave some of its parameters to their defaults.
            rule = module.choose(m, layout, wide)
            assert any(rule.items() <= plan.items() for plan in found), (m, wide, rule)


@pytest.mark.parametrize("module", [ternary, quantized])
def test_a_measured_plan_is_taken_if_it_can_run(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = "t2" if module is ternary else "int8"
    layout = WeightLayout(format=fmt, k=4096, n=4096, group_size=4096)
    plan = {"kernel": "bytes", "warps": 4, "rows_per_block": 1, "prefetch": 2}
    huge = {**plan, "rows_per_block": 10**6}
    plans = {_tuning.case_of(layout, False): {"1": plan, "2": huge}}
    path = tmp_path / "table.json"
    _tuning.write(path, _table(plans))
    monkeypatch.setenv(_tuning.VARIABLE, str(path))
    assert module.choose(1, layout, False) == plan
    assert module.choose(2, layout, False) != huge


# Random weights for timing


@pytest.mark.parametrize("fmt", ["t2", "sherry", "int8", "int4", "float8_e4m3"])
def test_random_weights_are_finite(fmt: str) -> None:
    layout = WeightLayout(format=fmt, k=208, n=32, group_size=208)
    weights, there = tune.random_weights(layout, 2, "xla")
    assert there == layout and len(weights) == 2
    for planes in weights:
        assert jnp.isfinite(dense(planes, layout)).all()
    assert not jnp.array_equal(weights[0]["codes"], weights[1]["codes"])


@pytest.mark.parametrize(
    "layout",
    [
        WeightLayout(format="nvfp4", k=256, n=32, group_size=16),
        WeightLayout(format="mxfp4", k=256, n=32, group_size=32),
        WeightLayout(format="mxfp8", k=256, n=32, group_size=32),
        WeightLayout(format="int4", k=256, n=32, group_size=64, symmetric=False),
        WeightLayout(format="int8", k=256, n=32, group_size=64, symmetric=False),
    ],
    ids=lambda v: v.format,
)
def test_random_weights_with_groups(layout: Any) -> None:
    (planes,), _ = tune.random_weights(layout, 1, "xla")
    assert jnp.isfinite(dense(planes, layout)).all()
    assert planes.keys() == prepare(planes, layout, implementation="xla")[0].keys()
    ready, there = tune.random_weights(layout, 1, "mosaic_gpu")
    assert there.order == "hopper" and "codes" in ready[0]


def test_compiled_keeps_exceptions_and_order() -> None:
    def one(job: int) -> int:
        if job == 3:
            raise ValueError("three")
        return 10 * job

    found = list(tune.compiled(range(70), one, threads=2))
    assert [job for job, _ in found] == list(range(70))
    assert isinstance(found[3][1], ValueError) and found[4][1] == 40


def test_times_of_a_loop() -> None:
    from pallas_kernels import _timing

    x = jnp.ones((4, 64))
    loop = _timing.compile_loop(jnp.matmul, x, [jnp.ones((64, 64))] * 2)
    us = _timing.microseconds(loop, seconds=0.001)
    assert 0 < us < 1e6


# angeljax tune


def test_there_is_nothing_to_tune_on_a_cpu() -> None:
    message = "nothing to tune on a cpu: the implementation 'xla' has no parameters"
    with pytest.raises(KernelError, match=message):
        tune.tune([CHANNEL], [1], ["int8"])


COMMANDS = [
    (["--shape", "64x64", "--format", "t2"], "nothing to tune on a cpu: the implemen"),
    ([], "pass --model, or --shape with --format"),
    (["--shape", "64x64"], "nothing to tune: pass --format, or a compressed --model"),
    (["--shape", "64", "--format", "t2"], "--shape takes in x out, such as 4096x14336"),
    (["--shape", "0x64", "--format", "t2"], "such as 4096x14336, not '0x64'"),
    (["--shape", "64x64", "--format", "t3"], "--format takes one of t2, sherry, int8"),
    (["--shape", "64x64", "--format", "int4:x"], "where it has groups, not 'int4:x'"),
    (
        ["--shape", "64x64", "--format", "t2", "--tokens", "1,x"],
        "--tokens takes numbers from 1 with commas, not '1,x'",
    ),
    (
        ["--shape", "64x64", "--format", "t2", "--activations", "int4"],
        "--activations takes int8, int8-from-bfloat16, bfloat16, not 'int4'",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), COMMANDS)
def test_errors_of_the_command_are_one_line(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "table.json"
    done = CliRunner().invoke(app, ["tune", "--out", str(out), *arguments])
    assert done.exit_code == 1, done.output
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output and not out.exists()


def test_the_command_extends_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake(layouts: Any, tokens: Any, activations: Any, **_: Any) -> Any:
        asked.append((layouts, tokens, activations))
        return _table({"new": {"2": {"warps": 8}}, "old": {"1": {"warps": 4}}})

    monkeypatch.setattr("pallas_kernels.tune.tune", fake)
    out = tmp_path / "table.json"
    _tuning.write(
        out, _table({"old": {"1": {"warps": 16}, "8": {"warps": 16}}, "kept": {}})
    )
    arguments = ["--shape", "64x96", "--format", "int4:32", "--tokens", "1,8"]
    done = CliRunner().invoke(app, ["tune", "--out", str(out), *arguments])
    assert done.exit_code == 0, done.output
    assert "PALLAS_KERNELS_TUNING=" in done.output
    ((layouts, tokens, activations),) = asked
    assert layouts == [WeightLayout(format="int4", k=64, n=96, group_size=32)]
    assert tokens == [1, 8] and activations == ["int8", "bfloat16"]
    assert _tuning.read(str(out))["plans"] == {
        "new": {"2": {"warps": 8}},
        "old": {"1": {"warps": 4}, "8": {"warps": 16}},
        "kept": {},
    }
    _tuning.write(out, _table({}, device="TPU v9"))
    done = CliRunner().invoke(app, ["tune", "--out", str(out), *arguments])
    assert done.exit_code == 1
    assert "is a table of TPU v9, and this is cpu: choose" in " ".join(
        done.output.split()
    )
