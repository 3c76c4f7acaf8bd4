"""Drafters from the section `draft` of recipes: every method, every refusal."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax import _workflow
from angeljax.formats import QTensor
from angeljax.models import LanguageModel
from angeljax.recipe import DraftOptions
from angeljax.speculative import (
    BlockConfig,
    BlockModel,
    EagleConfig,
    EagleTree,
    ExitRule,
    MTPModel,
    NoDrafter,
    PromptLookup,
    Sampling,
    SelfDrafter,
    autoregressive,
    generate_as,
    init_eagle,
    make_drafter,
    sampling_of,
    save_block,
    save_eagle,
    save_mtp,
    successors,
)
from tests.models._random_params import random_params
from tests.speculative._cases import PROMPTS, tiny
from tests.test_cli import tokenizer

NEW = 12
BLOCK = {"num_layers": 1, "block_size": 4, "mask_token_id": 31}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Learned drafters and a draft model, on disk."""
    model, params = tiny()
    root = tmp_path_factory.mktemp("drafters")
    eagle = EagleConfig.of(model.config)
    head = init_eagle(eagle, jax.random.key(1), target=params)
    save_eagle(root / "eagle3", eagle, head)
    block = BlockModel(BlockConfig.of(model.config, **BLOCK))
    save_block(root / "dflash", block, random_params(block, std=0.3))
    mtp = MTPModel(model.config)
    save_mtp(root / "mtp", mtp, random_params(mtp, std=0.3))
    for name, size in (("draft_model", 32), ("other", 40)):
        small = dataclasses.replace(model.config, num_layers=1, vocab_size=size)
        small = LanguageModel(small)
        values = random_params(small, std=0.3)
        opened = _workflow.Opened(small, values, None, name)
        _workflow.save_model(root / name, opened, values, None)
    return root


def made(text, folders=None):
    options = DraftOptions.parse(
        {k: str(folders / v) if k in ("path", "model") else v for k, v in text.items()}
    )
    return options, make_drafter(options, *tiny())


@pytest.mark.parametrize(
    "text",
    [
        {"method": "eagle3", "path": "eagle3", "num_tokens": 3},
        {"method": "draft_model", "model": "draft_model", "num_tokens": 3},
        {
            "method": "self_quant",
            "rules": [{"format": "int8", "match": "layers/.*/mlp/.*/kernel"}],
            "num_tokens": 3,
            "sampling": {"temperature": 0.7, "seed": 2},
        },
    ],
    ids=lambda text: text["method"],
)
def test_the_text_is_the_targets(text, folders):
    model, params = tiny()
    options, drafter = made(text, folders)
    if "num_tokens" in text:
        assert drafter.width == text["num_tokens"] + 1
    run = model, params, PROMPTS
    out, plan = generate_as(options, *run, drafter=drafter, max_new_tokens=NEW)
    sampling = sampling_of(options.sampling)
    plain = autoregressive(*run, max_new_tokens=NEW, sampling=sampling)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert plan is None and sampling.greedy == ("sampling" not in text)


def test_fields_reach_the_drafter(folders):
    model, params = tiny()
    assert make_drafter("none", model, params) == NoDrafter()
    lookup = make_drafter({"method": "prompt_lookup", "min_ngram": 5}, model, params)
    assert lookup == PromptLookup(4, 5, 5)
    _, skip = made({"method": "layer_skip", "skip_layers": [-1], "num_tokens": 2})
    assert skip == SelfDrafter(None, 2, (0,))
    _, recycling = made({"method": "recycling", "nodes": 9, "successors": True})
    np.testing.assert_array_equal(recycling.table, successors(model, params))
    assert recycling.nodes == 9
    _, hybrid = made({"method": "hybrid", "nodes": 5, "from_prompt": False})
    assert hybrid.lookup == PromptLookup(4, 3, 2)
    assert hybrid.drafter.nodes == 5 and not hybrid.drafter.from_prompt
    joined = {"method": "hybrid", "path": "eagle3", "options": {"nodes": 9}}
    _, hybrid = made({**joined, "flat_ngram": 4}, folders)
    assert hybrid.lookup == PromptLookup(8, 4, 2) and hybrid.flat_ngram == 4
    assert hybrid.drafter.growth == EagleTree(9, 5, 2)
    _, block = made({"method": "dflash", "path": "dflash", "num_tokens": 2}, folders)
    assert block.width == 3
    stored = random_params(block.model, std=0.3)["fc"]["kernel"]
    np.testing.assert_allclose(block.params["fc"]["kernel"], stored, rtol=0.01)
    tree = {"nodes": 8, "branches": 3, "levels": 2}
    _, eagle = made({"method": "eagle3", "path": "eagle3", "options": tree}, folders)
    assert eagle.growth == EagleTree(8, 3, 2)
    assert sampling_of(DraftOptions(method="none").sampling) == Sampling()


