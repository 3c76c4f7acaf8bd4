"""Language models of hosts that see and hear: text after a prompt of embeddings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.models import (
    WhisperText,
    load_whisper,
    stack_layers,
    transcribe_tokens,
    whisper_text,
)
from angeljax.speculative import (
    DraftModel,
    EagleConfig,
    EagleDrafter,
    Hybrid,
    PromptLookup,
    Sampling,
    SelfDrafter,
    TokenRecycling,
    autoregressive,
    divergences,
    generate,
    init_eagle,
)
from angeljax.tokens import Prompt, apply_selection
from tests.models.test_qwen_vl import KINDS, read, row, select
from tests.models.test_whisper import HIGHEST, expected, golden, write_folder
from tests.speculative._cases import PROMPTS, tiny

NEW = 12
DRAFTERS = {
    "lookup": PromptLookup(3),
    "tree": Hybrid(TokenRecycling(9), PromptLookup(3)),
    "layers": SelfDrafter(num_tokens=2, layers=(0,)),
}


@pytest.mark.parametrize(
    ("kind", "name"), [*((KINDS[-1], name) for name in DRAFTERS), (KINDS[0], "tree")]
)
def test_text_after_images_is_the_hosts(kind, name):
    """Rows of different lengths, M-RoPE, and for one kind planes behind layers."""
    model, params, data, prompt = read(kind)
    own = model.language, params["language"], prompt
    out = generate(*own, drafter=DRAFTERS[name], max_new_tokens=NEW, stop_tokens=())
    first = data["greedy"].shape[1]
    np.testing.assert_array_equal(out.tokens[:, :first], data["greedy"])
    host = model.generate(params, prompt, max_new_tokens=NEW, eos_ids=())
    np.testing.assert_array_equal(out.tokens, host.tokens)


def test_text_after_a_pruned_prompt_of_scanned_layers():
    """Decoding goes on where the whole prompt ended, not where its rest does."""
    model, params, data, prompt = read("qwen3_vl")
    prompt = row(prompt)
    chosen, where = select(model, prompt, data["keep"])
    short = apply_selection(chosen, prompt, where)
    scanned = dataclasses.replace(model.language, scan_layers=True)
    own = scanned, stack_layers(params["language"]), short
    out = generate(*own, drafter=PromptLookup(3), max_new_tokens=5, stop_tokens=())
    np.testing.assert_array_equal(out.tokens[0], data["keep_greedy"])


def test_embeddings_of_tokens_are_tokens():
    """Features of a prompt of embeddings reach a head, padded on the left or not."""
    model, params = tiny()
    size = max(map(len, PROMPTS))
    real = np.asarray([[i >= size - len(p) for i in range(size)] for p in PROMPTS])
    tokens = np.zeros(real.shape, np.int32)
    tokens[real] = np.concatenate(PROMPTS)
    embeds = model.embed(params, jnp.asarray(tokens))
    prompt = Prompt(embeds=embeds, tokens=jnp.asarray(tokens), mask=jnp.asarray(real))
    config = EagleConfig.of(model.config)
    head = init_eagle(config, jax.random.key(1), target=params, norm_scale=1.0)
    options = {
        "drafter": EagleDrafter(config, head),
        "max_new_tokens": NEW,
        "sampling": Sampling(temperature=0.8),
    }
    out = generate(model, params, prompt, **options)
    same = generate(model, params, PROMPTS, **options)
    np.testing.assert_array_equal(out.tokens, same.tokens)
    np.testing.assert_array_equal(out.stats.hits, same.stats.hits)


def test_prompts_that_cannot_be_read():
    model, params = tiny()
    embeds = jnp.zeros((1, 3, 16))
    options = {"drafter": PromptLookup(2), "max_new_tokens": 4}
    for prompt, says in (
        (Prompt(embeds=embeds[..., :8]), "must be .batch, length, 16"),
        (Prompt(embeds=embeds, mask=jnp.zeros((1, 3), bool)), "no real token"),
        (Prompt(embeds=embeds, tokens=jnp.full((1, 3), 99)), "token 99 in a prompt"),
    ):
        with pytest.raises(ValueError, match=says):
            generate(model, params, prompt, **options)
    plain = autoregressive(model, params, [[1]], max_new_tokens=2)
    with pytest.raises(ValueError, match="must be tokens here"):
        divergences(model, params, Prompt(embeds=embeds), plain, plain)
    with pytest.raises(ValueError, match="WhisperText is none"):
        text = WhisperText(None, 1)  # looked at for its type alone
        generate(text, params, Prompt(embeds=embeds), **options)


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """A Whisper model, and the features of two clips."""
    found = load_whisper(write_folder(tmp_path_factory.mktemp("whisper")))
    with HIGHEST():
        mel = jnp.asarray(golden()["mel80"])
        lengths = jnp.asarray([50, 28])
        audio = jax.jit(found.model.encode)(found.params, mel, lengths=lengths)
    return found.model, found.params, audio.features


@pytest.mark.parametrize("name", ["tree", "copy", "model"])
def test_transcripts_are_whispers(heard, name):
    model, params, features = heard
    with HIGHEST():
        run = whisper_text(model, params, features)
        drafter = DRAFTERS.get(name)
        if name == "copy":
            rules = [aj.Rule(match="decoder/.*kernel", format="int8")]
            small = aj.compress(params, aj.Recipe(rules=rules), progress=False)
            drafter = SelfDrafter({**run[1], "model": small}, num_tokens=3)
        if name == "model":
            drafter = DraftModel(run[0], run[1], num_tokens=3)
        room = expected("greedy", 22).shape[1]
        out = generate(*run, drafter=drafter, max_new_tokens=room)
    np.testing.assert_array_equal(out.tokens, expected("greedy", 22))
    assert out.lengths.tolist() == [4, 8]
    if name == "model":
        assert out.tau > 3  # it is the same model


def test_suppressed_tokens_stay_so(heard):
    """The likeliest ones are forbidden, at the beginning or everywhere."""
    model, params, features = heard
    first, second = (int(x) for x in golden()["greedy"][1, :2])
    config = dataclasses.replace(
        model.config, begin_suppress_ids=(first,), suppress_ids=(second,)
    )
    model = dataclasses.replace(model, config=config)
    with HIGHEST():
        plain = transcribe_tokens(model, params, features)
        run = whisper_text(model, params, features)
        out = generate(*run, drafter=PromptLookup(3), max_new_tokens=22)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    assert second not in np.asarray(out.tokens)
