"""`prepare`: packed weights in the order that the kernels of a device read.

A stored checkpoint is canonical: it means the same everywhere. Before serving, each
packed weight is permuted once into the order of the kernel that will read it;
`restore` is the exact inverse, and `angeljax.save` applies it by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from angeljax._leaves import flatten, unflatten
from angeljax._transposed import TransposedTensor
from angeljax.formats import QTensor
from angeljax.formats._blocks import GRANULE_PLANES
from angeljax.formats._qtensor import register_type
from angeljax.formats.ternary import run_length
from pallas_kernels import KernelError, WeightLayout

__all__ = ["PreparedTensor", "Shards", "prepare", "restore"]

Planes = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Shards:
    """How a prepared weight lies on a mesh.

    Attributes:
      mesh: the devices.
      axis: name of the mesh axis that splits the weight.
      side: "outputs" (each device computes some of them) or "inputs" (each device
        multiplies some of them; the parts are summed by `psum`).
    """

    mesh: Mesh
    axis: str
    side: str

    @property
    def count(self) -> int:
        """Parts of the weight."""
        return self.mesh.shape[self.axis]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class PreparedTensor(QTensor):
    """A QTensor whose planes lie in the order of a kernel; made by `prepare`.

    It stands wherever the QTensor stood; `angeljax.ops` multiplies by it with the
    kernel, everything else restores it first.

    Attributes:
      layout: what the planes mean; of one part if the weight is sharded.
      code_rank: axes of `planes["codes"]` without batch axes.
      activation: "int8" multiplies by activations quantized for each token.
      shards: where the parts of a sharded weight are, else None. The planes then have
        a leading axis of parts.
    """

    layout: WeightLayout = dataclasses.field(metadata={"static": True})
    code_rank: int = dataclasses.field(metadata={"static": True})
    activation: str | None = dataclasses.field(metadata={"static": True})
    shards: Shards | None = dataclasses.field(metadata={"static": True})

    @property
    def _code_rank(self) -> int:
        return self.code_rank

    def restored(self) -> QTensor:
        """The canonical QTensor, bit for bit what `prepare` was given."""

        def one(planes: Planes) -> Planes:
            return dict(pallas_kernels.restore(planes, self.layout)[0])

        planes = dict(self.planes)
        static = {n: planes.pop(n) for n in ("input_scale",) if n in planes}
        if self.shards is None:
            n_batch = planes["codes"].ndim - self.code_rank
            planes = _over_batch(one, planes, n_batch)
        else:
            planes = jax.shard_map(
                lambda p: one(jax.tree.map(lambda x: x[0], p)),
                mesh=self.shards.mesh,
                in_specs=P(self.shards.axis),
                out_specs=_plane_specs(planes, self.spec, self.shards),
                check_vma=False,
            )(planes)
        planes = _from_matrix(planes, self.spec)
        return QTensor(planes={**planes, **static}, spec=self.spec)

    @property
    def kernel_planes(self) -> Planes:
        """The planes that kernels take: all but the scale of static activations."""
        return {n: p for n, p in self.planes.items() if n != "input_scale"}

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The array, `shape`, in `dtype` (default: the logical dtype)."""
        return self.restored().dequantize(dtype)


register_type(PreparedTensor)


