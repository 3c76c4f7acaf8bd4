"""What a recipe says about speculative decoding: who drafts, how much, how exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from angeljax._fields import build, choice, count, flag, known_fields, number

# method: fields of the section that it takes beside those that all take.
METHODS: dict[str, tuple[str, ...]] = {
    "none": (),
    "prompt_lookup": ("num_tokens", "max_ngram", "min_ngram"),
    "recycling": ("nodes", "from_prompt", "successors"),
    "hybrid": (
        *("num_tokens", "max_ngram", "min_ngram"),
        *("nodes", "from_prompt", "successors"),
        *("path", "options", "flat_ngram"),
    ),
    "self_quant": ("num_tokens", "rules", "recipe", "layers", "skip_layers"),
    "layer_skip": ("num_tokens", "layers", "skip_layers"),
    "draft_model": ("num_tokens", "model"),
    "eagle3": ("num_tokens", "path", "options"),
    "mtp": ("num_tokens", "path", "options"),
    "dflash": ("num_tokens", "path", "options"),
}
LEARNED = ("eagle3", "mtp", "dflash")
EXACT = ("fast", "same_width")
_COMMON = ("method", "sampling", "exact", "auto")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftSampling:
    """How tokens are chosen; see `angeljax.speculative.Sampling`.

    Attributes:
      temperature, top_k, top_p, rule, seed: as there; default greedy.

    Raises:
      ValueError: an option is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    rule: str = "coupled"
    seed: int = 0

    def __post_init__(self) -> None:
        number("draft.sampling.temperature", self.temperature, 0)
        if self.top_k is not None:
            count("draft.sampling.top_k", self.top_k)
        if self.top_p is not None:
            number("draft.sampling.top_p", self.top_p, 0, 1)
            if self.top_p == 0:
                raise ValueError("draft.sampling.top_p must be above 0")
        choice("draft.sampling.rule", self.rule, ("coupled", "rejection"))
        count("draft.sampling.seed", self.seed, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftAuto:
    """When and how much is drafted, by what it costs and how often drafts are right.

    Attributes:
      probe_rounds: rounds that are watched before the choice.
      off_below: expected speed-ups up to this are not worth it.
      widths: tokens read at once for which the target is timed; default by the drafter.

    Raises:
      ValueError: a value that cannot be.
    """

    probe_rounds: int = 16
    off_below: float = 1.0
    widths: Sequence[int] = ()

    def __post_init__(self) -> None:
        count("draft.auto.probe_rounds", self.probe_rounds)
        number("draft.auto.off_below", self.off_below, 0)
        if not isinstance(self.widths, list | tuple):
            raise ValueError(f"draft.auto.widths must be a list, not {self.widths!r}")
        for width in self.widths:
            count("draft.auto.widths", width)
        object.__setattr__(self, "widths", tuple(self.widths))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """How a model decodes speculatively: the section `draft` of a recipe.

    Attributes:
      method: "none", "prompt_lookup", "recycling", "hybrid", "self_quant" (a compressed
        copy drafts), "layer_skip" (some layers draft), "draft_model", or a learned
        drafter: "eagle3", "mtp", "dflash".
      num_tokens: drafts of one round; default that of the drafter.
      max_ngram, min_ngram: of prompt lookup.
      nodes: of the tree of token recycling.
      from_prompt: fill the table of token recycling from the prompt.
      successors: begin with the model's likeliest tokens after each token alone.
      rules: how self_quant compresses the copy: rules as those of a recipe.
      recipe: instead of `rules`, the name or path of a recipe.
      layers, skip_layers: numbers of the layers that draft, or of those that do not;
        negative numbers count from the last.
      model: of draft_model, as the command line takes one.
      path: where a learned drafter lies; for hybrid an EAGLE-3 head, which then has
        the tree instead of token recycling.
      options: other fields of a learned drafter: for a head those of an `EagleTree`,
        and for eagle3 `exit`, those of an `ExitRule`, which is not lossless.
      flat_ngram: of a hybrid with a head, see `Hybrid`.
      sampling: `DraftSampling`, or a mapping of its fields.
      exact: "fast", or "same_width" to read as many tokens in every round.
      auto: `DraftAuto`, a mapping of its fields, true for its defaults, or false.

    Raises:
      ValueError: a value that cannot be, or one that the method does not take.

    Example:
      >>> from angeljax.recipe import DraftOptions
      >>> DraftOptions(method="prompt_lookup", num_tokens=4).to_dict()
      {'method': 'prompt_lookup', 'num_tokens': 4}
    """

    method: str
    num_tokens: int | None = None
    max_ngram: int | None = None
    min_ngram: int | None = None
    nodes: int | None = None
    from_prompt: bool | None = None
    successors: bool | None = None
    rules: Sequence[Any] | None = None
    recipe: str | None = None
    layers: Sequence[int] | None = None
    skip_layers: Sequence[int] | None = None
    model: str | None = None
    path: str | None = None
    options: Mapping[str, Any] | None = dataclasses.field(default=None, hash=False)
    flat_ngram: int | None = None
    sampling: DraftSampling = DraftSampling()
    exact: str = "fast"
    auto: DraftAuto | None = None

    def __post_init__(self) -> None:
        choice("draft.method", self.method, tuple(METHODS))
        self._check_fields()
        for name, least in (("num_tokens", 1), ("nodes", 2)):
            if (value := getattr(self, name)) is not None:
                count(f"draft.{name}", value, least)
        for name in ("max_ngram", "min_ngram", "flat_ngram"):
            if (value := getattr(self, name)) is not None:
                count(f"draft.{name}", value)
        for name in ("from_prompt", "successors"):
            if (value := getattr(self, name)) is not None:
                flag(f"draft.{name}", value)
        for name in ("recipe", "model", "path"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"draft.{name} must be a name or a path: {value!r}")
        if self.options is not None and not isinstance(self.options, Mapping):
            raise ValueError(f"draft.options must be a mapping, not {self.options!r}")
        self._check_layers()
        self._check_copy()
        if self.method == "draft_model" and self.model is None:
            raise ValueError("draft.method draft_model needs `model`")
        if self.method in LEARNED and self.path is None:
            raise ValueError(
                f"draft.method {self.method} needs `path`, where the drafter lies"
            )
        if self.method == "hybrid":
            self._check_hybrid()
        object.__setattr__(self, "sampling", _nested(DraftSampling, self, "sampling"))
        auto = self.auto
        if isinstance(auto, bool):
            object.__setattr__(self, "auto", DraftAuto() if auto else None)
        elif auto is not None:
            object.__setattr__(self, "auto", _nested(DraftAuto, self, "auto"))
        choice("draft.exact", self.exact, EXACT)
        if self.auto is not None and self.exact != "fast":
            raise ValueError("draft.auto changes the width of rounds: use exact: fast")

    def _check_fields(self) -> None:
        taken = (*_COMMON, *METHODS[self.method])
        for field in dataclasses.fields(self):
            if field.name in taken or getattr(self, field.name) is None:
                continue
            users = [m for m, names in METHODS.items() if field.name in names]
            raise ValueError(
                f"draft.{field.name} is for {', '.join(users)}, not {self.method}"
            )

    def _check_hybrid(self) -> None:
        head = self.path is not None
        own = ("nodes", "from_prompt", "successors")
        for name in own if head else ("options", "flat_ngram"):
            if getattr(self, name) is None:
                continue
            if head:
                raise ValueError(
                    f"draft.{name} is for a hybrid of token recycling, and draft.path "
                    "names a head: draft.options describes its tree"
                )
            raise ValueError(
                f"draft.{name} is for a hybrid with a head: name its folder as "
                "draft.path"
            )

    def _check_layers(self) -> None:
        for name in ("layers", "skip_layers"):
            value = getattr(self, name)
            if value is None:
                continue
            if (
                not isinstance(value, list | tuple)
                or not value
                or not all(type(layer) is int for layer in value)
            ):
                raise ValueError(f"draft.{name} must be a list of numbers: {value!r}")
            object.__setattr__(self, name, tuple(value))
        if self.layers is not None and self.skip_layers is not None:
            raise ValueError("draft.layers and draft.skip_layers: give one of them")
        some = self.layers is not None or self.skip_layers is not None
        if self.method == "layer_skip" and not some:
            raise ValueError("draft.method layer_skip needs `layers` or `skip_layers`")

    def _check_copy(self) -> None:
        from angeljax.recipe import Rule

        if self.rules is not None:
            if not isinstance(self.rules, list | tuple) or not self.rules:
                raise ValueError("draft.rules must be a list of rules")
            rules = [
                r if isinstance(r, Rule) else Rule.from_dict(r) for r in self.rules
            ]
            object.__setattr__(self, "rules", tuple(rules))
        if self.method == "self_quant" and (self.rules is None) == (
            self.recipe is None
        ):
            raise ValueError(
                "draft.method self_quant needs one of `rules` and `recipe`"
            )

    def kept_layers(self, num_layers: int) -> tuple[int, ...] | None:
        """Numbers from 0 of the layers that draft; None for all.

        Raises:
          ValueError: a layer does not exist, or none is left.
        """
        name = "skip_layers" if self.layers is None else "layers"
        given = getattr(self, name)
        if given is None:
            return None
        for layer in given:
            if not -num_layers <= layer < num_layers:
                raise ValueError(
                    f"draft.{name}: layer {layer} is none of the model's {num_layers}, "
                    "0 first"
                )
        found = {layer % num_layers for layer in given}
        if name == "skip_layers":
            found = set(range(num_layers)) - found
        if not found:
            raise ValueError("draft.skip_layers leaves no layer to draft with")
        return tuple(sorted(found))

    @classmethod
    def parse(cls, value: Any) -> DraftOptions | None:
        """A mapping, the bare name of a method, an instance or None.

        Raises:
          ValueError: an unknown field or a value that cannot be.
        """
        if value is None or isinstance(value, cls):
            return value
        data = {"method": value} if isinstance(value, str) else value
        if isinstance(data, Mapping):
            known_fields(data, [f.name for f in dataclasses.fields(cls)], "draft")
            if "method" not in data:
                raise ValueError(f"draft needs a method: {', '.join(METHODS)}")
        return build(cls, data, "draft")

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as plain values."""
        out: dict[str, Any] = {"method": self.method}
        for name in METHODS[self.method]:
            value = getattr(self, name)
            if value is None:
                continue
            if name == "rules":
                value = [rule.to_dict() for rule in value]
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = dict(value)
            out[name] = value
        if sampling := _changed(self.sampling):
            out["sampling"] = sampling
        if self.exact != "fast":
            out["exact"] = self.exact
        if self.auto is not None:
            out["auto"] = _changed(self.auto) or True
        return out


def _nested(cls: Any, options: DraftOptions, name: str) -> Any:
    value = getattr(options, name)
    return value if isinstance(value, cls) else build(cls, value, f"draft.{name}")


def _changed(options: Any) -> dict[str, Any]:
    fields = dataclasses.fields(options)
    values = {f.name: (getattr(options, f.name), f.default) for f in fields}
    return {
        k: list(v) if isinstance(v, tuple) else v
        for k, (v, default) in values.items()
        if v != default
    }
