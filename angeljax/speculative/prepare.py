"""Drafters made ready as their target is."""

from __future__ import annotations

import dataclasses
from typing import Any

from angeljax.models._fused_rows import FusedRows
from angeljax.models.serving import prepare_decoder, prepare_kernels
from angeljax.prepare import prepare
from angeljax.speculative._eagle_rows import joined, serves
from angeljax.speculative.drafter import Drafter
from angeljax.speculative.eagle import EagleDrafter
from angeljax.speculative.model_drafter import DraftModel, SelfDrafter


def prepare_drafter(
    model: Any,
    drafter: Drafter,
    *,
    device: Any = None,
    transpose: bool | None = None,
    rows: FusedRows | None = None,
) -> Drafter:
    """What `prepare_decoder` does, for the parameters of a drafter.

    Args:
      model: the target before `prepare_decoder`, as a `SelfDrafter` reads its params.
      drafter: of any kind; one without parameters is returned as it is.
      device, transpose: as in `prepare_decoder`.
      rows: how an `EagleDrafter` reads few tokens, in about a third of the kernels, and
        with logits that are rounded elsewhere. A head that it does not serve (packed,
        of another dtype than the target) is left to XLA, and so are other drafters.

    Returns:
      The drafter to use from now on, with a target from `prepare_decoder`.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig, LanguageModel, prepare_decoder
      >>> from angeljax.speculative import SelfDrafter, generate, prepare_drafter
      >>> model = LanguageModel(DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=2,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... ))
      >>> params = model.init(jax.random.key(0))
      >>> drafter = prepare_drafter(model, SelfDrafter(params, num_tokens=2))
      >>> ready = prepare_decoder(model, params)
      >>> generate(*ready, [[1, 2]], drafter=drafter, max_new_tokens=6).tau > 1
      True
    """
    new: Any = dataclasses.replace
    if isinstance(inner := getattr(drafter, "drafter", None), Drafter):
        how: Any = {"device": device, "transpose": transpose, "rows": rows}
        return new(drafter, drafter=prepare_drafter(model, inner, **how))
    params = getattr(drafter, "params", None)
    if params is None:
        return drafter
    if isinstance(drafter, SelfDrafter | DraftModel):
        own = drafter.model or model
        own, params = prepare_decoder(own, params, device=device, transpose=transpose)
        return dataclasses.replace(drafter, model=own, params=params)
    changed: dict[str, Any] = {}
    if rows is not None and isinstance(drafter, EagleDrafter):
        if serves(drafter.config, params, model.dtype):
            changed, params = {"rows": rows}, joined(drafter.config, params)
    ready: Any = prepare(params, device=device)
    ready = prepare_kernels(ready, device=device, transpose=transpose)
    return new(drafter, params=ready, **changed)
