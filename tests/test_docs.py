"""The documentation: its code runs, its tables and hex are true, its links lead on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
import yaml

import angeljax as aj
from angeljax import algorithms, cli, tokens
from angeljax._data import recipe_files
from angeljax._draft_options import METHODS
from angeljax.algorithms import input_scale
from angeljax.attention import Stem, selector, selector_names
from angeljax.formats import format_names, get_format
from angeljax.models import DecoderConfig
from angeljax.recipe import (
    DEFAULT_SKIP,
    AttentionOptions,
    DraftOptions,
    TokensOptions,
)
from angeljax.speculative import EagleConfig, init_eagle
from angeljax.train import EagleLoss, EagleTrainConfig, LoraConfig, TrainConfig
from angeljax.train._options import LOSSES, BlockwiseOptions
from angeljax.train.config import MODES
from angeljax.train.eagle_config import HeadConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FORMATS = ROOT / "docs" / "formats.md"
COMPRESS = ROOT / "docs" / "guides" / "compress.md"
TRAINING = ROOT / "docs" / "guides" / "ternary_qat.md"
PTQ = ROOT / "docs" / "guides" / "ptq.md"
ATTENTION = ROOT / "docs" / "guides" / "sparse_attention.md"
TOKENS = ROOT / "docs" / "guides" / "token_pruning.md"
DRAFTS = ROOT / "docs" / "guides" / "speculative.md"


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """Line number and text of the fenced blocks in a language."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.S | re.M)
    return [(text[: m.start(1)].count("\n"), m[1]) for m in found]


def table(page: Path, head: str) -> dict[str, list[str]]:
    """Rows of the table whose first heading is `head`, by their first cell."""
    lines = page.read_text(encoding="utf-8").split("\n")
    start = next(i for i, x in enumerate(lines) if x.startswith(f"| {head} |")) + 2
    rows = {}
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        rows[first.strip("`")] = rest
    return rows


