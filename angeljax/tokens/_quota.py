"""How the tokens to keep are shared out among images, frames or clips."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.tokens import _choose
from angeljax.tokens._keep import keep_count, keep_counts

QUOTAS = "global", "per_group", "proportional"


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["groups"],
    meta_fields=["quota", "num_groups", "group_size", "group_keep", "keep"],
)
@dataclasses.dataclass(frozen=True)
class Plan:
    """A quota, checked. All but `groups` is static.

    Attributes:
      quota: one of `QUOTAS`.
      groups: int32 `[B, N]`, or None.
      num_groups: groups of a row.
      group_size: most tokens of one group.
      group_keep: the least to keep of each group.
      keep: as given.
    """

    quota: str
    groups: jax.Array | None
    num_groups: int
    group_size: int
    group_keep: int
    keep: int | float

    @classmethod
    def of(
        cls,
        groups: Any,
        mask: jax.Array,
        keep: int | float,
        quota: str,
        num_groups: int | None,
        group_size: int | None,
        group_keep: int | None,
    ) -> Plan:
        """Checks what `prune` was given."""
        if quota not in QUOTAS:
            known = ", ".join(map(repr, QUOTAS))
            raise ValueError(f"quota must be one of {known}, not {quota!r}")
        given = dict(
            num_groups=num_groups, group_size=group_size, group_keep=group_keep
        )
        for name, value in given.items():
            whole = isinstance(value, numbers.Integral) and value is not True
            if value is not None and not (whole and value >= 1):  # type: ignore[operator]
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if groups is None:
            asked = next((k for k, v in given.items() if v is not None), None)
            if quota != "global" or asked:
                raise ValueError(
                    f"{asked or f'quota={quota!r}'} needs groups, the image, frame or "
                    "clip of each token, int [B, N]"
                )
            return cls(quota, None, 1, mask.shape[-1], 0, keep)
        if group_keep is not None and quota == "per_group":
            raise ValueError(
                'group_keep is for quota="global" and "proportional": with "per_group" '
                "every group keeps its own share"
            )
        on_host = isinstance(groups, np.ndarray)
        if num_groups is None:
            if not on_host:
                raise ValueError(
                    "num_groups must be given, as a Python integer, unless groups is a "
                    "NumPy array"
                )
            num_groups = max(int(groups.max(initial=0)) + 1, 1)
        if group_size is None:
            group_size = mask.shape[-1]
            if on_host:
                each = range(num_groups)
                sizes = [np.sum(groups == g, axis=-1).max(initial=1) for g in each]
                group_size = int(max(sizes))
        group_size = min(group_size, mask.shape[-1])
        static = keep_count(mask.shape[-1], keep)
        if (group_keep or 0) * num_groups > static:
            raise ValueError(
                f"group_keep={group_keep} of {num_groups} groups is more than the "
                f"{static} tokens to keep"
            )
        least = group_keep or (1 if quota == "proportional" else 0)
        groups = jnp.asarray(groups, jnp.int32)
        return cls(quota, groups, num_groups, group_size, least, keep)


def choose(
    choose_rows: Callable[[Any], Any], tokens: Any, plan: Plan
) -> tuple[jax.Array, jax.Array | None]:
    """Runs a method under a quota.

    Args:
      choose_rows: from `Tokens` `[R, M, ...]` to the order `[R, K]`, or that and the
        merged rows `[R, M, D]`.
      tokens: `[B, N, ...]`.
      plan: see `Plan`.

    Returns:
      int32 `[B, K]` in the order of choice, N where unused; merged rows `[B, N, D]` or
      None.
    """
    if plan.groups is None:
        return _pair(choose_rows(tokens))
    inside = (plan.groups >= 0) & (plan.groups < plan.num_groups)
    mask = tokens.mask & inside
    count = keep_counts(plan.keep, mask)
    tokens = dataclasses.replace(tokens, mask=mask, count=count)
    rows, index = _split(tokens, plan)
    sizes = jnp.sum(rows.mask, axis=-1, dtype=jnp.int32)  # [B * G]

    if plan.quota == "per_group":
        keep = keep_count(plan.group_size, _fitting(plan.keep, plan.group_size))
        rows = dataclasses.replace(
            rows, keep=keep, count=keep_counts(_fitting(plan.keep, keep), rows.mask)
        )
        most = _most_kept(plan, tokens.num_tokens)
        return _merge(choose_rows(rows), index, tokens, most)
    if plan.quota == "proportional":
        keep = min(tokens.keep, plan.group_size)
        shares = _shares(tokens, plan, sizes.reshape(index.shape[:2]))
        rows = dataclasses.replace(rows, keep=keep, count=shares.reshape(-1))
        return _merge(choose_rows(rows), index, tokens, tokens.keep)

    everywhere, merged = _pair(choose_rows(tokens))
    if not plan.group_keep:
        return everywhere, merged
    if merged is not None:
        raise ValueError(
            "group_keep is for methods that only select: this one merges, use "
            'quota="proportional"'
        )
    keep = min(plan.group_keep, plan.group_size)
    rows = dataclasses.replace(rows, keep=keep, count=jnp.minimum(keep, sizes))
    each, _ = _merge(choose_rows(rows), index, tokens, keep * plan.num_groups)
    return _at_least(everywhere, each, tokens, plan), None


def _fitting(keep: int | float, size: int) -> int | float:
    return min(keep, size) if isinstance(keep, numbers.Integral) else keep


def _most_kept(plan: Plan, num_tokens: int) -> int:
    """The most tokens that all groups together can keep, each its own share."""
    each = keep_count(plan.group_size, _fitting(plan.keep, plan.group_size))
    most = min(num_tokens, each * plan.num_groups)
    if isinstance(plan.keep, numbers.Integral):
        return most
    # Rounding adds at most a half to a group, and the one token that each group keeps
    # less than one.
    return min(most, math.floor(num_tokens * float(plan.keep)) + plan.num_groups)


def _split(tokens: Any, plan: Plan) -> tuple[Any, jax.Array]:
    """Every group as a row of its own: `[B * G, M, ...]`, and `[B, G, M]` indices."""
    assert plan.groups is not None
    n, (g, m) = tokens.num_tokens, (plan.num_groups, plan.group_size)
    group = jnp.where(tokens.mask, plan.groups, g)
    order = jnp.argsort(group, axis=-1, stable=True)
    member = group[:, None] == jnp.arange(g)[:, None]  # [B, G, N]
    size = jnp.sum(member, axis=-1, dtype=jnp.int32)
    start = jnp.cumsum(size, axis=-1) - size
    place = start[..., None] + jnp.arange(m)
    index = jnp.take_along_axis(order[:, None], jnp.minimum(place, n - 1), axis=-1)
    index = jnp.where(jnp.arange(m) < size[..., None], index, n)

    def spread(x: jax.Array, per_token: bool) -> jax.Array:
        """`[B, ...]` to `[B * G, ...]`."""
        if per_token:
            x = jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0))(
                x, index
            )
        else:
            x = jnp.broadcast_to(x[:, None], (x.shape[0], g, *x.shape[1:]))
        return x.reshape(-1, *x.shape[2:])

    def maybe(x: jax.Array | None, per_token: bool = True) -> jax.Array | None:
        return None if x is None else spread(x, per_token)

    key = tokens.key
    if key is not None:
        fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
        key = jax.vmap(lambda k: fold(k, jnp.arange(g)))(key).reshape(-1)
    rows = dataclasses.replace(
        tokens,
        embeds=spread(tokens.embeds, True),
        rows=spread(tokens.rows, True),
        mask=(index < n).reshape(-1, m),
        importance=maybe(tokens.importance),
        attn=maybe(tokens.attn),
        text=maybe(tokens.text, False),
        key=key,
        arrays={name: spread(x, True) for name, x in tokens.arrays.items()},
    )
    return rows, index


def _pair(choice: Any) -> tuple[jax.Array, jax.Array | None]:
    return choice if isinstance(choice, tuple) else (choice, None)


def _merge(
    choice: Any, index: jax.Array, tokens: Any, keep: int
) -> tuple[jax.Array, jax.Array | None]:
    """From choices within groups to `[B, keep]`: all first ones, then all second ones.

    Merged rows become `[B, N, D]`.
    """
    order, merged = _pair(choice)
    (b, g, m), n = index.shape, tokens.num_tokens
    order = order.reshape(b, g, -1)
    place = jnp.minimum(order, m - 1)
    order = jnp.where(order < m, jnp.take_along_axis(index, place, axis=-1), n)
    order = order.swapaxes(1, 2).reshape(b, -1)
    used = jnp.argsort(order == n, axis=-1, stable=True)[:, :keep]
    order = jnp.take_along_axis(order, used, axis=-1)
    if merged is None:
        return order, None
    merged = merged.reshape(b, g * m, -1)
    empty = jnp.zeros((b, n, merged.shape[-1]), merged.dtype)
    place = index.reshape(b, -1)
    return order, jax.vmap(lambda e, i, x: e.at[i].set(x, mode="drop"))(
        empty, place, merged
    )


def _shares(tokens: Any, plan: Plan, sizes: jax.Array) -> jax.Array:
    """int32 `[B, G]`: how many of each group, by its summed importance.

    The real-valued shares are t w_g, at least `group_keep` and at most the group, with
    the t that makes them `count` in all; then the largest remainders are rounded up.
    """
    assert plan.groups is not None
    score = tokens.importance if tokens.attn is None else tokens.attn
    score = tokens.mask * 1.0 if score is None else score
    score = _choose.min_max(score, tokens.mask)
    member = plan.groups[:, None] == jnp.arange(plan.num_groups)[:, None]
    # Where nothing is important, the size of a group counts.
    weight = jnp.sum(jnp.where(member & tokens.mask[:, None], score[:, None], 0), -1)
    weight = weight + 1e-6 * sizes
    return jax.vmap(lambda c, w, n: apportion(c, w, n, plan.group_keep))(
        tokens.count, weight, sizes
    )


def apportion(
    count: jax.Array, weight: jax.Array, size: jax.Array, least: int
) -> jax.Array:
    """Shares `count` out in proportion to `weight`, by largest remainder.

    Args:
      count: int32 scalar, at most the sum of `size`.
      weight: float32 `[G]`, positive where `size` is.
      size: int32 `[G]`, the most that a group can take.
      least: the least that it takes, or all of it; where that is more than `count` in
        all, one from each group in the order of their weights, and so on.

    Returns:
      int32 `[G]`, `count` in all.

    Example:
      >>> import jax.numpy as jnp
      >>> sizes = jnp.array([9, 9, 2, 0])
      >>> apportion(jnp.array(9), jnp.array([5.0, 0.1, 3.0, 0.0]), sizes, 1).tolist()
      [6, 1, 2, 0]
    """
    floor = jnp.minimum(size, least)
    heavy = jnp.argsort(jnp.argsort(-jnp.where(size > 0, weight, -1.0), stable=True))
    # One more of each group in turn, heaviest first, until `count` is reached.
    level = jnp.arange(least)[:, None] * size.shape[0] + heavy
    level = jnp.where(
        jnp.arange(least)[:, None] < floor, level, jnp.iinfo(jnp.int32).max
    )
    flat = jnp.argsort(level.reshape(-1), stable=True)
    taken = jnp.argsort(flat) < jnp.minimum(count, jnp.sum(floor))
    floor = jnp.sum(taken.reshape(level.shape), axis=0, dtype=jnp.int32)

    def share(t: jax.Array) -> jax.Array:
        return jnp.clip(t * weight, floor.astype(jnp.float32), size)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> Any:
        low, high = bounds
        middle = (low + high) / 2
        below = jnp.sum(share(middle)) < count
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    high = jnp.max(jnp.where(size > 0, size / jnp.maximum(weight, 1e-30), 0))
    low, high = jax.lax.fori_loop(0, 64, halve, (jnp.zeros_like(high), high))
    exact = share(high)
    whole = jnp.floor(exact).astype(jnp.int32)
    # A share that is a whole number already, as all at a bound are, gets no more.
    rest = jnp.where(whole < size, exact - whole, -jnp.inf)
    place = jnp.argsort(jnp.argsort(-rest, stable=True))
    return whole + (place < count - jnp.sum(whole)) * (whole < size)


def _at_least(
    everywhere: jax.Array, each: jax.Array, tokens: Any, plan: Plan
) -> jax.Array:
    """The choice of the whole row with at least `group_keep` tokens of every group.

    `each` has the first choices of every group alone. Those of a group that has too few
    replace the last choices of groups that have more.
    """
    assert plan.groups is not None
    n, least = tokens.num_tokens, plan.group_keep

    def one(order: jax.Array, each: jax.Array, group: jax.Array) -> Any:
        # Place among the choices of the same group, for all of both lists.
        def group_of(index: jax.Array) -> jax.Array:
            return group.at[index].get(mode="fill", fill_value=-1)

        mine = group_of(order)
        same = mine[:, None] == mine
        before = jnp.tril(same, -1).sum(-1)
        have = jnp.sum(mine[:, None] == jnp.arange(plan.num_groups), axis=0)
        spare = (before >= least) | (order == n)
        new = (each < n) & ~jnp.any(each[:, None] == order, axis=-1)
        theirs = group_of(each)
        earlier = jnp.tril((theirs[:, None] == theirs) & new, -1).sum(-1)
        wanted = new & (earlier + have[theirs] < least)
        both = jnp.concatenate([order, each])
        # Guaranteed tokens first, then the others in their order.
        late = jnp.concatenate([spare, jnp.zeros_like(new)])
        gone = jnp.concatenate([order == n, ~wanted])
        rank = late * 1 + gone * 2
        ranked = both[jnp.argsort(rank, stable=True)]
        kept = jnp.sum(~gone & ~late)
        return ranked, kept, jnp.sum(~gone)

    order, kept, there = jax.vmap(one)(everywhere, each, plan.groups)
    # A row that is too short for the minimum of all its groups keeps that minimum.
    count = jnp.minimum(jnp.maximum(tokens.count, kept), there)
    return _choose.first(order[:, : tokens.keep], count, n)
