"""Recipes: what is done to which leaf of a param tree, in Python or in YAML.

A recipe is a list of rules. For each leaf the first rule that matches its '/'-joined
path decides. It validates completely before any array is touched, round-trips through
YAML, and travels with a checkpoint.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from angeljax import _train_options
from angeljax._attention_options import AttentionOptions
from angeljax._draft_options import DraftOptions
from angeljax._fields import known_fields
from angeljax._kv_cache_options import KVCacheOptions
from angeljax._tokens_options import TokensOptions
from angeljax._train_options import Arenas, QATOptions
from angeljax.algorithms import get_algorithm, input_scale
from angeljax.formats._activation import ACTIVATIONS, STATIC_ACTIVATIONS
from angeljax.formats._registry import get_format
from angeljax.formats._resolve import check_options
from angeljax.transforms import _base as transforms_base
from angeljax.transforms._base import Transform

# What a rule without `match` leaves alone: embeddings, heads, norms, routers, biases.
DEFAULT_SKIP = (
    r"(.*/)?[^/]*(embed|wte|wpe|position)[^/]*(/.*)?",
    r"(.*/)?(lm_head|head|unembed|logits|logits_dense|classifier|output_layer)(/.*)?",
    r"(.*/)?[^/]*norm[^/]*(/.*)?",
    r"(.*/)?(ln|ln_[^/]*|[^/]*_ln|ln\d+)(/.*)?",
    r"(.*/)?(router|gate)(/.*)?",
    r"(.*/)?[^/]*lora_[^/]*(/.*)?",
    r"(.*/)?(bias|b|scale|gamma|beta)",
)
# Options that only some formats have; None leaves the format's default.
FORMAT_OPTIONS = (
    "symmetric",
    "narrow_range",
    "scale_method",
    "scale_rounding",
    "group_stride",
    "shift",
    "tied",
)
# Parts beside the rules, one of which is enough for a recipe.
SECTIONS = ("attention", "tokens", "kv_cache", "draft")
# Parts of the schema that hold no options yet; a recipe that fills one is refused.
RESERVED_SECTIONS = ("activations",)


class RecipeError(ValueError):
    """A recipe that cannot be read, is not valid, or does not fit a param tree."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of a recipe.

    Attributes:
      match: regular expression for the whole '/'-joined path of a leaf
        (`re.fullmatch`). Without one the rule takes every floating-point leaf of two or
        more axes that `Recipe.skip` does not name.
      format: a number format (`angeljax.formats.format_names()`), or None to leave the
        leaf as it is ("none" in YAML).
      algorithm: how codes are chosen: "rtn" rounds to the nearest, others look at
        calibration data; see `angeljax.algorithms.algorithm_names()`.
      options: of the algorithm; its dataclass of options, or a mapping of its fields.
      granularity: "tensor", "channel", "group" or "block"; default by format.
      group_size: weights along the contraction that share a scale.
      axis: contraction axis or adjacent axes. Default: -2, as in a Flax kernel
        `[in, out]`; -1 for a leaf named `embedding`; that of the layer for the kernels
        of Flax's multi-head attention.
      batch_axes: leading axes with scales of their own (scanned layers, experts).
        Default: all axes before the contraction.
      scale_dtype: "float32", "bfloat16" or "float16".
      pad: whether a group size that does not divide may be padded inside.
      optional: do not complain if the rule matches nothing.
      activation: what the other operand of the layer's product is quantized to on the
        fly, each token by itself: "int8", "int4", "float8_e4m3",
        "float8_e4m3_block128" (a scale for 128 features), "mxfp8", "mxfp4" or "nvfp4".
        Default: it is left as it is.
      activation_scale: where the scale of the activations comes from: "dynamic", from
        each token as it comes, or a method that finds one scale by calibration: "amax",
        "ema", "percentile", "mse" or "lepto"; see `angeljax.algorithms.input_scale`.
      rotation: a Hadamard matrix mixes the inputs before they are rounded, in blocks of
        this many ("full": the largest that there are), and the weight is stored for
        such inputs. The product stays the same but for rounding.
      qat: how the weight is trained; `QATOptions`, or a mapping of its fields. Without
        it `angeljax.qat` uses the defaults.
      symmetric, narrow_range, scale_method, scale_rounding, group_stride, shift, tied:
        options of the format; see `angeljax.formats`.

    Raises:
      RecipeError: an option has a value that the format does not take.
    """

    match: str | None = None
    format: str | None = None
    algorithm: str = "rtn"
    options: Any = None
    granularity: str | None = None
    group_size: int | None = None
    axis: int | tuple[int, ...] | None = None
    batch_axes: int | None = None
    scale_dtype: str | None = None
    pad: bool = True
    optional: bool = False
    symmetric: bool | None = None
    narrow_range: str | None = None
    scale_method: str | None = None
    scale_rounding: str | None = None
    group_stride: int | None = None
    shift: bool | None = None
    tied: bool | None = None
    activation: str | None = None
    activation_scale: str = "dynamic"
    rotation: int | str | None = None
    qat: QATOptions | None = None

    def __post_init__(self) -> None:
        if isinstance(self.axis, list):
            object.__setattr__(self, "axis", tuple(self.axis))
        try:
            object.__setattr__(self, "qat", QATOptions.parse(self.qat))
            algorithm = get_algorithm(self.algorithm)
            object.__setattr__(self, "options", algorithm.parse(self.options))
            self._check()
        except ValueError as e:
            raise RecipeError(f"rule {self.label()}: {e}") from None

    def _check(self) -> None:
        if self.match is not None:
            if not isinstance(self.match, str):
                raise ValueError(f"match must be a string, not {self.match!r}")
            try:
                re.compile(self.match)
            except re.error as e:
                message = f"match {self.match!r} is no regular expression: {e}"
                raise ValueError(message) from None
        for name in ("pad", "optional"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false")
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        if self.axis is not None and not all(type(a) is int for a in axes):
            raise ValueError(f"axis must be an integer or a list of them: {self.axis}")
        if self.batch_axes is not None and (
            type(self.batch_axes) is not int or self.batch_axes < 0
        ):
            raise ValueError(f"batch_axes must be an integer >= 0: {self.batch_axes}")
        if self.format is None:
            more = ("granularity", "group_size", "scale_dtype", "activation", "qat")
            for name in (*more, "rotation", *FORMAT_OPTIONS):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs a format")
            if self.algorithm != "rtn":
                raise ValueError(f"algorithm {self.algorithm} needs a format")
            return
        check_options(
            get_format(self.format),
            granularity=self.granularity,
            group_size=self.group_size,
            scale_dtype=self.scale_dtype,
            options=self.format_options(),
        )
        if self.activation not in (None, *ACTIVATIONS):
            raise ValueError(
                f"activation={self.activation!r}: use {', '.join(ACTIVATIONS)}"
            )
        get_algorithm(self.algorithm).takes(self.format)
        self._check_activation_scale()
        self._check_qat()

    def needs(self) -> tuple[str, ...]:
        """Names of the statistics that the rule's algorithm and activations need."""
        if self.format is None:
            return ()
        of_algorithm = get_algorithm(self.algorithm).needs(self.options)
        return (*of_algorithm, *input_scale.needs(self.activation_scale))

    def _check_activation_scale(self) -> None:
        if self.activation_scale not in input_scale.METHODS:
            raise ValueError(
                f"activation_scale={self.activation_scale!r}: use "
                f"{', '.join(input_scale.METHODS)}"
            )
        static = self.activation_scale != "dynamic"
        if static and self.activation not in STATIC_ACTIVATIONS:
            raise ValueError(
                f"activation_scale={self.activation_scale!r} needs an activation of "
                f"{', '.join(STATIC_ACTIVATIONS)}, not {self.activation!r}"
            )
        input_scale.check(self.activation_scale, self.activation)

    def _check_qat(self) -> None:
        if self.qat is None or self.format is None:
            return
        fixed = get_format(self.format).snap is None or self.symmetric is False
        for name, on in (
            ("scale: learned", self.qat.scale == "learned"),
            ("estimator: clipped", self.qat.estimator == "clipped"),
        ):
            if on and fixed:
                why = "with a zero point " if self.symmetric is False else ""
                raise ValueError(
                    f"format {self.format} {why}cannot be trained with qat {name}: "
                    "its scales follow from the weights; leave that out"
                )
        if self.qat.tequila is not None and self.format not in ("t2", "t1_6"):
            raise ValueError(
                f"qat.tequila is for weights with a dead zone around 0, formats t2 and "
                f"t1_6, not {self.format}"
            )
        if self.qat.tequila is not None and self.shift:
            raise ValueError(
                "qat.tequila is for weights that become 0, and with shift none does: "
                "leave one of them out"
            )

    def format_options(self) -> dict[str, Any]:
        """The options of the format that this rule sets."""
        values = {name: getattr(self, name) for name in FORMAT_OPTIONS}
        return {name: v for name, v in values.items() if v is not None}

    def label(self) -> str:
        """How messages name the rule."""
        return repr(self.match) if self.match is not None else "(default selection)"

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain YAML values."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "format" or value != field.default:
                out[field.name] = list(value) if isinstance(value, tuple) else value
        out.pop("options", None)
        options = _changed(self.options)
        if options:
            out["options"] = options
        if self.qat is not None:
            out["qat"] = _train_options.to_dict(self.qat)
        out["format"] = self.format or "none"
        return out

    @classmethod
    def from_dict(cls, data: Any) -> Rule:
        """Inverse of `to_dict`.

        Raises:
          RecipeError: `data` is no mapping, has unknown fields, or no format.
        """
        if not isinstance(data, Mapping):
            raise RecipeError(f"a rule must be a mapping, not {data!r}")
        names = sorted(f.name for f in dataclasses.fields(cls))
        known_fields(data, names, "a rule", RecipeError)
        if "format" not in data:
            raise RecipeError(
                f"rule {data.get('match', '(default selection)')!r} has no format: "
                "name one, or `none` to leave the leaf as it is"
            )
        fmt = None if data["format"] in (None, "none") else data["format"]
        return cls(**{**data, "format": fmt})


