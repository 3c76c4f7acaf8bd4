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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/angeljax/angeljax/blob/main/notebooks/speculative.ipynb)
#
# # Lossless speculative decoding
#
# A language model writes one token, reads it, and writes the next. Each step reads all of
# its weights for a single token. Reading five tokens at once often takes little longer. So
# somebody else guesses the next four, and the model checks them all in one step. Wrong
# guesses are thrown away: the text stays what it was, token for token. You will
#
# 1. make one round by hand,
# 2. draft by looking into the text itself, and compare the texts, greedy and sampled,
# 3. draft a tree, and see which path the model took,
# 4. let a compressed copy of the model draft, and some of its layers,
# 5. measure what a wide step costs here, and compute when drafts pay,
# 6. train a drafter of your own, an EAGLE-3 head.
#
# It takes about a quarter of an hour on a CPU, and fetches SmolLM2-135M. The outputs that
# are kept here are from two cores that other work shared: the tokens are what they are, the
# times are rough.

# %%
import sys

if "google.colab" in sys.modules:
    import subprocess

    package = "angeljax[report] @ git+https://github.com/angeljax/angeljax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", package], check=True)

# %%
import dataclasses
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import angeljax as aj
from angeljax.models import stack_layers
from angeljax.speculative import (
    Hybrid,
    Profile,
    PromptLookup,
    Sampling,
    SelfDrafter,
    TokenRecycling,
    auto_generate,
    autoregressive,
    candidates_of,
    choose,
    divergences,
    generate,
    lookup,
    profile_target,
    survival,
    variants,
)

SMOKE = bool(os.environ.get("ANGELJAX_SMOKE"))  # the tests: a tiny model, little text
if SMOKE:
    from smoke import load_model

    NEW, LONGEST, GROUP, SKIPPED, WIDTHS = 24, 48, 32, (1,), (1, 16)
else:
    from angeljax.models import load_model

    NEW, LONGEST, GROUP, WIDTHS = 64, 128, 64, (1, 2, 4, 8, 16, 32)
    SKIPPED = (10, 13, 16, 19, 22, 25)

# %% [markdown]
# ## The model, and four prompts
#
# We compute in float32, and with the layers in one stack, so that one layer is compiled
# and not thirty. The prompts are of different kinds on purpose: in two of them the answer
# repeats the question.

# %%
loaded = load_model("smollm2", dtype=jnp.float32, compute_dtype=jnp.float32)
tokenizer = loaded.tokenizer
model = dataclasses.replace(loaded.model, scan_layers=True)
params = jax.jit(stack_layers)(loaded.params)

QUESTIONS = {
    "edit": "Add a docstring to this function:\n\ndef area_of_rectangle(width, height):\n"
    "    area = width * height\n    return area",
    "names": "Write one sentence about each of these planets: Mercury, Venus, Earth, "
    "Mars, Jupiter, Saturn.",
    "explain": "Explain in a few sentences why the sky is blue.",
    "story": "Write a short story about a lighthouse keeper.",
}
if SMOKE:
    QUESTIONS = {name: QUESTIONS[name] for name in ("edit", "explain")}


def encode(question):
    return tokenizer.encode(tokenizer.chat(question))[:LONGEST]


def show(tokens):
    return tokenizer.decode([int(t) for t in tokens if t >= 0])


prompts = {name: encode(question) for name, question in QUESTIONS.items()}
# The same for all, so that compiled programs are shared. Slots are those of the KV cache.
LIMITS = {"max_new_tokens": NEW, "slots": LONGEST + NEW + 32}
print({name: len(tokens) for name, tokens in prompts.items()}, "tokens")

# %% [markdown]
# ## Plain decoding
#
# `autoregressive` is the text that everything below must equal: one token for each forward
# of the model. A batch of four prompts, `NEW` tokens each.

# %%
batch = list(prompts.values())
plain = autoregressive(model, params, batch, **LIMITS)
for name, row, size in zip(prompts, plain.tokens, plain.lengths, strict=True):
    print(f"{name} ({int(size)} tokens): {show(row[: int(size)])}\n")

