"""The largest logits of each row."""

from pallas_kernels.top_logits.api import TopLogits, top_logits

__all__ = ["TopLogits", "top_logits"]