def _changed(options: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    defaults = {f.name: f.default for f in dataclasses.fields(options)}
    return {
        k: list(v) if isinstance(v, tuple) else v
        for k, v in values.items()
        if v != defaults[k]
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """An ordered list of rules and the name under which it is known.

    Attributes:
      rules: the first rule that matches a leaf decides; a leaf that none matches stays.
        There may be none if there is a section `attention`, `tokens`, `kv_cache` or
        `draft`.
      name, description: for people.
      skip: regular expressions of paths that rules without `match` leave alone.
      requires: fields of a model's configuration that this recipe was made for, such as
        {"model_type": "llama"}; checked where the configuration is known.
      arenas: the annealed residual that `angeljax.qat` trains with; in YAML the entry
        `arenas` of the section `train`. None trains without.
      transforms: what is done to the tree before weights are quantized, in order, that
        leaves the function of the model as it is (smoothing, rotations); objects of
        `angeljax.transforms`, or mappings with a `name` and their fields.
      attention: how the model reads long prompts; `AttentionOptions`, or a mapping of
        its fields. It changes no weight: `attention.attention_fn()` goes into a
        `LanguageModel`, and the command line does so by itself. None is dense.
      tokens: which tokens of images or sound are read; `TokensOptions`, or a mapping of
        its fields. `tokens.prune_fn()` goes into the models that have any. None reads
        all of them.
      kv_cache: how a decoder's cache is stored; `KVCacheOptions`, or a mapping of its
        fields. It goes into a `LanguageModel`, and the command line does so by itself.
        None stores keys and values in the dtype of the model.
      draft: how it decodes speculatively; `DraftOptions`, or a mapping of its fields.
        `angeljax spec` does so. None decodes plainly.

    Example:
      >>> import angeljax as aj
      >>> recipe = aj.Recipe(rules=[aj.Rule(format="int4", group_size=64)])
      >>> aj.Recipe.from_dict(recipe.to_dict()) == recipe
      True
    """

    rules: Sequence[Rule] = ()
    name: str = ""
    description: str = ""
    skip: Sequence[str] = DEFAULT_SKIP
    # Not part of the hash, so that a recipe has one: `jit` may close over it.
    requires: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    arenas: Arenas | None = None
    transforms: Sequence[Transform] = ()
    attention: AttentionOptions | None = None
    tokens: TokensOptions | None = None
    kv_cache: KVCacheOptions | None = None
    draft: DraftOptions | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        if isinstance(self.skip, str):
            raise RecipeError("skip must be a list of regular expressions")
        object.__setattr__(self, "skip", tuple(self.skip))
        if not self.rules and all(getattr(self, s) is None for s in SECTIONS):
            raise RecipeError("a recipe needs at least one rule")
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise RecipeError(f"rules must be Rule objects, not {rule!r}")
        for pattern in self.skip:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as e:
                raise RecipeError(f"skip {pattern!r}: {e}") from None
        if not isinstance(self.requires, Mapping):
            raise RecipeError(f"requires must be a mapping, not {self.requires!r}")
        try:
            object.__setattr__(self, "arenas", Arenas.parse(self.arenas))
        except ValueError as e:
            raise RecipeError(f"train: {e}") from None
        try:
            transforms = tuple(transforms_base.parse(t) for t in self.transforms)
            options = AttentionOptions.parse(self.attention)
            tokens = TokensOptions.parse(self.tokens)
            kv_cache = KVCacheOptions.parse(self.kv_cache)
            draft = DraftOptions.parse(self.draft)
        except ValueError as e:
            raise RecipeError(str(e)) from None
        object.__setattr__(self, "transforms", transforms)
        object.__setattr__(self, "attention", options)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "kv_cache", kv_cache)
        object.__setattr__(self, "draft", draft)

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML / JSON values; `from_dict` restores an equal recipe."""
        out: dict[str, Any] = {}
        if self.name:
            out["name"] = self.name
        if self.description:
            out["description"] = self.description
        if self.requires:
            out["requires"] = dict(self.requires)
        if tuple(self.skip) != DEFAULT_SKIP:
            out["skip"] = list(self.skip)
        out["rules"] = [rule.to_dict() for rule in self.rules]
        if self.arenas is not None:
            out["train"] = {"arenas": _train_options.to_dict(self.arenas)}
        if self.transforms:
            out["transforms"] = [t.to_dict() for t in self.transforms]
        if self.attention is not None:
            out["attention"] = self.attention.to_dict()
        if self.tokens is not None:
            out["tokens"] = self.tokens.to_dict()
        if self.kv_cache is not None:
            out["kv_cache"] = self.kv_cache.to_dict()
        if self.draft is not None:
            out["draft"] = self.draft.to_dict()
        return out

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """Builds and validates a recipe from plain values.

        Raises:
          RecipeError: one line that names the field.
        """
        if not isinstance(data, Mapping):
            raise RecipeError("a recipe must be a mapping with a list `rules`")
        known = {f.name for f in dataclasses.fields(cls)} - {"arenas"}
        sections = sorted(known | {"train", *RESERVED_SECTIONS})
        known_fields(data, sections, "a recipe", RecipeError)
        for section in RESERVED_SECTIONS:
            if data.get(section):
                raise RecipeError(
                    f"section {section!r} has no options in this version: remove it "
                    "(weights are described under `rules`)"
                )
        alone = any(data.get(name) is not None for name in SECTIONS)
        rules = data.get("rules", [] if alone else None)
        if not isinstance(rules, Sequence) or isinstance(rules, str):
            raise RecipeError("a recipe needs a list `rules`")
        fields = {k: v for k, v in data.items() if k in known}
        if (train := data.get("train")) is not None:
            if not isinstance(train, Mapping):
                raise RecipeError(f"train must be a mapping, not {train!r}")
            known_fields(train, ("arenas",), "train", RecipeError)
            fields["arenas"] = train.get("arenas")
        return cls(**{**fields, "rules": [Rule.from_dict(r) for r in rules]})

    def to_yaml(self) -> str:
        """The recipe as YAML."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """Reads YAML; only plain values are accepted, nothing is executed.

        Raises:
          RecipeError: not YAML, or not a valid recipe.
        """
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise RecipeError(f"not valid YAML: {' '.join(str(e).split())}") from None
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Loads a recipe file.

        Args:
          path: a file; else a path inside the shipped recipes
            ("configs/ternary/sherry.yaml"); else the bare name of one ("sherry").

        Raises:
          RecipeError: no such file (names close ones), or not a valid recipe.
        """
        file = find_recipe(path)
        try:
            recipe = cls.from_yaml(file.read_text(encoding="utf-8"))
        except (RecipeError, UnicodeDecodeError, OSError) as e:
            raise RecipeError(f"{file}: {e}") from None
        return recipe if recipe.name else dataclasses.replace(recipe, name=file.stem)

    def save(self, path: str | Path) -> None:
        """Writes the recipe as YAML."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def check_model(self, config: Mapping[str, Any]) -> None:
        """Checks `requires` against a model's configuration.

        Raises:
          RecipeError: the recipe was made for another model.
        """
        for key, want in self.requires.items():
            got = config.get(key)
            if got != want:
                raise RecipeError(
                    f"recipe {self.name or '(unnamed)'} is for models with "
                    f"{key}={want!r}; this one has {got!r}"
                )


def find_recipe(path: str | Path) -> Path:
    """Resolves the argument of `Recipe.load` to a file.

    Raises:
      RecipeError: there is none; names close ones.
    """
    from angeljax._data import configs_dir, recipe_files

    given, shipped = Path(path), configs_dir()
    if given.is_file():
        return given
    if given.is_dir():
        raise RecipeError(f"{given} is a folder: name a .yaml file in it")
    parts = given.parts[1:] if given.parts[:1] == ("configs",) else given.parts
    inside = shipped.joinpath(*parts) if parts and not given.is_absolute() else given
    for file in (inside, inside.with_name(inside.name + ".yaml")):
        if file.is_file():
            return file
    files = {f.stem: f for f in recipe_files()}
    if len(given.parts) == 1 and given.stem in files:
        return files[given.stem]
    near = difflib.get_close_matches(given.stem, files, n=3, cutoff=0.4)
    hint = ", ".join(str(files[n].relative_to(shipped)) for n in near)
    raise RecipeError(
        f"no recipe {str(path)!r}"
        + (f": did you mean {hint}?" if hint else f" there or in {shipped}")
    )
