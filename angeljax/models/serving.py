"""A decoder made ready to generate: projections fused, weights in kernel order."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from angeljax._leaves import flatten, unflatten
from angeljax._transposed import TransposedTensor, transposed
from angeljax.formats import QTensor
from angeljax.models.fusion import fuse_projections
from angeljax.models.language_model import LanguageModel
from angeljax.prepare import prepare
from pallas_kernels._devices import is_gpu


def prepare_decoder(
    model: LanguageModel,
    params: dict[str, Any],
    *,
    device: Any = None,
    implementation: str | None = None,
    activation: str | None = None,
    transpose: bool | None = None,
) -> tuple[LanguageModel, dict[str, Any]]:
    """Fuses projections and prepares weights; see `angeljax.prepare`.

    One launch then serves queries, keys and values, and one gate and up. Where their
    formats differ, or share a scale that no other kernel has, they stay apart. Matrices
    that are not packed can be stored transposed, the order in which a GPU multiplies
    one token with them; their logical shape stays. `angeljax.restore` undoes it, and
    `angeljax.save` stores the matrices as they were.

    Args:
      model: the architecture.
      params: its tree, compressed or not.
      device: default the first one.
      implementation: of `pallas_kernels`, instead of the device's own.
      activation: "int8" quantizes activations for each token, whatever the recipe says
        about them; see `angeljax.prepare`.
      transpose: whether matrices that are not packed are stored transposed; default on
        GPUs only.

    Returns:
      The model and the tree to use from now on.

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> from angeljax.models import DecoderConfig, LanguageModel, prepare_decoder
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=64, num_layers=1,
      ...     intermediate_size=64, num_heads=2, num_kv_heads=1, head_dim=32,
      ... )
      >>> model = LanguageModel(config)
      >>> params = aj.compress(
      ...     model.init(jax.random.key(0)), aj.Recipe(rules=[aj.Rule(format="int8")])
      ... )
      >>> model, params = prepare_decoder(model, params, activation="int8")
      >>> model.fused, model.logits(params, jnp.zeros((1, 4), jnp.int32)).shape
      (True, (1, 4, 32))
    """
    if not model.fused:
        try:
            fused = fuse_projections(params)
        except ValueError:
            pass  # formats that cannot be joined
        else:
            model, params = dataclasses.replace(model, fused=True), fused
    ready = prepare(
        params, device=device, implementation=implementation, activation=activation
    )
    return model, prepare_kernels(ready, device=device, transpose=transpose)


def prepare_kernels(
    params: dict[str, Any], *, device: Any = None, transpose: bool | None = None
) -> dict[str, Any]:
    """Stores matrices that are not packed transposed, as `prepare_decoder` does."""
    if not (is_gpu(device) if transpose is None else transpose):
        return params
    leaves, treedef = flatten(params)
    done = [
        transposed(leaf.value)
        if leaf.path.endswith("/kernel")
        and not isinstance(leaf.value, QTensor | TransposedTensor)
        and jnp.issubdtype(leaf.value.dtype, jnp.floating)
        else leaf.value
        for leaf in leaves
    ]
    return unflatten(treedef, leaves, done)
