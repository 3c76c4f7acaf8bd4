"""Plain arrays by name: in and out of an Orbax checkpoint, and their digests.

Orbax is imported on use: it costs as long to import as JAX, and most programs that
import angeljax neither save nor load.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from angeljax.export._errors import CheckpointError, one_line

# Name -> dtype of what may be stored. A closed list: `numpy.dtype` of a string from a
# file would also take "object".
_NAMES = """bool int2 int4 int8 int16 int32 int64 uint2 uint4 uint8 uint16 uint32 uint64
float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3fn float8_e4m3fnuz float8_e4m3b11fnuz
float8_e5m2 float8_e5m2fnuz float8_e8m0fnu bfloat16 float16 float32 float64 complex64
complex128"""
DTYPES = {n: jnp.dtype(getattr(jnp, n)) for n in _NAMES.split()}

# Orbax holds at most this much in host memory while it writes or reads, in GB.
_HOST_GB = 4


def write(directory: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays as one Orbax checkpoint; each process writes its own shards.

    Without compression: packed codes hardly shrink, and it halves the speed. Orbax
    refuses arrays without elements; the caller keeps those out.
    """
    import orbax.checkpoint as ocp

    limit = _host_gb(arrays)
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=False,
        save_concurrent_gb=limit,
        save_device_host_concurrent_gb=limit,
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(dict(arrays)))


def read(
    directory: Path, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads arrays straight onto the shardings of `targets`.

    Raises:
      CheckpointError: arrays are missing, damaged, or not what `targets` says.
    """
    import orbax.checkpoint as ocp

    if not (directory / "_METADATA").is_file():
        raise CheckpointError(f"{directory}: the stored arrays are missing: save again")
    handler = ocp.StandardCheckpointHandler(restore_concurrent_gb=_host_gb(targets))
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            _check_stored(directory, checkpointer.metadata(directory), targets)
            args = ocp.args.StandardRestore(dict(targets))
            return checkpointer.restore(directory, args=args)
        except (CheckpointError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as e:  # Broken bytes surface as whatever the reader trips on.
            raise CheckpointError(
                f"{directory}: damaged, save again or copy it again ({one_line(e)})"
            ) from e


def _check_stored(
    directory: Path, metadata: Any, targets: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    """Compares names, shapes and dtypes: Orbax would cast or reshape in silence."""
    stored = dict(metadata.item_metadata.items())
    if set(stored) != set(targets):
        odd = sorted(set(stored) ^ set(targets))
        raise CheckpointError(
            f"{directory}: arrays and manifest disagree on {', '.join(odd[:3])}: "
            "save again"
        )
    for name, want in targets.items():
        shape, dtype = tuple(stored[name].shape), jnp.dtype(stored[name].dtype)
        if (shape, dtype) != (want.shape, want.dtype):
            raise CheckpointError(
                f"{directory}: {name!r} is {dtype.name}{list(shape)}, the manifest "
                f"says {want.dtype.name}{list(want.shape)}: save again"
            )


def list_files(directory: Path) -> dict[str, int]:
    """Relative path -> size of every file of an Orbax checkpoint."""
    return {
        file.relative_to(directory).as_posix(): file.stat().st_size
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }


def check_files(directory: Path, want: Mapping[str, int]) -> None:
    """Compares sizes, which names the file that a copy has lost or cut.

    Raises:
      CheckpointError: a file is missing or has another size.
    """
    got = list_files(directory)
    for name, size in want.items():
        if got.get(name) != size:
            found = f"has {got[name]}" if name in got else "is missing"
            raise CheckpointError(
                f"{directory / name}: damaged, {found} instead of {size} bytes: copy "
                "the checkpoint again"
            )


def digest(x: Any) -> str:
    """SHA-256 of the bytes of an array in C order, whatever its sharding.

    Host memory holds one array at a time. An array that other processes hold parts of
    is gathered, so every process must call this for the same arrays in the same order.
    """
    if isinstance(x, jax.Array):
        if not x.is_fully_addressable:
            x = multihost_utils.process_allgather(x, tiled=True)
        elif not _is_in_host_memory(x):
            # JAX keeps the host copy of an array as long as the array lives. Of a
            # second array it goes when this function returns.
            x = jax.device_put(x, x.sharding, may_alias=False)
    host = np.ascontiguousarray(np.asarray(x))
    return hashlib.sha256(host.reshape(-1).view(np.uint8)).hexdigest()


def check_dtype(name: str, dtype: Any) -> None:
    """Refuses dtypes that would not come back.

    Raises:
      CheckpointError: not a plain number type, or 64 bits without `jax_enable_x64`.
    """
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        raise CheckpointError(f"{name!r} is a random key: save jax.random.key_data")
    if DTYPES.get(jnp.dtype(dtype).name) != dtype:
        raise CheckpointError(f"{name!r} has dtype {dtype}, which cannot be stored")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise CheckpointError(
            f"{name!r} is {dtype}, which JAX holds only with jax_enable_x64: enable "
            "it, or cast to 32 bits before saving"
        )


def _is_in_host_memory(x: jax.Array) -> bool:
    """Whether numpy can look at the array without a copy."""
    platforms = [device.platform for device in x.devices()]
    return platforms == ["cpu"]


def _host_gb(arrays: Mapping[str, Any]) -> int:
    """Orbax's limit, raised where one array alone is larger."""
    sizes = [math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in arrays.values()]
    return max(_HOST_GB, math.ceil(max(sizes, default=0) / 1e9) + 1)
