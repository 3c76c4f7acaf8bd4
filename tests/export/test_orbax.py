"""Round trips: whatever goes in comes back, here and in another process."""

from __future__ import annotations

import asyncio
import json
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.export import orbax as ckpt
from angeljax.formats import QTensor, format_names
from tests.export._helpers import assert_same, run_python, small_tree

RECIPE = aj.Recipe(rules=[aj.Rule(format="int4", group_size=64)], name="demo")


@pytest.mark.parametrize("name", format_names())
def test_every_format_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    w = jnp.sin(jnp.arange(256 * 8.0)).reshape(256, 8).astype(jnp.bfloat16)
    params = {"dense": {"kernel": aj.quantize(w, format=name)}}
    got, recipe = ckpt.load(ckpt.save(tmp_path / "m", params))
    assert recipe is None
    assert_same(got, params)


@pytest.mark.parametrize("name", ["int4", "nvfp4", "t1_6", "sherry"])
def test_scanned_stacks_come_back(name: str, tmp_path: Path) -> None:
    w = jax.random.normal(jax.random.key(1), (3, 256, 32))
    params = {"layers": aj.quantize(w, format=name, batch_axes=1)}
    got, _ = ckpt.load(ckpt.save(tmp_path / "m", params))
    assert_same(got, params)
    assert got["layers"].shape == (3, 256, 32) and got["layers"][1].shape == (256, 32)


def test_containers_keys_and_dtypes_come_back(tmp_path: Path) -> None:
    params = small_tree()
    got, _ = ckpt.load(ckpt.save(tmp_path / "m", params))
    assert_same(got, params)


def test_root_may_be_a_list_and_may_be_empty(tmp_path: Path) -> None:
    assert_same(ckpt.load(ckpt.save(tmp_path / "a", [jnp.ones(2)]))[0], [jnp.ones(2)])
    assert ckpt.load(ckpt.save(tmp_path / "b", {}))[0] == {}


def test_merged_axes_and_odd_sizes_come_back(tmp_path: Path) -> None:
    w = jax.random.normal(jax.random.key(1), (4, 10, 24))
    q = aj.quantize(w, format="int4", axis=(-3, -2), batch_axes=0, group_size=16)
    params = {"out": {"kernel": q}}
    assert_same(ckpt.load(ckpt.save(tmp_path / "m", params))[0], params)


def test_recipe_and_model_travel_along(tmp_path: Path) -> None:
    params = {"w": jnp.ones((4, 4))}
    config = {"hidden_size": 4, "rope": {"theta": 1e4}, "ids": [1, 2], "tied": True}
    files = {"tokenizer.json": b"{}", "sub/merges.txt": b"a b\n"}
    source = {"name": "demo", "revision": None}
    path = ckpt.save(
        tmp_path / "m",
        params,
        RECIPE,
        model_config=config,
        source=source,
        tokenizer=files,
        extra={"note": "é"},
    )
    assert ckpt.load(path)[1] == RECIPE
    manifest = ckpt.load_manifest(path)
    assert manifest.model_config == config and manifest.source == source
    assert manifest.recipe == RECIPE.to_dict() and manifest.extra == {"note": "é"}
    assert set(manifest.versions) == {"angeljax", "jax", "orbax-checkpoint"}
    assert manifest.tokenizer_dir is not None
    for name, data in files.items():
        assert (manifest.tokenizer_dir / name).read_bytes() == data


def test_tokenizer_may_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "tok" / "sub").mkdir(parents=True)
    (tmp_path / "tok" / "a.json").write_bytes(b"a")
    (tmp_path / "tok" / "sub" / "b.txt").write_bytes(b"b")
    path = ckpt.save(tmp_path / "m", {}, tokenizer=tmp_path / "tok")
    assert set(ckpt.load_manifest(path).tokenizer_files) == {"a.json", "sub/b.txt"}
    assert ckpt.load_manifest(ckpt.save(tmp_path / "n", {})).tokenizer_dir is None


