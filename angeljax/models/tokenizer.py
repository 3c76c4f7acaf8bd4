"""Text to ids and back, through the `tokenizers` library; no torch, no transformers.

A tokenizer is two files, which travel with a checkpoint: `tokenizer.json` and
`tokenizer_config.json` (special tokens and the chat template). For GGUF files both are
built from the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from angeljax.models.config import ModelError

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# How llama.cpp's names for pre-tokenizers split text before the merges. A pattern is
# followed by plain byte-level; "digits" isolates each digit first.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = {
    "smollm": "digits",
    "gpt-2": "plain",
    "default": "plain",
    "llama-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}


class Tokenizer:
    """A `tokenizers.Tokenizer` with special tokens and a chat template.

    Args:
      files: contents of `tokenizer.json`, and if there are such files of
        `tokenizer_config.json` and `chat_template.jinja`.

    Raises:
      ModelError: `tokenizer.json` is missing or cannot be read.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        import tokenizers

        if "tokenizer.json" not in files:
            raise ModelError("there is no tokenizer.json")
        self.files = dict(files)
        try:
            text = files["tokenizer.json"].decode("utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
            config = json.loads(files.get("tokenizer_config.json", b"{}"))
            template = config.get("chat_template")
            if "chat_template.jinja" in files:
                template = files["chat_template.jinja"].decode("utf-8")
        # `tokenizers` raises bare Exception for a file that it cannot read.
        except Exception as e:  # noqa: BLE001
            raise ModelError(
                f"tokenizer.json or a file beside it cannot be read: {_one_line(e)}"
            ) from None
        if isinstance(template, list):  # named templates
            template = next(
                (t["template"] for t in template if t.get("name") == "default"), None
            )
        self.chat_template: str | None = template
        self.special = {
            name: _content(config.get(name))
            for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        }

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Reads the files of a folder.

        Raises:
          ModelError: there is no readable tokenizer.json.
        """
        files = {n: (folder / n).read_bytes() for n in FILES if (folder / n).is_file()}
        try:
            return cls(files)
        except ModelError as e:
            raise ModelError(f"{folder}: {e}") from None

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text; `special` adds what the tokenizer puts around one (BOS)."""
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, without special tokens around them, on all cores."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [x.ids for x in found]

    @property
    def vocabulary(self) -> dict[str, int]:
        """Id of every token, added ones included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ids."""
        return self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special
        )

    def token_id(self, token: str) -> int | None:
        """Id of one token, None if it is not in the vocabulary."""
        return self._tokenizer.token_to_id(token)

    def chat(self, messages: Sequence[Mapping[str, str]] | str) -> str:
        """The prompt for an answer to a conversation.

        The template comes with the model and is rendered in a sandbox.

        Args:
          messages: `[{"role": "user", "content": ...}, ...]`, or one user turn.

        Raises:
          ModelError: the model has no chat template, or it refuses the messages.
        """
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not self.chat_template:
            raise ModelError("the tokenizer has no chat template: use a plain prompt")
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]

        def refuse(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True
        )
        environment.globals["raise_exception"] = refuse
        environment.filters["tojson"] = lambda x, **kw: json.dumps(
            x, ensure_ascii=False, **kw
        )
        try:
            return environment.from_string(self.chat_template).render(
                messages=messages, add_generation_prompt=True, **self.special
            )
        # A template is a program of other people: it can fail in any way.
        except Exception as e:  # noqa: BLE001
            raise ModelError(f"chat template: {_one_line(e)}") from None


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split()) or type(e).__name__


def _content(token: Any) -> str:
    if isinstance(token, Mapping):
        token = token.get("content")
    return token or ""


def files_from_gguf(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """`tokenizer.json` and its configuration from the metadata of a GGUF file.

    Raises:
      ModelError: the tokenizer is of a kind that the metadata does not describe fully.
    """
    kind, pre = (
        metadata.get("tokenizer.ggml.model"),
        metadata.get("tokenizer.ggml.pre", "default"),
    )
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"a GGUF tokenizer of the kind {kind}/{pre} cannot be rebuilt from its "
            "metadata: put the model's tokenizer.json beside the file"
        )
    try:
        return _rebuild(metadata, pre)
    except (KeyError, IndexError) as e:
        raise ModelError(
            f"the tokenizer in the GGUF metadata is incomplete ({_one_line(e)}): put "
            "the model's tokenizer.json beside the file"
        ) from None


def _rebuild(metadata: Mapping[str, Any], pre: str) -> dict[str, bytes]:
    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    added = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[i] == 3,  # 3 control, 4 user-defined
        }
        for i in range(len(tokens))
        if kinds[i] in (3, 4)
    ]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": pre == "llama-bpe",
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [m.split(" ", 1) for m in metadata["tokenizer.ggml.merges"]],
    }
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": _pre_tokenizer(_PRE_TOKENIZERS[pre]),
        "post_processor": _starts_with(metadata, tokens, pre),
        "decoder": _byte_level(use_regex=True),
        "model": model,
    }

    def special(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    config = {
        "bos_token": special("bos"),
        "eos_token": special("eos"),
        "pad_token": special("padding"),
        "unk_token": special("unknown"),
        "chat_template": metadata.get("tokenizer.chat_template"),
    }
    return {
        "tokenizer.json": json.dumps(document, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False).encode(),
    }


def _starts_with(
    metadata: Mapping[str, Any], tokens: Sequence[str], pre: str
) -> dict[str, Any] | None:
    """Puts BOS first, if the file says so; for Llama 3 llama.cpp does unless told."""
    index = metadata.get("tokenizer.ggml.bos_token_id")
    if index is None or not metadata.get(
        "tokenizer.ggml.add_bos_token", pre == "llama-bpe"
    ):
        return None
    bos = tokens[index]
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = ({"Sequence": {"id": x, "type_id": i}} for i, x in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [start, a],
        "pair": [start, a, b],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }


def _byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _pre_tokenizer(rule: str) -> dict[str, Any]:
    if rule == "plain":
        return _byte_level(use_regex=True)
    if rule == "digits":
        first = {"type": "Digits", "individual_digits": True}
        return _sequence(first, _byte_level(use_regex=True))
    split = {
        "type": "Split",
        "pattern": {"Regex": rule},
        "behavior": "Isolated",
        "invert": False,
    }
    return _sequence(split, _byte_level(use_regex=False))


def _sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}
