"""GGUF files of llama.cpp, through the `gguf` package.

Tensors are dequantized one by one. llama.cpp stores the q and k matrices of Llama-type
models with the rows of each head interleaved, for its own order of rotary pairs; they
are put back here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from angeljax.models._assemble import Shardings, Tensor, assemble
from angeljax.models._names import gguf_path
from angeljax.models.config import DecoderConfig, ModelError
from angeljax.models.language_model import LanguageModel

_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


class GGUFFile:
    """An open GGUF file.

    Raises:
      ModelError: the file is missing, truncated, or not GGUF.
    """

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
            self.metadata = {k: f.contents() for k, f in self.reader.fields.items()}
            ends = [t.data_offset + t.n_bytes for t in self.reader.tensors]
        except FileNotFoundError:
            raise ModelError(f"{path} is missing") from None
        # The reader has no error of its own: bad bytes come out as what numpy says.
        except Exception as e:  # noqa: BLE001
            reason = (str(e).splitlines() or [type(e).__name__])[0]
            raise ModelError(
                f"{path}: unreadable or truncated GGUF file ({reason}): fetch it again"
            ) from None
        if not ends or max(ends) > path.stat().st_size:
            raise ModelError(f"{path}: truncated GGUF file: fetch it again")

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value, `{arch}` in the key standing for the architecture."""
        arch = self.metadata.get("general.architecture", "")
        return self.metadata.get(key.replace("{arch}", str(arch)), default)

    def config(self) -> DecoderConfig:
        """The configuration that the metadata describes.

        Raises:
          ModelError: the architecture is not supported or a field is missing.
        """
        arch = self.value("general.architecture")
        if arch not in _ARCHITECTURES:
            raise ModelError(
                f"{self.path}: architecture {arch!r} is not supported: use one of "
                f"{', '.join(_ARCHITECTURES)}"
            )
        if self.value("{arch}.expert_count"):
            raise ModelError(f"{self.path}: mixture of experts is not supported")
        try:
            return self._config(arch)
        except ModelError as e:
            prefix = "" if str(self.path) in str(e) else f"{self.path}: "
            raise ModelError(f"{prefix}{e}") from None
        # Metadata of the wrong type, such as one number of heads for each layer.
        except (TypeError, ValueError, ZeroDivisionError) as e:
            raise ModelError(f"{self.path}: metadata not supported: {e}") from None

    def _config(self, arch: str) -> DecoderConfig:
        names = {t.name for t in self.reader.tensors}
        embed = self._shape("token_embd.weight")
        eos = self.value("tokenizer.ggml.eos_token_id")
        heads = self._need("{arch}.attention.head_count")
        hidden = self._need("{arch}.embedding_length")
        head_dim = self.value("{arch}.attention.key_length", hidden // heads)
        rotated = self.value("{arch}.rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise ModelError(
                f"rope over {rotated} of {head_dim} dimensions is not supported"
            )
        return DecoderConfig(
            model_type=_ARCHITECTURES[arch],
            vocab_size=embed[0],
            hidden_size=hidden,
            intermediate_size=self._need("{arch}.feed_forward_length"),
            num_layers=self._need("{arch}.block_count"),
            num_heads=heads,
            num_kv_heads=self.value("{arch}.attention.head_count_kv", heads),
            head_dim=head_dim,
            max_positions=self.value("{arch}.context_length", 2048),
            # float32 metadata prints as 9.99999974e-06
            norm_eps=float(
                f"{self._need('{arch}.attention.layer_norm_rms_epsilon'):.6g}"
            ),
            rope_theta=float(self.value("{arch}.rope.freq_base", 10000.0)),
            rope_scaling=self._rope_scaling(),
            rope_factors=self._rope_factors(names),
            attention_bias="blk.0.attn_q.bias" in names,
            output_bias="blk.0.attn_output.bias" in names,
            qk_norm="blk.0.attn_q_norm.weight" in names,
            tied="output.weight" not in names,
            eos_ids=() if eos is None else (int(eos),),
            pad_id=self.value("tokenizer.ggml.padding_token_id"),
            bos_id=self.value("tokenizer.ggml.bos_token_id"),
        )

    def _need(self, key: str) -> Any:
        value = self.value(key)
        if value is None:
            key = key.replace("{arch}", str(self.value("general.architecture")))
            raise ModelError(f"{self.path}: has no metadata {key}")
        return value

    def _shape(self, name: str) -> tuple[int, ...]:
        for t in self.reader.tensors:
            if t.name == name:
                return tuple(int(n) for n in reversed(t.shape))
        raise ModelError(f"{self.path}: has no tensor {name}")

    def _rope_scaling(self) -> tuple[tuple[str, Any], ...]:
        kind = self.value("{arch}.rope.scaling.type", "none")
        if kind == "none":
            return ()
        scaling = {
            "rope_type": kind,
            "factor": float(self._need("{arch}.rope.scaling.factor")),
        }
        if kind == "yarn":
            scaling["original_max_position_embeddings"] = self._need(
                "{arch}.rope.scaling.original_context_length"
            )
        return tuple(sorted(scaling.items()))

    def _rope_factors(self, names: set[str]) -> tuple[float, ...]:
        if "rope_freqs.weight" not in names:
            return ()
        tensor = next(t for t in self.reader.tensors if t.name == "rope_freqs.weight")
        return tuple(float(x) for x in tensor.data)

    def tensors(self, config: DecoderConfig) -> Iterator[Tensor]:
        """Every tensor that the decoder has a place for, read when asked for."""
        for tensor in self.reader.tensors:
            path = gguf_path(tensor.name)
            if path is not None:
                read = functools.partial(self._read, tensor, path, config)
                yield path, tensor.name, read

    def _read(self, tensor: Any, path: tuple[Any, ...], config: DecoderConfig) -> Any:
        import gguf

        try:
            value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise ModelError(
                f"{self.path}: {tensor.name} has the type {tensor.tensor_type.name}, "
                "which the gguf package cannot dequantize: use a Q8_0 or F16 file"
            ) from None
        value = np.asarray(value, np.float32).reshape(self._shape(tensor.name))
        interleaved = config.model_type == "llama" and path[-2] in ("q_proj", "k_proj")
        if not interleaved:
            return value
        heads = config.num_heads if path[-2] == "q_proj" else config.num_kv_heads
        split = value.reshape(heads, config.head_dim // 2, 2, *value.shape[1:])
        return split.swapaxes(1, 2).reshape(value.shape)


def read_params(
    file: GGUFFile,
    model: LanguageModel,
    *,
    dtype: Any,
    shardings: Shardings | None = None,
) -> dict[str, Any]:
    """The param tree of `model` from a GGUF file.

    Raises:
      ModelError: a tensor is missing or does not fit.
    """
    tensors = file.tensors(model.config)
    return assemble(model, tensors, dtype=dtype, shardings=shardings, file=file.path)
