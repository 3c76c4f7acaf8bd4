"""What every test relies on: the platform, checked annotations, seeded randomness."""

import os

# ANGELJAX_TEST_PLATFORM=cuda runs on a GPU. Both settings must precede jax's import.
_PLATFORM = os.environ.get("ANGELJAX_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = _PLATFORM if _PLATFORM == "cpu" else f"{_PLATFORM},cpu"
_FLAGS = ["--xla_force_host_platform_device_count=8"]
# Most of the time goes into XLA's compiler. For a CPU it takes a third of the time
# without LLVM's optimizations, with the older emitters of fusions (LLVM's IR at once,
# not through MLIR) and with one LLVM module for each program, and a test's arrays are
# too small to miss any of it. JAX_DISABLE_MOST_OPTIMIZATIONS=0 compiles everything as
# users do, `compiler_options=OPTIMIZED` (tests/formats/_cases.py) what depends on it.
if _PLATFORM == "cpu":
    if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1":
        _FLAGS += [
            "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
_GIVEN = os.environ.get("XLA_FLAGS", "")
_FLAGS = [flag for flag in _FLAGS if flag.split("=")[0] not in _GIVEN]
os.environ["XLA_FLAGS"] = " ".join([_GIVEN, *_FLAGS]).strip()
# A test that reaches for the hub fails at once, not after a timeout. Tests marked
# `network` use PyPI, and skip themselves where it cannot be reached.
_NETWORK = os.environ.get("ANGELJAX_TEST_NETWORK") != "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

from importlib.util import find_spec

import jaxtyping

import tests.typechecker  # noqa: F401  (the hook below finds it by name)

# Shapes and dtypes in annotations are checked in the tests and nowhere else.
jaxtyping.install_import_hook(["angeljax", "pallas_kernels"], "tests.typechecker.check")

from collections.abc import Callable

import jax
import numpy as np
import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what this machine cannot run, with the reason."""
    missing = {}
    if _PLATFORM == "cpu":
        missing["gpu"] = "ANGELJAX_TEST_PLATFORM=cuda asks for it"
    if find_spec("libtpu") is None:
        missing["tpu_compile"] = "needs libtpu (pip install libtpu)"
    if not _NETWORK:
        missing["network"] = "ANGELJAX_TEST_NETWORK=0 forbids it"
    for item in items:
        for marker in missing.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=missing[marker]))


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A function that returns a new PRNG key at every call, the same in every run."""
    count = iter(range(2**31))
    return lambda: jax.random.key(next(count))


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded numpy generator."""
    return np.random.default_rng(0)
