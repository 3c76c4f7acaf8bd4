"""Attention of few tokens on a cache whose rows stand at different places."""

from pallas_kernels.rows_attention.api import Held, rows_attention

__all__ = ["Held", "rows_attention"]
