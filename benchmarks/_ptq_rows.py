"""The rows of `ptq_quality`: what is done to every weight of the layers.

Each section compares algorithms at one number format; its first row is plain rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import angeljax as aj
from angeljax.transforms._base import parse as transform


@dataclasses.dataclass(frozen=True)
class PTQRow:
    """One row of the table.

    Attributes:
      section: what its rows have in common.
      name: the algorithm, and what is beside it.
      rules: of the recipe.
      transforms: of the recipe.
      how: "free" needs no data, "pass" one pass of calibration, "layers" goes layer by
        layer (`compress_sequential`); "rotated" merges a rotation first; "focus" learns
        the rounding; "kv" rounds keys and values instead of weights.
    """

    section: str
    name: str
    rules: tuple[dict[str, Any], ...]
    transforms: tuple[dict[str, Any], ...] = ()
    how: str = "free"

    def recipe(self) -> aj.Recipe:
        """The recipe of the row."""
        name = f"{self.section}: {self.name}"
        if self.how == "kv":
            return aj.Recipe.from_dict({"name": name, "kv_cache": self.rules[0]})
        rules = [aj.Rule(**rule) for rule in self.rules]
        transforms = [transform(entry) for entry in self.transforms]
        return aj.Recipe(name=name, rules=rules, transforms=transforms)


def _rows(section: str, base: dict[str, Any], *rows: Any) -> list[PTQRow]:
    """Rows `(name, how, fields of the rule, transforms)` on one base rule."""
    return [
        PTQRow(section, name, ({**base, **more},), tuple(transforms), how)
        for name, how, more, transforms in rows
    ]


MSE = {"options": {"scales": "mse"}}
WEIGHTED = {"options": {"scales": "mse", "weighting": "hessian"}}
BEST = {"act_order": True, "scales": "mse", "weighting": "hessian"}
FIT = {"act_order": True, "refit_scales": True}
REFIT = {**BEST, "refit_scales": True}
AWQ = ({"name": "awq"},)
SMOOTH_UP = ({"name": "smoothquant", "alpha": "search", "parts": ("norm", "up")},)
SMOOTH = ({"name": "smoothquant"},)


def gptq(**options: Any) -> dict[str, Any]:
    """A rule's fields for GPTQ."""
    return {"algorithm": "gptq", "options": options}


def _common(*, fine: bool = True) -> list[Any]:
    """The rows that most sections of weights have."""
    rows: list[Any] = [
        ("rtn", "free", {}, ()),
        ("rtn, scales by mse", "free", MSE, ()),
        ("rtn, scales by weighted mse", "pass", WEIGHTED, ()),
        ("awq", "pass", {}, AWQ),
        ("gptq, act order, scales by weighted mse", "layers", gptq(**BEST), ()),
    ]
    if fine:
        rows += [
            ("awq, limits searched", "pass", {"algorithm": "awq_clip"}, AWQ),
            ("gptq, one pass", "pass", gptq(), ()),
            ("gptq", "layers", gptq(), ()),
            ("gptq, scales by mse", "layers", gptq(scales="mse"), ()),
            (
                "gptq, scales by weighted mse",
                "layers",
                gptq(scales="mse", weighting="hessian"),
                (),
            ),
            ("gptaq", "layers", {"algorithm": "gptaq", "options": BEST}, ()),
            ("awq + gptq", "layers", gptq(**BEST), AWQ),
            ("rotated rtn", "rotated", {}, ()),
            ("rotated gptq", "rotated layers", gptq(**BEST), ()),
        ]
    return rows


INT8 = {"format": "int8", "granularity": "channel", "activation": "int8"}
STATIC = {"activation_scale": "amax"}
FP8 = {"format": "float8_e4m3", "granularity": "channel", "activation": "float8_e4m3"}
FP8_TENSOR = {**FP8, "granularity": "tensor"}
INT4 = {"format": "int4", "group_size": 128}

