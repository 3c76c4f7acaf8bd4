"""Which weights read what another leaf makes: the graph that scales travel along.

A producer makes features (a norm by its scale, a product by its outputs) and consumers
contract them. Dividing features at the producer and multiplying the weights of every
consumer by the same numbers changes nothing, if there is no other reader.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax._fields import known_fields
from angeljax._leaves import default_axis
from angeljax.calibration._statistics import Statistics
from angeljax.formats import QTensor, Spec

PARTS = ("norm", "value", "up")
KINDS = ("norm", "product")
# Names of leaves that are the weight of a product; every other producer is a norm.
_PRODUCTS = ("kernel", "embedding")


def _expand(text: str, groups: Sequence[str | None]) -> str:
    """`\\1` in a pattern replaced by the text that a group matched."""
    return re.sub(r"\\([1-9])", lambda m: re.escape(groups[int(m[1]) - 1] or ""), text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """One producer and all of its readers, for every layer at once.

    Attributes:
      source: regular expression for the whole path of a producer; `from` in YAML.
      to: for each reader a regular expression for its whole path, in which `\\1` stands
        for what the first group of `source` matched. Each must match.
      kind: "norm" (the leaf multiplies features) or "product" (the leaf is a weight
        whose outputs are the features); by default "product" for a leaf `kernel`. A
        leaf `bias` beside it is scaled as well.
      optional: pass over a producer of which no reader exists.
    """

    source: str
    to: tuple[str, ...]
    kind: str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        to = (self.to,) if isinstance(self.to, str) else tuple(self.to)
        object.__setattr__(self, "to", to)
        if not to:
            raise ValueError(f"pair from {self.source!r}: `to` names no reader")
        try:
            groups = re.compile(self.source).groups
        except (re.error, TypeError) as e:
            raise ValueError(f"pair from {self.source!r}: {e}") from None
        for text in to:
            try:
                re.compile(_expand(text, [""] * groups))
            except (re.error, TypeError, IndexError) as e:
                raise ValueError(
                    f"pair from {self.source!r} to {text!r}: {e}"
                ) from None
        if self.kind not in (None, *KINDS):
            raise ValueError(
                f"pair from {self.source!r}: kind must be {' or '.join(KINDS)}, not "
                f"{self.kind!r}"
            )
        if not isinstance(self.optional, bool):
            raise ValueError(f"pair from {self.source!r}: optional is true or false")

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML values."""
        out: dict[str, Any] = {"from": self.source, "to": list(self.to)}
        if self.kind is not None:
            out["kind"] = self.kind
        if self.optional:
            out["optional"] = True
        return out


def parse_pairs(data: Any) -> tuple[Pair, ...]:
    """Pairs from a list of mappings `{from, to}`; objects pass through.

    Raises:
      ValueError: an entry is no pair; says why.
    """
    if isinstance(data, str | Mapping) or not isinstance(data, Sequence):
        raise ValueError(f"pairs must be a list of {{from, to}}, not {data!r}")
    out = []
    for entry in data:
        if isinstance(entry, Pair):
            out.append(entry)
            continue
        if not isinstance(entry, Mapping):
            raise ValueError(f"a pair must be a mapping {{from, to}}, not {entry!r}")
        known_fields(entry, ("from", "to", "kind", "optional"), "a pair", ValueError)
        for name in ("from", "to"):
            if name not in entry:
                raise ValueError(f"a pair needs from and to: {dict(entry)!r}")
        more = {k: v for k, v in entry.items() if k != "from"}
        out.append(Pair(source=entry["from"], **more))
    return tuple(out)


def _pairs(*rows: tuple[str, tuple[str, ...]]) -> tuple[Pair, ...]:
    return tuple(Pair(source=s, to=t, optional=True) for s, t in rows)