def run(page: Path) -> dict[str, Any]:
    """Runs the Python blocks of a page in one namespace; returns it."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for line, block in blocks(page, "python"):
        # Not with the annotations that this file asks for.
        code = compile("\n" * line + block, name(page), "exec", dont_inherit=True)
        if "# needs the network" not in block:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, namespace)
    return namespace


WITH_CODE = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page)


def commands() -> list[str]:
    lines = [x for p in PAGES for _, b in blocks(p, "(?:bash)?") for x in b.split("\n")]
    return sorted({x.split("#")[0].strip() for x in lines if x.startswith("angeljax ")})


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command):
    node: Any = typer.main.get_command(cli.app)
    _, *arguments = shlex.split(command)
    while hasattr(node, "commands"):
        node = node.commands[arguments.pop(0)]
    # Parses and checks the options; runs nothing.
    node.make_context(node.name, arguments)


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of the headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    plain = [re.sub(r"[^\w\- ]", "", head.lower()) for head in heads]
    return {head.strip().replace(" ", "-") for head in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M
    )
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_pages_name_no_machine():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|tmp|Users)/", text), page


# docs/guides/compress.md


def test_recipe_schema_is_complete():
    for head, cls in (("field of a recipe", aj.Recipe), ("field of a rule", aj.Rule)):
        fields = {f.name for f in dataclasses.fields(cls)}
        assert table(COMPRESS, head).keys() == fields


def test_recipe_schema_defaults():
    rows = table(COMPRESS, "field of a rule")
    options = {
        k: v[0] for f in format_names() for k, v in get_format(f).options.items()
    }
    for field in dataclasses.fields(aj.Rule):
        default = options.get(field.name, field.default)
        if default is not None:
            text = str(default).lower() if isinstance(default, bool) else str(default)
            assert rows[field.name][0] == f"`{text}`", field.name


def test_yaml_blocks_are_recipes():
    for _, block in blocks(COMPRESS, "yaml"):
        aj.Recipe.from_yaml(block)


def test_formats_table():
    rows = table(COMPRESS, "format")
    assert set(rows) == set(format_names())
    for key, (payload, granularities, options, _) in rows.items():
        fmt = get_format(key)
        assert float(payload) == fmt.payload_bits
        names = granularities.replace(f"group ({fmt.group_size})", "group").split(", ")
        assert tuple(names) == fmt.granularities
        if fmt.granularities[0] == "group":
            assert f"group ({fmt.group_size})" in granularities
        assert re.findall(r"\w+", options) == list(fmt.options)


def test_default_selection_is_described():
    text = COMPRESS.read_text(encoding="utf-8")
    listed = re.search(r"except for\n\n(.*?)\n\n", text, re.S)
    assert listed is not None
    words = set(re.findall(r"`(\w+)`", listed[1]))
    paths = {f"a/{word}/kernel" for word in words} | {f"a/{word}" for word in words}
    skipped = {p: [bool(re.fullmatch(s, p)) for s in DEFAULT_SKIP] for p in paths}
    for word in words:
        assert any(skipped[f"a/{word}/kernel"]) or any(skipped[f"a/{word}"]), word
    assert all(any(column) for column in zip(*skipped.values(), strict=True))


TREE = {"up": {"kernel": np.ones((100, 8), np.float32)}}
RULES = {
    "whole path": [aj.Rule(match="upp", format="int8")],
    "order": [aj.Rule(format="int8"), aj.Rule(match="up/kernel", format="int4")],
    "twice": [aj.Rule(match="done/kernel", format="int8")],
    "pad": [aj.Rule(match="up/kernel", format="int4", group_size=64, pad=False)],
}
MESSAGES = [
    (
        lambda: aj.compress(TREE, aj.Recipe(rules=RULES["whole path"])),
        "matches no leaf",
    ),
    (
        lambda: aj.compress(TREE, aj.Recipe(rules=RULES["order"])),
        "matches no leaf that an earlier rule has not taken",
    ),
    (
        lambda: aj.compress({"bias": jnp.ones(3)}, aj.Recipe.load("sherry")),
        "the tree has no weight that the default selection takes",
    ),
    (
        lambda: aj.compress(
            {"done": {"kernel": aj.quantize(jnp.ones((64, 2)), format="int8")}},
            aj.Recipe(rules=RULES["twice"]),
        ),
        "is int8 channel already",
    ),
    (
        lambda: aj.compress(TREE, aj.Recipe(rules=RULES["pad"])),
        "has 100 weights along the contraction, which group_size=64 does not divide",
    ),
    (lambda: aj.Rule(format="int5"), "unknown format 'int5'"),
    (
        lambda: aj.Recipe.from_dict({"rules": [{"groupsize": 1}]}),
        "a rule has no field 'groupsize'",
    ),
    (
        lambda: aj.Rule(format="nvfp4", group_size=32),
        "format nvfp4 has groups of 16 by definition",
    ),
    (
        lambda: aj.compress(
            {"kernel": jnp.full((64, 2), jnp.nan)}, aj.Recipe.load("sherry")
        ),
        "holds NaN or infinity",
    ),
    (
        lambda: aj.compress(jax.eval_shape(lambda: TREE), aj.Recipe.load("sherry")),
        "is a ShapeDtypeStruct: use jax.eval_shape(",
    ),
    (
        lambda: jax.grad(lambda q: jnp.sum(q + 1))(
            aj.quantize(jnp.ones((64, 2)), format="int8")
        ),
        "grad requires real- or complex-valued inputs",
    ),
]


@pytest.mark.parametrize(("act", "message"), MESSAGES)
def test_messages_are_those_of_the_guide(act, message):
    assert message in COMPRESS.read_text(encoding="utf-8")
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        act()


# docs/guides/ternary_qat.md


@pytest.mark.parametrize(
    ("head", "cls"),
    [
        ("field of `qat`", aj.qat.QATOptions),
        ("field of `arenas`", aj.qat.Arenas),
        ("field of `blockwise`", BlockwiseOptions),
        ("field of `lora`", LoraConfig),
    ],
)
def test_options_of_training_are_described(head, cls):
    rows = table(TRAINING, head)
    # Those that the training has itself.
    own = ("batch_size", "seed") if cls is BlockwiseOptions else ()
    fields = [f for f in dataclasses.fields(cls) if f.name not in own]
    assert list(rows) == [f.name for f in fields]
    for field in fields:
        text = yaml.safe_load(rows[field.name][0].strip("`"))
        if isinstance(field.default, float):
            text = float(text)
        assert text == ("none" if field.default is None else field.default), field.name


def test_losses_of_the_guide_are_all():
    rows = table(TRAINING, "`loss`")
    assert set(re.findall(r"\w+", " ".join(rows))) == set(LOSSES)


def test_yaml_blocks_of_training_load():
    recipe, *trainings = (yaml.safe_load(b) for _, b in blocks(TRAINING, "yaml"))
    assert aj.Recipe.from_dict(recipe).arenas is not None
    assert [TrainConfig.from_dict(t).mode for t in trainings] == list(MODES)


# docs/guides/ptq.md


def test_every_algorithm_is_described():
    rows = table(PTQ, "`algorithm`")
    assert set(rows) == set(algorithms.algorithm_names())
    for name, (_, formats) in rows.items():
        own = algorithms.get_algorithm(name).formats
        named = set(re.findall(r"\w+", formats)) & set(format_names())
        assert own is None or named == set(own), name
    assert set(table(PTQ, "`activation_scale`")) == set(input_scale.METHODS)


@pytest.mark.parametrize(
    ("head", "cls", "base"),
    [
        ("option of scales", algorithms.ScaleOptions, None),
        ("option of `gptq`", algorithms.GPTQOptions, algorithms.ScaleOptions),
    ],
)
def test_options_of_algorithms_are_described(head, cls, base):
    rows = table(PTQ, head)
    inherited = {f.name for f in dataclasses.fields(base)} if base else set()
    fields = [f for f in dataclasses.fields(cls) if f.name not in inherited]
    assert list(rows) == [f.name for f in fields]
    for field in fields:
        assert yaml.safe_load(rows[field.name][0].strip("`")) == field.default


def test_recipes_of_the_guide_load():
    for _, block in blocks(PTQ, "yaml"):
        aj.Recipe.from_yaml(block)
    text = PTQ.read_text(encoding="utf-8")
    shipped = {f.stem for f in recipe_files()}
    found = set(re.findall(r"`((?:int4|int8|fp8|nvfp4|mxfp4|w4a[48])-[\w-]+)`", text))
    assert len(found) > 10 and found <= shipped


# docs/guides/sparse_attention.md


def test_every_selector_is_described():
    rows = table(ATTENTION, "selector")
    assert set(rows) == set(selector_names())
    for key, (_, options, *_) in rows.items():
        given = {} if key != "hybrid" else {"selectors": (Stem(),), "layers": (0,)}
        for option in re.findall(r"`(\w+)`", options):
            assert hasattr(selector(key, **given), option), (key, option)


def test_section_attention_is_described():
    rows = table(ATTENTION, "field of `attention`")
    fields = dataclasses.fields(AttentionOptions)
    assert list(rows) == [f.name for f in fields]
    for _, block in blocks(ATTENTION, "yaml"):
        assert aj.Recipe.from_yaml(block).attention is not None


def test_budgets_of_the_guide():
    for length, row in table(ATTENTION, "tokens").items():
        stem, total = Stem(dense_layers=0), int(length)
        budgets = stem.budgets(total)
        low, high = stem.density_bounds(total)
        want = [len(budgets), budgets[0], budgets[-1], f"{low:.1%} to {high:.1%}"]
        assert row == list(map(str, want))


# docs/formats.md


def option(text: str) -> tuple[str, Any]:
    key, value = text.split("=")
    if value.isalpha():
        return key, {"true": True, "false": False}.get(value, value)
    return key, int(value)


@pytest.mark.parametrize("block", [b for _, b in blocks(FORMATS, "example")])
def test_hex_examples(block):
    ((_, weights),) = blocks(FORMATS, "weights")
    w = np.asarray(weights.split(), np.float32)[:, None]
    head, *lines = block.strip().split("\n")
    fmt, *options = head.split()
    q = aj.quantize(w, format=fmt, **dict(map(option, options)))
    got = {k: np.asarray(p).tobytes().hex(" ") for k, p in q.planes.items()}
    got["reads"] = " ".join(f"{x:.9g}" for x in np.asarray(q.dequantize())[:, 0])
    assert dict(line.split(" ", 1) for line in lines) == got


def test_every_format_has_an_example():
    heads = {b.split()[0] for _, b in blocks(FORMATS, "example")}
    assert heads == set(format_names())


@pytest.fixture(scope="module")
def read():
    """The reader that the page gives, with what it needs and nothing of ours."""
    return run(FORMATS)["read"]


CASES = [
    ("int8", {}),
    ("int8", {"symmetric": False}),
    ("int8", {"granularity": "tensor"}),
    ("int4", {}),
    ("int4", {"group_size": 32, "symmetric": False, "scale_dtype": "float16"}),
    ("int4", {"granularity": "channel", "narrow_range": "yes"}),
    ("int4_fp8", {}),
    ("int4_fp8", {"granularity": "channel"}),
    ("int3", {}),
    ("int3", {"symmetric": False}),
    ("int3", {"granularity": "tensor"}),
    ("int2", {}),
    ("int2", {"symmetric": False}),
    ("float8_e4m3", {}),
    ("float8_e4m3", {"granularity": "block"}),
    ("float8_e5m2", {"group_size": 64}),
    ("mxfp8", {}),
    ("mxfp4", {}),
    ("mxfp4", {"scale_rounding": "floor"}),
    ("nvfp4", {}),
    ("nf4", {}),
    ("nf4", {"granularity": "channel"}),
    ("t2", {}),
    ("t2", {"granularity": "channel", "scale_method": "lstsq"}),
    ("t2", {"group_size": 48}),
    ("t1_6", {}),
    ("t1_6", {"group_size": 32, "scale_method": "twn"}),
    ("t1_6", {"granularity": "tensor"}),
    ("sherry", {}),
    ("sherry", {"group_size": 256, "group_stride": 16}),
    ("sherry", {"granularity": "channel", "group_stride": 16}),
    ("seq2", {}),
    ("seq2", {"group_size": 32, "scale_method": "amax"}),
    ("binary", {}),
    ("ptqtp", {}),
    ("ptqtp", {"granularity": "channel"}),
    ("ptqtp", {"tied": True, "group_size": 32}),
    ("t2", {"granularity": "channel", "shift": True}),
    ("t1_6", {"shift": True}),
]


@pytest.mark.parametrize(("fmt", "options"), CASES)
def test_the_reader_of_the_page(read, rng, fmt, options):
    shapes: list[tuple[tuple[int, ...], Any]] = [((2, 100, 6), -2)]
    if options.get("granularity") == "block":
        shapes = [((150, 130), -2)]
    elif not options:
        shapes += [((6, 100), -1), ((4, 25, 5), (-3, -2))]
    for shape, axis in shapes:
        w = rng.standard_normal(shape).astype(np.float32)
        q = aj.quantize(w, format=fmt, axis=axis, **options)
        planes = {k: np.asarray(p) for k, p in q.planes.items()}
        want = jax.device_get(q.dequantize())
        np.testing.assert_array_equal(read(planes, q.spec.to_dict()), want)


# docs/guides/token_pruning.md


def test_token_methods_are_complete():
    assert table(TOKENS, "method").keys() == set(tokens.methods())


def test_token_options_are_complete():
    page = TOKENS.with_name("token_pruning_models.md")
    rows = table(page, "field of `tokens`")
    names = [name.strip(" `") for head in rows for name in head.split(",")]
    assert sorted(names) == sorted(f.name for f in dataclasses.fields(TokensOptions))
    for _, block in blocks(page, "yaml"):
        assert aj.Recipe.from_yaml(block).tokens.prune_fn()


def test_token_importance_functions_exist():
    assert table(TOKENS, "function").keys() <= set(tokens.__all__)


# docs/guides/speculative.md


def test_section_draft_is_described():
    rows = table(DRAFTS, "field of `draft`")
    assert list(rows) == [f.name for f in dataclasses.fields(DraftOptions)]
    assert set(re.findall(r"`(\w+)`", rows["method"][1])) == set(METHODS)
    shipped = {f.stem for f in recipe_files() if f.parent.name == "speculative"}
    text = DRAFTS.read_text(encoding="utf-8")
    assert set(re.findall(r"`(spec-[\w-]+)`", text)) == shipped


def test_yaml_blocks_of_drafting_load():
    found = [yaml.safe_load(block) for _, block in blocks(DRAFTS, "yaml")]
    for data in found:
        if "draft" in data:
            assert aj.Recipe.from_dict(data).draft is not None
        else:
            EagleTrainConfig.from_dict(data)


@pytest.mark.parametrize(("head", "cls"), [("loss", EagleLoss), ("head", HeadConfig)])
def test_options_of_heads_are_described(head, cls):
    rows = table(DRAFTS, f"field of `{head}`")
    fields = dataclasses.fields(cls)
    assert list(rows) == [f.name for f in fields]
    for field in fields:
        if field.default is not None:
            assert yaml.safe_load(rows[field.name][0].strip("`")) == field.default


def test_tensors_of_a_head_are_described():
    config = EagleConfig.of(
        DecoderConfig(
            model_type="llama",
            vocab_size=8,
            hidden_size=8,
            num_layers=4,
            intermediate_size=8,
            num_heads=2,
            num_kv_heads=1,
            head_dim=4,
        )
    )
    want = {"d2t", "t2d"}
    for where, _ in jax.tree_util.tree_leaves_with_path(
        init_eagle(config, jax.random.key(0))
    ):
        *names, _ = (key.key for key in where)
        want.add(".".join([*names, "weight"]))
    found = set()
    for row in table(DRAFTS, "tensor"):
        before, brace, rest = row.partition("{")
        inside, _, after = rest.partition("}")
        found |= {before + x + after for x in inside.split(",")} if brace else {row}
    assert found == want
