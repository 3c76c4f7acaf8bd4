"""Training: losses, distillation, data, and a loop around any pure loss function.

`fit` is the loop; `angeljax train` puts a language model, a recipe and a teacher into
it. Nothing else in angeljax needs this package: the transform of `angeljax.qat` goes
into any loss of one's own.
"""

from angeljax._fields import ConfigError
from angeljax.train._feature_scales import feature_scales
from angeljax.train._sections import LoraConfig
from angeljax.train.block_config import BlockTrainConfig, MTPTrainConfig
from angeljax.train.block_task import BlockTask
from angeljax.train.checkpoints import Checkpoints
from angeljax.train.config import TrainConfig
from angeljax.train.data import PackedTokens, load_tokens
from angeljax.train.draft_losses import DraftLoss
from angeljax.train.eagle import EagleLoss, EagleTask
from angeljax.train.eagle_config import EagleTrainConfig
from angeljax.train.guards import Divergence, TrainingStopped
from angeljax.train.held_out import HeldOut
from angeljax.train.language_model import LMTask
from angeljax.train.loop import FitResult, fit
from angeljax.train.lora_task import LoraTask
from angeljax.train.mtp_task import MTPTask
from angeljax.train.optimizers import (
    OptimizerConfig,
    evaluation_params,
    make_optimizer,
    make_schedule,
)
from angeljax.train.sharding import make_mesh
from angeljax.train.step import TrainState, init_state, make_step

__all__ = [
    "BlockTask",
    "BlockTrainConfig",
    "Checkpoints",
    "ConfigError",
    "Divergence",
    "DraftLoss",
    "EagleLoss",
    "EagleTask",
    "EagleTrainConfig",
    "FitResult",
    "HeldOut",
    "LMTask",
    "LoraConfig",
    "LoraTask",
    "MTPTask",
    "MTPTrainConfig",
    "OptimizerConfig",
    "PackedTokens",
    "TrainConfig",
    "TrainState",
    "TrainingStopped",
    "evaluation_params",
    "feature_scales",
    "fit",
    "init_state",
    "load_tokens",
    "make_mesh",
    "make_optimizer",
    "make_schedule",
    "make_step",
]
