"""Shapes in annotations are checked in the tests; plain types are not."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Float, TypeCheckError, jaxtyped

from angeljax.evaluation import windows
from tests.typechecker import check


@jaxtyped(typechecker=check)
def product(
    x: Float[Array, "m k"], y: Float[Array, "k n"] | None, times: int = 1
) -> Float[Array, "m n"]:
    return x if y is None else x @ y * times


@jaxtyped(typechecker=check)
@dataclasses.dataclass
class Plain:
    name: str


def test_shapes_are_checked():
    assert product(jnp.ones((2, 3)), jnp.ones((3, 4))).shape == (2, 4)
    with pytest.raises(TypeCheckError, match="'y'"):
        product(jnp.ones((2, 3)), jnp.ones((4, 4)))
    with pytest.raises(TypeCheckError, match="'x'"):
        product(jnp.ones(3), None)


def test_plain_types_are_left_to_mypy():
    assert product(jnp.ones((2, 3)), jnp.ones((3, 4)), 0.5)[0, 0] == 1.5
    assert Plain(3).name == 3


def test_the_library_is_checked():
    with pytest.raises(TypeCheckError, match="token_ids"):
        windows(np.ones((2, 3), np.float32), 2)
