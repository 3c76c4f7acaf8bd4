"""Runs notebooks/NAME.py and writes NAME.ipynb with the outputs.

    python notebooks/run.py quickstart

Edit the .py file, run this, and commit both. Needs `pip install -e '.[test]'`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).resolve().parent


def main(name: str) -> None:
    """Writes the notebook; stops at the first cell that fails."""
    notebook = jupytext.read(FOLDER / f"{name}.py")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"  # the same at every run
    nbclient.NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=900,
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    # Nothing of the machine that ran it.
    notebook.metadata = {
        "jupytext": {"formats": "ipynb,py:percent"},
        "kernelspec": {
            "display_name": "Python 3",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main(*sys.argv[1:])
