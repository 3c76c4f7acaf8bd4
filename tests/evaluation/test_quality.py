"""Perplexity, KL and agreement against values worked out by numpy."""

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import angeljax.evaluation as evaluation
from angeljax.evaluation import (
    Windows,
    evaluate,
    quality,
    reference,
    reference_logits,
    windows,
)
from angeljax.evaluation import _steps as steps

VOCABULARY = 40


def uniform(params, tokens):
    return jnp.zeros((*tokens.shape, VOCABULARY)) + params


def bigram(params, tokens):
    """Logits depend on the current token only: easy to work out by hand."""
    return params["table"][tokens]


@pytest.fixture
def cut(rng):
    return windows(rng.integers(0, VOCABULARY, 103), length=16, stride=11)


@pytest.fixture
def tables(rng):
    table = rng.normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
    other = table + 0.3 * rng.normal(size=table.shape).astype(np.float32)
    return {"table": jnp.asarray(table)}, {"table": jnp.asarray(other)}


def by_hand(params, reference, cut):
    """The same three means in float64, token by token."""

    def log_probs(params, token):
        row = np.asarray(params["table"], np.float64)[token]
        return row - np.log(np.exp(row).sum())

    nll, kl, top1 = [], [], []
    for row, mask in zip(*cut, strict=True):
        for t in range(1, len(row)):
            if mask[t]:
                ours = log_probs(params, row[t - 1])
                theirs = log_probs(reference, row[t - 1])
                nll.append(-ours[row[t]])
                kl.append((np.exp(theirs) * (theirs - ours)).sum())
                top1.append(ours.argmax() == theirs.argmax())
    return np.mean(nll), np.mean(kl), np.mean(top1)


def test_uniform_logits_have_perplexity_v(cut):
    result = evaluate(uniform, 3.0, cut)
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert result.tokens == 102
    assert result.nll_stderr == pytest.approx(0, abs=1e-6)
    assert result.kl is None and result.top1_agreement is None
    assert result.seconds > 0


def test_against_numpy(cut, tables):
    dense, other = tables
    nll, kl, top1 = by_hand(other, dense, cut)
    result = evaluate(bigram, other, cut, reference=dense)
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-6)
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert result.top1_agreement == pytest.approx(top1)
    assert 0 < result.top1_agreement < 1


def test_a_model_agrees_with_itself(cut, tables):
    dense, _ = tables
    result = evaluate(bigram, dense, cut, reference=dense)
    assert result.kl == 0
    assert result.kl_stderr == 0
    assert result.top1_agreement == 1


def test_standard_error_is_that_of_independent_windows(rng, tables):
    # With equally long windows the error is that of the mean of their means.
    tokens = rng.integers(0, VOCABULARY, (12, 9)).astype(np.int32)
    mask = np.ones((12, 9), bool)
    mask[:, 0] = False
    cut = Windows(tokens, mask)
    means = [
        by_hand(*tables, Windows(t[None], m[None]))[0]
        for t, m in zip(tokens, mask, strict=True)
    ]
    result = evaluate(bigram, tables[0], cut)
    expected = np.std(means, ddof=1) / np.sqrt(12)
    assert result.nll_stderr == pytest.approx(expected, rel=1e-4)
    one = Windows(tokens[:1], mask[:1])
    assert evaluate(bigram, tables[0], one).nll_stderr is None


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("cached", [False, True])
def test_batch_size_does_not_matter(cut, tables, batch_size, cached):
    dense, other = tables
    against = reference_logits(bigram, dense, cut, batch_size=4) if cached else dense
    expected = evaluate(bigram, other, cut, reference=against)
    result = evaluate(bigram, other, cut, reference=against, batch_size=batch_size)
    for field in ("nll", "kl", "top1_agreement", "nll_stderr", "kl_stderr", "tokens"):
        value = getattr(expected, field)
        assert getattr(result, field) == pytest.approx(value, rel=1e-5)


def test_padding_never_counts(rng, tables):
    """What stands behind the stream's end may even be NaN."""
    dense, other = tables
    pad = VOCABULARY - 1

    def nan_at_padding(params, tokens):
        return jnp.where((tokens == pad)[..., None], jnp.nan, bigram(params, tokens))

    stream = rng.integers(0, pad, 50)
    cut = windows(stream, length=16, pad_id=pad)
    assert (cut.tokens[-1, -5:] == pad).all()
    result = evaluate(nan_at_padding, other, cut, reference=dense)
    nll, kl, top1 = by_hand(other, dense, cut)
    assert result.tokens == 49
    assert result.nll == pytest.approx(nll, rel=1e-6)
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert result.top1_agreement == pytest.approx(top1)


def test_impossible_tokens(cut, tables):
    """A token that both rule out adds nothing; one that only the model does, is inf."""
    dense, _ = tables
    never = {"table": dense["table"].at[:, 5].set(-jnp.inf)}
    allowed = np.where(cut.tokens == 5, 6, cut.tokens)
    cut = Windows(allowed, cut.score_mask)
    result = evaluate(bigram, never, cut, reference=never)
    assert result.kl == 0
    assert np.isfinite(result.nll)
    cache = reference_logits(bigram, never, cut)
    assert evaluate(bigram, never, cut, reference=cache).kl == pytest.approx(
        0, abs=1e-5
    )
    assert evaluate(bigram, never, cut, reference=dense).kl == np.inf


def test_a_broken_model_has_infinite_perplexity(cut, tables):
    broken = {"table": 1e6 * tables[0]["table"]}
    result = evaluate(bigram, broken, cut)
    assert result.perplexity == np.inf


