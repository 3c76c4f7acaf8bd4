"""Checkpoints of a training, and what a resumed run must agree with."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from angeljax._fields import ConfigError
from angeljax._leaves import path_string


class Checkpoints:
    """Saves and restores the state of a training, without stopping it for long.

    A save is copied off the device, written by a thread and renamed when it is
    complete (Orbax's `CheckpointManager`): a process that is killed leaves the previous
    checkpoints as they were. The best one by the averaged loss is kept beside the
    latest, so that a loss that slowly runs away does not overwrite it.

    Args:
      directory: made if it is missing.
      every: steps between two saves; 0 saves at the end only.
      keep: how many of the latest stay.
      identity: JSON values that a resumed run must have as well: data, order, recipe,
        ... by the name that a message calls them.

    Raises:
      ConfigError: the directory cannot be made.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every: int = 0,
        keep: int = 2,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        import orbax.checkpoint as ocp
        from orbax.checkpoint import checkpoint_managers as managers

        self.directory = Path(os.path.abspath(directory))
        self.every = every
        self.identity = json.loads(json.dumps(dict(identity or {})))
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"{self.directory}: {e.strerror}") from None
        best = managers.BestN(
            # Sorted ascending, and the last ones stay: the lowest loss comes last.
            get_metric_fn=lambda metrics: -float(metrics["loss"]),
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = managers.AnyPreservationPolicy([managers.LatestN(keep), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, cleanup_tmp_directories=True
        )
        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_names=("state", "identity")
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether a save belongs after `step` steps."""
        return bool(self.every) and step % self.every == 0

    def save(self, step: int, tree: Any, *, loss: float | None = None) -> None:
        """Begins a save; returns when the arrays may be donated."""
        if step in self._manager.all_steps():
            return
        args = self._ocp.args.Composite(
            state=self._ocp.args.PyTreeSave(_flat(_detached(tree))),
            identity=self._ocp.args.JsonSave(self.identity),
        )
        metrics = None if loss is None else {"loss": float(loss)}
        self._manager.save(step, args=args, metrics=metrics)

    def restore(self, like: Any, step: int | None = None) -> Any:
        """The tree of a step (default the newest), where the leaves of `like` lie.

        Args:
          like: arrays, or `ShapeDtypeStruct`s with shardings.
          step: which checkpoint.

        Raises:
          ConfigError: the checkpoint belongs to another training, or is damaged; says
            in what they differ.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise ConfigError(f"{self.directory} holds no complete checkpoint")
        self.check_identity(step)
        want = _flat(like)
        restore_args = {
            name: self._ocp.ArrayRestoreArgs(
                sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
            )
            for name, x in want.items()
        }
        abstract = {
            n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for n, x in want.items()
        }
        args = self._ocp.args.Composite(
            state=self._ocp.args.PyTreeRestore(abstract, restore_args=restore_args)
        )
        try:
            found = self._manager.restore(step, args=args)["state"]
        except (ValueError, KeyError, OSError) as e:
            raise ConfigError(
                f"checkpoint {step} in {self.directory} cannot be restored: "
                f"{' '.join(str(e).split())[:200]}"
            ) from None
        treedef = jax.tree.structure(like)
        return jax.tree.unflatten(treedef, [found[name] for name in want])

    def check(self) -> None:
        """Refuses a directory with checkpoints of another training.

        Raises:
          ConfigError: names what differs.
        """
        step = self.latest()
        if step is not None:
            self.check_identity(step)

    def check_identity(self, step: int) -> None:
        """Refuses a checkpoint of another training.

        Raises:
          ConfigError: names what differs.
        """
        args = self._ocp.args.Composite(identity=self._ocp.args.JsonRestore())
        found = self._manager.restore(step, args=args)["identity"]
        for name in {**found, **self.identity}:
            old, new = found.get(name), self.identity.get(name)
            if old != new:
                raise ConfigError(
                    f"{self.directory} was written with another {name}"
                    f"{_difference(old, new)}: restore that, or choose another --out"
                )

    def wait(self) -> None:
        """Returns when what was begun is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the threads."""
        self._manager.close()


def _flat(tree: Any) -> dict[str, Any]:
    """Leaves by position and path: two paths may read the same, positions do not."""
    items = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        f"{i:05d}.{path_string(p).replace('/', '.')}": x
        for i, (p, x) in enumerate(items)
    }


def _detached(tree: Any) -> Any:
    """On a CPU the writer would look at memory that the next step is given."""
    if jax.default_backend() != "cpu":
        return tree
    return jax.tree.map(jnp.copy, tree)


def _difference(old: Any, new: Any) -> str:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            if old.get(key) != new.get(key):
                return f" ({key}: {_short(old.get(key))}, now {_short(new.get(key))})"
    return f" ({_short(old)}, now {_short(new)})"


def _short(value: Any) -> str:
    text = " ".join(json.dumps(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
