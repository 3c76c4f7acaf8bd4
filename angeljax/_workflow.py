"""What the command line and the demo share: open, compress, save, evaluate, generate.

Host-side steps on a language model of `angeljax.models` with its tokenizer. The parts
are public functions; this only strings them together.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from angeljax._report import CompressionReport, describe
from angeljax._report._table import megabytes
from angeljax.compress import compress
from angeljax.export import Manifest, load, load_manifest, save
from angeljax.recipe import Recipe

if TYPE_CHECKING:
    from angeljax.evaluation import EvalResult, Task, TaskResult
    from angeljax.models import LanguageModel, Tokenizer

DTYPES = ("bfloat16", "float32", "float16")


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model with parameters, from any source; `recipe` if it came compressed."""

    model: LanguageModel
    params: Any
    tokenizer: Tokenizer | None
    source: str
    recipe: Recipe | None = None

    @property
    def config_dict(self) -> dict[str, Any]:
        """The model's configuration as plain values."""
        return self.model.config.to_dict()

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          ValueError: the source has none.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"{self.source} has no tokenizer: put its tokenizer.json beside it"
            )
        return self.tokenizer


def compute_dtype() -> Any:
    """Dtype of activations: bfloat16 where there is hardware for it."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def open_model(source: str, *, dtype: str = "bfloat16") -> Opened:
    """Opens a model, or a checkpoint that angeljax wrote.

    Raises:
      ValueError: nothing is there, or it cannot be read; one line.
    """
    from angeljax.models import load_model

    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")
    if (Path(source) / "manifest.json").is_file():
        return open_checkpoint(source)
    loaded = load_model(source, dtype=jnp.dtype(dtype), compute_dtype=compute_dtype())
    return Opened(loaded.model, loaded.params, loaded.tokenizer, loaded.source)


def open_checkpoint(path: str | Path) -> Opened:
    """Opens a checkpoint that `save_model` wrote.

    Raises:
      ValueError: damaged, or it holds a param tree without a model.
    """
    from angeljax.models import DecoderConfig, LanguageModel, Tokenizer

    manifest = load_manifest(path)
    if manifest.model_config is None:
        raise ValueError(
            f"{path} holds parameters without a model configuration: "
            "load them with angeljax.load"
        )
    fields = dict(manifest.model_config)
    scan_layers = bool(fields.pop("scan_layers", False))
    config = DecoderConfig.from_dict(fields)
    params, recipe = load(path)
    tokenizer = (
        None
        if manifest.tokenizer_dir is None
        else Tokenizer.from_folder(manifest.tokenizer_dir)
    )
    model = LanguageModel(config, jnp.dtype(compute_dtype()), scan_layers)
    opened = Opened(model, params, tokenizer, str(path), recipe)
    return cached_as(read_sparsely(opened, recipe), recipe)


def read_sparsely(opened: Opened, recipe: Recipe | None) -> Opened:
    """The same with the attention of a recipe, if it has such a section."""
    if recipe is None or recipe.attention is None:
        return opened
    fn = recipe.attention.attention_fn()
    model = dataclasses.replace(opened.model, attention_fn=fn)
    return dataclasses.replace(opened, model=model)


def cached_as(opened: Opened, recipe: Recipe | None) -> Opened:
    """The same with the KV cache of a recipe, if it has such a section.

    Static scales that the params do not hold are calibrated on the default text.

    Raises:
      ValueError: as `kv_scaled`.
    """
    if recipe is None or recipe.kv_cache is None:
        return opened
    params = kv_scaled(opened, opened.params, recipe)
    model = dataclasses.replace(opened.model, kv_cache=recipe.kv_cache)
    return dataclasses.replace(opened, model=model, params=params)


def kv_scaled(
    opened: Opened,
    params: Any,
    recipe: Recipe,
    text: str | None = None,
    length: int = 512,
    max_tokens: int = 4096,
) -> Any:
    """The params with the static scales that the recipe's KV cache needs, if any.

    Args:
      opened: the model.
      params: of it, compressed or not.
      recipe: with a section `kv_cache` or without.
      text: as `load_text` takes it, what is read to find the scales.
      length: tokens that are read at once.
      max_tokens: how much of the text is read.

    Returns:
      The params; as they were if they need no scales, or have fitting ones.

    Raises:
      ValueError: there is no tokenizer, or no text.
    """
    from angeljax.kv_cache import attach_kv_scales, calibrate_kv, kv_scales

    options, config = recipe.kv_cache, opened.model.config
    if options is None or not options.static:
        return params
    try:
        kv_scales(params, options, config.num_layers, config.num_kv_heads)
    except ValueError:
        from angeljax.evaluation import load_text

        ids = opened.need_tokenizer().encode(load_text(text))[:max_tokens]
        length = min(length, len(ids))  # whole windows: padding is no text
        starts = range(0, len(ids) - length + 1, max(length, 1))
        tokens = [jnp.asarray([ids[i : i + length]], jnp.int32) for i in starts]
        model = dataclasses.replace(opened.model, kv_cache=None)
        scales = calibrate_kv(model, params, tokens, options)
        return attach_kv_scales(params, scales)
    return params


def abstract_params(source: str) -> tuple[dict[str, Any], Any]:
    """Configuration and param tree of abstract leaves; no weight is read.

    Raises:
      ValueError: as `open_model`.
    """
    from angeljax.models import LanguageModel, load_config

    if (Path(source) / "manifest.json").is_file():
        manifest = load_manifest(source)
        return dict(manifest.model_config or {}), _abstract_leaves(manifest)
    config = load_config(source)
    return config.to_dict(), LanguageModel(config).abstract(jnp.bfloat16)


def save_model(
    path: str | Path,
    opened: Opened,
    params: Any,
    recipe: Recipe | None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes parameters, recipe, configuration and tokenizer as one checkpoint.

    Static scales that the recipe's KV cache needs are calibrated if there are none.
    """
    if recipe is not None:
        params = kv_scaled(opened, params, recipe)
    save(
        path,
        params,
        recipe,
        model_config={
            **opened.config_dict,
            "scan_layers": opened.model.scan_layers,
        },
        source=opened.source,
        tokenizer=None if opened.tokenizer is None else opened.tokenizer.files,
        overwrite=overwrite,
    )


