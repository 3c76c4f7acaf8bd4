"""Rotations that are merged into weights, and those that are computed online."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax.formats import _hadamard
from angeljax.formats._rotation import largest_block, rotate
from angeljax.models import LanguageModel, fuse_projections, stack_layers, untie
from angeljax.transforms import apply_transforms
from tests.transforms._models import (
    CONFIG,
    MODEL,
    SCANNED,
    TOKENS,
    make_params,
    measured,
    stacked,
)
from tests.transforms._models import same_logits as same

RULE = aj.Rule(format="int4", group_size=16)


def recipe(**options) -> aj.Recipe:
    return aj.Recipe(rules=[RULE], transforms=[{"name": "rotation", **options}])


@pytest.fixture(scope="module")
def params():
    return measured()[0]


@pytest.mark.parametrize(
    "n", [1, 2, 64, 12, 20, 24, 28, 36, 40, 44, 52, 60, 100, 108, 140, 148, 196, 576]
)
def test_matrices(n: int) -> None:
    h = _hadamard.hadamard_matrix(n)
    assert set(np.unique(h)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n))


def test_every_size_from_a_field() -> None:
    for n in _hadamard._bases():
        h = _hadamard._one(n)
        np.testing.assert_array_equal(h @ h.T, n * np.eye(n))
    with pytest.raises(ValueError, match="no Hadamard matrix of size 172"):
        _hadamard.hadamard_matrix(172)
    sizes = {576: 576, 1536: 1536, 14336: 14336, 11008: 256, 18944: 18944, 30: 2, 7: 1}
    assert {k: largest_block(k) for k in sizes} == sizes


@pytest.mark.parametrize(("k", "size"), [(576, 576), (512, 512), (120, 60), (96, 8)])
def test_products_by_factors(k: int, size: int) -> None:
    x = np.random.default_rng(0).normal(size=(3, k))
    block = _hadamard.hadamard_matrix(size).astype(float) / np.sqrt(size)
    want = x @ np.kron(np.eye(k // size), block)
    got = rotate(jnp.asarray(x, jnp.float32), size)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(rotate(got, size, inverse=True), x, atol=1e-5)


def test_logits_stay(params) -> None:
    """Grouped queries, norms of heads, biases; apart, stacked and fused."""
    new, _ = apply_transforms(params, recipe(head_dim=8, seed=3))
    same(MODEL, params, new)
    layer = new["layers"][0]
    assert bool(jnp.all(layer["attn_norm"]["scale"] == 1))
    assert bool(jnp.all(new["norm"]["scale"] == 1))
    for part in ("attn", "mlp"):
        for name, leaf in layer[part].items():
            if "kernel" in leaf:
                old = params["layers"][0][part][name]["kernel"]
                assert float(jnp.max(jnp.abs(leaf["kernel"] - old))) > 0.1, name
    heads, _ = apply_transforms(params, recipe(residual=False, head_dim=8, seed=None))
    same(MODEL, params, heads)
    np.testing.assert_allclose(
        heads["layers"][0]["attn"]["o_proj"]["kernel"],
        jnp.moveaxis(rotate(jnp.moveaxis(
            params["layers"][0]["attn"]["o_proj"]["kernel"], 0, -1), 8), -1, 0),
        atol=1e-5,
    )  # fmt: skip
    together, _ = apply_transforms(stack_layers(params), recipe(head_dim=8, seed=3))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        stack_layers(new), together,
    )  # fmt: skip
    fused, _ = apply_transforms(fuse_projections(params), recipe(seed=3))
    same(MODEL, params, fused, dataclasses.replace(MODEL, fused=True))


def test_tied_embedding() -> None:
    model = LanguageModel(dataclasses.replace(CONFIG, tied=True, qk_norm=False))
    params = make_params(model)
    with pytest.raises(aj.RecipeError, match="untie"):
        apply_transforms(params, recipe())
    untied, apart = untie(model, params)
    assert untie(untied, apart) == (untied, apart)
    same(model, params, apart, untied)
    new, _ = apply_transforms(apart, recipe())
    same(model, params, new, untied)


def test_statistics_follow(params) -> None:
    how = recipe(head_dim=8)
    plain = aj.Recipe(rules=[RULE])
    kinds = ("hessian",)
    new, after = apply_transforms(stack_layers(params), how, stacked(measured()[1]))
    again = aj.calibrate(SCANNED, new, [TOKENS], plain, statistics=kinds)
    for path, found in again.items():
        want = found["hessian"]
        scale = float(jnp.max(jnp.abs(want)))
        np.testing.assert_allclose(
            after[path]["hessian"] / scale, want / scale, atol=1e-4, err_msg=path
        )
        assert ("amax" in after[path]) == path.endswith("down_proj/kernel")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"writers": ["(.*/)?o_proj/kernel"]}, "down_proj/kernel is as wide as the"),
        ({"writers": ["(.*/)?oproj/kernel"]}, "match no leaf; the closest paths are"),
        ({"embeddings": [".*gate_proj/bias"]}, "does not write into"),
        ({"head_dim": 7, "residual": False}, "no whole number of heads|give head_dim"),
    ],
)
def test_trees_that_do_not_fit(params, options, message) -> None:
    with pytest.raises(aj.RecipeError, match=message):
        apply_transforms(params, recipe(**options))


def test_options() -> None:
    for options, message in (
        ({"residual": False}, "nothing to rotate"), ({"seed": -1}, "seed=-1"),
        ({"head_dim": 1}, "head_dim=1"), ({"writers": "x"}, "writers must be a list"),
        ({"outside": ["("]}, "outside"),
    ):  # fmt: skip
        with pytest.raises(aj.RecipeError, match=message):
            recipe(**options)
    one = recipe(head_dim=8, pairs=[{"from": "a/scale", "to": ["b/kernel"]}])
    assert aj.Recipe.from_yaml(one.to_yaml()) == one
