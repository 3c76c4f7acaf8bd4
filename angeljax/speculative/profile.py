"""What a round costs on this machine: v(W) of the target, and drafts on top of it.

Whether speculation pays is arithmetic once two things are known: how much longer a
forward of W tokens takes than one of a single token, and what a draft costs. Both
depend on the machine, so they are measured, by the loop that decodes: rounds of
`decode` with a drafter that proposes nothing, in turn for all widths, so that a machine
that becomes slower becomes so for all of them. The time of a call of few rounds is
taken off, so that starting the program from Python does not count.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax.speculative import _check
from angeljax.speculative._round import State, Stats, depth_of, reach_of
from angeljax.speculative.core import GREEDY, decode_at_once, prefill
from angeljax.speculative.drafter import Drafter, NoDrafter, Target, TargetModel

WIDTHS = (1, 2, 4, 8, 16, 32)
# Seconds that one measurement takes, about.
_LONG = 0.2


@dataclasses.dataclass(frozen=True)
class Profile:
    """Seconds of a round without drafts, by how many tokens the target reads.

    Attributes:
      widths: ascending, the first 1.
      seconds: of a round of each width, all of it included: the forward, the head, the
        choice, and what is committed.
      batch: rows.
      slots: of the cache.
      device: kind of device.

    Raises:
      ValueError: widths that do not ascend from 1, or times that are none.

    Example:
      >>> from angeljax.speculative import Profile
      >>> profile = Profile((1, 4), (0.010, 0.013))
      >>> round(profile.cost(4), 6), round(profile.cost(2), 6)
      (1.3, 1.1)
    """

    widths: tuple[int, ...]
    seconds: tuple[float, ...]
    batch: int = 1
    slots: int = 0
    device: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "seconds", tuple(map(float, self.seconds)))
        if self.widths != tuple(sorted({1, *self.widths})):
            raise ValueError(f"widths must ascend from 1, not {self.widths}")
        if len(self.widths) != len(self.seconds) or not min(self.seconds) > 0:
            raise ValueError(
                f"{len(self.widths)} widths need as many times above 0, not "
                f"{self.seconds}"
            )

    def cost(self, width: int) -> float:
        """v(W): time of a round of `width` tokens over that of one token.

        Between two measured widths it is on the line between them, beyond the last in
        proportion to the width.
        """
        last = self.widths[-1]
        seconds = float(np.interp(width, self.widths, self.seconds))
        return seconds / self.seconds[0] * max(1.0, width / last)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `Profile(**...)` restores it."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def profile_target(
    model: TargetModel,
    params: Any,
    widths: Sequence[int] = WIDTHS,
    *,
    batch: int = 1,
    slots: int = 256,
    repeats: int = 5,
    cache: bool = True,
) -> Profile:
    """Times rounds of several widths; a minute or less, once for each machine.

    Args:
      model, params: the target, as they will decode (`prepare_decoder` first).
      widths: tokens read at once; 1 is added.
      batch: rows.
      slots: of the cache; rounded up.
      repeats: of each measurement; the median counts.
      cache: keep the times in the user's cache folder (`cache_folder`), and take them
        from there if device, model, formats of the params, batch, slots and versions
        are the same.

    Returns:
      A `Profile`.

    Raises:
      ValueError: a width, a batch or slots that cannot be.

    Example:
      >>> import jax
      >>> from angeljax.models import DecoderConfig, LanguageModel
      >>> from angeljax.speculative import profile_target
      >>> config = DecoderConfig(
      ...     model_type="llama", vocab_size=32, hidden_size=16, num_layers=1,
      ...     intermediate_size=32, num_heads=2, num_kv_heads=1, head_dim=8,
      ... )
      >>> model = LanguageModel(config)
      >>> params = model.init(jax.random.key(0))
      >>> found = profile_target(model, params, (1, 4), slots=64, cache=False)
      >>> found.widths, found.cost(1)
      ((1, 4), 1.0)
    """
    sizes = tuple(sorted({1, *widths}))
    if sizes[0] < 1 or batch < 1 or repeats < 1:
        raise ValueError(
            f"widths, batch and repeats are at least 1, not {tuple(widths)}, {batch} "
            f"and {repeats}"
        )
    slots = _check.bucket(max(slots, 2 * sizes[-1]))
    key = {"widths": list(sizes), "repeats": repeats}
    key |= _key(model, params, batch, slots)

    def measure() -> list[float]:
        drafters = [NoDrafter(width) for width in sizes]
        return _seconds(model, params, drafters, batch, slots, repeats)

    seconds = _kept(key, measure) if cache else measure()
    kind = jax.devices()[0].device_kind
    return Profile(sizes, tuple(seconds), batch, slots, kind)


def profile_drafter(
    model: TargetModel,
    params: Any,
    drafter: Drafter,
    *,
    batch: int = 1,
    slots: int = 256,
    repeats: int = 5,
    cache: bool = True,
) -> float:
    """Seconds of a round in which this drafter proposes, the target's part included.

    Args:
      model, params, batch, slots, repeats, cache: as in `profile_target`.
      drafter: of any kind.

    Returns:
      Seconds.

    Raises:
      ValueError: the drafter does not go with the model.
    """
    drafter.check(model, GREEDY)
    slots = _check.bucket(max(slots, 2 * reach_of(drafter)))
    key = {"drafter": _signature(drafter), "repeats": repeats}
    key |= _key(model, params, batch, slots)

    def measure() -> list[float]:
        return _seconds(model, params, [drafter], batch, slots, repeats)

    return (_kept(key, measure) if cache else measure())[0]


def cache_folder() -> Path:
    """Where measured times are kept.

    Returns:
      `angeljax/speculative` in `$XDG_CACHE_HOME`, or else in `~/.cache`.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    base = Path(root) if root else Path.home() / ".cache"
    return base / "angeljax" / "speculative"


