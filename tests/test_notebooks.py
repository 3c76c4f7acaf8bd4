"""Notebooks: the two files of a pair agree, outputs are clean, and smoke mode runs.

After a change of notebooks/NAME.py: `python notebooks/run.py NAME`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def source(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_pair_agrees(notebook):
    assert source(notebook) == source(notebook.with_suffix(".py"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_badge_and_outputs(notebook):
    nb = nbformat.read(notebook, as_version=4)
    nbformat.validate(nb)
    where = f"github.com/angeljax/angeljax|/github/angeljax/angeljax/.*{notebook.name}"
    assert re.search(where, nb.cells[0].source)
    assert "google.colab" in nb.cells[1].source
    assert notebook.stat().st_size < 500_000
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        text = output.get("text", "") + str(output.get("data", {}).get("text/plain"))
        assert not re.search(r"/(home|root|work|tmp|Users)/", text)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_smoke(notebook, tmp_path):
    env = {
        **os.environ,
        "ANGELJAX_SMOKE": "1",
        "HF_HUB_OFFLINE": "1",
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "agg",
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, "-W", "error", str(notebook.with_suffix(".py"))]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # What was saved, or read in another way, is what it was.
    assert "the same: True" in done.stdout and "False" not in done.stdout
