"""What post-training quantization costs: every format, every algorithm, one model.

    python -m benchmarks.ptq_quality --model M --calibration ids.npy.xz
        --text wikitext2=t.npy.xz heldout=h.npy.xz --tag h100

Perplexity, KL divergence from the original model and top-1 agreement on full windows of
each text. Weights are quantized from float32 and evaluated in float32 (products in TF32
on a GPU), so that hardly anything but the quantization differs. `--rows` takes
regular expressions of `section: name`. `--smoke` runs a few rows on a tiny random
model, without any file.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import angeljax as aj
from angeljax.evaluation import evaluate, windows
from angeljax.formats import make_spec
from angeljax.kv_cache import KVCacheOptions, attach_kv_scales, calibrate_kv
from angeljax.models import (
    DecoderConfig,
    LanguageModel,
    load_model,
    stack_layers,
    unstack_layers,
    untie,
)
from angeljax.qat._tensor import FakeTensor
from angeljax.train import load_tokens
from angeljax.train.recovery import learn_focus
from angeljax.transforms import Rotation, apply_transforms
from benchmarks._ptq_rows import ROWS, SMOKE, PTQRow, named
from benchmarks._results import RESULTS, Row, write

PLAIN = ("int3:64", "int4:128", "int4:64", "int8:128")
# What `allocate` may choose from.
CANDIDATES = {
    "rtn": PLAIN,
    "gptq": tuple(f"{name}:gptq" for name in PLAIN),
    "rtn, NVFP4 too": (*PLAIN, "int4:32", "nvfp4"),
}
KINDS = ("hessian", "abs_sum", "histogram", "ema", "token_amax")


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all rows share.

    Attributes:
      model: float32, layers stacked: one program serves them all.
      params: the original.
      calibration: int32 `[rows, T]`.
      texts: name -> windows.
      batch_size: rows of a step of calibration.
    """

    model: LanguageModel
    params: Any
    calibration: np.ndarray
    texts: dict[str, Any]
    batch_size: int

    def batches(self) -> list[jax.Array]:
        """The calibration rows, in steps."""
        step = self.batch_size
        starts = range(0, len(self.calibration), step)
        return [jnp.asarray(self.calibration[i : i + step]) for i in starts]

    @functools.cached_property
    def statistics(self) -> aj.Statistics:
        """Of inputs that nothing rotates: for all rows that look at one pass."""
        recipe = aj.Recipe(rules=[aj.Rule(format="int4")])
        return aj.calibrate(
            self.model, self.params, self.batches(), recipe, statistics=KINDS
        )

    @functools.cached_property
    def rotated(self) -> tuple[LanguageModel, Any]:
        """The same function with R1 and R2 merged into its weights."""
        model, params = untie(self.model, self.params)
        rotation = Rotation(head_dim=model.config.head_dim)
        recipe = aj.Recipe(rules=[aj.Rule(format="int8")], transforms=[rotation])
        return model, apply_transforms(params, recipe)[0]

    def compressed(self, row: PTQRow) -> tuple[LanguageModel, Any]:
        """The model and the compressed tree of a row."""
        model, params = self.model, self.params
        if "rotated" in row.how:
            model, params = self.rotated
        recipe = row.recipe()
        if row.how == "kv":
            assert recipe.kv_cache is not None
            return _with_kv(self, recipe.kv_cache)
        if row.how == "focus":
            # The loss goes back through every layer: short rows keep that small.
            short = self.calibration[:, : self.calibration.shape[1] // 512 * 512]
            rows = short.reshape(-1, 512) if short.size else self.calibration
            few = [jnp.asarray(rows[i : i + 4]) for i in range(0, len(rows), 4)][:64]
            return model, learn_focus(model, params, recipe, few, steps=2 * len(few))[0]
        if "layers" in row.how:
            return model, aj.compress_sequential(
                model,
                params,
                recipe,
                self.batches(),
                progress=False,
            )
        stats = None
        if row.how == "pass":
            # Inputs that a rule rotates have statistics of their own.
            shared = all(rule.get("rotation") is None for rule in row.rules)
            stats = self.statistics if shared else None
            if stats is None:
                stats = aj.calibrate(model, params, self.batches(), recipe)
        return model, aj.compress(params, recipe, stats, progress=False)


def _with_kv(
    bench: Bench, options: KVCacheOptions
) -> tuple[LanguageModel, dict[str, Any]]:
    """A model whose logits go through a quantized cache."""
    model, params = dataclasses.replace(bench.model, kv_cache=options), bench.params
    if options.static:
        scales = calibrate_kv(bench.model, params, bench.batches()[:4], options)
        params = attach_kv_scales(params, scales)
    return model, params


def comparable(tree: Any) -> Any:
    """The tree with weights as arrays, so that rows share one compiled evaluation.

    Where activations are rounded the array stands in a box that says how, and nothing
    else about the format.
    """

    def one(q: Any) -> Any:
        if not isinstance(q, aj.QTensor):
            return q
        w = q.dequantize(jnp.float32)
        if q.spec.activation is None:
            return w
        spec = make_spec(
            q.shape,
            jnp.float32,
            format="int8",
            activation=q.spec.activation,
            rotation=q.spec.rotation or None,
        )
        static = {n: p for n, p in q.planes.items() if n == "input_scale"}
        return FakeTensor(planes={"codes": w, **static}, spec=spec)

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, aj.QTensor))


