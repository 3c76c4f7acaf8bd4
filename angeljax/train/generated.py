"""Training text that the teacher writes itself.

A student of a chat model has seldom the data that the model was trained on. What the
model itself samples stands in for it (LLM-QAT, arXiv 2305.17888, section 3.1).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax import _shards
from angeljax.evaluation._progress import progress_bar
from angeljax.models.generate import check_sampling, generate
from angeljax.models.language_model import LanguageModel
from angeljax.train._lanes import Lanes

__all__ = ["generate_tokens"]
# From prompts and a key to what follows each of them.
_Sample = Callable[..., Sequence[np.ndarray]]


def generate_tokens(
    path: str | Path,
    model: LanguageModel,
    params: Any,
    *,
    shards: int,
    rows: int,
    max_new_tokens: int,
    prompts: Sequence[Sequence[int]],
    eos_ids: tuple[int, ...] | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch: int | None = None,
    width: int | None = None,
    room: int | None = None,
    max_minutes: float | None = None,
    progress: bool | None = None,
) -> list[Path]:
    """Samples documents from a model and writes them as token streams.

    Shard n is a function of the model, the options and n alone. An interrupted run goes
    on with the first shard that is missing, more shards can be asked for later, and
    either way the bytes are those of one run.

    Args:
      path: a folder, new or begun by the same call.
      model: the teacher.
      params: its params, compressed or not.
      shards: how many files of documents there should be.
      rows: documents of a shard.
      max_new_tokens: at which a document that has not ended is cut off.
      prompts: token ids to start from, taken in turn; `[[separator]]` lets the model
        write whatever it likes.
      eos_ids: ids that end a document; default those of the configuration.
      seed: of the sampling.
      temperature, top_k, top_p: see `angeljax.models.generate`; 0 is greedy.
      batch: documents that are sampled at a time; where one ends the next of its shard
        begins, so that rows should be several times as many. None samples a shard as
        one batch, which goes on until its longest document ends. With `batch` keys and
        values are kept in the model's dtype, and attention is dense.
      width: tokens that prompts are padded to at most; default that of the longest.
      room: with `batch`, tokens that a document may have at most, here or in other
        calls; default `max_new_tokens`. Calls with the same width and batch (without
        one, rows), and the same room, share their programs.
      max_minutes: begin no shard that would end later, after the first; default no
        limit.
      progress: show a progress bar on stderr; default: if it is a terminal.

    Returns:
      The files in order, each a `.npy` of uint16 or uint32 ids `[tokens]`: prompts and
      what followed, one document after the other, with the ending token of each unless
      the next document begins with it. `load_tokens` takes the folder.

    Raises:
      ValueError: an option is out of range, a prompt is empty or outside the
        vocabulary, or the folder was begun with another model or options.

    Example:
      >>> import jax, tempfile
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.train.generated import generate_tokens
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=1,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... ))
      >>> files = generate_tokens(
      ...     tempfile.mkdtemp(), model, model.init(jax.random.key(0)),
      ...     shards=1, rows=2, max_new_tokens=3, prompts=[[0]],
      ... )
      >>> len(np.load(files[0]))
      8
    """
    path, vocabulary = Path(path), model.config.vocab_size
    for name, value in (("shards", shards), ("rows", rows)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    if not prompts:
        raise ValueError("prompts: name at least one, such as [[separator]]")
    for i, prompt in enumerate(prompts):
        if not len(prompt) or min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(
                f"prompt {i} is empty or outside the vocabulary of {vocabulary}"
            )
    longest = max(map(len, prompts))
    if width is not None and width < longest:
        raise ValueError(f"width of {width} for a prompt of {longest} tokens")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    if batch is not None and model.kv_cache is not None:
        raise ValueError(
            "batch: rows that are filled again have no quantized cache: leave batch "
            "out, or kv_cache"
        )
    if room is not None and room < max_new_tokens:
        raise ValueError(f"room of {room} for max_new_tokens of {max_new_tokens}")
    if max_minutes is not None and not max_minutes > 0:
        raise ValueError(f"max_minutes must be above 0, not {max_minutes}")
    ends = model.config.eos_ids if eos_ids is None else tuple(eos_ids)
    manifest = {
        "kind": _shards.GENERATED,
        "version": 1,
        "model": _shards.fingerprint(params),
        "prompts": _shards.fingerprint(
            [np.asarray(prompt, np.uint32) for prompt in prompts]
        ),
        "vocab_size": vocabulary,
        "rows": rows,
        "max_new_tokens": max_new_tokens,
        "eos_ids": list(ends),
        "seed": seed,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "batch": batch,
    }
    _shards.start(path, manifest)
    # One width for all shards, so that one program serves them.
    width = longest if width is None else width
    sampling: dict[str, Any] = {"top_k": top_k, "top_p": top_p}
    sample: _Sample
    if batch is None:
        sample = functools.partial(
            _as_one_batch,
            functools.partial(
                generate,
                model,
                params,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                eos_ids=ends,
                **sampling,
            ),
            width,
        )
    else:
        room = max_new_tokens if room is None else room
        lanes = Lanes.of(
            model, params, rows=batch, width=width, room=room, ends=ends, **sampling
        )
        sample = functools.partial(
            lanes.write, limit=max_new_tokens, temperature=temperature
        )
    files = [path / _shards.text_name(shard) for shard in range(shards)]
    clock = _Clock(max_minutes)
    with progress_bar("generate", shards, progress) as advance:
        for shard, file in enumerate(files):
            if not file.exists():
                if clock.over():
                    return files[:shard]
                first = shard * rows
                some = [prompts[(first + i) % len(prompts)] for i in range(rows)]
                key = jax.random.fold_in(jax.random.key(seed), shard)
                stream = _stream(some, sample(some, key=key), ends, prompts[0][0])
                _shards.save_array(file, stream.astype(_shards.id_dtype(vocabulary)))
                clock.lap()
            advance(None)
    return files


def _as_one_batch(
    sample: Callable[..., Any],
    width: int,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
) -> list[np.ndarray]:
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = prompt
        mask[i, width - len(prompt) :] = True
    out = sample(jnp.asarray(tokens), jnp.asarray(mask), key=key)
    ids, lengths = jax.device_get((out.tokens, out.lengths))
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


class _Clock:
    """Whether there is time for one more shard."""

    def __init__(self, minutes: float | None) -> None:
        self._end = None if minutes is None else time.perf_counter() + 60 * minutes
        self._laps: list[float] = [time.perf_counter()]

    def lap(self) -> None:
        self._laps.append(time.perf_counter())

    def over(self) -> bool:
        count = len(self._laps) - 1
        if self._end is None or not count:
            return False
        # The first one was compiled too: it says nothing about the next.
        last = self._laps[-1] - self._laps[-2] if count > 1 else 0.0
        return time.perf_counter() + last > self._end


def _stream(
    prompts: Sequence[Sequence[int]],
    bodies: Sequence[np.ndarray],
    ends: tuple[int, ...],
    separator: int,
) -> np.ndarray:
    parts: list[np.ndarray] = []
    for i, (prompt, body) in enumerate(zip(prompts, bodies, strict=True)):
        # The separator that the next document begins with ends this one already.
        following = prompts[i + 1][0] if i + 1 < len(prompts) else separator
        if body[-1] in ends and body[-1] == following:
            body = body[:-1]
        parts += [np.asarray(prompt, np.int32), body]
    return np.concatenate(parts)
