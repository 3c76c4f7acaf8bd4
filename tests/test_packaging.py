"""What an installation promises: documented names, a light import, its recipes."""

import importlib.metadata
import inspect
import pkgutil
import statistics
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import angeljax
import pallas_kernels
from angeljax import _data

ROOT = Path(__file__).resolve().parents[1]

_IMPORT_ALL = """
import importlib, pkgutil, sys
import angeljax, pallas_kernels

for package in (angeljax, pallas_kernels):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        # Running a module's __main__ is not importing it; the body of the Triton
        # kernels is what a first call of them imports.
        if not module.name.endswith(("__main__", "._triton_kernel")):
            importlib.import_module(module.name)
heavy = {"torch", "tensorflow", "jax_triton", "triton", "datasets", "matplotlib"}
print(sorted(heavy & set(sys.modules)))
"""

_IMPORT_TIME = """
import time
import jax
start = time.perf_counter()
import angeljax
print(time.perf_counter() - start)
"""


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def public_modules() -> list[str]:
    """Every module that declares public names."""
    names = ["angeljax", "pallas_kernels"]
    for package in (angeljax, pallas_kernels):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if "._" not in module.name:
                names.append(module.name)
    return names


@pytest.mark.parametrize("name", public_modules())
def test_public_names_are_documented(name):
    module = importlib.import_module(name)
    assert inspect.getdoc(module), f"{name} has no docstring"
    missing = []
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        # Neither a constant nor a type alias can carry a docstring.
        alias = typing.get_origin(value) is not None
        documentable = inspect.ismodule(value) or (callable(value) and not alias)
        if documentable and not inspect.getdoc(value):
            missing.append(public)
        # A dataclass without its own would show its generated signature.
        if inspect.isclass(value) and (value.__doc__ or "").startswith(
            f"{value.__name__}("
        ):
            missing.append(public)
    assert not missing, f"{name}: no docstring for {', '.join(missing)}"


def test_importing_everything_needs_no_torch_and_nothing_heavy():
    assert run(_IMPORT_ALL) == "[]"


@pytest.mark.slow
def test_import_is_light():
    seconds = statistics.median(float(run(_IMPORT_TIME)) for _ in range(3))
    assert seconds < 1.5, f"import angeljax takes {seconds:.2f} s over import jax"


def test_version_is_that_of_the_metadata():
    try:
        installed = importlib.metadata.version("angeljax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("angeljax is not installed here: make venv")
    assert angeljax.__version__ == installed


def test_configs_come_from_the_checkout():
    assert _data.configs_dir() == ROOT / "configs"


def test_configs_come_from_the_package_elsewhere(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "angeljax"
    package.mkdir(parents=True)
    monkeypatch.setattr(_data, "__file__", str(package / "_data.py"))
    # Somebody else's folder of that name is not ours.
    (tmp_path / "site-packages" / "configs").mkdir()
    with pytest.raises(FileNotFoundError, match="reinstall"):
        _data.configs_dir()
    (package / "_configs").mkdir()
    assert _data.configs_dir() == package / "_configs"


def test_pallas_kernels_know_nothing_of_angeljax():
    guilty = [
        path.relative_to(ROOT)
        for path in (ROOT / "pallas_kernels").rglob("*.py")
        if "angeljax" in path.read_text(encoding="utf-8")
    ]
    assert not guilty
