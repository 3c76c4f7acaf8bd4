"""A small vision-language model, trained on scenes in some minutes of one GPU.

A SigLIP-like tower from scratch, a projector, and a language model that is fine-tuned.
First the tower learns to name what covers each patch, then all learn to answer
questions. Data are made on the device, inside the compiled loop.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from angeljax.models import (
    DecoderConfig,
    LanguageModel,
    LlavaConfig,
    LlavaModel,
    VisionTowerConfig,
)
from angeljax.models.attention import dense_attention
from benchmarks import _scenes as scenes

PATCH = 12
TOKENS = (scenes.SIDE // PATCH) ** 2  # of an image
BEGIN = 1  # token at the start of a sequence
_STEPS = 50  # of one compiled call


@dataclasses.dataclass(frozen=True)
class Apart:
    """An `attention_fn` in which questions see the image and themselves.

    Behind the first token and `image` tokens stand questions of `width` tokens each,
    about the same image: one sequence gives as many losses as there are questions.
    """

    image: int
    width: int

    def __call__(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
    ) -> jax.Array:
        place = np.arange(q.shape[1]) - 1 - self.image
        question = np.where(place < 0, -1, place // self.width)
        sees = (question == -1) | (question == question[:, None])
        # Scores are made again in the backward pass: stored they would fill the memory.
        return jax.checkpoint(dense_attention)(q, k, v, mask & sees)


@dataclasses.dataclass(frozen=True)
class Toy:
    """The architecture; hashable.

    Attributes:
      text: of the language model.
      hidden, layers, heads: of the tower.
    """

    text: DecoderConfig
    hidden: int = 384
    layers: int = 6
    heads: int = 6

    @property
    def eyes(self) -> LlavaModel:
        """Tower and projector; `params` with "vision" and "projector"."""
        tower = VisionTowerConfig(
            model_type="siglip_vision_model",
            hidden_size=self.hidden,
            intermediate_size=4 * self.hidden,
            num_layers=self.layers,
            num_heads=self.heads,
            image_size=scenes.SIDE,
            patch_size=PATCH,
        )
        config = LlavaConfig(
            text=self.text, vision=tower, image_token_id=0, vision_layer=-1
        )
        return LlavaModel(config, dtype=jnp.bfloat16)

    def language(self, attention_fn: Any = dense_attention) -> LanguageModel:
        """The decoder, its layers stacked."""
        return LanguageModel(
            self.text, jnp.bfloat16, scan_layers=True, attention_fn=attention_fn
        )


def seen(pixels: jax.Array) -> jax.Array:
    """uint8 `[B, H, W, 3]` to what the tower takes."""
    return jnp.moveaxis(pixels, -1, 1).astype(jnp.bfloat16) / 127.5 - 1


def answer_logits(
    model: LanguageModel,
    text: Any,
    image: jax.Array,
    ids: jax.Array,
    real: jax.Array,
    *,
    image_mask: jax.Array | None = None,
    image_positions: jax.Array | None = None,
) -> jax.Array:
    """float32 `[B, Q, T - 1, V]`: what follows each token but the last of Q questions.

    A token that begins the sequence stands before the image. It is never pruned;
    without it, a first image token of zeros would stay zero in every layer, and the
    gradient of the norms would grow beyond all bounds.

    Args:
      model: with `Apart` where there are several questions.
      text: its params.
      image: `[B, N, D]`.
      ids, real: `[B, Q, T]`, tokens of the questions.
      image_mask, image_positions: `[B, N]`, of the image; positions from 0 to
        `TOKENS - 1`.
    """
    batch, asked, width = ids.shape
    count = image.shape[1]
    module = model.bind(text)
    words = module.embed(ids.reshape(batch, -1))
    begin = module.embed(jnp.full((batch, 1), BEGIN, jnp.int32))
    embeds = jnp.concatenate([begin, image.astype(words.dtype), words], axis=1)
    if image_mask is None:
        image_mask = jnp.ones((batch, count), bool)
    if image_positions is None:
        image_positions = jnp.broadcast_to(jnp.arange(count), (batch, count))
    at = jnp.tile(1 + TOKENS + jnp.arange(width), asked)
    at = jnp.broadcast_to(at, (batch, asked * width))
    start = jnp.zeros((batch, 1), jnp.int32)
    positions = jnp.concatenate([start, 1 + image_positions, at], axis=1)
    mask = [start == 0, image_mask, real.reshape(batch, -1)]
    hidden, _ = module.hidden(
        embeds=embeds,
        positions=positions.astype(jnp.int32),
        mask=jnp.concatenate(mask, axis=1),
    )
    hidden = hidden[:, 1 + count :].reshape(batch, asked, width, -1)[:, :, :-1]
    return module.head(module.norm(hidden))


def answer_loss(logits: jax.Array, ids: jax.Array, answer: jax.Array) -> jax.Array:
    """Mean over questions of the mean loss of the tokens of an answer."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, :, 1:])
    wanted = answer[:, :, 1:]
    return jnp.mean(jnp.sum(loss * wanted, -1) / jnp.sum(wanted, -1))


