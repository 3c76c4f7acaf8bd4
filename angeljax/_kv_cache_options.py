"""What a recipe says about the KV cache: how keys and values are stored in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from angeljax._fields import build, choice, count, flag, known_fields, number

FORMATS = ("float8_e4m3", "int8", "int4", "none")
GRANULARITIES = ("tensor", "head", "token", "group")
SCALE_METHODS = ("amax", "percentile", "mse")
GROUP_SIZE = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVFormat:
    """How keys, or values, are stored.

    Attributes:
      format: "float8_e4m3", "int8", "int4" (two codes to a byte), or "none" for the
        dtype of the model.
      granularity: what shares a scale. "tensor" (all of a layer) and "head" (one key
        head of a layer) have static scales, which calibration finds; "token" (one head
        of one token) and "group" (`group_size` channels of that) are taken from each
        token as it is written, and stored beside the codes as bfloat16. Default:
        "group" for int4, else "token".
      group_size: adjacent channels of a head that share a scale; default 32, for the
        granularity "group" only.
      symmetric: codes are multiples of a scale, zero among them; False stores the least
        value of each token or group as well, in integer formats.

    Raises:
      ValueError: a value that cannot be, or values that do not go together.
    """

    format: str = "float8_e4m3"
    granularity: str | None = None
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        choice("kv_cache.format", self.format, FORMATS)
        flag("kv_cache.symmetric", self.symmetric)
        if self.format == "none":
            if (self.granularity, self.group_size, self.symmetric) != (
                None,
                None,
                True,
            ):
                raise ValueError(
                    "kv_cache.format none has no granularity, group_size or symmetric"
                )
            return
        if self.granularity is None:
            default = "group" if self.format == "int4" else "token"
            object.__setattr__(self, "granularity", default)
        choice("kv_cache.granularity", self.granularity, GRANULARITIES)
        if self.granularity != "group":
            if self.group_size is not None:
                raise ValueError(
                    "kv_cache.group_size goes with granularity: group, not "
                    f"{self.granularity}"
                )
        elif self.group_size is None:
            object.__setattr__(self, "group_size", GROUP_SIZE)
        else:
            count("kv_cache.group_size", self.group_size, 2)
        if not self.symmetric and (self.static or not self.format.startswith("int")):
            raise ValueError(
                "kv_cache.symmetric: false is for int8 and int4 with granularity token "
                f"or group, not for {self.format} with {self.granularity}"
            )

    @property
    def static(self) -> bool:
        """Whether the scales are known before anything is written."""
        return self.granularity in ("tensor", "head")

    def check(self, head_dim: int) -> None:
        """Refuses heads that the format cannot store.

        Raises:
          ValueError: one line with the sizes.
        """
        size = self.group_size
        if size is not None and head_dim % size:
            raise ValueError(
                f"kv_cache.group_size={size} does not divide head_dim={head_dim}"
            )
        if self.format == "int4" and head_dim % 2:
            raise ValueError(
                f"kv_cache.format int4 packs two channels to a byte: head_dim="
                f"{head_dim} is odd, use int8"
            )

    @classmethod
    def parse(cls, value: Any, where: str) -> KVFormat | None:
        """A mapping, the bare name of a format, an instance or None.

        Raises:
          ValueError: an unknown field or a value that cannot be.
        """
        if value is None or isinstance(value, cls):
            return value
        return build(cls, {"format": value} if isinstance(value, str) else value, where)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as plain values."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields.pop("symmetric")
        out = {k: v for k, v in fields.items() if v is not None}
        return out if self.symmetric else {**out, "symmetric": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCacheOptions:
    """How a decoder's cache is stored: the section `kv_cache` of a recipe.

    Attributes:
      format, granularity, group_size, symmetric: of keys and values; see `KVFormat`.
      keys, values: a format of their own, a `KVFormat`, a mapping of its fields or the
        bare name of a format; None takes the fields above.
      skip_layers: layers whose cache is left as it is; negative numbers count from the
        last. Not for layers in one stack (`scan_layers`), which share one array.
      scale_method: how static scales are found by calibration: "amax", the greatest
        magnitude; "percentile" of the magnitudes; "mse", the scale with the least
        squared error.
      percentile: of the method "percentile", from above 50 to 100.

    Raises:
      ValueError: a value that cannot be, or values that do not go together.

    Example:
      >>> from angeljax.recipe import KVCacheOptions
      >>> options = KVCacheOptions(format="int8", values={"format": "int4"})
      >>> options.of("k").granularity, options.of("v").group_size
      ('token', 32)
    """

    format: str = "float8_e4m3"
    granularity: str | None = None
    group_size: int | None = None
    symmetric: bool = True
    keys: KVFormat | None = None
    values: KVFormat | None = None
    skip_layers: Sequence[int] = ()
    scale_method: str = "amax"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        shared = self._shared()
        for name in ("granularity", "group_size"):
            object.__setattr__(self, name, getattr(shared, name))
        for name in ("keys", "values"):
            value = KVFormat.parse(getattr(self, name), f"kv_cache.{name}")
            object.__setattr__(self, name, value)
        if not isinstance(self.skip_layers, list | tuple) or not all(
            type(layer) is int for layer in self.skip_layers
        ):
            raise ValueError(
                f"kv_cache.skip_layers must be a list of numbers, not "
                f"{self.skip_layers!r}"
            )
        object.__setattr__(self, "skip_layers", tuple(self.skip_layers))
        choice("kv_cache.scale_method", self.scale_method, SCALE_METHODS)
        number("kv_cache.percentile", self.percentile, 50, 100)
        object.__setattr__(self, "percentile", float(self.percentile))
        if self.of("k").format == self.of("v").format == "none":
            raise ValueError(
                "kv_cache stores neither keys nor values in another format: leave the "
                "section out"
            )

    def _shared(self) -> KVFormat:
        return KVFormat(
            format=self.format,
            granularity=self.granularity,
            group_size=self.group_size,
            symmetric=self.symmetric,
        )

    def of(self, side: str) -> KVFormat:
        """The format of keys ("k") or values ("v")."""
        own = self.keys if side == "k" else self.values
        return self._shared() if own is None else own

    @property
    def static(self) -> tuple[str, ...]:
        """Which of "k" and "v" have static scales."""
        return tuple(side for side in ("k", "v") if self.of(side).static)

    def skips(self, num_layers: int) -> frozenset[int]:
        """Numbers from 0 of the layers that are left as they are.

        Raises:
          ValueError: one of them does not exist.
        """
        for layer in self.skip_layers:
            if not -num_layers <= layer < num_layers:
                raise ValueError(
                    f"kv_cache.skip_layers: layer {layer} is none of the model's "
                    f"{num_layers}, 0 first"
                )
        return frozenset(layer % num_layers for layer in self.skip_layers)

    @classmethod
    def parse(cls, value: Any) -> KVCacheOptions | None:
        """From the `kv_cache` section of a recipe: a mapping, an instance or None.

        Raises:
          ValueError: an unknown field or a value that cannot be.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            known_fields(value, [f.name for f in dataclasses.fields(cls)], "kv_cache")
        return build(cls, value, "kv_cache")

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain values."""
        out = self._shared().to_dict()
        for name in ("keys", "values"):
            if (own := getattr(self, name)) is not None:
                out[name] = own.to_dict()
        if self.skip_layers:
            out["skip_layers"] = list(self.skip_layers)
        if self.scale_method != "amax":
            out["scale_method"] = self.scale_method
        if self.percentile != 99.99:
            out["percentile"] = self.percentile
        return out
