"""Lossless speculative decoding: drafters propose, the model decides."""

from angeljax.speculative._round import State, Stats
from angeljax.speculative._rows import (
    cache_slots,
    chain_mask,
    key_positions,
    tree_mask,
)
from angeljax.speculative.auto import (
    Candidate,
    Estimate,
    Plan,
    auto_generate,
    calibrate_choice,
    candidates_of,
    choose,
    draft_costs,
    survival,
    variants,
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
from angeljax.speculative.eagle import (
    EagleConfig,
    EagleDrafter,
    EagleTree,
    init_eagle,
    load_eagle,
    save_eagle,
)
from angeljax.speculative.from_options import (
    generate_as,
    make_drafter,
    sampling_of,
)
from angeljax.speculative.grow import Frontier, grow_tree
from angeljax.speculative.hybrid import Hybrid
from angeljax.speculative.lookup import PromptLookup, lookup
from angeljax.speculative.model_drafter import DraftModel, SelfDrafter
from angeljax.speculative.mtp import MTPDrafter, MTPModel
from angeljax.speculative.mtp_files import load_mtp, save_mtp
from angeljax.speculative.prepare import prepare_drafter
from angeljax.speculative.profile import (
    Profile,
    cache_folder,
    profile_drafter,
    profile_target,
)
from angeljax.speculative.recycling import TokenRecycling, rank_tree, successors
from angeljax.speculative.sampling import Sampler, Sampling
from angeljax.speculative.spec_exit import ExitRule, SpecExit, exit_signals
from angeljax.speculative.tree import DynamicTree, Tree, chain

__all__ = [
    "ExitRule",
    "SpecExit",
    "exit_signals",
    "BlockConfig",
    "BlockDrafter",
    "BlockModel",
    "Candidate",
    "Context",
    "Divergence",
    "Draft",
    "DraftModel",
    "Drafter",
    "DynamicTree",
    "EagleConfig",
    "EagleDrafter",
    "EagleTree",
    "Estimate",
    "Frontier",
    "Generated",
    "Hybrid",
    "MTPDrafter",
    "MTPModel",
    "NoDrafter",
    "Plan",
    "Profile",
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
    "auto_generate",
    "autoregressive",
    "cache_folder",
    "cache_slots",
    "calibrate_choice",
    "candidates_of",
    "chain",
    "chain_mask",
    "choose",
    "decode",
    "divergences",
    "draft_costs",
    "generate",
    "generate_as",
    "grow_tree",
    "init_eagle",
    "key_positions",
    "load_block",
    "load_eagle",
    "load_mtp",
    "lookup",
    "make_drafter",
    "prefill",
    "prepare_drafter",
    "profile_drafter",
    "profile_target",
    "rank_tree",
    "sampling_of",
    "save_block",
    "save_eagle",
    "save_mtp",
    "successors",
    "survival",
    "tree_mask",
    "variants",
]
