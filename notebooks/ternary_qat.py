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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/angeljax/angeljax/blob/main/notebooks/ternary_qat.ipynb)
#
# # Train a 1.25-bit model
#
# Sherry stores four weights in five bits: three of them are -1 or +1, one is 0, and a scale
# stands before all. Round a trained model to that and it babbles. So you will train the model
# *while* it is rounded, with the original as its teacher, and get most of it back.
#
# You need a GPU (in Colab: Runtime, Change runtime type). The two training runs below are
# short; a real one sees many more tokens.
#
# The outputs that are kept here are of the smoke mode of the tests: a tiny random model and
# a dozen steps. Run it to see real ones; [results of training](https://github.com/angeljax/angeljax/blob/main/docs/results_training.md)
# has what was measured with SmolLM2.

# %%
import sys

if "google.colab" in sys.modules:
    import subprocess

    package = "angeljax[report] @ git+https://github.com/angeljax/angeljax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %%
import functools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import angeljax as aj
from angeljax.evaluation import evaluate, load_text, windows
from angeljax.models import LanguageModel, generate, stack_layers

SMOKE = bool(os.environ.get("ANGELJAX_SMOKE"))  # the tests: a tiny model, a few steps
if SMOKE:
    from smoke import load_model

    STEPS, BATCH, LENGTH, EVERY = 12, 2, 32, 4
    TEXT, CHARACTERS, MATCH = None, 20_000, ".*up_proj/kernel"
else:
    from angeljax.models import load_model

    STEPS, BATCH, LENGTH, EVERY = 1000, 8, 512, 50
    # A text file or a dataset; the first use fetches it.
    TEXT = os.environ.get(
        "ANGELJAX_TEXT", "Salesforce/wikitext:wikitext-2-raw-v1:train"
    )
    CHARACTERS = MATCH = None  # all of the text, and all linear layers

# %% [markdown]
# ## The model, and some text
#
# Latent weights are float32: the steps of training are smaller than the spacing of bfloat16.
# The layers become one stack, so that one layer is compiled and not thirty.

# %%
compute = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
loaded = load_model("smollm2", dtype=jnp.float32, compute_dtype=compute)
tokenizer = loaded.tokenizer
model = LanguageModel(loaded.model.config, loaded.model.dtype, scan_layers=True)
teacher = stack_layers(loaded.params)