# %% [markdown]
# ## One round by hand
#
# What is a draft? Any guess at the next tokens. The simplest drafter looks for the last few
# tokens in the text so far: where they stood before, what came after them? That is *prompt
# lookup* (also called n-gram speculation).
#
# Below, the text breaks off in the middle of an answer. Prompt lookup proposes four tokens.
# The model reads them all in **one** forward, and says at each place what it would have put
# next. As long as that is the draft, the draft is right. At the first wrong one we stop: the
# model's own token takes its place, so that even a round without any right draft gives one
# token, as plain decoding does.

# %%
NAME, COUNT = "edit", 4
answer = [int(t) for t in plain.tokens[list(prompts).index(NAME)]]
end = int(plain.lengths[list(prompts).index(NAME)])


search = jax.jit(partial(lookup, count=COUNT, max_ngram=3, min_ngram=1))


def drafted_after(place):
    text = prompts[NAME] + answer[:place]
    row = np.zeros((1, LIMITS["slots"]), np.int32)  # one length for all: compiled once
    row[0, : len(text)] = text
    found, _ = search(row, np.asarray([len(text)]))
    return [int(t) for t in found[0]]


def right(place):
    """Drafts in a row that the answer really goes on with."""
    pairs = zip(drafted_after(place), answer[place:end], strict=False)
    return sum(np.cumprod([a == b for a, b in pairs]))


# A place where some drafts are right and some are not.
place = max(range(1, end - COUNT), key=lambda i: right(i) * (right(i) < COUNT))
text, draft = prompts[NAME] + answer[:place], drafted_after(place)
logits = jax.jit(model.logits)(params, jnp.asarray([text + draft]))[0]
chosen = [int(t) for t in jnp.argmax(logits[len(text) - 1 :], axis=-1)]

print(f"... {show(text[-20:])!r}")
print(f"\n{'draft':16} {'the model puts':16}")
kept = True
for one, own in zip([*draft, None], chosen, strict=True):
    what = "" if one is None else repr(show([one]))
    kept, was = kept and one == own, kept
    told = "kept" if kept else "the model's own token, the last one kept" if was else ""
    print(f"{what:16} {show([own])!r:16} {told}")

# %% [markdown]
# The lines after the last token that was kept mean nothing: there the model has read a text
# that is not its own.
#
# ## Prompt lookup
#
# `generate` does such rounds in one compiled loop until the text ends. With
# `rounds_per_call=1` we can look after each round. Between two bars stands what one forward
# of the model gave:

# %%
pieces = []
out = generate(
    model,
    params,
    [prompts[NAME]],
    drafter=PromptLookup(COUNT),
    **LIMITS,
    on_tokens=lambda row, tokens: pieces.append(show(tokens)),
    rounds_per_call=1,
)
print("|".join(pieces))
print(
    f"\n{int(out.lengths[0])} tokens, {int(out.stats.rounds[0])} forwards: tau = "
    f"{out.tau:.2f} tokens for each forward"
)

# %% [markdown]
# `tau` is the number to remember: tokens for each forward of the model. Plain decoding has
# 1, and $k$ drafts can give $k + 1$ at most.
#
# ## The same text?
#
# Greedily it must be: a draft is kept only if it is what the model puts itself. But also when
# tokens are *sampled*. The trick: a token drawn at temperature $T$ is
#
# $$\operatorname{argmax}_v \left( \frac{\text{logit}_v}{T} + g_v \right)$$
#
# with random numbers $g_v$ (from Gumbel's distribution). We let $g$ depend on the seed and on
# the position in the text, and on nothing else. Then each position has one token that is
# right, drafted or not, and we can compare token for token.
#
# Three drafters (two of them come below), a batch of four prompts. Rows of a batch advance at
# speeds of their own: look at the rounds.

# %%
drafters = {
    "prompt lookup": PromptLookup(COUNT),
    "token recycling": TokenRecycling(nodes=15),
    "both": Hybrid(),
}
if SMOKE:
    drafters.pop("both")
