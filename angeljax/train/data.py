"""Packed token streams: reading, rows, and an order that can be resumed."""

from __future__ import annotations

import functools
import hashlib
import io
import lzma
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from angeljax import _shards
from angeljax._fields import ConfigError, count

if TYPE_CHECKING:
    from angeljax.models import Tokenizer

_IDS = ("uint16", "uint32", "int32", "int64")
# Texts that are handed to the tokenizer at once; it works on them in parallel.
_CHUNK = 256


class PackedTokens:
    """A token stream cut into full rows, in a shuffled order that is a pure function.

    Row i holds the tokens `[i * length, (i + 1) * length]`, both ends included:
    `length` inputs, and their next tokens. Every epoch has a permutation of its own,
    drawn from `(seed, epoch)`, and step s takes the rows from `s * batch_size` on of
    the stream of epochs. To go on after step s, no state is needed but s.

    Args:
      ids: the stream, `[tokens]`; documents are packed without padding.
      length: tokens in a row.
      batch_size: rows in a step.
      seed: of the order.
      vocab_size: largest id that is allowed, plus one.

    Raises:
      ConfigError: the stream does not fill a row, or has ids outside the vocabulary.

    Example:
      >>> import numpy as np
      >>> from angeljax.train import PackedTokens
      >>> data = PackedTokens(np.arange(9), length=4, batch_size=2)
      >>> sorted(data.batch(0)["tokens"].tolist())
      [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    """

    def __init__(
        self,
        ids: np.ndarray,
        *,
        length: int,
        batch_size: int,
        seed: int = 0,
        vocab_size: int | None = None,
    ) -> None:
        count("seq_length", length)
        count("batch_size", batch_size)
        self.ids, self.length, self.batch_size, self.seed = (
            ids,
            length,
            batch_size,
            seed,
        )
        self.rows = max(len(ids) - 1, 0) // length
        if not len(ids):
            raise ConfigError("data: there are no tokens")
        if not self.rows:
            raise ConfigError(
                f"data: {len(ids)} tokens do not fill a row of {length} and its last "
                "next token: lower seq_length, or name more data"
            )
        if vocab_size is not None and int(ids.max()) >= vocab_size:
            raise ConfigError(
                f"data: token {int(ids.max())} is outside the model's vocabulary of "
                f"{vocab_size}: the ids come from another tokenizer"
            )
        self._order = functools.lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> np.ndarray:
        bits = np.random.Philox(key=[self.seed, epoch])
        return np.random.Generator(bits).permutation(self.rows)

    def picked(self, step: int) -> np.ndarray:
        """Numbers of the rows of an optimizer step, int64 `[batch_size]`."""
        first = step * self.batch_size
        picked = np.empty(self.batch_size, np.int64)
        for i in range(self.batch_size):
            epoch, place = divmod(first + i, self.rows)
            picked[i] = self._order(epoch)[place]
        return picked

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """`{"tokens": int32 [batch_size, length + 1]}` of an optimizer step."""
        picked = self.picked(step)
        at = picked[:, None] * self.length + np.arange(self.length + 1)
        return {"tokens": self.ids[at].astype(np.int32)}

    def identity(self) -> dict[str, Any]:
        """What must agree for a resumed run to see the same batches; JSON values."""
        digest = hashlib.sha256(np.ascontiguousarray(self.ids.astype("<u4")).tobytes())
        return {
            "sha256": digest.hexdigest(),
            "tokens": len(self.ids),
            "length": self.length,
            "batch_size": self.batch_size,
            "seed": self.seed,
        }