def measure(bench: Bench, row: PTQRow) -> list[Row]:
    """Compresses and evaluates one row."""
    began = time.perf_counter()
    model, tree = bench.compressed(row)
    jax.block_until_ready(jax.tree.leaves(tree))
    return judged(bench, row, model, tree, time.perf_counter() - began)


def judged(
    bench: Bench, row: PTQRow, model: LanguageModel, tree: Any, seconds: float
) -> list[Row]:
    """The numbers of a compressed tree."""
    case = {"section": row.section, "row": row.name}
    rows = [Row(case, "compress_time", seconds, "s")]
    weights = [q for q in jax.tree.leaves(tree, is_leaf=_packed) if _packed(q)]
    if weights:
        bits = 8 * sum(q.nbytes for q in weights) / sum(q.size for q in weights)
        rows.append(Row(case, "bits_per_weight", bits, "bit"))
    dense = comparable(tree)
    if 0 in dense["layers"]:  # layers apart, as allocation has them
        dense = stack_layers(dense)
    for name, text in bench.texts.items():
        got = evaluate(
            model.logits,
            dense,
            text,
            reference=bench.params,
            reference_fn=bench.model.logits,
            batch_size=2,
            progress=False,
        )
        assert got.kl is not None and got.top1_agreement is not None
        where = {**case, "text": name}
        rows.append(Row(where, "perplexity", min(got.perplexity, 1e30), "1"))
        rows.append(Row(where, "kl", got.kl, "nats"))
        rows.append(Row(where, "top1_agreement", got.top1_agreement, "1"))
    shown = {f"{r.case.get('text', '')} {r.metric}": round(r.value, 4) for r in rows}
    print(f"{row.section}: {row.name}", shown, flush=True)
    return rows


def allocated(
    bench: Bench, bits: float, tokens: int, kinds: list[str]
) -> Iterator[tuple[PTQRow, Any, float]]:
    """Mixed precision at a number of bits, from each list of candidates."""
    model = dataclasses.replace(bench.model, scan_layers=False)
    params = unstack_layers(bench.params)
    batches = [jnp.asarray(bench.calibration[:1, :tokens])]
    for name in kinds:
        stats = None
        if "gptq" in name:
            recipe = aj.Recipe(rules=[aj.Rule(format="int4")])
            stats = aj.calibrate(
                model, params, bench.batches(), recipe, statistics=("hessian",)
            )
        chosen = aj.allocate(
            model,
            params,
            stats,
            formats=CANDIDATES[name],
            batches=batches,
            budget_bits=bits,
            verify=False,
            progress=False,
        )
        print(f"allocated {name}: {chosen.seconds:.0f} s, {chosen.passes} passes")
        tree = aj.compress(params, chosen.recipe, stats, progress=False)
        row = PTQRow(f"{bits:g} bits on average", f"allocated, {name}", ())
        yield row, tree, chosen.seconds


