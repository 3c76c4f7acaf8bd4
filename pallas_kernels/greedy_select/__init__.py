"""Greedy choice of tokens: marginal relevance, DPP-MAP and facility location."""

from pallas_kernels.greedy_select.api import greedy_select

__all__ = ["greedy_select"]
