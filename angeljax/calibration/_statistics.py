"""`Statistics`: what calibration found, as a pytree with its shapes checked."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.calibration import _measure

_KIND = "angeljax.statistics"
_VERSION = "1"


class StatisticsError(ValueError):
    """Statistics that are missing, damaged, or of another model; one line."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, dict[str, jax.Array]]):
    """Statistics of the inputs of each weight, by the weight's '/'-joined path.

    A pytree: it jits, shards and saves like any other. All values are float32, with the
    batch axes of the weight (scanned layers, experts) in front:

    | name | shape | what |
    | --- | --- | --- |
    | count | [] | tokens |
    | nonfinite | [] | values that were NaN or infinite |
    | amax | [] | largest magnitude |
    | amax_channel | [K] | the same for each input feature |
    | abs_sum | [K] | sum of magnitudes over tokens |
    | token_amax | [] | sum over tokens of the largest magnitude of each |
    | histogram | [2048] | of magnitudes, bins equally wide in log2 from -24 to 16 |
    | hessian | [K, K] | sum of x x' over tokens |
    | mismatch | [K, K] | sum of (x_full - x) x', by `compress_sequential` only |
    | ema, batches | [] | moving average of the maxima of batches, and their number |

    Attributes:
      layers: path -> name -> array.
      norms: path -> Frobenius norm `[*batch]` of the weight, by which another model is
        told apart.
    """

    layers: dict[str, dict[str, jax.Array]]
    norms: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def __getitem__(self, path: str) -> dict[str, jax.Array]:
        return self.layers[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        kinds = sorted({k for found in self.layers.values() for k in found})
        return f"Statistics({len(self)} weights: {', '.join(kinds)})"

    def __rich__(self) -> Any:
        """A table: tokens, largest magnitude, and how far single features stand out."""
        from rich.table import Table

        table = Table("weight")
        for name in ("tokens", "amax", "largest / mean feature"):
            table.add_column(name, justify="right")
        for path, values in self.layers.items():
            found = {k: np.asarray(v) for k, v in values.items()}
            channel = found.get("amax_channel")
            ratio = ""
            if channel is not None:
                mean = np.maximum(channel.mean(axis=-1), np.finfo(np.float32).tiny)
                ratio = f"{(channel.max(axis=-1) / mean).max():.1f}"
            amax = f"{found['amax'].max():.4g}" if "amax" in found else ""
            table.add_row(path, f"{found['count'].max():.0f}", amax, ratio)
        return table

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file; whole or not at all."""
        from safetensors.numpy import save_file

        arrays = {}
        for name, found in self.layers.items():
            for kind, value in found.items():
                arrays[f"{name}|{kind}"] = np.asarray(jax.device_get(value), order="C")
        for name, norm in self.norms.items():
            arrays[f"{name}|norm"] = np.asarray(jax.device_get(norm), order="C")
        partial = Path(f"{os.fspath(path)}.partial-{os.getpid()}")
        save_file(arrays, partial, {"kind": _KIND, "version": _VERSION})
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """Reads what `save` wrote.

        Raises:
          StatisticsError: it is no such file, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        layers: dict[str, dict[str, jax.Array]] = {}
        norms = {}
        try:
            with safe_open(path, framework="numpy") as file:
                meta = file.metadata() or {}
                if meta.get("kind") != _KIND or meta.get("version") != _VERSION:
                    told = json.dumps(meta)[:60]
                    raise StatisticsError(f"{path} holds no statistics: it says {told}")
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    name, _, kind = key.rpartition("|")
                    if kind == "norm":
                        norms[name] = jnp.asarray(file.get_tensor(key))
                    elif kind in _measure.SHAPES:
                        value = jnp.asarray(file.get_tensor(key))
                        layers.setdefault(name, {})[kind] = value
                    else:
                        raise StatisticsError(f"{path}: unknown statistic {kind!r}")
        except (OSError, SafetensorError) as e:
            what = " ".join(str(e).split())
            raise StatisticsError(f"{path} cannot be read: {what}") from None
        return cls(layers, norms)


def merge(one: Statistics, *others: Statistics) -> Statistics:
    """Statistics of several disjoint sets of text on one model (shards of data).

    Args:
      one, *others: of the same model and recipe.

    Returns:
      What one pass over all of the text would have found; the moving average of maxima,
      which depends on the order of batches, is the mean of both.

    Raises:
      StatisticsError: they are of other weights, or hold other statistics.

    Example:
      >>> import jax.numpy as jnp
      >>> from angeljax.calibration import Statistics, merge
      >>> a = Statistics({"w": {"count": jnp.asarray(3.0), "amax": jnp.asarray(1.0)}})
      >>> b = Statistics({"w": {"count": jnp.asarray(5.0), "amax": jnp.asarray(2.0)}})
      >>> {k: float(v) for k, v in merge(a, b)["w"].items()}
      {'count': 8.0, 'amax': 2.0}
    """
    for other in others:
        odd = sorted(set(one) ^ set(other))
        if odd:
            raise StatisticsError(f"only one of them has statistics of {odd[0]}")
        layers = {}
        for path, found in one.items():
            if set(found) != set(other[path]):
                odd = sorted(set(found) ^ set(other[path]))
                raise StatisticsError(f"{path}: only one of them has {odd[0]}")
            layers[path] = _measure.merge(found, other[path])
        one = Statistics(layers, one.norms)
    return one


def for_weight(
    stats: Statistics,
    path: str,
    k: int,
    batch: tuple[int, ...],
    kinds: tuple[str, ...],
    norm: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The statistics of one weight, checked; experts without tokens have a share.

    Args:
      stats: of the whole model.
      path: of the weight.
      k: length of its contraction.
      batch: its batch axes.
      kinds: what is needed.
      norm: Frobenius norm `[*batch]` of the weight, to tell models apart.

    Raises:
      StatisticsError: missing, of another shape, or of another weight.
    """
    found = stats.layers.get(path)
    if found is None:
        raise StatisticsError(
            f"there are no statistics of {path}: calibrate with the same recipe"
        )
    for kind in kinds:
        if kind not in found:
            raise StatisticsError(
                f"the statistics of {path} have no {kind} (they have "
                f"{', '.join(sorted(found))}): calibrate with the same recipe"
            )
        want = (*batch, *_measure.shape_of(kind, k))
        if tuple(found[kind].shape) != want:
            raise StatisticsError(
                f"the statistics of {path} are of another model: {kind} has shape "
                f"{list(found[kind].shape)}, this weight needs {list(want)}"
            )
    old = stats.norms.get(path)
    concrete = not any(isinstance(x, jax.core.Tracer) for x in (old, norm))
    if old is not None and norm is not None and concrete:
        a, b = np.asarray(old, np.float64), np.asarray(norm, np.float64)
        if not np.allclose(a, b, rtol=2e-2, atol=1e-6):
            raise StatisticsError(
                f"the statistics of {path} are of another model: its weights had norm "
                f"{a.ravel()[0]:.6g} and now have {b.ravel()[0]:.6g}"
            )
    return _shared_with_unseen(found, len(batch))


def _shared_with_unseen(found: dict[str, Any], n_batch: int) -> dict[str, Any]:
    """Experts that saw no token get what all experts of their layer saw together."""
    if not n_batch:
        return found
    unseen = found["count"] == 0
    out = {}
    for kind, value in found.items():
        # Moving averages of maxima, over equally many batches.
        largest = kind in (*_measure.MAXIMA, "ema", "batches")
        pooled = value.max if largest else value.sum
        together = pooled(axis=n_batch - 1, keepdims=True)
        hidden = unseen.reshape(*unseen.shape, *(1,) * (value.ndim - n_batch))
        out[kind] = jnp.where(hidden, together, value)
    return out