# By part: names of `angeljax.models`, Whisper among them. Names of other models are
# left to their users: one and the same name stands for other things in them.
_ATTN, _MLP = r"(.*/)?attn_norm/scale", r"(.*/)?mlp_norm/scale"
_QKV = tuple(rf"\1(self_)?attn/{x}_proj/kernel" for x in "qkv")
_EXPERTS = (r"\1mlp/experts/gate_proj/kernel", r"\1mlp/experts/up_proj/kernel")
DEFAULTS: dict[str, tuple[Pair, ...]] = {
    "norm": _pairs(
        (_ATTN, _QKV),
        (_ATTN, (r"\1(self_)?attn/qkv_proj/kernel",)),
        (_MLP, (r"\1mlp/gate_proj/kernel", r"\1mlp/up_proj/kernel")),
        (_MLP, (r"\1mlp/gate_up_proj/kernel",)),
        (_MLP, (*_EXPERTS, r"\1mlp/router/kernel")),
        (r"(.*/)?self_attn_layer_norm/scale", _QKV),
        (r"(.*/)?encoder_attn_layer_norm/scale", (r"\1encoder_attn/q_proj/kernel",)),
        (r"(.*/)?final_layer_norm/scale", (r"\1mlp/fc1/kernel",)),
    ),
    "value": _pairs(
        (r"(.*attn/)v_proj/kernel", (r"\1(o_proj|out_proj)/kernel",)),
    ),
    "up": _pairs(
        (r"(.*mlp/(?:experts/)?)up_proj/kernel", (r"\1down_proj/kernel",)),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
    """One producer and its readers in one tree, with shapes that fit.

    Attributes:
      producer, bias: paths; no bias is None.
      kind: of the producer, "norm" or "product".
      consumers: paths.
      lead: axes in front of the producer's own that have scales of their own.
      width: features that the producer makes, one scale each.
      repeat: (heads, copies, head_dim): each head of the producer is read by as many
        heads of the consumers (grouped queries). (1, 1, width) without.
    """

    producer: str
    bias: str | None
    kind: str
    consumers: tuple[str, ...]
    lead: int
    width: int
    repeat: tuple[int, int, int]

    def expand(self, s: jax.Array) -> jax.Array:
        """Numbers of features `[..., width]` for the inputs of consumers `[..., K]`."""
        heads, copies, size = self.repeat
        x = s.reshape(*s.shape[:-1], heads, 1, size)
        x = jnp.broadcast_to(x, (*s.shape[:-1], heads, copies, size))
        return x.reshape(*s.shape[:-1], -1)

    def pool(self, x: jax.Array, how: str) -> jax.Array:
        """Statistics of inputs `[..., K]` for features `[..., width]`: max or mean."""
        heads, copies, size = self.repeat
        y = x.reshape(*x.shape[:-1], heads, copies, size)
        y = y.max(axis=-2) if how == "max" else y.mean(axis=-2)
        return y.reshape(*x.shape[:-1], self.width)


def geometry(path: str, w: Any, plan: Mapping[str, Spec]) -> tuple[int, tuple]:
    """Batch axes of a weight, and its contraction axes (negative)."""
    if path in plan:
        spec = plan[path]
        return w.ndim - len(spec.shape), spec.axis
    axis = default_axis(path, w.ndim)
    axes = (axis,) if isinstance(axis, int) else axis
    return w.ndim + axes[0], axes


def find_links(
    pairs: Sequence[Pair],
    leaves: Mapping[str, Any],
    plan: Mapping[str, Spec],
    head_dim: int | None = None,
) -> list[Link]:
    """All producers of a tree with their readers.

    Args:
      pairs: templates.
      leaves: path -> array.
      plan: path -> spec of the weights that are quantized.
      head_dim: of attention, where heads of values are read by several queries.

    Raises:
      ValueError: a pattern matches nothing, a producer is named twice, shapes do not
        fit, or a leaf cannot be scaled; names the paths.
    """
    found: dict[str, Link] = {}
    for pair in pairs:
        producers = [
            (path, m)
            for path in leaves
            if (m := re.fullmatch(pair.source, path)) is not None
        ]
        if not producers and not pair.optional:
            raise ValueError(
                f"pair from {pair.source!r} matches no leaf"
                + near_misses(pair.source, leaves)
            )
        for path, match in producers:
            texts = [_expand(text, match.groups()) for text in pair.to]
            readers = [[p for p in leaves if re.fullmatch(t, p)] for t in texts]
            if pair.optional and not any(readers):
                continue
            for text, paths in zip(texts, readers, strict=True):
                if not paths:
                    raise ValueError(
                        f"{path} has no reader {text!r}{near_misses(text, leaves)}"
                    )
            if path in found:
                raise ValueError(
                    f"{path} is named by two pairs: list all of its readers in one"
                )
            consumers = tuple(dict.fromkeys(p for paths in readers for p in paths))
            found[path] = _link(pair, path, consumers, leaves, plan, head_dim)
    if not found:
        raise ValueError(
            "no norm or product with known readers: say which in pairs: "
            "[{from: ..., to: [...]}]" + near_misses("norm/scale", leaves)
        )
    _check_tied(list(found.values()), leaves)
    return list(found.values())


def _link(
    pair: Pair,
    path: str,
    consumers: tuple[str, ...],
    leaves: Mapping[str, Any],
    plan: Mapping[str, Spec],
    head_dim: int | None,
) -> Link:
    for name in (path, *consumers):
        if isinstance(leaves[name], QTensor):
            raise ValueError(f"{name} is quantized already: transform before that")
    value = leaves[path]
    kind = pair.kind
    if kind is None:
        product = path in plan or path.rpartition("/")[2] in _PRODUCTS
        kind = "product" if product else "norm"
    if kind == "norm":
        lead, width = value.ndim - 1, value.shape[-1]
    else:
        lead, axes = geometry(path, value, plan)
        if axes[-1] == -1:
            raise ValueError(f"{path} has no output axis after its contraction")
        width = math.prod(value.shape[axes[-1] + 1 :])
        if lead != value.ndim + axes[0]:
            raise ValueError(f"{path} has outputs before its contraction: not scalable")
    sizes = {}
    for name in consumers:
        n_batch, axes = geometry(name, leaves[name], plan)
        shape = leaves[name].shape
        if n_batch < lead or shape[:lead] != value.shape[:lead]:
            raise ValueError(
                f"{path} {list(value.shape)} and its reader {name} {list(shape)} have "
                "other layer axes in front"
            )
        sizes[name] = math.prod(shape[a] for a in axes)
    k = next(iter(sizes.values()))
    repeat = (1, 1, width)
    for name, size in sizes.items():
        if size != k or size % width:
            raise ValueError(
                f"{name} contracts {size} features, its producer {path} makes {width}"
            )
    if k != width:
        if head_dim is None or width % head_dim:
            raise ValueError(
                f"{path} makes {width} features of which {consumers[0]} reads {k}: "
                "give head_dim, by which heads are told apart"
            )
        repeat = (width // head_dim, k // width, head_dim)
    bias: str | None = f"{path.rpartition('/')[0]}/bias".lstrip("/")
    if bias not in leaves or bias == path:
        bias = None
    return Link(
        producer=path, bias=bias, kind=kind, consumers=consumers, lead=lead,
        width=width, repeat=repeat,
    )  # fmt: skip


def _check_tied(links: list[Link], leaves: Mapping[str, Any]) -> None:
    """A leaf that stands in two places would be scaled in one of them only."""
    places: dict[int, list[str]] = {}
    for path, value in leaves.items():
        places.setdefault(id(value), []).append(path)
    for link in links:
        for path in (link.producer, *link.consumers):
            if len(places[id(leaves[path])]) > 1:
                raise ValueError(
                    f"{' and '.join(places[id(leaves[path])])} are one tied array: "
                    "copy it first, or leave the pair out"
                )


def check_readers(
    link: Link, stats: Statistics | None, plan: Mapping[str, Any]
) -> None:
    """Refuses a norm that another weight reads too, as far as statistics tell.

    Two weights with the same statistics have the same inputs. Readers without
    statistics (routers, weights that no rule takes) cannot be found: pairs must name
    them.

    Raises:
      ValueError: names the reader.
    """
    if stats is None or link.kind != "norm":
        return
    known = [p for p in link.consumers if "amax_channel" in stats.layers.get(p, {})]
    if not known:
        return
    mine = stats[known[0]]["amax_channel"], stats[known[0]]["count"]
    if isinstance(mine[0], jax.core.Tracer):
        return
    for path, found in stats.items():
        if path in link.consumers or path not in plan or "amax_channel" not in found:
            continue
        other = found["amax_channel"], found["count"]
        same = all(
            a.shape == b.shape and bool(np.array_equal(a, b))
            for a, b in zip(mine, other, strict=True)
        )
        if same and float(jnp.max(mine[0])) > 0:
            raise ValueError(
                f"{path} has the same inputs as {known[0]} and is no reader of "
                f"{link.producer} in the pairs: name all readers of it"
            )


def near_misses(pattern: str, leaves: Mapping[str, Any]) -> str:
    """The end of a message about a pattern that matches nothing."""
    plain = re.sub(r"[^\w/]+", " ", re.sub(r"\\(.)", r"\1", pattern)).strip()
    near = difflib.get_close_matches(plain, list(leaves), n=3, cutoff=0.3)
    return f"; the closest paths are {', '.join(near or list(leaves)[:3])}"
