"""Text for a drafter: which tokens are answers, and which tokens are frequent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from angeljax._fields import ConfigError
from angeljax.train.data import PackedTokens

__all__ = [
    "MaskedTokens",
    "answer_mask",
    "draft_vocabulary",
    "places_of",
    "thinking_targets",
]


class MaskedTokens(PackedTokens):
    """`PackedTokens` with `mask`, bool `[batch_size, length + 1]`, of the same tokens.

    Args:
      ids: see `PackedTokens`.
      mask: bool `[tokens]`; None for all.
      more: arrays `[tokens]` that are cut into rows as well, by name.
      options: of `PackedTokens`.

    Raises:
      ConfigError: as `PackedTokens`, or the mask leaves nothing.
    """

    def __init__(
        self,
        ids: np.ndarray,
        mask: np.ndarray | None = None,
        more: Mapping[str, np.ndarray] | None = None,
        **options: int,
    ) -> None:
        super().__init__(ids, **options)
        self.more = dict(more or {})
        self.mask = np.ones(len(ids), bool) if mask is None else mask
        if not self.mask.any():
            raise ConfigError(
                "data: no token of the text is part of an answer: set answers_only to "
                "false, or name text with the model's chat template"
            )

    def batch(self, step: int) -> dict[str, np.ndarray]:
        at = self.picked(step)[:, None] * self.length + np.arange(self.length + 1)
        found = {"tokens": self.ids[at].astype(np.int32), "mask": self.mask[at]}
        return {**found, **{name: x[at] for name, x in self.more.items()}}


def places_of(ids: np.ndarray, pattern: Sequence[int]) -> np.ndarray:
    """Where a run of tokens begins, int64 `[n]`.

    Args:
      ids: `[tokens]`.
      pattern: one token or more.
    """
    count = len(ids) - len(pattern) + 1
    if count < 1:
        return np.zeros(0, np.int64)
    found = np.ones(count, bool)
    for i, token in enumerate(pattern):
        found &= ids[i : i + count] == token
    return np.flatnonzero(found)


def answer_mask(
    ids: np.ndarray, header: Sequence[int], ends: Sequence[int]
) -> np.ndarray:
    """Which tokens of a stream are answers, by the ids around them.

    Args:
      ids: `[tokens]`.
      header: what stands before an answer, such as that of the assistant's turn.
      ends: ids that end one; the first belongs to it.

    Returns:
      bool `[tokens]`.

    Example:
      >>> import numpy as np
      >>> from angeljax.train.eagle_data import answer_mask
      >>> ids = np.asarray([1, 5, 7, 8, 2, 1, 3])
      >>> answer_mask(ids, [1, 5], [2]).astype(int).tolist()
      [0, 0, 1, 1, 1, 0, 0]
    """
    place = np.arange(len(ids))
    begins = np.full(len(ids) + 1, -1)
    starts = places_of(ids, header) + len(header)
    begins[starts] = starts
    begun = np.maximum.accumulate(begins[:-1])
    ended = np.maximum.accumulate(np.where(np.isin(ids, ends), place, -1))
    before = np.concatenate([[-1], ended[:-1]])
    return (begun >= 0) & (before < begun)


def thinking_targets(
    ids: np.ndarray, begin: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """How far the thinking has come at each token, and what is left of it.

    Args:
      ids: `[tokens]`.
      begin, end: tokens around a piece of thinking; one that has no end is left out.

    Returns:
      float32 `[tokens]`, the share of the piece that is read with this token, and the
      number of tokens up to its end, the ending one included; zeros elsewhere.

    Example:
      >>> import numpy as np
      >>> from angeljax.train.eagle_data import thinking_targets
      >>> progress, left = thinking_targets(np.asarray([5, 1, 7, 8, 2, 9]), 1, 2)
      >>> progress.tolist(), left.tolist()
      ([0.0, 0.0, 0.5, 1.0, 0.0, 0.0], [0.0, 0.0, 2.0, 1.0, 0.0, 0.0])
    """
    place = np.arange(len(ids))
    edges = np.flatnonzero((ids == begin) | (ids == end))
    progress = np.zeros(len(ids), np.float32)
    left = np.zeros(len(ids), np.float32)
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        if ids[first] == begin and ids[last] == end:
            inside = place[first + 1 : last]
            progress[inside] = (inside - first) / max(last - first - 1, 1)
            left[inside] = last - inside
    return progress, left


def draft_vocabulary(
    ids: np.ndarray, mask: np.ndarray | None, size: int, vocab_size: int
) -> tuple[np.ndarray, float]:
    """The most frequent tokens.

    Args:
      ids: `[tokens]`.
      mask: bool `[tokens]` of those that count; None for all.
      size: how many; the smallest ids fill what is not seen.
      vocab_size: of the model.

    Returns:
      int64 `[size]`, ascending, and which share of the counted text they are.

    Example:
      >>> import numpy as np
      >>> from angeljax.train.eagle_data import draft_vocabulary
      >>> ids, share = draft_vocabulary(np.asarray([7, 7, 7, 5]), None, 3, 10)
      >>> ids.tolist(), share
      ([0, 5, 7], 1.0)
    """
    seen = ids if mask is None else ids[mask]
    counts = np.bincount(seen, minlength=vocab_size)
    best = np.argsort(-counts, kind="stable")[:size]
    return np.sort(best), int(counts[best].sum()) / max(int(counts.sum()), 1)
