"""The networks of trained drafters in numpy, one token and one head at a time.

Written from the papers (DFlash, arXiv 2602.06036; the MTP module of arXiv 2412.19437),
not from the code that they check.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from angeljax.models import DecoderConfig


def wide(tree: Any) -> Any:
    """All leaves in float64."""
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max())
    return x / x.sum()


def rms(x: np.ndarray, norm: Any, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x) + eps) * norm["scale"]


def turn(x: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Rotary positions: component i turns with the one half a head further."""
    half, out = len(x) // 2, x.copy()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        c, s = np.cos(angle), np.sin(angle)
        out[i] = x[i] * c - x[i + half] * s
        out[i + half] = x[i + half] * c + x[i] * s
    return out


def heads(c: DecoderConfig, x: Any, kernel: Any, norm: Any, position: Any) -> list:
    """The heads of a projection; normalised and turned if there is a position."""
    found = []
    for y in np.split(x @ kernel["kernel"], kernel["kernel"].shape[1] // c.head_dim):
        y = y if norm is None else rms(y, norm, c.norm_eps)
        found.append(y if position is None else turn(y, position, c.rope_theta))
    return found


def key_value(c: DecoderConfig, attn: Any, x: np.ndarray, position: int) -> tuple:
    key = heads(c, x, attn["k_proj"], attn.get("k_norm"), position)
    return key, heads(c, x, attn["v_proj"], None, None)


def layer(
    c: DecoderConfig, p: Any, x: np.ndarray, position: int, seen: list
) -> np.ndarray:
    """One token through a layer that sees these keys and values."""
    attn, out = p["attn"], []
    inner = rms(x, p["attn_norm"], c.norm_eps)
    queries = heads(c, inner, attn["q_proj"], attn.get("q_norm"), position)
    for h, q in enumerate(queries):
        group = h * c.num_kv_heads // c.num_heads
        scores = np.asarray([q @ key[group] for key, _ in seen]) * c.head_dim**-0.5
        values = np.stack([value[group] for _, value in seen])
        out.append(softmax(scores) @ values)
    x = x + np.concatenate(out) @ attn["o_proj"]["kernel"]
    inner, mlp = rms(x, p["mlp_norm"], c.norm_eps), p["mlp"]
    gate = inner @ mlp["gate_proj"]["kernel"]
    up = inner @ mlp["up_proj"]["kernel"]
    return x + (gate / (1 + np.exp(-gate)) * up) @ mlp["down_proj"]["kernel"]


def block_hidden(
    config: Any, params: Any, embedding: Any, features: Any, tokens: Any, anchor: int
) -> list[np.ndarray]:
    """Slots 1 and on of the block at an anchor.

    `features` `[T, n * D]` are what the target's layers gave, side by side.
    """
    c, size = config.decoder, config.block_size
    slots = [tokens[anchor]] + [config.mask_token_id] * (size - 1)
    xs = [embedding[token] for token in slots]
    context = []
    for s in range(anchor):
        fused = features[s] @ params["fc"]["kernel"]
        context.append(rms(fused, params["hidden_norm"], c.norm_eps))
    for number in range(c.num_layers):
        p = params["layers"][number]
        seen = [key_value(c, p["attn"], x, s) for s, x in enumerate(context)]
        for j, x in enumerate(xs):
            inner = rms(x, p["attn_norm"], c.norm_eps)
            seen.append(key_value(c, p["attn"], inner, anchor + j))
        xs = [layer(c, p, x, anchor + j, seen) for j, x in enumerate(xs)]
    return [rms(x, params["norm"], c.norm_eps) for x in xs[1:]]


def mtp_hidden(
    c: DecoderConfig,
    params: Any,
    embedding: Any,
    head: Any,
    final: Any,
    tokens: Any,
    place: int,
    steps: int,
    on_policy: bool,
) -> list[np.ndarray]:
    """The outputs of `steps` drafts after the token at `place + 1`."""
    seen: list[Any] = []
    out: list[np.ndarray] = []
    for at in range(place + steps):
        hidden = final[at] if at <= place else out[-1]
        token = tokens[at + 1]
        if on_policy and at > place:
            token = int(np.argmax(out[-1] @ head))
        both = (
            rms(embedding[token], params["enorm"], c.norm_eps),
            rms(hidden, params["hnorm"], c.norm_eps),
        )
        x = np.concatenate(both) @ params["eh_proj"]["kernel"]
        p = params["layer"]
        inner = rms(x, p["attn_norm"], c.norm_eps)
        seen.append(key_value(c, p["attn"], inner, at))
        y = rms(layer(c, p, x, at, seen), params["norm"], c.norm_eps)
        if at >= place:
            out.append(y)
    return out


def draft_loss(o: Any, z: Any, labels: Any, target: Any, counts: Any) -> float:
    """The loss of one draft: logits `[J, V]`, tokens `[J]`, target's logits, 0 or 1."""
    places = len(labels)
    terms, texts, alphas = [], [], []
    for j in range(places):
        p, q = softmax(target[j]), softmax(z[j])
        kl = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True))
        alpha = sum(min(a, b) for a, b in zip(p, q, strict=True))
        share = np.exp(-o.eta * alpha)
        texts.append(q[labels[j]])
        alphas.append(alpha)
        term = {
            "ce": -np.log(texts[-1]),
            "kl": kl,
            "tv": 1 - alpha,
            "lk_alpha": -np.log(alpha),
            "lk_hybrid": share * kl + (1 - share) * (1 - alpha),
            "block_tv": 1 - np.prod(alphas),
        }
        terms.append(term[o.loss])
    if o.loss == "block_tv":
        weights = [1 / places] * places
    elif o.weights == "continuation":
        runs = [np.prod([0.5 + 0.5 * t for t in texts[: j + 1]]) for j in range(places)]
        weights = [sum(runs[j:]) / places for j in range(places)]
    else:
        gamma = o.gamma if o.weights == "exponential" else np.inf
        fixed = [np.exp(-j / gamma) for j in range(places)]
        weights = [w / sum(fixed) for w in fixed]
    return sum(w * t * c for w, t, c in zip(weights, terms, counts, strict=True))


def mean_loss(o: Any, z: Any, labels: Any, target: Any, counts: Any) -> dict[str, Any]:
    """Loss and metrics of many drafts: lists of what `draft_loss` takes."""
    losses, runs, places = [], [], len(labels[0])
    right, all_ = np.zeros(places), np.zeros(places)
    for draft in zip(z, labels, target, counts, strict=True):
        seen = np.cumprod(draft[3])
        if not seen[0]:
            continue
        losses.append(draft_loss(o, *draft[:3], seen))
        hits = [int(np.argmax(row)) == t for row, t in zip(*draft[:2], strict=True)]
        right += np.asarray(hits) * seen
        all_ += seen
        if seen.all():
            runs.append(1 + ([*hits, False].index(False)))
    found = {f"top1/{j}": right[j] / all_[j] for j in range(places)}
    return {
        "loss": np.mean(losses),
        "tau": np.mean(runs),
        "weight": len(losses),
        **found,
    }
