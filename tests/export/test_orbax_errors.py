"""Everything that is refused, with the line that is given."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.export import orbax as ckpt
from angeljax.formats import QTensor


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    w = jax.random.normal(jax.random.key(0), (256, 64))
    params = {
        "dense": {"kernel": aj.quantize(w, format="int4", group_size=64)},
        "norm": jnp.ones(64),
    }
    return ckpt.save(
        tmp_path_factory.mktemp("errors") / "m",
        params,
        aj.Recipe(rules=[aj.Rule(format="int4")]),
        tokenizer={"tokenizer.json": b"{}"},
    )


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "m"))


def refused(path: Path, *parts: str, **options: Any) -> None:
    """`load` raises one line that holds all parts and names the checkpoint."""
    with pytest.raises(ckpt.CheckpointError) as e:
        ckpt.load(path, **options)
    message = str(e.value)
    assert "\n" not in message and len(message) < 600
    for part in (str(path), *parts):
        assert part in message


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the manifest and signs it again."""
    file = path / "manifest.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    (path / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


def largest(path: Path) -> Path:
    """The file that holds the codes."""
    files = [p for p in (path / "arrays").rglob("*") if p.is_file()]
    return max(files, key=lambda p: p.stat().st_size)


def test_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such directory")
    refused(tmp_path, "not an angeljax checkpoint", "pass a directory that")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "no such directory")


def test_the_manifest_is_missing(saved: Path) -> None:
    (saved / "manifest.json").unlink()
    refused(saved, "manifest.json is missing")


