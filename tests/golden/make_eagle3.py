"""Writes tests/golden/eagle3/head.npz: an EAGLE-3 head in PyTorch, step by step.

The layer as serving engines load it, by the names in their checkpoints: `fc`,
`midlayer.{input_layernorm,hidden_norm,post_attention_layernorm}`,
`midlayer.self_attn.{q,k,v,o}_proj`, `midlayer.mlp.{gate,up,down}_proj`, `norm`,
`lm_head`, `d2t`, `t2d`. Run with PyTorch installed: python tests/golden/make_eagle3.py
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import linear, silu

HIDDEN, HEADS, KV, DIM, WIDE = 16, 4, 2, 8, 24
VOCAB, DRAFT, LENGTH, STEPS = 40, 24, 7, 3
EPS, THETA = 1e-6, 5000.0


def rms(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def rotate(x, position):
    """One head `[DIM]` at one position, halves turned against each other."""
    out = torch.empty_like(x)
    for i in range(DIM // 2):
        angle = torch.tensor(position / THETA ** (2 * i / DIM), dtype=x.dtype)
        a, b = x[i], x[i + DIM // 2]
        out[i] = a * torch.cos(angle) - b * torch.sin(angle)
        out[i + DIM // 2] = b * torch.cos(angle) + a * torch.sin(angle)
    return out


class Head:
    """One token at a time, with a list for a cache."""

    def __init__(self, w):
        self.w, self.keys, self.values = w, [], []

    def read(self, embed, feature, position):
        w = self.w
        x = torch.cat(
            [
                rms(embed, w["midlayer.input_layernorm.weight"]),
                rms(feature, w["midlayer.hidden_norm.weight"]),
            ]
        )
        q, k, v = (
            linear(x, w[f"midlayer.self_attn.{n}_proj.weight"]).view(-1, DIM)
            for n in "qkv"
        )
        self.keys.append(torch.stack([rotate(head, position) for head in k]))
        self.values.append(v)
        outs = []
        for h in range(HEADS):
            at = h // (HEADS // KV)
            query = rotate(q[h], position)
            scores = torch.stack([query @ key[at] / DIM**0.5 for key in self.keys])
            weights = torch.softmax(scores, dim=0)
            outs.append(
                sum(a * b[at] for a, b in zip(weights, self.values, strict=True))
            )
        h = feature + linear(torch.cat(outs), w["midlayer.self_attn.o_proj.weight"])
        y = rms(h, w["midlayer.post_attention_layernorm.weight"])
        gate = silu(linear(y, w["midlayer.mlp.gate_proj.weight"]))
        up = linear(y, w["midlayer.mlp.up_proj.weight"])
        return h + linear(gate * up, w["midlayer.mlp.down_proj.weight"])

    def logits(self, hidden):
        return linear(rms(hidden, self.w["norm.weight"]), self.w["lm_head.weight"])


def main():
    torch.manual_seed(0)
    shapes = {
        "fc.weight": (HIDDEN, 3 * HIDDEN),
        "midlayer.hidden_norm.weight": (HIDDEN,),
        "midlayer.input_layernorm.weight": (HIDDEN,),
        "midlayer.post_attention_layernorm.weight": (HIDDEN,),
        "midlayer.self_attn.q_proj.weight": (HEADS * DIM, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": (KV * DIM, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": (KV * DIM, 2 * HIDDEN),
        "midlayer.self_attn.o_proj.weight": (HIDDEN, HEADS * DIM),
        "midlayer.mlp.gate_proj.weight": (WIDE, HIDDEN),
        "midlayer.mlp.up_proj.weight": (WIDE, HIDDEN),
        "midlayer.mlp.down_proj.weight": (HIDDEN, WIDE),
        "norm.weight": (HIDDEN,),
        "lm_head.weight": (DRAFT, HIDDEN),
    }
    w = {
        name: (1 + 0.2 * torch.randn(s) if len(s) == 1 else 0.3 * torch.randn(s))
        for name, s in shapes.items()
    }
    known = torch.sort(torch.randperm(VOCAB)[:DRAFT]).values
    w["d2t"] = known - torch.arange(DRAFT)
    w["t2d"] = torch.zeros(VOCAB, dtype=torch.bool)
    w["t2d"][known] = True
    table = torch.randn(VOCAB, HIDDEN)
    tokens = torch.randint(0, VOCAB, (LENGTH + 1,))
    features = torch.randn(LENGTH, 3 * HIDDEN)
    head, logits, hidden = Head(w), [], None
    for i in range(LENGTH):  # where the target has been
        hidden = head.read(table[tokens[i + 1]], linear(features[i], w["fc.weight"]), i)
        logits.append(head.logits(hidden))
    drafts = []
    for k in range(STEPS):  # and where it has not
        token = int(logits[-1].argmax())
        drafts.append(token + int(w["d2t"][token]))
        if k + 1 < STEPS:
            hidden = head.read(table[drafts[-1]], hidden, LENGTH + k)
            logits.append(head.logits(hidden))
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": DIM,
        "vocab_size": VOCAB,
        "draft_vocab_size": DRAFT,
        "max_position_embeddings": 64,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "rope_scaling": None,
        "attention_bias": False,
    }
    arrays = {f"w:{name}": x.numpy() for name, x in w.items()}
    arrays |= {"table": table.numpy(), "tokens": tokens.numpy()}
    arrays |= {"features": features.numpy(), "drafts": np.asarray(drafts)}
    arrays["logits"] = torch.stack(logits).numpy()
    arrays["config"] = np.asarray(json.dumps(config))
    np.savez_compressed(Path(__file__).parent / "eagle3" / "head.npz", **arrays)


if __name__ == "__main__":
    main()
