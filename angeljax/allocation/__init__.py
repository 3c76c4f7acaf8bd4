"""Mixed precision: the format of each weight that loses least under a budget."""

from angeljax.allocation._latency import measure_latency
from angeljax.allocation._table import Allocation, AllocationError, Group, Option
from angeljax.allocation.allocate import allocate, calibrate_for

__all__ = [
    "Allocation",
    "AllocationError",
    "Group",
    "Option",
    "allocate",
    "calibrate_for",
    "measure_latency",
]