samplings = {
    "greedy": Sampling(),
    "temperature 0.8": Sampling(temperature=0.8, seed=1),
}
for label, sampling in samplings.items():
    options = {**LIMITS, "sampling": sampling}
    reference = autoregressive(model, params, batch, **options)
    print(f"{label}: plain rounds {reference.stats.rounds.tolist()}")
    for name, drafter in drafters.items():
        out = generate(model, params, batch, drafter=drafter, **options)
        same = bool((out.tokens == reference.tokens).all())
        rounds = out.stats.rounds.tolist()
        print(f"  {name:16} the same: {same}, tau {out.tau:.2f}, rounds {rounds}")
        for parting in divergences(
            model, params, batch, reference, out, sampling=sampling
        ):
            print(f"    {parting}")

# %% [markdown]
# "Lossless" has one fine print. A forward of five tokens multiplies matrices of another shape
# than a forward of one, and floating-point sums depend on their order. Where two tokens are as
# good as equal, the last bits decide, and texts may part. `divergences` lists such places with
# the gap between the two tokens. In float32 they are rare, and in the kept run there is one:
# two tokens whose logits differ by 0.000008. Neither is wrong. In bfloat16 they happen now and
# then. `exact="same_width"` excludes even them for chains: all forwards then have one shape.
#
# The rule of the original papers, rejection sampling
# ([arXiv 2211.17192](https://arxiv.org/abs/2211.17192)), is there as well:
# `Sampling(temperature=0.8, rule="rejection")`. It keeps somewhat more drafts and keeps the
# *distribution* of the text, not the text.
#
# ## A tree of drafts
#
# A chain is lost after its first wrong token. A *tree* has several guesses for each place.
# The model reads all of its nodes at once; a mask lets each node see only its own ancestors.
#
# Token recycling ([arXiv 2408.08696](https://arxiv.org/abs/2408.08696)) grows a tree from a
# table: for each token of the vocabulary the eight tokens that the model found likeliest after
# it when it last read it. Every forward brings the table up to date, rejected nodes too. No
# training, and hardly any work.
#
# `prefill` and `decode` are the pieces of `generate`. We go round by round, and keep the tree
# of the round in which most drafts were accepted:

# %%
from angeljax.speculative import Target, decode, prefill

recycling = TokenRecycling(nodes=15)
target = Target(model, params, Sampling().sampler(1))
start = prompts["explain"]
state = prefill(
    target,
    recycling,
    jnp.asarray([start]),
    jnp.asarray([len(start)]),
    jnp.asarray([len(start) + NEW]),
    slots=LIMITS["slots"],
)
stops = jnp.asarray(model.config.eos_ids, jnp.int32)
best, drafting = None, jax.jit(type(recycling).draft)
while bool(state.active[0]):
    before = int(state.lengths[0])
    proposed, _ = drafting(recycling, target, state.drafter, state.context)
    nodes = [int(state.context.last[0]), *map(int, proposed.tokens[0])]
    state = decode(target, recycling, state, stops, jnp.int32(1))
    gained = [int(t) for t in state.tokens[0, before : int(state.lengths[0])]]
    if best is None or len(gained) > len(best[1]):
        best = nodes, gained, before


# %%
def places(parents):
    """x: the depth of each node; y: leaves one below the other, parents amid children."""
    children = {i: [j for j, p in enumerate(parents) if p == i] for i in range(15)}
    x, y = np.zeros(15), np.zeros(15)
    leaves = iter(range(15))

    def put(node, depth):
        for child in children[node]:
            put(child, depth + 1)
        below = [y[child] for child in children[node]]
        x[node], y[node] = depth, np.mean(below) if below else next(leaves)

    put(0, 0)
    return x, y


nodes, gained, before = best
parents = recycling.tree.parents
path = [0]  # from the root along what became text
for token in gained:
    at = [i for i in range(15) if parents[i] == path[-1] and nodes[i] == token]
    path += at[:1]
    if not at:
        break
