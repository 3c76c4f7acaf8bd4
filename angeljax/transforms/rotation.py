"""Rotations that are merged into weights: of the residual stream, and of heads."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.calibration._statistics import Statistics
from angeljax.formats import QTensor, Spec
from angeljax.formats._rotation import largest_block, rotate
from angeljax.transforms._base import changed_fields, register
from angeljax.transforms._graph import (
    DEFAULTS,
    Link,
    Pair,
    check_readers,
    find_links,
    geometry,
    near_misses,
    parse_pairs,
)
from angeljax.transforms._rescale import along, frobenius, times

_HEAD = Pair(source=r"(.*/)?norm/scale", to=(r"\1lm_head/kernel",), optional=True)
_WRITERS = (
    r"(.*/)?attn/o_proj/kernel",
    r"(.*/)?mlp/(experts/)?down_proj/kernel",
)
_EMBEDDINGS = (r"(.*/)?embed_tokens/embedding",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """Rotates the residual stream (R1) and the values of each head (R2).

    Both are merged into weights: nothing is added to the model, and its function stays
    as it is (SpinQuant, arXiv 2405.16406, section 3.1; QuaRot, arXiv 2404.00456). The
    rotations are Hadamard matrices with random signs and are not learned. For R1 every
    RMS norm is folded into the weights that read it and becomes 1; its readers and the
    head are rotated along their inputs, the embedding and the weights that write into
    the stream along their outputs. R2 rotates outputs of `v_proj` and inputs of
    `o_proj`, head by head. R4, a rotation of what `down_proj` reads, cannot be merged:
    it is the option `rotation` of a rule. R3 (of queries and keys) is not here.

    Of the statistics, count and Hessian follow (for GPTQ in the same recipe). Maxima
    and sums of magnitudes do not: measure them again on what `apply_transforms` gives.

    Attributes:
      residual: whether to rotate the residual stream.
      head_dim: of attention; rotates the values of heads too. None does not.
      seed: of the signs; None for all plus.
      pairs: norms and their readers in place of the defaults, the final norm and the
        head among them; `Pair`, or mappings `{from, to}`. Every reader must be named.
      writers: regular expressions of the weights that write into the stream.
      embeddings: regular expressions of what the stream begins with, the stream along
        the last axis.
      outside: regular expressions of weights as wide as the stream that have nothing to
        do with it; any other that no role is given is refused.

    Raises:
      ValueError: a field has a value that it cannot have.

    Example:
      >>> import jax, angeljax as aj
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.transforms import apply_transforms
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=64, hidden_size=48, num_layers=2,
      ...     intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=16))
      >>> params, tokens = model.init(jax.random.key(0)), jax.numpy.ones((1, 4), int)
      >>> recipe = aj.Recipe(rules=[aj.Rule(format="int4", group_size=16)],
      ...                    transforms=[{"name": "rotation", "head_dim": 16}])
      >>> rotated, _ = apply_transforms(params, recipe)
      >>> bool(jax.numpy.allclose(model.logits(rotated, tokens),
      ...                         model.logits(params, tokens), atol=1e-5))
      True
    """

    name: ClassVar[str] = "rotation"
    residual: bool = True
    head_dim: int | None = None
    seed: int | None = 0
    pairs: Sequence[Pair] = ()
    writers: Sequence[str] = _WRITERS
    embeddings: Sequence[str] = _EMBEDDINGS
    outside: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", parse_pairs(self.pairs))
        for name in ("writers", "embeddings", "outside"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ValueError(f"{name} must be a list of regular expressions")
            for pattern in value:
                try:
                    re.compile(pattern)
                except (re.error, TypeError) as e:
                    raise ValueError(f"{name} {pattern!r}: {e}") from None
            object.__setattr__(self, name, tuple(value))
        if not isinstance(self.residual, bool):
            raise ValueError(f"residual={self.residual!r}: use true or false")
        for name, least in (("head_dim", 2), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name}={value!r}: use an integer >= {least}")
        if not self.residual and self.head_dim is None:
            raise ValueError("residual=False and no head_dim: nothing to rotate")

    def needs(self) -> tuple[str, ...]:
        """See `Transform`."""
        return ()

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML values."""
        return changed_fields(self)

    def apply(
        self,
        leaves: Mapping[str, Any],
        stats: Statistics | None,
        plan: Mapping[str, Spec],
    ) -> tuple[dict[str, Any], Statistics | None]:
        """See `Transform`."""
        work = _Work(dict(leaves), stats, plan)
        if self.residual:
            self._rotate_stream(work)
        if self.head_dim is not None:
            self._rotate_heads(work, self.head_dim)
        return work.changed, work.statistics()

    def _rotate_stream(self, work: _Work) -> None:
        links = find_links(
            tuple(self.pairs) or (*DEFAULTS["norm"], _HEAD), work.leaves, work.plan
        )
        width = links[0].width
        for link in links:
            check_readers(link, work.stats, work.plan)
            if link.kind != "norm" or link.bias is not None:
                raise ValueError(
                    f"{link.producer} is no RMS norm (it has a bias, or is a product): "
                    "a rotation of the stream cannot pass it"
                )
            if link.width != width:
                raise ValueError(
                    f"{link.producer} has {link.width} features and "
                    f"{links[0].producer} {width}: not of one stream"
                )
        readers = {p for link in links for p in link.consumers}
        if not self.pairs and not any("lm_head" in path for path in readers):
            raise ValueError(
                "no lm_head/kernel behind the final norm: untie the embedding first "
                "with angeljax.models.untie(model, params), or name the head in pairs"
            )
        writers = _matching("writers", self.writers, work.leaves)
        embeddings = _matching("embeddings", self.embeddings, work.leaves)
        for path in (*writers, *embeddings):
            if work.leaves[path].shape[-1] != width:
                raise ValueError(
                    f"{path} {list(work.leaves[path].shape)} does not write into the "
                    f"stream of {width}"
                )
        self._check_roles({*readers, *writers}, width, work)
        turn = _Turn(width, self._signs(0, width))
        for link in links:
            work.fold(link)
        for path in sorted(readers):
            work.turn_inputs(path, turn)
        for path in embeddings:
            work.set(path, turn(work.leaves[path]))
        for path in writers:
            work.turn_outputs(path, turn)

    def _check_roles(self, known: set[str], width: int, work: _Work) -> None:
        for path, spec in work.plan.items():
            out = work.leaves[path].shape[-1]
            if path in known or width not in (spec.k, out) or spec.axis[-1] == -1:
                continue
            if not any(re.fullmatch(p, path) for p in self.outside):
                raise ValueError(
                    f"{path} is as wide as the stream and neither a reader in pairs "
                    "nor a writer: name it there, or in `outside`"
                )

    def _rotate_heads(self, work: _Work, head_dim: int) -> None:
        turn = _Turn(head_dim, self._signs(1, head_dim))
        links = find_links(DEFAULTS["value"], work.leaves, work.plan, head_dim)
        for link in links:
            if link.width % head_dim:
                raise ValueError(
                    f"{link.producer} makes {link.width} values, no whole number of "
                    f"heads of head_dim={head_dim}"
                )
            work.turn_outputs(link.producer, turn)
            for path in link.consumers:
                work.turn_inputs(path, turn)

    def _signs(self, stream: int, n: int) -> np.ndarray:
        if self.seed is None:
            return np.ones(n, np.float32)
        rng = np.random.default_rng((self.seed, stream))
        return rng.choice(np.asarray([-1.0, 1.0], np.float32), n)


