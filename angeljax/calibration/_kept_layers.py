"""Finished layers on disk, so that an interrupted compression can go on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax import _shards
from angeljax.formats import QTensor, Spec
from angeljax.recipe import Recipe

_META = "meta"


@dataclasses.dataclass(frozen=True)
class KeptLayers:
    """A folder with one file for each layer that is done.

    Attributes:
      folder: where they are.
    """

    folder: Path

    @classmethod
    def begin(
        cls,
        folder: str | Path,
        params: Any,
        recipe: Recipe,
        batches: list[Any],
        base: Any,
        options: dict[str, Any],
    ) -> KeptLayers:
        """Begins a folder, or goes on with one of the same compression.

        Raises:
          ValueError: it is of another one; names what differs.
        """
        rules = recipe.to_dict()
        sections = ("skip", "rules", "transforms")
        manifest = {
            "kind": _shards.COMPRESSED,
            "version": 1,
            "model": _shards.fingerprint(params),
            "base": None if base is None else _shards.fingerprint(base),
            "data": _shards.fingerprint(batches),
            # Names and descriptions may change.
            "recipe": {k: rules[k] for k in sections if k in rules},
            "options": options,
        }
        _shards.start(Path(folder), manifest)
        return cls(Path(folder))

    def load(self, i: int) -> dict[str, Any] | None:
        """The leaves of layer i that changed, by path; None where it is not done.

        Raises:
          ValueError: the file is damaged.
        """
        file = self._file(i)
        if not file.is_file():
            return None
        arrays = _shards.load_arrays(file, "delete it, and the layer is done again")
        try:
            meta = json.loads(arrays.pop(_META).tobytes())
            return {
                path: _leaf(entry, [arrays[str(n)] for n in entry["arrays"]])
                for path, entry in meta.items()
            }
        except (KeyError, TypeError, ValueError) as e:
            raise ValueError(
                f"{file} is no finished layer ({' '.join(str(e).split())}): delete it, "
                "and the layer is done again"
            ) from None

    def save(self, i: int, leaves: dict[str, Any]) -> None:
        """Keeps layer i; a process that is killed leaves the whole file or none."""
        arrays: dict[str, np.ndarray] = {}
        meta = {}
        for path, value in jax.device_get(leaves).items():
            spec = value.spec.to_dict() if isinstance(value, QTensor) else None
            planes = value.planes if isinstance(value, QTensor) else {"": value}
            first = len(arrays)
            for plane in planes.values():
                arrays[str(len(arrays))] = np.asarray(plane)
            meta[path] = {
                "spec": spec,
                "names": list(planes),
                "dtypes": [jnp.dtype(p.dtype).name for p in planes.values()],
                "shapes": [list(p.shape) for p in planes.values()],
                "arrays": list(range(first, len(arrays))),
            }
        text = json.dumps(meta).encode()
        _shards.save_arrays(
            self._file(i), {**arrays, _META: np.frombuffer(text, np.uint8)}
        )

    def _file(self, i: int) -> Path:
        return self.folder / f"layer-{i:05d}.npz"


def _leaf(entry: dict[str, Any], stored: list[np.ndarray]) -> Any:
    planes = {
        name: x.view(jnp.dtype(dtype)).reshape(shape)
        for name, dtype, shape, x in zip(
            entry["names"], entry["dtypes"], entry["shapes"], stored, strict=True
        )
    }
    if entry["spec"] is None:
        return planes[""]
    return QTensor(planes=planes, spec=Spec.from_dict(entry["spec"]))
