# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/angeljax/angeljax/blob/main/notebooks/sparse_attention.ipynb)
#
# # Long prompts with Stem
#
# Attention compares every token with every earlier one: a prompt of twice the length takes
# four times the work. But most of these comparisons come to nothing. Stem guesses, for each
# block of queries, which blocks of keys matter, and a kernel reads those alone. Nothing is
# trained and no weight changes.
#
# You will look at what a model attends to, let Stem choose a quarter of it, measure what that
# costs, compare other selectors at the same density, and put it into a model of your own. It
# takes some minutes on a CPU. On a Hopper GPU (H100, H200) you will also see it become
# faster; elsewhere the same is computed by XLA, which says little about speed.
#
# The outputs that are kept here are from a CPU.

# %%
import sys

if "google.colab" in sys.modules:
    import subprocess

    package = "angeljax[report] @ git+https://github.com/angeljax/angeljax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %%
import dataclasses
import functools
import os
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import angeljax as aj
from angeljax.attention import (
    Place,
    SparseAttention,
    attention_report,
    plots,
    selector,
    sparse_attention,
)
from angeljax.evaluation import load_text
from angeljax.models import LanguageModel, causal_attention, stack_layers

SMOKE = bool(os.environ.get("ANGELJAX_SMOKE"))  # the tests: a tiny random model
CPU = jax.default_backend() == "cpu"
if SMOKE:
    from smoke import load_model

    LENGTH, BLOCK, TAIL, ROWS, STRIDE = 256, 8, 64, 8, 4
    KERNEL = "reference"  # the slow one that all others are tested against
else:
    from angeljax.models import load_model

    # SmolLM2 reads at most 8192 tokens; the Hopper kernel takes blocks of 128.
    LENGTH, BLOCK = (4096, 64) if CPU else (8192, 128)
    TAIL, ROWS, STRIDE = 1024, 64, 8
    KERNEL = None  # the one for the device
BLOCKS = LENGTH // BLOCK

# %% [markdown]
# ## A model and a long prompt
#
# The text is the language reference that comes with every Python.

# %%
# bfloat16 is for GPUs from Ampere on and for TPUs; a T4 is older.
recent = float(getattr(jax.devices()[0], "compute_capability", 8)) >= 8
dtype = jnp.bfloat16 if recent and not CPU else jnp.float32
loaded = load_model("smollm2", dtype=dtype, compute_dtype=dtype)
tokenizer, config = loaded.tokenizer, loaded.model.config
params = stack_layers(loaded.params)
model = LanguageModel(config, dtype, scan_layers=True, attention_fn=causal_attention)

ids = tokenizer.encode(load_text()[: 8 * LENGTH])[: LENGTH + 1]
tokens, targets = jnp.asarray([ids[:-1]]), jnp.asarray(ids[-TAIL:])
print(f"{config.num_layers} layers, {config.num_heads} heads, {LENGTH} tokens")
print(
    f"{BLOCKS} x {BLOCKS} blocks of {BLOCK} tokens, {BLOCKS * (BLOCKS + 1) // 2} causal"
)

# %% [markdown]
# ## What a head attends to
#
# The queries and keys of one layer, and the softmax of one head, summed over blocks. Mind the
# logarithm: a step of color is a factor of ten.

# %%
LAYER, HEAD = config.num_layers // 2, 0


@functools.partial(jax.jit, static_argnames=("model", "layer"))
def inside(params, tokens, model, layer):
    return model.features(params, tokens, relations=(layer,)).qkv[0]


@jax.jit
def block_mass(q, k):
    """How much of the attention of each query block goes to each key block."""
    logits = q @ k.T * q.shape[1] ** -0.5
    seen = jnp.tril(jnp.ones(logits.shape, bool))
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return weights.reshape(BLOCKS, BLOCK, BLOCKS, BLOCK).sum((1, 3)) / BLOCK