def compress_timed(
    opened: Opened, recipe: Recipe, *, progress: bool | None = None
) -> tuple[Any, float]:
    """The compressed tree and the seconds it took.

    Raises:
      RecipeError: the recipe is for another model, or does not fit the tree.
    """
    recipe.check_model(opened.config_dict)
    start = time.perf_counter()
    params = compress(opened.params, recipe, progress=progress or None)
    jax.block_until_ready(params)
    return params, time.perf_counter() - start


def text_windows(
    opened: Opened,
    text: str | None,
    length: int,
    stride: int | None = None,
    max_tokens: int = 0,
) -> Any:
    """Windows of token ids for `evaluate`; see `angeljax.evaluation.windows`.

    Raises:
      ValueError: the text is missing, empty, or the numbers make no windows.
    """
    from angeljax.evaluation import load_text, windows

    ids = opened.need_tokenizer().encode(load_text(text))
    return windows(ids[:max_tokens] if max_tokens else ids, length, stride)


def evaluate(
    opened: Opened,
    params: Any,
    windows: Any,
    *,
    reference: Any = None,
    reference_fn: Callable[..., Any] | None = None,
    batch_size: int = 4,
    progress: bool | None = None,
) -> EvalResult:
    """`angeljax.evaluation.evaluate` with the model's logits."""
    from angeljax import evaluation

    return evaluation.evaluate(
        opened.model.logits,
        params,
        windows,
        reference=reference,
        reference_fn=reference_fn,
        batch_size=batch_size,
        progress=progress,
    )