@pytest.mark.parametrize("text", ["", "{", "not json", "\xff", "[" * 100_000])
def test_the_manifest_is_no_json(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_text(text, encoding="latin-1")
    refused(saved, "manifest.json", "truncated or not JSON", "copy the checkpoint")


def test_the_manifest_is_cut(saved: Path) -> None:
    file = saved / "manifest.json"
    file.write_bytes(file.read_bytes()[:-20])
    refused(saved, "truncated or not JSON")


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "other"}', "3"])
def test_the_manifest_is_another_one(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_text(text)
    refused(saved, "not the manifest of an angeljax checkpoint")


@pytest.mark.parametrize("version", [2, 0, "1", None, True])
def test_the_format_is_newer(saved: Path, version: Any) -> None:
    edit(saved, lambda m: m.update(format_version=version))
    refused(saved, f"format version {version!r}", "upgrade angeljax")


def test_the_manifest_was_changed(saved: Path) -> None:
    file = saved / "manifest.json"
    file.write_text(file.read_text().replace('"int4"', '"int8"', 1))
    refused(saved, "changed after saving", "copy the checkpoint again")
    (saved / "manifest.sha256").unlink()
    refused(saved, "manifest.sha256: missing or unreadable")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_arrays_are_cut(saved: Path, keep: float) -> None:
    file = largest(saved)
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    refused(saved, str(file), "damaged, has", "bytes: copy the checkpoint again")


def test_arrays_are_cut_and_the_manifest_says_so_too(saved: Path) -> None:
    file = largest(saved)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    edit(saved, lambda m: m["array_files"].clear())
    refused(saved, "arrays: damaged, save again or copy it again")


@pytest.mark.parametrize("where", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_arrays_are_tampered_with(saved: Path, where: float) -> None:
    file = largest(saved)
    data = bytearray(file.read_bytes())
    data[int(len(data) * where)] ^= 1
    file.write_bytes(data)
    refused(saved, "arrays", "again")


def test_verify_false_skips_the_digests(saved: Path) -> None:
    def forge(manifest: dict[str, Any]) -> None:
        manifest["leaves"]["norm"]["sha256"] = "0" * 64

    edit(saved, forge)
    refused(saved, "'norm' is not what was saved (digest mismatch)")
    params, _ = ckpt.load(saved, verify=False)
    assert jnp.array_equal(params["norm"], jnp.ones(64))


@pytest.mark.parametrize("name", ["", "_METADATA", "manifest.ocdbt", "d"])
def test_array_files_are_missing(saved: Path, name: str) -> None:
    target = saved / "arrays" / name
    if target.is_dir():
        shutil.rmtree(target)
        if name:  # the data lies in more than one folder of this name
            shutil.rmtree(saved / "arrays" / "ocdbt.process_0")
    else:
        target.unlink()
    refused(saved, "arrays", "again")


def _leaf(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest["leaves"]["dense/kernel"]


BAD = {
    "dtype of an array": (
        lambda m: m["leaves"]["norm"].update(dtype="bfloat16"),
        "'norm' is float32[64], the manifest says bfloat16[64]",
    ),
    "shape of an array": (
        lambda m: m["leaves"]["norm"].update(shape=[8, 8]),
        "'norm' is float32[64], the manifest says float32[8, 8]",
    ),
    "negative shape": (lambda m: m["leaves"]["norm"].update(shape=[-1]), "shape [-1]"),
    "object dtype": (
        lambda m: m["leaves"]["norm"].update(dtype="object"),
        "unknown dtype 'object'",
    ),
    "unhashable dtype": (lambda m: m["leaves"]["norm"].update(dtype=[]), "malformed"),
    "64 bits": (
        lambda m: m["leaves"]["norm"].update(dtype="float64"),
        "only with jax_enable_x64",
    ),
    "no digest": (lambda m: m["leaves"]["norm"].pop("sha256"), "malformed entry"),
    "kind": (lambda m: m["leaves"]["norm"].update(kind="pickle"), "unknown kind"),
    "shape of codes": (
        lambda m: _leaf(m)["planes"]["codes"].update(shape=[100, 64]),
        "int4 g64 does not decode from codes uint8[100, 64]",
    ),
    "rank of codes": (
        lambda m: _leaf(m)["planes"]["codes"].update(shape=[2, 128, 64]),
        "'dense/kernel'",
    ),
    "dtype of codes": (
        lambda m: _leaf(m)["planes"]["codes"].update(dtype="int8"),
        "'dense/kernel/codes' is uint8[128, 64], the manifest says int8[128, 64]",
    ),
    "no codes": (lambda m: _leaf(m)["planes"].pop("codes"), "has no plane 'codes'"),
    "logical shape": (lambda m: _leaf(m).update(shape=[256, 65]), "[256, 65]"),
    "spec shape": (lambda m: _leaf(m)["spec"].update(shape=[256, 65]), "'dense/kernel"),
    "unknown format": (
        lambda m: _leaf(m)["spec"].update(format="int44"),
        "unknown format 'int44': did you mean int4",
    ),
    "unknown spec field": (
        lambda m: _leaf(m)["spec"].update(zip=1),
        "spec has missing or unknown fields: zip",
    ),
    "missing spec field": (lambda m: _leaf(m)["spec"].pop("axis"), "fields: axis"),
    "spec is a list": (lambda m: _leaf(m).update(spec=[]), "'dense/kernel'"),
    "another leaf": (
        lambda m: m["leaves"].update(x=m["leaves"]["norm"]),
        "tree and leaves disagree on x",
    ),
    "tree node": (lambda m: m.update(structure={"set": []}), "malformed tree node"),
    "tree key": (
        lambda m: m.update(structure={"dict": [[[1], "norm"]]}),
        "malformed tree node",
    ),
    "tree leaf twice": (
        lambda m: m["structure"]["dict"].append(["again", "norm"]),
        "tree and leaves disagree",
    ),
    "unknown field": (lambda m: m.update(hook="os.system"), "unknown fields: hook"),
    "missing field": (lambda m: m.pop("source"), "fields: source"),
    "leaves": (lambda m: m.update(leaves=[]), "manifest.json"),
    "config": (lambda m: m.update(model_config=[]), "model_config must be a mapping"),
    "recipe": (
        lambda m: m["recipe"]["rules"][0].update(format="int44"),
        "recipe: rule",
    ),
    "tokenizer": (lambda m: m.update(tokenizer_files=["a"]), "manifest.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_the_manifest_contradicts_itself_or_the_arrays(saved: Path, case: str) -> None:
    change, message = BAD[case]
    edit(saved, change)
    refused(saved, message)


NAMES = ["../x", "/etc/passwd", "a/../../x", "..", ".", "", "a//b", "./a", "a\\b"]
NAMES += ["C:x", "a\0b", "a/"]


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_names_that_lead_elsewhere(
    saved: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "x").write_bytes(b"{}")
    with pytest.raises(ckpt.CheckpointError, match="use a relative path such as"):
        ckpt.save(tmp_path / "n", {}, tokenizer={name: b"{}"})
    assert not (tmp_path / "n").exists()
    digest = hashlib.sha256(b"{}").hexdigest()
    edit(saved, lambda m: m.update(tokenizer_files={name: digest}))
    refused(saved, "use a relative path such as")


def test_tokenizer_files_are_checked(saved: Path, tmp_path: Path) -> None:
    file = saved / "tokenizer" / "tokenizer.json"
    file.write_bytes(b"[]")
    refused(saved, "'tokenizer.json' was changed after saving")
    file.unlink()
    refused(saved, "'tokenizer.json' is missing")
    (tmp_path / "secret").write_bytes(b"{}")
    file.symlink_to(tmp_path / "secret")
    refused(saved, "'tokenizer.json' is missing")


class _Other(dict):
    pass


Q = aj.quantize(jnp.ones((64, 8)), format="int8")
PARAMS = {
    "root": (jnp.ones(2), "params must be a dict, list or tuple"),
    "subclass": ({"a": _Other()}, "'a' is "),
    "string": ({"a": "text"}, "'a' is str, neither array nor QTensor"),
    "scalar": ({"a": 1.0}, "'a' is float, neither array nor QTensor"),
    "key": ({("a",): jnp.ones(1)}, "must be a str or an int"),
    "bool key": ({True: jnp.ones(1)}, "key True under 'params'"),
    "same path": ({1: jnp.ones(1), "1": jnp.ones(1)}, "two leaves have the path '1'"),
    "same plane": ({1: Q, "1": {"codes": jnp.ones(1)}}, "two arrays have the same"),
    "random key": ({"k": jax.random.key(0)}, "save jax.random.key_data"),
    "strings": ({"a": np.array(["x"])}, "cannot be stored"),
    "objects": ({"a": np.array([None])}, "cannot be stored"),
    "64 bits": ({"a": np.ones(2)}, "cast to 32 bits"),
    "abstract": (
        {"a": QTensor({"codes": jax.ShapeDtypeStruct((64, 8), jnp.int8)}, Q.spec)},
        "'a/codes' is abstract",
    ),
    "planes": ({"a": QTensor({"codes": Q.planes["codes"]}, Q.spec)}, "not decode"),
    "wrong planes": (
        {"a": QTensor({n: p[:5] for n, p in Q.planes.items()}, Q.spec)},
        "'a'",
    ),
}


@pytest.mark.parametrize("case", PARAMS)
def test_params_that_cannot_be_saved(case: str, tmp_path: Path) -> None:
    params, message = PARAMS[case]
    with pytest.raises(ckpt.CheckpointError) as e:
        ckpt.save(tmp_path / "m", params)
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_flax_containers_get_advice(tmp_path: Path) -> None:
    from flax import nnx
    from flax.core import freeze

    state = nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ckpt.CheckpointError, match="pass flax.nnx.to_pure_dict"):
        ckpt.save(tmp_path / "m", state)
    with pytest.raises(ckpt.CheckpointError, match="flax.core.unfreeze"):
        ckpt.save(tmp_path / "m", freeze({"a": jnp.ones(1)}))
    ckpt.save(tmp_path / "m", nnx.to_pure_dict(state))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_config": {"a": {1: 2}}}, "model_config['a'] has key 1"),
        ({"model_config": {"a": [jnp.ones(1)]}}, "model_config['a'][0] is a"),
        ({"source": {"a": float("nan")}}, "source['a'] is nan"),
        ({"extra": b"x"}, "extra is a bytes"),
        ({"tokenizer": "/nowhere"}, "/nowhere is no directory"),
    ],
)
def test_details_that_cannot_be_saved(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ckpt.CheckpointError) as e:
        ckpt.save(tmp_path / "m", {}, **options)
    assert message in str(e.value)
    assert not list(tmp_path.iterdir())
