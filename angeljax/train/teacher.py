"""A teacher's predictions on disk: run once, distilled from often.

Of each token the likeliest entries are kept, with their log-probabilities, what is left
for all others, and the log-probability of the true token: 4 bytes for each entry and 8
more, where all logits would take 2 bytes times the vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from angeljax import _shards
from angeljax.evaluation._progress import progress_bar
from angeljax.models.language_model import LanguageModel
from angeljax.train._likeliest import likeliest
from angeljax.train._token_losses import TopK
from angeljax.train.losses import check_vocabularies

__all__ = ["TeacherRows", "read_teacher", "write_teacher"]


def write_teacher(
    path: str | Path,
    model: LanguageModel,
    params: Any,
    ids: np.ndarray,
    *,
    length: int,
    top_k: int = 64,
    batch_size: int = 8,
    shard_rows: int = 512,
    progress: bool | None = None,
) -> Path:
    """Runs the teacher over a token stream and writes its likeliest entries.

    The stream is cut into rows of `length` inputs and their next tokens, as
    `angeljax.train.PackedTokens` does. An interrupted run goes on with the first shard
    that is missing.

    Args:
      path: a folder, new or begun by the same call.
      model: the teacher.
      params: its params, compressed or not.
      ids: token ids `[tokens]`.
      length: inputs of a row.
      top_k: entries kept for each token.
      batch_size: rows at once.
      shard_rows: rows of a shard.
      progress: show a progress bar on stderr; default: if it is a terminal.

    Returns:
      The folder.

    Raises:
      ValueError: an option is out of range, the stream fills no row or has ids outside
        the vocabulary, or the folder was begun with another teacher, stream or options.

    Example:
      >>> import jax, numpy as np, tempfile
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.train.teacher import read_teacher, write_teacher
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=1,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... ))
      >>> params, ids = model.init(jax.random.key(0)), np.arange(25) % 32
      >>> folder = write_teacher(
      ...     tempfile.mkdtemp(), model, params, ids, length=8, top_k=4
      ... )
      >>> read_teacher(folder, ids=ids, vocab_size=32).rows(np.array([2, 0])).ids.shape
      (2, 8, 4)
    """
    path, vocabulary = Path(path), model.config.vocab_size
    for name, value, most in (
        ("length", length, None),
        ("top_k", top_k, vocabulary),
        ("batch_size", batch_size, None),
        ("shard_rows", shard_rows, None),
    ):
        if value < 1 or (most is not None and value > most):
            limit = "" if most is None else f" and at most {most}"
            raise ValueError(f"{name} must be at least 1{limit}, not {value}")
    rows = (len(ids) - 1) // length
    if rows < 1:
        raise ValueError(f"{len(ids)} tokens do not fill a row of {length} + 1")
    if int(ids.max()) >= vocabulary:
        raise ValueError(
            f"token {int(ids.max())} is outside the teacher's vocabulary of "
            f"{vocabulary}: the ids come from another tokenizer"
        )
    manifest = {
        "kind": _shards.TEACHER,
        "version": 1,
        "model": _shards.fingerprint(params),
        "data": _shards.fingerprint_ids(ids),
        "vocab_size": vocabulary,
        "length": length,
        "rows": rows,
        "top_k": top_k,
        "shard_rows": shard_rows,
    }
    _shards.start(path, manifest)
    shards = -(-rows // shard_rows)
    with progress_bar("teacher", shards, progress) as advance:
        for shard in range(shards):
            if not _folder(path, shard).is_dir():
                some = range(shard * shard_rows, min((shard + 1) * shard_rows, rows))
                arrays = likeliest(model, params, ids, length, top_k, some, batch_size)
                _shards.commit(
                    _folder(path, shard), functools.partial(_save, arrays=arrays)
                )
            advance(None)
    return path


@dataclasses.dataclass(frozen=True)
class TeacherRows:
    """Predictions that `write_teacher` wrote, mapped from disk.

    Attributes:
      path: the folder.
      length: inputs of a row.
      top_k: entries kept for each token.
      model: fingerprint of the teacher's params.
      count: rows there are.
      shard_rows: rows of a shard.
      shards: arrays of each shard by name.
    """

    path: Path
    length: int
    top_k: int
    model: str
    count: int
    shard_rows: int
    shards: tuple[dict[str, np.ndarray], ...]

    def rows(self, numbers: np.ndarray) -> TopK:
        """The teacher of a batch, for `Objective` or `chunked_loss`.

        Args:
          numbers: int `[B]`, which rows of the stream, as `PackedTokens.picked` gives
            them; row i starts at token `i * length`.

        Returns:
          A `TopK` of numpy arrays `[B, length, K]` and `[B, length]`.

        Raises:
          ValueError: a row that does not exist.
        """
        numbers = np.asarray(numbers)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < self.count:
            raise ValueError(f"{self.path} has rows 0 to {self.count - 1}: {numbers}")
        places = [divmod(int(n), self.shard_rows) for n in numbers]
        picked = {
            name: np.stack([self.shards[shard][name][row] for shard, row in places])
            for name in self.shards[0]
        }
        return TopK(**picked)  # type: ignore[arg-type]


def read_teacher(
    path: str | Path,
    *,
    ids: np.ndarray | None = None,
    length: int | None = None,
    vocab_size: int | None = None,
) -> TeacherRows:
    """Opens what `write_teacher` wrote.

    Args:
      path: the folder.
      ids: the token stream that will be trained on, to make sure it is the same.
      length: inputs of a row, likewise.
      vocab_size: of the student, likewise.

    Returns:
      The rows, on disk until they are asked for.

    Raises:
      ValueError: the folder is not complete, is damaged, or belongs to another stream,
        length or vocabulary.
    """
    path = Path(path)
    m = _shards.read_manifest(path, _shards.TEACHER)
    if vocab_size is not None:
        check_vocabularies(vocab_size, m["vocab_size"])
    if length is not None and length != m["length"]:
        raise ValueError(f"{path} has rows of {m['length']} tokens, not of {length}")
    if ids is not None and _shards.fingerprint_ids(ids) != m["data"]:
        raise ValueError(f"{path} was written for another token stream")
    shards = []
    for shard in range(-(-m["rows"] // m["shard_rows"])):
        folder = _folder(path, shard)
        if not folder.is_dir():
            raise ValueError(
                f"{path} is not complete, shard {shard} is missing: run write_teacher "
                "again, it goes on from there"
            )
        count = min(m["shard_rows"], m["rows"] - shard * m["shard_rows"])
        lead = (count, m["length"])
        dtypes = {
            "ids": (_shards.id_dtype(m["vocab_size"]), (*lead, m["top_k"])),
            "log_probs": (np.float16, (*lead, m["top_k"])),
            "tail": (np.float32, lead),
            "gold": (np.float32, lead),
        }
        shards.append(
            {
                name: _shards.load_array(folder / f"{name}.npy", dtype, shape)
                for name, (dtype, shape) in dtypes.items()
            }
        )
    return TeacherRows(
        path=path,
        length=m["length"],
        top_k=m["top_k"],
        model=m["model"],
        count=m["rows"],
        shard_rows=m["shard_rows"],
        shards=tuple(shards),
    )


def _folder(path: Path, shard: int) -> Path:
    return path / f"shard-{shard:05d}"


def _save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