def load_tasks(paths: Sequence[Path], limit: int | None) -> list[Task]:
    """Tasks of files and folders, cut to a number of examples each.

    Raises:
      ValueError: a file is missing or wrong, or the limit is.
    """
    from angeljax import evaluation

    return [task.limit(limit) for task in evaluation.load_tasks(paths)]


def evaluate_tasks(
    opened: Opened, params: Any, tasks: Sequence[Task], *, progress: bool | None = None
) -> list[TaskResult]:
    """`angeljax.evaluation.evaluate_tasks` with the model's logits."""
    from angeljax import evaluation

    return evaluation.evaluate_tasks(
        opened.model.logits,
        params,
        opened.need_tokenizer(),
        tasks,
        max_length=opened.model.config.max_positions,
        progress=progress,
    )


def tasks_table(results: Sequence[TaskResult]) -> Any:
    """A `rich` table with one row for each task."""
    from rich.table import Table

    def share(value: float, error: float | None = None) -> str:
        return f"{value:.1%}" + ("" if error is None else f" ± {error:.1%}")

    table = Table("task")
    for name in ("examples", "acc", "acc_norm", "greedy", "chance"):
        table.add_column(name, justify="right")
    for r in results:
        table.add_row(
            r.name,
            str(r.examples),
            share(r.acc, r.acc_stderr),
            share(r.acc_norm, r.acc_norm_stderr),
            share(r.greedy, r.greedy_stderr),
            share(r.chance),
        )
    return table


def generate(
    opened: Opened,
    params: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    chat: bool = True,
) -> str:
    """The continuation of one prompt, as a chat turn if the model has a template."""
    from angeljax import models

    tokenizer = opened.need_tokenizer()
    wrap = chat and tokenizer.chat_template is not None
    ids = tokenizer.encode(tokenizer.chat(prompt) if wrap else prompt, special=not wrap)
    if not ids:
        raise ValueError("the prompt is empty")
    model = opened.model
    if jax.default_backend() != "cpu":
        model, params = models.prepare_decoder(model, params)
    out = models.generate(
        model,
        params,
        jnp.asarray([ids], jnp.int32),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        key=jax.random.key(seed),
    )
    return tokenizer.decode(out.tokens[0, : int(out.lengths[0])].tolist()).strip()


def summary_table(report: CompressionReport) -> Any:
    """A `rich` table with one row for each kind of leaf, layers taken together."""
    from rich.table import Table

    groups: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for leaf in report.leaves:
        names = ("*" if part.isdigit() else part for part in leaf.path.split("/"))
        groups["/".join(names), leaf.format].append(leaf)
    table = Table("leaf", "count", "format", show_footer=True)
    table.columns[0].footer = "whole tree"
    for name, footer in (
        ("bit/weight", f"{report.bits_per_weight:.3f}"),
        ("size", megabytes(report.nbytes)),
        ("mean rel. error", ""),
    ):
        table.add_column(name, footer=footer, justify="right")
    for (path, form), leaves in groups.items():
        nbytes, weights = sum(x.nbytes for x in leaves), sum(x.weights for x in leaves)
        errors = [x.relative_error for x in leaves if x.relative_error is not None]
        table.add_row(
            path,
            str(len(leaves)),
            form,
            f"{8 * nbytes / max(weights, 1):.3f}",
            megabytes(nbytes),
            f"{sum(errors) / len(errors):.4f}" if errors else "",
        )
    return table


def manifest_report(manifest: Manifest) -> CompressionReport:
    """Sizes of the leaves of a checkpoint, from its manifest alone."""
    return describe(_abstract_leaves(manifest))


def _abstract_leaves(manifest: Manifest) -> dict[str, Any]:
    """Leaves by path, of `jax.ShapeDtypeStruct`s."""
    tree = {}
    for path, entry in manifest.leaves.items():
        arrays = {
            name: jax.ShapeDtypeStruct(stored.shape, stored.dtype)
            for _, name, stored in entry.stored()
        }
        tree[path] = entry.build(arrays)
    return tree


