"""Weights that look at what they are multiplied with.

A forward pass under `jit`, `scan`, `vmap` and `remat` has one way out for values that
its results do not hold: gradients. A tapped weight carries slots, arrays of zeros that
the pass does not depend on; the rule of differentiation of `_tap` says that their
cotangents are the statistics of the inputs. XLA removes the rest of the backward pass,
on which they do not depend.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.calibration import _measure
from angeljax.formats import Spec
from angeljax.formats._dense import DenseTensor
from angeljax.formats._qtensor import register_type

_PREFIX = "slot_"
_mask: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar(
    "angeljax_token_mask", default=None
)
_paired: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "angeljax_paired_rows", default=False
)


@contextlib.contextmanager
def token_mask(mask: jax.Array | None) -> Iterator[None]:
    """Within it products of as many rows as `mask` has entries count only True ones."""
    token = _mask.set(mask)
    try:
        yield
    finally:
        _mask.reset(token)


@contextlib.contextmanager
def paired_rows() -> Iterator[None]:
    """Within it the first half of all rows is the full-precision model's.

    Weights then measure their `mismatch` and nothing else.
    """
    token = _paired.set(True)
    try:
        yield
    finally:
        _paired.reset(token)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TappedTensor(DenseTensor):
    """A dense weight that stands where the QTensor will stand, and observes its inputs.

    Its planes are `codes`, the weight itself, and one slot for each statistic.
    """

    @classmethod
    def of(cls, w: jax.Array, spec: Spec, slots: dict[str, jax.Array]) -> TappedTensor:
        """A weight with slots `[*batch, ...]` by the names of statistics."""
        named = {_PREFIX + kind: slot for kind, slot in slots.items()}
        return cls(planes={"codes": w, **named}, spec=spec)

    def observe(
        self,
        x: jax.Array,
        batch: Sequence[int | None] = (),
        group_sizes: jax.Array | None = None,
    ) -> jax.Array:
        """`x [..., K]` as it is, with its statistics as cotangents of the slots.

        Args:
          x: inputs.
          batch: for each batch axis of the weight, the axis of `x` that goes with it.
          group_sizes: rows of each expert of a ragged product.

        Raises:
          ValueError: `mismatch` of experts, whose tokens are not the same ones in both
            models.
        """
        slots = {
            name.removeprefix(_PREFIX): slot
            for name, slot in self.planes.items()
            if name.startswith(_PREFIX)
        }
        if _paired.get():
            if batch or group_sizes is not None:
                raise ValueError(
                    "experts see other tokens in the full-precision model: the "
                    "statistic `mismatch` is for weights without batch axes; use "
                    "algorithm gptq for them"
                )
            return self._observe_pairs(x, slots)
        mask, rows = _mask.get(), math.prod(x.shape[:-1])
        valid = jnp.ones(x.shape[:-1], bool)
        if mask is not None and mask.size == rows and not batch:
            valid = mask.reshape(valid.shape)
        if group_sizes is not None:
            return _tap_ragged(x, slots, valid, group_sizes)
        return _tap(x, slots, valid, tuple(batch))

    def _observe_pairs(self, x: jax.Array, slots: dict[str, jax.Array]) -> jax.Array:
        full, own = jnp.split(x, 2)
        mask, valid = _mask.get(), jnp.ones(own.shape[:-1], bool)
        if mask is not None and mask.size == valid.size:
            valid = mask.reshape(valid.shape)
        own = _tap_pairs(own, slots, full, valid)
        return jnp.concatenate([full, own])


register_type(TappedTensor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tap(
    x: jax.Array, slots: dict[str, jax.Array], valid: jax.Array, batch: Any
) -> jax.Array:
    del slots, valid, batch
    return x


def _tap_forward(x: Any, slots: Any, valid: Any, batch: Any) -> tuple[Any, Any]:
    there = [a for a in batch if a is not None]
    rows = jnp.moveaxis(x, there, range(len(there)))
    real = jnp.moveaxis(valid, there, range(len(there)))
    shape = rows.shape[: len(there)]
    rows = rows.reshape(*shape, -1, x.shape[-1])
    real = real.reshape(*shape, -1)
    if batch:
        # Slots of experts that no token fills hold zeros.
        real &= jnp.any(rows != 0, axis=-1)
    f = functools.partial(_measure.measure, kinds=tuple(slots))
    for _ in there:
        f = jax.vmap(f)
    found = f(rows, real)
    for i, a in enumerate(batch):
        if a is None:
            found = {k: jnp.expand_dims(v, i) for k, v in found.items()}
    return x, {k: jnp.broadcast_to(v, slots[k].shape) for k, v in found.items()}


def _tap_backward(batch: Any, found: Any, g: Any) -> tuple[Any, Any, None]:
    del batch
    return g, found, None


_tap.defvjp(_tap_forward, _tap_backward)


@jax.custom_vjp
def _tap_ragged(
    x: jax.Array, slots: dict[str, jax.Array], valid: jax.Array, sizes: jax.Array
) -> jax.Array:
    del slots, valid, sizes
    return x


def _ragged_forward(x: Any, slots: Any, valid: Any, sizes: Any) -> tuple[Any, Any]:
    return x, _measure.measure_ragged(x, valid, sizes, kinds=tuple(slots))


def _hand_over(found: Any, g: Any) -> tuple[Any, Any, None, None]:
    return g, found, None, None


_tap_ragged.defvjp(_ragged_forward, _hand_over)


@jax.custom_vjp
def _tap_pairs(
    x: jax.Array, slots: dict[str, jax.Array], full: jax.Array, valid: jax.Array
) -> jax.Array:
    del slots, full, valid
    return x


def _pairs_forward(x: Any, slots: Any, full: Any, valid: Any) -> tuple[Any, Any]:
    k = x.shape[-1]
    rows = full.reshape(-1, k), x.reshape(-1, k), valid.reshape(-1)
    found = {"mismatch": _measure.measure_mismatch(*rows)}
    return x, {kind: found[kind] for kind in slots}


_tap_pairs.defvjp(_pairs_forward, _hand_over)
