"""What a manifest says about one leaf, and whether it can be true."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from angeljax.export import _arrays
from angeljax.export._errors import CheckpointError, one_line
from angeljax.formats import QTensor, Spec, get_format


@dataclasses.dataclass(frozen=True)
class Stored:
    """One stored array: shape, dtype and SHA-256 of its bytes."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype as JAX takes them."""
        return jax.ShapeDtypeStruct(self.shape, _arrays.DTYPES[self.dtype])

    @classmethod
    def of(cls, name: str, x: Any) -> Stored:
        """Describes an array; the digest reads all of it."""
        _arrays.check_dtype(name, x.dtype)
        return cls(tuple(x.shape), jnp.dtype(x.dtype).name, _arrays.digest(x))

    @classmethod
    def from_dict(cls, name: str, data: Any) -> Stored:
        """Reads one from JSON values."""
        shape, dtype, sha256 = (data[k] for k in ("shape", "dtype", "sha256"))
        if type(shape) is not list or any(type(n) is not int or n < 0 for n in shape):
            raise CheckpointError(f"{name!r}: shape {shape!r}")
        if dtype not in _arrays.DTYPES:
            raise CheckpointError(f"{name!r}: unknown dtype {dtype!r}")
        _arrays.check_dtype(name, _arrays.DTYPES[dtype])
        if type(sha256) is not str:
            raise CheckpointError(f"{name!r}: sha256 {sha256!r}")
        return cls(tuple(shape), dtype, sha256)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One leaf: an array (one plane without a name, no spec) or a `QTensor`."""

    path: str
    planes: Mapping[str, Stored]
    spec: Spec | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape."""
        return logical(self).shape

    @property
    def n_batch(self) -> int:
        """Leading batch axes of a quantized leaf."""
        return len(self.shape) - len(self.spec.shape) if self.spec else 0

    def stored(self) -> Iterator[tuple[str, str, Stored]]:
        """Yields (plane, name in the Orbax checkpoint, array) for each plane."""
        for plane, stored in self.planes.items():
            yield plane, storage_name(self.path, plane), stored

    def build(self, arrays: Mapping[str, Any]) -> Any:
        """The leaf from stored arrays by storage name."""
        planes = {plane: arrays[name] for plane, name, _ in self.stored()}
        return planes[""] if self.spec is None else QTensor(planes, self.spec)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        planes = {n: dataclasses.asdict(p) for n, p in self.planes.items()}
        if self.spec is None:
            return {"kind": "array", **planes[""]}
        return {
            "kind": "qtensor",
            "shape": self.shape,
            "dtype": self.spec.dtype,
            "spec": self.spec.to_dict(),
            "planes": planes,
        }

    @classmethod
    def from_dict(cls, path: str, data: Any) -> Entry:
        """Reads and checks one from JSON values.

        Raises:
          CheckpointError: malformed, an unknown format, or planes that contradict it.
        """
        try:
            if data["kind"] == "array":
                return cls(path, {"": Stored.from_dict(path, data)})
            if data["kind"] != "qtensor":
                raise CheckpointError(f"{path!r}: unknown kind {data['kind']!r}")
            planes = {
                name: Stored.from_dict(storage_name(path, name), plane)
                for name, plane in data["planes"].items()
            }
            entry = cls(path, planes, _spec(path, data["spec"]))
            check(entry)
            if [*entry.shape] != data["shape"]:
                raise CheckpointError(
                    f"{path!r}: planes of shape {list(entry.shape)} for a weight of "
                    f"shape {data['shape']}"
                )
            return entry
        except (KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{path!r}: malformed entry ({one_line(e)})") from e


def storage_name(path: str, plane: str) -> str:
    """Name of a plane in the Orbax checkpoint: `layers/0/kernel/codes`."""
    return f"{path}/{plane}" if plane else path


def planes_of(leaf: Any) -> dict[str, Any]:
    """The arrays of a leaf by plane; an array is its own, nameless plane."""
    return dict(leaf.planes) if isinstance(leaf, QTensor) else {"": leaf}


def check(entry: Entry) -> None:
    """Refuses a quantized leaf whose planes do not decode to its shape.

    Raises:
      CheckpointError: the spec does not survive JSON, or the planes contradict it.
    """
    if entry.spec is None:
        return
    if any(not name or "/" in name for name in entry.planes):
        raise CheckpointError(f"{entry.path!r}: planes {sorted(entry.planes)}")
    if "codes" not in entry.planes:
        raise CheckpointError(f"{entry.path!r} has no plane 'codes'")
    got = logical(entry).shape
    if got[len(got) - len(entry.spec.shape) :] != entry.spec.shape:
        raise CheckpointError(
            f"{entry.path!r}: planes decode to {list(got)}, the spec says "
            f"{list(entry.spec.shape)}"
        )


def logical(entry: Entry) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the array that a leaf stands for.

    Raises:
      CheckpointError: the planes do not decode.
    """
    if entry.spec is None:
        return entry.planes[""].abstract
    shapes = tuple((n, p.shape, p.dtype) for n, p in sorted(entry.planes.items()))
    try:
        return _decoded(entry.spec, shapes)
    except Exception as e:  # Whatever the format's own code trips on.
        stored = ", ".join(f"{n} {d}{list(s)}" for n, s, d in shapes)
        raise CheckpointError(
            f"{entry.path!r}: {entry.spec.label()} does not decode from {stored} "
            f"({one_line(e, 80)})"
        ) from e


# The layers of a model repeat a few combinations.
@functools.lru_cache(maxsize=1024)
def _decoded(
    spec: Spec, shapes: tuple[tuple[str, tuple[int, ...], str], ...]
) -> jax.ShapeDtypeStruct:
    planes = {
        name: jax.ShapeDtypeStruct(shape, _arrays.DTYPES[dtype])
        for name, shape, dtype in shapes
    }
    return jax.eval_shape(QTensor.dequantize, QTensor(planes=planes, spec=spec))


def _spec(path: str, data: Any) -> Spec:
    try:
        spec = Spec.from_dict(data)
        hash(spec)
        get_format(spec.format)
        jnp.dtype(spec.dtype)
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise CheckpointError(f"{path!r}: {one_line(e)}") from e
    return spec
