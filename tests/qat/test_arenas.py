"""The Arenas schedule: values worked out by hand, its end, the blend, its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax as aj
from angeljax._train_options import SCHEDULES
from angeljax.qat import Arenas


def values(arenas, steps, total):
    return np.asarray(jax.jit(lambda t: arenas.at(t, total))(jnp.asarray(steps)))


def test_golden_values():
    # 22111 steps, so the warm-up ends at floor(2211.1) = 2211.
    steps = [0, 1, 1105, 2211, 7186, 12161, 17136, 22111, 30000]
    want = [0, 0.0005, 0.4998, 1, 0.8536, 0.5, 0.1464, 0, 0]
    found = values(Arenas(warmup=0.1, end=1), steps, 22111)
    np.testing.assert_allclose(found, want, atol=5e-5)
    assert found[0] == found[-1] == found[-2] == 0
    assert found[3] == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_zero_from_its_end_on(schedule):
    total, end = 37, 29  # floor(0.8 * 37)
    found = values(
        Arenas(schedule=schedule, peak=2.0, end=0.8), np.arange(2 * total), total
    )
    assert found.dtype == np.float32
    assert (found[end:] == 0).all()
    assert (found[:end] >= 0).all()
    if schedule == "none":
        assert (found == 0).all()
        return
    np.testing.assert_allclose(found.max(), 2, rtol=1e-6)
    peak = found.argmax()
    assert peak == (3 if schedule == "warmup_cosine" else 0)  # floor(0.1 * 37)
    assert (np.diff(found[peak : end + 1]) <= 0).all()
    assert found[end - 1] > 0


def test_shapes_of_the_schedules():
    def halfway(schedule):
        return float(values(Arenas(schedule=schedule, end=1), 50, 100))

    np.testing.assert_allclose(halfway("cosine"), 0.5, rtol=1e-6)
    np.testing.assert_allclose(halfway("linear"), 0.5, rtol=1e-6)
    floor = np.exp(-5)
    np.testing.assert_allclose(
        halfway("exponential"), (np.exp(-2.5) - floor) / (1 - floor), rtol=1e-5
    )
    assert halfway("constant") == 1


def test_a_training_of_one_step_ends_at_zero():
    for schedule in SCHEDULES:
        assert Arenas(schedule=schedule).at(1, 1) == 0


def test_residual_and_blend():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(32, 4)), jnp.float32)
    params = {"a": {"kernel": w}, "b": {"kernel": w}}
    rules = [
        aj.Rule(match="a/.*", format="int2", group_size=32),
        aj.Rule(match="b/.*", format="int2", group_size=32, qat={"arenas": False}),
    ]
    recipe = aj.Recipe(rules=rules)
    q = np.asarray(aj.compress(params, recipe)["a"]["kernel"].dequantize())
    for form in ("residual", "blend"):
        arenas = Arenas(schedule="linear", end=1, peak=0.5, form=form)
        qat = aj.qat.make(recipe, total_steps=4, arenas=arenas)
        assert qat.recipe.arenas == arenas
        state = qat.init(params)
        apply = jax.jit(qat.apply)
        for step, weight in ((0, 0.5), (1, 0.375), (4, 0.0)):
            assert float(qat.arenas(step)) == weight
            out = apply(params, state, step)
            want = q + weight * (w - q if form == "blend" else w)
            np.testing.assert_allclose(out["a"]["kernel"], want, atol=1e-6)
            # A rule may leave the schedule out.
            np.testing.assert_array_equal(out["b"]["kernel"], q)
        np.testing.assert_array_equal(out["a"]["kernel"], q)
    # A blend that begins at 1 begins as the model itself.
    arenas = Arenas(schedule="cosine", form="blend")
    qat = aj.qat.make(recipe, total_steps=4, arenas=arenas)
    np.testing.assert_allclose(qat.apply(params, state, 0)["a"]["kernel"], w, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "warmup_cosin"}, "did you mean 'warmup_cosine'"),
        (
            {"schedule": "steps"},
            "arenas.schedule must be one of warmup_cosine",
        ),
        ({"end": 0}, "arenas.end=0.0.*in \\(0, 1\\]"),
        ({"end": 1.5}, "arenas.end=1.5"),
        ({"warmup": 0.9}, "arenas.warmup=0.9: a share of the steps below arenas.end"),
        ({"warmup": -0.1}, "arenas.warmup must be a number >= 0, not -0.1"),
        ({"peak": -1}, "arenas.peak must be a number >= 0, not -1"),
        ({"peak": float("nan")}, "arenas.peak must be a number"),
        ({"peak": True}, "arenas.peak must be a number"),
        ({"peak": "1"}, "arenas.peak must be a number"),
        ({"form": "mix"}, "arenas.form must be one of residual, blend, not 'mix'"),
        ({"form": "blend", "peak": 1.5}, "arenas.peak=1.5 of a blend must be at most"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Arenas(**options)
    # The same from a recipe, which says where.
    with pytest.raises(aj.RecipeError, match=f"train: .*{message}"):
        aj.Recipe.from_dict({"rules": [{"format": "t2"}], "train": {"arenas": options}})


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="no field 'peek' .did you mean 'peak'.*known"):
        Arenas.parse({"peek": 1})
    with pytest.raises(ValueError, match="must be a mapping of schedule, peak"):
        Arenas.parse("cosine")
