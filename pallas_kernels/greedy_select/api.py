"""`greedy_select`: K tokens that matter and differ, one after the other."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._devices import elsewhere, implementation_for
from pallas_kernels._implementation import implementation as module_of
from pallas_kernels._weights import KernelError
from pallas_kernels.greedy_select import _call, _check, _gram, _terms, xla
from pallas_kernels.greedy_select._terms import Settings

# Of Gram matrices that stand in memory together.
_MOST_BYTES = 2**31


def greedy_select(
    embeds: jax.Array | None,
    importance: jax.Array | None,
    num_select: int,
    *,
    objective: str = "mmr",
    weight: float = 0.5,
    gram: jax.Array | None = None,
    mask: jax.Array | None = None,
    counts: jax.Array | None = None,
    parallel: int = 1,
    precision: str = "highest",
    implementation: str | None = None,
) -> jax.Array:
    """Chooses tokens greedily: at every step the one of the highest score.

    With S the cosines of all pairs of embeddings (`x / (|x| + 1e-8)`, signed, float32),
    v the importance and C what is chosen so far, the score of token i is

    - "mmr" (maximal marginal relevance; IDPruner, arXiv 2602.13315, section 4):
      `weight * v[i] - (1 - weight) * max(S[j, i] for j in C)`. The first choice is the
      largest v itself. A weight of 0, or no importance, is farthest-point sampling from
      there; 1 is the top K of v.
    - "dpp" (greedy MAP of a determinantal point process with the kernel
      `v[i] * S[i, j] * v[j]`; arXiv 1709.05135, algorithm 1; CDPruner, arXiv
      2506.10967): the variance of i given C. The first choice is the largest v. Tokens
      in the span of C, whose variance is below 1e-12 or a millionth of what it was,
      come last, in the order of v.
    - "facility" (SCOPE, arXiv 2510.24214):
      `sum(max(0, S[i, l] - c[l]) for l) * v[i] ** weight` with
      `c[l] = max(0, max(S[j, l] for j in C))`. Tokens that add nothing come last, in
      the order of v.

    Ties go to the lowest index. Every prefix of a choice is the choice for a smaller K,
    as long as `parallel` is 1.

    Args:
      embeds: float `[B, N, D]`; None if `gram` is given. Rows of zeros, and rows that
        are not finite, are similar to nothing.
      importance: float `[B, N]`; only "mmr" goes without. NaN counts as the lowest
        number. For "dpp" and "facility" negative entries count as 0.
      num_select: K, static, 1 to N.
      objective: "mmr", "dpp" or "facility".
      weight: see above; from 0 to 1 for "mmr", 0 or more for "facility", without
        meaning for "dpp".
      gram: float `[B, N, N]`, finite, instead of cosines of `embeds`; row j holds the
        similarities of token j.
      mask: bool `[B, N]`; tokens where it is False are never chosen, nor covered.
      counts: integers `[B]`, choices of each row, at most K; default K.
      parallel: tokens taken of the same scores at every step, an approximation.
      precision: of the cosines. "highest" is that of float32; "fast" rounds unit rows
        to bfloat16.
      implementation: "mosaic_gpu", "triton", "tpu", "xla" or "reference"; None takes
        the one for the device, or "xla" where that one cannot run this. Where one Gram
        matrix would take more than 2 GiB, "xla" goes without for "mmr" and "dpp", and a
        batch whose matrices would take more is worked through in parts.

    Returns:
      int32 `[B, K]`, indices in the order of choice. Slots that stay unused (beyond
      `counts`, or without a token left in the mask) hold N. All implementations give
      the same choices for the same cosines; variances of "dpp" are rounded differently
      by each. No gradient flows through a choice. Under `jax.vmap` the mapped axis
      joins the batch.

    Raises:
      KernelError: shapes, dtypes or settings that do not go together, or an
        implementation that cannot run here.

    Example:
      >>> import jax.numpy as jnp
      >>> from pallas_kernels import greedy_select
      >>> embeds = jnp.asarray([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 1.0]]])
      >>> importance = jnp.asarray([[1.0, 0.9, 0.5, 0.2]])
      >>> greedy_select(embeds, importance, 3).tolist()
      [[0, 2, 1]]
    """
    batch, n = _check.shapes(embeds, importance, gram, mask, counts)
    _check.settings(
        num_select, n, objective, weight, parallel, precision, importance is not None
    )
    settings = Settings(int(num_select), objective, float(weight), int(parallel))
    rows = n + (_gram.padding(n) if gram is None else 0)
    name = implementation or choose(batch, rows, settings)
    module = module_of(_call.PACKAGE, name)
    if implementation is not None:
        why = None if name == "tpu" else elsewhere(name)
        why = why or module.unsupported(batch, rows, settings)
        if why is not None:
            raise KernelError(
                f"implementation {name!r} cannot run this: {why}; use "
                "implementation='xla' or None"
            )
    if gram is None and _free(name, rows) and objective == "facility":
        raise KernelError(
            f"objective 'facility' needs the similarities of all {n} tokens, "
            f"{4 * rows * rows / 2**30:.1f} GiB: select among parts of them, or with "
            "'mmr'"
        )
    return _run(embeds, importance, gram, mask, counts, precision, name, settings)


def choose(batch: int, n: int, settings: Settings) -> str:
    """Name of the implementation for the current device, or "xla"."""
    name = implementation_for()
    try:
        can = module_of(_call.PACKAGE, name).unsupported(batch, n, settings) is None
    except KernelError:  # not installed
        can = False
    return name if can else "xla"


def _free(name: str, n: int) -> bool:
    """Whether rows of the Gram matrix are computed one by one, as it is too large."""
    return name == "xla" and 4 * n * n > _MOST_BYTES


# Outside of a `jit`, one program instead of many small ones.
@functools.partial(jax.jit, static_argnames=("precision", "name", "settings"))
def _run(
    embeds: jax.Array | None,
    importance: jax.Array | None,
    gram: jax.Array | None,
    mask: jax.Array | None,
    counts: jax.Array | None,
    precision: str,
    name: str,
    settings: Settings,
) -> jax.Array:
    embeds, importance, gram = lax.stop_gradient((embeds, importance, gram))
    given = gram if embeds is None else embeds
    assert given is not None
    n, shape = given.shape[1], given.shape[:2]
    valid = jnp.ones(shape, bool) if mask is None else mask
    importance = _terms.clean(importance, valid, settings)
    if gram is None:
        assert embeds is not None
        more = _gram.padding(n)
        if more:
            embeds = jnp.pad(embeds, ((0, 0), (0, more), (0, 0)))
            importance, valid = (
                jnp.pad(x, ((0, 0), (0, more))) for x in (importance, valid)
            )
    limit = _terms.limits(valid, counts, settings.num_select)
    rest = importance, valid, limit
    run = _call.function(name, settings)
    if gram is not None:
        return jnp.minimum(run(gram.astype(jnp.float32), *rest), n)
    assert embeds is not None
    rows = embeds.shape[1]
    if _free(name, rows):
        unit = _gram.unit_rows(embeds)
        unit = unit.astype(jnp.bfloat16) if precision == "fast" else unit
        return jnp.minimum(xla.select_without(unit, *rest, settings), n)

    def parts(x: jax.Array, *rest: jax.Array) -> jax.Array:
        return run(_gram.cosine(x, precision), *rest)

    together = max(1, _MOST_BYTES // (4 * rows * rows))
    if embeds.shape[0] <= together:
        return jnp.minimum(parts(embeds, *rest), n)

    def one(args: Any) -> jax.Array:
        return parts(*(x[None] for x in args))[0]

    order = lax.map(one, (embeds, *rest), batch_size=together)
    return jnp.minimum(order, n)