def train(
    toy: Toy,
    text: Any,
    pictures: scenes.Pictures,
    table: scenes.Questions,
    words: scenes.Words,
    *,
    tower_steps: int,
    steps: int,
    batch: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Both stages.

    Args:
      toy: the architecture.
      text: params of the language model, float32, stacked.
      pictures, table: to learn from.
      words: embeddings of what there is to name.
      tower_steps, steps: of the two stages.
      batch: scenes of a step of the second stage; the first takes twice as many.
      seed: of everything random.

    Returns:
      Params: "vision", "projector" and "text".
    """
    first, second, *keys = jax.random.split(jax.random.key(seed), 4)
    eyes = toy.eyes.init(first)
    eyes.pop("text")
    eyes = _tower(toy, eyes, words, pictures, table, tower_steps, 2 * batch, keys[0])
    params = {**eyes, "text": text}
    model = toy.language(Apart(TOKENS, table.tokens.shape[1]))

    def loss_fn(params: Any, key: jax.Array) -> jax.Array:
        found, rows = _batch(key, pictures, table, batch)
        image = toy.eyes.encode_images(params, seen(found.pixels)).embeds
        ids, real = table.tokens[rows], table.mask[rows]
        logits = answer_logits(model, params["text"], image, ids, real)
        return answer_loss(logits, ids, table.answer[rows])

    def rate(peak: float) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(
            0, peak, min(100, steps // 5 + 1), steps + 1, peak / 50
        )
        return optax.adamw(schedule, b2=0.98, weight_decay=0.01)

    kinds = {"vision": "eyes", "projector": "eyes", "text": "text"}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"eyes": rate(6e-4), "text": rate(2e-4)}, kinds),
    )
    return _loop("answers", loss_fn, optimizer, params, steps, keys[1])


def _tower(
    toy: Toy,
    eyes: Any,
    words: scenes.Words,
    pictures: scenes.Pictures,
    table: scenes.Questions,
    steps: int,
    batch: int,
    key: jax.Array,
) -> Any:
    """Tower and projector learn to name what covers each patch, where it is, and all.

    Classes are the embeddings of their words in the language model, of which the output
    of the projector thus becomes a sum.
    """

    def entropy(x: jax.Array, classes: jax.Array, wanted: jax.Array) -> jax.Array:
        classes = classes / jnp.linalg.norm(classes, axis=-1, keepdims=True)
        logits = x @ classes.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted)

    def loss_fn(params: Any, key: jax.Array) -> jax.Array:
        found, _ = _batch(key, pictures, table, batch)
        x = toy.eyes.encode_images(params, seen(found.pixels)).embeds
        x = x.astype(jnp.float32)
        digit, colour, place = jax.vmap(lambda s: scenes.patch_labels(s, PATCH))(found)
        covered = digit < len(scenes.DIGITS)
        weight = jnp.where(covered, 4.0, 1.0)
        named = entropy(x, words.digits, digit)
        tinted = entropy(x, words.colours, colour) * covered
        total = jnp.sum(weight)
        whole = entropy(x.mean(1), words.photographs, found.photograph)
        return (
            jnp.sum(named * weight) / total
            + jnp.sum(tinted * weight) / total
            + 0.3 * entropy(x, words.places, place).mean()
            + 0.1 * whole.mean()
        )

    schedule = optax.warmup_cosine_decay_schedule(
        0, 1e-3, min(100, steps // 5 + 1), steps + 1, 1e-4
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    return _loop("tower", loss_fn, optimizer, eyes, steps, key)


def _batch(
    key: jax.Array, pictures: scenes.Pictures, table: scenes.Questions, count: int
) -> tuple[scenes.Scene, jax.Array]:
    return scenes.batch(
        key, pictures.digits, pictures.photographs, count=count, first=table.first
    )


def _loop(
    name: str,
    loss_fn: Any,
    optimizer: optax.GradientTransformation,
    params: Any,
    steps: int,
    key: jax.Array,
) -> Any:
    """Steps of an optimizer, `_STEPS` of them in a compiled call."""

    @functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames="count")
    def run(params: Any, state: Any, key: jax.Array, count: int) -> Any:
        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            loss, gradient = jax.value_and_grad(loss_fn)(params, key)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        carry, losses = jax.lax.scan(
            step, (params, state), jax.random.split(key, count)
        )
        return *carry, losses.mean()

    state = jax.jit(optimizer.init)(params)
    began, done = time.perf_counter(), 0
    while done < steps:
        count = min(_STEPS, steps - done)
        params, state, loss = run(params, state, jax.random.fold_in(key, done), count)
        done += count
        if done % (4 * _STEPS) == 0 or done == steps or done == _STEPS:
            seconds = time.perf_counter() - began
            print(f"{name} {done}: loss {float(loss):.4f}, {seconds:.0f} s", flush=True)
    return params
