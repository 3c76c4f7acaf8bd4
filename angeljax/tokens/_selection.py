"""`Selection`: which tokens stay, in the order of the text and of their choice."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """The tokens that a method keeps of each row; a pytree of arrays.

    K is static. A row that keeps fewer leaves its last slots unused: they hold N, one
    more than any token's index, so that a gather with `mode="fill"` gives zeros.

    Attributes:
      indices: int32 `[..., K]`, the kept tokens in ascending order.
      mask: bool `[..., N]`, True for the kept tokens.
      order: int32 `[..., K]`, the same tokens as they were chosen, first choice first.
        Of greedy methods every prefix is their choice for a smaller K. Methods without
        an order of choice give `indices`.
      merged: float `[..., K, D]`, the rows that stand for `indices` where the method
        merges; None where it only selects.

    Example:
      >>> import jax.numpy as jnp
      >>> chosen = Selection.of(jnp.array([[4, 0, 2]]), num_tokens=5)
      >>> chosen.indices.tolist(), chosen.mask.tolist()
      ([[0, 2, 4]], [[True, False, True, False, True]])
      >>> chosen.truncate(2).indices.tolist()
      [[0, 4]]
    """

    indices: jax.Array
    mask: jax.Array
    order: jax.Array
    merged: jax.Array | None = None

    @classmethod
    def of(cls, order: jax.Array, num_tokens: int) -> Selection:
        """From the choices in order, int32 `[..., K]`; unused ones are `num_tokens`."""
        order = order.astype(jnp.int32)
        indices = jnp.sort(order, axis=-1)
        return cls(indices=indices, mask=_mask(indices, num_tokens), order=order)

    @property
    def num_tokens(self) -> int:
        """N, before selection."""
        return self.mask.shape[-1]

    @property
    def count(self) -> jax.Array:
        """int32 `[...]`: tokens that each row keeps."""
        return jnp.sum(self.indices < self.num_tokens, axis=-1, dtype=jnp.int32)

    @property
    def used(self) -> jax.Array:
        """bool `[..., K]`: slots of `indices` that hold a token."""
        return self.indices < self.num_tokens

    def truncate(self, keep: int) -> Selection:
        """The first `keep` choices of every row.

        Raises:
          ValueError: `keep` is out of range, or the rows are merged ones.
        """
        if self.merged is not None:
            raise ValueError("merged tokens cannot be truncated: run the method again")
        if not 1 <= keep <= self.order.shape[-1]:
            raise ValueError(
                f"keep={keep} must be from 1 to the {self.order.shape[-1]} selected"
            )
        return Selection.of(self.order[..., :keep], self.num_tokens)

    def take(self, rows: jax.Array) -> jax.Array:
        """The kept rows of `[..., N, D]`: `[..., K, D]`, zeros in unused slots.

        Where the method merges, pass other things of the tokens than their embeddings:
        those are `merged`.
        """
        return jnp.take_along_axis(
            rows, self.indices[..., None], axis=-2, mode="fill", fill_value=0
        )


def _mask(indices: jax.Array, num_tokens: int) -> jax.Array:
    lead = indices.shape[:-1]
    flat = indices.reshape(-1, indices.shape[-1])
    rows = jnp.arange(flat.shape[0])[:, None]
    mask = jnp.zeros((flat.shape[0], num_tokens), bool)
    return mask.at[rows, flat].set(True, mode="drop").reshape(*lead, num_tokens)
