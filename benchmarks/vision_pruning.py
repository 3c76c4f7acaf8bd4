"""What each method of token pruning costs a small vision-language model.

    python -m benchmarks.vision_pruning --images DIR --model smollm2 --tag h100

A controlled study, not a result of any published model. A tower of 6 layers and a
projector are trained from scratch, with SmolLM2-135M behind them, on scenes of one to
four handwritten digits on photographs (`_scenes.py`), which are asked in words what is
where (`_toy_vlm.py`). Then the image is pruned to a share of its 256 tokens, before the
language model (FastV: behind its layer 2), and the same questions are asked about
scenes with digits never seen in training. An answer counts if every token of it is the
likeliest one. A learned scorer is trained through the frozen model as VisionSelector
does. `--smoke` runs everything tiny, without any file.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import load_file, save_file

from angeljax import tokens
from angeljax.models import DecoderConfig, load_model, prefill_pruned, stack_layers
from angeljax.tokens import Prompt, Selection
from benchmarks import _scenes as scenes
from benchmarks import _toy_vlm as vlm
from benchmarks._results import RESULTS, Row, write

KEEPS = (0.25, 0.1, 0.5)
QUESTIONS = len(scenes.KINDS)
FASTV_LAYER = 2

# name -> (images, question embeddings or None, scorer, key, keep) -> Selection
Choose = Callable[..., Selection]


def _method(name: str, importance: str | None = None, **options: Any) -> Choose:
    """A method of `angeljax.tokens` with what it may go by."""

    def choose(images: Any, text: Any, scorer: Any, key: Any, keep: float) -> Selection:
        x = images.embeds
        scores = {
            None: lambda: None,
            "scorer": lambda: tokens.score_tokens(scorer, x),
            "attention": lambda: images.attn,
            "norm": lambda: tokens.norm_importance(x),
            "text": lambda: tokens.text_relevance(x, text),
            "distinct": lambda: tokens.distinctiveness(x),
        }
        takes = dict(options)
        if takes.pop("object_attn", False):
            takes["object_attn"] = images.object_attn
        if takes.pop("keys", False):
            takes["keys"] = images.keys
        return tokens.prune(
            x,
            keep=keep,
            method=name,
            importance=scores[importance](),
            # Methods that take both look at the attention first.
            attn=images.attn if importance is None else None,
            text=text,
            key=key,
            **takes,
        )

    return choose


METHODS: dict[str, Choose] = {
    "random": _method("random"),
    "uniform": _method("uniform"),
    "divprune": _method("divprune"),
    "dart": _method("dart"),
    "cdpruner": _method("cdpruner"),
    "scope": _method("scope"),
    "hiprune": _method("hiprune", object_attn=True),
    "vispruner": _method("vispruner"),
    "visionzip": _method("visionzip", keys=True),
    "prumerge": _method("prumerge", keys=True),
    "prumerge_plus": _method("prumerge_plus", keys=True),
    "tome": _method("tome"),
    "attention, top k": _method("idpruner", "attention", lam=1.0),
    "norm, top k": _method("idpruner", "norm", lam=1.0),
    "distinctiveness, top k": _method("idpruner", "distinct", lam=1.0),
    "visionselector": _method("visionselector", "scorer"),
    "idpruner": _method("idpruner", "scorer"),
    "idpruner, lam 0.9": _method("idpruner", "scorer", lam=0.9),
    "idpruner, lam 0.1": _method("idpruner", "scorer", lam=0.1),
    "idpruner, soft top k": _method(
        "idpruner", "scorer", importance_transform="soft_topk"
    ),
    "idpruner by attention": _method("idpruner", "attention"),
    "idpruner by norm": _method("idpruner", "norm"),
    "idpruner by distinctiveness": _method("idpruner", "distinct"),
    "scope by scorer": _method("scope", "scorer"),
}
NEEDS_TEXT = ("dart", "cdpruner")


@functools.partial(jax.jit, static_argnames=("toy",))
def encode(toy: vlm.Toy, params: Any, pixels: jax.Array) -> Any:
    """Image tokens with attention and keys of the tower."""
    return toy.eyes.encode_images(params, vlm.seen(pixels), attention=True)


@functools.partial(jax.jit, static_argnames=("toy", "name", "keep"))
def pruned(
    toy: vlm.Toy,
    params: Any,
    images: Any,
    asked: Any,
    scorer: Any,
    key: jax.Array,
    name: str,
    keep: float,
) -> Any:
    """For each question: image tokens, mask, positions, and how many tokens."""
    ids, real, answer = (x.reshape(-1, x.shape[-1]) for x in asked)
    text = None
    if by_question := name in NEEDS_TEXT:
        images = jax.tree.map(_for_questions, images)
        words = toy.language().embed(params["text"], ids)
        text = jnp.where((real & ~answer)[..., None], words, 0)
    chosen = METHODS[name](images, text, scorer, key, keep)
    where = 0, images.embeds.shape[1]
    short = tokens.apply_selection(chosen, Prompt(embeds=images.embeds), where)
    found = short.prompt.embeds, short.prompt.mask, short.prompt.positions, chosen.count
    return found if by_question else jax.tree.map(_for_questions, found)


@functools.partial(jax.jit, static_argnames=("toy",))
def answered(
    toy: vlm.Toy, params: Any, image: Any, used: Any, at: Any, asked: Any
) -> jax.Array:
    """bool `[S, Q]`: which questions are answered rightly."""
    ids, real, answer = (x.reshape(-1, 1, x.shape[-1]) for x in asked)
    logits = vlm.answer_logits(
        toy.language(),
        params["text"],
        image,
        ids,
        real,
        image_mask=used,
        image_positions=at,
    )
    hit = (logits.argmax(-1) == ids[:, :, 1:]) | ~answer[:, :, 1:]
    return jnp.all(hit, -1).reshape(-1, QUESTIONS)


def _for_questions(x: jax.Array) -> jax.Array:
    return jnp.repeat(x, QUESTIONS, axis=0)


@functools.partial(jax.jit, static_argnames=("toy", "keep", "length"))
def fastv(
    toy: vlm.Toy, params: Any, images: Any, asked: Any, keep: float, length: int
) -> tuple[jax.Array, jax.Array]:
    """The same for FastV, inside the language model.

    Questions are read up to their answer, padded on the left to `length`; then the
    answer is read from the cache.
    """
    ids, real, answer = (x.reshape(-1, x.shape[-1]) for x in asked)
    model, width = toy.language(), ids.shape[1]
    image = _for_questions(images.embeds)
    first = jnp.argmax(answer, axis=1)  # of the answer
    back = first[:, None] - length + jnp.arange(length)
    question = jnp.take_along_axis(ids, jnp.maximum(back, 0), axis=1)
    words = model.embed(params["text"], question)
    count = image.shape[1]
    begin = model.embed(params["text"], jnp.full((len(ids), 1), vlm.BEGIN, jnp.int32))
    lead = jnp.ones((len(ids), 1 + count), bool)
    at = jnp.broadcast_to(jnp.arange(1 + count), lead.shape)
    prompt = Prompt(
        embeds=jnp.concatenate([begin, image.astype(words.dtype), words], axis=1),
        mask=jnp.concatenate([lead, back >= 0], axis=1),
        positions=jnp.concatenate([at, 1 + count + jnp.maximum(back, 0)], axis=1),
    )
    room = width - 1
    choose = functools.partial(tokens.fastv, keep=keep)
    read = prefill_pruned(
        model,
        params["text"],
        prompt,
        (1, 1 + count),
        choose,
        layer=FASTV_LAYER,
        room=room,
    )
    ahead = first[:, None] + jnp.arange(width)
    said = jnp.take_along_axis(ids, jnp.minimum(ahead, width - 1), axis=1)
    wanted = jnp.take_along_axis(answer, jnp.minimum(ahead, width - 1), axis=1)
    wanted &= ahead < width
    rest, _ = model.apply(params["text"], said[:, :-1], cache=read.cache)
    logits = jnp.concatenate([read.logits, rest], axis=1)
    hit = (logits.argmax(-1) == said) | ~wanted
    return jnp.all(hit, -1).reshape(-1, QUESTIONS), jnp.full(len(ids), keep * count)


def train_scorer(
    toy: vlm.Toy,
    params: Any,
    pictures: scenes.Pictures,
    table: scenes.Questions,
    *,
    steps: int,
    batch: int,
    lr: float,
) -> Any:
    """VisionSelector's scorer through the frozen model."""
    model = toy.language(vlm.Apart(vlm.TOKENS, table.tokens.shape[1]))

    def host(embeds: jax.Array, batch: Any, frozen: Any) -> jax.Array:
        rows = batch["rows"]
        ids = table.tokens[rows]
        logits = vlm.answer_logits(model, frozen["text"], embeds, ids, table.mask[rows])
        return vlm.answer_loss(logits, ids, table.answer[rows])

    task = tokens.ScorerTask(loss_fn=host, steps=steps)
    optimizer = tokens.scorer_optimizer(steps, lr=lr)
    scorer = tokens.init_scorer(jax.random.key(5), toy.text.hidden_size)
    state = optimizer.init(scorer)

    @jax.jit
    def step(scorer: Any, state: Any, frozen: Any, i: jax.Array) -> Any:
        key = jax.random.fold_in(jax.random.key(6), i)
        found, rows = scenes.batch(
            key, pictures.digits, pictures.photographs, count=batch, first=table.first
        )
        embeds = toy.eyes.encode_images(frozen, vlm.seen(found.pixels)).embeds
        made = {"embeds": embeds, "rows": rows}
        (loss, metrics), gradient = jax.value_and_grad(task, has_aux=True)(
            scorer, frozen, made, i, key
        )
        updates, state = optimizer.update(gradient, state, scorer)
        return jax.tree.map(jnp.add, scorer, updates), state, metrics

    for i in range(steps):
        scorer, state, metrics = step(scorer, state, params, jnp.int32(i))
        if i % 50 == 49 or i == steps - 1:
            shown = {k: round(float(v), 4) for k, v in metrics.items()}
            print(f"scorer {i + 1}: {shown}", flush=True)
    return scorer


