"""Restoring onto a mesh: partitions of weights become partitions of planes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import P
from jax.sharding import Mesh, NamedSharding

import angeljax as aj
from angeljax.export import orbax as ckpt
from tests.export._helpers import assert_same


@pytest.fixture
def mesh() -> Mesh:
    return jax.make_mesh((4, 2), ("x", "y"))


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    w = jax.random.normal(jax.random.key(0), (2, 512, 64))
    heads = jax.random.normal(jax.random.key(1), (8, 64, 16))
    return {
        "layers": [
            {"kernel": aj.quantize(w[0], format="int4", group_size=64)},
            {"kernel": aj.quantize(w[1], format="int8")},
        ],
        "stack": {"kernel": aj.quantize(w, format="sherry", batch_axes=1)},
        "out": {
            "kernel": aj.quantize(
                heads, format="int4", axis=(-3, -2), batch_axes=0, group_size=64
            )
        },
        "norm": jnp.ones(64, jnp.bfloat16),
        "empty": jnp.zeros((0, 8)),
    }


@pytest.fixture(scope="module")
def saved(params: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ckpt.save(tmp_path_factory.mktemp("sharding") / "m", params)


def _specs(x: Any) -> dict[str, Any]:
    """Plane -> PartitionSpec without trailing None."""
    out = {}
    for name, p in x.planes.items():
        assert isinstance(p.sharding, NamedSharding)
        entries = list(p.sharding.spec)
        while entries and entries[-1] is None:
            entries.pop()
        out[name] = P(*entries)
    return out


def test_a_mesh_alone_replicates(
    saved: Path, params: dict[str, Any], mesh: Mesh
) -> None:
    got, _ = ckpt.load(saved, mesh=mesh)
    assert_same(got, params)
    for leaf in jax.tree.leaves(got):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.sharding.device_set) == 8


def test_patterns_cut_codes_and_scales(
    saved: Path, params: dict[str, Any], mesh: Mesh
) -> None:
    rules = {
        "layers/0/kernel": P("x", "y"),
        "layers/1/kernel": P("x", None),
        "stack/.*": P(None, "y", ("x", "y")),
        "out/kernel": P("x", None, "y"),
    }
    rules["stack/.*"] = P("y", None, "x")
    got, _ = ckpt.load(saved, mesh=mesh, shardings=rules)
    assert_same(got, params)
    first, second = (layer["kernel"] for layer in got["layers"])
    assert _specs(first) == {"codes": P("x", "y"), "scale": P("x", "y")}
    # One scale per output: it has no contraction axis to cut.
    assert _specs(second) == {"codes": P("x"), "scale": P()}
    assert _specs(got["stack"]["kernel"])["codes"] == P("y", None, "x")
    # 8 heads of 64 are one axis of 512 in the planes.
    assert _specs(got["out"]["kernel"])["codes"] == P("x", "y")
    codes = first.planes["codes"]
    assert codes.addressable_shards[0].data.shape == (
        codes.shape[0] // 4,
        codes.shape[1] // 2,
    )
    assert got["norm"].sharding.is_fully_replicated
    assert jnp.array_equal(
        first.dequantize(), params["layers"][0]["kernel"].dequantize()
    )


def test_a_function_a_tree_and_one_for_all(
    saved: Path, params: dict[str, Any], mesh: Mesh
) -> None:
    def rule(path: str, shape: tuple[int, ...]) -> P | None:
        return P("x", "y") if path.startswith("layers") and len(shape) == 2 else None

    tree = {
        "layers": P("x", "y"),
        "stack": {"kernel": None},
        "out": {"kernel": None},
        "norm": None,
        "empty": NamedSharding(mesh, P()),
    }
    named = {"layers/.*": NamedSharding(mesh, P("x", "y")), ".*": None}
    for shardings in (rule, tree, named):
        got, _ = ckpt.load(saved, mesh=mesh, shardings=shardings)
        assert_same(got, params)
        for layer in got["layers"]:
            assert _specs(layer["kernel"])["codes"] == P("x", "y")
        assert _specs(got["stack"]["kernel"])["codes"] == P()
    got, _ = ckpt.load(saved, shardings=NamedSharding(mesh, P()))
    assert len(got["norm"].sharding.device_set) == 8


def test_too_short_planes_are_not_cut(saved: Path, params: dict[str, Any]) -> None:
    mesh = jax.make_mesh((8,), ("x",))
    heads = {"out/kernel": P(None, "x", None), "layers/0/.*": P(None, "x")}
    got, _ = ckpt.load(saved, mesh=mesh, shardings=heads)
    # Cutting inside each head gives no contiguous block of the merged axis.
    assert _specs(got["out"]["kernel"])["codes"] == P()
    assert _specs(got["layers"][0]["kernel"])["scale"] == P(None, "x")
    one = ckpt.load(saved, mesh=mesh, shardings={"stack/.*": P(None, "x")})[0]
    scale = one["stack"]["kernel"].planes["scale"]
    assert scale.shape[1] == 4 and _specs(one["stack"]["kernel"])["scale"] == P()
    assert _specs(one["stack"]["kernel"])["codes"] == P(None, "x")
    assert_same(one, params)


@pytest.mark.parametrize(
    ("shardings", "message"),
    [
        ({"layers/.*": P("z")}, "'z' is no axis of the mesh"),
        ({"norm": P("x", "y")}, "more entries than shape"),
        ({"norm": P(("x", "y"))}, None),
        ({"layer/.*": P("x")}, "'layer/.*' decides for no path; paths look like"),
        ({"empty": P(None, ("x", "y", "x"))}, "cuts an axis of 8 into 32 parts"),
        ({"layers": [P("x")], "norm": None}, "nothing for 'layers/1/kernel'"),
        (lambda path, shape: "x", "'x' for 'layers/0/kernel' is no Part"),
    ],
)
def test_shardings_that_do_not_fit(
    saved: Path, mesh: Mesh, shardings: Any, message: str | None
) -> None:
    if message is None:
        ckpt.load(saved, mesh=mesh, shardings=shardings)
        return
    with pytest.raises(ckpt.CheckpointError) as e:
        ckpt.load(saved, mesh=mesh, shardings=shardings)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_partitions_need_a_mesh(saved: Path) -> None:
    with pytest.raises(ckpt.CheckpointError, match="needs a mesh: pass mesh="):
        ckpt.load(saved, shardings={".*": P("x")})
