"""The table of methods, and `prune`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

import jax

from angeljax.tokens._selection import Selection

# Name -> module of this package; a module is imported when it is asked for.
_METHODS = {
    "atome": "_atome",
    "cdpruner": "_cdpruner",
    "dart": "_dart",
    "divprune": "_divprune",
    "fastadasp": "_fastadasp",
    "fastv": "_fastv",
    "hiprune": "_hiprune",
    "idpruner": "_idpruner",
    "prumerge": "_prumerge",
    "prumerge_plus": "_prumerge",
    "random": "_baselines",
    "samp": "_samp",
    "scope": "_scope",
    "tome": "_tome",
    "uniform": "_baselines",
    "visionselector": "_visionselector",
    "visionzip": "_visionzip",
    "vispruner": "_vispruner",
}


def methods() -> tuple[str, ...]:
    """All methods.

    Returns:
      The names that `prune` takes, sorted.

    Example:
      >>> "idpruner" in methods()
      True
    """
    return tuple(sorted(_METHODS))


def prune(
    embeds: jax.Array,
    *,
    keep: int | float,
    method: str = "idpruner",
    importance: jax.Array | None = None,
    mask: jax.Array | None = None,
    text: jax.Array | None = None,
    attn: Any = None,
    key: jax.Array | None = None,
    groups: jax.Array | None = None,
    quota: str = "global",
    num_groups: int | None = None,
    group_size: int | None = None,
    group_keep: int | None = None,
    **options: Any,
) -> Selection:
    """Chooses which tokens of each row to keep.

    Everything that gives a shape is static: `keep`, `method`, `quota`, `num_groups`,
    `group_size`, `group_keep` and the options that are no arrays. A method ignores what
    it has no use for. Scores are float32 and carry no gradient; merged rows do.

    Args:
      embeds: float `[B, N, D]`, or `[N, D]` for a single row, whose result has no axis
        of the batch either. Everything else then lacks that axis too.
      keep: a count, or a share of the real tokens; see `keep_count`. K is that of N
        tokens, and a row with padding keeps its own share.
      method: one of `methods()`.
      importance: `[B, N]`, larger for what should stay; `score_tokens` or a proxy.
      mask: bool `[B, N]`, True for real tokens; others are never kept.
      text: `[B, M, D]`, embeddings of the prompt; rows of zeros are padding.
      attn: `[B, N]` or `[B, heads, N]` (their mean counts), the attention that each
        token receives; methods for audio also take `AttentionWeights`.
      key: of `jax.random.key`: one, split among the rows, or one for each.
      groups: int `[B, N]`, the image, frame or clip of each token from 0 on; -1 for
        none, which is never kept.
      quota: how the groups share the budget. "global": not at all. "per_group": each
        keeps its share of itself, or `keep` tokens, exactly as if it were alone.
        "proportional": K in all, by the summed min-max of `attn` or `importance` (of
        sizes, without those), at least one each, by largest remainder.
      num_groups: of a row; may be left out if `groups` is a NumPy array.
      group_size: most tokens of a group; default N, or counted if `groups` is a NumPy
        array. A group is chosen from as so many tokens, so that a tight number saves
        memory and time; what lies beyond it is never kept.
      group_keep: the least to keep of each group, for "global" and "proportional": the
        first choices of the group alone take the place of the last ones of groups that
        have more.
      **options: of the method, and further arrays that it takes.

    Returns:
      A `Selection`; its `count` says how many tokens each row really keeps.

    Raises:
      ValueError: no such method or option, an argument that the method needs is
        missing, a shape or a value is wrong; one line that says what would do.

    Example:
      >>> import jax.numpy as jnp, numpy as np
      >>> x = jnp.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 1.0]])
      >>> w = jnp.array([3.0, 2.0, 1.0, 0.0])
      >>> prune(x, keep=0.5, importance=w).indices.tolist()
      [0, 2]
      >>> frames = np.array([0, 0, 1, 1])
      >>> prune(x, keep=0.5, method="uniform", groups=frames, quota="per_group").count
      Array(2, dtype=int32)
    """
    return find(method)(
        embeds,
        keep=keep,
        importance=importance,
        mask=mask,
        text=text,
        attn=attn,
        key=key,
        groups=groups,
        quota=quota,
        num_groups=num_groups,
        group_size=group_size,
        group_keep=group_keep,
        **options,
    )


def find(method: str) -> Callable[..., Selection]:
    """The function of a method.

    Raises:
      ValueError: no such method, with the closest names.
    """
    if method not in _METHODS:
        near = difflib.get_close_matches(str(method), methods(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"unknown method {method!r}: {hint}known methods: {', '.join(methods())}"
        )
    module = importlib.import_module(f"angeljax.tokens.{_METHODS[method]}")
    return getattr(module, method)
