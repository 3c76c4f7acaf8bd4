"""As many placeholders in a prompt as tokens are kept."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def placeholder_count(tokens: jax.Array, placeholder: int) -> jax.Array:
    """How many placeholders each row has.

    Args:
      tokens: int `[..., L]`, ids.
      placeholder: the id that stands for image or audio tokens.

    Returns:
      int32 `[...]`.

    Example:
      >>> import jax.numpy as jnp
      >>> placeholder_count(jnp.array([[1, 9, 9, 2]]), 9).tolist()
      [2]
    """
    return jnp.sum(tokens == placeholder, axis=-1, dtype=jnp.int32)


def expand_placeholders(
    tokens: Sequence[int],
    placeholder: int,
    counts: int | Sequence[int],
    *,
    sizes: Sequence[int] | None = None,
) -> list[int]:
    """Rewrites the ids of a prompt so that images have `counts` placeholders.

    For models that are handed ids and embeddings apart and put the embeddings where the
    placeholders are. It works in both directions: one placeholder that stands for an
    image becomes many, and the many of an unpruned image become few. On the host, not
    traced; inside `jit`, `apply_selection` shortens `Prompt.tokens` by itself.

    Args:
      tokens: ids of one prompt.
      placeholder: the id that stands for image or audio tokens.
      counts: placeholders that each image shall have, or one number for all.
      sizes: placeholders that each image has now, where images follow each other
        without a token between. Default: every run of placeholders is one image.

    Returns:
      The new ids.

    Raises:
      ValueError: another number of images than counts, sizes that do not add up, or a
        count below 0.

    Example:
      >>> expand_placeholders([1, 9, 2, 9, 3], 9, [3, 2])
      [1, 9, 9, 9, 2, 9, 9, 3]
      >>> expand_placeholders([1, 9, 9, 9, 9, 3], 9, 1, sizes=[2, 2])
      [1, 9, 9, 3]
    """
    runs = [(same, len(list(run))) for same, run in itertools.groupby(map(int, tokens))]
    found = [size for same, size in runs if same == placeholder]
    images = found if sizes is None else _split(found, sizes)
    number = len(images)
    each = [counts] * number if isinstance(counts, int) else list(counts)
    if len(each) != number:
        raise ValueError(
            f"counts has {len(each)} entries and the prompt {number} images (runs of "
            f"the placeholder {placeholder})"
        )
    if any(count < 0 for count in each):
        raise ValueError(f"counts must be 0 or more, not {each}")
    new, size_of = iter(each), iter(images)
    out: list[int] = []
    for same, size in runs:
        if same != placeholder:
            out += [same] * size
            continue
        while size > 0:
            size -= next(size_of)
            out += [placeholder] * next(new)
    return out


def _split(found: list[int], sizes: Sequence[int]) -> list[int]:
    """Checks that whole images fill every run."""
    left = list(sizes)
    for run in found:
        while run > 0 and left and left[0] > 0:
            run -= left.pop(0)
        if run != 0:
            raise ValueError(
                f"sizes {list(sizes)} do not add up to the runs of placeholders {found}"
            )
    if left:
        raise ValueError(
            f"sizes {list(sizes)} do not add up to the runs of placeholders {found}"
        )
    return list(sizes)
