"""The training loss from hidden states, a few tokens at a time.

Logits are the largest array of a small model by far: 32k tokens times a vocabulary of
49k in float32 are 6.4 GB, for the student and again for the teacher, and their
gradient. Here a chunk of tokens goes through the head, the losses and back to the
gradients of hidden states and head at once, so that only the logits of one chunk exist,
and none is computed twice (as in Liger Kernel, arXiv 2410.10989).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from angeljax.train._options import DistillOptions
from angeljax.train._token_losses import TopK, terms
from angeljax.train.losses import check_teacher, check_vocabularies

__all__ = ["Sums", "chunked_loss", "head_logits"]

# float32 scalars by name: "loss", "ce", "kd" and "count"
Sums = dict[str, jax.Array]
# Logits of one chunk: 0.5 GB in float32, for student and teacher each.
_CHUNK_LOGITS = 2**27


def head_logits(head: dict[str, Any], hidden: jax.Array) -> jax.Array:
    """float32 logits `[..., V]` of hidden states `[..., D]`.

    Args:
      head: `{"kernel": [D, V]}`, or `{"embedding": [V, D]}` of a tied head; arrays or
        QTensors. They are brought to the dtype of the hidden states, in which the
        product runs; it is summed in float32.
      hidden: normalised hidden states.
    """
    tied, w = _open(head)
    w = jnp.asarray(w, hidden.dtype)
    return _product(hidden, w, 1 if tied else 0)


def chunked_loss(
    hidden: jax.Array,
    head: dict[str, Any],
    labels: jax.Array,
    options: DistillOptions,
    *,
    mask: jax.Array | None = None,
    teacher: tuple[jax.Array, dict[str, Any]] | TopK | None = None,
    chunk_tokens: int | None = None,
) -> tuple[jax.Array, Sums]:
    """Sum of `lm_weight * CE + weight * KD` over valid tokens, and what it consists of.

    Sums, not means: over micro-batches they add up to exact means.

    Args:
      hidden: the student's, after its last norm, `[B, T, D]`. The batch axis may be
        sharded; chunks are cut along T.
      head: the student's; see `head_logits`.
      labels: int `[B, T]`, see `next_tokens`; negative ones are left out.
      options: see `DistillOptions`; terms on features are not among these.
      mask: bool `[B, T]`, False leaves out more.
      teacher: its hidden states `[B, T, D']` and head, or its likeliest entries. No
        gradient flows into it.
      chunk_tokens: at most so many tokens (of the whole batch) at once; default by the
        size of the vocabulary.

    Returns:
      The weighted sum, float32, which can be differentiated with respect to `hidden`
      and `head`, and the sums "loss", "ce", "kd" and "count" (valid tokens), which
      cannot.

    Raises:
      ValueError: the vocabularies differ, a teacher is missing, or shapes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.train.chunked import chunked_loss
      >>> from angeljax.train.losses import DistillOptions
      >>> hidden, head = jnp.ones((2, 6, 4)), {"kernel": jnp.ones((4, 8))}
      >>> loss, sums = chunked_loss(
      ...     hidden, head, jnp.zeros((2, 6), jnp.int32), DistillOptions(),
      ...     teacher=(hidden, head), chunk_tokens=4,
      ... )
      >>> int(sums["count"]), round(float(loss / sums["count"]), 3)
      (12, 2.079)
    """
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden states [B, T, D] and labels [B, T] do not go together: "
            f"{hidden.shape} and {labels.shape}"
        )
    if options.weight > 0 and teacher is None:
        raise ValueError("distill.weight is not 0 and there is no teacher")
    if options.weight == 0:
        teacher = None
    labels = labels if mask is None else jnp.where(mask, labels, -100)
    tied, w = _open(head)
    vocabulary = w.shape[0 if tied else 1]
    side, teacher_tied = _teacher_side(teacher, vocabulary, hidden.dtype, options)
    limit = chunk_tokens or max(_CHUNK_LOGITS // vocabulary, 1)
    batch, length = labels.shape
    count = min(-(-batch * length // limit), length)
    static = (options, count, tied, teacher_tied)
    loss, sums = _chunked(static, hidden, w, side, labels)
    return loss, jax.lax.stop_gradient({"loss": loss, **sums})


def _teacher_side(
    teacher: Any, vocabulary: int, dtype: Any, options: DistillOptions
) -> tuple[Any, bool]:
    if teacher is None:
        return (), False
    teacher = jax.lax.stop_gradient(teacher)
    if isinstance(teacher, TopK):
        check_teacher(teacher, vocabulary, options)
        return ((teacher,), None), False
    hidden, head = teacher
    tied, w = _open(head)
    check_vocabularies(vocabulary, w.shape[0 if tied else 1])
    return ((hidden,), jnp.asarray(w, hidden.dtype)), tied


def _open(head: dict[str, Any]) -> tuple[bool, jax.Array]:
    """Whether the head is tied, and its array."""
    if set(head) == {"embedding"}:
        return True, jnp.asarray(head["embedding"])
    if set(head) == {"kernel"}:
        return False, jnp.asarray(head["kernel"])
    raise ValueError(
        f"a head is {{'kernel': [D, V]}} or {{'embedding': [V, D]}}; this one has "
        f"{', '.join(sorted(head))}"
    )


def _product(x: jax.Array, w: jax.Array, axis: int) -> jax.Array:
    """`x` times `w`, contracted over the last axis of `x` and `axis` of `w`."""
    numbers = (((x.ndim - 1,), (axis,)), ((), ()))
    return jax.lax.dot_general(x, w, numbers, preferred_element_type=jnp.float32)


Static = tuple[DistillOptions, int, bool, bool]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(
    static: Static, hidden: jax.Array, w: jax.Array, side: Any, labels: jax.Array
) -> tuple[jax.Array, Sums]:
    loss, sums, _, _ = _run(
        static, hidden, w, side, labels, for_hidden=False, for_w=False
    )
    return loss, sums


def _forward(
    static: Static, hidden: Any, w: Any, side: Any, labels: Any
) -> tuple[Any, Any]:
    values = jax.tree.map(
        lambda p: p.value,
        (hidden, w, side, labels),
        is_leaf=lambda p: hasattr(p, "perturbed"),
    )
    # A frozen head has no gradient, and then it costs nothing.
    loss, sums, d_hidden, d_w = _run(
        static, *values, for_hidden=hidden.perturbed, for_w=w.perturbed
    )
    return (loss, sums), (d_hidden, d_w)


def _backward(static: Static, grads: Any, weights: Any) -> Any:
    del static
    weight = weights[0]
    if isinstance(weight, SymbolicZero):
        return None, None, None, None
    d_hidden, d_w = (None if g is None else (weight * g).astype(g.dtype) for g in grads)
    return d_hidden, d_w, None, None


_chunked.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(
    static: Static,
    hidden: jax.Array,
    w: jax.Array,
    side: Any,
    labels: jax.Array,
    *,
    for_hidden: bool,
    for_w: bool,
) -> tuple[jax.Array, Sums, jax.Array | None, jax.Array | None]:
    options, count, tied, teacher_tied = static
    near = jnp.asarray(w, hidden.dtype)
    rows, teacher_w = side if side else ((), None)
    batch, length, width = hidden.shape

    def chunk(carry: Any, rows: Any) -> tuple[Any, Any]:
        sums, d_w = carry
        x, goal, *given = rows
        teacher: Any = None
        if given and isinstance(given[0], TopK):
            teacher = given[0]
        elif given:
            assert teacher_w is not None
            teacher = _product(given[0], teacher_w, 1 if teacher_tied else 0)
        z = _product(x, near, 1 if tied else 0)
        ce, kd, pull = terms(z, teacher, goal, options)
        valid = goal >= 0
        sums = (sums[0] + ce.sum(), sums[1] + kd.sum(), sums[2] + valid.sum())
        if not for_hidden and not for_w:
            return (sums, d_w), None
        ones = jnp.ones_like(ce)
        dz = pull(options.lm_weight * ones, options.weight * ones).astype(x.dtype)
        d_x = _product(dz, near, 0 if tied else 1).astype(x.dtype)
        if for_w:
            over = (((0, 1), (0, 1)), ((), ()))
            left, right = (dz, x) if tied else (x, dz)
            d_w = d_w + jax.lax.dot_general(
                left, right, over, preferred_element_type=jnp.float32
            )
        return (sums, d_w), d_x if for_hidden else None

    def cut(x: jax.Array, fill: int = 0) -> jax.Array:
        short = -length % count
        x = jnp.pad(
            x, [(0, 0), (0, short)] + [(0, 0)] * (x.ndim - 2), constant_values=fill
        )
        x = x.reshape(batch, count, -1, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    zero = jnp.zeros((), jnp.float32)
    start: Any = (
        (zero, zero, zero),
        jnp.zeros(w.shape, jnp.float32) if for_w else None,
    )
    if count == 1:
        (sums, d_w), d_x = chunk(start, (hidden, labels, *rows))
    else:
        chunks = (cut(hidden), cut(labels, -100), *jax.tree.map(cut, rows))
        (sums, d_w), d_x = jax.lax.scan(chunk, start, chunks)
        if d_x is not None:
            d_x = jnp.moveaxis(d_x, 0, 1).reshape(batch, -1, width)[:, :length]
    ce, kd, valid = sums
    total = {"ce": ce, "kd": kd, "count": valid}
    loss = options.lm_weight * ce + options.weight * kd
    return loss, total, d_x, None if d_w is None else d_w.astype(w.dtype)
