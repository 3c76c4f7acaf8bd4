"""The block drafter and the MTP layer in decoding, and their files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.speculative import (
    BlockConfig,
    BlockDrafter,
    BlockModel,
    MTPDrafter,
    MTPModel,
    Sampling,
    autoregressive,
    generate,
)
from tests.models._random_params import random_params
from tests.speculative._cases import PROMPTS, tiny

NEW = 20


def block_drafter(block_size=4, num_tokens=None):
    model, _ = tiny()
    block = BlockModel(
        BlockConfig.of(
            model.config, num_layers=2, block_size=block_size, mask_token_id=31
        )
    )
    return BlockDrafter(block, random_params(block, std=0.3), num_tokens)


def mtp_drafter(num_tokens=3):
    mtp = MTPModel(tiny()[0].config)
    return MTPDrafter(mtp, random_params(mtp, seed=2, std=0.3), num_tokens)


DRAFTERS = {"block": block_drafter, "mtp": mtp_drafter}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "four"])
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.8, seed=3)], ids=["greedy", "drawn"]
)
def test_text_is_that_of_plain_decoding(name, prompts, sampling):
    model, params = tiny()
    options = {"max_new_tokens": NEW, "sampling": sampling}
    drafter = DRAFTERS[name]()
    out = generate(model, params, prompts, drafter=drafter, **options)
    plain = autoregressive(model, params, prompts, width=drafter.width, **options)
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    # Drafts were made: a single token leaves the first round of MTP without.
    want = out.stats.rounds * (drafter.width - 1)
    short = np.asarray([len(p) == 1 and name == "mtp" for p in prompts])
    np.testing.assert_array_equal(out.stats.drafted, want - short * (drafter.width - 1))
