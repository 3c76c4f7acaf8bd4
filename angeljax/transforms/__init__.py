"""Transforms: changes of weights that leave the function of the model as it is."""

from angeljax.transforms._base import Transform, apply_transforms
from angeljax.transforms._graph import Pair
from angeljax.transforms.awq import AWQ
from angeljax.transforms.rotation import Rotation
from angeljax.transforms.smoothquant import SmoothQuant

__all__ = ["AWQ", "Pair", "Rotation", "SmoothQuant", "Transform", "apply_transforms"]
