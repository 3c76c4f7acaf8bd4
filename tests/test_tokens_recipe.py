"""The section `tokens` of a recipe, and AngelSlim's configurations as such sections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax._data import configs_dir
from angeljax.recipe import TokensOptions
from angeljax.tokens import idpruner, init_scorer, keep_count, score_tokens

SHIPPED = sorted((configs_dir() / "tokens").glob("*.yaml"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_recipes_run_and_round_trip(file, rng):
    recipe = aj.Recipe.load(file.stem)
    assert recipe.name == file.stem and recipe.description and not recipe.rules
    assert f"configs/tokens/{file.name}" in file.read_text()
    again = aj.Recipe.from_yaml(recipe.to_yaml())
    assert again == recipe and hash(again) == hash(recipe)
    what = recipe.tokens
    options = what.host_options(scorer=init_scorer(jax.random.key(0), 8),
                                key=jax.random.key(1))  # fmt: skip
    assert options["position_policy"] == "keep"
    assert options["layer"] == (None if what.layer == "input" else what.layer)
    x = jnp.asarray(rng.normal(size=(2, 16, 8)), jnp.float32)
    signals = {
        "mask": jnp.ones((2, 16), bool),
        "attn": jnp.asarray(rng.random((2, 16)), jnp.float32),
        "object_attn": jnp.asarray(rng.random((2, 16)), jnp.float32),
        "keys": x[..., :4],
        "text": x[:, :3],
        "groups": np.repeat([[0, 1]], 8, axis=1).repeat(2, axis=0),
    }
    out = jax.eval_shape(lambda x: options["prune"](x, **signals), x)
    kept = keep_count(16, what.keep, drop_ratio=what.drop_ratio)
    assert out.indices.shape == (2, kept)


def test_prune_fn_is_the_method_with_its_settings(rng):
    recipe = aj.Recipe.from_yaml(
        """
        tokens:
          keep: 4
          importance: scorer
          options: {lam: 0.3, center: true}
          precision: highest
        """
    )
    scorer = init_scorer(jax.random.key(0), 8)
    scorer = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), scorer
    )
    x = jnp.asarray(rng.normal(size=(1, 12, 8)), jnp.float32)
    mask = jnp.arange(12)[None] < 10
    traces = []

    @jax.jit
    def run(fn, x, mask):
        traces.append(fn.method)
        return fn(x, mask=mask).order

    for _ in range(2):  # equal recipes are one and the same for `jit`
        got = run(recipe.tokens.prune_fn(scorer=scorer), x, mask)
    weights = score_tokens(scorer, x, mask)
    want = idpruner(x, keep=4, importance=weights, mask=mask, lam=0.3, center=True)
    assert got.tolist() == want.order.tolist() and traces == ["idpruner"]
    # What a host gives as importance goes before.
    fn = recipe.tokens.prune_fn(scorer=scorer)
    given = jnp.arange(12.0)[None]
    want = idpruner(x, keep=4, importance=given, lam=0.3, center=True)
    assert fn(x, importance=given).order.tolist() == want.order.tolist()


def test_what_a_host_must_give():
    x = jnp.ones((1, 4, 8))
    for text, message in (
        ({"keep": 2, "importance": "attn"}, "importance: attn needs a host"),
        ({"keep": 2, "importance": "scorer"}, "load_scorer"),
        ({"keep": 2, "quota": "per_group"}, "groups"),
        ({"keep": 2, "method": "scope"}, "scope needs attn"),
    ):
        with pytest.raises(ValueError, match=message):
            TokensOptions(**text).prune_fn()(x)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "say either keep or drop_ratio"),
        ({"keep": 0.5, "drop_ratio": 0.5}, "say either keep or drop_ratio"),
        ({"keep": 1.5}, "keep=1.5 must be a share"),
        ({"keep": True}, "keep=True must be a number"),
        ({"keep": 0.5, "method": "idprune"}, "unknown method 'idprune': did you mean"),
        ({"keep": 0.5, "options": {"lambda": 0.5}}, "no option 'lambda'"),
        ({"keep": 0.5, "options": {"lam": 2.0}}, "lam must be from 0 to 1"),
        ({"keep": 0.5, "options": [1]}, "tokens.options must be a mapping"),
        ({"keep": 0.5, "layer": 0}, "tokens.layer must be an integer >= 1"),
        ({"keep": 0.5, "layer": "first"}, "tokens.layer must be input or"),
        ({"keep": 0.5, "quota": "fair"}, "tokens.quota must be one of"),
        ({"keep": 0.5, "group_keep": 0}, "tokens.group_keep"),
        ({"keep": 0.5, "position_policy": "kept"}, "did you mean 'keep'"),
        ({"keep": 0.5, "importance": "attention"}, "tokens.importance must be one of"),
        ({"keep": 0.5, "attn_layer": "last"}, "tokens.attn_layer must be a layer"),
        ({"keep": 0.5, "scorer": "a", "importance": "norm"}, "leave one of them out"),
        ({"keep": 0.5, "scorer": 3}, "tokens.scorer must be a path"),
        ({"keep": 0.5, "method": "hiprune", "precision": "fast"}, "'precision'"),
        ({"keep": 0.5, "precision": "low"}, "tokens.precision must be one of"),
        ({"keep": 0.5, "ratio": 0.5}, "tokens has no field 'ratio'"),
        ({"strategies": {}}, "TokensOptions.from_angelslim"),
        ([1], "tokens must be a mapping"),
    ],
)
def test_bad_sections_are_refused_in_one_line(section, message):
    with pytest.raises(aj.RecipeError) as info:
        aj.Recipe.from_dict({"tokens": section})
    assert message in str(info.value) and "\n" not in str(info.value)


ANGELSLIM = {
    "model_mapping": [{"name": "vl_model", "path": "model"}],
    "compressor": {
        "requirements": {"inputs_embeds": True},
        "strategies": {
            "global": {
                "strategy": "idpruner",
                "params": {"ratio": 0.75, "mmr_lambda": 0.4, "parallel_k": 2},
                "model_related_params": {"selector_path": {"7b": "s7", "3b": "s3"}},
            },
            "1": {
                "strategy": "special_token_based_attention",
                "params": {
                    "ratio": 0.5,
                    "use_post_rope": True,
                    "query_source": {"strategy": "last_text"},
                },
            },
            0: {
                "strategy": "dart",
                "params": {"ratio": 0.25, "pivot_image_token": 3,
                           "pivot_text_token": 2},
            },
        },
    },
}  # fmt: skip


def test_angelslim_stages():
    first, second, third = TokensOptions.from_angelslim(
        ANGELSLIM, model="Qwen/Qwen2.5-VL-7B-Instruct"
    )
    assert first == TokensOptions(
        drop_ratio=0.75, scorer="s7", options={"lam": 0.4, "parallel": 2}
    )
    assert second == TokensOptions(
        method="dart", drop_ratio=0.25, layer=1,
        options={"image_pivots": 3, "text_pivots": 2},
    )  # fmt: skip
    assert third == TokensOptions(method="fastv", drop_ratio=0.5, layer=2)
    (hiprune,) = TokensOptions.from_angelslim(
        {"global": {"strategy": "hiprune", "params": {
            "ratio": 0.9, "object_layer": 16, "last_vit_layer": -1, "alpha": 0.1}}}
    )  # fmt: skip
    assert hiprune == TokensOptions(
        method="hiprune", drop_ratio=0.9, quota="per_group", object_layer=16,
        attn_layer=-1, options={"alpha": 0.1},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "params", "message"),
    [
        ("global", {"strategy": "idpruner", "ratio": 9}, "ratio=9 must be the share"),
        ("global", {"strategy": "idpruner"}, "needs a ratio"),
        ("global", {"strategy": "override", "ratio": 0.5}, "'override' cannot be"),
        (
            "global",
            {"strategy": "idpruner", "ratio": 0.5,
             "similarity_func": "def compute(x): return x"},
            "similarity_func is Python source, which is never executed",
        ),
        (
            "global",
            {"strategy": "idpruner", "ratio": 0.5, "selector_path": "<path>"},
            "selector_path is a placeholder",
        ),
        (
            0,
            {"strategy": "special_token_based_attention", "ratio": 0.5,
             "query_source": {"strategy": "global_average"}},
            "'global_average' cannot be taken over; last_text can",
        ),
        (0, {"strategy": "dart", "ratio": 0.5, "use_post_rope": False}, "use True"),
        (0, {"strategy": "divprune", "ratio": 0.5, "alpha": 1}, "parameter 'alpha' of"),
        ("first", {"strategy": "divprune", "ratio": 0.5}, "a stage is global or"),
        ("global", {"strategy": "baseline"}, "there is only baseline"),
    ],
)  # fmt: skip
def test_what_angelslim_has_and_we_have_not(stage, params, message):
    entry = {"strategy": params.pop("strategy"), "params": params}
    with pytest.raises(ValueError, match=".") as info:
        TokensOptions.from_angelslim({"strategies": {stage: entry}})
    assert message in str(info.value) and "\n" not in str(info.value)


def test_angelslim_settings_for_models():
    for model, message in (
        (None, "say model="),
        ("Qwen2.5-VL-72B", "0 of them are in the name"),
        ("a-7b-and-3b", "2 of them"),
    ):
        with pytest.raises(ValueError, match=message):
            TokensOptions.from_angelslim(ANGELSLIM, model=model)
