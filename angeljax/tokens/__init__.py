"""Fewer vision and audio tokens: selection and merging as pure functions."""

from angeljax.tokens._atome import atome
from angeljax.tokens._attention_weights import (
    AttentionWeights,
    attention_weights,
    pool_attention,
)
from angeljax.tokens._baselines import random, uniform
from angeljax.tokens._cdpruner import cdpruner
from angeljax.tokens._dart import dart
from angeljax.tokens._diagnostics import diagnostics
from angeljax.tokens._difftopk import soft_top_k
from angeljax.tokens._divprune import divprune
from angeljax.tokens._fastadasp import fastadasp
from angeljax.tokens._fastv import fastv
from angeljax.tokens._grouping import Groups, group_adjacent
from angeljax.tokens._hiprune import hiprune
from angeljax.tokens._idpruner import idpruner
from angeljax.tokens._keep import keep_count, keep_counts
from angeljax.tokens._placeholders import expand_placeholders, placeholder_count
from angeljax.tokens._prompt import Prompt
from angeljax.tokens._proxies import (
    cls_attention,
    distinctiveness,
    last_token_attention,
    norm_importance,
    received_attention,
    text_relevance,
)
from angeljax.tokens._prumerge import prumerge, prumerge_plus
from angeljax.tokens._pruner import TokenPruner
from angeljax.tokens._registry import methods, prune
from angeljax.tokens._samp import samp
from angeljax.tokens._scope import scope
from angeljax.tokens._scorer import (
    init_scorer,
    load_scorer,
    save_scorer,
    score_tokens,
)
from angeljax.tokens._scorer_training import ScorerTask, scorer_optimizer, soft_mask
from angeljax.tokens._selection import Selection
from angeljax.tokens._tome import tome
from angeljax.tokens._visionselector import visionselector
from angeljax.tokens._visionzip import visionzip
from angeljax.tokens._vispruner import vispruner
from angeljax.tokens._where import span_groups, token_positions
from angeljax.tokens.apply import Pruned, apply_selection

__all__ = [
    "AttentionWeights",
    "Groups",
    "Prompt",
    "Pruned",
    "ScorerTask",
    "Selection",
    "TokenPruner",
    "apply_selection",
    "atome",
    "attention_weights",
    "cdpruner",
    "cls_attention",
    "dart",
    "diagnostics",
    "distinctiveness",
    "divprune",
    "expand_placeholders",
    "fastadasp",
    "fastv",
    "group_adjacent",
    "hiprune",
    "idpruner",
    "init_scorer",
    "keep_count",
    "keep_counts",
    "last_token_attention",
    "load_scorer",
    "methods",
    "norm_importance",
    "placeholder_count",
    "pool_attention",
    "prumerge",
    "prumerge_plus",
    "prune",
    "random",
    "received_attention",
    "samp",
    "save_scorer",
    "scope",
    "score_tokens",
    "scorer_optimizer",
    "soft_mask",
    "soft_top_k",
    "span_groups",
    "text_relevance",
    "token_positions",
    "tome",
    "uniform",
    "visionselector",
    "visionzip",
    "vispruner",
]
