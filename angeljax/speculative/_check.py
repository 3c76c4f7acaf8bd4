"""What `generate` refuses, before anything is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from angeljax.attention.prefill import SparseAttention
from angeljax.speculative._round import reach_of
from angeljax.speculative.drafter import Drafter, TargetModel
from angeljax.speculative.sampling import Sampling
from angeljax.tokens import Prompt, Pruned

EXACT = ("fast", "same_width")


def prompts(
    model: TargetModel, given: Any, lengths: Any
) -> tuple[np.ndarray, np.ndarray]:
    """int32 `[B, T]` padded on the right, and `[B]`.

    Raises:
      ValueError: no prompt, an empty one, or tokens that the model does not have.
    """
    if isinstance(given, Prompt | Pruned):
        raise ValueError("prompts must be tokens here: embeddings are not read")
    if hasattr(given, "ndim"):
        tokens = np.asarray(given)
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                "prompts must be integers [batch, length], or one sequence of tokens "
                f"for each row, not {tokens.dtype}{list(tokens.shape)}"
            )
        full = np.full(len(tokens), tokens.shape[1])
        sizes = full if lengths is None else np.asarray(lengths)
        if sizes.shape != full.shape or (sizes > full).any():
            raise ValueError(
                f"lengths must be [{len(tokens)}], none above {tokens.shape[1]}"
            )
    else:
        if lengths is not None:
            raise ValueError("lengths belong to prompts that are one array")
        rows = [np.asarray(row, np.int32) for row in given]
        if any(row.ndim != 1 for row in rows):
            raise ValueError("each prompt must be a sequence of tokens")
        sizes = np.asarray([len(row) for row in rows])
        tokens = np.zeros((len(rows), max(sizes, default=0)), np.int32)
        for row, out in zip(rows, tokens, strict=True):
            out[: len(row)] = row
    if not len(tokens):
        raise ValueError("no prompts")
    if (sizes < 1).any():
        raise ValueError(
            f"prompt {int(np.argmin(sizes))} is empty: begin with a token, such as bos"
        )
    tokens = tokens[:, : sizes.max()]
    real = np.arange(tokens.shape[1]) < sizes[:, None]
    vocabulary = model.config.vocab_size
    wrong = real & ((tokens < 0) | (tokens >= vocabulary))
    if wrong.any():
        raise ValueError(
            f"token {int(tokens[wrong][0])} in a prompt: the model has {vocabulary}"
        )
    return np.where(real, tokens, 0).astype(np.int32), sizes.astype(np.int32)


def options(
    model: TargetModel,
    drafter: Drafter,
    sampling: Sampling,
    max_new_tokens: int,
    exact: str,
    rounds_per_call: int | None,
) -> None:
    """Refuses what does not go together, with a ValueError."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if exact not in EXACT:
        raise ValueError(f"exact={exact!r}: use {' or '.join(map(repr, EXACT))}")
    if rounds_per_call is not None and rounds_per_call < 1:
        raise ValueError(f"rounds_per_call must be at least 1, not {rounds_per_call}")
    if isinstance(getattr(model, "attention_fn", None), SparseAttention):
        raise ValueError(
            "speculative decoding reads with dense attention: use "
            "dataclasses.replace(model, attention_fn=dense_attention)"
        )
    if getattr(model, "kv_cache", None) is not None:
        raise ValueError(
            "speculative decoding keeps keys and values as they are: use "
            "dataclasses.replace(model, kv_cache=None)"
        )
    if drafter.width < 1:
        raise ValueError(f"a drafter's width is at least 1, not {drafter.width}")
    tree = drafter.tree
    if tree is not None and tree.nodes != drafter.width:
        raise ValueError(
            f"the drafter's tree has {tree.nodes} nodes and its width is "
            f"{drafter.width}: they must be the same"
        )
    if tree is not None and sampling.rule == "rejection" and not sampling.greedy:
        raise ValueError('rule="rejection" is for chains; a tree needs rule="coupled"')
    drafter.check(model, sampling)


def strings(
    stop_strings: Sequence[str], detokenize: Callable[[list[int]], str] | None
) -> None:
    """Refuses stop strings that cannot be looked for, with a ValueError."""
    if isinstance(stop_strings, str) or not all(stop_strings):
        raise ValueError("stop_strings must be a sequence of strings, none empty")
    if stop_strings and detokenize is None:
        raise ValueError("stop_strings need detokenize, from tokens to text")


def slots(
    model: TargetModel,
    drafter: Drafter,
    sizes: np.ndarray,
    max_new_tokens: int,
    given: int | None,
) -> int:
    """How many slots the cache has.

    Raises:
      ValueError: prompt and text exceed the context of the model or the given slots.
    """
    longest, context = int(sizes.max()), model.config.max_positions
    if longest + max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed "
            f"the context of {context}: shorten one of them"
        )
    reach = reach_of(drafter)
    need = longest + max_new_tokens + reach - 1
    if given is None:
        return bucket(longest) + bucket(max_new_tokens + reach)
    if given < need:
        raise ValueError(
            f"slots={given}: a prompt of {longest} tokens, max_new_tokens="
            f"{max_new_tokens} and {reach} slots for drafts need {need}"
        )
    return given


def bucket(count: int) -> int:
    """A length rounded up, so that similar lengths share a compiled program."""
    step = 64 if count <= 512 else 256
    return count + -count % step


def padded(tokens: np.ndarray, length: int) -> np.ndarray:
    """Zeros on the right, up to a length."""
    return np.pad(tokens, [(0, 0), (0, length - tokens.shape[1])])
