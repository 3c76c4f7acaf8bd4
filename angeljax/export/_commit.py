"""Replacing a directory in one step, alone or with other processes."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from angeljax.export import _manifest
from angeljax.export._errors import CheckpointError, one_line

_PARTIAL = re.compile(r".+\.(partial|replaced)-[0-9a-f]{8}")


def is_partial(path: Path) -> bool:
    """Whether a save left this directory behind."""
    return _PARTIAL.fullmatch(path.name) is not None


def check_target(path: Path, overwrite: bool) -> None:
    """Refuses to write where something is that must stay.

    Raises:
      CheckpointError: the path exists, or is no checkpoint that may be overwritten.
    """
    if is_partial(path):
        raise CheckpointError(f"{path}: choose a name without {path.suffix!r}")
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise CheckpointError(f"{path} exists: pass overwrite=True or another path")
    if path.is_symlink() or not path.is_dir():
        raise CheckpointError(f"{path} is no directory: choose another path")
    if any(path.iterdir()) and not (path / _manifest.FILE).is_file():
        raise CheckpointError(
            f"{path} holds something else than a checkpoint: choose another path"
        )


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a new directory that becomes `path` when the block ends without error.

    An error removes it; a killed process leaves it under a name that `is_partial`
    knows. Every process of a multi-host run must enter, with the same `path`.
    """
    check_target(path, overwrite)
    token = _agree()
    partial = path.with_name(f"{path.name}.partial-{token}")
    try:
        if jax.process_index() == 0:
            partial.mkdir(parents=True)
        _wait(f"created {token}")
        yield partial
        _wait(f"written {token}")
        if jax.process_index() == 0:
            _move(partial, path, path.with_name(f"{path.name}.replaced-{token}"))
        _wait(f"moved {token}")
    except BaseException:
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _move(partial: Path, path: Path, aside: Path) -> None:
    """One rename; around it, the one that is replaced steps aside."""
    replaced = path.exists() and any(path.iterdir())
    if replaced:
        os.replace(path, aside)
    try:
        os.replace(partial, path)
    except BaseException as e:
        if replaced:
            os.rename(aside, path)
        if isinstance(e, OSError):
            raise CheckpointError(f"{path}: cannot be written ({one_line(e)})") from e
        raise
    if replaced:
        shutil.rmtree(aside, ignore_errors=True)


def _agree() -> str:
    """Eight hex digits, the same on every process."""
    number = np.uint32(secrets.randbits(32))
    if jax.process_count() > 1:
        number = multihost_utils.broadcast_one_to_all(number)
    return f"{int(number):08x}"


def _wait(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"angeljax.save: {name}")