x, y = places(parents)
figure, axis = plt.subplots(figsize=(9, 4.2), dpi=80, layout="constrained")
for node in range(15):
    good = node in path
    if node:
        line = [[v[parents[node]], v[node]] for v in (x, y)]
        axis.plot(*line, color="#228833" if good else "#cccccc", lw=3 if good else 1)
    label = repr(show([nodes[node]])) if nodes[node] >= 0 else "no draft"
    if nodes[node] in model.config.eos_ids:
        label = "end of text"
    axis.text(
        x[node],
        y[node],
        label,
        ha="center",
        va="center",
        weight="bold" if good else "normal",
        bbox={
            "boxstyle": "round",
            "fc": "#d5f0d8" if good else "#f4f4f4",
            "ec": "gray",
        },
    )
axis.set(xlim=(-0.4, max(x) + 0.4), title="one round: grey was drafted, green was kept")
axis.invert_yaxis()
axis.axis("off")
plt.show()
print(f"after ...{show([int(t) for t in state.tokens[0, before - 12 : before]])!r}")
print(f"{len(gained)} tokens from one forward: {show(gained)!r}")

# %% [markdown]
# The last token that was gained is no node: the model puts it after the path's end.
#
# ## The model as its own drafter
#
# A compressed copy of the model guesses what the model would say, and guesses well. It needs
# no cache of its own: it reads the keys and values of the model. That makes a *lossless* text
# out of a lossy model: the copy decides about speed, the model about words
# ([arXiv 2503.13565](https://arxiv.org/abs/2503.13565)). Or nothing is compressed, and the
# draft is made by a part of the layers
# ([arXiv 2309.08168](https://arxiv.org/abs/2309.08168)).
#
# Here we also measure time, prompt by prompt, and take off what the prompt costs.


# %%
def compressed(format, **options):
    recipe = aj.Recipe(rules=[aj.Rule(format=format, **options)])
    return aj.compress(params, recipe, progress=False)


layers = tuple(i for i in range(model.config.num_layers) if i not in SKIPPED)
COPIES = {
    "int8 copy": SelfDrafter(compressed("int8"), num_tokens=4),
    "int4 copy": SelfDrafter(compressed("int4", group_size=GROUP), num_tokens=4),
    "layer skip": SelfDrafter(num_tokens=4, layers=layers),
}
if SMOKE:
    COPIES = {"layer skip": COPIES["layer skip"]}


@dataclasses.dataclass
class Run:
    stats: list
    tokens: list
    seconds: float  # of a round

    @property
    def tau(self):
        return sum(map(len, self.tokens)) / sum(int(s.rounds[0]) for s in self.stats)


def write(drafter=None):
    """The texts of all prompts, one by one; None decodes plainly."""

    def once(prompt, new):
        options = {**LIMITS, "max_new_tokens": new}
        began = time.perf_counter()
        if drafter is None:
            out = autoregressive(model, params, [prompt], **options)
        else:
            out = generate(model, params, [prompt], drafter=drafter, **options)
        jax.block_until_ready(out.tokens)
        return out, time.perf_counter() - began

    outs, seconds, rounds = [], 0.0, 0
    for prompt in batch:
        once(prompt, 1)  # compiles
        few, short = once(prompt, 1)
        out, long = once(prompt, NEW)
        outs.append(out)
        seconds += long - short
        rounds += int(out.stats.rounds[0] - few.stats.rounds[0])
    tokens = [np.asarray(o.tokens[0, : int(o.lengths[0])]) for o in outs]
    return Run([o.stats for o in outs], tokens, seconds / max(rounds, 1))


base = write()
runs = {name: write(drafter) for name, drafter in {**drafters, **COPIES}.items()}
print(f"plain: {1e3 * base.seconds:.0f} ms for each token")
for name, run in runs.items():
    pairs = zip(run.tokens, base.tokens, strict=True)
    same = all(np.array_equal(a, b) for a, b in pairs)
    print(
        f"{name:16} the same: {same}, tau {run.tau:.2f}, a round takes "
        f"{run.seconds / base.seconds:.2f} times as long as plain decoding's: "
        f"{run.tau * base.seconds / run.seconds:.2f}x as fast"
    )


# %% [markdown]
# How good are the drafts by position? A draft counts only if all before it were right, so the
# curves fall. The area below a curve is what is gained: $\tau = 1 + \sum_j s_j$, with $s_j$ the
# share of rounds in which the first $j$ drafts were right. (A text that ends cuts its last
# round short, so that the numbers differ a little.)