def load_tokens(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    tokenizer: Tokenizer | None = None,
) -> np.ndarray:
    """Token ids of files of ids and of texts, one after the other.

    Args:
      sources: each a `.npy` or `.npy.xz` file of ids, a folder that `generate_tokens`
        wrote, or a text as `angeljax.evaluation.load_documents` knows it.
      tokenizer: for the texts. Its end-of-text token follows every document; a file in
        which lines of that token stand alone holds several documents.

    Returns:
      uint16 or uint32 `[tokens]`.

    Raises:
      ConfigError: a file is missing, damaged, empty or not of ids, or there is no
        tokenizer for a text; names it.

    Example:
      >>> import tempfile, numpy as np
      >>> from angeljax.train import load_tokens
      >>> file = tempfile.mkdtemp() + "/ids.npy"
      >>> np.save(file, np.arange(5, dtype=np.uint16))
      >>> load_tokens([file, file]).tolist()
      [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]
    """
    if isinstance(sources, str | os.PathLike):
        sources = [sources]
    if not sources:
        raise ConfigError("data: name at least one source")
    parts = []
    for named in sources:
        source = os.fspath(named)
        found = _streams(source, tokenizer)
        if not sum(map(len, found)):
            raise ConfigError(f"data: {source} holds no tokens")
        parts += found
    small = all(part.dtype == np.uint16 for part in parts)
    return np.concatenate([p.astype(np.uint16 if small else np.uint32) for p in parts])


def _streams(source: str, tokenizer: Tokenizer | None) -> list[np.ndarray]:
    if source.endswith((".npy", ".npy.xz")):
        return [_ids(Path(source))]
    folder = Path(source).expanduser()
    kind = _shards.kind_of(folder)
    if kind is None:
        return [_encoded(source, tokenizer)]
    if kind != _shards.GENERATED:
        raise ConfigError(
            f"data: {source} holds no text but {kind}"
            + (": name it as distill.teacher" if kind == _shards.TEACHER else "")
        )
    try:
        files = _shards.text_files(folder)
    except ValueError as e:
        raise ConfigError(f"data: {e}") from None
    return [_ids(file) for file in files]


def _ids(path: Path) -> np.ndarray:
    path = path.expanduser()
    try:
        content = path.read_bytes()
        if path.suffix == ".xz":
            content = lzma.decompress(content)
        ids = np.load(io.BytesIO(content), allow_pickle=False)
    except OSError as e:
        raise ConfigError(f"data: {path}: {e.strerror or 'cannot be read'}") from None
    except (ValueError, EOFError, lzma.LZMAError) as e:
        raise ConfigError(
            f"data: {path} is damaged or no array of numpy: {' '.join(str(e).split())}"
        ) from None
    if ids.ndim != 1 or ids.dtype.name not in _IDS:
        raise ConfigError(
            f"data: {path} must hold one stream of token ids ({', '.join(_IDS)}), not "
            f"{ids.dtype} {list(ids.shape)}"
        )
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= 2**32):
        raise ConfigError(f"data: {path} has ids outside 0 to 2**32 - 1")
    return ids


def _encoded(source: str, tokenizer: Tokenizer | None) -> np.ndarray:
    from angeljax.evaluation import load_documents

    if tokenizer is None:
        raise ConfigError(f"data: {source} is text, and the model has no tokenizer")
    try:
        documents = list(load_documents(source))
    except (ValueError, OSError) as e:
        raise ConfigError(f"data: {e}") from None
    separator, mark = document_separator(tokenizer)
    if mark:
        documents = [x for d in documents for x in d.split(f"\n{mark}\n")]
    documents = [d for d in documents if d.strip()]
    end = np.asarray([] if separator is None else [separator], np.uint32)
    parts = []
    for start in range(0, len(documents), _CHUNK):
        for ids in tokenizer.encode_batch(documents[start : start + _CHUNK]):
            parts += [np.asarray(ids, np.uint32), end]
    stream = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
    fits = tokenizer.vocab_size <= 2**16
    return stream.astype(np.uint16) if fits else stream


def document_separator(tokenizer: Tokenizer) -> tuple[int | None, str]:
    """Id and text of what stands between documents."""
    for token in ("<|endoftext|>", tokenizer.special["eos_token"]):
        index = tokenizer.token_id(token) if token else None
        if index is not None:
            return index, token
    return None, ""
