"""LoRA on a frozen compressed tree (QLoRA, arXiv 2305.14314).

The packed weights stay as they are, and each gets an addition `alpha / r A B` of low
rank, the only thing that is trained: memory for gradients and optimizer is that of the
factors.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

import jax
import jax.numpy as jnp

from angeljax import _leaves
from angeljax._adapted import AdaptedTensor, factor_shapes
from angeljax.formats import QTensor, quantize_to
from angeljax.prepare import PreparedTensor

__all__ = ["Lora", "load_lora", "lora_apply", "lora_init", "lora_merge", "save_lora"]

_KIND = "lora"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
    """The trained factors: differentiate with respect to it, give it to optax.

    Attributes:
      factors: path of a leaf -> `{"a": [*batch, K, r], "b": [*batch, r, N]}`, float32.
      alpha: the addition is `alpha / r A B`; static.
    """

    factors: dict[str, dict[str, jax.Array]]
    alpha: float = dataclasses.field(metadata={"static": True})


def lora_init(
    cparams: Any,
    key: jax.Array,
    *,
    rank: int,
    alpha: float | None = None,
    targets: str | None = None,
) -> Lora:
    """Factors for the packed leaves of a compressed tree.

    A is uniform in `+-1 / sqrt(K)` and B is 0, so that nothing changes at first.

    Args:
      cparams: a tree with QTensors, as `angeljax.compress` gives.
      key: for A. The factors of a leaf depend on the key and its place in the tree.
      rank: r.
      alpha: of the scaling `alpha / r`; default `2 * rank`.
      targets: regular expression for the whole '/'-joined path (`re.fullmatch`);
        default all packed leaves but embedding tables.

    Returns:
      A `Lora`.

    Raises:
      ValueError: rank or alpha is out of range, the expression is not valid, or it
        matches no packed leaf.

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> from angeljax.qat.lora import lora_apply, lora_init
      >>> tree = {"dense": {"kernel": aj.quantize(jnp.ones((64, 8)), format="nf4")}}
      >>> lora = lora_init(tree, jax.random.key(0), rank=4)
      >>> w, x = lora_apply(tree, lora)["dense"]["kernel"], jnp.ones((2, 64))
      >>> grads = jax.grad(lambda l: aj.ops.dot(
      ...     x, lora_apply(tree, l)["dense"]["kernel"]).sum())(lora)
      >>> grads.factors["dense/kernel"]["b"].shape
      (4, 8)
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an integer >= 1, not {rank!r}")
    alpha = 2.0 * rank if alpha is None else float(alpha)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be > 0, not {alpha}")
    try:
        pattern = None if targets is None else re.compile(targets)
    except re.error as e:
        raise ValueError(f"targets {targets!r}: {e}") from None
    leaves = [leaf for leaf in _leaves.flatten(cparams)[0]]
    packed = [leaf for leaf in leaves if isinstance(leaf.value, QTensor)]
    if not packed:
        raise ValueError("the tree holds no packed weights: compress it first")
    chosen = [
        leaf
        for leaf in packed
        if (pattern.fullmatch(leaf.path) if pattern else not _table(leaf.value))
    ]
    if not chosen:
        some = ", ".join(leaf.path for leaf in packed[:3])
        raise ValueError(f"targets {targets!r} matches none of the packed {some}, ...")
    factors = {}
    for i, leaf in enumerate(chosen):
        shape_a, shape_b = factor_shapes(leaf.value, rank)
        bound = leaf.value.spec.k**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, i), shape_a, minval=-1) * bound
        factors[leaf.path] = {"a": a, "b": jnp.zeros(shape_b, jnp.float32)}
    return Lora(factors, alpha)


def lora_apply(cparams: Any, lora: Lora, *, dtype: Any = None) -> Any:
    """The tree that the model is to be called with.

    Products by `angeljax.ops`, as in `angeljax.models` and in what `angeljax.bind`
    returns, work from the packed planes and never form a gradient of the size of the
    weight. Elsewhere the weight is expanded.

    Args:
      cparams: the compressed tree, canonical or prepared; it gets no gradient.
      lora: the factors.
      dtype: of the factors in the result, such as that of the activations.

    Returns:
      The tree with an `AdaptedTensor` in place of each leaf that has factors.

    Raises:
      ValueError: the factors are of another tree.
    """
    leaves, treedef = _leaves.flatten(cparams)
    _check(leaves, lora)
    values = [
        _adapted(leaf, lora, dtype) if leaf.path in lora.factors else leaf.value
        for leaf in leaves
    ]
    return _leaves.unflatten(treedef, leaves, values)


