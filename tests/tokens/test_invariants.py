"""A decoder that reads a pruned prompt, against one that may not look at those tokens.

The oracle runs the long sequence with a mask, layer by layer, and never shortens it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.models import generate, init_cache
from angeljax.models.prompts import decoder_inputs
from angeljax.tokens import Prompt, Selection, apply_selection
from tests.tokens._models import CONFIG, MODEL, dense, params

B, L, STEPS = 2, 13, 3
SPANS = [(1, 4), (6, 9)]
AT = np.array([1, 2, 3, 6, 7, 8])
KEPT = [[0, 3, 5], [4, 6, 6]]  # of six tokens; row 1 keeps one


@pytest.fixture
def case(rng):
    """A prompt of two images, the tokens that follow it, and which tokens stay."""
    embeds = rng.normal(size=(B, L, 16)).astype(np.float32)
    planes = np.zeros((2, B, L, 16), np.float32)
    planes[:, :, AT] = rng.normal(size=(2, B, 6, 16))
    mask = np.ones((B, L), bool)
    mask[1, :1] = False  # padding on the left
    stays = mask.copy()
    for b in range(B):
        for i, place in enumerate(AT):
            stays[b, place] &= i in KEPT[b]
    following = rng.integers(0, 24, (B, STEPS))
    long = np.concatenate(
        [embeds, np.asarray(MODEL.embed(params(), jnp.asarray(following)))], axis=1
    )
    more = np.ones((B, STEPS), bool)
    return {
        "embeds": embeds,
        "planes": planes,
        "mask": mask,
        "stays": np.concatenate([stays, more], axis=1),
        "following": following,
        "long": long,
        "long_planes": np.pad(planes, ((0, 0), (0, 0), (0, STEPS), (0, 0))),
    }


def rotary(policy, stays):
    """Positions [3, B, L + STEPS]: the image on a grid, later text behind it."""
    if policy == "compact":
        return np.stack([np.maximum(np.cumsum(stays, 1) - 1, 0)] * 3)
    t, h, w = [], [], []
    for start in (1, 4):  # three tokens of an image, then three or more of text
        t += [start] * 3 + [start + 2, start + 3]
        h += [start, start + 1, start + 1] + [start + 2, start + 3]
        w += [start, start, start + 1] + [start + 2, start + 3]
    axes = [[0, *x, *range(x[-1] + 1, x[-1] + 3 + STEPS)] for x in (t, h, w)]
    return np.broadcast_to(np.array(axes)[:, None], (3, B, L + STEPS))


@functools.partial(jax.jit, static_argnames="slots")
def prefill(inputs, slots):
    cache = init_cache(CONFIG, B, slots, jnp.float32)
    return MODEL.apply(params(), **inputs, cache=cache)


@jax.jit
def read(cache, token):
    return MODEL.apply(params(), token[:, None], cache=cache)


@pytest.mark.parametrize("policy", ["keep", "compact"])
@pytest.mark.parametrize("beside", ["vision", "sequence"])
def test_as_if_the_pruned_tokens_were_masked(case, policy, beside):
    where = rotary(policy, case["stays"])
    given = rotary("keep", None)[:, :, :L]
    want, _ = dense(case["long"], [where] * 3, [case["stays"]] * 3, case["long_planes"])
    planes = case["planes"] if beside == "sequence" else case["planes"][:, :, AT]
    prompt = Prompt(
        embeds=jnp.asarray(case["embeds"]),
        mask=jnp.asarray(case["mask"]),
        positions=jnp.asarray(given),
        deepstack=tuple(map(jnp.asarray, planes)),
    )
    chosen = Selection.of(jnp.array(KEPT), 6)
    side = "left" if beside == "vision" else "right"
    short = apply_selection(
        chosen, prompt, SPANS, position_policy=policy, padding_side=side
    )
    assert short.next_position.tolist() == where[:, :, L].max(0).tolist()
    logits, cache = prefill(decoder_inputs(short), L - 3 + STEPS)
    for b in range(B):
        np.testing.assert_allclose(
            logits[b][short.prompt.mask[b]],
            want[b, :L][case["stays"][b, :L]],
            atol=2e-5,
        )
    for i in range(STEPS):
        step, cache = read(cache, jnp.asarray(case["following"][:, i]))
        np.testing.assert_allclose(step[:, 0], want[:, L + i], atol=2e-5)


def test_generation_goes_on_after_a_pruned_prompt(case):
    prompt = Prompt(embeds=jnp.asarray(case["embeds"]), mask=jnp.asarray(case["mask"]))
    chosen = Selection.of(jnp.array(KEPT), 6)
    short = apply_selection(chosen, prompt, SPANS, padding_side="left")
    got = generate(
        MODEL, params(), **decoder_inputs(short), max_new_tokens=STEPS, eos_ids=()
    ).tokens
    # One token after the other through the oracle, from the unpruned sequence.
    long, seen = case["embeds"], case["stays"]
    where = np.maximum(np.cumsum(np.pad(case["mask"], ((0, 0), (0, STEPS)),
                                        constant_values=True), 1) - 1, 0)  # fmt: skip
    for i in range(STEPS):
        length = long.shape[1]
        positions = np.stack([where[:, :length]] * 3)
        logits, _ = dense(long, [positions] * 3, [seen[:, :length]] * 3)
        token = logits[:, -1].argmax(-1)
        np.testing.assert_array_equal(got[:, i], token)
        new = np.asarray(MODEL.embed(params(), jnp.asarray(token)[:, None]))
        long = np.concatenate([long, new], axis=1)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_cache_that_was_filled_before_pruning(case, stacked):
    """Text has seen the pruned tokens, and what is decoded later does not."""
    where = rotary("keep", None)
    prompt = Prompt(
        embeds=jnp.asarray(case["embeds"]),
        mask=jnp.asarray(case["mask"]),
        positions=jnp.asarray(where[:, :, :L]),
    )
    inputs = {"embeds": prompt.embeds, "mask": prompt.mask}
    _, cache = prefill({**inputs, "positions": prompt.positions}, L + STEPS)
    # The oracle: the same cache in which the pruned slots are not seen any more.
    unseen = jnp.where(jnp.asarray(case["stays"]), cache.positions, -1)
    masked = type(cache)(cache.k, cache.v, unseen, cache.length, None, cache.rope_delta)
    if stacked:
        k, v = jnp.stack(cache.k), jnp.stack(cache.v)
        cache = type(cache)(k, v, *list(vars(cache).values())[2:])
    full = Prompt(embeds=prompt.embeds, mask=prompt.mask, cache=cache)
    chosen = Selection.of(jnp.array(KEPT), 6)
    short = apply_selection(chosen, full, SPANS).prompt.cache
    assert short.positions.shape[1] == L + STEPS - 3
    assert int(jnp.max(short.positions)) == L - 3 - 1
    for i in range(STEPS):
        token = jnp.asarray(case["following"][:, i])
        want, masked = read(masked, token)
        got, short = read(short, token)
        np.testing.assert_allclose(got, want, atol=2e-5)
