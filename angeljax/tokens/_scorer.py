"""The learned importance scorer of VisionSelector and IDPruner, and its files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.tokens import _choose

Scorer = Mapping[str, Mapping[str, jax.Array]]

# What wraps a module's name in the published files.
_PREFIXES = "module.", "visual.importance_scorer.", "_orig_mod."
_NAMES = {
    "q_proj.weight": ("q_proj", "kernel"),
    "q_proj.bias": ("q_proj", "bias"),
    "k_proj.weight": ("k_proj", "kernel"),
    "k_proj.bias": ("k_proj", "bias"),
}


@jax.jit
def score_tokens(
    scorer: Scorer, embeds: jax.Array, mask: jax.Array | None = None
) -> jax.Array:
    """The learned importance of each token, for `idpruner` and `visionselector`.

    The scorer is attention without softmax and values (arXiv 2510.16598):

        w_i = mean_j (W_q x_i + b_q) . (W_k x_j + b_k) / sqrt(h)

    which collapses to two products with vectors, linear in N, as the mean goes inside:

        w = (X (W_q^T k) + b_q . k) / sqrt(h),   k = W_k mean(x) + b_k

    A score depends on all tokens of its row: those of several images scored together
    are not those of each alone. AngelSlim scores all images of a prompt together.

    Args:
      scorer: `{"q_proj": {"kernel": [D, h], "bias": [h]}, "k_proj": ...}`, from
        `init_scorer` or `load_scorer`.
      embeds: `[..., N, D]`, after the projector; any float dtype.
      mask: bool `[..., N]`; padding has no part in the mean.

    Returns:
      float32 `[..., N]`, with gradients.

    Raises:
      ValueError: D is not the scorer's.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> scorer = init_scorer(jax.random.key(0), 8)
      >>> score_tokens(scorer, jnp.ones((2, 5, 8))).shape
      (2, 5)
    """
    query, key = scorer["q_proj"], scorer["k_proj"]
    dim, hidden = query["kernel"].shape
    if embeds.shape[-1] != dim:
        raise ValueError(
            f"the scorer is for embeddings of {dim}, embeds has {embeds.shape[-1]}"
        )
    mask = jnp.ones(embeds.shape[:-1], bool) if mask is None else mask

    def product(spec: str, *arrays: jax.Array) -> jax.Array:
        arrays = tuple(x.astype(jnp.float32) for x in arrays)
        return jnp.einsum(spec, *arrays, precision=jax.lax.Precision.HIGHEST)

    mean = _choose.masked_mean(embeds, mask)
    mean_key = product("...d,dh->...h", mean, key["kernel"]) + key["bias"]
    vector = product("...h,dh->...d", mean_key, query["kernel"])
    constant = product("...h,h->...", mean_key, query["bias"])
    return (product("...nd,...d->...n", embeds, vector) + constant[..., None]) / (
        hidden**0.5
    )


def init_scorer(
    key: jax.Array, dim: int, hidden: int | None = None, *, scale: float = 1e-4
) -> dict[str, dict[str, jax.Array]]:
    """A scorer before training: weights N(0, scale^2), no biases.

    Args:
      key: a PRNG key.
      dim: D, width of the embeddings.
      hidden: h; default D / 2, as published.
      scale: standard deviation.

    Returns:
      float32 params, see `score_tokens`.

    Example:
      >>> import jax
      >>> init_scorer(jax.random.key(0), 8)["q_proj"]["kernel"].shape
      (8, 4)
    """
    hidden = hidden or dim // 2
    keys = dict(zip(("q_proj", "k_proj"), jax.random.split(key), strict=True))
    return {
        name: {
            "kernel": scale * jax.random.normal(one, (dim, hidden)),
            "bias": jnp.zeros(hidden),
        }
        for name, one in keys.items()
    }


def load_scorer(path: str | os.PathLike[str]) -> dict[str, dict[str, jax.Array]]:
    """A scorer from published weights (`AngelSlim/Qwen2.5-VL-7B-Instruct-Selector`).

    Reads tensors only, and runs no code that lies beside them. A checkpoint of a whole
    model is fine if it holds the scorer as `visual.importance_scorer`.

    Args:
      path: a `.safetensors` file, or a folder with one.

    Returns:
      float32 params, see `score_tokens`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or holds another kind of scorer; one line.

    Example:
      >>> import jax
      >>> save_scorer("scorer.safetensors", init_scorer(jax.random.key(0), 8))
      >>> load_scorer("scorer.safetensors")["k_proj"]["kernel"].shape
      (8, 4)
    """
    from safetensors import SafetensorError, safe_open

    file = _file(Path(path))
    found: dict[str, Any] = {}
    try:
        with safe_open(file, framework="flax") as f:
            names = list(f.keys())
            inside = [name for name in names if _PREFIXES[1] in name]
            for name in inside or names:
                found[_plain(name)] = f.get_tensor(name)
    except SafetensorError as e:
        reason = str(e).split("\n")[0]
        raise ValueError(f"{file}: no readable safetensors file ({reason})") from None
    if found.keys() != _NAMES.keys():
        missing = ", ".join(sorted(_NAMES.keys() - found.keys())) or "none"
        others = ", ".join(sorted(found.keys() - _NAMES.keys())[:5]) or "none"
        raise ValueError(
            f"{file} holds no scorer of two projections: missing {missing}; not known "
            f"{others}"
        )
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    hidden, dim = (*shapes["q_proj.weight"], 0)[:2]
    want = {"weight": (hidden, dim), "bias": (hidden,)}
    for name, shape in shapes.items():
        if shape != want[name.split(".")[1]]:
            raise ValueError(
                f"{file}: {name} is {list(shape)}, which does not go with "
                f"q_proj.weight {list(shapes['q_proj.weight'])}"
            )
    params: dict[str, dict[str, jax.Array]] = {"q_proj": {}, "k_proj": {}}
    for name, value in found.items():
        module, leaf = _NAMES[name]
        value = jnp.asarray(value, jnp.float32)
        params[module][leaf] = value.T if leaf == "kernel" else value
    return params


def save_scorer(path: str | os.PathLike[str], scorer: Scorer) -> None:
    """Writes a scorer in the layout of the published ones.

    Args:
      path: of the `.safetensors` file.
      scorer: see `score_tokens`.
    """
    from safetensors.numpy import save_file

    tensors = {}
    for name, (module, leaf) in _NAMES.items():
        value = np.asarray(scorer[module][leaf], np.float32)
        tensors[name] = np.ascontiguousarray(value.T if leaf == "kernel" else value)
    save_file(tensors, path)


def _file(path: Path) -> Path:
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is no .safetensors file; formats that may run code when they "
                "are read (.bin, .pt) are not read"
            )
        return path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        raise FileNotFoundError(
            f"{path} is no .safetensors file, nor a folder with one"
        )
    if len(files) > 1:
        raise ValueError(
            f"{path} has {len(files)} .safetensors files: name one of them"
        )
    return files[0]


def _plain(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.replace(prefix, "")
    return name
