"""Finished layers on disk, so that an interrupted reconstruction can go on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax import _shards
from angeljax.models.language_model import LanguageModel
from angeljax.recipe import Recipe
from angeljax.train._options import BlockwiseOptions

_ERRORS = "errors"


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
        model: LanguageModel,
        params: Any,
        recipe: Recipe,
        tokens: np.ndarray,
        options: BlockwiseOptions,
    ) -> KeptLayers:
        """Begins a folder, or goes on with one of the same reconstruction.

        Raises:
          ValueError: it is of another one; names what differs.
        """
        rules = recipe.to_dict()
        manifest = {
            "kind": _shards.LAYERS,
            "version": 1,
            "model": _shards.fingerprint(params),
            "dtype": jnp.dtype(model.dtype).name,
            "data": _shards.fingerprint_ids(tokens),
            "rows": list(tokens.shape),
            # Names and descriptions may change.
            "recipe": {k: rules[k] for k in ("skip", "rules", "train") if k in rules},
            "options": {
                name: value
                for name, value in dataclasses.asdict(options).items()
                if name != "host"
            },
        }
        _shards.start(Path(folder), manifest)
        return cls(Path(folder))

    def load(self, i: int, like: Any) -> tuple[Any, float, float] | None:
        """Layer i with its errors before and after, or None where it is not done.

        Args:
          i: number of the layer.
          like: a pytree of arrays of the same shapes and dtypes, where they shall lie.

        Raises:
          ValueError: the file is damaged.
        """
        file = self._file(i)
        if not file.is_file():
            return None
        leaves, treedef = jax.tree.flatten(like)
        remedy = "delete it, and the layer is trained again"
        stored = _shards.load_arrays(file, remedy)
        try:
            errors = stored[_ERRORS].view(np.float64)
            found = [_restored(stored[str(n)], x) for n, x in enumerate(leaves)]
        except (ValueError, KeyError) as e:
            what = " ".join(str(e).split())
            raise ValueError(f"{file} cannot be read: {what}: {remedy}") from None
        return jax.tree.unflatten(treedef, found), float(errors[0]), float(errors[1])

    def save(self, i: int, layer: Any, before: float, after: float) -> None:
        """Keeps layer i; a process that is killed leaves the whole file or none."""
        leaves = [np.asarray(x) for x in jax.tree.leaves(jax.device_get(layer))]
        arrays = {str(n): x for n, x in enumerate(leaves)}
        arrays[_ERRORS] = np.asarray([before, after], np.float64)
        _shards.save_arrays(self._file(i), arrays)

    def _file(self, i: int) -> Path:
        return self.folder / f"layer-{i:05d}.npz"


def _restored(stored: np.ndarray, like: Any) -> jax.Array:
    # As bytes, since numpy's files do not know bfloat16.
    array = stored.view(like.dtype).reshape(like.shape)
    return jax.device_put(array, like.sharding)
