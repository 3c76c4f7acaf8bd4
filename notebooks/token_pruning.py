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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/angeljax/angeljax/blob/main/notebooks/token_pruning.ipynb)
#
# # Fewer vision and audio tokens
#
# A photograph becomes hundreds of tokens before a language model reads it, a second of sound
# becomes fifty, and most of them say what their neighbours say. Token pruning chooses those
# that stay. Nothing is trained and no weight changes.
#
# You will look at what several methods keep of a photograph, measure what they lose, put one
# into a model that sees, and let Whisper write down speech from a part of its tokens.
#
# The outputs that are kept here are from a CPU.

# %%
import sys

if "google.colab" in sys.modules:
    import subprocess

    package = "angeljax[report] @ git+https://github.com/angeljax/angeljax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "soundfile"], check=True
    )

# %%
import functools
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image

import angeljax as aj
from angeljax.models import (
    DecoderConfig,
    LlavaConfig,
    LlavaModel,
    VisionTowerConfig,
    audio_pruner,
    encode_audio,
    load_vision_tower,
    log_mel,
    read_audio,
    transcribe,
)
from angeljax.tokens import diagnostics, group_adjacent, prune

SMOKE = bool(os.environ.get("ANGELJAX_SMOKE"))  # the tests: small, without any file
# A vision tower such as "google/siglip-base-patch16-384"; without one the features of
# patches are made by hand.
TOWER = os.environ.get("ANGELJAX_TOWER", "")
# A folder, or a name on the hub such as "openai/whisper-tiny.en"; and a sound file.
WHISPER = os.environ.get("ANGELJAX_WHISPER", "")
SPEECH = os.environ.get("ANGELJAX_SPEECH", "")
if SMOKE:
    from smoke import load_whisper

    WHISPER, SPEECH, GRID = "random", "", 8
else:
    from angeljax.models import load_whisper

    GRID = 24  # 576 patches, as LLaVA-1.5 has them
SIDE = 16 * GRID

# %% [markdown]
# ## A photograph and its patches
#
# The photograph comes with matplotlib: Grace Hopper, in uniform, before a flag. The image is
# cut into patches, and each patch becomes a vector. In a real model that vector comes from a
# vision tower. With `TOWER` set it does here, too; without, as in the kept outputs, it is
# made by hand, so that nothing has to be downloaded: colours, contrast and directions of
# edges, of the patch and of what is around it. That knows nothing of hats and faces, but it
# is redundant in the same manner: the patches of a wall are alike.

# %%
with get_sample_data("grace_hopper.jpg") as file:
    photo = Image.open(file).convert("RGB").crop((0, 0, 512, 512))
picture = np.asarray(photo.resize((SIDE, SIDE)), np.float32) / 255


def cells(x):
    """`[side, side, C]` to `[patches, pixels, C]`."""
    x = x.reshape(GRID, 16, GRID, 16, -1).transpose(0, 2, 1, 3, 4)
    return x.reshape(GRID * GRID, 256, -1)


def by_hand(picture):
    """Features `[patches, D]` and contrast `[patches]`."""
    gray = picture.mean(-1)
    dy, dx = np.gradient(gray)
    strength, angle = np.hypot(dx, dy), np.arctan2(dy, dx) % np.pi
    bins = np.minimum((angle / np.pi * 6).astype(int), 5)
    edges = 8 * cells(np.eye(6)[bins] * strength[..., None]).mean(1)
    colour, spread = cells(picture).mean(1), cells(picture).std(1)
    own = np.concatenate([colour, 2 * spread, edges], axis=1)
    grid = np.pad(own.reshape(GRID, GRID, -1), ((1, 1), (1, 1), (0, 0)), mode="edge")
    parts = [grid[i : i + GRID, j : j + GRID] for i in range(3) for j in range(3)]
    around = np.mean(parts, axis=0).reshape(GRID * GRID, -1)
    found = np.concatenate([own, around], axis=1)
    found = (found - found.mean(0)) / (found.std(0) + 1e-6)
    # All tokens of a real model have a direction in common.
    return found + 0.5, spread.mean(1) + edges.sum(1)


if TOWER:
    tower = load_vision_tower(TOWER)
    pixels = jnp.asarray((picture * 2 - 1).transpose(2, 0, 1))[None]
    seen = tower(pixels, attention=(-1,))
    patches, importance = seen.patches[0], seen.attn[0][0]
else:
    patches, importance = map(jnp.asarray, by_hand(picture))
    patches, importance = patches.astype(jnp.float32), importance.astype(jnp.float32)