def test_a_rule_that_ends_thinking(tmp_path):
    """Texts stand for tokens: of `breaks` for all that have them."""
    model, params = tiny()
    config = EagleConfig.of(model.config)
    head = init_eagle(config, jax.random.key(1), target=params, exit=True)
    save_eagle(tmp_path, config, head)
    words = tokenizer()
    rule = {"end": "&'", "begin": "%", "breaks": "#", "remaining": None}
    options = {"method": "eagle3", "path": str(tmp_path), "options": {"exit": rule}}
    found = make_drafter(options, model, params, tokenizer=words)
    ids = {x: words.encode(x)[0] for x in "&'%#"}
    assert found.rule == ExitRule(
        end=(ids["&"], ids["'"]), begin=ids["%"], breaks=(ids["#"],), remaining=None
    )
    assert found.drafter.growth is None and found.drafter.num_tokens == 3
    for change, says in (
        ({"end": "&'"}, "with `end` and `breaks`"),
        ({**rule, "begin": "&'"}, "is 2 tokens, not one"),
        ({**rule, "after": 1}, "no field 'after'"),
    ):
        with pytest.raises(ValueError, match=says):
            wrong = {**options, "options": {"exit": change}}
            make_drafter(wrong, model, params, tokenizer=words)
    with pytest.raises(ValueError, match="a text needs a tokenizer"):
        make_drafter(options, model, params)


def test_the_copy_is_of_the_dense_weights():
    """A target in INT4 and its copy in INT8: the copy is better where it is given."""
    model, params = tiny()
    kernel = ("layers", 0, "mlp", "up_proj", "kernel")
    rules = [{"format": "int8", "match": "layers/.*/mlp/.*/kernel"}]
    options = {"method": "self_quant", "rules": rules}

    def leaf(tree):
        for name in kernel:
            tree = tree[name]
        return tree

    coarse = make_drafter(
        {**options, "rules": [{**rules[0], "format": "int4", "group_size": 16}]},
        model,
        params,
    ).params
    dense = leaf(params)
    both = [
        leaf(make_drafter(options, model, coarse, **given).params)
        for given in ({}, {"dense": params})
    ]
    assert all(isinstance(x, QTensor) for x in both)
    errors = [float(jnp.abs(x.dequantize() - dense).max()) for x in both]
    packed = float(jnp.abs(leaf(coarse).dequantize() - dense).max())
    assert errors[1] < packed / 4
    assert errors[0] > packed / 2


def test_auto_of_a_section(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, params = tiny()
    auto = {"probe_rounds": 3, "off_below": 99.0, "widths": [1, 2]}
    options = DraftOptions(method="prompt_lookup", num_tokens=1, auto=auto)
    drafter = make_drafter(options, model, params)
    run = model, params, PROMPTS[:1]
    out, plan = generate_as(options, *run, drafter=drafter, max_new_tokens=NEW)
    assert plan is not None and not plan.on  # nothing is 99 times faster
    plain = autoregressive(*run, max_new_tokens=NEW)
    np.testing.assert_array_equal(out.tokens, plain.tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"method": "eagle3", "path": "none"}, "draft.path: no folder"),
        ({"method": "eagle3", "path": "dflash"}, "no EAGLE-3 head"),
        ({"method": "dflash", "path": "mtp"}, "no block drafter"),
        ({"method": "mtp", "path": "dflash"}, "no MTP layer"),
        ({"method": "mtp", "path": "mtp", "options": {"a": 1}}, "mtp takes none"),
        ({"method": "eagle3", "path": "eagle3", "options": {"node": 8}}, "did you"),
        (
            {
                "method": "eagle3",
                "path": "eagle3",
                "options": {"nodes": 8},
                "num_tokens": 2,
            },
            "a tree and draft.num_tokens a chain",
        ),
        ({"method": "dflash", "path": "dflash", "num_tokens": 4}, "from 1 to 3"),
        ({"method": "draft_model", "model": "other"}, "vocabulary of 40"),
        ({"method": "layer_skip", "layers": [2]}, "layer 2 is none of the model's 2"),
        ({"method": "self_quant", "recipe": "int4-g128-gptq"}, "draft.recipe"),
        ({"method": "self_quant", "recipe": "spec-hybrid"}, "has no rules"),
        ({"method": "self_quant", "recipe": "sparse-none"}, "no recipe"),
        ({"method": "recycling", "nodes": 1}, "draft.nodes"),
        ({"method": "hybrid", "path": "eagle3", "nodes": 9}, "draft.options describes"),
        ({"method": "hybrid", "flat_ngram": 2}, "with a head"),
    ],
)
def test_refusals(text, message, folders):
    with pytest.raises(ValueError, match=message) as e:
        made(text, folders)
    assert "\n" not in str(e.value)
