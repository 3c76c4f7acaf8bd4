"""Where the numbers of a training go: console, JSON lines, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Values = Mapping[str, float]
# Dense bf16 products of one device, in FLOP/s (data sheets, without sparsity).
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


class Writer(Protocol):
    """Takes the numbers of a logging interval."""

    def write(self, step: int, values: Values) -> None:
        """`step` steps are done; `values` are means over the interval."""

    def close(self) -> None:
        """Writes what is left."""


def peak_flops(device_kind: str) -> float | None:
    """Peak bf16 FLOP/s of a device by its name, None if it is not known.

    Example:
      >>> from angeljax.train.metrics import peak_flops
      >>> peak_flops("NVIDIA H100 80GB HBM3")
      989400000000000.0
    """
    return next((f for name, f in _PEAKS.items() if name in device_kind), None)


class JsonLines:
    """One JSON object for each interval: `{"step": 10, "loss": 3.2, ...}`.

    Args:
      path: the file; lines of an earlier run up to `start` stay, later ones go, so that
        a resumed run leaves one curve.
      start: step that the run begins at.
    """

    def __init__(self, path: str | os.PathLike[str], start: int = 0) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line, step in _lines(path) if step <= start] if start else []
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Values) -> None:
        line = json.dumps({"step": step, **values})
        self._file.write(line + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> Iterator[tuple[str, int]]:
    """Lines with their steps; a last line that a killed process left is skipped."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            yield line, int(json.loads(line)["step"])


class TensorBoard:
    """Event files for TensorBoard, by `tensorboardX`.

    Raises:
      ImportError: it is not installed; says what to install.
    """

    def __init__(self, directory: str | os.PathLike[str], start: int = 0) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ImportError(
                "log.tensorboard needs tensorboardX: pip install 'angeljax[train]'"
            ) from None
        self._writer = SummaryWriter(os.fspath(directory), purge_step=start or None)

    def write(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Console:
    """A live progress line on a terminal, plain lines elsewhere.

    Args:
      steps: of the whole training.
      start: step that the run begins at.
      show: None is live on a terminal and plain elsewhere; True is always plain, False
        shows nothing.
    """

    def __init__(self, steps: int, start: int = 0, show: bool | None = None) -> None:
        self._steps, self._live = steps, None
        self._quiet = show is False
        if show is not None or not sys.stderr.isatty():
            return
        from rich import console, progress

        self._live = progress.Progress(
            progress.TextColumn("train"),
            progress.BarColumn(bar_width=20),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[numbers]}"),
            progress.TimeRemainingColumn(),
            console=console.Console(stderr=True),
        )
        self._task = self._live.add_task(
            "", total=steps, completed=start, numbers="compiling"
        )
        self._live.start()

    def write(self, step: int, values: Values) -> None:
        if self._quiet:
            return
        text = "  ".join(_shown(name, value) for name, value in values.items())
        evaluation = any(name.startswith("eval/") for name in values)
        if self._live is not None and not evaluation:
            self._live.update(self._task, completed=step, numbers=text)
        elif self._live is not None:
            self._live.console.print(f"step {step}  {text}", highlight=False)
        else:
            print(f"step {step}/{self._steps}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()


def _shown(name: str, value: float) -> str:
    if name in ("mfu", "eval/top1_agreement"):
        return f"{name} {value:.1%}"
    if name == "tokens_per_second":
        return f"{value:,.0f} tokens/s"
    if name == "seconds_left":
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
    if name == "tokens":
        return f"{value / 1e6:.3g}M tokens"
    return f"{name} {value:.4g}"


class Writers:
    """Several writers as one."""

    def __init__(self, writers: Sequence[Any]) -> None:
        self._writers = list(writers)

    def write(self, step: int, values: Values) -> None:
        for writer in self._writers:
            writer.write(step, values)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