def test_a_second_process_loads_without_knowing_the_tree(tmp_path: Path) -> None:
    params = small_tree()
    path = ckpt.save(tmp_path / "m", params, RECIPE)
    code = """
import sys, numpy as np
from angeljax.export import orbax
params, recipe = orbax.load(sys.argv[1])
assert recipe.name == "demo", recipe
np.save(sys.argv[2], np.asarray(params["layers"][1][0]["kernel"].dequantize()))
orbax.save(sys.argv[3], params, recipe)
"""
    result = run_python(code, path, tmp_path / "w.npy", tmp_path / "again")
    assert result.returncode == 0, result.stderr
    want = params["layers"][1][0]["kernel"].dequantize()
    assert np.array_equal(np.load(tmp_path / "w.npy"), want)
    assert_same(ckpt.load(tmp_path / "again")[0], params)


def test_arrays_are_a_plain_orbax_checkpoint(tmp_path: Path) -> None:
    import orbax.checkpoint as ocp

    params = {"dense": {"kernel": aj.quantize(jnp.ones((64, 8)), format="int8")}}
    path = ckpt.save(tmp_path / "m", params)
    assert sorted(p.name for p in path.iterdir()) == [
        "arrays",
        "manifest.json",
        "manifest.sha256",
    ]
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(
            path / "arrays",
            {
                f"dense/kernel/{name}": jax.ShapeDtypeStruct(
                    p.shape, p.dtype, sharding=p.sharding
                )
                for name, p in params["dense"]["kernel"].planes.items()
            },
        )
    assert arrays["dense/kernel/codes"].dtype == jnp.int8
    subprocess.run(
        ["sha256sum", "--check", "--quiet", "manifest.sha256"], cwd=path, check=True
    )


def test_saved_from_shards_loads_anywhere(tmp_path: Path) -> None:
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    w = jax.random.normal(jax.random.key(0), (512, 64))
    params = {"kernel": aj.quantize(w, format="int4", group_size=64)}
    sharding = jax.NamedSharding(mesh, jax.P("x", "y"))
    spread = jax.tree.map(lambda p: jax.device_put(p, sharding), params)
    one = ckpt.load_manifest(ckpt.save(tmp_path / "one", params))
    many = ckpt.load_manifest(ckpt.save(tmp_path / "many", spread))
    assert one.leaves == many.leaves  # digests do not depend on the sharding
    got, _ = ckpt.load(tmp_path / "many")
    assert_same(got, params)
    assert got["kernel"].sharding.device_set == {jax.local_devices()[0]}


def test_compress_save_load(tmp_path: Path) -> None:
    params = {"mlp": {"up": {"kernel": jnp.ones((128, 64)), "bias": jnp.ones(64)}}}
    cparams = aj.compress(params, RECIPE)
    got, recipe = ckpt.load(ckpt.save(tmp_path / "m", cparams, RECIPE))
    assert_same(got, cparams)
    assert_same(aj.compress(params, recipe), cparams)
    assert isinstance(got["mlp"]["up"]["kernel"], QTensor)


def test_recipe_may_be_a_dict(tmp_path: Path) -> None:
    path = ckpt.save(tmp_path / "m", {}, RECIPE.to_dict())
    assert ckpt.load(path)[1] == RECIPE
    assert json.loads((path / "manifest.json").read_text())["format_version"] == 1
    with pytest.raises(aj.RecipeError, match="fromat"):
        ckpt.save(tmp_path / "n", {}, {"rules": [{"fromat": "int4"}]})
    assert not (tmp_path / "n").exists()


def test_a_notebook_may_save_and_load(tmp_path: Path) -> None:
    """A notebook cell runs inside an event loop; Orbax runs loops of its own."""

    async def cell() -> None:
        path = ckpt.save(tmp_path / "m", {"w": jnp.ones(4)})
        assert_same(ckpt.load(path)[0], {"w": jnp.ones(4)})

    asyncio.run(cell())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["int4", "nvfp4", "sherry", "float8_e4m3"])
def test_gpu_arrays_come_back(name: str, tmp_path: Path) -> None:
    w = jax.random.normal(jax.random.key(1), (256, 64), jnp.bfloat16)
    params = {"kernel": jax.jit(lambda w: aj.quantize(w, format=name))(w)}
    got, _ = ckpt.load(ckpt.save(tmp_path / "m", params))
    assert_same(got, params)
    assert got["kernel"].sharding == params["kernel"].sharding
