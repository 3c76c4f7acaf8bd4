"""Short trainings of a quantized model against the original: rounding, or scales.

Both compare logits on plain text, with the weights of the original frozen. A few
hundred steps are enough, and nothing of the size of the weights is learned but the
rounding of FOCUS (one number for 8 weights).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from angeljax.qat import focus, scales
from angeljax.recipe import Recipe
from angeljax.train.losses import distillation, next_tokens

__all__ = ["learn_focus", "tune_scales"]

# Of the maxima and of the rounding, as in arXiv 2608.01847.
FOCUS_RATES = {"mxfp4": (2e-2, 5e-2), "nvfp4": (5e-3, 1e-3)}


def learn_focus(
    model: Any,
    params: Any,
    recipe: Recipe,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    max_scale_rate: float | None = None,
    rounding_rate: float | None = None,
    top_k: int = 1000,
) -> tuple[Any, np.ndarray]:
    """Learns how weights are rounded to NVFP4 or MXFP4 (FOCUS, arXiv 2608.01847).

    The loss is the KL divergence from the original model over its `top_k` likeliest
    tokens; the optimizer is Adam with constant rates. The paper trains one epoch of
    WikiText-2 in batches of 32 windows of 2048 tokens.

    Args:
      model: a `LanguageModel`, or a function of params and tokens `[B, T]` that gives
        logits `[B, T, V]`.
      params: its dense params; also those of the teacher.
      recipe: its rules take weights to nvfp4 or mxfp4.
      batches: int tokens `[B, T]` each, all of one shape.
      steps: how many; batches are used again when they run out. Default: each once.
      max_scale_rate, rounding_rate: learning rates; default those of the paper, 5e-3
        and 1e-3 for nvfp4, 2e-2 and 5e-2 for mxfp4.
      top_k: of the loss.

    Returns:
      The packed tree, and the loss of each step.

    Raises:
      RecipeError: the recipe does not fit, or takes a weight to another format.
      ValueError: there are no batches, or an option is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> from angeljax.train.recovery import learn_focus
      >>> def model(params, tokens):
      ...     return params["table"][tokens] @ params["w"]
      >>> k1, k2 = jax.random.split(jax.random.key(0))
      >>> params = {"table": jax.random.normal(k1, (50, 64))}
      >>> params["w"] = jax.random.normal(k2, (64, 50)) / 8
      >>> recipe = aj.Recipe(rules=[aj.Rule(match="w", format="mxfp4")])
      >>> tokens = jnp.arange(40).reshape(2, 20)
      >>> packed, loss = learn_focus(model, params, recipe, [tokens], steps=30)
      >>> bool(loss[-1] < loss[0])
      True
    """
    state = focus.init(params, recipe)
    kinds = dict(state.plan)
    transforms, labels = {}, {}
    for name, rate, place in (
        ("max_scale", max_scale_rate, 0),
        ("rounding", rounding_rate, 1),
    ):
        labels[name] = {p: f"{name} {s.format}" for p, s in kinds.items()}
        for fmt, rates in FOCUS_RATES.items():
            chosen = rates[place] if rate is None else _rate(f"{name}_rate", rate)
            transforms[f"{name} {fmt}"] = optax.adam(chosen)

    def state_of(learned: Any) -> focus.FocusState:
        return focus.FocusState(**learned, plan=state.plan)

    learned, losses = _learn(
        model,
        params,
        params,
        {"max_scale": state.max_scale, "rounding": state.rounding},
        lambda params, learned: focus.apply(params, state_of(learned)),
        optax.partition(transforms, labels),
        batches,
        steps,
        top_k,
    )
    return focus.finalize(params, state_of(learned)), losses


def tune_scales(
    model: Any,
    params: Any,
    packed: Any,
    batches: Iterable[Any],
    *,
    steps: int | None = None,
    learning_rate: float = 1e-3,
    top_k: int = 1000,
) -> tuple[Any, np.ndarray]:
    """Learns the scales of a packed tree, codes frozen, from the original's logits.

    Args:
      model: as in `learn_focus`.
      params: the original's params, dense; the teacher.
      packed: what `angeljax.compress` made of them, in any format with scales of 16 or
        32 bits.
      batches, steps, top_k: as in `learn_focus`.
      learning_rate: of Adam, relative to each scale.

    Returns:
      The packed tree with new scales, and the loss of each step.

    Raises:
      ValueError: there is nothing to learn, there are no batches, or an option is out
        of range.

    Example:
      >>> import jax, jax.numpy as jnp, angeljax as aj
      >>> from angeljax.train.recovery import tune_scales
      >>> def model(params, tokens):
      ...     return params["table"][tokens] @ params["w"]
      >>> k1, k2 = jax.random.split(jax.random.key(0))
      >>> params = {"table": jax.random.normal(k1, (50, 64))}
      >>> params["w"] = jax.random.normal(k2, (64, 50)) / 8
      >>> recipe = aj.Recipe(rules=[aj.Rule(match="w", format="t2")])
      >>> packed = aj.compress(params, recipe)
      >>> tokens = jnp.arange(40).reshape(2, 20)
      >>> _, loss = tune_scales(
      ...     model, params, packed, [tokens], steps=30, learning_rate=1e-2
      ... )
      >>> bool(loss[-1] < loss[0])
      True
    """
    gains, losses = _learn(
        model,
        params,
        packed,
        scales.init(packed),
        scales.apply,
        optax.adam(_rate("learning_rate", learning_rate)),
        batches,
        steps,
        top_k,
    )
    return scales.finalize(packed, gains), losses


def _learn(
    model: Any,
    teacher: Any,
    student: Any,
    learned: Any,
    apply: Callable[[Any, Any], Any],
    optimizer: optax.GradientTransformation,
    batches: Iterable[Any],
    steps: int | None,
    top_k: int,
) -> tuple[Any, np.ndarray]:
    """Adam on `learned`; all other arrays are arguments of the compiled step."""
    batches = [jnp.asarray(b) for b in batches]
    if not batches:
        raise ValueError("there are no batches to learn from")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"steps={steps!r}: use a positive integer")
    if type(top_k) is not int or top_k < 1:
        raise ValueError(f"top_k={top_k!r}: use a positive integer")
    logits = getattr(model, "logits", model)

    @jax.jit
    def step(
        learned: Any,
        optimizer_state: Any,
        teacher: Any,
        student: Any,
        tokens: jax.Array,
    ) -> Any:
        target = jax.lax.stop_gradient(logits(teacher, tokens))

        def loss(learned: Any) -> jax.Array:
            found = logits(apply(student, learned), tokens)
            labels = next_tokens(tokens)
            return distillation(found, target, labels, loss="kl_top", top_k=top_k)

        value, gradient = jax.value_and_grad(loss)(learned)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, learned)
        return optax.apply_updates(learned, updates), optimizer_state, value

    optimizer_state, losses = optimizer.init(learned), []
    count = len(batches) if steps is None else steps
    for tokens in itertools.islice(itertools.cycle(batches), count):
        learned, optimizer_state, value = step(
            learned, optimizer_state, teacher, student, tokens
        )
        losses.append(value)
    return learned, np.asarray(jax.device_get(losses))


def _rate(name: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not value > 0:
        raise ValueError(f"{name}={value!r}: use a positive number")
    return float(value)