def prepare(
    tree: Any,
    *,
    device: Any = None,
    implementation: str | None = None,
    activation: str | None = None,
) -> Any:
    """Puts packed weights into the order that the kernels of a device read.

    Under `jit` only the planes are traced. A weight that is sharded over one axis of a
    mesh, along its inputs or its outputs, stays where it is: each device prepares its
    part, and products run under `shard_map`, summed over parts of the inputs.
    Embedding tables (packed along their last axis) are looked up, not multiplied, and
    stay as they are, like formats without a kernel.

    Args:
      tree: a QTensor, or any tree with some.
      device: a `jax.Device`; default the first one of the default backend.
      implementation: of `pallas_kernels`, instead of the device's own.
      activation: "int8" quantizes the activations of every product for each token
        (W8A8, W1.25A8 ...), the fastest there is. It takes the place of what the recipe
        says: weights trained or compressed with `activation: float8_e4m3` are then
        multiplied by int8 activations. None keeps the recipe's activations.

    Returns:
      The tree with `PreparedTensor`s.

    Raises:
      KernelError: `implementation` was named and cannot hold a weight, or the parts of
        a sharded weight do not end where groups of scales do.

    Example:
      >>> import jax.numpy as jnp, angeljax as aj
      >>> q = aj.quantize(jnp.ones((256, 128)), format="int8")
      >>> w = aj.prepare({"kernel": q}, activation="int8")["kernel"]
      >>> aj.ops.dot(jnp.ones((2, 256)), w).shape
      (2, 128)
    """
    if activation not in (None, "int8"):
        raise KernelError(f"activation must be None or 'int8', not {activation!r}")
    explicit = implementation is not None
    name = implementation or pallas_kernels.implementation_for(device)
    leaves, treedef = flatten(tree)
    ready: dict[int, Any] = {}
    out = []
    for leaf in leaves:
        q = leaf.value
        if not isinstance(q, QTensor) or not _multiplied(q):
            out.append(q)
            continue
        if isinstance(q, PreparedTensor):
            raise KernelError(f"{_label(leaf.path)} is prepared already: restore it")
        # One tensor in two places (tied weights) stays one.
        if id(q) not in ready:
            # The kernels take the scale of each token from the token.
            dynamic = q.spec.activation == "int8" and "input_scale" not in q.planes
            rounds = "int8" if dynamic else activation
            ready[id(q)] = _prepare_one(q, leaf.path, name, explicit, rounds)
        out.append(ready[id(q)])
    return unflatten(treedef, leaves, out)


def restore(tree: Any) -> Any:
    """Exact inverse of `prepare`.

    Args:
      tree: a `PreparedTensor`, or any tree with some. Matrices that
        `angeljax.models.prepare_decoder` transposed are transposed back.

    Returns:
      The tree with canonical QTensors.
    """
    leaves, treedef = flatten(tree)
    values = [leaf.value for leaf in leaves]
    ready = PreparedTensor | TransposedTensor
    plain = [v.restored() if isinstance(v, ready) else v for v in values]
    return unflatten(treedef, leaves, plain)


def kernel_view(q: QTensor) -> tuple[Planes, WeightLayout]:
    """Canonical planes `[*batch, *, N]` and their layout, contraction first."""
    spec, planes = q.spec, q.planes
    layout = WeightLayout(
        format=spec.format,
        k=spec.k,
        n=math.prod(_outputs(spec)),
        group_size=spec.group_size,
        symmetric="zero" not in planes,
        run=run_length(spec) if spec.format == "t2" else 128,
        group_stride=spec.option("group_stride", 1),
    )
    planes = {n: p for n, p in planes.items() if n != "input_scale"}
    return {name: _to_matrix(name, p, spec) for name, p in planes.items()}, layout


def has_kernel(q: QTensor) -> bool:
    """Whether a QTensor is packed in a format that kernels read."""
    if not q.packed or "shift" in q.planes:
        return False
    return q.spec.format in pallas_kernels.TERNARY + pallas_kernels.QUANTIZED


def _multiplied(q: QTensor) -> bool:
    table = q.spec.axis == (-1,) and len(q.spec.shape) == 2
    return has_kernel(q) and not table


def _outputs(spec: Any) -> tuple[int, ...]:
    first = len(spec.shape) + spec.axis[0]
    return (*spec.shape[:first], *spec.shape[first + len(spec.axis) :])


def _to_matrix(name: str, plane: jax.Array, spec: Any) -> jax.Array:
    outputs = _outputs(spec)
    lead = plane.shape[: plane.ndim - spec.rank]
    plane = jnp.moveaxis(plane, spec.k_position, len(lead))
    if name == "scale2" and math.prod(plane.shape[len(lead) :]) == 1:
        return plane.reshape(*lead, 1, 1)
    if name in GRANULE_PLANES and spec.out_block > 1:
        plane = jnp.repeat(plane, spec.out_block, axis=-1)[..., : outputs[-1]]
    elif name in GRANULE_PLANES and spec.out_block == 0:
        plane = jnp.broadcast_to(plane, (*plane.shape[: len(lead) + 1], *outputs))
    return plane.reshape(*plane.shape[: len(lead) + 1], -1)


