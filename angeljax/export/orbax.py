"""Checkpoints of compressed models: Orbax for the arrays, a manifest for the rest.

```
<path>/manifest.json      the tree, specs, recipe, configuration, a digest per array
<path>/manifest.sha256    digest of the manifest, for `sha256sum -c`
<path>/arrays/            an Orbax checkpoint of plain arrays, `layers/0/kernel/codes`
<path>/tokenizer/         the tokenizer's files, as they were
```

Orbax stores arrays and forgets the rest; with the manifest a checkpoint loads without
knowing the model. Any Orbax reader opens `arrays/` by itself.

The path must lie on a file system that all processes see. On several hosts, each
process writes and reads its own shards; the digest of an array that is spread over
hosts gathers it once, which `load(verify=False)` avoids.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from angeljax.export import _arrays, _commit, _entries, _manifest, _placement, _tree
from angeljax.export._entries import Entry, Stored
from angeljax.export._errors import CheckpointError, one_line
from angeljax.export._manifest import Manifest
from angeljax.formats import QTensor, Spec
from angeljax.recipe import Recipe, RecipeError

__all__ = ["CheckpointError", "Manifest", "load", "load_manifest", "save"]


def save(
    path: str | os.PathLike[str],
    params: Any,
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    model_config: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | str | None = None,
    tokenizer: Mapping[str, bytes] | str | os.PathLike[str] | None = None,
    extra: Any = None,
    overwrite: bool = False,
) -> Path:
    """Writes a param tree and what is needed to use it again.

    The directory appears at `path` in one step, complete. An interrupted save leaves
    nothing there; a killed one leaves `<path>.partial-<hex>`, which may be deleted.
    With `overwrite`, the old checkpoint stays until the new one is complete.

    Args:
      path: a directory that does not exist yet.
      params: nested dicts, lists and tuples of arrays and `QTensor`s, such as linen
        params or `nnx.to_pure_dict(state)`. Keys are strings or integers.
      recipe: what was done to the model.
      model_config: configuration of the model, JSON values.
      source: where the weights came from: a name, or JSON values.
      tokenizer: file name -> content, or a folder of files.
      extra: further JSON values.
      overwrite: whether a checkpoint at `path` may be replaced. Nothing but a
        checkpoint or an empty directory is ever replaced.

    Returns:
      The absolute path.

    Raises:
      CheckpointError: `path` exists, or something cannot be stored; says what.
      RecipeError: `recipe` is a dict that is no valid recipe.

    Example:
      >>> import tempfile, jax.numpy as jnp, angeljax as aj
      >>> from angeljax.export import orbax
      >>> params = {"dense": {"kernel": aj.quantize(jnp.ones((64, 8)), format="int8")}}
      >>> path = orbax.save(tempfile.mkdtemp() + "/model", params, source="demo")
      >>> orbax.load(path)[0]["dense"]["kernel"]
      QTensor(int8 channel [64,8] float32, 8.500 bit/weight)
    """
    path = Path(os.path.abspath(path))
    _commit.check_target(path, overwrite)
    # Everything that can be refused is refused before the first byte is written.
    structure, leaves = _tree.describe(params)
    for name, leaf in leaves.items():
        _check_leaf(name, leaf)
    meta = {
        "recipe": _recipe_dict(recipe),
        "model_config": _manifest.plain(model_config, "model_config"),
        "source": _manifest.plain(source, "source"),
        "extra": _manifest.plain(extra, "extra"),
    }
    files = _tokenizer_files(tokenizer)
    arrays = {
        _entries.storage_name(name, plane): x
        for name, leaf in leaves.items()
        for plane, x in _entries.planes_of(leaf).items()
    }
    if len(arrays) < sum(len(_entries.planes_of(leaf)) for leaf in leaves.values()):
        raise CheckpointError("two arrays have the same path: rename one of the leaves")

    with _commit.replacing(path, overwrite) as partial:
        # Orbax refuses arrays without elements; the manifest knows all about them.
        filled = {name: x for name, x in arrays.items() if x.size}
        if filled:
            _arrays.write(partial / _manifest.ARRAYS, filled)
        entries = {name: _entry(name, leaf) for name, leaf in leaves.items()}
        if jax.process_index() == 0:
            digests = _write_files(partial / _manifest.TOKENIZER, files)
            _manifest.write(
                Manifest(
                    path=partial,
                    versions=_versions(),
                    created=datetime.datetime.now(datetime.UTC).isoformat(
                        timespec="seconds"
                    ),
                    tokenizer_files=digests,
                    array_files=_arrays.list_files(partial / _manifest.ARRAYS),
                    structure=structure,
                    leaves=entries,
                    **meta,
                )
            )
    return path


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    shardings: Any = None,
    verify: bool = True,
) -> tuple[Any, Recipe | None]:
    """Reads a checkpoint of `save`, bit for bit, in the containers it had.

    Every array is read straight onto its sharding. Without `mesh` and `shardings` that
    is the first local device; with a mesh alone, a copy on each of its devices.

    A partition is given for the weight, `P("x", None)` for a kernel `[in, out]`, and
    holds for its planes: the contraction axes are merged into one there, and a plane
    that is too short for an axis of the mesh (a scale, mostly) is not cut along it.

    Args:
      path: the checkpoint.
      mesh: the mesh that partitions refer to.
      shardings: one `PartitionSpec` or `Sharding` for all weights; or a function of
        path and shape that returns one or None; or a dict of regular expressions for
        whole paths, where the first match counts and the rest is replicated; or a tree
        like the params (or its upper part). A flat dict of partitions is always taken
        for regular expressions.
      verify: compare the digest of every array. Costs a copy to the host.

    Returns:
      The params and the recipe (None if there was none).

    Raises:
      CheckpointError: no checkpoint, damaged, or newer; or a sharding does not fit.

    Example:
      >>> params, recipe = load("model")                            # doctest: +SKIP
      >>> load("model", mesh=mesh, shardings={".*kernel": P("x")})  # doctest: +SKIP
    """
    manifest = load_manifest(path)
    recipe = _recipe(manifest)
    placed = _placement.place(manifest.structure, manifest.leaves, mesh, shardings)
    targets: dict[str, jax.ShapeDtypeStruct] = {}
    digests: dict[str, str] = {}
    for entry in manifest.leaves.values():
        for _, name, stored in entry.stored():
            targets[name] = stored.abstract.update(sharding=placed[name])
            digests[name] = stored.sha256
    _arrays.check_files(manifest.arrays_dir, manifest.array_files)
    filled = {name: t for name, t in targets.items() if t.size}
    arrays = _arrays.read(manifest.arrays_dir, filled) if filled else {}
    for name in targets.keys() - filled.keys():
        arrays[name] = jax.device_put(
            jnp.zeros(targets[name].shape, targets[name].dtype), targets[name].sharding
        )
    if verify:
        for name, want in digests.items():
            if _arrays.digest(arrays[name]) != want:
                raise CheckpointError(
                    f"{manifest.arrays_dir}: {name!r} is not what was saved (digest "
                    "mismatch): copy the checkpoint again or save again"
                )
    leaves = {name: entry.build(arrays) for name, entry in manifest.leaves.items()}
    return _tree.rebuild(manifest.structure, leaves), recipe


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Reads everything about a checkpoint but its arrays.

    Args:
      path: the checkpoint.

    Returns:
      The manifest: tree, specs, recipe, configuration, versions, digests.

    Raises:
      CheckpointError: no checkpoint, damaged, or newer.

    Example:
      >>> manifest = load_manifest("model")       # doctest: +SKIP
      >>> manifest.model_config["vocab_size"]     # doctest: +SKIP
      49152
    """
    path = Path(os.path.abspath(path))
    if _commit.is_partial(path):
        raise CheckpointError(
            f"{path}: the leftover of an interrupted save: delete it and save again"
        )
    if not path.is_dir():
        found = sorted(path.parent.glob(f"{path.name}.*-????????"))
        left = [p.name for p in found if _commit.is_partial(p)]
        hint = f" (an interrupted save left {left[0]}: save again)" if left else ""
        raise CheckpointError(f"{path}: no such directory{hint}")
    return _manifest.read(path)


