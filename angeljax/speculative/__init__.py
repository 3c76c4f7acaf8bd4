"""Lossless speculative decoding: drafters propose, the model decides."""

from angeljax.speculative._round import State, Stats
from angeljax.speculative._rows import (
    cache_slots,
    chain_mask,
    key_positions,
    tree_mask,
)
from angeljax.speculative.block import BlockDrafter
from angeljax.speculative.block_files import load_block, save_block
from angeljax.speculative.block_model import BlockConfig, BlockModel
from angeljax.speculative.compare import Divergence, divergences
from angeljax.speculative.core import (
    Generated,
    autoregressive,
    decode,
    generate,
    prefill,
)
from angeljax.speculative.drafter import (
    Context,
    Draft,
    Drafter,
    NoDrafter,
    Prompt,
    Target,
    TargetModel,
    Verified,
)
from angeljax.speculative.grow import Frontier, grow_tree
from angeljax.speculative.lookup import PromptLookup, lookup
from angeljax.speculative.model_drafter import DraftModel, SelfDrafter
from angeljax.speculative.mtp import MTPDrafter, MTPModel
from angeljax.speculative.recycling import (
    Hybrid,
    TokenRecycling,
    rank_tree,
    successors,
)
from angeljax.speculative.sampling import Sampler, Sampling
from angeljax.speculative.tree import DynamicTree, Tree, chain

__all__ = [
    "BlockConfig",
    "BlockDrafter",
    "BlockModel",
    "Context",
    "Divergence",
    "Draft",
    "DraftModel",
    "Drafter",
    "DynamicTree",
    "Frontier",
    "Generated",
    "Hybrid",
    "MTPDrafter",
    "MTPModel",
    "NoDrafter",
    "Prompt",
    "PromptLookup",
    "Sampler",
    "Sampling",
    "SelfDrafter",
    "State",
    "Stats",
    "Target",
    "TargetModel",
    "TokenRecycling",
    "Tree",
    "Verified",
    "autoregressive",
    "cache_slots",
    "chain",
    "chain_mask",
    "decode",
    "divergences",
    "generate",
    "grow_tree",
    "key_positions",
    "load_block",
    "lookup",
    "prefill",
    "rank_tree",
    "save_block",
    "successors",
    "tree_mask",
]
