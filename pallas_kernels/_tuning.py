"""Tables of measured plans: which kernel, with which parameters, on which device.

A table is a JSON file with `device`, `versions`, `date` and `plans: {case: {tokens:
plan}}`. A case names a weight and its activations, `sherry 4096x14336 channel int8`;
`tokens` is a power of two, the upper end of a range; a plan holds the `tuning` keywords
of the implementation. Those that come with the package lie in `pallas_kernels/tuning`;
the environment variable PALLAS_KERNELS_TUNING names more files, which go first.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pallas_kernels._devices import current_device
from pallas_kernels._weights import KernelError, WeightLayout

VARIABLE = "PALLAS_KERNELS_TUNING"
_FOLDER = Path(__file__).parent / "tuning"
_KEYS = {
    "kernel": str,
    "warps": int,
    "rows_per_block": int,
    "prefetch": int,
    "tokens": int,
    "warpgroups": int,
    "stages": int,
    "tokens_first": bool,
}

Plan = dict[str, Any]


def case_of(layout: WeightLayout, wide: bool, inside: bool = False) -> str:
    """Name of a weight and its activations: `sherry 4096x14336 channel int8`.

    `wide` activations have 16 bits; those of 8 may be quantized `inside` the product.
    """
    group = "channel" if layout.groups == 1 else f"g{layout.group_size}"
    zero = "" if layout.symmetric else "+zero"
    activations = "wide" if wide else "a8" if inside else "int8"
    return f"{layout.format}{zero} {layout.k}x{layout.n} {group} {activations}"


def bucket(m: int) -> int:
    """The power of two at or above `m`."""
    return 1 << max(m - 1, 0).bit_length()


def blocks_and_warps(blocks: int) -> Iterator[Plan]:
    """Sizes worth timing for a kernel that shares out `blocks` row blocks.

    A thread block takes so many of them that whole waves fill 132 processors.
    """
    rows = sorted({-(-blocks // (132 * n)) for n in (1, 2, 4)} - {0})
    for warps, ahead in ((4, 4), (8, 2), (8, 4), (16, 2)):
        for each in rows:
            yield {"warps": warps, "rows_per_block": each, "prefetch": ahead}


def lookup(
    m: int, layout: WeightLayout, wide: bool, inside: bool = False
) -> Plan | None:
    """The measured plan for `m` tokens on the current device, or None."""
    files = os.environ.get(VARIABLE, "")
    kind = current_device().device_kind
    for path in [*filter(None, files.split(os.pathsep)), *_shipped()]:
        table = read(path)
        if table["device"] == kind:
            for case in dict.fromkeys(
                case_of(layout, wide, i) for i in (inside, False)
            ):
                plan = table["plans"].get(case, {}).get(str(bucket(m)))
                if plan is not None:
                    return dict(plan)
    return None


@functools.cache
def _shipped() -> tuple[str, ...]:
    return tuple(sorted(str(p) for p in _FOLDER.glob("*.json")))


@functools.cache
def read(path: str) -> Mapping[str, Any]:
    """A table from its file.

    Raises:
      KernelError: there is no such file, or it is not a table; names the entry.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise KernelError(f"cannot read the tuning table {path}: {e}") from None
    plans = table.get("plans") if isinstance(table, dict) else None
    if not isinstance(plans, dict) or not isinstance(table.get("device"), str):
        raise KernelError(f"{path} is no tuning table: no 'device' and 'plans' in it")
    for case, by_tokens in plans.items():
        if not isinstance(by_tokens, dict):
            raise KernelError(f"{path}: {case!r} is no table of plans by tokens")
        for tokens, plan in by_tokens.items():
            if not isinstance(plan, dict):
                raise KernelError(
                    f"{path}: {case!r}, {tokens} tokens: {plan} is no plan"
                )
            for key, value in plan.items():
                if type(value) is not _KEYS.get(key):
                    raise KernelError(
                        f"{path}: {case!r}, {tokens} tokens: {key}={value!r} is no "
                        f"parameter of a kernel; there are {', '.join(_KEYS)}"
                    )
    return table


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Writes a table, replacing what is there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", "utf-8")
    part.replace(path)
    read.cache_clear()