def _check_leaf(path: str, leaf: Any) -> None:
    planes = _entries.planes_of(leaf)
    for plane, x in planes.items():
        name = _entries.storage_name(path, plane)
        if isinstance(x, jax.ShapeDtypeStruct | jax.core.Tracer):
            raise CheckpointError(f"{name!r} is abstract: save outside of jit")
        _arrays.check_dtype(name, x.dtype)
        if isinstance(x, jax.Array) and x.is_deleted():
            raise CheckpointError(f"{name!r} was deleted or donated: keep a copy")
    if isinstance(leaf, QTensor):
        spec = leaf.spec
        if Spec.from_dict(_manifest.plain(spec.to_dict(), f"spec of {path!r}")) != spec:
            raise CheckpointError(f"the spec of {path!r} does not survive JSON")
        shapes = {
            n: Stored(tuple(x.shape), jnp.dtype(x.dtype).name, "")
            for n, x in planes.items()
        }
        _entries.check(Entry(path, shapes, spec))


def _entry(path: str, leaf: Any) -> Entry:
    planes = {
        plane: Stored.of(_entries.storage_name(path, plane), x)
        for plane, x in _entries.planes_of(leaf).items()
    }
    return Entry(path, planes, leaf.spec if isinstance(leaf, QTensor) else None)


def _recipe_dict(recipe: Recipe | Mapping[str, Any] | None) -> dict[str, Any] | None:
    if recipe is None:
        return None
    # A dict goes through Recipe, so that what cannot be loaded is not saved.
    full = recipe if isinstance(recipe, Recipe) else Recipe.from_dict(recipe)
    return _manifest.plain(full.to_dict(), "recipe")


def _recipe(manifest: Manifest) -> Recipe | None:
    try:
        return None if manifest.recipe is None else Recipe.from_dict(manifest.recipe)
    except RecipeError as e:
        raise CheckpointError(
            f"{manifest.path / _manifest.FILE}: recipe: {one_line(e)}"
        ) from e


def _tokenizer_files(
    tokenizer: Mapping[str, bytes] | str | os.PathLike[str] | None,
) -> dict[str, bytes]:
    if tokenizer is None:
        return {}
    if isinstance(tokenizer, Mapping):
        return {_manifest.check_name(n): bytes(data) for n, data in tokenizer.items()}
    folder = Path(tokenizer)
    if not folder.is_dir():
        raise CheckpointError(f"tokenizer: {folder} is no directory")
    return {
        _manifest.check_name(file.relative_to(folder).as_posix()): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _write_files(folder: Path, files: Mapping[str, bytes]) -> dict[str, str]:
    digests = {}
    for name, data in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        digests[name] = hashlib.sha256(data).hexdigest()
    return digests


def _versions() -> dict[str, str]:
    import orbax.checkpoint

    # Late: angeljax itself imports this module.
    from angeljax import __version__

    return {
        "angeljax": __version__,
        "jax": jax.__version__,
        "orbax-checkpoint": orbax.checkpoint.__version__,
    }