ids = np.asarray(tokenizer.encode(load_text(TEXT)[:CHARACTERS]), np.int32)
held_out, stream = ids[: 4 * LENGTH], ids[4 * LENGTH :]
cut = windows(held_out, LENGTH)
blocks = stream[: len(stream) // LENGTH * LENGTH].reshape(-1, LENGTH)
print(f"{len(stream) / 1e3:.0f} thousand tokens to train on, {len(held_out)} held out")
print(f"a run sees {STEPS * BATCH * LENGTH / 1e3:.0f} thousand")


def answer(params, prompt="Explain in one sentence why the sky is blue."):
    tokens = jnp.asarray([tokenizer.encode(tokenizer.chat(prompt))])
    out = generate(model, params, tokens, max_new_tokens=8 if SMOKE else 48)
    return tokenizer.decode(out.tokens[0, : int(out.lengths[0])].tolist()).strip()


def measure(params):
    return evaluate(model.logits, params, cut, reference=teacher, progress=False)


full = measure(teacher)
print(f"\nfull precision: perplexity {full.perplexity:.2f}")
print(answer(teacher))

# %% [markdown]
# ## Rounded without training, it babbles
#
# The recipe takes the linear layers; the embedding stays as it is.

# %%
recipe = aj.Recipe(
    name="sherry-arenas",
    rules=[aj.Rule(match=MATCH, format="sherry", granularity="channel")],
    arenas=aj.qat.Arenas(warmup=0.1, end=0.9),
)
rounded = aj.compress(teacher, recipe, progress=False)
before = measure(rounded)
print(rounded["layers"]["mlp"]["up_proj"]["kernel"])
print(f"rounded: perplexity {before.perplexity:.3g}, KL {before.kl:.2f} nats")
print(answer(rounded))

# %% [markdown]
# ## Arenas: let go slowly
#
# Rounding has no gradient, so training hands the gradient of the rounded weight on to the
# latent one as if nothing had been rounded. With few levels that gets stuck: all weights drift
# to the same few places and stop changing their codes. Arenas adds a little of the latent
# weight back,
#
# $$Y = X\,Q(W) + \lambda_t\,X W,$$
#
# and takes it away again before the end, so that nothing of it is left in the deployed model
# ([Sherry, arXiv 2601.07892](https://arxiv.org/abs/2601.07892)).

# %%
qat = aj.qat.make(recipe, total_steps=STEPS)
state = qat.init(teacher)  # empty here; learned scales would be in it

steps = np.arange(STEPS + 1)
figure, axes = plt.subplots(figsize=(6, 2.6), dpi=80, layout="constrained")
axes.plot(steps, jax.vmap(qat.arenas)(steps), color="#4477aa")
axes.set(xlabel="optimizer step", ylabel="lambda", title="the residual of Arenas")
plt.show()

# %% [markdown]
# ## The loss is yours
#
# `qat.apply` turns latent weights into those that the model computes with. That is the one
# line; all the rest is plain JAX and optax. The teacher's whole distribution says more about
# each token than the text does, so the loss is the KL divergence to it.

# %%
from angeljax.qat import diagnostics, plots
from angeljax.train.losses import distillation, next_tokens


def loss_fn(latent, step, batch, teacher):
    student = model.logits(qat.apply(latent, state, step, dtype=compute), batch)
    expected = jax.lax.stop_gradient(model.logits(teacher, batch))
    return distillation(student, expected, next_tokens(batch), loss="kl")


# %% [markdown]
# The training step. The teacher is an argument, for what a jitted function only refers to
# becomes a constant of the compiled program. Now and then the step also asks what rank one
# gradient has, and how many weights have changed their code.

# %%
rate = optax.warmup_cosine_decay_schedule(0.0, 5e-4, STEPS // 10, STEPS, 2e-5)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate))
WATCHED = "layers/mlp/up_proj/kernel"


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def update(latent, moments, flips, step, batch, arenas, teacher):
    # At STEPS lambda is 0: asked for that step all along, the same program trains without.
    at = jnp.where(arenas, step, STEPS)
    loss, gradients = jax.value_and_grad(loss_fn)(latent, at, batch, teacher)
    updates, moments = optimizer.update(gradients, moments, latent)
    latent = optax.apply_updates(latent, updates)

    def rank():
        found = diagnostics.gradient_ranks(gradients, state, paths=(WATCHED,))
        return found[WATCHED].mean()

    done = step + 1
    rank = jax.lax.cond(done % EVERY == 0, rank, lambda: 0.0)
    flips = diagnostics.update_flips(flips, latent, state, done, every=EVERY)
    return latent, moments, flips, (loss, flips.rate, rank)


def train(arenas):
    # A copy: a step reuses the memory of the weights that it is given.
    latent = jax.tree.map(jnp.copy, teacher)
    moments, flips = optimizer.init(latent), diagnostics.start_flips(latent, state)
    order, seen = np.random.default_rng(0), []
    for step in range(STEPS):
        batch = blocks[order.integers(len(blocks), size=BATCH)]
        latent, moments, flips, numbers = update(
            latent, moments, flips, step, batch, arenas, teacher
        )
        seen.append(numbers)
    # Numbers leave the device here, once: the loop never waits for it.
    losses, rates, ranks = np.asarray(jax.device_get(seen)).T
    return latent, losses, rates[EVERY - 1 :: EVERY], ranks[EVERY - 1 :: EVERY]


runs = {"plain": train(False), "Arenas": train(True)}
for name, (_, losses, *_) in runs.items():
    print(f"{name:7} KL {losses[:5].mean():.3f} -> {losses[-5:].mean():.3f} nats")

# %% [markdown]
# ## What happened
#
# The loss of the run with Arenas is that of an easier model until lambda is 0; compare the two
# at the end. The axis of tokens is logarithmic: prolong the line to guess what more would bring.

# %%
seen = BATCH * LENGTH * np.arange(1, STEPS + 1)
plots.loss({name: (seen, run[1]) for name, run in runs.items()}, smooth=0.9)

# %% [markdown]
# How far the latent weights are from zero, in multiples of the scale of their channel. Trapped
# weights pile up in few places.

# %%
trees = {"start": teacher} | {name: run[0] for name, run in runs.items()}
count = jax.jit(diagnostics.histogram)
found = {name: count(tree, state) for name, tree in trees.items()}
plots.trapping(found)

# %%
asked = np.arange(EVERY, STEPS + 1, EVERY)
plots.flips({name: (asked, run[2]) for name, run in runs.items()}, every=EVERY)

# %%
plots.ranks({name: (asked, run[3]) for name, run in runs.items()})

# %% [markdown]
# ## Pack it
#
# `finalize` packs the latent weights. The packed model is the one that was trained at the last
# step, bit for bit.


# %%
def is_packed(leaf):
    return isinstance(leaf, aj.QTensor)


latent = runs["Arenas"][0]
small = aj.qat.finalize(latent, state)
trained = jax.jit(qat.apply)(latent, state, STEPS)
unpack = jax.jit(lambda tree: jax.tree.map(jnp.asarray, tree, is_leaf=is_packed))
equal = jax.tree.map(lambda a, b: bool((a == b).all()), trained, unpack(small))
print("packed as it was trained:", all(jax.tree.leaves(equal)))

without = measure(aj.qat.finalize(runs["plain"][0], state))
after = measure(small)
for name, result in (
    ("full precision", full),
    ("1.25 bit, rounded", before),
    ("1.25 bit, trained without Arenas", without),
    ("1.25 bit, trained with Arenas", after),
):
    kl = max(result.kl, 0.0)
    print(f"{name:33} perplexity {result.perplexity:10.4g}   KL {kl:.3f} nats")

# %%
report = aj.report(teacher, small)
print(f"{report.original_nbytes / 1e6:.1f} MB -> {report.nbytes / 1e6:.1f} MB")
kernel = small["layers"]["mlp"]["up_proj"]["kernel"]
print(f"{kernel.bits_per_weight:.3f} bits per weight in {WATCHED}, scales included")

# %% [markdown]
# ## Save, load, generate
#
# The recipe travels with the checkpoint, the Arenas schedule included.

# %%
import tempfile
from pathlib import Path

folder = Path(tempfile.mkdtemp()) / "sherry"
aj.save(
    folder,
    small,
    recipe,
    model_config={**model.config.to_dict(), "scan_layers": True},
    source=loaded.source,
    tokenizer=tokenizer.files,
)
again, used = aj.load(folder)
assert used == recipe
same = jax.tree.map(lambda a, b: bool((a == b).all()), small, again)
print("bit for bit the same:", all(jax.tree.leaves(same)))
print(answer(again))

# %% [markdown]
# `angeljax generate --model FOLDER` opens the checkpoint on the command line, and
# `angeljax eval --tasks FILE` measures it on questions with choices.
#
# What to try next: more tokens (the loss curve says what to expect), another learning rate,
# `aj.Rule(format="t2")` for ordinary ternary weights, `qat={"scale": "learned"}` in a rule.
# Next:
# [Compressing a model](https://github.com/angeljax/angeljax/blob/main/docs/guides/compress.md).
