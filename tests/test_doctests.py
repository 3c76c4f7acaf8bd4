"""Docstrings: their examples run, and public names say what they take and give."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import angeljax

PUBLIC = (
    "angeljax",
    "angeljax.formats",
    "angeljax.models",
    "angeljax.evaluation",
    "angeljax.export",
    "angeljax.qat",
    "angeljax.qat.diagnostics",
    "angeljax.qat.lora",
    "angeljax.qat.plots",
    "angeljax.speculative",
    "angeljax.tokens",
    "angeljax.train",
)
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(angeljax.__path__, "angeljax.")
    if not m.name.endswith("__main__")
)
KERNELS = [
    f"pallas_kernels.block_sparse_attention.{name}"
    for name in ("_float8", "_lists", "api")
]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", ["angeljax", *MODULES, *KERNELS])
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=FLAGS)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = finder.find(importlib.import_module("angeljax.compress"))
    assert sum(len(test.examples) for test in found) > 0


def public_names() -> list[tuple[str, str]]:
    modules = [(name, importlib.import_module(name)) for name in PUBLIC]
    return [(name, public) for name, m in modules for public in m.__all__]


@pytest.mark.parametrize(("module", "public"), public_names())
def test_public_names_are_documented(module, public):
    value = getattr(importlib.import_module(module), public)
    known = inspect.ismodule(value), inspect.isclass(value), inspect.isroutine(value)
    if not any(known) and not hasattr(value, "__wrapped__"):
        return  # a constant or an alias of a type
    doc = inspect.getdoc(value) or ""
    assert doc.strip()
    if inspect.isfunction(value) or hasattr(value, "__wrapped__"):
        if inspect.signature(value).parameters:
            assert re.search(r"^Args:$", doc, re.M)
        if inspect.signature(value).return_annotation not in (None, "None"):
            assert re.search(r"^(Returns|Yields):$", doc, re.M)
    elif inspect.isclass(value) and not issubclass(value, Exception):
        own = "__doc__" in vars(value) and not doc.startswith(f"{public}(")
        assert own