def _from_matrix(planes: Planes, spec: Any) -> Planes:
    outputs, out = _outputs(spec), {}
    for name, plane in planes.items():
        lead = plane.shape[:-1]
        if name == "scale2" and plane.shape[-1] == 1 != math.prod(outputs):
            plane = plane.reshape(*lead, *(1 for _ in outputs))
        else:
            plane = plane.reshape(*lead, *outputs)
            if name in GRANULE_PLANES and spec.out_block > 1:
                plane = plane[..., :: spec.out_block]
            elif name in GRANULE_PLANES and spec.out_block == 0:
                plane = plane[(..., *(slice(0, 1) for _ in outputs))]
        at = plane.ndim + spec.k_position
        out[name] = jnp.moveaxis(plane, len(lead) - 1, at)
    return out


def _over_batch(f: Callable[[Planes], Planes], planes: Planes, n_batch: int) -> Planes:
    for _ in range(n_batch):
        f = jax.vmap(f)
    return f(planes)


def _prepare_one(
    q: QTensor, path: str, name: str, explicit: bool, activation: str | None
) -> Any:
    planes, layout = kernel_view(q)
    shards = _shards(q, path)
    if shards is not None:
        layout = _part(layout, shards, path)
    why = pallas_kernels.cannot_hold(name, layout)
    if why is not None and explicit:
        raise KernelError(f"{_label(path)}: {name!r} cannot hold it: {why}")
    name = name if why is None else "xla"
    found: list[WeightLayout] = []

    def one(p: Planes) -> Planes:
        ready, there = pallas_kernels.prepare(p, layout, implementation=name)
        found.append(there)
        return dict(ready)

    n_batch = q.ndim - len(q.spec.shape)
    if shards is None:
        ready = _over_batch(one, planes, n_batch)
    else:
        ready = jax.shard_map(
            lambda p: jax.tree.map(lambda x: x[None], one(p)),
            mesh=shards.mesh,
            in_specs=(_plane_specs(planes, q.spec, shards),),
            out_specs=P(shards.axis),
            check_vma=False,
        )(planes)
        n_batch = 1
    code_rank = ready["codes"].ndim - (0 if shards else n_batch)
    if "input_scale" in q.planes:
        ready = {**ready, "input_scale": q.planes["input_scale"]}
    return PreparedTensor(
        planes=ready,
        spec=q.spec,
        layout=found[0],
        code_rank=code_rank,
        activation=activation,
        shards=shards,
    )


def _label(path: str) -> str:
    return path or "the tensor"


def _shards(q: QTensor, path: str) -> Shards | None:
    """The mesh axis that splits a weight, if one does."""
    codes = q.planes["codes"]
    sharding = None if isinstance(codes, jax.core.Tracer) else codes.sharding
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return None
    spec = (*sharding.spec, *(None,) * (codes.ndim - len(sharding.spec)))
    split = [(i, a) for i, a in enumerate(spec) if a is not None]
    split = [(i, a if isinstance(a, tuple) else (a,)) for i, a in split]
    if len(split) != 1 or len(split[0][1]) != 1 or codes.ndim != 2:
        raise KernelError(
            f"{_label(path)} is sharded as {sharding.spec}: a matrix sharded "
            "over one mesh axis, along its inputs or outputs, can be prepared"
        )
    ((at, (axis,)),) = split
    inputs = at - codes.ndim == q.spec.k_position
    mesh: Any = sharding.mesh
    return Shards(mesh, axis, "inputs" if inputs else "outputs")


def _part(layout: WeightLayout, shards: Shards, path: str) -> WeightLayout:
    count, where = shards.count, _label(path)
    if shards.side == "outputs":
        if layout.n % count:
            raise KernelError(f"{where}: {layout.n} outputs do not divide by {count}")
        return layout.replace(n=layout.n // count)
    unit = layout.group_size if layout.groups > 1 else max(layout.run, 64)
    if layout.k % (count * unit):
        raise KernelError(
            f"{where}: {count} parts of {layout.k} inputs are no whole number of "
            f"{unit}; shard the outputs instead"
        )
    k = layout.k // count
    return layout.replace(k=k, group_size=min(layout.group_size, k))


def _plane_specs(planes: Planes, spec: Any, shards: Shards) -> dict[str, P]:
    """How canonical planes `[*, N]` of a sharded weight lie."""
    specs = {}
    for name in planes:
        whole = name in GRANULE_PLANES and spec.groups == 1
        if name == "scale2":
            specs[name] = P()
        elif shards.side == "outputs":
            specs[name] = P(None, shards.axis)
        else:
            specs[name] = P() if whole else P(shards.axis)
    return specs
