"""What a recipe says about attention: the selector of a prefill, and its exceptions."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from angeljax._fields import build, count, flag, known_fields, number


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """Layers with a selector of their own.

    Attributes:
      layers: their numbers from 0; negative ones count from the last layer.
      selector: its name; see `angeljax.attention.selector_names`.
      options: its fields.
    """

    layers: Sequence[int]
    selector: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if isinstance(self.layers, int) and not isinstance(self.layers, bool):
            object.__setattr__(self, "layers", (self.layers,))
        if not isinstance(self.layers, list | tuple) or not self.layers:
            raise ValueError(
                f"attention.layers: layers must be a list of numbers, not "
                f"{self.layers!r}"
            )
        for layer in self.layers:
            if type(layer) is not int:
                raise ValueError(f"attention.layers: {layer!r} is no number of a layer")
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "options", _plain(self.options, "attention.layers"))

    @classmethod
    def parse(cls, value: Any) -> LayerAttention:
        """From an entry of `attention.layers`: a mapping or an instance.

        Raises:
          ValueError: an unknown or missing field, or a value that cannot be.
        """
        return (
            value if isinstance(value, cls) else _build(cls, value, "attention.layers")
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """How a model reads its prompts: the section `attention` of a recipe.

    Attributes:
      selector: name of the selector that chooses key blocks; see
        `angeljax.attention.selector_names`.
      options: its fields. A selector among them is a mapping with its `name`.
      layers: layers with another selector; later entries win.
      dense_below: prompts of fewer tokens are dense; default by device.
      dense_above: layers are dense where the selector predicts a higher density;
        default by device.
      mean_correction: blocks that were not selected count as their means.
      kv_dtype: "float8_e4m3fn" to round queries, keys and values to 8 bits where
        attention is sparse; None for no rounding.
      decode: how single tokens read the cache: None for all of it, or a mapping with
        `name: quest` and the fields of `angeljax.attention.Quest`.

    Raises:
      ValueError: an unknown selector, option or field, or a value that cannot be.

    Example:
      >>> from angeljax.recipe import AttentionOptions
      >>> options = AttentionOptions(selector="a_shape", dense_below=2048)
      >>> options.attention_fn().selector.sink_tokens
      128
    """

    selector: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    layers: Sequence[LayerAttention] = ()
    dense_below: int | None = None
    dense_above: float | None = None
    mean_correction: bool = False
    kv_dtype: str | None = None
    decode: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", _plain(self.options, "attention"))
        if not isinstance(self.layers, list | tuple):
            raise ValueError(f"attention.layers must be a list, not {self.layers!r}")
        layers = tuple(map(LayerAttention.parse, self.layers))
        object.__setattr__(self, "layers", layers)
        if self.dense_below is not None:
            count("attention.dense_below", self.dense_below, 0)
        if self.dense_above is not None:
            number("attention.dense_above", self.dense_above, 0, 1)
            object.__setattr__(self, "dense_above", float(self.dense_above))
        flag("attention.mean_correction", self.mean_correction)
        if self.kv_dtype not in (None, "float8_e4m3fn"):
            raise ValueError(
                f"attention.kv_dtype must be float8_e4m3fn or left out, not "
                f"{self.kv_dtype!r}"
            )
        if self.decode is not None:
            object.__setattr__(self, "decode", _plain(self.decode, "attention.decode"))
        self.attention_fn()

    def attention_fn(self) -> Any:
        """The `angeljax.attention.SparseAttention` that this describes."""
        # The recipe is read where no kernel is wanted.
        from angeljax.attention import SparseAttention, selector

        def make(name: Any, options: Mapping[str, Any]) -> Any:
            if not isinstance(name, str):
                raise ValueError(f"attention.selector must be a name, not {name!r}")
            try:
                return selector(name, **options)
            except (TypeError, ValueError) as e:
                raise ValueError(f"attention: {e}") from None

        return SparseAttention(
            selector=make(self.selector, self.options),
            layers=tuple(
                (layer, chosen)
                for entry in self.layers
                for chosen in (make(entry.selector, entry.options),)
                for layer in entry.layers
            ),
            dense_below=self.dense_below,
            dense_above=self.dense_above,
            mean_correction=self.mean_correction,
            kv_dtype=self.kv_dtype,
            decode=self._decode(),
        )

    def _decode(self) -> Any:
        from angeljax.attention import Quest

        if self.decode is None:
            return None
        fields = dict(self.decode)
        if (name := fields.pop("name", None)) != "quest":
            raise ValueError(
                f"attention.decode needs a name, and {name!r} is unknown: use quest"
            )
        return build(Quest, fields, "attention.decode")

    @classmethod
    def parse(cls, value: Any) -> AttentionOptions | None:
        """From the `attention` section of a recipe: a mapping, an instance or None.

        Raises:
          ValueError: an unknown field or a value that cannot be.
        """
        if value is None or isinstance(value, cls):
            return value
        return _build(cls, value, "attention")

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain values."""
        out: dict[str, Any] = {"selector": self.selector}
        if self.options:
            out["options"] = copy.deepcopy(dict(self.options))
        if self.layers:
            out["layers"] = [
                {
                    "layers": list(entry.layers),
                    "selector": entry.selector,
                    **({"options": dict(entry.options)} if entry.options else {}),
                }
                for entry in self.layers
            ]
        for name in ("dense_below", "dense_above", "kv_dtype", "decode"):
            if (value := getattr(self, name)) is not None:
                out[name] = copy.deepcopy(value)
        if self.mean_correction:
            out["mean_correction"] = True
        return out


def _build[T](cls: type[T], value: Any, where: str) -> T:
    """A dataclass from a mapping; says which field is missing."""
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        known_fields(value, [f.name for f in fields], where)
        for f in fields:
            optional = (f.default, f.default_factory) != (dataclasses.MISSING,) * 2
            if f.name not in value and not optional:
                raise ValueError(f"{where} needs a field {f.name!r}")
    return build(cls, value, where)


def _plain(options: Any, what: str) -> dict[str, Any]:
    """A copy in which tuples are lists, as YAML has it."""
    if not isinstance(options, Mapping):
        raise ValueError(f"{what}: options must be a mapping, not {options!r}")

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        return list(map(plain, value)) if isinstance(value, list | tuple) else value

    return plain(options)
