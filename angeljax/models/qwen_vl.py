"""Qwen2.5-VL and Qwen3-VL: images and videos among the tokens of a language model.

The steps of a prompt are functions of their own, so that tokens can be pruned between
them: `vision` gives the embeddings of images, `merge` puts them among those of text,
`angeljax.tokens` takes some out, and `generate` reads what is left and goes on at the
position at which the whole prompt would have ended.

`image_patches` and `video_patches` need neither Pillow nor PyTorch. Of `transformers`
the image processor (`Qwen2VLImageProcessorPil`, Pillow) gives the same; its video
processors, and the processors that join them with a tokenizer, need PyTorch and
torchvision. Without them, tokenize the text of the chat with one placeholder for each
image, and let `angeljax.tokens.expand_placeholders` make them as many as
`QwenVL.num_tokens` says.

Grids of images are static: each combination of them compiles once. To bound how many
there are, resize images to few sizes (`image_patches` takes one), and pad prompts on
the left to few lengths, with a `mask`.
"""

from __future__ import annotations

from angeljax.models._qwen_vl_config import QwenVisionConfig, QwenVLConfig
from angeljax.models._qwen_vl_loading import LoadedQwenVL, load_qwen_vl
from angeljax.models._qwen_vl_model import QwenVL
from angeljax.models._qwen_vl_pixels import image_patches, smart_resize, video_patches
from angeljax.models._qwen_vl_positions import rope_index
from angeljax.models._qwen_vl_tower import QwenVision, VisionTokens

__all__ = [
    "LoadedQwenVL",
    "QwenVL",
    "QwenVLConfig",
    "QwenVision",
    "QwenVisionConfig",
    "VisionTokens",
    "image_patches",
    "load_qwen_vl",
    "rope_index",
    "smart_resize",
    "video_patches",
]
