"""Measuring a compressed tree against its original."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import _leaves
from angeljax.formats import QTensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafReport:
    """One leaf: sizes in bytes, errors of the dequantized weight.

    `relative_error` is ||w - w'|| / ||w|| and `snr_db` is -20 log10 of it; both are
    None for leaves that were left as they are.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    weights: int
    bits_per_weight: float
    nbytes: int
    original_nbytes: int
    relative_error: float | None = None
    snr_db: float | None = None


@dataclasses.dataclass(frozen=True)
class CompressionReport:
    """Leaves in tree order, with totals over all of them."""

    leaves: tuple[LeafReport, ...]

    @property
    def weights(self) -> int:
        """Number of logical elements in the whole tree."""
        return sum(leaf.weights for leaf in self.leaves)

    @property
    def nbytes(self) -> int:
        """Bytes of the compressed tree."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def original_nbytes(self) -> int:
        """Bytes of the original tree."""
        return sum(leaf.original_nbytes for leaf in self.leaves)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over the whole tree, what was skipped included."""
        return 8 * self.nbytes / max(self.weights, 1)

    @property
    def ratio(self) -> float:
        """Original bytes over compressed bytes."""
        return self.original_nbytes / max(self.nbytes, 1)

    @property
    def quantized(self) -> tuple[LeafReport, ...]:
        """The leaves that a rule took."""
        return tuple(x for x in self.leaves if x.relative_error is not None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: totals and leaves."""
        return {
            "weights": self.weights,
            "bytes": self.nbytes,
            "original_bytes": self.original_nbytes,
            "bits_per_weight": self.bits_per_weight,
            "ratio": self.ratio,
            "leaves": [
                {**dataclasses.asdict(leaf), "shape": list(leaf.shape)}
                for leaf in self.leaves
            ],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text; also written to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_html(self, path: str | Path | None = None, *, title: str = "") -> str:
        """One self-contained HTML page with plots; needs `pip install matplotlib`.

        Raises:
          ImportError: matplotlib is not installed.
        """
        from angeljax._report._html import render

        text = render(self, title or "Compression report")
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def __rich__(self) -> Any:
        """A `rich` table: `rich.print(report)`."""
        from angeljax._report._table import table

        return table(self)

    def __str__(self) -> str:
        from angeljax._report._table import as_text

        return as_text(self)


def report(params: Any, cparams: Any) -> CompressionReport:
    """Compares a compressed tree with its original, leaf by leaf.

    Args:
      params: the original tree.
      cparams: `compress(params, recipe)`, or a tree of the same paths. Leaves may be
        abstract (`jax.eval_shape`): then sizes are given and errors are NaN.

    Returns:
      A `CompressionReport`; print it, or export it with `to_json` / `to_html`.

    Raises:
      ValueError: the trees have different paths or shapes (the first is named).

    Example:
      >>> import jax, angeljax as aj
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (256, 64))}
      >>> small = aj.compress(params, aj.Recipe(rules=[aj.Rule(format="int8")]))
      >>> aj.report(params, small).bits_per_weight
      8.125
    """
    before, _ = _leaves.flatten(params)
    after, _ = _leaves.flatten(cparams)
    new = {leaf.path: leaf.value for leaf in after}
    for leaf in before:
        if leaf.path not in new:
            raise ValueError(f"{leaf.path} is missing from the compressed tree")
        if jnp.shape(leaf.value) != jnp.shape(new[leaf.path]):
            raise ValueError(
                f"{leaf.path} has shape {jnp.shape(leaf.value)} in one tree and "
                f"{jnp.shape(new[leaf.path])} in the other: not the same model"
            )
    if len(before) != len(after):
        extra = next(x.path for x in after if x.path not in {b.path for b in before})
        raise ValueError(f"{extra} is missing from the original tree")
    norms = [_norms(leaf.value, new[leaf.path]) for leaf in before]
    # One transfer for all leaves, not one for each.
    norms = jax.device_get(norms)
    return CompressionReport(
        tuple(
            _leaf(leaf, new[leaf.path], n)
            for leaf, n in zip(before, norms, strict=True)
        )
    )


def describe(cparams: Any) -> CompressionReport:
    """Sizes of a compressed tree, without its original: errors are left out.

    The original counts in the logical dtype of each leaf. Leaves may be abstract.
    """
    leaves, _ = _leaves.flatten(cparams)
    return CompressionReport(tuple(_leaf(x, x.value, None) for x in leaves))


def _norms(w: Any, q: Any) -> Any:
    if not isinstance(q, QTensor) or isinstance(w, QTensor):
        return None
    if isinstance(w, jax.ShapeDtypeStruct) or isinstance(
        q.planes["codes"], jax.ShapeDtypeStruct
    ):
        return (math.nan, math.nan)
    return _squared_norms(w, q)


@jax.jit
def _squared_norms(w: jax.Array, q: QTensor) -> tuple[jax.Array, jax.Array]:
    x = w.astype(jnp.float32)
    error = x - q.dequantize(jnp.float32)
    return jnp.sum(error * error), jnp.sum(x * x)


def _leaf(leaf: _leaves.Leaf, new: Any, norms: Any) -> LeafReport:
    packed = isinstance(new, QTensor)
    weights = math.prod(jnp.shape(new))
    nbytes = _nbytes(new)
    error = snr = None
    if norms is not None:
        noise, signal = float(norms[0]), float(norms[1])
        error = math.sqrt(noise / signal) if signal else 0.0
        snr = math.inf if error == 0 else -20 * math.log10(error)
    return LeafReport(
        path=leaf.path,
        shape=tuple(jnp.shape(new)),
        format=new.spec.label() if packed else str(jnp.result_type(new)),
        weights=weights,
        bits_per_weight=8 * nbytes / max(weights, 1),
        nbytes=nbytes,
        original_nbytes=_nbytes(leaf.value)
        if leaf.value is not new or not packed
        else weights * new.dtype.itemsize,
        relative_error=error,
        snr_db=snr,
    )


def _nbytes(x: Any) -> int:
    if isinstance(x, QTensor):
        return x.nbytes
    return math.prod(jnp.shape(x)) * jnp.dtype(jnp.result_type(x)).itemsize