def manifest_dict(manifest: Manifest) -> dict[str, Any]:
    """What `angeljax inspect --json` prints."""
    return {
        "path": str(manifest.path),
        "source": manifest.source,
        "created": manifest.created,
        "versions": dict(manifest.versions),
        "recipe": manifest.recipe,
        "model_config": manifest.model_config,
        **manifest_report(manifest).to_dict(),
    }


def manifest_table(manifest: Manifest, *, leaves: bool) -> Any:
    """What `angeljax inspect` prints."""
    from rich.console import Group

    report = manifest_report(manifest)
    recipe = manifest.recipe or {}
    lines = [
        f"checkpoint  {manifest.path}",
        f"source      {manifest.source}",
        f"recipe      {recipe.get('name') or ('unnamed' if recipe else 'none')}",
        f"written     {manifest.created}, "
        + ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
    ]
    return Group(*lines, report if leaves else summary_table(report))


def tune(
    out: Path,
    *,
    model: str | None,
    shapes: list[str],
    formats: list[str],
    tokens: str,
    activations: str,
    seconds: float,
    report: Callable[[str], None],
) -> None:
    """Writes or extends a tuning table; see `pallas_kernels.tune`."""
    from pallas_kernels import _tuning
    from pallas_kernels.tune import ACTIVATIONS
    from pallas_kernels.tune import tune as run

    if (model is None) == (not shapes):
        raise ValueError("pass --model, or --shape with --format")
    layouts = [_layout(s, f) for s in shapes for f in formats]
    if model is not None:
        layouts = _layouts(model)
    if not layouts:
        raise ValueError("nothing to tune: pass --format, or a compressed --model")
    counts = [int(t) if t.strip().isdigit() else 0 for t in tokens.split(",")]
    if min(counts) < 1:
        raise ValueError(f"--tokens takes numbers from 1 with commas, not {tokens!r}")
    kinds = activations.split(",")
    if set(kinds) - set(ACTIVATIONS):
        raise ValueError(
            f"--activations takes {', '.join(ACTIVATIONS)}, not {activations!r}"
        )
    # A table that cannot be extended is refused before the work, not after it.
    device = jax.devices()[0].device_kind
    old = {}
    if out.exists():
        before = _tuning.read(str(out))
        old = before["plans"]
        if before["device"] != device:
            raise ValueError(
                f"{out} is a table of {before['device']}, and this is {device}: "
                "choose another --out"
            )
    table = run(layouts, counts, kinds, report=report, seconds=seconds)
    plans = {case: {**old.get(case, {}), **new} for case, new in table["plans"].items()}
    _tuning.write(out, {**table, "plans": {**old, **plans}})


def _layout(shape: str, fmt: str) -> Any:
    from pallas_kernels import QUANTIZED, TERNARY, WeightLayout

    name, _, group = fmt.partition(":")
    sides = shape.lower().split("x")
    if len(sides) != 2 or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(f"--shape takes in x out, such as 4096x14336, not {shape!r}")
    if name not in TERNARY + QUANTIZED or (group and not group.isdigit()):
        raise ValueError(
            f"--format takes one of {', '.join(TERNARY + QUANTIZED)}, with :group "
            f"where it has groups, not {fmt!r}"
        )
    k, n = map(int, sides)
    fixed = {"nvfp4": 16, "mxfp4": 32, "mxfp8": 32}.get(name, k)
    size = int(group) if group else fixed
    return WeightLayout(format=name, k=k, n=n, group_size=size)


def _layouts(model: str) -> list[Any]:
    """Layouts of the packed matrices of a checkpoint, fused as they are served."""
    from angeljax import models
    from angeljax._leaves import flatten
    from angeljax.prepare import PreparedTensor

    opened = open_model(model)
    _, params = models.prepare_decoder(opened.model, opened.params)
    found = []
    for leaf in flatten(params)[0]:
        if isinstance(leaf.value, PreparedTensor):
            layout = leaf.value.layout.replace(order="canonical", scale_dtype="")
            found.append(layout)
    return list(dict.fromkeys(found))
