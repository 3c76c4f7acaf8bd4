"""Recipes: schema, validation, round trips, assignment to leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import angeljax as aj
from angeljax._data import configs_dir, recipe_files
from angeljax.attention import AShape, Dense, Quest
from angeljax.formats import format_names
from angeljax.train import (
    BlockTrainConfig,
    EagleTrainConfig,
    MTPTrainConfig,
    TrainConfig,
)

SHIPPED = recipe_files()


def tree():
    f32 = jnp.float32
    kernel = jax.ShapeDtypeStruct((64, 96), f32)
    return {
        "embed": {"embedding": jax.ShapeDtypeStruct((50, 64), f32)},
        "layers": {
            str(i): {
                "attn": {"q_proj": {"kernel": kernel}},
                "mlp": {
                    "up": {"kernel": kernel, "bias": jax.ShapeDtypeStruct((96,), f32)}
                },
                "norm": {"scale": jax.ShapeDtypeStruct((64,), f32)},
            }
            for i in range(2)
        },
        "lm_head": {"kernel": jax.ShapeDtypeStruct((64, 50), f32)},
        "router": {"kernel": jax.ShapeDtypeStruct((64, 8), f32)},
    }


def formats_of(recipe):
    return {a.path: a.spec.label() for a in aj.plan(tree(), recipe) if a.spec}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.stem)
def test_shipped_recipe_loads_round_trips_and_fits(file):
    recipe = aj.Recipe.load(file)
    assert recipe.name == file.stem
    assert aj.Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert aj.Recipe.from_dict(recipe.to_dict()) == recipe
    sections = recipe.attention, recipe.tokens, recipe.kv_cache, recipe.draft
    assert formats_of(recipe) or any(s is not None for s in sections)


TRAININGS = sorted((configs_dir() / "train").glob("*.yaml"))
DRAFTERS = {
    "eagle3": EagleTrainConfig,
    "block": BlockTrainConfig,
    "mtp": MTPTrainConfig,
}


@pytest.mark.parametrize("file", TRAININGS, ids=lambda f: f.stem)
def test_shipped_training_loads_and_is_no_recipe(file):
    kind = DRAFTERS.get(file.stem.split("-")[0], TrainConfig)
    config = kind.load(file)
    assert kind.from_dict(config.to_dict()) == config
    if kind is TrainConfig:
        assert config.loaded_recipe() in map(aj.Recipe.load, SHIPPED)
    assert file not in SHIPPED
    with pytest.raises(aj.RecipeError):
        aj.Recipe.load(file.stem)


def test_every_format_has_a_recipe():
    used = {r.format for f in SHIPPED for r in aj.Recipe.load(f).rules}
    assert used == set(format_names())


def test_recipe_is_found_by_path_by_relative_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = aj.Recipe.load("sherry")
    assert by_name == aj.Recipe.load("configs/ternary/sherry.yaml")
    assert by_name == aj.Recipe.load("ternary/sherry")
    by_name.save(tmp_path / "mine.yaml")
    assert aj.Recipe.load("mine.yaml") == by_name


def test_a_local_file_comes_before_a_shipped_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sherry.yaml").write_text("rules: [{format: int8}]")
    assert aj.Recipe.load("sherry.yaml").rules[0].format == "int8"


def test_recipe_is_hashable_by_value_and_frozen():
    recipe = aj.Recipe(rules=[aj.Rule(format="int8")])
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "x"
    assert isinstance(recipe.rules, tuple)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [{format: int5}]", "unknown format 'int5': did you mean int"),
        ("rules: [{format: int4, grop_size: 3}]", "did you mean 'group_size'"),
        ("rules: [{match: x}]", "has no format"),
        ("rules: [{format: int4, group_size: 7}]", "not a multiple of 2"),
        ("rules: [{format: int4, group_size: -2}]", "positive integer"),
        ("rules: [{format: int4, group_size: true}]", "positive integer"),
        ("rules: [{format: nvfp4, group_size: 32}]", "groups of 16 by definition"),
        ("rules: [{format: mxfp4, scale_dtype: float32}]", "as uint8"),
        ("rules: [{format: int8, scale_dtype: int8}]", "unknown scale_dtype"),
        ("rules: [{format: int8, granularity: row}]", "no granularity 'row'"),
        ("rules: [{format: int8, granularity: channel, group_size: 32}]", "goes with"),
        ("rules: [{format: sherry, symmetric: true}]", "has no option 'symmetric'"),
        ("rules: [{format: sherry, group_stride: 8}]", "use 1 or 16"),
        ("rules: [{format: sherry, group_stride: 16, group_size: 32}]", "of 64"),
        ("rules: [{format: int8, symmetric: 1}]", "use True or False"),
        ("rules: [{format: int8, match: '('}]", "no regular expression"),
        ("rules: [{format: int8, match: 3}]", "must be a string"),
        ("rules: [{format: int8, algorithm: magic}]", "unknown algorithm 'magic'"),
        ("rules: [{format: int8, axis: a}]", "axis must be an integer"),
        ("rules: [{format: int8, batch_axes: -1}]", "batch_axes"),
        ("rules: [{format: int8, pad: 3}]", "pad must be true or false"),
        ("rules: [{format: none, group_size: 32}]", "needs a format"),
        ("rules: []", "at least one rule"),
        ("rules: int8", "list `rules`"),
        ("rules: [int8]", "must be a mapping"),
        ("[1, 2]", "must be a mapping"),
        ("rules: [{format: int8}]\ndraft: {name: x}", "draft has no field 'name'"),
        ("rules: [{format: int8}]\nskip: ['(']", "skip '('"),
        ("rules: [{format: int8}]\nskip: abc", "list of regular expressions"),
        ("rules: [{format: int8}]\nrequires: 3", "requires must be a mapping"),
        ("rules: [{format: int8}", "not valid YAML"),
        ("attention: {selectr: stem}", "did you mean 'selector'"),
        ("attention: {selector: stm}", "did you mean stem"),
        ("attention: {selector: stem, options: {alpa: 1}}", "did you mean alpha"),
        ("attention: {selector: stem, options: 3}", "options must be a mapping"),
        ("attention: {selector: stem, options: {alpha: x}}", "alpha must be a number"),
        ("attention: {}", "attention needs a field 'selector'"),
        ("attention: {selector: stem, dense_above: 2}", "dense_above must be a number"),
        ("attention: {selector: stem, layers: [{layers: 1}]}", "layers needs a field"),
        (
            "attention: {selector: stem, layers: [{layers: [a], selector: stem}]}",
            "'a' is no number of a layer",
        ),
        ("attention: {selector: stem, decode: {name: best}}", "use quest"),
        ("attention: {selector: stem, kv_dtype: int8}", "must be float8_e4m3fn or"),
        (
            "attention: {selector: stem, decode: {name: quest, keep_pages: 0}}",
            "keep_pages must be an integer",
        ),
        ("rules: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_bad_recipe_is_refused_in_one_line(text, message):
    with pytest.raises(aj.RecipeError) as info:
        aj.Recipe.from_yaml(text)
    assert message in str(info.value)
    assert "\n" not in str(info.value)


def test_attention_alone_is_a_recipe_and_changes_no_weight():
    text = """
    attention:
      selector: hybrid
      options: {selectors: [{name: dense}, {name: stem, alpha: 0.5}], layers: [1]}
      layers:
        - {layers: [0, -1], selector: dense}
        - {layers: [3], selector: a_shape, options: {window_tokens: 256}}
      decode: {name: quest, keep_pages: 32}
      mean_correction: true
      kv_dtype: float8_e4m3fn
    """
    recipe = aj.Recipe.from_yaml(text)
    again = aj.Recipe.from_dict(recipe.to_dict())
    assert again == recipe and hash(again) == hash(recipe)
    assert not formats_of(recipe)
    fn = recipe.attention.attention_fn()
    assert fn == again.attention.attention_fn() and hash(fn)
    assert fn.selector.selectors[1].alpha == 0.5
    assert fn.selector_of(29, 30) == Dense() == fn.selector_of(0, 30)
    assert fn.selector_of(3, 30) == AShape(window_tokens=256)
    assert fn.decode == Quest(keep_pages=32) and fn.mean_correction
    assert fn.kv_dtype == "float8_e4m3fn"


def test_missing_file_names_close_ones():
    with pytest.raises(aj.RecipeError, match="did you mean ternary/sherry"):
        aj.Recipe.load("configs/ternary/shery.yaml")
    with pytest.raises(aj.RecipeError, match="is a folder"):
        aj.Recipe.load(configs_dir())


def test_error_in_a_file_names_the_file(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("rules: [{format: int5}]")
    with pytest.raises(aj.RecipeError, match="bad.yaml: rule"):
        aj.Recipe.load(file)


def test_default_selection_skips_embeddings_heads_norms_routers_biases():
    taken = formats_of(aj.Recipe(rules=[aj.Rule(format="int4", group_size=32)]))
    assert set(taken) == {
        f"layers/{i}/{leaf}/kernel"
        for i in (0, 1)
        for leaf in ("attn/q_proj", "mlp/up")
    }


@pytest.mark.parametrize(
    "path",
    ["mlp/gate_proj/kernel", "attn/out/kernel", "up/kernel", "head_mixer/kernel"],
)
def test_default_skip_does_not_take_what_only_looks_alike(path):
    params = {path: jnp.ones((64, 64))}
    assert aj.plan(params, aj.Recipe(rules=[aj.Rule(format="int8")]))[0].spec


def test_a_named_leaf_is_taken_though_skipped_by_default():
    rules = [
        aj.Rule(match="lm_head/kernel", format="int8"),
        aj.Rule(match=".*embedding", format="int8"),
        aj.Rule(format="sherry"),
    ]
    taken = formats_of(aj.Recipe(rules=rules))
    assert taken["lm_head/kernel"] == "int8 channel"
    assert taken["embed/embedding"] == "int8 channel"
    assert taken["layers/0/mlp/up/kernel"] == "sherry g64"


def test_first_match_wins_and_none_leaves_a_leaf():
    rules = [
        aj.Rule(match="layers/0/.*/kernel"),
        aj.Rule(match=".*attn.*", format="int8"),
        aj.Rule(format="int4", group_size=32),
    ]
    taken = formats_of(aj.Recipe(rules=rules))
    assert taken == {
        "layers/1/attn/q_proj/kernel": "int8 channel",
        "layers/1/mlp/up/kernel": "int4 g32",
    }


def test_rule_that_matches_nothing_names_near_misses():
    recipe = aj.Recipe(rules=[aj.Rule(match="layers/./attn/query/kernel")])
    with pytest.raises(aj.RecipeError, match="closest paths are .*attn/q_proj/kernel"):
        aj.plan(tree(), recipe)
    optional = aj.Rule(match="nothing", format="int8", optional=True)
    assert formats_of(aj.Recipe(rules=[optional, aj.Rule(format="int8")]))


def test_shadowed_rule_says_who_took_its_leaves():
    rules = [aj.Rule(format="int8"), aj.Rule(match=".*q_proj.*", format="int4")]
    with pytest.raises(aj.RecipeError, match="rule 1 .*put the special rule first"):
        aj.plan(tree(), aj.Recipe(rules=rules))


def test_rule_on_a_bias_names_the_leaf():
    recipe = aj.Recipe(rules=[aj.Rule(match="layers/0/mlp/.*", format="int8")])
    with pytest.raises(aj.RecipeError, match="layers/0/mlp/up/bias: has shape .96,"):
        aj.plan(tree(), recipe)


def test_group_that_does_not_divide_names_the_leaf():
    recipe = aj.Recipe(rules=[aj.Rule(format="int4", group_size=48, pad=False)])
    with pytest.raises(aj.RecipeError, match="q_proj/kernel: has 64 .*divisor of 64"):
        aj.plan(tree(), recipe)


def test_integer_leaf_is_named():
    recipe = aj.Recipe(rules=[aj.Rule(match="w", format="int8")])
    with pytest.raises(aj.RecipeError, match="w: is int32: only floating-point"):
        aj.plan({"w": jnp.ones((64, 64), jnp.int32)}, recipe)


def test_tree_without_weights_says_so():
    with pytest.raises(aj.RecipeError, match="no weight that the default selection"):
        aj.plan({"x": jnp.ones(3)}, aj.Recipe(rules=[aj.Rule(format="int8")]))


def test_recipe_for_another_model():
    recipe = aj.Recipe(
        rules=[aj.Rule(format="int8")], name="r", requires={"model_type": "qwen3"}
    )
    recipe.check_model({"model_type": "qwen3", "hidden_size": 3})
    with pytest.raises(aj.RecipeError, match="for models with model_type='qwen3'"):
        recipe.check_model({"model_type": "llama"})
