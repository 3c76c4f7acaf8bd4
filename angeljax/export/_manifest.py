"""`manifest.json`: everything about a checkpoint but the arrays.

The file is read as data only: nothing in it is imported, evaluated or unpickled, and
no name in it may lead out of the checkpoint. `manifest.sha256` beside it (in the form
of `sha256sum`) tells damage; it does not tell who wrote the checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from angeljax.export import _tree
from angeljax.export._entries import Entry
from angeljax.export._errors import CheckpointError, one_line

FORMAT_VERSION = 1
FORMAT_NAME = "angeljax"
FILE, DIGEST_FILE = "manifest.json", "manifest.sha256"
ARRAYS, TOKENIZER = "arrays", "tokenizer"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint says about itself.

    Attributes:
      path: the checkpoint.
      versions: angeljax, jax and orbax that wrote it.
      created: UTC time of writing, ISO 8601.
      recipe: plain values of the recipe, or None.
      model_config: the model's configuration, or None.
      source: where the weights came from, as given.
      extra: whatever else the writer put in.
      tokenizer_files: file name -> SHA-256, relative to `tokenizer_dir`.
      array_files: file name -> size, relative to `arrays_dir`.
      structure: the param tree (see `_tree`).
      leaves: path -> what is stored for it.
    """

    path: Path
    versions: Mapping[str, str]
    created: str
    recipe: Mapping[str, Any] | None
    model_config: Mapping[str, Any] | None
    source: Any
    extra: Any
    tokenizer_files: Mapping[str, str]
    array_files: Mapping[str, int]
    structure: Any
    leaves: Mapping[str, Entry]

    @property
    def tokenizer_dir(self) -> Path | None:
        """Folder of the tokenizer's files, None if the checkpoint has none."""
        return self.path / TOKENIZER if self.tokenizer_files else None

    @property
    def arrays_dir(self) -> Path:
        """The Orbax checkpoint of the plain arrays."""
        return self.path / ARRAYS


_FIELDS = {f.name for f in dataclasses.fields(Manifest)} - {"path"}


def write(manifest: Manifest) -> None:
    """Writes the manifest and its digest into `manifest.path`."""
    fields = {name: getattr(manifest, name) for name in sorted(_FIELDS)}
    fields["leaves"] = {p: entry.to_dict() for p, entry in manifest.leaves.items()}
    head = {"format": FORMAT_NAME, "format_version": FORMAT_VERSION}
    data = json.dumps({**head, **fields}, indent=1, allow_nan=False).encode()
    (manifest.path / FILE).write_bytes(data)
    line = f"{hashlib.sha256(data).hexdigest()}  {FILE}\n"
    (manifest.path / DIGEST_FILE).write_text(line, encoding="ascii")


def read(path: Path) -> Manifest:
    """Reads and checks the manifest of a checkpoint.

    Raises:
      CheckpointError: missing, damaged, from a newer version, or malformed.
    """
    file = path / FILE
    if not file.is_file():
        raise CheckpointError(
            f"{path}: not an angeljax checkpoint ({FILE} is missing): pass a directory "
            "that angeljax.save wrote"
        )
    data = file.read_bytes()
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{file}: truncated or not JSON, copy the checkpoint again ({one_line(e)})"
        ) from e
    if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT_NAME:
        raise CheckpointError(f"{file}: not the manifest of an angeljax checkpoint")
    # Before the digest: a newer version may have another way to protect itself.
    version = fields.pop("format_version", None)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format version {version!r}, this angeljax reads up to "
            f"{FORMAT_VERSION}: upgrade angeljax"
        )
    _check_digest(path, data)
    try:
        return _parse(path, fields)
    except (CheckpointError, RecursionError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{file}: {one_line(e)}") from e


def _check_digest(path: Path, data: bytes) -> None:
    file = path / DIGEST_FILE
    try:
        want = file.read_text(encoding="ascii").split()[0]
    except (OSError, ValueError, IndexError) as e:
        raise CheckpointError(
            f"{file}: missing or unreadable, copy the checkpoint again"
        ) from e
    if hashlib.sha256(data).hexdigest() != want:
        raise CheckpointError(
            f"{path / FILE}: does not match {DIGEST_FILE}, it was changed after "
            "saving: copy the checkpoint again"
        )


def _parse(path: Path, fields: dict[str, Any]) -> Manifest:
    if set(fields) != _FIELDS:
        odd = sorted(set(fields) ^ _FIELDS)
        raise CheckpointError(f"missing or unknown fields: {', '.join(odd)}")
    for name in ("recipe", "model_config", "tokenizer_files", "array_files"):
        optional = name in ("recipe", "model_config")
        if not isinstance(fields[name], dict | None if optional else dict):
            raise CheckpointError(f"{name} must be a mapping")
    leaves = {p: Entry.from_dict(p, e) for p, e in fields["leaves"].items()}
    named = [leaf for _, leaf in _tree.walk(fields["structure"])]
    if sorted(named) != sorted(leaves):
        odd = sorted(set(named) ^ set(leaves)) or sorted(named)
        raise CheckpointError(f"tree and leaves disagree on {', '.join(odd[:3])}")
    manifest = Manifest(path=path, **{**fields, "leaves": leaves})
    for name, want in manifest.tokenizer_files.items():
        file = path / TOKENIZER / check_name(name)
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"tokenizer file {name!r} is missing")
        if hashlib.sha256(file.read_bytes()).hexdigest() != want:
            raise CheckpointError(
                f"tokenizer file {name!r} was changed after saving: copy it again"
            )
    return manifest


def check_name(name: Any) -> str:
    """Returns the name of a tokenizer file if it stays inside its folder.

    Raises:
      CheckpointError: an absolute path, a parent directory, or a name that another
        operating system would read as one.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if (
        not parts
        or name != "/".join(parts)
        or any(part in (".", "..", os.sep) for part in parts)
        or any(c in name for c in "\\:\0")
    ):
        raise CheckpointError(
            f"tokenizer file name {name!r}: use a relative path such as "
            "'tokenizer.json'"
        )
    return name


def plain(value: Any, what: str) -> Any:
    """A copy of `value` in JSON types, or an error that says where it is not.

    Raises:
      CheckpointError: a key that is no string, or a value that JSON does not have.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if value - value != 0:
            raise CheckpointError(f"{what} is {value}, which JSON does not have")
        return float(value)
    if isinstance(value, list | tuple):
        return [plain(v, f"{what}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{what} has key {key!r}: keys must be strings")
        return {k: plain(v, f"{what}[{k!r}]") for k, v in value.items()}
    raise CheckpointError(
        f"{what} is a {type(value).__name__}: use dict, list, str, int, float, bool"
    )