# %%
def survivors(run):
    """Share of all rounds in which the first 1, 2, ... drafts were right."""
    rounds = [int(s.rounds[0]) for s in run.stats]
    shares = [survival(s) for s in run.stats]
    return np.average(shares, axis=0, weights=rounds)


figure, axis = plt.subplots(figsize=(7, 3.2), dpi=80, layout="constrained")
for name, run in runs.items():
    share = survivors(run)
    style = "o-" if name in COPIES else "s--"
    axis.plot(1 + np.arange(len(share)), share, style, label=f"{name}, {run.tau:.2f}")
axis.set(
    xlabel="draft (in a tree: depth)",
    ylabel="share of rounds",
    ylim=(0, 1),
    title="first drafts that were all right",
)
axis.set_xticks(range(1, 8))
axis.legend(fontsize=8, title="drafter, tau", title_fontsize=8)
plt.show()

# %% [markdown]
# ## What a wide step costs
#
# Whether drafts pay is arithmetic. Let $v(W)$ be the time of a step that reads $W$ tokens over
# that of a step that reads one, and $C$ the time of the drafts on the same scale. Then
#
# $$\text{speed-up} = \frac{\tau}{v(W) + C}.$$
#
# $v$ is a matter of the machine. A GPU at a batch of one waits for the weights to arrive, and
# 16 tokens cost little more than one. A CPU has to compute. `profile_target` measures it with
# the very loop that decodes:

# %%
profile = profile_target(model, params, WIDTHS, slots=64, repeats=3, cache=False)
for width, seconds in zip(profile.widths, profile.seconds, strict=True):
    print(f"W = {width:2}: {1e3 * seconds:6.1f} ms, v = {profile.cost(width):.2f}")

# %% [markdown]
# The curve should rise smoothly; where it does not, something else was running.
#
# In the two pictures below:
#
# Left: the line is $v(W)$, what a round costs before anything is drafted. A drafter's dot is
# its $\tau$, what the round gives; the small tick is what the round took, drafts included. It
# pays if the dot is above the tick. (Prompt lookup's rounds without any draft are one token
# wide, so that its tick may lie below the line.)
#
# Right: the break-even. If each draft is right with probability $a$, $k$ drafts give
# $\tau = 1 + a + a^2 + \dots + a^k$. How large must $a$ be? It depends on what one draft costs,
# $c$, where $C = c\,k$.

# %%
PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def needed(k, c):
    """The smallest probability of a right draft at which k drafts pay."""
    a = np.linspace(0, 1, 2001)
    tau = sum(a**j for j in range(k + 1))
    pays = tau > profile.cost(k + 1) + c * k
    return a[pays][0] if pays.any() else np.nan


figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), dpi=80, layout="constrained")
widths = np.arange(1, profile.widths[-1] + 1)
axes[0].plot(widths, [profile.cost(w) for w in widths], color="black", label="v(W)")
for shift, (name, run) in enumerate(runs.items()):
    drafter, color = {**drafters, **COPIES}[name], PALETTE[shift]
    at, took = drafter.width + 0.25 * (shift - 2.5), run.seconds / base.seconds
    axes[0].plot([at, at], [took, run.tau], color=color, lw=1)
    axes[0].plot([at], [took], "_", color=color, ms=12)
    axes[0].plot([at], [run.tau], "o", color=color, label=name)
axes[0].set(xlabel="W, tokens read at once", ylabel="plain steps", xlim=(0.5, 18))
axes[0].legend(fontsize=8)
counts = np.arange(1, 16)
for c in (0.0, 0.05, 0.2, 0.5):
    axes[1].plot(
        counts, [needed(int(k), c) for k in counts], "o-", ms=3, label=f"c = {c}"
    )
axes[1].set(xlabel="k, drafts in a chain", ylabel="a that is needed", ylim=(0, 1.02))
axes[1].legend(fontsize=8, title="cost of a draft", title_fontsize=8)
plt.show()

