"""The same codes on every device."""

import jax
import numpy as np
import pytest

import angeljax as aj
from angeljax.formats import format_names
from tests.formats._cases import normal


@pytest.mark.parametrize("name", ["float8_e4m3", "nvfp4", "int4", "nf4"])
def test_one_computation_rounds_like_two(name):
    # Quantizing and dequantizing in one jit must not keep what the format cannot hold.
    w = normal((256, 64))
    once = jax.jit(lambda w: aj.quantize(w, format=name).dequantize())(w)
    twice = aj.quantize(w, format=name).dequantize()
    np.testing.assert_array_equal(once, twice)


@pytest.mark.gpu
@pytest.mark.parametrize("name", format_names())
def test_gpu_and_cpu_agree(name):
    w = np.asarray(normal((512, 256)))
    planes = []
    for device in (jax.devices("cpu")[0], jax.devices("cuda")[0]):
        q = aj.quantize(jax.device_put(w, device), format=name)
        planes.append({k: np.asarray(v) for k, v in q.planes.items()})
        one = jax.jit(lambda w: aj.quantize(w, format=name).dequantize())
        np.testing.assert_array_equal(one(jax.device_put(w, device)), q.dequantize())
    for key, cpu in planes[0].items():
        gpu = planes[1][key]
        assert cpu.dtype == gpu.dtype
        # A float32 mean may be summed in another order and end one step away.
        differ = np.mean(cpu.view(np.uint8) != gpu.view(np.uint8))
        assert differ <= (0.01 if name in ("t2", "t1_6", "sherry") else 0), key
