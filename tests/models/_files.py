"""Model files for the tests, written from the golden weights."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted({f.stem for f in GOLDEN.glob("*.npz")} - {"rope", "smollm2"})


def golden(name):
    """(configuration, weights by Hugging Face name, the other arrays)."""
    with np.load(GOLDEN / f"{name}.npz") as data:
        arrays = {k: data[k] for k in data.files}
    weights = {k[2:]: v for k, v in arrays.items() if k.startswith("w:")}
    return json.loads(str(arrays["config"])), weights, arrays


def write_folder(folder, name, *, dtype=np.float32, shards=1, drop=(), extra=None):
    """A Hugging Face folder of one family; returns it."""
    config, weights, _ = golden(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {k: v.astype(dtype) for k, v in weights.items() if k not in drop}
    tensors |= extra or {}
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    index = {}
    for i in range(shards):
        part = {k: tensors[k] for k in names[i::shards]}
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    text = json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


BF16 = ml_dtypes.bfloat16
