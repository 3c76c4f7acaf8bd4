"""The one place that writes `benchmarks/results/*.json`.

A benchmark measures, makes a `Row` of each number and calls `write` once. Tables in the
docs are generated from these files, so a file also says what produced it: device,
versions, commit, date and command.

```python
rows = [Row({"m": 16}, "time", 21.4, "us", baseline=45.0, ratio=45.0 / 21.4)]
write("ternary_matmul", rows, device_tag="h100")
```
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "numpy")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured number.

    Attributes:
      case: what was measured: shapes, format, recipe, ... JSON scalars by name.
      metric: what the number is ("time", "kl", "perplexity", ...).
      value: the number.
      unit: its unit ("us", "nats", "tokens/s", "1" for a pure number).
      baseline: the same metric of the named baseline in the same run, same unit.
      ratio: how many times better than the baseline; above 1 is better. The sense
        depends on the metric, so the benchmark computes it.
      roofline: share of what the device allows, from 0 to 1.
    """

    case: Mapping[str, Any]
    metric: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    roofline: float | None = None

    def __post_init__(self) -> None:
        for name in ("value", "baseline", "ratio", "roofline"):
            number = getattr(self, name)
            if number is None and name != "value":
                continue
            # numpy and jax scalars become floats; json knows no others, and no NaN.
            number = float(number)
            if not math.isfinite(number):
                raise ValueError(f"{self.metric} {dict(self.case)}: {name} is {number}")
            object.__setattr__(self, name, number)


def write(
    claim: str,
    rows: Sequence[Row],
    *,
    device_tag: str | None = None,
    directory: Path = RESULTS,
) -> Path:
    """Writes the results of one run, whole or not at all.

    Args:
      claim: what the numbers are about; the file's name.
      rows: at least one number.
      device_tag: short device name ("h100") for claims measured on several devices.
      directory: where the file goes.

    Returns:
      The path of `<claim>.json` or `<claim>.<device_tag>.json`.

    Raises:
      ValueError: if there is no row, or a name is not a plain word.
    """
    if not rows:
        raise ValueError(f"{claim}: no rows to write")
    for word in (claim, device_tag or "x"):
        if not word.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"{word!r} is not a plain word")
    document = {
        "claim": claim,
        "device": _device(),
        "versions": _versions(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": _command(),
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    name = f"{claim}.{device_tag}.json" if device_tag else f"{claim}.json"
    directory.mkdir(parents=True, exist_ok=True)
    # Same folder, then rename: a reader never sees half a file.
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, directory / name)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return directory / name


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads one results file; `rows` come back as `Row`s.

    Args:
      path: a file that `write` wrote.

    Returns:
      The document, with `document["rows"]` a list of `Row`.
    """
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    document["rows"] = [Row(**row) for row in document["rows"]]
    return document


def _device() -> str:
    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        count = jax.device_count()
        return device.device_kind if count == 1 else f"{count} x {device.device_kind}"
    return f"CPU, {platform.machine()}, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("angeljax", *_PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    """The commit, "-dirty" when tracked code differs from it, "unknown" without git."""
    # A device machine may hold a copy without .git; then the caller names the commit.
    if named := os.environ.get("ANGELJAX_COMMIT"):
        return named
    # Results of an earlier run are no reason to distrust this one.
    code = ["--", ".", ":!benchmarks/results", ":!docs"]
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        dirty = _git("status", "--porcelain", "--untracked-files=no", *code)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if dirty else commit


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def _command() -> str:
    """The command line as one would type it at the top of the repository."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name:
        program = ["-m", spec.name.removesuffix(".__main__")]
    else:
        script = Path(sys.argv[0]).absolute()
        # Outside the repository only the name is kept: paths there are private.
        inside = script.is_relative_to(ROOT)
        program = [str(script.relative_to(ROOT)) if inside else script.name]
    return shlex.join(["python", *program, *sys.argv[1:]])
