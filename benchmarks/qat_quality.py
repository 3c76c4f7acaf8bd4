"""Quality of models trained for few bits, at equal numbers of tokens.

    python -m benchmarks.qat_quality --model M --data ids.npy ... --wikitext t.npy
        --heldout h.npy --tasks encoded/*.npz --tokens 20000000 --seeds 0,1

Every row starts from the same model, sees the same tokens in the same order (by seed)
and learns from the start itself as its teacher (KL divergence of the logits, weight 1,
no cross entropy). Embeddings and the tied head stay as they are. `--search` trains each
row for a short time at each learning rate instead, for a fair choice of one.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import angeljax as aj
from angeljax._leaves import flatten
from angeljax.evaluation import EncodedTask, evaluate, score_encoded, windows
from angeljax.qat import diagnostics
from angeljax.train import load_tokens
from angeljax.train.losses import DistillOptions
from benchmarks import _qat
from benchmarks._results import Row, write

# Rate of each row, chosen from what `--search` found (docs/results_training.md).
LR = {
    "absmean": 1e-3,
    "absmean+blend": 2e-3,
    "tequila": 1e-3,
    "sherry": 1e-3,
    "sherry+arenas": 1e-3,
    "sherry+blend": 2e-3,
    "seq2": 1e-3,
    "int4": 3e-4,
}
DISTILL = DistillOptions(weight=1.0, lm_weight=0.0)
# Layers whose gradients are decomposed.
LAYERS = (0, 10, 20, 29)
RANKED = ("layers/attn/q_proj/kernel", "layers/mlp/down_proj/kernel")


def score(begin: Any, model: Any, params: Any, args: Any) -> list[tuple[str, float]]:
    """Perplexities, KL and accuracies of a dense tree."""
    found: list[tuple[str, float]] = []
    for name, file, length in (
        ("wikitext", args.wikitext, 2048),
        ("held-out", args.heldout, 1024),
    ):
        ids = load_tokens((file,), None)
        cut = windows(ids.astype(np.int32), length, length, drop_last=True)
        result = evaluate(
            model.logits,
            params,
            cut,
            reference=jax.tree.map(lambda x: x.astype(jnp.bfloat16), begin.params),
            reference_fn=begin.model.logits,
            batch_size=16384 // length,
            progress=False,
        )
        assert result.kl is not None and result.top1_agreement is not None
        found += [
            (f"{name} perplexity", result.perplexity),
            (f"{name} kl", result.kl),
            (f"{name} top1_agreement", result.top1_agreement),
        ]
    accuracies = []
    for file in args.tasks:
        task = score_encoded(
            model.logits,
            params,
            EncodedTask.load(file),
            max_length=2048,
            tokens_per_batch=32768,
            progress=False,
        )
        found.append((f"{task.name} acc_norm", task.acc_norm))
        found.append((f"{task.name} acc", task.acc))
        accuracies.append(task.acc_norm)
    if accuracies:
        found.append(("tasks acc_norm", float(np.mean(accuracies))))
    return found


class Diagnosis:
    """Trapping over the training of one row."""

    def __init__(self, run: _qat.Training, data: Any) -> None:
        self.run, self.codes = run, None
        at = np.arange(8)[:, None] * 100_003 % (len(data) - 2000)
        batch = {"tokens": data[at + np.arange(run.length + 1)].astype(jnp.int32)}

        @jax.jit
        def gradients(trainable: Any, step: Any) -> Any:
            grad = jax.grad(run.task.loss, has_aux=True)
            g, _ = grad(trainable, run.frozen, batch, step, jax.random.key(0))
            return {
                leaf.path: leaf.value[jnp.asarray(LAYERS)]
                for leaf in flatten(g["params"])[0]
                if leaf.path in RANKED
            }

        self.gradients = gradients

    def at(self, trainable: Any, step: int) -> list[tuple[str, dict, float]]:
        """Flips since the last call and ranks now."""
        params, state = self.run.task.latent(trainable, self.run.frozen)
        assert state is not None
        codes = jax.jit(diagnostics.codes)(params, state)
        out = []
        if self.codes is not None:
            rate = diagnostics.flip_rates(self.codes, codes)[1]
            out.append(("flip rate", {"step": step}, float(rate)))
        self.codes = codes
        for path, g in self.gradients(trainable, step).items():
            ranks = diagnostics.effective_rank(g)
            for layer, rank in zip(LAYERS, ranks, strict=True):
                case = {"step": step, "leaf": path, "layer": layer}
                out.append(("effective rank", case, float(rank)))
        return out

    def histogram(self, trainable: Any) -> list[tuple[str, dict, float]]:
        """Shares of |w| / alpha by bins of 0.05."""
        params, state = self.run.task.latent(trainable, self.run.frozen)
        assert state is not None
        found = diagnostics.histogram(params, state, bins=60, limit=3.0)
        counts = np.sum([np.asarray(c, float) for c in found.counts.values()], axis=0)
        shares = counts / counts.sum()
        return [
            ("histogram", {"bin": i * 0.05}, float(share))
            for i, share in enumerate(shares)
        ]


def train(row: str, seed: int, lr: float, args: Any, begin: Any, data: Any) -> Any:
    """One run: its rows, the trained tree and the task."""
    # Equal parts, which share a compilation.
    steps = args.tokens // (args.batch * args.length) // args.points * args.points
    run = _qat.training(begin, row, steps=steps, length=args.length, distill=DISTILL)
    order = _qat.windows_of(len(data), args.length, args.batch, steps, seed)
    tokens = steps * args.batch * args.length
    case = {"row": row, "seed": seed, "lr": lr, "tokens": tokens}
    rows, trainable, state = [], run.trainable, run.opt_state
    watch = Diagnosis(run, data) if row in args.diagnose and seed == 0 else None
    began, done = time.perf_counter(), 0
    for part in np.split(order, args.points):
        if watch is not None and done % max(steps // 6, 1) < len(part):
            for name, more, value in watch.at(trainable, done):
                rows.append(Row({**case, **more}, name, value, "1"))
        (trainable, state, _), losses = run.run(trainable, state, data, part, done, lr)
        done += len(part)
        loss = float(np.mean(np.asarray(losses["loss"])))
        seen = {**case, "seen": done * args.batch * args.length}
        rows.append(Row(seen, "loss", loss, "nats"))
    seconds = time.perf_counter() - began
    rows.append(Row(case, "minutes", seconds / 60, "min"))
    rows.append(Row(case, "last loss", loss, "nats"))
    if watch is not None:
        for name, more, value in watch.at(trainable, done) + watch.histogram(trainable):
            rows.append(Row({**case, **more}, name, value, "1"))
    rate = done * args.batch * args.length / seconds
    print(f"{row:16} seed {seed} lr {lr:g}: loss {loss:.4f}, {rate:.0f} tokens/s, "
          f"{seconds:.0f} s", flush=True)  # fmt: skip
    return run, trainable, case, rows


def data_free(row: str, begin: Any) -> Any:
    """The start, packed without training, dense."""
    recipe = _qat.recipe_of(row)
    if recipe is None:
        return begin.params
    return jax.tree.map(
        lambda x: x.dequantize(jnp.bfloat16) if isinstance(x, aj.QTensor) else x,
        aj.compress(begin.params, recipe, progress=False),
        is_leaf=lambda x: isinstance(x, aj.QTensor),
    )


def save_packed(path: Path, run: Any, trainable: Any) -> float:
    """Packed leaves and norms as one file; the largest difference of the logits."""
    params, state = run.task.latent(trainable, run.frozen)
    packed = aj.qat.finalize(params, state)
    arrays: dict[str, Any] = {}
    for leaf in flatten(packed)[0]:
        if isinstance(leaf.value, aj.QTensor):
            for name, plane in leaf.value.planes.items():
                if name == "scale":
                    plane = jax.lax.bitcast_convert_type(plane, jnp.uint16)
                arrays[f"{leaf.path}#{name}"] = np.asarray(plane)
        elif "embed" not in leaf.path:
            arrays[leaf.path] = np.asarray(leaf.value)
    np.savez_compressed(path, **arrays)
    tokens = jnp.arange(256, dtype=jnp.int32)[None] * 7 % 49152
    deployed = run.task.deployed(trainable, run.frozen)
    logits = jax.jit(run.task.objective.model.logits)
    return float(jnp.abs(logits(packed, tokens) - logits(deployed, tokens)).max())


def main() -> None:
    """Trains, scores and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--wikitext")
    parser.add_argument("--heldout")
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--rows", default="absmean,tequila,sherry,sherry+arenas,seq2")
    parser.add_argument("--untrained", default="bfloat16,absmean,sherry,seq2,int4")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--points", type=int, default=30)
    parser.add_argument("--search", help="learning rates with commas")
    parser.add_argument("--lr", default="", help="row=rate with commas")
    parser.add_argument("--diagnose", default="sherry,sherry+arenas,sherry+blend")
    parser.add_argument("--packed", type=Path)
    parser.add_argument("--pack", default="sherry+blend", help="the row to pack")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run later")
    parser.add_argument("--part", default="0/1", help="every n-th run: part i/n")
    parser.add_argument("--tag", default=None)
    args = parser.parse_args()
    args.diagnose = args.diagnose.split(",")
    part, parts = map(int, args.part.split("/"))
    rates = LR | {r: float(x) for r, x in
                  (p.split("=") for p in args.lr.split(",") if p)}  # fmt: skip
    unknown = [r for r in args.rows.split(",") if r not in _qat.ROWS]
    unrated = [r for r in args.rows.split(",") if r not in rates and not args.search]
    if unknown or unrated:
        parser.error(
            f"unknown row {unknown[0]!r}: use {', '.join(_qat.ROWS)}"
            if unknown
            else f"row {unrated[0]!r} has no rate: pass --lr {unrated[0]}=1e-3"
        )
    began = time.perf_counter()
    begin = _qat.start(args.model)
    data = _qat.token_stream(args.data)
    rows = args.rows.split(",")
    jobs: list[tuple[str, int, float]]
    if args.search:
        found = map(float, args.search.split(","))
        jobs = [(r, 0, lr) for r, lr in itertools.product(rows, found)]
        # Rates of one row go together: they share a compilation.
        mine = [j for j in jobs if rows.index(j[0]) % parts == part]
    else:
        seeds = [int(s) for s in args.seeds.split(",")]
        jobs = [(r, s, rates[r]) for s in seeds for r in rows]
        mine = jobs[part::parts]
    out: list[Row] = []
    claim = "qat_search" if args.search else "qat_quality"
    if not args.search and part == parts - 1:
        for row in filter(None, args.untrained.split(",")):
            case = {"row": row, "seed": -1, "lr": 0.0, "tokens": 0}
            values = score(begin, begin.model, data_free(row, begin), args)
            out += [Row(case, name, v, "1") for name, v in values]
            print(row, "untrained", {n: round(v, 4) for n, v in values}, flush=True)
    for row, seed, lr in mine:
        if time.perf_counter() - began > 60 * args.minutes:
            print(f"no time for {row} seed {seed}", flush=True)
            continue
        run, trainable, case, more = train(row, seed, lr, args, begin, data)
        out += more
        if not args.search:
            dense = jax.jit(run.task.deployed)(trainable, run.frozen)
            values = score(begin, run.task.objective.model, dense, args)
            out += [Row(case, name, v, "1") for name, v in values]
            print(row, seed, {n: round(v, 4) for n, v in values}, flush=True)
        if args.packed and row == args.pack and seed == 0:
            worst = save_packed(args.packed, run, trainable)
            out.append(Row(case, "packed minus trained logits", worst, "1"))
            print("largest difference packed - trained", worst, flush=True)
        del run, trainable
        tag = "-".join(filter(None, [args.tag, f"{part}" if parts > 1 else None]))
        write(claim, out, device_tag=tag or None)


if __name__ == "__main__":
    main()
