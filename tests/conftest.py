"""What every test relies on: the platform, checked annotations, seeded randomness."""

import os

# ANGELJAX_TEST_PLATFORM=cuda runs on a GPU. Both settings must precede jax's import.
_PLATFORM = os.environ.get("ANGELJAX_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = _PLATFORM if _PLATFORM == "cpu" else f"{_PLATFORM},cpu"
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
# Most of the time goes into LLVM. Without its optimizations a CPU compiles in half the
# time, and a test's arrays are too small to miss them. JAX_DISABLE_MOST_OPTIMIZATIONS=0
# compiles everything as users do; `optimized` below, and OPTIMIZED, what depends on it.
if _PLATFORM == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
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

from collections import Counter
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

# Tests marked `thin(k)` have many cases that share most of their code. Every k-th of
# them runs; ANGELJAX_TEST_ALL=1 (`make test-all`) runs all.
_ALL = os.environ.get("ANGELJAX_TEST_ALL") == "1"


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Skips what this machine cannot run, with the reason, and thins."""
    if not _ALL:
        _thin(config, items)
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


def _thin(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects all but every k-th case of tests that are marked so."""
    seen: Counter[str] = Counter()
    kept, left = [], []
    for item in items:
        mark, name = item.get_closest_marker("thin"), item.nodeid.partition("[")[0]
        among = kept if mark is None or seen[name] % mark.args[0] == 0 else left
        seen[name] += 1
        among.append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """Compiles all of a module as users do: its numbers are compared one by one."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    # What other modules compiled would be taken again.
    jax.clear_caches()
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.fixture
def getkey() -> Callable[[], jax.Array]:
    """A function that returns a new PRNG key at every call, the same in every run."""
    count = iter(range(2**31))
    return lambda: jax.random.key(next(count))


@pytest.fixture
def rng() -> np.random.Generator:
    """A seeded numpy generator."""
    return np.random.default_rng(0)
