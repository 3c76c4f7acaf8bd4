"""The loop on a small regression: steps, accumulation, sharding, stops, resuming."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from angeljax.train import (
    Checkpoints,
    ConfigError,
    Divergence,
    OptimizerConfig,
    TrainingStopped,
    _monitor,
    evaluation_params,
    fit,
    make_mesh,
    make_optimizer,
)
from angeljax.train.guards import LossWatch
from angeljax.train.metrics import JsonLines, Writers

STEPS = 12
GOAL = {"w": np.linspace(-1, 1, 128, dtype=np.float32).reshape(16, 8)}


def loss_fn(trainable, frozen, batch, step, key):
    """Mean squared error over the rows whose mask is set."""
    x, mask = batch["x"], batch["mask"]
    y = x @ trainable["params"]["kernel"] * trainable["learned"]["layers/scale"]
    error = jnp.sum((y - x @ frozen["w"]) ** 2, -1) * mask
    count = mask.sum()
    noise = jax.random.uniform(key)
    loss = error.sum() / jnp.maximum(count, 1)
    return loss, {"weight": count, "noise": noise, "number": step}


def batches(step):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(16, 16)).astype(np.float32)
    return {"x": x, "mask": (np.arange(16) < 5 + step % 7).astype(np.float32)}


def start():
    return {
        "params": {"kernel": jnp.zeros((16, 8))},
        "learned": {"layers/scale": jnp.ones(())},
    }


class Seen:
    """Keeps what is logged."""

    def __init__(self):
        self.rows = []

    def __call__(self, start):
        return [self]

    def write(self, step, values):
        self.rows.append((step, dict(values)))

    def close(self):
        self.rows.append("closed")

    def column(self, name):
        return [row[1][name] for row in self.rows[:-1] if name in row[1]]


def run(steps=STEPS, optimizer=None, **options):
    seen = Seen()
    optimizer = optimizer or make_optimizer(OptimizerConfig(lr=0.1), STEPS)
    options = {"log_every": 1, "batches": batches, "loss_fn": loss_fn} | options
    fn, data = options.pop("loss_fn"), options.pop("batches")
    result = fit(
        fn,
        start(),
        data,
        optimizer=optimizer,
        steps=steps,
        frozen=GOAL,
        writers=seen,
        **options,
    )
    assert seen.rows[-1] == "closed"
    return result, seen


@pytest.fixture(scope="module")
def plain():
    return run()


def test_loss_goes_down_and_every_step_is_logged_in_order(plain):
    result, seen = plain
    losses = seen.column("loss")
    assert losses[-1] < losses[0] / 3
    assert result.step == STEPS and result.metrics["loss"] == losses[-1]
    assert [row[0] for row in seen.rows[:-1]] == list(range(1, STEPS + 1))
    assert seen.column("number") == list(range(STEPS))
    assert len(set(seen.column("noise"))) == STEPS
    # Things seen so far: the sum of the masks.
    assert seen.column("tokens")[-1] == sum(batches(i)["mask"].sum() for i in range(12))


def test_micro_batches_and_shards_give_the_same_training(plain):
    """Means over valid rows, although micro-batches hold different numbers of them."""
    want = plain[1].column("loss")
    mesh = make_mesh({"data": 2, "fsdp": 4})
    result, seen = run(accumulate=2, mesh=mesh)
    np.testing.assert_allclose(seen.column("loss"), want, rtol=1e-5)
    kernel = result.trainable["params"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp")
    assert kernel.addressable_shards[0].data.shape == (4, 8)
    moments = [x for x in jax.tree.leaves(result.opt_state) if x.shape == (16, 8)]
    assert len(moments) == 2 and all(m.sharding == kernel.sharding for m in moments)
    with pytest.raises(ValueError, match="16 rows cannot be divided into 4 micro-b"):
        run(accumulate=4, mesh=mesh)


def test_intervals_are_means_and_the_last_one_is_not_lost(plain):
    seen = run(log_every=5)[1]
    want = np.array(plain[1].column("loss"))
    assert [row[0] for row in seen.rows[:-1]] == [5, 10, 12]
    means = [want[:5].mean(), want[5:10].mean(), want[10:].mean()]
    np.testing.assert_allclose(seen.column("loss"), means, rtol=1e-5)


def test_a_step_that_is_not_finite_stops_and_changes_nothing(tmp_path):
    def broken(step):
        batch = batches(step)
        if step == 7:
            batch["x"][0, 3] = np.inf
        return batch

    kept = Checkpoints(tmp_path, every=2)
    with pytest.raises(TrainingStopped) as e:
        run(batches=broken, checkpoints=kept, log_every=4)
    message = str(e.value)
    assert "stopped at step 8: the loss is inf" in message
    assert "learned/layers/scale, params/kernel" in message and "\n" not in message
    assert kept.latest() == 6
    # The batch without the fault goes on from there.
    result, seen = run(checkpoints=kept)
    assert result.step == STEPS and seen.rows[0][0] == 7


def test_a_diverging_loss_stops():
    def rising(trainable, frozen, batch, step, key):
        away = jnp.where(step < 6, 1.0, 2.0 * step)
        return away + 0 * loss_fn(trainable, frozen, batch, step, key)[0], {}

    guard = Divergence(patience=3, decay=0.5)
    message = r"the loss diverges: 6.543 on average at step 7, after 1: lower optimi"
    with pytest.raises(TrainingStopped, match=message):
        run(loss_fn=rising, divergence=guard)
    run(loss_fn=rising, divergence=Divergence(ratio=0))


def test_a_learning_rate_that_is_too_high_keeps_the_last_good_checkpoint(tmp_path):
    kept = Checkpoints(tmp_path, every=2, keep=1)
    message = (
        r"stopped at step \d+: .* not finite.* the checkpoints in .* are as before"
    )
    with pytest.raises(TrainingStopped, match=message):
        run(optimizer=optax.sgd(1.0), checkpoints=kept)
    state = {"step": jnp.zeros((), jnp.int32), "trainable": start()}
    found = kept.restore({**state, "opt_state": optax.sgd(1.0).init(start())})
    assert found["step"] == kept.latest() == 2
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_resuming_gives_the_same_curve(plain, tmp_path):
    identity = {"recipe": {"rules": [1]}, "data": {"sha256": "a"}}
    kept = Checkpoints(tmp_path / "c", every=4, keep=1, identity=identity)
    file = tmp_path / "m.jsonl"
    with pytest.raises(RuntimeError, match="killed"):

        def fails(step):
            if step == 10:
                raise RuntimeError("killed")
            return batches(step)

        run(batches=fails, checkpoints=kept)
    assert kept.latest() == 8
    file.write_text('{"step": 8, "loss": 1}\n{"step": 9, "loss": 2}\n{"step": 1')
    again = Checkpoints(tmp_path / "c", every=4, keep=1, identity=identity)
    with pytest.raises(ValueError, match="holds the checkpoints of another run"):
        run(checkpoints=again, resume=False)
    seen = run(checkpoints=again)[1]
    assert seen.column("loss") == plain[1].column("loss")[8:]
    assert seen.column("noise") == plain[1].column("noise")[8:]

    lines = JsonLines(file, start=8)
    lines.write(9, {"loss": 3.0})
    lines.close()
    assert [json.loads(x)["loss"] for x in file.read_text().splitlines()] == [1, 3]

    other = Checkpoints(tmp_path / "c", identity={**identity, "recipe": {"rules": 2}})
    with pytest.raises(ConfigError, match=r"another recipe \(rules: \[1\], now 2\)"):
        run(checkpoints=other)


@pytest.mark.parametrize("name", ["schedule_free", "muon"])
def test_optimizers_lower_the_loss(name):
    config = OptimizerConfig(name=name, lr=0.1, scale_lr=0.0, weight_decay=0.01)
    result, seen = run(optimizer=make_optimizer(config, STEPS))
    losses = seen.column("loss")
    assert losses[-1] < losses[0] / 2
    # A factor of 0 on the learned scales keeps them.
    assert result.trainable["learned"]["layers/scale"] == 1.0
    kept = evaluation_params(result.opt_state, result.trainable)
    same = np.array_equal(
        kept["params"]["kernel"], result.trainable["params"]["kernel"]
    )
    assert same == (name == "muon")


def test_nothing_to_do_is_refused():
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        run(steps=0)
    with pytest.raises(ValueError, match="every leaf is frozen"):
        fit(loss_fn, {}, batches, optimizer=optax.sgd(1.0), steps=1)
    with pytest.raises(ConfigError, match="needs 16 devices and there are 8"):
        make_mesh({"fsdp": 16})
    with pytest.raises(ConfigError, match="mesh has no axis 'model'"):
        make_mesh({"model": 2})


def test_the_log_has_the_rate_that_was_used_and_the_last_known_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_monitor.time, "perf_counter", lambda: now[0])
    seen = Seen()
    run = _monitor.Monitor(
        steps=7,
        start=0,
        out=Writers(seen(0)),
        watch=LossWatch(Divergence()),
        log_every=2,
        schedule=lambda step: 0.1,
        unit="tokens",
        flops=0.0,
        peak=None,
        kept=None,
    )
    numbers = {"loss": 1.0, "weight": 10.0, "failed": False}
    for step in range(1, 8):
        run.add(step, numbers, None, pace=1 / step)
        now[0] += 1
    run.flush(None)
    lines = {step: values for step, values in seen.rows}
    # Reported while the next one runs: 2 with 4, 4 with 6, and the rest at the end.
    rates = [lines[step]["lr"] for step in (2, 4, 6, 7)]
    assert rates == pytest.approx([0.1 / 4, 0.1 / 6, 0.1 / 7, 0.1 / 7])
    assert "tokens_per_second" not in lines[2]  # the first step compiles
    speeds = [lines[step]["tokens_per_second"] for step in (4, 6, 7)]
    assert speeds == [20 / 2] * 3
    assert lines[7]["tokens"] == 70
