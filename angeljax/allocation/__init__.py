"""Mixed precision: the format of each weight that loses least under a budget."""

from angeljax.allocation._latency import measure_latency
from angeljax.allocation._table import Allocation, AllocationError, Group, Option
from angeljax.allocation.allocate import allocate, needs

__all__ = [
    "Allocation",
    "AllocationError",
    "Group",
    "Option",
    "allocate",
    "measure_latency",
    "needs",
]