ROWS: list[PTQRow] = [
    *_rows(
        "W8A8 int8",
        INT8,
        ("rtn, scale of each token", "free", {}, ()),
        ("rtn, static", "pass", STATIC, ()),
        ("rtn, static by percentile", "pass", {"activation_scale": "percentile"}, ()),
        ("rtn, static by mse", "pass", {"activation_scale": "mse"}, ()),
        ("smoothquant, static", "pass", STATIC, SMOOTH),
        ("smoothquant of norms and up, searched, static", "pass", STATIC, SMOOTH_UP),
        ("smoothquant of norms and up, searched", "pass", {}, SMOOTH_UP),
        ("rotated inputs, scale of each token", "free", {"rotation": "full"}, ()),
        ("rotated inputs, static", "pass", {**STATIC, "rotation": "full"}, ()),
    ),
    *_rows(
        "W8A8 FP8",
        FP8,
        ("rtn, scale of each token", "free", {}, ()),
        ("tensor, static", "pass", {"granularity": "tensor", **STATIC}, ()),
        (
            "tensor, static by ema",
            "pass",
            {"granularity": "tensor", "activation_scale": "ema"},
            (),
        ),
        (
            "tensor, static by lepto",
            "pass",
            {"granularity": "tensor", "activation_scale": "lepto"},
            (),
        ),
        (
            "blocks of 128",
            "free",
            {"granularity": "block", "activation": "float8_e4m3_block128"},
            (),
        ),
        (
            "mxfp8",
            "free",
            {"format": "mxfp8", "granularity": None, "activation": "mxfp8"},
            (),
        ),
    ),
    *_rows("W4 g128", INT4, *_common()),
    *_rows("W4 g64", {"format": "int4", "group_size": 64}, *_common(fine=False)),
    *_rows(
        "W4A8 int8",
        {**INT4, "activation": "int8"},
        ("rtn", "free", {}, ()),
        ("gptq", "layers", gptq(**BEST), ()),
        ("smoothquant + gptq", "layers", gptq(**BEST), SMOOTH_UP),
        (
            "channel, gptq",
            "layers",
            {**gptq(**BEST), "group_size": None, "granularity": "channel"},
            (),
        ),
    ),
    *_rows(
        "W4A4 int4",
        {**INT4, "activation": "int4"},
        ("rtn", "free", {}, ()),
        ("rotated inputs, rtn", "free", {"rotation": "full"}, ()),
        ("rotated inputs, gptq", "layers", {**gptq(**BEST), "rotation": "full"}, ()),
    ),
    *_rows(
        "W4A8 FP8",
        {"format": "int4_fp8", "group_size": 128, "activation": "float8_e4m3"},
        ("rtn", "free", {}, ()),
        ("gptq", "layers", gptq(), ()),
    ),
    *_rows(
        "NVFP4",
        {"format": "nvfp4"},
        ("rtn", "free", {}, ()),
        ("rtn, scales by mse", "free", MSE, ()),
        ("gptq", "layers", gptq(), ()),
        ("gptq, act order, scales by weighted mse", "layers", gptq(**BEST), ()),
        ("focus", "focus", {}, ()),
    ),
    *_rows(
        "NVFP4, activations too",
        {"format": "nvfp4", "activation": "nvfp4"},
        ("rtn", "free", {}, ()),
        ("gptq", "layers", gptq(), ()),
        ("gptq, act order, scales by weighted mse", "layers", gptq(**BEST), ()),
    ),
    *_rows(
        "MXFP4",
        {"format": "mxfp4"},
        ("rtn", "free", {}, ()),
        ("rtn, scales by mse", "free", MSE, ()),
        ("gptq", "layers", gptq(), ()),
        ("gptq, act order, scales by weighted mse", "layers", gptq(**BEST), ()),
        ("focus", "focus", {}, ()),
    ),
    *_rows(
        "MXFP4, activations too",
        {"format": "mxfp4", "activation": "mxfp4"},
        ("rtn", "free", {}, ()),
        ("gptq", "layers", gptq(), ()),
        ("gptq, act order, scales by weighted mse", "layers", gptq(**BEST), ()),
        ("rotated inputs, gptq", "layers", {**gptq(), "rotation": 32}, ()),
    ),
    *_rows("W3 g64", {"format": "int3", "group_size": 64}, *_common()),
    *_rows(
        "W2",
        {"format": "int2", "group_size": 32},
        ("int2 g32, rtn", "free", {}, ()),
        ("int2 g32, gptq", "layers", gptq(**BEST), ()),
        ("seq2 g64, rtn", "free", {"format": "seq2", "group_size": 64}, ()),
        (
            "seq2 g64, gptq",
            "layers",
            {"format": "seq2", "group_size": 64, **gptq(**REFIT)},
            (),
        ),
        (
            "seq2 g64, rotated gptq",
            "rotated layers",
            {"format": "seq2", "group_size": 64, **gptq(**REFIT)},
            (),
        ),
        (
            "two ternary planes g128, ptqtp",
            "free",
            {"format": "ptqtp", "group_size": 128},
            (),
        ),
        (
            "two ternary planes g128, gptq",
            "layers",
            {"format": "ptqtp", "group_size": 128, **gptq(act_order=True)},
            (),
        ),
    ),
    *_rows(
        "1.58 bits",
        {"format": "t2", "group_size": 128},
        ("absmean", "free", {}, ()),
        ("least squares", "free", {"scale_method": "lstsq"}, ()),
        ("gptq", "layers", {"scale_method": "lstsq", **gptq(**FIT)}, ()),
        (
            "pt2-llm",
            "layers",
            {"shift": True, "scale_method": "twn", "algorithm": "pt2_llm"},
            (),
        ),
        (
            "rotated gptq",
            "rotated layers",
            {"scale_method": "lstsq", **gptq(**FIT)},
            (),
        ),
    ),
    *_rows(
        "1.25 bits",
        {"format": "sherry", "group_size": 128},
        ("sherry", "free", {}, ()),
        ("least squares 3:4", "pass", {"algorithm": "lstsq34"}, ()),
        ("gptq 3:4", "layers", gptq(), ()),
        ("gptq 3:4, scales refit", "layers", gptq(**FIT), ()),
        ("pt2-llm", "layers", {"algorithm": "pt2_llm"}, ()),
        ("rotated gptq 3:4, scales refit", "rotated layers", gptq(**FIT), ()),
    ),
    *_rows(
        "KV cache",
        {"format": "int8"},
        ("fp8, static", "kv", {"format": "float8_e4m3", "granularity": "tensor"}, ()),
        (
            "fp8, static for each head",
            "kv",
            {"format": "float8_e4m3", "granularity": "head"},
            (),
        ),
        ("fp8, scale of each token and head", "kv", {"format": "float8_e4m3"}, ()),
        ("int8, static", "kv", {"granularity": "tensor"}, ()),
        ("int8, scale of each token and head", "kv", {}, ()),
        ("int4 g64", "kv", {"format": "int4", "group_size": 64}, ()),
        ("int4 g32", "kv", {"format": "int4", "group_size": 32}, ()),
        (
            "int4 g32 asymmetric",
            "kv",
            {"format": "int4", "group_size": 32, "symmetric": False},
            (),
        ),
    ),
    *_rows(
        "4.5 bits on average",
        {"format": "int4", "group_size": 32},
        ("uniform int4 g32, rtn", "free", {}, ()),
        ("uniform int4 g32, gptq, one pass", "pass", gptq(), ()),
    ),
]
# A few rows for a smoke run: one of each way.
SMOKE = (
    "W4 g128: rtn",
    "W4 g128: gptq",
    "W4 g128: awq",
    "W8A8 int8: rtn, static",
    "KV cache: int4 g32",
)


def named(pattern: str) -> list[PTQRow]:
    """Rows whose `section: name` matches a regular expression."""
    import re

    return [r for r in ROWS if re.search(pattern, f"{r.section}: {r.name}")]
