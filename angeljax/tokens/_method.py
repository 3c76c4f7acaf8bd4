"""From the choice within one row to a method over batches, masks and groups."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import numbers
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.tokens import _quota
from angeljax.tokens._keep import keep_count, keep_counts
from angeljax.tokens._selection import Selection


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """The rows that a method chooses from, checked; `[N, ...]` or `[B, N, ...]`.

    Attributes:
      embeds: float32 `[B, N, D]`, without a gradient.
      rows: the same with its gradient, for methods that merge.
      mask: bool `[B, N]`.
      count: int32 `[B]`, how many to keep of each row; at most `keep`.
      keep: K, static.
      importance: float32 `[B, N]`, or None.
      attn: float32 `[B, N]`, mean over heads, or None.
      text: float32 `[B, M, D]`, or None; rows of zeros are padding.
      key: PRNG keys `[B]`, or None.
      arrays: further arrays of the method, by name.
    """

    embeds: jax.Array
    rows: jax.Array
    mask: jax.Array
    count: jax.Array
    keep: int = dataclasses.field(metadata={"static": True})
    importance: jax.Array | None = None
    attn: jax.Array | None = None
    text: jax.Array | None = None
    key: jax.Array | None = None
    arrays: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.mask.shape[-1]

    @property
    def saliency(self) -> jax.Array:
        """float32 `[B, N]`: the attention, or the importance given in its place."""
        score = self.importance if self.attn is None else self.attn
        assert score is not None
        return score


# The choices in order, int32 [K] (N: unused), or those and the merged rows [N, D], of
# which only the rows of chosen tokens count.
Choice = jax.Array | tuple[jax.Array, jax.Array]

_HINTS = {
    "attention": (
        "attn, the attention that each token receives, [B, N] or [B, heads, N] "
        "(angeljax.tokens.received_attention computes it), or importance [B, N]"
    ),
    "importance": (
        "importance [B, N] (angeljax.tokens.score_tokens or received_attention, "
        "norm_importance, ... compute it)"
    ),
    "text": "text, the embeddings of the prompt [B, M, D], or importance [B, N]",
    "key": "key, a jax.random.key or one for each row",
}


def method(
    *,
    needs: str | None = None,
    arrays: Mapping[str, int] | None = None,
    batched: bool = False,
) -> Callable[[Callable[..., Choice]], Callable[..., Selection]]:
    """Makes a method of a function from `Tokens` to the choice in one row.

    The method takes what `prune` takes, and the options of the function. It checks its
    arguments, adds and takes away the axis of the batch, and applies the quotas.

    Args:
      needs: "attention" (or importance), "importance", "text" (or importance) or "key":
        what the method cannot do without.
      arrays: names of further arrays that it takes -> their axes after `[B, N]`.
      batched: the function takes `[B, N, ...]` and not one row `[N, ...]`.
    """
    extra = dict(arrays or {})

    def wrap(core: Callable[..., Choice]) -> Callable[..., Selection]:
        name = core.__name__
        parameters = list(inspect.signature(core).parameters.values())[1:]
        known = [p.name for p in parameters] + list(extra)

        def run(
            embeds: jax.Array,
            *,
            keep: int | float,
            importance: jax.Array | None = None,
            mask: jax.Array | None = None,
            text: jax.Array | None = None,
            attn: jax.Array | None = None,
            key: jax.Array | None = None,
            groups: jax.Array | None = None,
            quota: str = "global",
            num_groups: int | None = None,
            group_size: int | None = None,
            group_keep: int | None = None,
            **options: Any,
        ) -> Selection:
            for option in options:
                if option not in known:
                    near = difflib.get_close_matches(option, known, n=1)
                    hint = f"did you mean {near[0]}? " if near else ""
                    has = ", ".join(known) or "none"
                    raise ValueError(
                        f"{name} has no option {option!r}: {hint}its options: {has}"
                    )
            given = {a: options.pop(a) for a in extra if options.get(a) is not None}
            options = {k: v for k, v in options.items() if k not in extra}
            for option, value in options.items():
                if not isinstance(value, Hashable) or isinstance(value, jax.Array):
                    raise ValueError(f"{option} must be a plain value, not {value!r}")
            tokens, single = _tokens(
                name, needs, embeds, keep, importance, mask, text, attn, key,
                given, extra,
            )  # fmt: skip
            groups = _grouped(tokens, groups, single)
            plan = _quota.Plan.of(
                groups, tokens.mask, keep, quota, num_groups, group_size, group_keep
            )

            chosen = _chosen(tokens, plan, core, batched, tuple(options.items()))
            if chosen.merged is not None:
                rows = chosen.merged.astype(jnp.asarray(embeds).dtype)
                chosen = dataclasses.replace(chosen, merged=rows)
            return jax.tree.map(lambda x: x[0], chosen) if single else chosen

        takes = [
            inspect.Parameter(
                p, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=jax.Array
            )
            for p in extra
        ]
        shown = list(inspect.signature(run).parameters.values())
        run = functools.wraps(core)(run)
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*shown[:-1], *takes, *own], return_annotation=Selection
        )
        return run

    return wrap


# Outside of a `jit`, one program instead of many small ones.
@functools.partial(jax.jit, static_argnames=("core", "batched", "options"))
def _chosen(
    tokens: Tokens,
    plan: _quota.Plan,
    core: Callable[..., Choice],
    batched: bool,
    options: tuple[tuple[str, Any], ...],
) -> Selection:
    def choose(rows: Tokens) -> Choice:
        if batched:
            return core(rows, **dict(options))
        return jax.vmap(lambda row: core(row, **dict(options)))(rows)

    order, merged = _quota.choose(choose, tokens, plan)
    chosen = Selection.of(order, tokens.num_tokens)
    if merged is None:
        return chosen
    return dataclasses.replace(chosen, merged=chosen.take(merged))


def _tokens(
    name: str,
    needs: str | None,
    embeds: jax.Array,
    keep: int | float,
    importance: jax.Array | None,
    mask: jax.Array | None,
    text: jax.Array | None,
    attn: jax.Array | None,
    key: jax.Array | None,
    given: dict[str, jax.Array],
    extra: dict[str, int],
) -> tuple[Tokens, bool]:
    rows = jnp.asarray(embeds)
    if rows.ndim not in (2, 3) or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(
            "embeds must be floating-point [N, D] or [B, N, D], not "
            f"{rows.dtype}{list(rows.shape)}"
        )
    single = rows.ndim == 2
    lead = rows.shape[:-1]
    num_tokens = lead[-1]
    if not num_tokens:
        raise ValueError(f"embeds has no tokens: its shape is {list(rows.shape)}")
    static = keep_count(num_tokens, keep)
    if importance is not None:
        importance = _floats("importance", importance, lead)
    if attn is not None:
        attn = jnp.asarray(attn)
        if attn.ndim == len(lead) + 1:
            heads = (*lead[:-1], attn.shape[-2], num_tokens)
            attn = _floats("attn", attn, heads).mean(-2)
        else:
            attn = _floats("attn", attn, lead, "[B, N] or [B, heads, N]")
    if mask is None:
        mask = jnp.ones(lead, bool)
    mask = jnp.asarray(mask)
    if mask.dtype != bool or mask.shape != lead:
        raise ValueError(
            f"mask must be bool{list(lead)}, True for real tokens, not "
            f"{mask.dtype}{list(mask.shape)}"
        )
    if text is not None:
        text = jnp.asarray(text)
        wanted = (*lead[:-1], text.shape[-2] if text.ndim > 1 else 1, rows.shape[-1])
        text = _floats("text", text, wanted)
    if key is not None:
        key = jnp.asarray(key)
        if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            raise ValueError("key must be made by jax.random.key, or some of those")
        if key.ndim == 0 and not single:
            key = jax.random.split(key, lead[0])
        if key.shape != lead[:-1]:
            raise ValueError(f"key must be one key, or {lead[:-1]}, not {key.shape}")
    arrays = {}
    for one, value in given.items():
        value = jnp.asarray(value)
        tail = value.shape[value.ndim - extra[one] :] if extra[one] else ()
        arrays[one] = _floats(one, value, (*lead, *tail))
    have = {
        "attention": attn is not None or importance is not None,
        "importance": importance is not None,
        "text": text is not None or importance is not None,
        "key": key is not None,
        None: True,
    }
    if not have[needs]:
        assert needs is not None
        raise ValueError(f"{name} needs {_HINTS[needs]}")

    rows = rows.astype(jnp.float32)
    tokens = Tokens(
        embeds=rows,
        rows=rows,
        mask=mask,
        count=keep_counts(keep, mask),
        keep=static,
        importance=importance,
        attn=attn,
        text=text,
        key=key,
        arrays=arrays,
    )
    # No gradient flows through a choice, only through what is merged.
    tokens = dataclasses.replace(_stopped(tokens), rows=rows)
    return (jax.tree.map(lambda x: x[None], tokens) if single else tokens), single


def _floats(
    name: str, value: Any, shape: tuple[int, ...], words: str | None = None
) -> jax.Array:
    value = jnp.asarray(value)
    if value.shape != shape or not (
        jnp.issubdtype(value.dtype, jnp.floating)
        or jnp.issubdtype(value.dtype, jnp.integer)
    ):
        raise ValueError(
            f"{name} must be {words or 'numbers'} of shape {list(shape)}, not "
            f"{value.dtype}{list(value.shape)}"
        )
    return value.astype(jnp.float32)


def _stopped(tree: Any) -> Any:
    def stop(x: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.lax.stop_gradient(x) if floating else x

    return jax.tree.map(stop, tree)


def _grouped(
    tokens: Tokens, groups: jax.Array | None, single: bool
) -> jax.Array | None:
    if groups is None:
        return None
    # A NumPy array stays one: then the host can count the groups.
    shape, dtype = jnp.shape(groups), jnp.result_type(groups)
    want = tokens.mask.shape[1:] if single else tokens.mask.shape
    if shape != want or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"groups must be integers of shape {list(want)}, not {dtype}{list(shape)}"
        )
    return groups[None] if single else groups


def positive(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError unless `value` is an integer from `least` on."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{name} must be an integer from {least} on, not {value!r}")


def within(name: str, value: Any, low: float, high: float) -> None:
    """Raises ValueError unless `value` is a number from `low` to `high`."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not low <= value <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g}, not {value!r}")


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        known = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} must be one of {known}, not {value!r}")
