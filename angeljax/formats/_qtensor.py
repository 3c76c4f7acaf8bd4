"""`QTensor`: a quantized array that stands where a weight stood."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from angeljax.formats import _blocks, _registry
from angeljax.formats._spec import Spec

# What may select from batch axes without a look at the packed axes.
_STATIC_INDEX = int | np.integer | slice


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
    """Packed codes and scales of one array, with the look of that array.

    A pytree whose children are the stored planes (`codes`, `scale`, and what else the
    format needs) and whose static part is a `Spec`. It jits, vmaps and scans over
    leading batch axes (axis 0 only), shards, and checkpoints like any tree of arrays.
    Wherever `jax.numpy` or a Flax layer takes an array, a QTensor is dequantized on the
    way in; `angeljax.ops` and `angeljax.bind` use the packed form instead.

    Attributes:
      planes: name -> array. Storage dtypes are uint8, int8, float8 for codes and
        bfloat16 / float16 / float32 / float8 for scales. Each plane has the rank of the
        array, contraction axes merged into one.
      spec: format, logical core shape and dtype, contraction axes, group size.

    Example:
      >>> import jax.numpy as jnp, angeljax as aj
      >>> q = aj.quantize(jnp.ones((256, 8)), format="int4", group_size=128)
      >>> q.shape, q.bits_per_weight, (jnp.ones((2, 256)) @ q).shape
      ((256, 8), 4.125, (2, 8))
    """

    planes: dict[str, Any]
    spec: Spec = dataclasses.field(metadata={"static": True})
    # Whether `planes` are those of the format; a weight in training holds itself.
    packed: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, batch axes included."""
        lead = self.planes["codes"].shape
        return (*lead[: len(lead) - self._code_rank], *self.spec.shape)

    @property
    def _code_rank(self) -> int:
        """Axes of the plane `codes` without batch axes."""
        return self.spec.rank

    @property
    def dtype(self) -> jnp.dtype:
        """Logical dtype: that of `dequantize()`."""
        return jnp.dtype(self.spec.dtype)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of logical elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(p.size * jnp.dtype(p.dtype).itemsize for p in self.planes.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per logical element, scales and padding included."""
        return 8 * self.nbytes / self.size

    @property
    def sharding(self) -> Any:
        """Sharding of the code plane, whose axes are those of the array, merged."""
        return self.planes["codes"].sharding

    def dequantize(self, dtype: Any = None) -> jax.Array:
        """The array, `shape`, in `dtype` (default: the logical dtype)."""
        dtype = self.dtype if dtype is None else jnp.dtype(dtype)
        return _dequantize(self.planes, self.spec, dtype)

    def astype(self, dtype: Any) -> jax.Array:
        """Dequantizes into `dtype`."""
        return self.dequantize(dtype)

    def reshape(self, *shape: Any, order: str = "C") -> jax.Array:
        """Dequantizes and reshapes."""
        return self.dequantize().reshape(*shape, order=order)

    def transpose(self, *axes: Any) -> jax.Array:
        """Dequantizes and transposes."""
        return self.dequantize().transpose(*axes)

    @property
    def T(self) -> jax.Array:
        """Dequantizes and reverses the axes."""
        return self.dequantize().T

    def __getitem__(self, index: Any) -> Any:
        """`q[...]` is `q`; an integer or slice into batch axes stays packed."""
        if index is Ellipsis:
            return self
        n_batch = self.ndim - len(self.spec.shape)
        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) <= n_batch and all(isinstance(i, _STATIC_INDEX) for i in parts):
            planes = {name: p[index] for name, p in self.planes.items()}
            return dataclasses.replace(self, planes=planes)
        return self.dequantize()[index]

    def __jax_array__(self) -> jax.Array:
        return self.dequantize()

    # Flax's protocol of boxed parameters. A linen layer unboxes what it reads and then
    # compares its shape with that of the initializer, which packed planes would fail;
    # as a box, a QTensor turns into its array at that very place.

    def unbox(self) -> jax.Array:
        """Dequantizes: what a linen layer gets when it reads the parameter."""
        return self.dequantize()

    def replace_boxed(self, value: Any) -> Any:
        """A new value has no use for the packed form."""
        return value

    def add_axis(self, index: int, params: dict[Any, Any]) -> QTensor:
        """Stacking adds a batch axis, which the spec does not hold."""
        del index, params
        return self

    def remove_axis(self, index: int, params: dict[Any, Any]) -> QTensor:
        """As `add_axis`."""
        del index, params
        return self

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        # Without this Python would index until an IndexError, which JAX never raises.
        return iter(self.dequantize())

    # numpy leaves its operators to ours instead of taking this for a sequence.
    __array_ufunc__ = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        del copy
        return np.asarray(self.dequantize(), dtype)

    def __repr__(self) -> str:
        name = type(self).__name__
        try:
            shape = ",".join(map(str, self.shape))
            bits = f"{self.bits_per_weight:.3f}"
        except (AttributeError, KeyError, TypeError):  # a tree_map put other leaves in
            return f"{name}({self.spec.label()}, planes={self.planes})"
        return f"{name}({self.spec.label()} [{shape}] {self.dtype}, {bits} bit/weight)"


# Compiled as one function also outside of `jit`, so that no step of the decoding is
# ever a whole array in float32.
@functools.partial(jax.jit, static_argnames=("spec", "dtype"))
def _dequantize(planes: dict[str, jax.Array], spec: Spec, dtype: Any) -> jax.Array:
    fmt = _registry.get_format(spec.format)
    blocks = fmt.decode(_blocks.unstore(planes, spec, fmt.tail_unit(spec)), spec)
    return _blocks.from_blocks(blocks, spec).astype(dtype)


def _operator(name: str) -> Callable[..., jax.Array]:
    def method(self: QTensor, *args: Any) -> jax.Array:
        return getattr(self.dequantize(), name)(
            *(a.dequantize() if isinstance(a, QTensor) else a for a in args)
        )

    method.__name__ = name
    return method


for _name in ("add", "sub", "mul", "truediv", "matmul"):
    for _prefix in ("", "r"):
        setattr(QTensor, f"__{_prefix}{_name}__", _operator(f"__{_prefix}{_name}__"))
setattr(QTensor, "__neg__", _operator("__neg__"))  # noqa: B010


def _refuse(q: QTensor) -> Any:
    raise ValueError(
        f"{q!r} was passed to a jax.lax primitive, which takes plain arrays only: use "
        "angeljax.ops.dot / dot_general / einsum, jax.numpy, or q.dequantize()"
    )


def register_type(cls: type[QTensor]) -> type[QTensor]:
    """Makes a class known to Flax as a box, and to `jax.lax` as what it cannot take."""
    meta.AxisMetadata.register(cls)
    # `jax.numpy` converts a QTensor; a bare `lax` primitive does not, and what it says
    # then names neither the array nor the way out. Without this hook that stands.
    try:
        from jax._src.dtypes import register_canonicalize_value_handler
    except ImportError:
        return cls
    register_canonicalize_value_handler(cls, _refuse)
    return cls


register_type(QTensor)
