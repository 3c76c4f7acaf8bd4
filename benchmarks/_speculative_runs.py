"""Programs of speculative decoding, compiled beside each other, and their times."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from angeljax._graph import ONE_GRAPH
from angeljax.speculative import Drafter, NoDrafter, Sampling, Target
from angeljax.speculative.core import GREEDY, decode, prefill
from angeljax.speculative.profile import _start

# How the loop is compiled: kernels launched by the host, or one CUDA graph with the
# loop and its predicate in it.
LOOPS: dict[str, Any] = {"launched": None, "captured": ONE_GRAPH}
ROUNDS = 96


class Clock:
    """Seconds that a part may take, compilation aside.

    Args:
      seconds: of measuring.
      until: by `time.perf_counter`, when all must be over.
    """

    def __init__(self, seconds: float, until: float = float("inf")) -> None:
        self.start, self.seconds, self.until = time.perf_counter(), seconds, until
        self.aside = 0.0

    @property
    def spent(self) -> float:
        """Seconds since it was made, but for those aside."""
        return time.perf_counter() - self.start - self.aside

    @property
    def over(self) -> bool:
        """Whether the time has passed."""
        return self.spent > self.seconds or time.perf_counter() > self.until

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Seconds that do not count."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.aside += time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Way:
    """How text is made: a drafter, and whether each round has its whole width."""

    drafter: Drafter
    always_wide: bool = False


@dataclasses.dataclass(frozen=True)
class Done:
    """One batch of prompts.

    Attributes:
      read, decode: seconds of the prompts, and of the text that follows.
      tokens: for each row its text.
      rounds: forwards of the target for each row.
    """

    read: float
    decode: float
    tokens: list[list[int]]
    rounds: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the longest text, at least 1."""
        return max(1, *map(len, self.tokens))

    @property
    def tau(self) -> float:
        """Tokens of a forward of the target, over all rows."""
        return sum(map(len, self.tokens)) / max(int(self.rounds.sum()), 1)


