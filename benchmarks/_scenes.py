"""Scenes of handwritten digits on photographs, and questions about them.

Made on the device, from a key: a crop of a photograph, darkened, with one to four
digits of different values in cells of a 3 by 3 grid, each with a colour and a size of
its own. Questions ask in words what is where. Every question with every answer that it
can have is one row of a table of tokens, so that a batch is a gather.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SIDE, CELLS, MOST = 192, 3, 4
CELL = SIDE // CELLS
DIGITS = "zero one two three four five six seven eight nine".split()
PLACES = [
    "top left", "top", "top right", "left", "middle", "right", "bottom left",
    "bottom", "bottom right",
]  # fmt: skip
COLOURS = {
    "red": (255, 60, 60),
    "green": (70, 230, 70),
    "blue": (90, 130, 255),
    "yellow": (255, 235, 60),
    "white": (255, 255, 255),
}
KINDS = ("what", "where", "colour", "count", "presence", "photograph")
CHANCE = (0.1, 1 / 9, 0.2, 0.25, 0.5, 1 / 74)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Digits by value and photographs, on the device.

    Attributes:
      digits: uint8 `[10, n, 28, 28]`, n of each value.
      photographs: uint8 `[P, side, side, 3]`, side at least `SIDE`.
      names: what each photograph shows.
    """

    digits: jax.Array
    photographs: jax.Array
    names: tuple[str, ...]