def test_recipes_of_one_structure_share_the_compiled_step(cut, tables):
    traced = []

    def counted(params, tokens):
        traced.append(tokens.shape)
        return bigram(params, tokens)

    dense, other = tables
    evaluate(counted, dense, cut, reference=dense)
    first = len(traced)
    evaluate(counted, other, cut, reference=dense)
    assert len(traced) == first
    half = {"table": other["table"].astype(jnp.bfloat16)}
    evaluate(counted, half, cut, reference=dense)
    assert len(traced) > first


def test_reference_with_its_own_model(cut, tables):
    def doubled(params, tokens):
        return 2 * bigram(params, tokens)

    dense, other = tables
    twice = {"table": 2 * dense["table"]}
    expected = evaluate(bigram, other, cut, reference=twice)
    result = evaluate(bigram, other, cut, reference=dense, reference_fn=doubled)
    assert result.kl == pytest.approx(expected.kl, rel=1e-6)
    with pytest.raises(ValueError, match="reference_fn"):
        evaluate(bigram, other, cut, reference_fn=doubled)


# From near-uniform to near-deterministic next-token distributions, and from compression
# that hardly shows to compression that ruins the model.
@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("noise", [0.0, 0.03, 0.3, 1.0])
def test_float16_cache_keeps_kl_within_1e_4(rng, sharpness, noise):
    size = 2048
    table = sharpness * rng.normal(size=(size, size)).astype(np.float32)
    dense = {"table": jnp.asarray(table)}
    change = noise * rng.normal(size=table.shape).astype(np.float32)
    other = {"table": jnp.asarray(table + change)}
    cut = windows(rng.integers(0, size, 513), length=65)
    cache = reference_logits(bigram, dense, cut)
    exact = evaluate(bigram, other, cut, reference=dense)
    result = evaluate(bigram, other, cut, reference=cache)
    assert cache.log_probs.dtype == np.float16
    assert cache.nbytes == 8 * 64 * (2 * size + 4)
    assert abs(result.kl - exact.kl) < 1e-5 * max(1, exact.kl)
    assert result.nll == exact.nll
    assert result.top1_agreement == exact.top1_agreement


def test_cache_is_checked(cut, tables, rng):
    dense, _ = tables
    cache = reference_logits(bigram, dense, cut)
    other = windows(rng.integers(0, VOCABULARY, 103), length=16, stride=11)
    with pytest.raises(ValueError, match="other windows"):
        evaluate(bigram, dense, other, reference=cache)
    with pytest.raises(ValueError, match="reference_fn"):
        evaluate(bigram, dense, cut, reference=cache, reference_fn=bigram)
    with pytest.raises(ValueError, match="exceeds max_bytes"):
        reference_logits(bigram, dense, cut, max_bytes=1000)


@pytest.mark.parametrize("size", [1, 40, 256, 300, 1024])
@pytest.mark.parametrize("spread", [2, 1000])
def test_argmax_is_numpy_s_ties_included(rng, size, spread):
    logits = rng.integers(-spread, spread, (7, 5, size)).astype(np.float32)
    found = steps.argmax(jnp.asarray(logits))
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, logits.argmax(axis=-1))


def test_default_batch_size_follows_the_logits():
    tokens = np.zeros((100, 512), np.int32)
    assert steps.choose_batch_size(tokens, 49152, None) == 2
    assert steps.choose_batch_size(tokens, 10**7, None) == 1
    assert steps.choose_batch_size(tokens, 40, None) == 100
    assert steps.choose_batch_size(tokens, 40, 7) == 7
    with pytest.raises(ValueError, match="batch_size"):
        steps.choose_batch_size(tokens, 40, 0)


def test_bad_arguments(cut, tables):
    dense, _ = tables
    tokens, mask = cut
    for bad, message in [
        ((tokens, mask[:, 1:]), "one shape"),
        ((tokens, np.ones_like(mask)), "first token"),
        ((tokens, np.zeros_like(mask)), "nothing to score"),
        ((tokens + VOCABULARY, mask), "outside the model's vocabulary"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(bigram, dense, Windows(*bad))
    with pytest.raises(ValueError, match=r"\[B, T, V\]"):
        evaluate(lambda params, tokens: params["table"], dense, cut)
    wide = {"table": jnp.zeros((VOCABULARY, VOCABULARY + 1))}
    with pytest.raises(ValueError, match="the reference 41"):
        evaluate(bigram, dense, cut, reference=wide)


def test_progress_bar_is_off_unless_forced(cut, tables, capsys):
    dense, _ = tables
    evaluate(bigram, dense, cut)
    assert capsys.readouterr() == ("", "")
    evaluate(bigram, dense, cut, progress=True, batch_size=1)
    reference_logits(bigram, dense, cut, progress=True)
    out, err = capsys.readouterr()
    assert not out and "evaluate" in err and "reference" in err


def test_sharded_params(cut, tables):
    dense, other = tables
    expected = evaluate(bigram, other, cut, reference=dense)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("d")
    sharded = jax.device_put(other, jax.sharding.NamedSharding(mesh, spec))
    replicated = jax.device_put(
        dense, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    )
    result = evaluate(bigram, sharded, cut, reference=replicated)
    assert result.kl == pytest.approx(expected.kl, rel=1e-5)


def test_summary(cut, tables):
    dense, other = tables
    assert "KL" not in str(evaluate(bigram, dense, cut))
    text = str(evaluate(bigram, other, cut, reference=dense))
    assert "perplexity" in text and "KL" in text and "102 tokens" in text


@pytest.mark.parametrize("module", [quality, reference])
def test_examples(module):
    names = {"jnp": jnp, "np": np, **vars(evaluation)}
    assert doctest.testmod(module, globs=names).failed == 0
