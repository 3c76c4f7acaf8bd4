"""Shards on disk that an interrupted run can continue, and what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from angeljax._leaves import path_string

MANIFEST = "manifest.json"
# Kinds of folders, as their manifests and messages call them.
TEACHER = "teacher's predictions"
GENERATED = "generated text"
LAYERS = "reconstructed layers"
COMPRESSED = "compressed layers"


def fingerprint(tree: Any) -> str:
    """sha256 of all leaves: their paths, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(jax.device_get(leaf))
        digest.update(f"{path_string(path)} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def fingerprint_ids(ids: np.ndarray) -> str:
    """sha256 of token ids, whatever their dtype."""
    return hashlib.sha256(np.ascontiguousarray(ids.astype("<u4")).tobytes()).hexdigest()


def id_dtype(vocabulary: int) -> type[np.unsignedinteger[Any]]:
    """The smallest dtype that is used for ids."""
    return np.uint16 if vocabulary <= 2**16 else np.uint32


def start(path: Path, manifest: dict[str, Any]) -> None:
    """Begins in an empty or new folder, or goes on where the same run stopped.

    Raises:
      ValueError: the folder holds something else, or was begun with other settings.
    """
    if path.is_dir() and any(path.iterdir()):
        there = read_manifest(path, manifest["kind"])
        for name in sorted(set(manifest) | set(there)):
            if manifest.get(name) != there.get(name):
                raise ValueError(
                    f"{path} was begun with {name} {there.get(name)!r}, not "
                    f"{manifest.get(name)!r}: choose another folder"
                )
        for left in path.glob("*.partial-*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        return
    path.mkdir(parents=True, exist_ok=True)
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    commit(path / MANIFEST, lambda p: p.write_text(text))


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Which of the kinds a folder is; None for anything else."""
    try:
        data = json.loads((Path(path) / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    kind = data.get("kind") if isinstance(data, dict) else None
    return kind if kind in (TEACHER, GENERATED, LAYERS, COMPRESSED) else None


def read_manifest(path: Path, kind: str) -> dict[str, Any]:
    """What a folder of shards says about itself.

    Raises:
      ValueError: there is none, or it is of another kind.
    """
    file = path / MANIFEST
    try:
        data = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} has no {MANIFEST}: it is no {kind}") from None
    except (OSError, ValueError) as e:
        raise ValueError(f"{file} cannot be read: {e}") from None
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise ValueError(f"{file} does not describe a {kind}")
    return data


def text_name(shard: int) -> str:
    """File of a shard of generated text."""
    return f"tokens-{shard:05d}.npy"


def text_files(path: Path) -> list[Path]:
    """The shards of a folder of generated text, in order.

    Raises:
      ValueError: there is none yet, or one is missing between others.
    """
    count = len(list(path.glob("tokens-*.npy")))
    files = [path / text_name(shard) for shard in range(max(count, 1))]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing: run generate_tokens again")
    return files


def commit(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file or folder beside its place and moves it there in one step."""
    partial = path.with_name(f"{path.name}.partial-{secrets.token_hex(4)}")
    try:
        write(partial)
        os.replace(partial, path)
    except BaseException:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise


def save_array(path: Path, array: np.ndarray) -> None:
    """`np.save` that leaves either the whole file or none."""

    def write(partial: Path) -> None:
        with partial.open("wb") as f:
            np.save(f, array)

    commit(path, write)


def load_array(path: Path, dtype: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """Maps a file into memory.

    Raises:
      ValueError: it is missing, damaged, or not of that dtype and shape.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise ValueError(f"{path} cannot be read: {' '.join(str(e).split())}") from None
    if array.dtype != dtype or (shape is not None and array.shape != shape):
        raise ValueError(
            f"{path} holds {array.dtype} {list(array.shape)}, not {np.dtype(dtype)} "
            f"{list(shape or ())}: write it again"
        )
    return array


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """An `.npz` file, whole or none; all as bytes, since numpy knows no bfloat16."""
    flat = {
        name: np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        for name, x in arrays.items()
    }
    commit(path, lambda partial: _write_arrays(partial, flat))


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as f:
        np.savez(f, **arrays)  # type: ignore[arg-type]


def load_arrays(path: Path, remedy: str) -> dict[str, np.ndarray]:
    """The bytes of each array of `save_arrays`.

    Args:
      path: the file.
      remedy: what the message tells to do if it is damaged.

    Raises:
      ValueError: it cannot be read.
    """
    damaged = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
    try:
        with path.open("rb") as f, np.load(f, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except damaged as e:
        what = " ".join(str(e).split())
        raise ValueError(f"{path} cannot be read: {what}: {remedy}") from None
