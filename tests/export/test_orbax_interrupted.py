"""A checkpoint is there as a whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from angeljax.export import _arrays, _manifest
from angeljax.export import orbax as ckpt
from tests.export._helpers import ROOT, assert_same, run_python

OLD, NEW = {"w": jnp.zeros(8)}, {"w": jnp.ones(8)}


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_the_last_step_fails(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m"
    replace = os.replace

    def fail(src: Any, dst: Any, **kwargs: Any) -> None:
        if Path(dst) == path:
            raise error
        replace(src, dst, **kwargs)

    monkeypatch.setattr(os, "replace", fail)
    expected = ckpt.CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        ckpt.save(path, NEW)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [_arrays, _manifest])
def test_writing_fails(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("No space left on device")

    path = ckpt.save(tmp_path / "m", OLD)
    monkeypatch.setattr(module, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        ckpt.save(path, NEW, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert_same(ckpt.load(path)[0], OLD)


def test_an_overwrite_fails_at_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ckpt.save(tmp_path / "m", OLD)
    replace = os.replace

    def fail(src: Any, dst: Any, **kwargs: Any) -> None:
        if Path(dst) == path:
            raise OSError("disk")
        replace(src, dst, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(ckpt.CheckpointError, match="cannot be written"):
            ckpt.save(path, NEW, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert_same(ckpt.load(path)[0], OLD)
    ckpt.save(path, NEW, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert_same(ckpt.load(path)[0], NEW)


def test_a_process_killed_before_the_rename(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
import jax.numpy as jnp
from angeljax.export import orbax
replace = os.replace
def kill(src, dst, **kwargs):
    if Path(dst) == Path(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(src, dst, **kwargs)
os.replace = kill
orbax.save(sys.argv[1], {"w": jnp.ones(8)})
"""
    path = tmp_path / "m"
    assert run_python(code, path).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with pytest.raises(
        ckpt.CheckpointError, match=f"interrupted save left {left.name}"
    ):
        ckpt.load(path)
    with pytest.raises(ckpt.CheckpointError, match="leftover of an interrupted save"):
        ckpt.load(left)
    # The next save does not mind.
    assert_same(ckpt.load(ckpt.save(path, NEW))[0], NEW)


def test_a_process_killed_while_it_writes(tmp_path: Path) -> None:
    code = """
import sys
import jax.numpy as jnp
from angeljax.export import orbax
orbax.save(sys.argv[1], [jnp.full(1_000_000, i) for i in range(50)])
"""
    path = tmp_path / "m"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], env=env)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("m.partial-*/arrays*/**/d/*")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not path.exists()
    for left in tmp_path.iterdir():
        with pytest.raises(ckpt.CheckpointError, match="interrupted"):
            ckpt.load(left)
        left.rename(tmp_path / "renamed")
        with pytest.raises(ckpt.CheckpointError, match="not an angeljax checkpoint"):
            ckpt.load(tmp_path / "renamed")


def test_an_existing_path_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(ckpt.CheckpointError, match="exists: pass overwrite=True"):
        ckpt.save(tmp_path / "m", "no tree at all")
    ckpt.save(tmp_path / "m", OLD, overwrite=True)  # it is empty
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ckpt.CheckpointError, match="something else than a checkpoint"):
        ckpt.save(tmp_path / "mine", OLD, overwrite=True)
    with pytest.raises(ckpt.CheckpointError, match="no directory"):
        ckpt.save(tmp_path / "mine" / "thesis.tex", OLD, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "m")
    with pytest.raises(ckpt.CheckpointError, match="no directory"):
        ckpt.save(tmp_path / "link", NEW, overwrite=True)
    assert_same(ckpt.load(tmp_path / "link")[0], OLD)
    with pytest.raises(ckpt.CheckpointError, match="choose a name without"):
        ckpt.save(tmp_path / "m.partial-0123abcd", OLD)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"