def load(directory: Path, *, test: bool, side: int = 240) -> Pictures:
    """MNIST digits and photographs of a folder with `mnist_10k.npz`, `labels.jsonl`.

    The last 2,000 digits are for the test. Photographs are the same in both.
    """
    from PIL import Image

    stored = np.load(directory / "mnist_10k.npz", allow_pickle=False)
    images, labels = stored["images"], stored["labels"]
    part = slice(-2000, None) if test else slice(0, -2000)
    images, labels = images[part], labels[part]
    count = min(int((labels == d).sum()) for d in range(10))
    digits = np.stack([images[labels == d][:count] for d in range(10)])
    photographs, names = [], []
    for line in (directory / "labels.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if not row["file"].startswith("photos/"):
            continue
        with Image.open(directory / row["file"]) as opened:
            image = opened.convert("RGB")
            short = min(image.size)
            left, top = ((n - short) // 2 for n in image.size)
            square = image.crop((left, top, left + short, top + short))
            photographs.append(np.asarray(square.resize((side, side))))
        names.append(row["class"])
    return Pictures(jnp.asarray(digits), jnp.asarray(np.stack(photographs)), (*names,))


def made_up(seed: int = 0) -> Pictures:
    """Random pictures, for a run without any file."""
    rng = np.random.default_rng(seed)
    digits = rng.integers(0, 255, (10, 4, 28, 28), dtype=np.uint8)
    photographs = rng.integers(0, 255, (3, 200, 200, 3), dtype=np.uint8)
    return Pictures(jnp.asarray(digits), jnp.asarray(photographs), ("a", "b", "c"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene, or many with a leading axis; slots from `count` on are empty.

    Attributes:
      pixels: uint8 `[SIDE, SIDE, 3]`.
      count: int32 `[]`, digits.
      values, places, colours: int32 `[MOST]`, of each digit.
      boxes: float32 `[MOST, 4]`, its top, left, height and width in pixels.
      photograph: int32 `[]`.
    """

    pixels: jax.Array
    count: jax.Array
    values: jax.Array
    places: jax.Array
    colours: jax.Array
    boxes: jax.Array
    photograph: jax.Array


def scene(key: jax.Array, digits: jax.Array, photographs: jax.Array) -> Scene:
    """A random scene of these pictures."""
    keys = iter(jax.random.split(key, 12))
    side = photographs.shape[1]
    which = jax.random.randint(next(keys), (), 0, photographs.shape[0])
    corner = jax.random.randint(next(keys), (2,), 0, side - SIDE + 1)
    at = (which, corner[0], corner[1], 0)
    ground = jax.lax.dynamic_slice(photographs, at, (1, SIDE, SIDE, 3))[0]
    flip = jax.random.bernoulli(next(keys))
    ground = jnp.where(flip, ground[:, ::-1], ground).astype(jnp.float32)
    canvas = ground * jax.random.uniform(next(keys), (), minval=0.35, maxval=0.75)

    count = jax.random.randint(next(keys), (), 1, MOST + 1)
    values = jax.random.permutation(next(keys), 10)[:MOST]
    places = jax.random.permutation(next(keys), CELLS * CELLS)[:MOST]
    colours = jax.random.randint(next(keys), (MOST,), 0, len(COLOURS))
    samples = jax.random.randint(next(keys), (MOST,), 0, digits.shape[1])
    sizes = jax.random.uniform(next(keys), (MOST,), minval=30, maxval=52)
    inside = jax.random.uniform(next(keys), (MOST, 2)) * (CELL - sizes[:, None])
    grid = jnp.stack([places // CELLS, places % CELLS], 1) * CELL
    boxes = jnp.concatenate([grid + inside, *[sizes[:, None]] * 2], 1)
    palette = jnp.asarray(list(COLOURS.values()), jnp.float32)
    for i in range(MOST):
        ink = digits[values[i], samples[i]].astype(jnp.float32) / 255
        scale = boxes[i, 2:] / ink.shape[0]
        alpha = jax.image.scale_and_translate(
            ink, (SIDE, SIDE), (0, 1), scale, boxes[i, :2], "linear", antialias=False
        )
        alpha = jnp.where(i < count, jnp.clip(alpha, 0, 1), 0)[..., None]
        canvas = canvas * (1 - alpha) + alpha * palette[colours[i]]
    pixels = jnp.clip(canvas, 0, 255).astype(jnp.uint8)
    return Scene(pixels, count, values, places, colours, boxes, which)


def patch_labels(scene: Scene, patch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """int32 `[(SIDE / patch) ** 2]` each: digit, colour and place of every patch.

    A patch without a digit has the digit 10 and the colour 0.
    """
    n = SIDE // patch
    centre = (jnp.arange(n) + 0.5) * patch
    digit, colour = jnp.full((n, n), 10), jnp.zeros((n, n), jnp.int32)
    for i in range(MOST):
        top, left, height, width = scene.boxes[i]
        row = (centre > top) & (centre < top + height)
        column = (centre > left) & (centre < left + width)
        here = row[:, None] & column & (i < scene.count)
        digit = jnp.where(here, scene.values[i], digit)
        colour = jnp.where(here, scene.colours[i], colour)
    cell = (centre // CELL).astype(jnp.int32)
    place = cell[:, None] * CELLS + cell
    return digit.reshape(-1), colour.reshape(-1), place.reshape(-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Words:
    """Embeddings of what there is to name, float32 `[n, D]` each.

    The last of the digits is the one for no digit.
    """

    digits: jax.Array
    colours: jax.Array
    places: jax.Array
    photographs: jax.Array


def words(
    encode: Callable[[str], Sequence[int]], names: Sequence[str], table: jax.Array
) -> Words:
    """Means of the embeddings of the tokens of each word.

    Args:
      encode: text to tokens.
      names: of the photographs.
      table: embeddings, `[V, D]`.
    """

    def of(texts: Sequence[str]) -> jax.Array:
        rows = [np.asarray(encode(" " + text), np.int32) for text in texts]
        found = [jnp.mean(table[r].astype(jnp.float32), axis=0) for r in rows]
        return jnp.stack(found)

    return Words(of([*DIGITS, "background"]), of([*COLOURS]), of(PLACES), of(names))


@dataclasses.dataclass(frozen=True)
class Questions:
    """All questions with all of their answers, as tokens.

    Attributes:
      tokens: int32 `[rows, T]`, a question, its answer and an end token; 0 behind them.
      mask: bool `[rows, T]`, real tokens.
      answer: bool `[rows, T]`, tokens of the answer and the end.
      first: for each of `KINDS`, its first row.
    """

    tokens: jax.Array
    mask: jax.Array
    answer: jax.Array
    first: tuple[int, ...]


def questions(
    encode: Callable[[str], Sequence[int]], names: Sequence[str], end: int
) -> Questions:
    """The table for a tokenizer.

    Args:
      encode: text to tokens, without any special ones.
      names: of the photographs.
      end: token behind an answer.
    """
    rows: list[tuple[list[int], list[int]]] = []
    first: list[int] = []

    def add(question: str, answer: str) -> None:
        asked = list(encode(f"Question: {question} Answer:"))
        rows.append((asked, [*encode(" " + answer), end]))

    first.append(len(rows))
    for place in PLACES:
        for digit in DIGITS:
            add(f"Which digit is at the {place}?", digit)
    first.append(len(rows))
    for digit in DIGITS:
        for place in PLACES:
            add(f"Where is the {digit}?", place)
    first.append(len(rows))
    for digit in DIGITS:
        for colour in COLOURS:
            add(f"What colour is the {digit}?", colour)
    first.append(len(rows))
    for number in DIGITS[1 : MOST + 1]:
        add("How many digits are there?", number)
    first.append(len(rows))
    for digit in DIGITS:
        for answer in ("no", "yes"):
            add(f"Is the {digit} there?", answer)
    first.append(len(rows))
    for name in names:
        add("What is in the photograph?", name)
    width = max(len(q) + len(a) for q, a in rows)
    tokens = np.zeros((len(rows), width), np.int32)
    mask, said = np.zeros((2, len(rows), width), bool)
    for i, (asked, reply) in enumerate(rows):
        tokens[i, : len(asked) + len(reply)] = asked + reply
        mask[i, : len(asked) + len(reply)] = True
        said[i, len(asked) : len(asked) + len(reply)] = True
    return Questions(
        jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(said), (*first,)
    )


def ask(key: jax.Array, scene: Scene, first: Sequence[int]) -> jax.Array:
    """int32 `[6]`: for each of `KINDS` the row of a question that the scene answers."""
    keys = jax.random.split(key, 3)
    one, two, three = (
        jax.random.randint(k, (), 0, scene.count) for k in jax.random.split(keys[0], 3)
    )
    value, place, colour = scene.values, scene.places, scene.colours
    # A digit that is there in one of two questions.
    there = jax.random.bernoulli(keys[1])
    absent = jnp.ones(10, bool).at[value].set(jnp.arange(MOST) >= scene.count)
    other = jax.random.categorical(keys[2], jnp.where(absent, 0.0, -jnp.inf))
    shown = value[
        jax.random.randint(jax.random.fold_in(keys[1], 1), (), 0, scene.count)
    ]
    rows = (
        place[one] * 10 + value[one],
        value[two] * len(PLACES) + place[two],
        value[three] * len(COLOURS) + colour[three],
        scene.count - 1,
        jnp.where(there, shown, other) * 2 + there,
        scene.photograph,
    )
    return jnp.stack(rows).astype(jnp.int32) + jnp.asarray(first, jnp.int32)


@functools.partial(jax.jit, static_argnames=("count", "first"))
def batch(
    key: jax.Array,
    digits: jax.Array,
    photographs: jax.Array,
    *,
    count: int,
    first: tuple[int, ...],
) -> tuple[Scene, jax.Array]:
    """`count` scenes and the rows of their questions, int32 `[count, 6]`."""

    def one(key: jax.Array) -> Any:
        made, asked = jax.random.split(key)
        found = scene(made, digits, photographs)
        return found, ask(asked, found, first)

    return jax.vmap(one)(jax.random.split(key, count))