# %% [markdown]
# In the kept run, on two cores, the two compressed copies come out ahead: they are right so often
# that four drafts are worth their time. The others lose: these texts seldom repeat themselves, and
# a round of many tokens costs about twice as much as one of a single token. The numbers of right
# drafts do not depend on the machine; the times do, and yours may tell another story.
#
# ## Let it choose
#
# `choose` does this arithmetic for candidates: from the rounds with the largest draft it knows
# how smaller ones would do, and takes the best, or `NoDrafter` if all lose. (What drafts
# cost is what we timed here, less for smaller variants in proportion to their width. On other
# machines it would be something else; only $v$ is replaced below.)


# %%
def candidates(name):
    drafter, run = {**drafters, **COPIES}[name], runs[name]
    over = run.seconds / base.seconds - profile.cost(drafter.width)
    smaller = variants(drafter)
    costs = [max(over, 0.0) * d.width / drafter.width for d in smaller]
    stats = jax.tree.map(lambda *parts: sum(parts), *run.stats)
    return candidates_of(drafter, stats, smaller, costs)


known = [one for name in runs for one in candidates(name)]


def short(drafter):
    return f"{type(drafter).__name__} of width {drafter.width}"


plan = choose(profile, known)
print(f"here: {short(plan.drafter)}, {plan.speedup:.2f}x expected")
# A machine on which 32 tokens cost a tenth more than one, as an accelerator might.
flat = Profile((1, 32), (0.0100, 0.0110))
plan = choose(flat, known)
print(f"where wide steps are nearly free: {short(plan.drafter)}, {plan.speedup:.2f}x")
# A machine on which each token costs as much as the first.
steep = Profile((1, 32), (0.010, 0.320))
plan = choose(steep, known)
print(f"where each token costs the same: {short(plan.drafter)}, {plan.speedup:.2f}x")

# %% [markdown]
# `auto_generate` does all of it on the way: some rounds with the largest draft, the choice,
# and the rest with what was chosen. The text is the same in any case.

# %%
large = Hybrid()
told = {"profile": profile, "costs": [0.05] * len(variants(large)), "probe_rounds": 8}
for name in ("edit",) if SMOKE else ("edit", "story"):
    prompt = [prompts[name]]
    out, plan = auto_generate(model, params, prompt, drafter=large, **LIMITS, **told)
    row = plain.tokens[list(prompts).index(name)]
    same = bool((out.tokens[0] == row).all())
    print(f"{name}: {short(plan.drafter)}, the same: {same}")

# %% [markdown]
# ## A drafter that is trained: EAGLE-3
#
# The best drafts come from whoever knows what the model is thinking. An EAGLE-3 head
# ([arXiv 2503.01840](https://arxiv.org/abs/2503.01840)) is one small decoder layer. It reads
# the model's own hidden states, from an early, a middle and a late layer, and the token that
# came out, and guesses the next. For further drafts it reads what it made itself.
#
# Training data is what the model says: the drafter must guess *its* text and nobody else's.
# Here the model answers some fifty questions of one kind. That is far too little for a general
# drafter, and enough to watch one learn.

# %%
import tempfile
from pathlib import Path

from angeljax.train import (
    OptimizerConfig,
    feature_scales,
    fit,
    load_tokens,
    make_optimizer,
)
from angeljax.train.eagle import EagleLoss, EagleTask
from angeljax.train.eagle_data import MaskedTokens, answer_mask, draft_vocabulary
from angeljax.train.self_text import template_of, write_conversations

THINGS = """dogs cats horses whales eagles bees ants spiders snakes frogs sharks trees roses
apples bananas rice bread cheese milk coffee tea sugar salt water fire ice snow rain clouds
wind rivers lakes oceans mountains deserts forests islands volcanoes stars planets comets cars
trains ships planes bicycles bridges houses books paper music paint clocks computers lamps
mirrors""".split()
HELD_OUT = ["lions", "penguins", "potatoes", "gold"]  # not trained on
ROWS, WRITTEN, LENGTH, STEPS, VOCABULARY = len(THINGS) // 2, 96, 96, 120, 4096
if SMOKE:
    THINGS, HELD_OUT = THINGS[:8], HELD_OUT[:2]
    ROWS, WRITTEN, LENGTH, STEPS, VOCABULARY = 8, 24, 24, 4, 64

