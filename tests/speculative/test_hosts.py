"""Language models of hosts that see and hear: text after a prompt of embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from angeljax.models import stack_layers
from angeljax.models.rows import RowInputs
from angeljax.speculative import (
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
from angeljax.tokens import Prompt
from tests.models.test_qwen_vl import KINDS, read
from tests.speculative._cases import PROMPTS, tiny

NEW = 12
DRAFTERS = {
    "lookup": PromptLookup(3),
    "tree": Hybrid(TokenRecycling(9), PromptLookup(3)),
    "layers": SelfDrafter(num_tokens=2, layers=(0,)),
}


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_text_after_images_is_the_hosts(kind, name):
    """Rows of different lengths, M-RoPE, and for one kind planes behind layers."""
    model, params, data, prompt = read(kind)
    own = model.language, params["language"], prompt
    out = generate(*own, drafter=DRAFTERS[name], max_new_tokens=NEW, stop_tokens=())
    first = data["greedy"].shape[1]
    np.testing.assert_array_equal(out.tokens[:, :first], data["greedy"])
    host = model.generate(params, prompt, max_new_tokens=NEW, eos_ids=())
    np.testing.assert_array_equal(out.tokens, host.tokens)