def _seconds(
    model: TargetModel,
    params: Any,
    drafters: Sequence[Drafter],
    batch: int,
    slots: int,
    repeats: int,
) -> list[float]:
    """Seconds of a round of each drafter, measured in turn."""
    target = Target(model, params, GREEDY.sampler(batch))
    stops = jnp.zeros(0, jnp.int32)
    states = [_start(target, drafter, batch, slots) for drafter in drafters]

    def once(drafter: Drafter, state: State, rounds: int) -> tuple[float, int]:
        # The loop takes its state over: each call gets a copy.
        state = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        count = jnp.int32(rounds)
        start = time.perf_counter()
        state = decode_at_once(target, drafter, state, stops, count, always_wide=True)
        jax.block_until_ready(state)
        return time.perf_counter() - start, int(jnp.max(state.stats.rounds))

    def enough(drafter: Drafter, state: State) -> int:
        once(drafter, state, 1)  # compiles
        seconds, done = once(drafter, state, 2)
        return max(4, min(slots, int(_LONG * done / seconds)))

    def round_of(drafter: Drafter, state: State, rounds: int) -> float:
        long, most = once(drafter, state, rounds)
        short, few = once(drafter, state, max(most // 8, 1))
        if most > few and long > short:
            return (long - short) / (most - few)
        return long / most

    pairs = list(zip(drafters, states, strict=True))
    counts = [enough(*pair) for pair in pairs]
    times = [
        [round_of(*pair, n) for pair, n in zip(pairs, counts, strict=True)]
        for _ in range(repeats)
    ]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def _start(target: Target, drafter: Drafter, batch: int, slots: int) -> State:
    """A state from which some dozens of rounds are possible."""
    reach = reach_of(drafter)
    count = min(16, slots // 4)
    limits = jnp.full(batch, min(count + 96, slots - reach), jnp.int32)
    lengths = jnp.full(batch, count, jnp.int32)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, target.model.config.vocab_size, (batch, count))
    tokens = jnp.asarray(tokens, jnp.int32)
    if not isinstance(drafter, NoDrafter):
        return prefill(target, drafter, tokens, lengths, limits, slots=slots)
    # What is in the cache does not matter, so nothing is read.
    none = jnp.zeros(batch, jnp.int32)
    return State(
        tokens=jnp.pad(tokens, [(0, 0), (0, slots + 1 - count)]),
        lengths=lengths,
        cache=target.model.init_rows(batch, slots),
        active=lengths < limits,
        limits=limits,
        drafter=(),
        stats=Stats(none, none, none, jnp.zeros(depth_of(drafter), jnp.int32)),
    )


def _key(model: Any, params: Any, batch: int, slots: int) -> dict[str, Any]:
    """What times depend on, as plain values."""
    from angeljax import __version__

    device = jax.devices()[0]
    return {
        "device": f"{device.platform} {device.device_kind} x{jax.device_count()}",
        "versions": f"angeljax {__version__}, jax {jax.__version__}",
        "flags": os.environ.get("XLA_FLAGS", ""),
        "model": _plain(model),
        "params": _signature(params),
        "batch": batch,
        "slots": slots,
    }


def _signature(tree: Any) -> str:
    """A hash of everything in a pytree but the values of its arrays."""
    leaves, treedef = jax.tree.flatten(tree)
    shapes = [(jnp.shape(x), str(jnp.result_type(x))) for x in leaves]
    text = f"{type(tree).__name__} {_plain(treedef)} {shapes}"
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(what: Any) -> str:
    """Its text without addresses, which are others in each process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(what))


def _kept(key: dict[str, Any], measure: Callable[[], list[float]]) -> list[float]:
    """Times from the cache folder, or measured and put there."""
    text = json.dumps(key, sort_keys=True)
    path = cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        seconds = [float(s) for s in found["seconds"]]
        if found["key"] == key and seconds and min(seconds) > 0:
            return seconds
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or damaged: measured again
    seconds = measure()
    document = json.dumps({"key": key, "seconds": seconds}, indent=1)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(document)
        os.replace(temporary, path)
    except OSError:
        pass  # a folder that cannot be written costs a measurement the next time
    return seconds