folder = Path(tempfile.mkdtemp())
texts = write_conversations(
    folder / "text",
    model,
    params,
    tokenizer,
    shards=len(THINGS) // ROWS,
    rows=ROWS,
    max_new_tokens=WRITTEN,
    questions=[f"Tell me about {thing}." for thing in THINGS],
    progress=False,
)
ids = load_tokens(texts, tokenizer)
mask = answer_mask(ids, template_of(tokenizer).between, model.config.eos_ids)
mask = mask if mask.any() else None
print(f"{len(ids)} tokens; the first answer: {show(ids[: 30 + WRITTEN])[-WRITTEN:]!r}")

# %% [markdown]
# The head need not know all 49152 tokens: the most frequent ones are nearly the whole text, and
# its largest matrix becomes 12 times smaller. What it does not know it cannot draft; the model
# still writes it.

# %%
from angeljax.speculative import EagleConfig, EagleDrafter, EagleTree, init_eagle

config = EagleConfig.of(model.config, draft_vocab_size=VOCABULARY)
known_ids, coverage = draft_vocabulary(ids, mask, VOCABULARY, model.config.vocab_size)
data = MaskedTokens(
    ids, mask, length=LENGTH, batch_size=2, vocab_size=model.config.vocab_size
)
print(f"{VOCABULARY} tokens are {coverage:.1%} of the answers")
print(f"the head reads the outputs of layers {config.target_layers}")
first = [data.batch(0)["tokens"][:, :-1]]
scales = feature_scales(model, params, config.target_layers, first)
head = init_eagle(config, jax.random.key(0), target=params, ids=known_ids)
size = sum(x.size for x in jax.tree.leaves(head))
whole = sum(x.size for x in jax.tree.leaves(params))
print(f"{size / 1e6:.1f} million parameters; the model has {whole / 1e6:.1f}")

# %% [markdown]
# One training step does at every place of a text what drafting does from there: `steps=3`
# drafts in a row, each from the head's own output before it ("training-time test"), against the
# model's distribution at that place. `fit` is the project's training loop. Every 20 steps we
# draft for real, for questions that were not trained on:

# %%
asked = [encode(f"Tell me about {thing}.") for thing in HELD_OUT]
unseen = autoregressive(model, params, asked, **LIMITS)
task = EagleTask(model, config, EagleLoss(steps=3), "float32")
trainable, frozen = task.init(params, head, scales)


def drafter_of(trainable, **options):
    return EagleDrafter(config, task.head(trainable, frozen), **options)


def held_out(trainable, opt_state=None, step=0):
    drafter = drafter_of(trainable, num_tokens=3)
    out = generate(model, params, asked, drafter=drafter, **LIMITS)
    return {"held out": out.tau}


class Keep:
    """Takes the numbers that `fit` logs."""

    def __init__(self):
        self.rows = [(0, held_out(trainable))]

    def write(self, step, values):
        self.rows.append((step, dict(values)))

    def close(self):
        pass


log = Keep()
result = fit(
    task.loss,
    trainable,
    data.batch,
    frozen=frozen,
    optimizer=make_optimizer(OptimizerConfig(lr=1e-3, warmup=STEPS // 10), STEPS),
    steps=STEPS,
    clip=1.0,
    log_every=2 if SMOKE else 10,
    writers=lambda start: [log],
    evaluate=held_out,
    evaluate_every=0 if SMOKE else 20,
    max_minutes=6,  # on a slow machine it ends before the last step
)

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), dpi=80, layout="constrained")
for k in range(3):
    points = [(s, v[f"top1/{k}"]) for s, v in log.rows if f"top1/{k}" in v]
    axes[0].plot(*zip(*points, strict=True), "o-", ms=3, label=f"draft {k + 1}")
