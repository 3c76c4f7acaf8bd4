"""DAQ: FP8 scales that keep what fine-tuning changed.

A fine-tuned weight lies close to that of its base model, closer than a step of FP8:
rounding it to the nearest may undo the training. Delta-aware quantization (arXiv
2603.22324) chooses the scale of each granule by what is left of the difference: with
D = W - W_base and D' = Q(W) - W_base, by how often their signs agree, by their cosine,
or by the squared error. Data-free; it reads the base model.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.algorithms._base import Algorithm, Found, register
from angeljax.formats import QTensor, Spec, get_format
from angeljax.formats._blocks import Granules, store, to_blocks
from angeljax.formats.integer import to_scale

Metric = Literal["sign", "cosine", "mse"]
Planes = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DAQOptions:
    """What is searched, and where.

    Attributes:
      metric: "sign", the share of weights changed by more than `threshold` whose change
        keeps its sign; "cosine" between both changes; "mse", the squared error of the
        weight itself. A scale that is good by one may be bad by another.
      threshold: magnitude of a change below which its sign does not count.
      low, high: range of the ratios by which amax / 448 is multiplied.
      coarse: ratios evenly spaced over the range.
      fine: ratios evenly spaced over one coarse step around the best, inside the range.

    Raises:
      ValueError: a value out of range.
    """

    metric: Metric = "sign"
    threshold: float = 1e-5
    low: float = 0.8
    high: float = 1.5
    coarse: int = 5
    fine: int = 10

    def __post_init__(self) -> None:
        if self.metric not in get_args(Metric):
            raise ValueError(
                f"metric={self.metric!r}: use {', '.join(get_args(Metric))}"
            )
        for name in ("threshold", "low", "high"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value!r}: use a number of at least 0")
        if not 0 < self.low < self.high:
            raise ValueError(
                f"low={self.low!r} and high={self.high!r}: use 0 < low < high"
            )
        for name in ("coarse", "fine"):
            value = getattr(self, name)
            if type(value) is not int or value < 2:
                raise ValueError(f"{name}={value!r}: use an integer of at least 2")


def daq(w: jax.Array, spec: Spec, stats: Found, options: DAQOptions) -> QTensor:
    """Quantizes a fine-tuned weight to FP8 with delta-aware scales.

    Args:
      w: float `[*batch, *spec.shape]`, after fine-tuning.
      spec: of a format of FP8, any granularity: each granule is searched by itself.
      stats: `base`, the weight before fine-tuning, of the shape of `w`.
      options: see `DAQOptions`.

    Returns:
      A QTensor. Where no ratio is better than 1, the scale is amax / 448.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from angeljax.algorithms import DAQOptions, daq
      >>> from angeljax.formats import make_spec
      >>> base = jax.random.normal(jax.random.key(0), (256, 64))
      >>> w = base + 0.02 * jax.random.normal(jax.random.key(1), base.shape)
      >>> spec = make_spec(w.shape, w.dtype, format="float8_e4m3")
      >>> daq(w, spec, {"base": base}, DAQOptions(metric="cosine"))
      QTensor(float8_e4m3 channel [256,64] float32, 8.125 bit/weight)
    """
    return _daq(w, stats["base"], spec, options)


@functools.partial(jax.jit, static_argnames=("spec", "options"))
def _daq(w: jax.Array, base: jax.Array, spec: Spec, options: DAQOptions) -> QTensor:
    fmt, granules = get_format(spec.format), Granules(spec)
    nearest, values = fmt.nearest, fmt.values
    assert fmt.scales and fmt.pack and nearest and values
    blocks, before = to_blocks(w, spec), to_blocks(base, spec)
    own = fmt.scales(blocks, spec)

    def planes_of(ratio: jax.Array) -> Planes:
        # From the scale before it is rounded: `own` may be in bfloat16.
        top = granules.max(jnp.abs(blocks)) * np.float32(1 / _top(spec))
        scale = to_scale(top * ratio, spec)
        # The plain scale itself at 1, bit for bit.
        return {"scale": jnp.where(ratio == 1, own["scale"], scale)}

    def score(ratio: jax.Array) -> jax.Array:
        planes = planes_of(ratio)
        rounded = values(nearest(blocks, planes, spec), planes, spec)
        return _score(blocks, before, rounded, granules, options)

    def search(ratios: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of ratios `[n, *granules]` the first with the highest score, and that."""

        def step(best: tuple, ratio: jax.Array) -> tuple:
            highest, chosen = best
            found = score(ratio)
            better = found > highest
            chosen = jnp.where(better, ratio, chosen)
            return (jnp.where(better, found, highest), chosen), None

        nothing = jnp.full(ratios.shape[1:], -jnp.inf)
        best, _ = jax.lax.scan(step, (nothing, jnp.ones_like(nothing)), ratios)
        return best

    shape = own["scale"].shape
    grid = np.linspace(options.low, options.high, options.coarse, dtype=np.float32)
    coarse = jnp.broadcast_to(grid.reshape(-1, *(1,) * len(shape)), (grid.size, *shape))
    _, center = search(coarse)
    half = (options.high - options.low) / (options.coarse - 1) / 2
    least = jnp.maximum(center - half, options.low)
    most = jnp.minimum(center + half, options.high)
    part = np.linspace(0, 1, options.fine, dtype=np.float32)
    part = part.reshape(-1, *(1,) * len(shape))
    # Ratio 1 comes first: another must be better. The best coarse ratio is a candidate
    # of its own, as an even number of fine ones does not hold it.
    ratios = jnp.concatenate(
        [jnp.ones((1, *shape)), center[None], least + part * (most - least)]
    )
    _, ratio = search(ratios)
    planes = planes_of(ratio)
    planes = fmt.pack(nearest(blocks, planes, spec), planes, spec)
    return QTensor(planes=store(planes, spec, fmt.tail_unit(spec)), spec=spec)


def _score(
    w: jax.Array,
    base: jax.Array,
    rounded: jax.Array,
    granules: Granules,
    options: DAQOptions,
) -> jax.Array:
    """The higher the better, `[*lead', G, 1]`. What is padded is 0 in all of them."""
    if options.metric == "mse":
        return -granules.sum(jnp.square(w - rounded))
    change, kept = w - base, rounded - base
    if options.metric == "cosine":
        norms = granules.sum(change * change) * granules.sum(kept * kept)
        tiny = float(jnp.finfo(jnp.float32).tiny)
        return granules.sum(change * kept) / jnp.sqrt(jnp.maximum(norms, tiny))
    counted = jnp.abs(change) > options.threshold
    same = counted & (jnp.sign(change) == jnp.sign(kept))
    total = granules.sum(counted.astype(jnp.float32))
    return granules.sum(same.astype(jnp.float32)) / jnp.maximum(total, 1.0)


def _top(spec: Spec) -> float:
    """The largest number of the format."""
    clip = get_format(spec.format).clip
    assert clip is not None
    return clip(spec)[1]


register(
    Algorithm(
        name="daq",
        quantize=daq,
        options=DAQOptions,
        needs=lambda options: ("base",),
        formats=("float8_e4m3", "float8_e5m2"),
        summary="FP8 scales that keep what fine-tuning changed",
    )
)