N = patches.shape[0]
attn = importance / importance.sum()
unit = patches / jnp.linalg.norm(patches, axis=1, keepdims=True)
cosines = np.asarray(unit @ unit.T)
nearest = np.where(np.eye(N, dtype=bool), -1, cosines).max(1)
print(f"{N} tokens; the most similar other one has a cosine of {nearest.mean():.3f}")

figure, axes = plt.subplots(1, 3, figsize=(9, 3), dpi=55, layout="constrained")
axes[0].imshow(picture)
axes[1].imshow(np.asarray(importance).reshape(GRID, GRID))
axes[2].imshow(nearest.reshape(GRID, GRID))
titles = "the photograph", "importance", "cosine to the most similar"
for axis, title in zip(axes, titles, strict=True):
    axis.set(title=title, xticks=[], yticks=[])
plt.show()

# %% [markdown]
# *Importance* is what a method goes by that asks which tokens matter. In a model it is
# attention inside the tower or a score that was learned; of features made by hand it is
# contrast.
#
# ## What each method keeps
#
# - `random` and `uniform` look at nothing.
# - `divprune` takes those farthest apart (max-min distance).
# - `idpruner` takes, one after the other, the token with the largest
#   $\lambda v_i - (1 - \lambda)\max_{j\,\mathrm{kept}}\cos(x_i, x_j)$: important and unlike
#   those that are kept already. $\lambda = 1$ is importance alone, $0$ difference alone.
# - `scope` takes tokens that cover the others, weighted by importance; `vispruner` takes
#   half by importance, and half by dropping duplicates.
# - `visionzip` takes the most important, and merges the others into a few.


# %%
def method(name, **options):
    given = {"importance": importance} if name == "idpruner" else {"attn": attn}
    if name in ("random", "uniform", "divprune"):
        given = {"key": jax.random.key(0)} if name == "random" else {}
    return functools.partial(prune, patches, method=name, **given, **options)


rows = {
    "random": method("random"),
    "uniform": method("uniform"),
    "divprune": method("divprune"),
    "idpruner, lam 1": method("idpruner", lam=1.0),
    "idpruner, lam 0.5": method("idpruner", lam=0.5),
    "idpruner, lam 0": method("idpruner", lam=0.0),
    "scope": method("scope"),
    "vispruner": method("vispruner"),
    "visionzip": method("visionzip"),
}
if SMOKE:
    rows = {k: rows[k] for k in ("random", "idpruner, lam 0.5", "visionzip")}
SHARES = (0.25,) if SMOKE else (0.25, 0.1)
chosen = {name: {k: f(keep=k) for k in SHARES} for name, f in rows.items()}


def show(axis, mask, title):
    """The photograph with patches that are gone in grey."""
    keep = np.kron(np.asarray(mask).reshape(GRID, GRID), np.ones((16, 16)))
    axis.imshow(np.where(keep[..., None] > 0, picture, 0.85 + 0.1 * picture))
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=8)


across = min(len(rows), 5)
down = -(-len(rows) // across)
for share in SHARES:
    size = {"figsize": (9, 2 * down), "dpi": 48, "layout": "constrained"}
    figure, axes = plt.subplots(down, across, squeeze=False, **size)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, found) in zip(axes.flat, chosen.items(), strict=False):
        show(axis, found[share].mask, name)
    figure.suptitle(f"{share:.0%} of the tokens", fontsize=9)
    plt.show()

# %% [markdown]
# A constant stride of 4 divides the 24 columns: `uniform` keeps whole columns at 25 %, which
# is a matter of sizes and no merit.
#
# With $\lambda = 1$ all of them crowd where contrast is, side by side; with $0$ they look
# for whatever is rare. In between each takes its share.
#
# ## What is lost
#
# *Coverage*: how similar is the nearest kept token to each token, in the mean. *Importance
# held*: what share of the best possible importance is kept. A greedy method chooses in an
# order whose every beginning is its choice for a smaller budget: one run with the largest
# budget serves all, by `truncate`. That needs no second run, and gives the same:

# %%
SCORED = [n for n in rows if n.startswith(("random", "divprune", "idpruner", "scope"))]
shares = (0.1, 0.5) if SMOKE else (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
counts, at = [round(share * N) for share in shares], shares.index(0.1)
whole = {name: rows[name](keep=counts[-1]) for name in SCORED}
begun = whole["idpruner, lam 0.5"].truncate(counts[at])
again = rows["idpruner, lam 0.5"](keep=counts[at])
print("cut short, it is the same:", bool((begun.indices == again.indices).all()))

figure, axes = plt.subplots(1, 2, figsize=(9, 3), dpi=75, layout="constrained")
for name in SCORED:
    runs = [
        diagnostics(whole[name].truncate(k), patches, importance=importance)
        for k in counts
    ]
    for axis, key in zip(axes, ("coverage", "importance"), strict=True):
        axis.plot(shares, [float(found[key]) for found in runs], ".-", label=name)
    print(
        f"{name:18} at 10 %: coverage {float(runs[at]['coverage']):.3f}, "
        f"importance held {float(runs[at]['importance']):.3f}"
    )
axes[0].set(xlabel="share kept", title="coverage")
axes[1].set(xlabel="share kept", title="importance held")
axes[0].legend(fontsize=7)
plt.show()

# %% [markdown]
# Neither number is the quality of an answer. Both together say what a method does, and where
# a budget begins to hurt. Random tokens cover an image better than one thinks: always
# measure them, too.
#
# ## In a model that sees
#
# A LLaVA of random weights, as small as can be: its answer means nothing, but all of the way
# is there. A recipe names the method; `generate` takes it. `load_llava` reads a real one,
# such as `llava-hf/llava-1.5-7b-hf`, and everything below stays as it is.

# %%
config = LlavaConfig(
    image_token_id=31,
    text=DecoderConfig(
        model_type="llama",
        vocab_size=32,
        hidden_size=32,
        num_layers=1 if SMOKE else 2,
        intermediate_size=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
    ),
    vision=VisionTowerConfig(
        model_type="clip_vision_model",
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_heads=2,
        image_size=SIDE,
        patch_size=16,
    ),
)
model = LlavaModel(config)
params = jax.jit(model.init)(jax.random.key(0))
ids = jnp.array([[1, *[31] * GRID**2, 2, 3]])  # a placeholder for each image token
pixels = jnp.asarray(2 * picture - 1).transpose(2, 0, 1)[None]

recipe = aj.Recipe.from_yaml(
    """
name: quarter
tokens:
  method: idpruner
  drop_ratio: 0.75
  importance: attn        # what the tower's class token looks at
  options: {lam: 0.5}
  position_policy: keep   # or compact
"""
)
options = recipe.tokens.host_options()
read = jax.jit(functools.partial(model.pruned_prompt, prune=options["prune"]))
fewer = read(params, ids, pixels)
out = model.generate(params, ids, pixels, max_new_tokens=4, **options)
positions = fewer.prompt.positions[0]
print(f"{ids.shape[1]} tokens in the prompt, {positions.shape[0]} are read")
print("positions", positions[:6].tolist(), "...", positions[-3:].tolist())
print("generated", out.tokens[0].tolist())

# %% [markdown]
# Kept tokens keep their positions (`keep`): the model sees gaps, and the text stands where it
# stood. With `compact` they are counted anew. Recipes for all methods are in
# [configs/tokens](https://github.com/angeljax/angeljax/tree/main/configs/tokens).
#
# The prompt, its attention and its cache are shorter by as much. Pruning can also happen
# behind the first layers of the language model, `layer=2`, as FastV does.
#
# ## Sound
#
# Sound is redundant in time. Samp merges *neighbours*: a token joins the group before it if
# its mean cosine to the group is above a threshold, so that a long vowel is one group and a
# quick word is many. If more groups are left than the budget allows, a determinantal point
# process chooses among them.
#
# With `SPEECH` and `WHISPER` set, what follows is a recording, and tokens of Whisper's
# encoder. The kept outputs are from Whisper tiny.en and eleven seconds of John F. Kennedy's
# inaugural address. Without a recording the sound is made here: syllables of three
# vowels with pauses between; and in Colab both are fetched.

# %%
RATE = 16000
if "google.colab" in sys.modules:
    import urllib.request

    where = "https://github.com/openai/whisper/raw/main/tests/jfk.flac"
    WHISPER = WHISPER or "openai/whisper-tiny.en"
    SPEECH = SPEECH or urllib.request.urlretrieve(where, "jfk.flac")[0]


def syllables(seconds):
    """Vowels as a buzz through three resonances, with noise and pauses between."""
    rng = np.random.default_rng(0)
    vowels = [(700, 1200, 2500), (300, 2200, 2900), (400, 800, 2600)]
    parts, total = [], 0
    while total < seconds * RATE:
        t = np.arange(int(rng.uniform(0.12, 0.35) * RATE)) / RATE
        pitch = rng.uniform(100, 140) * (1 - 0.2 * t)
        sound = 0
        for k in range(1, 30):
            gain = sum(
                np.exp(-(((k * 120 - f) / 150) ** 2)) for f in vowels[len(parts) % 3]
            )
            sound = sound + (gain + 0.02) * np.sin(
                2 * np.pi * k * np.cumsum(pitch) / RATE
            )
        hiss = rng.normal(size=int(rng.uniform(0.02, 0.08) * RATE)) * 0.1
        pause = np.zeros(int(rng.choice([0.02, 0.25]) * RATE))
        parts += [hiss, sound * np.hanning(len(t)) * 0.3, pause]
        total = sum(map(len, parts))
    return np.concatenate(parts)[: int(seconds * RATE)].astype(np.float32)


samples = read_audio(SPEECH) if SPEECH else syllables(1.0 if SMOKE else 6.0)
mel = np.asarray(log_mel(jnp.asarray(samples)))
WINDOW = 2.0 if SMOKE else 30.0
loaded = load_whisper(WHISPER) if WHISPER else None
if loaded is not None:
    heard = encode_audio(loaded, [samples], window=WINDOW, return_attention="last")
    sound, real = heard.features[0], heard.mask[0]
else:  # two frames of the spectrogram make a token
    half = mel[:, : mel.shape[1] // 2 * 2].reshape(len(mel), -1, 2).mean(2).T
    sound, real = jnp.asarray(half - half.mean()), jnp.ones(len(half), bool)
count = int(real.sum())
print(f"{len(samples) / RATE:.1f} s of sound, {count} tokens")

# %% [markdown]
# The published threshold of 0.85 suits one encoder. Look before you choose:


# %%
@jax.jit
def share(sound, real, threshold):
    return group_adjacent(sound, threshold=threshold, mask=real).count / real.sum()


tried = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)
for threshold in tried:
    groups = float(share(sound, real, threshold))
    print(f"threshold {threshold:4}: {groups:6.1%} as many groups as tokens")

# %%
THRESHOLDS = (0.7, 0.85)
figure, axes = plt.subplots(2, 1, figsize=(9, 4), dpi=60, layout="constrained")
until = min(count, 120)
for axis, threshold in zip(axes, THRESHOLDS, strict=True):
    groups = group_adjacent(sound, threshold=threshold, mask=real)
    axis.imshow(
        mel[:, : 2 * until],
        origin="lower",
        aspect="auto",
        cmap=plt.get_cmap("magma", 12),
        interpolation="nearest",
        extent=(0, until, 0, 80),
    )
    starts = np.flatnonzero(np.asarray(groups.starts[:until] & real[:until]))
    axis.vlines(starts, 0, 80, color="white", linewidth=0.6)
    title = f"threshold {threshold}: {int(groups.count)} groups of {count} tokens"
    axis.set(title=title, ylabel="mel band")
axes[-1].set(xlabel="token (20 ms each); a line is where a group begins")
plt.show()

# %% [markdown]
# ## Speech from a part of the tokens
#
# `audio_pruner` makes a method the `prune` of `transcribe`. It keeps the last second of the
# window's padding besides: Whisper ends its text by what it sees there.

# %%
if loaded is None:
    print("no Whisper: set WHISPER, and SPEECH to a recording")
else:
    runs = {"all tokens": None}
    for name in ("samp",) if SMOKE else ("samp", "uniform"):
        more = {"threshold": 0.7} if name == "samp" else {}
        for keep in (0.5,) if SMOKE else (0.4, 0.2, 0.1):
            runs[f"{name}, {keep:.0%}"] = audio_pruner(name, keep=keep, **more)
    for name, pruner in runs.items():
        used = jnp.ones(heard.mask.shape, bool)
        if pruner is not None:
            _, used = jax.jit(pruner)(heard.features, heard.attention, heard.mask)
        (text,) = transcribe(loaded, [samples], prune=pruner, window=WINDOW)
        shown = len(text) if SMOKE else text
        print(f"{name:12} {int(used.sum()):4} tokens: {shown}")

# %% [markdown]
# Unpruned, Whisper reads 1500 tokens whatever is said; pruned, a share of the 550 of speech
# and 50 of padding. At 10 % the sentence falls apart, under a method that chooses sooner than
# under a constant stride. One clear, slow sentence is no measurement: others need more.
# [Measured with more](https://github.com/angeljax/angeljax/blob/main/docs/results_tokens.md).
# Models that answer questions about what they hear bear more; Qwen2-Audio is in the
# [guide](https://github.com/angeljax/angeljax/blob/main/docs/guides/token_pruning.md).
#
# ## Read on
#
# - [All methods, importance, quotas for videos, training a scorer](https://github.com/angeljax/angeljax/blob/main/docs/guides/token_pruning.md)
# - [Positions, caches, models, adapters](https://github.com/angeljax/angeljax/blob/main/docs/guides/token_pruning_models.md)