def original(bench: Bench) -> list[Row]:
    """Perplexities of the model itself."""
    rows = []
    for name, text in bench.texts.items():
        got = evaluate(
            bench.model.logits,
            bench.params,
            text,
            batch_size=bench.batch_size,
            progress=False,
        )
        case = {"section": "original", "row": "float32", "text": name}
        rows.append(Row(case, "perplexity", got.perplexity, "1"))
    return rows


def _packed(x: Any) -> bool:
    return isinstance(x, aj.QTensor)


def tiny() -> Bench:
    """A random model for `--smoke`."""
    config = DecoderConfig(
        model_type="llama",
        vocab_size=64,
        hidden_size=128,
        num_layers=2,
        intermediate_size=128,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
    )
    model = LanguageModel(config, scan_layers=True)
    params = model.init(jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, 64, 600)
    cut = windows(ids[:200], 32, 32)
    return Bench(model, params, ids[200:600].reshape(-1, 40), {"made up": cut}, 4)


def opened(args: Any) -> Bench:
    """The model, the calibration rows and the texts of the command line."""
    loaded = load_model(args.model, dtype=jnp.float32, compute_dtype=jnp.float32)
    params = jax.jit(stack_layers)(loaded.params)
    model = dataclasses.replace(loaded.model, scan_layers=True)
    ids = load_tokens(args.calibration, None)
    count = (len(ids) - 1) // args.length
    if count < args.rows_of_calibration:
        raise SystemExit(f"--calibration has {count} rows of {args.length} tokens")
    picked = np.random.default_rng(0).permutation(count)[: args.rows_of_calibration]
    at = picked[:, None] * args.length + np.arange(args.length)
    texts = {}
    for entry in args.text:
        name, _, path = entry.partition("=")
        cut = windows(
            load_tokens([path], None), args.length, args.length, drop_last=True
        )
        texts[name] = type(cut)(*(x[: args.windows] for x in cut))
    return Bench(model, params, ids[at].astype(np.int32), texts, args.batch_size)


def arguments() -> Any:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", nargs="*", default=[], help="token files")
    parser.add_argument("--text", nargs="*", default=[], help="name=token file")
    parser.add_argument(
        "--rows", nargs="*", default=["."], help="regular expressions, in this order"
    )
    parser.add_argument("--rows-of-calibration", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=64, help="of each text")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="rows at a time")
    parser.add_argument("--allocate", type=float, help="bits: mixed precision")
    parser.add_argument("--allocate-tokens", type=int, default=2048)
    parser.add_argument("--candidates", nargs="*", choices=CANDIDATES)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--tag", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.smoke and not (args.calibration and args.text):
        parser.error("pass --calibration and --text, or --smoke")
    return args


def main() -> None:
    """Measures the rows and writes after each."""
    args = arguments()
    bench = tiny() if args.smoke else opened(args)
    chosen: list[PTQRow] = []
    for pattern in args.rows:
        chosen += [row for row in named(pattern) if row not in chosen]
    if args.smoke and args.rows == ["."]:
        chosen = [r for r in ROWS if f"{r.section}: {r.name}" in SMOKE]
    if any(row.how == "pass" for row in chosen):
        _ = bench.statistics
    if any("rotated" in row.how for row in chosen):
        _ = bench.rotated
    results: dict[int, list[Row]] = {-1: original(bench)}
    found = list(results[-1])
    # Most of a row's time on a GPU is compilation, which threads do side by side.
    with ThreadPoolExecutor(args.threads) as pool:
        jobs = [pool.submit(measure, bench, row) for row in chosen]
        for job in as_completed(jobs):
            i = jobs.index(job)
            try:
                results[i] = job.result()
            except (ValueError, RuntimeError) as e:
                print(f"{chosen[i].section}: {chosen[i].name}: {e}", flush=True)
                continue
            found = [r for k in sorted(results) for r in results[k]]
            write("ptq_quality", found, device_tag=args.tag, directory=args.out)
    if args.allocate:
        candidates = args.candidates or list(CANDIDATES)
        for row, tree, took in allocated(
            bench, args.allocate, args.allocate_tokens, candidates
        ):
            found += judged(bench, row, bench.model, tree, took)
            write("ptq_quality", found, device_tag=args.tag, directory=args.out)


if __name__ == "__main__":
    main()