def measure(
    toy: vlm.Toy,
    params: Any,
    scorer: Any,
    pictures: scenes.Pictures,
    table: scenes.Questions,
    *,
    names: list[str],
    keeps: tuple[float, ...],
    count: int,
    batch: int,
    threads: int = 8,
) -> Iterator[list[Row]]:
    """Accuracy of every method: of all tokens, then at one share after the other."""
    pieces = []
    for i in range(max(count // batch, 1)):
        found, rows = scenes.batch(
            jax.random.fold_in(jax.random.key(99), i),
            pictures.digits,
            pictures.photographs,
            count=batch,
            first=table.first,
        )
        asked = table.tokens[rows], table.mask[rows], table.answer[rows]
        pieces.append((encode(toy, params, found.pixels), asked))
    longest = int(jnp.max(jnp.argmax(table.answer, axis=1)))
    out: list[Row] = []

    def record(name: str, keep: float, hits: Any, kept: Any) -> float:
        right = np.concatenate([np.asarray(h) for h in hits])
        used = float(np.mean(np.concatenate([np.asarray(k) for k in kept])))
        case = {"method": name, "keep": keep, "tokens": round(used, 1)}
        n = right.size
        base = float(np.mean(scenes.CHANCE)) if keep == 1 else full
        mean = float(right.mean())
        out.append(
            Row(case, "accuracy", mean, "1", base, mean / base if base else None)
        )
        error = math.sqrt(mean * (1 - mean) / n)
        out.append(Row(case, "standard error", error, "1"))
        for kind, value in zip(scenes.KINDS, right.mean(0), strict=True):
            out.append(Row(case, f"accuracy, {kind}", float(value), "1"))
        kinds = " ".join(f"{v:.3f}" for v in right.mean(0))
        print(f"{name} {keep:g} ({used:.1f}): {mean:.4f} | {kinds}", flush=True)
        return mean

    def run(name: str, keep: float) -> Any:
        hits = []
        for i, (images, asked) in enumerate(pieces):
            if name == "fastv":
                hits.append(fastv(toy, params, images, asked, keep, longest))
                continue
            key = jax.random.fold_in(jax.random.key(7), i)
            given = params, images, asked, scorer, key
            *short, kept = pruned(toy, *given, name, keep)
            hits.append((answered(toy, params, *short, asked), kept))
        return zip(*hits, strict=True)

    everything = []
    for images, asked in pieces:
        image = _for_questions(images.embeds)
        used = jnp.ones(image.shape[:2], bool)
        at = jnp.broadcast_to(jnp.arange(image.shape[1], dtype=jnp.int32), used.shape)
        hits = answered(toy, params, image, used, at, asked)
        everything.append((hits, used.sum(1)))
    full = 1.0
    full = record("all tokens", 1.0, *zip(*everything, strict=True))
    yield out
    # Most of the time is the compiler's, which runs beside the device.
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for keep in keeps:
            work = functools.partial(run, keep=keep)
            for name, found in zip(names, pool.map(work, names), strict=True):
                record(name, keep, *found)
            yield out


def _tiny() -> tuple[vlm.Toy, Any, scenes.Pictures, scenes.Pictures, Any, Any]:
    config = DecoderConfig(
        model_type="llama",
        vocab_size=300,
        hidden_size=16,
        num_layers=3,
        intermediate_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        tied=True,
    )
    toy = vlm.Toy(config, hidden=16, layers=2, heads=2)
    text = toy.language().init(jax.random.key(0))
    pictures = scenes.made_up()

    def encode(text: str) -> list[int]:
        return list(text.encode())[-8:]

    table = scenes.questions(encode, pictures.names, 0)
    named = scenes.words(encode, pictures.names, text["embed_tokens"]["embedding"])
    return toy, text, pictures, pictures, table, named


def _real(args: argparse.Namespace) -> Any:
    loaded = load_model(args.model, dtype=jnp.float32, compute_dtype=jnp.bfloat16)
    text = jax.jit(stack_layers)(loaded.params)
    learn, test = (scenes.load(args.images, test=t) for t in (False, True))
    assert loaded.tokenizer is not None, "the model has one"
    encode = loaded.tokenizer.encode
    table = scenes.questions(encode, learn.names, encode("<|im_end|>")[0])
    named = scenes.words(encode, learn.names, text["embed_tokens"]["embedding"])
    return vlm.Toy(loaded.model.config), text, learn, test, table, named


def _flat(tree: Any) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


def main() -> None:
    """Trains, or takes what was trained, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tower-steps", type=int, default=2200)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--scorer-steps", type=int, default=200)
    parser.add_argument("--scorer-lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--methods", default=";".join([*METHODS, "fastv"]))
    parser.add_argument("--save", type=Path, help="where trained params go")
    parser.add_argument("--load", type=Path, help="params instead of training")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--tag", default="gpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    names = [name.strip() for name in args.methods.split(";")]
    if unknown := [n for n in names if n not in METHODS and n != "fastv"]:
        parser.error(f"unknown method {unknown[0]!r}: use {'; '.join(METHODS)}")
    if args.smoke:
        args.tower_steps, args.steps, args.scorer_steps = 2, 2, 2
        args.batch = args.scenes = 2
    elif args.images is None:
        parser.error("--images DIR with mnist_10k.npz and labels.jsonl, or --smoke")
    toy, text, learn, test, table, named = _tiny() if args.smoke else _real(args)
    shape = jax.eval_shape(lambda: toy.eyes.init(jax.random.key(0)))
    kinds = {k: shape[k] for k in ("vision", "projector")} | {"text": text}
    if args.load:
        stored, paths = load_file(args.load), _flat(kinds)
        values = [stored[name].astype(paths[name].dtype) for name in paths]
        params = jax.tree.unflatten(jax.tree.structure(kinds), values)
    else:
        params = vlm.train(
            toy,
            text,
            learn,
            table,
            named,
            tower_steps=args.tower_steps,
            steps=args.steps,
            batch=args.batch,
        )
    if args.save:
        save_file(
            {k: v.astype(jnp.bfloat16) for k, v in _flat(params).items()}, args.save
        )
    scorer = train_scorer(
        toy,
        params,
        learn,
        table,
        steps=args.scorer_steps,
        batch=args.batch,
        lr=args.scorer_lr,
    )
    for rows in measure(
        toy,
        params,
        scorer,
        test,
        table,
        names=names,
        keeps=KEEPS[:1] if args.smoke else KEEPS,
        count=args.scenes,
        batch=args.batch,
    ):
        path = write("vision_pruning", rows, device_tag=args.tag, directory=args.out)
    print(path)


if __name__ == "__main__":
    main()
