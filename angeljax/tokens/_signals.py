"""How hosts call a method: with those of their signals that it has parameters for."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax

from angeljax.tokens._selection import Selection

# (embeds [B, N, D], *, mask=..., attn=..., ...) -> Selection
PruneFn = Callable[..., Selection]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Static:
    """A function without arrays as an argument of compiled ones."""

    fn: PruneFn = dataclasses.field(metadata={"static": True})


def argument(fn: PruneFn) -> Any:
    """The function as a pytree: itself if it is one, and carries its arrays along."""
    return Static(fn) if jax.tree.leaves(fn) == [fn] else fn


def choose(
    fn: Any, embeds: jax.Array, *, takes: PruneFn | None = None, **signals: Any
) -> Selection:
    """`fn(embeds, ...)` with the signals that it has parameters for and are not None.

    Args:
      fn: the function, or an `argument` with one.
      embeds: float `[..., N, D]`.
      takes: the function whose parameters count, where it is another.
      **signals: what the host has.

    Returns:
      The `Selection`.

    Raises:
      ValueError: what came back is no `Selection` of these tokens.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def loudest(embeds, *, mask):
      ...     norm = jnp.where(mask, jnp.linalg.norm(embeds, axis=-1), -1)
      ...     return Selection.of(jax.lax.top_k(norm, 2)[1], embeds.shape[-2])
      >>> x = jnp.array([[[1.0], [3.0], [2.0]]])
      >>> choose(loudest, x, mask=jnp.ones((1, 3), bool), attn=None).indices.tolist()
      [[1, 2]]
    """
    fn = fn.fn if isinstance(fn, Static) else fn
    known = parameters(fn if takes is None else takes)
    given = {
        name: value
        for name, value in signals.items()
        if value is not None and (known is None or name in known)
    }
    chosen = fn(embeds, **given)
    if not isinstance(chosen, Selection):
        raise ValueError(
            f"prune must return an angeljax.tokens.Selection, not a "
            f"{type(chosen).__name__}"
        )
    if chosen.mask.shape != embeds.shape[:-1]:
        raise ValueError(
            f"prune chose from tokens {list(chosen.mask.shape)}, and it was given "
            f"{list(embeds.shape[:-1])}"
        )
    return chosen


def wanted_layers(fn: Any) -> dict[str, int | None]:
    """Layers of the vision tower that a `TokenPruner` asks for; None if it does not."""
    fn = fn.fn if isinstance(fn, Static) else fn
    return {n: getattr(fn, n, None) for n in ("attn_layer", "object_layer")}


def parameters(fn: PruneFn) -> frozenset[str] | None:
    """Names that a function takes; None if it takes any."""
    found = inspect.signature(fn).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in found):
        return None
    return frozenset(p.name for p in found)
