"""The compiled parts of `compress_sequential`, which equal layers share."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from angeljax import _leaves
from angeljax._brief import brief_jit
from angeljax.calibration import _measure
from angeljax.calibration._tap import TappedTensor, paired_rows, token_mask
from angeljax.formats import Spec

Found = list[dict[str, jax.Array]]


class Tap(NamedTuple):
    """A weight that is to be observed.

    Attributes:
      leaf: its number in the tree.
      spec: what it will be.
      batch: its batch axes.
      kinds: names of statistics.
    """

    leaf: int
    spec: Spec
    batch: tuple[int, ...]
    kinds: tuple[str, ...]


def _zeros(taps: tuple[Tap, ...], measured: bool) -> Found:
    """Statistics of no tokens at all; `measured`: those a batch gives by itself."""
    skip = ("ema", "batches") if measured else ()
    return [
        {
            kind: jnp.zeros((*t.batch, *_measure.shape_of(kind, t.spec.k)), jnp.float32)
            for kind in t.kinds
            if kind not in skip
        }
        for t in taps
    ]


@functools.partial(brief_jit, static_argnums=(0,))
def nothing(taps: tuple[Tap, ...]) -> Found:
    """Statistics of no tokens at all, made in one call."""
    return _zeros(taps, measured=False)


def _run(model: Any, part: str, tree: Any, x: Any, i: Any) -> Any:
    if part == "embed":
        return model.embed(tree, x)
    state, context = x
    if part == "head":
        return model.head(tree, state, context)
    return model.layer(tree, state, context, i)


forward = jax.jit(_run, static_argnums=(0, 1))


def _tapped(
    model: Any, part: str, taps: tuple[Tap, ...], tree: Any, x: Any, i: Any
) -> Found:
    """What the taps see of one batch."""
    leaves, treedef = _leaves.flatten(tree)

    def scalar(slots: Found) -> jax.Array:
        values = [leaf.value for leaf in leaves]
        for tap, slot in zip(taps, slots, strict=True):
            values[tap.leaf] = TappedTensor.of(values[tap.leaf], tap.spec, slot)
        out = _run(model, part, _leaves.unflatten(treedef, leaves, values), x, i)
        floats = [
            jnp.sum(a.astype(jnp.float32))
            for a in jax.tree.leaves(out)
            if jnp.issubdtype(a.dtype, jnp.floating)
        ]
        return sum(floats, jnp.float32(0))

    return jax.grad(scalar)(_zeros(taps, measured=True))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def observe(
    model: Any,
    part: str,
    taps: tuple[Tap, ...],
    found: Found,
    tree: Any,
    x: Any,
    mask: Any,
    i: Any,
) -> Found:
    """Statistics with those of one batch more."""
    with token_mask(mask):
        new = _tapped(model, part, taps, tree, x, i)
    return [_measure.combine(a, b) for a, b in zip(found, new, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def observe_pairs(
    model: Any,
    taps: tuple[Tap, ...],
    found: Found,
    tree: Any,
    full: Any,
    own: Any,
    context: Any,
    mask: Any,
    i: Any,
) -> Found:
    """`mismatch` of the states `full` and `own`, with that of batches before."""
    twice = functools.partial(jax.tree.map, lambda *xs: jnp.concatenate(xs))
    x = twice(full, own), twice(context, context)
    with token_mask(mask), paired_rows():
        new = _tapped(model, "layer", taps, tree, x, i)
    return [_measure.combine(a, b) for a, b in zip(found, new, strict=True)]


@jax.jit
def of_stack(stack: Any, i: Any) -> Any:
    """One layer of a stack; one program for all of them."""
    return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, 0, False), stack)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where states wait between layers: on the device, or in the memory of the host.

    Attributes:
      host: numpy arrays.
    """

    host: bool

    def over(self, f: Callable[..., Any], *lists: Iterable[Any]) -> list[Any]:
        """`f` of each chunk; on the host one is fetched while the next is computed."""
        done: list[Any] = []
        for items in zip(*lists, strict=True):
            done.append(f(*items))
            if self.host and len(done) > 1:
                done[-2] = jax.device_get(done[-2])
        if self.host and done:
            done[-1] = jax.device_get(done[-1])
        return done

    def settled(self, tree: Any) -> Any:
        """A finished layer where it is to stay."""
        return jax.device_get(tree) if self.host else tree


def on_device(tree: Any) -> Any:
    """A layer with its numpy arrays on the device."""
    return jax.tree.map(
        lambda p: jax.device_put(p) if isinstance(p, np.ndarray) else p, tree
    )


def chunks(batches: Any, size: int | None) -> list[Any]:
    """The batches as a list; with a size, cut anew along their leading axis.

    Raises:
      ValueError: they cannot be put together, or the size is no positive integer.
    """
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError(f"batch_size must be a positive integer, not {size!r}")
    if hasattr(batches, "shape"):
        batches, size = [batches], size or 8
    given = list(batches)
    if size is None or not given:
        return given
    try:
        whole = jax.tree.map(lambda *xs: np.concatenate(xs), *jax.device_get(given))
    except (ValueError, TypeError) as e:
        raise ValueError(
            f"batches of several shapes do not divide anew, leave batch_size out: {e}"
        ) from None
    rows = len(jax.tree.leaves(whole)[0])
    return [
        jax.tree.map(lambda x, a=a: x[a : a + size], whole)
        for a in range(0, rows, size)
    ]