class Programs:
    """Compiled loops for prompts of one padded length.

    Args:
      model, params: the target.
      length: tokens that a prompt is padded to.
      slots: of the cache.
      loop: a name of `LOOPS`.
      precision: of products, such as "highest".
      tuned: False compiles sooner, for texts of which no time is taken.
      threads: how many programs are compiled at once.
    """

    def __init__(
        self,
        model: Any,
        params: Any,
        *,
        length: int,
        slots: int,
        loop: str = "launched",
        precision: str | None = None,
        tuned: bool = True,
        threads: int = 4,
    ) -> None:
        self.model, self.params = model, params
        self.length, self.slots, self.threads = length, slots, threads
        self.loop, self.precision = loop, precision
        brief = not tuned and jax.default_backend() == "gpu"
        self._options = {"xla_gpu_autotune_level": 0} if brief else {}
        self.compiled: dict[Any, Any] = {}
        self.kernels: dict[Any, int] = {}
        self._targets: dict[Any, Target] = {}
        self._stops = jnp.asarray(model.config.eos_ids, jnp.int32)

    def compile(
        self,
        ways: Mapping[str, Way],
        batch: int,
        sampling: Sampling = GREEDY,
        loop: str | None = None,
    ) -> dict[str, Way]:
        """Makes the programs that are not there yet; returns those that there are."""
        loop = loop or self.loop
        wanted = {
            (loop, way.always_wide, batch, sampling, label): way
            for label, way in ways.items()
        }
        wanted = {k: v for k, v in wanted.items() if k not in self.compiled}
        target = self.target(batch, sampling)

        def one(item: Any) -> None:
            key, way = item
            with self._precise():
                state = jax.eval_shape(
                    lambda *args: prefill(*args, slots=self.slots),
                    *(target, way.drafter, *self._shapes(batch)),
                )
                lowered = decode.lower(
                    *(target, way.drafter, state, self._stops, jnp.int32(1)),
                    always_wide=way.always_wide,
                )
                options = {**(LOOPS[loop] or {}), **self._options}
                found = lowered.compile(compiler_options=options or None)
            self.compiled[key] = found
            self.kernels[key] = kernels_of_round(found.as_text() or "")

        def tried(item: Any) -> None:
            # One that cannot be compiled must not cost the others their time.
            try:
                one(item)
            except Exception:
                print(f"{item[0][-1]} at batch {batch}:", flush=True)
                traceback.print_exc()

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(tried, wanted.items()))
        keys = {(loop, w.always_wide, batch, sampling, n): n for n, w in ways.items()}
        found = {name for key, name in keys.items() if key in self.compiled}
        return {name: way for name, way in ways.items() if name in found}

    def run(
        self,
        label: str,
        way: Way,
        prompts: Sequence[Sequence[int]],
        new: int,
        sampling: Sampling = GREEDY,
        loop: str | None = None,
    ) -> Done:
        """The text of a batch; the program must be compiled."""
        batch, target = len(prompts), self.target(len(prompts), sampling)
        tokens = np.zeros((batch, self.length), np.int32)
        for row, ids in zip(tokens, prompts, strict=True):
            row[: len(ids)] = ids
        sizes = np.asarray([len(ids) for ids in prompts], np.int32)
        args = jax.device_put((tokens, sizes, sizes + np.int32(new)))
        jax.block_until_ready(args)
        loop_of = self._loop(label, way, batch, new, sampling, loop)
        start = time.perf_counter()
        with self._precise():
            state = prefill(target, way.drafter, *args, slots=self.slots)
        jax.block_until_ready(state)
        read = time.perf_counter()
        state = jax.block_until_ready(loop_of(state))
        end = time.perf_counter()
        text, ends = np.asarray(state.tokens), np.asarray(state.lengths)
        found = [
            row[size:stop].tolist()
            for row, size, stop in zip(text, sizes, ends, strict=True)
        ]
        return Done(read - start, end - read, found, np.asarray(state.stats.rounds))

    def seconds_of_round(
        self, label: str, way: Way, batch: int, loop: str | None = None
    ) -> float:
        """Of a drafter that proposes nothing; the better of three differences."""
        state = _start(self.target(batch), way.drafter, batch, self.slots)

        def once(rounds: int) -> float:
            loop_of = self._loop(label, way, batch, rounds, loop=loop, ends=False)
            own = jax.block_until_ready(jax.tree.map(jnp.copy, state))
            start = time.perf_counter()
            jax.block_until_ready(loop_of(own))
            return time.perf_counter() - start

        few = ROUNDS // 8
        once(few)
        long, short = (min(once(n) for _ in range(3)) for n in (ROUNDS, few))
        return (long - short) / (ROUNDS - few)

    def profiled(self, label: str, way: Way, loop: str) -> tuple[float, int]:
        """Seconds in which a kernel runs and kernels, of one round at batch 1."""
        state = _start(self.target(1), way.drafter, 1, self.slots)

        def call(rounds: int) -> tuple[float, int]:
            loop_of = self._loop(label, way, 1, rounds, loop=loop, ends=False)
            own = jax.block_until_ready(jax.tree.map(jnp.copy, state))
            return busy_seconds(lambda: loop_of(own))

        few = ROUNDS // 8
        (long, many), (short, less) = call(ROUNDS), call(few)
        rounds = ROUNDS - few
        return (long - short) / rounds, (many - less) // rounds

    def dearest(
        self, label: str, way: Way, prompt: Sequence[int], new: int, count: int = 16
    ) -> dict[str, float]:
        """Seconds of the kernels that take most time in a round, by name and origin.

        The names are those of the program; kernels that differ by a number are one.
        """
        rounds = 0

        def call() -> Any:
            nonlocal rounds
            done = self.run(label, way, [prompt], new)
            rounds = int(done.rounds.sum())
            return done.tokens

        spans = device_spans(call)
        text = self.compiled[self.loop, way.always_wide, 1, GREEDY, label].as_text()
        origins: dict[str, str] = dict(
            re.findall(r'%?([\w.\-]+) = [^\n]*op_name="([^"]*)"', text)
        )
        found: dict[str, float] = defaultdict(float)
        for name, begin, end in spans:
            origin = str(origins.get(name) or origins.get(name.replace("_", "."), ""))
            short = re.sub(r"[._]\d+(?=$|_)", "", name)
            found[f"{short} {origin.rsplit('while/body/', 1)[-1]}"] += end - begin
        top = sorted(found, key=lambda name: -found[name])[:count]
        return {name: found[name] / max(rounds, 1) for name in top}

    def target(self, batch: int, sampling: Sampling = GREEDY) -> Target:
        """The model for a batch."""
        key = batch, sampling
        if key not in self._targets:
            sampler = sampling.sampler(batch)
            self._targets[key] = Target(self.model, self.params, sampler)
        return self._targets[key]

    def kernels_of(self, label: str, way: Way, batch: int) -> int:
        """Kernels of a round in the compiled program."""
        return self.kernels[self.loop, way.always_wide, batch, GREEDY, label]

    def _precise(self) -> Any:
        # Such settings belong to a thread: each program is compiled under its own.
        if self.precision is None:
            return contextlib.nullcontext()
        return jax.default_matmul_precision(self.precision)

    def _shapes(self, batch: int) -> tuple[Any, ...]:
        row = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return jax.ShapeDtypeStruct((batch, self.length), jnp.int32), row, row

    def _loop(
        self,
        label: str,
        way: Way,
        batch: int,
        rounds: int,
        sampling: Sampling = GREEDY,
        loop: str | None = None,
        ends: bool = True,
    ) -> Callable[[Any], Any]:
        """The loop as a function of its state, with all else on the device.

        Without `ends` no token ends a row, so that all rounds are run.
        """
        key = loop or self.loop, way.always_wide, batch, sampling, label
        compiled, target = self.compiled[key], self.target(batch, sampling)
        count = jax.block_until_ready(jnp.int32(rounds))
        stops = self._stops if ends else jnp.full_like(self._stops, -1)
        return lambda state: compiled(target, way.drafter, state, stops, count)


