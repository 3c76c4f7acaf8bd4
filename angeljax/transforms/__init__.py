"""Transforms: changes of weights that leave the function of the model as it is."""

from angeljax.transforms._base import Transform

__all__ = ["Transform"]