axes[0].set(xlabel="step", ylabel="share of right drafts", ylim=(0, 1))
axes[0].set_title("text that it is trained on")
axes[0].legend(fontsize=8)
points = [(s, v["held out"]) for s, v in log.rows if "held out" in v]
axes[1].plot(
    *zip(*points, strict=True), "o-", color="#aa3377", label="EAGLE-3, 3 drafts"
)
recycled = generate(model, params, asked, drafter=TokenRecycling(nodes=15), **LIMITS)
axes[1].axhline(recycled.tau, color="gray", ls="--", label="token recycling, 15 nodes")
axes[1].set(xlabel="step", ylabel="tokens for each forward", title="other questions")
axes[1].legend(fontsize=8)
plt.show()
print(f"tau on other questions: {points[0][1]:.2f} before, {points[-1][1]:.2f} after")

# %% [markdown]
# The left panel looks at each draft as if those before it were right; the right one counts what
# is really gained. After the 120 steps of the kept run, a few minutes on two cores, the head has
# read some thirty pages, and drafts better than token recycling does, with 3 drafts in place of
# 14. The curves still rise.
#
# A head can also grow a tree: it follows the branches that it is surest of, and keeps the best
# nodes ([arXiv 2406.16858](https://arxiv.org/abs/2406.16858)). The text is the same again. And
# a head is a folder with two files, under the names that SGLang and vLLM load:

# %%
from safetensors import safe_open

from angeljax.speculative import load_eagle, save_eagle

finished = result.trainable
shapes = {
    "3 drafts": {"num_tokens": 3},
    "a tree of 8": {"growth": EagleTree(8, branches=3, levels=2)},
}
for name, options in shapes.items():
    drafter = drafter_of(finished, **options)
    out = generate(model, params, asked, drafter=drafter, **LIMITS)
    same = bool((out.tokens == unseen.tokens).all())
    print(f"{name:12} the same: {same}, tau {out.tau:.2f}")

own = task.head(finished, frozen)
saved = save_eagle(folder / "head", config, own, dtype=jnp.float32)
again, read = load_eagle(saved, model.config)
equal = jax.tree.map(lambda a, b: bool((a == b).all()), own, read)
print(f"read again, the same: {again == config and all(jax.tree.leaves(equal))}")
with safe_open(saved / "model.safetensors", framework="np") as file:
    print(sorted(file.keys()))

# %% [markdown]
# For a drafter in earnest: text of tens of thousands of questions, and some hours of one GPU.
# `EagleTrainConfig` describes such a run in a YAML file, text and measuring included
# ([guide](https://github.com/angeljax/angeljax/blob/main/docs/guides/speculative.md)).
#
# ## When drafts do not pay
#
# They often do not, and then the best is plain decoding. Look at the two sides of the fraction:
#
# * **$v(W)$ rises steeply**: a CPU, or a large batch that keeps the machine busy as it is. Use
#   shorter drafts; smaller trees; `auto_generate`, which decides by measurement.
# * **$\tau$ is small**: free text at a high temperature repeats nothing. Use `min_ngram=2` with
#   prompt lookup, so that fewer wrong drafts are read. Train a head on text of the kind that
#   you serve.
# * **$C$ is large**: a copy of the model that takes half the time of the model must be right very
#   often. Fewer drafts; a copy in a format with a
#   [fast kernel](https://github.com/angeljax/angeljax/blob/main/docs/guides/kernels.md); fewer
#   layers; a head instead of a copy.
# * **The model itself is small**: then a step is mostly overhead, and so are the drafts.
#
# In no case is the text worse. Nothing is at stake but time.
#
# ## Exercises
#
# 1. `PromptLookup(8)` and `PromptLookup(8, min_ngram=3)`: what happens to $\tau$ and to the
#    share of rounds with a draft, for "edit" and for "story"?
# 2. Give `TokenRecycling` 4, 8, 31 nodes. Where is the best, by $\tau$ alone, and by the
#    profile? What does `choose` say?
# 3. Which layers can be skipped? Try the first ones, the last ones, every second one.
# 4. `Sampling(temperature=0.8, rule="rejection")` with a chain: is the text another? Is $\tau$
#    larger?
# 5. Train the head with `EagleLoss(steps=1)` and draft three tokens. What has the training-time
#    test been for?
# 6. Draft for "edit" and "story" with the trained head. Why is it worse there than for "Tell me
#    about lions"?