def lora_merge(
    cparams: Any, lora: Lora, *, requantize: bool = False, dtype: Any = None
) -> Any:
    """Adds the trained factors to the weights.

    Args:
      cparams: the compressed tree.
      lora: the factors.
      requantize: round the sum to the format that the leaf had; this costs accuracy
        that was not trained for. Otherwise the leaf becomes an array.
      dtype: of these arrays; default the logical dtype of the leaf.

    Returns:
      The tree without factors.

    Raises:
      ValueError: the factors are of another tree.
    """
    leaves, treedef = _leaves.flatten(cparams)
    _check(leaves, lora)
    values = []
    for leaf in leaves:
        value = leaf.value
        if leaf.path in lora.factors:
            dense = _adapted(leaf, lora, None).dequantize(jnp.float32)
            if requantize:
                value = quantize_to(dense, value.spec)
            else:
                value = dense.astype(value.dtype if dtype is None else dtype)
        values.append(value)
    return _leaves.unflatten(treedef, leaves, values)


def save_lora(
    path: str | os.PathLike[str], lora: Lora, *, overwrite: bool = False
) -> None:
    """Writes the factors as a checkpoint of their own, beside that of the tree.

    Args:
      path: a directory that does not exist yet.
      lora: the factors.
      overwrite: whether a checkpoint there may be replaced.

    Raises:
      CheckpointError: `path` exists, or the factors cannot be stored.

    Example:
      >>> import tempfile, jax, jax.numpy as jnp, angeljax as aj
      >>> from angeljax.qat.lora import load_lora, lora_init, save_lora
      >>> tree = {"kernel": aj.quantize(jnp.ones((64, 8)), format="nf4")}
      >>> lora = lora_init(tree, jax.random.key(0), rank=2)
      >>> folder = tempfile.mkdtemp() + "/adapter"
      >>> save_lora(folder, lora)
      >>> load_lora(folder).factors["kernel"]["a"].shape
      (64, 2)
    """
    from angeljax.export import save

    extra = {"kind": _KIND, "alpha": lora.alpha}
    save(path, lora.factors, extra=extra, overwrite=overwrite)


def load_lora(path: str | os.PathLike[str]) -> Lora:
    """Reads what `save_lora` wrote, bit for bit.

    Args:
      path: the directory.

    Returns:
      The factors, on the first device.

    Raises:
      CheckpointError: no checkpoint, or damaged.
      ValueError: a checkpoint of something else.
    """
    from angeljax.export import load, load_manifest

    extra = load_manifest(path).extra
    if not isinstance(extra, dict) or extra.get("kind") != _KIND:
        raise ValueError(f"{path} holds no factors: name a folder of save_lora")
    return Lora(load(path)[0], float(extra["alpha"]))


def _adapted(leaf: _leaves.Leaf, lora: Lora, dtype: Any) -> AdaptedTensor:
    factors = lora.factors[leaf.path]
    rank = factors["a"].shape[-1]
    if dtype is not None:
        factors = {name: f.astype(dtype) for name, f in factors.items()}
    planes = {"base": leaf.value, **factors}
    return AdaptedTensor(planes, leaf.value.spec, scaling=lora.alpha / rank)


def _check(leaves: list[_leaves.Leaf], lora: Lora) -> None:
    there = {leaf.path: leaf.value for leaf in leaves}
    for path, factors in lora.factors.items():
        q = there.get(path)
        if not isinstance(q, QTensor) or isinstance(q, AdaptedTensor):
            raise ValueError(
                f"there are factors for {path}, which is no packed weight of the tree"
            )
        if isinstance(q, PreparedTensor) and q.shards is not None:
            continue  # its shape is that of one part
        shapes = factor_shapes(q, factors["a"].shape[-1])
        if (factors["a"].shape, factors["b"].shape) != shapes:
            raise ValueError(
                f"{path} takes factors {shapes[0]} and {shapes[1]}, not "
                f"{factors['a'].shape} and {factors['b'].shape}"
            )


def _table(q: QTensor) -> bool:
    return q.spec.axis == (-1,) and len(q.spec.shape) == 2
