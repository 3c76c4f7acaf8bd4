"""Losses in float64 numpy, written from their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """Of two arrays of log-probabilities."""
    return float(np.sum(np.exp(p) * (p - q)))


def cross_entropy(zs: np.ndarray, label: int) -> float:
    return float(-log_softmax(zs)[label])


def divergence(zs: Any, zt: Any, label: int, loss: str, tau: float, k: int) -> float:
    """Of one token."""
    if loss == "mse":
        return float(np.mean((zs - zt) ** 2))
    s, t = log_softmax(zs / tau), log_softmax(zt / tau)
    if loss == "kl":
        return tau**2 * kl(t, s)
    if loss == "rkl":
        return tau**2 * kl(s, t)
    if loss == "cakld":
        c = np.exp(log_softmax(zt)[label])
        return tau**2 * float(c * kl(s, t) + (1 - c) * kl(t, s))
    by = zt if loss == "kl_top" else zs
    top = np.argsort(by)[::-1][:k]
    s, t = log_softmax(zs[top] / tau), log_softmax(zt[top] / tau)
    return tau**2 * (kl(t, s) if loss == "kl_top" else kl(s, t))


def mean(
    zs: Any, zt: Any, labels: Any, loss: str, tau: float = 1.0, k: int = 1000
) -> float:
    """Over the tokens whose label is not negative; `loss` may be "ce"."""
    width = zs.shape[-1]
    rows = zip(
        zs.reshape(-1, width), zt.reshape(-1, width), labels.ravel(), strict=True
    )
    each = [
        cross_entropy(s, int(y))
        if loss == "ce"
        else divergence(s, t, int(y), loss, tau, k)
        for s, t, y in rows
        if y >= 0
    ]
    return float(np.mean(each))


def gradient(f: Any, x: np.ndarray, eps: float = 1e-5) -> np.ndarray:
    """Central differences."""
    grad = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[i] = eps
        grad[i] = (f(x + step) - f(x - step)) / (2 * eps)
    return grad