def widths_of(widths: Iterable[int]) -> dict[str, Way]:
    """Rounds of these widths that propose nothing; the first name is plain decoding."""
    return {
        "plain" if w == 1 else f"width {w}": Way(NoDrafter(w)) for w in sorted(widths)
    }


def busy_seconds(call: Callable[[], Any]) -> tuple[float, int]:
    """Seconds in which any kernel runs on the first GPU, and kernels, by a profile."""
    spans = device_spans(call)
    return union((begin, end) for _, begin, end in spans), len(spans)


def device_spans(call: Callable[[], Any]) -> list[tuple[str, float, float]]:
    """What runs on the first GPU by a profile: names, begins and ends in seconds."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(call())
        file = next(Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(file))
        return [
            (
                _operation(event),
                event.start_ns * 1e-9,
                (event.start_ns + event.duration_ns) * 1e-9,
            )
            for plane in data.planes
            if plane.name.startswith("/device:GPU:0")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]


def _operation(event: Any) -> str:
    """The operation of the program that a kernel belongs to, or its own name."""
    stats = {name: value for name, value in event.stats if name}
    return str(stats.get("hlo_op", event.name))


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, until = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def kernels_of_round(text: str) -> int:
    """Kernels, copies and library calls in the body of the outermost loop.

    Loops inside count as often as they run; of a choice the dearer branch counts.

    Args:
      text: compiled HLO.
    """
    blocks = {}
    entry = ""
    for block in re.split(r"\n(?=\S)", text):
        if found := re.match(r"(ENTRY )?%?([\w.\-]+)", block):
            blocks[found[2]] = block
            entry = found[2] if found[1] else entry
    done: dict[str, int] = {}

    def count(name: str) -> int:
        if name not in done:
            lines = blocks.get(name, "").splitlines()[1:]
            done[name] = sum(of_line(line) for line in lines)
        return done[name]

    def named(line: str, field: str) -> list[str]:
        found = re.search(rf"\b{field}=\{{?([^,}}]*(?:, *%[\w.\-]+)*)", line)
        return re.findall(r"[\w.\-]+", found[1]) if found else []

    def of_line(line: str) -> int:
        found = re.search(r"= (?:\(.*?\)|\S+) ([a-z][\w\-]*)\((?=[%)\w\-])", line)
        kind = found[1] if found else ""
        if kind == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            return (int(trips[1]) if trips else 1) * sum(
                count(n) for n in named(line, "body")
            )
        if kind == "conditional":
            fields = ("branch_computations", "true_computation", "false_computation")
            return max(count(n) for f in fields for n in named(line, f))
        if kind == "call":
            return sum(count(n) for n in named(line, "to_apply"))
        started = kind in ("fusion-start", "copy-start", "async-start")
        return int(started or kind in ("fusion", "custom-call", "copy", "sort"))

    outer = [line for line in blocks.get(entry, "").splitlines() if " while(" in line]
    bodies = [n for line in outer for n in named(line, "body")]
    return max((count(n) for n in bodies), default=0)
