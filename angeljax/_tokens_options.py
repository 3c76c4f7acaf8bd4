"""What a recipe says about tokens: the method that prunes those of images and sound."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from angeljax._fields import ConfigError, build, choice, count, known_fields

QUOTAS = ("global", "per_group", "proportional")
POSITION_POLICIES = ("keep", "compact")
PRECISIONS = ("highest", "fast")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokensOptions:
    """How many tokens of images or sound are read: the section `tokens` of a recipe.

    Attributes:
      method: name of the method; see `angeljax.tokens.methods`.
      keep: a count of tokens, or a share above 0 and up to 1.0.
      drop_ratio: instead of `keep`, the share that goes, from 0 to below 1.
      options: of the method, such as `lam`.
      layer: "input", before the first layer of the language model; or how many of its
        layers read all tokens.
      position_policy: "keep", tokens stand where they stood; or "compact".
      quota: how several images share the budget: "global", "per_group" or
        "proportional".
      group_keep: the least to keep of each image; None for no such limit.
      importance: what the method takes for importance: "attn", "norm",
        "distinctiveness" or "scorer". Default "scorer" if there is one, else nothing.
      scorer: file or folder of a learned scorer; see `angeljax.tokens.load_scorer`.
      attn_layer, object_layer: layers of the vision tower whose attention is wanted;
        negative ones count from the last. None leaves it to the host.
      precision: "highest" or "fast", of methods that compare tokens.

    Raises:
      ValueError: an unknown method, option or field, or a value that cannot be.

    Example:
      >>> from angeljax.recipe import TokensOptions
      >>> options = TokensOptions(method="divprune", drop_ratio=0.75)
      >>> options.prune_fn().keep
      0.25
    """

    method: str = "idpruner"
    keep: int | float | None = None
    drop_ratio: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    layer: int | str = "input"
    position_policy: str = "keep"
    quota: str = "global"
    group_keep: int | None = None
    importance: str | None = None
    scorer: str | None = None
    attn_layer: int | None = None
    object_layer: int | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping):
            raise ConfigError(f"tokens.options must be a mapping, not {self.options!r}")
        object.__setattr__(self, "options", copy.deepcopy(dict(self.options)))
        if self.layer != "input":
            if isinstance(self.layer, str):
                raise ConfigError(
                    f"tokens.layer must be input or a number of layers, not "
                    f"{self.layer!r}"
                )
            count("tokens.layer", self.layer)
        choice("tokens.position_policy", self.position_policy, POSITION_POLICIES)
        choice("tokens.quota", self.quota, QUOTAS)
        if self.group_keep is not None:
            count("tokens.group_keep", self.group_keep)
        for name in ("attn_layer", "object_layer"):
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise ConfigError(f"tokens.{name} must be a layer, not {value!r}")
        if self.precision is not None:
            choice("tokens.precision", self.precision, PRECISIONS)
        if self.scorer is not None and not isinstance(self.scorer, str):
            raise ConfigError(f"tokens.scorer must be a path, not {self.scorer!r}")
        self._check_method()

    def _check_method(self) -> None:
        # The recipe is read where no kernel is wanted.
        import jax
        import jax.numpy as jnp

        from angeljax.tokens import keep_count
        from angeljax.tokens._pruner import IMPORTANCES

        if self.importance is not None:
            choice("tokens.importance", self.importance, IMPORTANCES)
        if self.scorer is not None and self.importance not in (None, "scorer"):
            raise ConfigError(
                f"tokens.scorer is there, and importance is {self.importance!r}: leave "
                "one of them out"
            )
        n = self.keep if type(self.keep) is int and self.keep > 8 else 8
        try:
            keep_count(n, self.keep, drop_ratio=self.drop_ratio)
            fn = self._pruner(None, None)
            # The method looks at its options while it is traced; nothing is computed.
            shapes = {"embeds": (n, 4), "attn": (n,), "text": (2, 4)}
            given = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}

            def run(embeds: Any, attn: Any, text: Any) -> Any:
                # The arrays of a scorer or a key are not there yet.
                bare = dataclasses.replace(
                    fn,
                    importance=None,
                    quota="global",
                    group_keep=None,
                    key=jax.random.key(0),
                )
                return bare(embeds, attn=attn, text=text, importance=attn)

            jax.eval_shape(run, **given)
        except (TypeError, ValueError) as e:
            raise ConfigError(f"tokens: {e}") from None

    def prune_fn(self, *, scorer: Any = None, key: Any = None) -> Any:
        """The `angeljax.tokens.TokenPruner` that this describes: what hosts take.

        Args:
          scorer: params of the learned scorer. Default: read from `self.scorer`.
          key: of `jax.random.key`, for methods that draw.

        Raises:
          ValueError, FileNotFoundError: the scorer cannot be read.
        """
        if scorer is None and self.scorer is not None:
            from angeljax.tokens import load_scorer

            scorer = load_scorer(self.scorer)
        return self._pruner(scorer, key)

    def host_options(self, *, scorer: Any = None, key: Any = None) -> dict[str, Any]:
        """`prune`, `layer` and `position_policy`, as a host's `generate` takes them."""
        return {
            "prune": self.prune_fn(scorer=scorer, key=key),
            "layer": None if self.layer == "input" else self.layer,
            "position_policy": self.position_policy,
        }

    def _pruner(self, scorer: Any, key: Any) -> Any:
        from angeljax.tokens import TokenPruner

        if not isinstance(self.method, str):
            raise ValueError(f"method must be a name, not {self.method!r}")
        options = dict(self.options)
        if self.precision is not None:
            options["precision"] = self.precision
        importance = self.importance or ("scorer" if self.scorer else None)
        keep = self.keep
        if keep is None:
            assert self.drop_ratio is not None, "keep_count has seen one of the two"
            keep = 1 - float(self.drop_ratio)
        return TokenPruner(
            method=self.method,
            keep=keep,
            options=tuple(sorted(options.items())),
            importance=importance,
            quota=self.quota,
            group_keep=self.group_keep,
            attn_layer=self.attn_layer,
            object_layer=self.object_layer,
            scorer=scorer,
            key=key,
        )

    @classmethod
    def parse(cls, value: Any) -> TokensOptions | None:
        """From the `tokens` section of a recipe: a mapping, an instance or None.

        Raises:
          ValueError: an unknown field or a value that cannot be.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, Mapping) and "strategies" in value:
            raise ConfigError(
                "tokens: `strategies` is AngelSlim's form: read it with "
                "TokensOptions.from_angelslim, which gives this section"
            )
        if isinstance(value, Mapping):
            known_fields(value, [f.name for f in dataclasses.fields(cls)], "tokens")
        return build(cls, value, "tokens")

    @classmethod
    def from_angelslim(
        cls, config: Any, *, model: str | None = None
    ) -> tuple[TokensOptions, ...]:
        """Reads a configuration of AngelSlim's token compressor.

        Args:
          config: the mapping of a YAML file with `compressor.strategies`, or the
            mapping `strategies` alone.
          model: path or name of the model, which settings for certain models
            (`model_related_params`) are looked up by.

        Returns:
          One section for each stage, in the order of the layers. Keys of a stage in
          AngelSlim are the layer behind which it prunes; `layer` here is how many
          layers read all tokens, one more.

        Raises:
          ValueError: what cannot be taken over, by name; source text that would be
            executed is refused.

        Example:
          >>> from angeljax.recipe import TokensOptions
          >>> (stage,) = TokensOptions.from_angelslim({"global": {
          ...     "strategy": "idpruner", "params": {"ratio": 0.75, "mmr_lambda": 0.5},
          ... }})
          >>> stage.method, stage.drop_ratio, dict(stage.options)
          ('idpruner', 0.75, {'lam': 0.5})
        """
        from angeljax._angelslim_tokens import read

        return tuple(cls(**fields) for fields in read(config, model))

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain values."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "method" or (
                value is not None and value != field.default and value != {}
            ):
                out[field.name] = copy.deepcopy(value)
        return out
