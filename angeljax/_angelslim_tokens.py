"""AngelSlim's configurations of token pruning, as fields of `TokensOptions`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from angeljax._fields import ConfigError, known_fields

# Strategy: method, whether AngelSlim gives each image its own budget, and its
# parameters besides `ratio`: the option here, or a field of the section ("=name").
_PER_IMAGE = {"quota": "per_group"}
_TABLE: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "random": ("random", {}, {}),
    "special_token_based_attention": ("fastv", {}, {}),
    "divprune": ("divprune", {}, {}),
    "dart": (
        "dart",
        {},
        {"pivot_image_token": "image_pivots", "pivot_text_token": "text_pivots"},
    ),
    "hiprune": (
        "hiprune",
        _PER_IMAGE,
        {
            "alpha": "alpha",
            "object_layer": "=object_layer",
            "last_vit_layer": "=attn_layer",
        },
    ),
    "vispruner": (
        "vispruner",
        _PER_IMAGE,
        {"important_ratio_of_kept": "important_ratio", "layer_idx": "=attn_layer"},
    ),
    "scope": ("scope", {}, {"alpha": "alpha", "layer_idx": "=attn_layer"}),
    "visionzip": (
        "visionzip",
        _PER_IMAGE,
        {"zip_ratio": "contextual_ratio", "layer_idx": "=attn_layer"},
    ),
    "vision_selector": (
        "visionselector",
        {},
        {"randomize": "randomize", "selector_path": "=scorer"},
    ),
    "idpruner": (
        "idpruner",
        {},
        {
            "mmr_lambda": "lam",
            "parallel_k": "parallel",
            "selector_path": "=scorer",
        },
    ),
}


def read(config: Any, model: str | None) -> list[dict[str, Any]]:
    """Fields of `TokensOptions` for each stage; see `TokensOptions.from_angelslim`."""
    if isinstance(config, Mapping) and "compressor" in config:
        config = config["compressor"]
    if isinstance(config, Mapping) and "strategies" in config:
        config = config["strategies"]
    if not isinstance(config, Mapping) or not config:
        raise ConfigError(
            "strategies must be a mapping of stages (global, or a layer) to strategies"
        )
    stages = sorted((_layer(stage), stage) for stage in config)
    out = []
    for layer, stage in stages:
        fields = _stage(f"strategies.{stage}", config[stage], model)
        if fields is not None:
            out.append({**fields, "layer": layer or "input"})
    if not out:
        raise ConfigError("strategies prune nothing: there is only baseline")
    return out


def _layer(stage: Any) -> int:
    if stage == "global":
        return 0
    number = int(stage) if isinstance(stage, str) and stage.isdigit() else stage
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ConfigError(
            f"strategies: a stage is global or a layer from 0, not {stage!r}"
        )
    return number + 1


def _stage(where: str, entry: Any, model: str | None) -> dict[str, Any] | None:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} must be a mapping, not {entry!r}")
    known_fields(entry, ("strategy", "params", "model_related_params"), where)
    name = entry.get("strategy")
    if name == "baseline":
        return None
    if name not in _TABLE:
        raise ConfigError(
            f"{where}: strategy {name!r} cannot be taken over; those that can: "
            f"{', '.join(_TABLE)}"
        )
    method, fixed, names = _TABLE[name]
    params = dict(entry.get("params") or {})
    params.update(_of_model(where, entry.get("model_related_params") or {}, model))
    for param, check in _CHECKS.items():
        if param in params:
            check(f"{where}.{param}", params.pop(param))
    if "ratio" not in params:
        raise ConfigError(f"{where} needs a ratio")
    fields: dict[str, Any] = {"method": method, **fixed}
    fields["drop_ratio"] = _ratio(where, params.pop("ratio"))
    options: dict[str, Any] = {}
    for param, value in params.items():
        if param not in names:
            known = ", ".join(("ratio", *names))
            raise ConfigError(
                f"{where}: parameter {param!r} of {name} cannot be taken over; those "
                f"that can: {known}"
            )
        if names[param].startswith("="):
            fields[names[param][1:]] = value
        else:
            options[names[param]] = value
    if isinstance(fields.get("scorer"), str) and fields["scorer"].startswith("<"):
        raise ConfigError(
            f"{where}.selector_path is a placeholder, {fields['scorer']!r}: put the "
            "path of a scorer there"
        )
    if method == "visionselector" and "scorer" not in fields:
        fields["importance"] = "scorer"
    if options:
        fields["options"] = options
    return fields


def _of_model(where: str, given: Any, model: str | None) -> dict[str, Any]:
    """Settings for certain models: those whose key is in the name of this one."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}.model_related_params must be a mapping")
    out = {}
    for param, by_model in given.items():
        if not isinstance(by_model, Mapping):
            raise ConfigError(f"{where}.{param} must be a mapping of models to values")
        if model is None:
            raise ConfigError(
                f"{where}.{param} depends on the model ({', '.join(by_model)}): say "
                "model=..."
            )
        fits = [v for key, v in by_model.items() if str(key).lower() in model.lower()]
        if len(fits) != 1:
            raise ConfigError(
                f"{where}.{param} has entries for {', '.join(map(str, by_model))}, and "
                f"{len(fits)} of them are in the name {model!r}"
            )
        out[param] = fits[0]
    return out


def _ratio(where: str, value: Any) -> float:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not 0 <= value < 1:
        raise ConfigError(
            f"{where}.ratio={value!r} must be the share of tokens that goes, from 0 to "
            "below 1"
        )
    return float(value)


def _refuse_source(where: str, value: Any) -> None:
    if value is not None:
        raise ConfigError(
            f"{where} is Python source, which is never executed here: write a method "
            "as a function, see angeljax.tokens"
        )


def _last_text(where: str, value: Any) -> None:
    strategy = value.get("strategy") if isinstance(value, Mapping) else value
    if strategy != "last_text":
        raise ConfigError(
            f"{where}: strategy {strategy!r} cannot be taken over; last_text can"
        )


def _must_be(*allowed: Any) -> Callable[[str, Any], None]:
    def check(where: str, value: Any) -> None:
        if value not in allowed:
            raise ConfigError(
                f"{where}={value!r} cannot be taken over; use "
                f"{' or '.join(map(repr, allowed))}"
            )

    return check


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "similarity_func": _refuse_source,
    "importance_func": _refuse_source,
    "query_source": _last_text,
    "use_post_rope": _must_be(True),
    # Both are monotone, and only the order counts there.
    "score_mode": _must_be("soft_topk", "raw"),
    "text_selection_mode": _must_be("inverse"),
}