class _Turn:
    """`x R` along the last axis, in blocks of `size`: signs, then a Hadamard matrix."""

    def __init__(self, size: int, signs: np.ndarray) -> None:
        self.size, self.signs, self.block = size, signs, largest_block(size)

    def __call__(self, x: jax.Array) -> jax.Array:
        signs = np.tile(self.signs, x.shape[-1] // self.size)
        y = rotate(x.astype(jnp.float32) * signs, self.block)
        return y.astype(x.dtype)

    def both(self, h: jax.Array) -> jax.Array:
        """`R' h R`, of a Hessian."""
        return jnp.swapaxes(self(jnp.swapaxes(self(h), -1, -2)), -1, -2)


class _Work:
    """Leaves and statistics while they change."""

    def __init__(
        self,
        leaves: dict[str, Any],
        stats: Statistics | None,
        plan: Mapping[str, Spec],
    ) -> None:
        self.leaves, self.stats, self.plan = leaves, stats, plan
        self.changed: dict[str, Any] = {}
        self.layers = {} if stats is None else dict(stats.layers)

    def set(self, path: str, value: Any) -> None:
        if isinstance(self.leaves[path], QTensor):
            raise ValueError(f"{path} is quantized already: rotate before that")
        self.leaves[path] = self.changed[path] = value

    def fold(self, link: Link) -> None:
        """A norm into its readers; their inputs lose its scale."""
        scale = self.leaves[link.producer].astype(jnp.float32)
        self.set(link.producer, jnp.ones_like(self.leaves[link.producer]))
        for path in link.consumers:
            _, axes = geometry(path, self.leaves[path], self.plan)
            by = along(scale, self.leaves[path], link.lead, axes)
            self.set(path, times(self.leaves[path], by))
            # A feature that a norm makes 0 is lost; weights of 0 read it from now on.
            less = jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))
            self._hessian(path, lambda h, s=less: _outer(h, s, link.lead))

    def turn_inputs(self, path: str, turn: _Turn) -> None:
        w = self.leaves[path]
        _, axes = geometry(path, w, self.plan)
        first, last = w.ndim + axes[0], w.ndim + axes[-1] + 1
        merged = w.reshape(*w.shape[:first], -1, *w.shape[last:])
        turned = jnp.moveaxis(turn(jnp.moveaxis(merged, first, -1)), -1, first)
        self.set(path, turned.reshape(w.shape))
        self._hessian(path, turn.both)

    def turn_outputs(self, path: str, turn: _Turn) -> None:
        w = self.leaves[path]
        _, axes = geometry(path, w, self.plan)
        first = w.ndim + axes[-1] + 1
        flat = turn(w.reshape(*w.shape[:first], -1))
        self.set(path, flat.reshape(w.shape))
        bias = f"{path.rpartition('/')[0]}/bias"
        if bias in self.leaves:
            b = self.leaves[bias]
            lead = w.shape[: w.ndim + axes[0]]
            self.set(bias, turn(b.reshape(*lead, -1)).reshape(b.shape))

    def _hessian(self, path: str, change: Any) -> None:
        """Other inputs: what is known of them without another pass."""
        if path not in self.layers:
            return
        found, kept = self.layers[path], ("count", "nonfinite")
        new = {k: found[k] for k in kept if k in found}
        for kind in ("hessian", "mismatch"):
            # Of inputs that are rotated online the diagonal is not at hand.
            if kind in found and not self.plan[path].rotation:
                new[kind] = change(found[kind])
        self.layers[path] = new

    def statistics(self) -> Statistics | None:
        if self.stats is None:
            return None
        norms = {
            path: frobenius(self.leaves[path], n_batch=norm.ndim)
            if path in self.changed
            else norm
            for path, norm in self.stats.norms.items()
        }
        return Statistics(self.layers, norms)


def _outer(h: jax.Array, s: jax.Array, lead: int) -> jax.Array:
    s = s.reshape(*s.shape[:-1], *(1,) * (h.ndim - 2 - lead), s.shape[-1])
    return h * s[..., :, None] * s[..., None, :]


def _matching(
    name: str, patterns: Sequence[str], leaves: Mapping[str, Any]
) -> list[str]:
    found = [p for p in leaves if any(re.fullmatch(x, p) for x in patterns)]
    if not found:
        near = near_misses(" ".join(patterns[:1]), leaves)
        raise ValueError(f"{name} {list(patterns)} match no leaf{near}")
    return found


register(Rotation.name, Rotation)