q, k, v = inside(params, tokens, model, LAYER)
group = config.num_heads // config.num_kv_heads
one_q, one_k = (x.astype(jnp.float32) for x in (q[0, :, HEAD], k[0, :, HEAD // group]))
mass = np.asarray(block_mass(one_q, one_k))
best = np.sort(mass, axis=-1)[:, ::-1].cumsum(-1)[:, BLOCKS // 4 - 1]
print(
    f"the best {BLOCKS // 4} blocks of each row hold {best.mean():.1%} of its attention"
)

# %% [markdown]
# ## Guessing it cheaply
#
# To choose blocks one must know the scores, and to know all scores is the very work that we
# want to save. Stem looks at every $S$-th pair of a query and a key, along anti-diagonals, and
# takes the mean over the block. A mean of products of sums is a product of means: with
# $\hat Q_{i,t}$ the mean of every $S$-th query of block $i$, beginning with its $t$-th,
#
# $$L_{ij} = \frac{1}{S\sqrt D}\sum_t \hat Q_{i,\,S-1-t}\cdot \hat K_{j,\,t}
# \;+\;\lambda\, b_j$$
#
# is one small matrix product for each head. $b_j$ is a bonus for blocks with large values: a
# key with weight and no value adds nothing ([Stem, arXiv
# 2603.06274](https://arxiv.org/abs/2603.06274)).


# %%
@jax.jit
def block_scores(q, k):
    """The first part of the formula: `[T, D]` of one head to `[blocks, blocks]`."""
    dim = q.shape[1]
    queries, keys = (x.reshape(BLOCKS, -1, STRIDE, dim).mean(1) for x in (q, k))
    product = queries.reshape(BLOCKS, -1) @ keys[:, ::-1].reshape(BLOCKS, -1).T
    return product / (STRIDE * dim**0.5)


# Stem with a quarter of the causal blocks.
SHARE = 0.25
options = {"block_size": BLOCK, "budget_mode": "density", "keep_ratio": SHARE}
shape = {"dense_layers": 0, "sink_blocks": 1, "window_blocks": 2, "stride": STRIDE}
stem = selector("stem", **options, **shape)
lists = jax.jit(stem.select, static_argnums=3)(q, k, v, Place())
chosen = np.asarray(lists.to_mask(BLOCKS)[0])

causal = np.tril(np.ones((BLOCKS, BLOCKS), bool))
scores = np.where(causal, np.asarray(block_scores(one_q, one_k)), np.nan)
panels = {
    "attention, log10": np.where(causal, np.log10(mass + 1e-6), np.nan),
    "Stem's guess": scores,
    "blocks that are read": np.where(causal, chosen[HEAD], np.nan),
}
figure, axes = plt.subplots(1, 3, figsize=(10, 3.3), dpi=80, layout="constrained")
for axis, (title, image) in zip(axes, panels.items(), strict=True):
    axis.imshow(image, interpolation="nearest", extent=(0, LENGTH, LENGTH, 0))
    axis.set(title=f"{title}\nlayer {LAYER}, head {HEAD}", xlabel="key")
axes[0].set(ylabel="query")
plt.show()
print(f"lists {list(lists.indices.shape)}: each at most {lists.width} key blocks")
kept = (mass * chosen[HEAD]).sum(-1).mean()
print(f"{chosen[HEAD].sum() / causal.sum():.1%} of the blocks hold {kept:.1%}")

# %% [markdown]
# Every head has a choice of its own. The first rows keep all they see: budgets are largest
# at the beginning and fall towards the end, for what an early token gets wrong every later
# one reads.

# %%
plots.block_mask(chosen, block_size=BLOCK, title=f"layer {LAYER}")

# %% [markdown]
# ## Layer by layer
#
# `recall` is the share of the dense attention that lies in blocks that are read, for queries
# all over the prompt.

# %%
report = attention_report(model, params, tokens, stem, rows=ROWS)
figure, axis = plt.subplots(figsize=(8, 2.6), dpi=80, layout="constrained")
layers = np.asarray(report.layers)
axis.bar(layers, report.recall.mean(1), color="#4477aa", label="recall, mean of heads")
axis.plot(layers, report.recall.min(1), "k_", label="recall, worst head")
axis.plot(layers, report.density.mean(1), color="#cc6677", label="blocks read")
axis.set(xlabel="layer", ylim=(0, 1.02))
axis.legend(fontsize=8, loc="lower right")
plt.show()
print(f"blocks read {report.density.mean():.1%}, recall {report.recall.mean():.1%}")

# %% [markdown]
# ## What it costs
#
# The same model twice: `SparseAttention` in place of the attention function is all that
# differs. The prompt is read sparsely, and its last tokens are predicted. (`dense_below=0`:
# prompts under 4096 tokens would otherwise be dense, as nothing is gained there.)


# %%
@functools.partial(jax.jit, static_argnames="model")
def predict(params, tokens, model):
    """Log-probabilities of the tokens that follow the last ones."""
    module = model.bind(params)
    final = module.features(tokens).final[:, -TAIL:]
    return jax.nn.log_softmax(module.head(final)[0].astype(jnp.float32))


@jax.jit
def compare(got, want):
    loss = -jnp.take_along_axis(got, targets[:, None], axis=-1).mean()
    kl = (jnp.exp(want) * (want - got)).sum(-1).mean()
    return jnp.exp(loss), kl, (got.argmax(-1) == want.argmax(-1)).mean()


def reading(selector, **more):
    fn = SparseAttention(
        selector, dense_below=0, dense_above=1.0, implementation=KERNEL, **more
    )
    return dataclasses.replace(model, attention_fn=fn)


dense = predict(params, tokens, model)
perplexity, *_ = compare(dense, dense)
print(f"dense  perplexity {perplexity:.3f}")
sparse = reading(stem)
perplexity, kl, same = compare(predict(params, tokens, sparse), dense)
print(f"Stem   perplexity {perplexity:.3f}, KL {kl:.4f} nats, same choice {same:.1%}")

# %% [markdown]
# ## Other selectors, at the same density
#
# Whoever reads more blocks loses less, so that selectors are only comparable at equal
# density. `a_shape` looks at positions alone: the first and the nearest blocks. The others
# look at queries and keys, each in its way
# ([all of them](https://github.com/angeljax/angeljax/blob/main/docs/guides/sparse_attention.md)).
# `hybrid` has A-shape in every second layer and Stem in the others. `Stem + means` lets each
# block that is not read count as its mean key and value.

# %%
window = min(
    range(BLOCK, LENGTH, BLOCK),
    key=lambda w: abs(
        selector(
            "a_shape", block_size=BLOCK, sink_tokens=BLOCK, window_tokens=w
        ).density(LENGTH)
        - SHARE
    ),
)
a_shape = selector("a_shape", block_size=BLOCK, sink_tokens=BLOCK, window_tokens=window)
by_turns = tuple(i % 2 for i in range(config.num_layers))
rows = {
    "Stem": sparse,
    "Stem + means": reading(stem, mean_correction=True),
    "A-shape": reading(a_shape),
    "hybrid": reading(selector("hybrid", selectors=(stem, a_shape), layers=by_turns)),
}
for name in ("xattention", "flashprefill", "flexprefill"):
    rows[name] = reading(selector(name, block_size=BLOCK, keep_ratio=SHARE))
if SMOKE:
    rows = {name: rows[name] for name in ("Stem", "A-shape")}
found = {name: compare(predict(params, tokens, m), dense) for name, m in rows.items()}
for name, (perplexity, kl, same) in found.items():
    read = rows[name].attention_fn.selector.density(
        LENGTH, num_layers=config.num_layers
    )
    print(
        f"{name:13} {read:5.1%} perplexity {perplexity:.3f} KL {kl:.4f} same {same:.1%}"
    )

figure, axis = plt.subplots(figsize=(6, 2.6), dpi=80, layout="constrained")
axis.barh(list(found), [float(kl) for _, kl, _ in found.values()], color="#4477aa")
axis.set(xlabel="KL to dense attention (nats)", title=f"{SHARE:.0%} of the blocks")
axis.invert_yaxis()
plt.show()

# %% [markdown]
# One text and one length: enough to see orders of magnitude, too little for a ranking.
# [Measured with more](https://github.com/angeljax/angeljax/blob/main/docs/results_attention.md).
#
# ## A prompt in chunks
#
# A server reads long prompts in chunks, so that others need not wait. Stem's budgets follow
# the length of the whole prompt and its statistics look backwards only, so that chunks choose
# what the prompt would have chosen in one piece. Here for the layer from above; in the decoder
# it is `model.apply(params, tokens, cache=cache, start=..., total=...)`.

# %%
static = ("selector", "q_offset", "total", "dense_below", "implementation")
attend = jax.jit(sparse_attention, static_argnames=static)
how = {"dense_below": 0, "implementation": KERNEL}

whole = attend(q, k, v, selector=stem, **how)
half = LENGTH // 2
second = attend(q[:, half:], k, v, selector=stem, q_offset=half, total=LENGTH, **how)
error = jnp.abs(second - whole[:, half:]).max() / jnp.abs(whole).max()
print(f"largest difference {error:.1e} of the largest output")
print(
    "the second half, as a chunk of its own, is the same:",
    bool(error < (1e-4 if dtype == jnp.float32 else 2e-2)),
)

# %% [markdown]
# ## Speed
#
# One layer, random queries, keys and values, selection included. On a Hopper GPU the baseline
# is cuDNN's attention and the blocks go through our own kernel. Other NVIDIA GPUs have one in
# Triton (`pip install 'angeljax[gpu]'`). On anything else XLA gathers the blocks, and dense
# attention on a CPU is a plain softmax over all scores.

# %%
hopper = any(name in jax.devices()[0].device_kind for name in ("H100", "H200"))
heads, kv_heads, dim = config.num_heads, config.num_kv_heads, config.head_dim
if not CPU:
    heads, kv_heads, dim = 32, 8, 128  # as in a model of 8 billion parameters
lengths = (16384, 32768, 65536) if hopper else (1024, 2048, 4096)
lengths = (LENGTH,) if SMOKE else lengths
everything = selector("dense", block_size=BLOCK)


def milliseconds(selector, *arrays):
    jax.block_until_ready(attend(*arrays, selector=selector, **how))
    runs = []
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready(attend(*arrays, selector=selector, **how))
        runs.append(time.perf_counter() - began)
    return 1e3 * min(runs)


print(jax.devices()[0].device_kind)
for length in lengths:
    shapes = [(1, length, h, dim) for h in (heads, kv_heads, kv_heads)]
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(a, b, dtype) for a, b in zip(keys, shapes, strict=True)]
    times = [milliseconds(chosen, *arrays) for chosen in (everything, stem)]
    print(
        f"{length:6} tokens: dense {times[0]:8.2f} ms, Stem {times[1]:8.2f} ms, "
        f"{times[0] / times[1]:.2f}x"
    )

# %% [markdown]
# ## In your own model
#
# Flax's attention layers take a function. Hand them one that reads sparsely; a call with a
# single query, as in decoding, goes to the original.

# %%
from flax import nnx

from angeljax.attention import nnx_attention_fn

x = jax.random.normal(jax.random.key(1), (1, LENGTH, 32))
near = selector("stem", **(options | shape | {"keep_ratio": 0.5}))

layer = nnx.MultiHeadAttention(
    num_heads=2,
    in_features=32,
    attention_fn=nnx_attention_fn(near, **how),
    rngs=nnx.Rngs(0),
)
y = nnx.jit(lambda layer, x: layer(x, is_causal=True, decode=False))(layer, x)
print("nnx  ", y.shape)

# %% [markdown]
# In linen it is `nn.MultiHeadDotProductAttention(num_heads=2,
# attention_fn=linen_attention_fn(near, causal=True))`. In a function of your own call
# `sparse_attention(q, k, v, selector)` where you called
# `jax.nn.dot_product_attention(q, k, v, is_causal=True)`.
#
# ## In a recipe
#
# A recipe may say how prompts are read, alone or beside rules for the weights. It travels
# with the checkpoint, and `angeljax generate` and `angeljax eval` follow it. This one
# describes the very model that you measured.

# %%
recipe = aj.Recipe.from_yaml(f"""
name: my-stem
attention:
  selector: stem
  dense_below: 0
  dense_above: 1.0
  options:
    block_size: {BLOCK}
    stride: {STRIDE}
    budget_mode: density
    keep_ratio: {SHARE}
    dense_layers: 0
    sink_blocks: 1
    window_blocks: 2
""")
print(recipe.attention.attention_fn().selector == stem)

# %% [markdown]
# On the command line, with a recipe that comes with angeljax:
#
# ```
# angeljax eval --model smollm2 --reference smollm2 --length 8192 --attention stem_25
# ```
#
# What to try next: another `SHARE`, another layer and head, `value_weight=0` (no bonus) or
# `alpha=1` (no decay) in Stem, a text of your own. Next:
# [Block-sparse attention](https://github.com/angeljax/angeljax/blob/main/docs/guides/sparse_attention.md).
