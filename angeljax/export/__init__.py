"""Compressed models on disk.

| module | what |
| --- | --- |
| `orbax` | sharded checkpoints that come back bit for bit |
"""

from angeljax.export._errors import CheckpointError
from angeljax.export.orbax import Manifest, load, load_manifest, save

__all__ = ["CheckpointError", "Manifest", "load", "load_manifest", "save"]
