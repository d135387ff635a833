"""Policy losses against TRL's numbers, and against numbers worked out by hand."""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.policy_losses import (
    RATIO_QUANTILES,
    PolicyOptions,
    importance_ratio,
    kl,
    masked_quantiles,
    policy_loss,
    policy_metrics,
    row_weights,
)

DEFAULTS = PolicyOptions(
    loss_type="grpo",
    importance_sampling_level="token",
    epsilon=0.2,
    epsilon_high=None,
    delta=None,
    beta=0.0,
    kl_estimator="k3",
    use_bias_correction_kl=True,
    top_entropy_quantile=1.0,
    entropy_coef=0.0,
)
LN2 = math.log(2.0)


def options(**fields) -> PolicyOptions:
    return dataclasses.replace(DEFAULTS, **fields)


# The file's cases by loss type: 31 of the first five types, 7 of the others.
NUM_CASES = {
    "grpo": 8,
    "bnpo": 6,
    "dr_grpo": 7,
    "dapo": 6,
    "cispo": 4,
    "sapo": 2,
    "luspo": 3,
    "vespo": 2,
}
# TRL's argument in the file -> ours.
NAMES = {
    "loss_type": "loss_type",
    "level": "importance_sampling_level",
    "eps": "epsilon",
    "eps_high": "epsilon_high",
    "beta": "beta",
    "bias_corr": "use_bias_correction_kl",
    "top_q": "top_entropy_quantile",
    "ent_coef": "entropy_coef",
}


@pytest.fixture(scope="module")
def oracle(oracle_dir):
    return json.loads((oracle_dir / "trl_grpo_loss_vectors.json").read_text())


def errors(oracle, case, **wrong):
    """Returns how far loss, gradient and metrics of a case are from TRL's.

    `wrong` replaces arguments of the case.
    """
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in oracle["inputs"].items()}
    args = {"ga": 1, "use_old": True, **case["args"], **wrong}
    chosen = options(
        **{ours: args[name] for name, ours in NAMES.items() if name in args}
    )
    mask = arrays["completion_mask"]
    B, C = mask.shape
    # TRL's loss is of one micro-batch of `ga` alike.
    lengths = np.tile(np.sum(mask, axis=1), args["ga"])
    num_tokens = args.get("num_items", int(np.sum(mask)))
    weights = row_weights(
        chosen.loss_type, lengths, max_new_tokens=C, num_tokens=num_tokens
    )

    def loss_fn(logprobs):
        return policy_loss(
            logprobs,
            arrays["entropies"],
            arrays["advantages"],
            mask,
            jnp.asarray(weights[:B]),
            chosen,
            arrays["old_per_token_logps"] if args["use_old"] else None,
            arrays["ref_per_token_logps"],
            bonus_weight=1 / args["ga"],
        )

    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, rows), grad = value_and_grad(arrays["per_token_logps"])
    metrics = policy_metrics(rows, mask, arrays["advantages"], chosen)
    ours = {name for name in metrics if not name.startswith("ratio/")}
    assert ours == set(case["metrics"]) or wrong
    return (
        abs(float(loss) - case["loss"]),
        float(np.max(np.abs(grad - np.asarray(case["grad"])))),
        max(abs(float(metrics[k]) - v) for k, v in case["metrics"].items()),
    )


@pytest.mark.parametrize("loss_type", NUM_CASES)
def test_losses_gradients_and_metrics_equal_trl(oracle, loss_type):
    assert len(oracle["cases"]) == sum(NUM_CASES.values()) == 38
    cases = [c for c in oracle["cases"] if c["args"]["loss_type"] == loss_type]
    for case in cases:
        loss, grad, metric = errors(oracle, case)
        assert (loss < 1e-5, grad < 1e-6, metric < 1e-6) == (True,) * 3, case["args"]
    print(f"{len(cases)} cases of {loss_type} equal TRL 1.16.0")
    assert len(cases) == NUM_CASES[loss_type]


@pytest.mark.parametrize(
    ("number", "wrong"),
    [
        (0, {"eps": 0.21}),
        (0, {"level": "sequence"}),
        (0, {"loss_type": "luspo"}),
        (0, {"use_old": False}),
        (1, {"beta": 0.041}),
        (1, {"bias_corr": False}),
        (10, {"eps_high": 1.1}),
        (21, {"eps_high": 0.2}),
        (22, {"top_q": 0.25}),
        (24, {"ent_coef": 0.011}),
        (27, {"num_items": 96}),
        (31, {"ga": 3}),
        (37, {"level": "token"}),
    ],
)
def test_a_wrong_option_is_caught(oracle, number, wrong):
    loss, grad, _ = errors(oracle, oracle["cases"][number], **wrong)
    assert loss > 1e-5 or grad > 1e-6


# Two rows by hand: ratios 1, 2, 1/2 (log ratios 0, ln 2, -ln 2) and 4; one token is
# masked.
RATIOS = jnp.array([[1.0, 2.0, 0.5], [4.0, 9.0, 0.0]])
MASK = jnp.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
ADVANTAGES = jnp.array([1.0, -1.0])
ENTROPY = jnp.array([[0.5, 2.0, 1.0], [3.0, 7.0, 7.0]])
OLD = jnp.array([[-1.0, -2.0, -1.5], [-3.0, -1.0, -1.0]])
ONES = jnp.ones(2)


def by_hand(chosen, *, logprobs=None, mask=MASK, old=OLD, ref=None, weights=ONES):
    """Returns loss, rows and gradient for tokens of `RATIOS`."""
    logprobs = OLD + jnp.log(RATIOS) if logprobs is None else logprobs

    def loss_fn(logprobs):
        return policy_loss(
            logprobs, ENTROPY, ADVANTAGES, mask, weights, chosen, old, ref
        )

    (loss, rows), grad = jax.value_and_grad(loss_fn, has_aux=True)(logprobs)
    return loss, rows, grad


def test_clipping_by_hand():
    # A > 0: -1, -min(2, 1.2), -0.5; A < 0: 4, which nothing bounds.
    loss, rows, grad = by_hand(DEFAULTS)
    assert float(loss) == pytest.approx(-1.0 - 1.2 - 0.5 + 4.0, abs=1e-6)
    np.testing.assert_allclose(
        grad, [[-1.0, 0.0, -0.5], [4.0, 0.0, 0.0]], rtol=0, atol=1e-6
    )
    metrics = policy_metrics(rows, MASK, ADVANTAGES, DEFAULTS)
    expected = {
        "clip_ratio/low_mean": 0.0,
        "clip_ratio/high_mean": 1 / 4,
        "clip_ratio/region_mean": 1 / 4,
        "clip_ratio/low_min": 0.0,
        "clip_ratio/high_max": 1 / 3,
        "entropy": 6.5 / 4,
        "ratio/min": 0.5,
        "ratio/p01": 0.515,
        "ratio/p50": 1.5,
        "ratio/p99": 3.94,
        "ratio/max": 4.0,
    }
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(
        expected, abs=1e-6
    )


def test_delta_bounds_a_ratio_of_negative_advantage():
    loss, rows, grad = by_hand(options(delta=3.0))
    assert float(loss) == pytest.approx(-1.0 - 1.2 - 0.5 + 3.0, abs=1e-6)
    np.testing.assert_allclose(
        grad, [[-1.0, 0.0, -0.5], [0.0, 0.0, 0.0]], rtol=0, atol=1e-6
    )
    # The metrics too are of the bounded ratio; the quantiles are not.
    metrics = policy_metrics(rows, MASK, ADVANTAGES, options(delta=3.0))
    assert float(metrics["ratio/max"]) == pytest.approx(4.0, abs=1e-5)
    assert float(metrics["clip_ratio/high_mean"]) == 0.25


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    # Weights 1, 1.5, 0.5 and 1.5 (capped from 2 and 4), times -A log π.
    logprobs = OLD + jnp.log(RATIOS)
    loss, _, grad = by_hand(options(loss_type="cispo", epsilon_high=1.5))
    expected = [[-1.0, -1.5, -0.5], [1.5, 0.0, 0.0]]
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-6)
    terms = jnp.where(MASK > 0, jnp.asarray(expected) * logprobs, 0.0)
    assert float(loss) == pytest.approx(float(jnp.sum(terms)), abs=1e-5)


def test_the_ratio_of_a_sequence_by_hand():
    # Row 0: log ratios ln 2 and ln 8, mean ln 4; row 1: one token of ratio 1/2.
    log_ratio = jnp.array([[LN2, 3 * LN2, 0.0], [-LN2, 0.0, 0.0]])
    mask = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    spread, own = (
        (
            importance_ratio(log_ratio, mask, level),
            # Of the first token of row 0 alone.
            jax.grad(lambda x, level=level: importance_ratio(x, mask, level)[0, 0])(
                log_ratio
            ),
        )
        for level in ("sequence", "sequence_token")
    )
    np.testing.assert_allclose(spread[0], [[4.0], [0.5]], rtol=1e-6)
    np.testing.assert_allclose(own[0], [[4.0] * 3, [0.5] * 3], rtol=1e-6)
    np.testing.assert_allclose(spread[1], [[2.0, 2.0, 0.0], [0.0] * 3], rtol=1e-6)
    np.testing.assert_allclose(own[1], [[4.0, 0.0, 0.0], [0.0] * 3], rtol=1e-6)


def levels_by_hand(**fields):
    """Returns losses and gradients of both sequence levels, for ratios of 1 or 4.

    Row 0 is on 2 tokens of log ratio 0 and 4 ln 2, so their mean is 2 ln 2.
    """
    logprobs = OLD.at[0, 1].add(4 * LN2)
    mask = jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    found = []
    for level in ("sequence", "sequence_token"):
        chosen = options(importance_sampling_level=level, epsilon_high=9.0, **fields)
        loss, _, grad = by_hand(chosen, logprobs=logprobs, mask=mask, ref=OLD)
        found.append((float(loss), np.asarray(grad[0])))
    return found


def test_both_sequence_levels_agree_where_all_tokens_weigh_the_same():
    for loss, grad in levels_by_hand():
        assert loss == pytest.approx(-8.0, abs=1e-5)
        np.testing.assert_allclose(grad, [-4.0, -4.0, 0.0], rtol=0, atol=1e-5)


def test_the_sequence_levels_part_where_one_token_has_the_loss():
    # Token 1 has the highest entropy. Its ratio is the mean's, 4: differentiated
    # through the mean each token gets 4 / 2, straight through its own token all 4.
    spread, own = levels_by_hand(top_entropy_quantile=0.0)
    assert spread[0] == own[0] == pytest.approx(-4.0, abs=1e-5)
    np.testing.assert_allclose(spread[1], [-2.0, -2.0, 0.0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(own[1], [0.0, -4.0, 0.0], rtol=0, atol=1e-5)


def test_metrics_of_a_sequence_level_are_over_rows():
    # Row 0: mean log ratio 0, ratio 1. Row 1: ratio 4 and A < 0, high but not clipped.
    for level in ("sequence", "sequence_token"):
        chosen = options(importance_sampling_level=level)
        rows = by_hand(chosen)[1]
        assert rows["ratio"].shape == (2,)
        metrics = policy_metrics(rows, MASK, -ADVANTAGES, chosen)
        assert float(metrics["clip_ratio/high_mean"]) == 0.5
        assert float(metrics["clip_ratio/high_max"]) == 1.0
        assert float(metrics["ratio/p50"]) == pytest.approx(2.5, abs=1e-5)


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    # log π - log π_ref = ln 2, so that d = -ln 2 and eᵈ = 1/2; the slope is d/d log π.
    [("k1", LN2, 1.0), ("k2", LN2**2 / 2, LN2), ("k3", 0.5 - 1 + LN2, 0.5)],
)
def test_kl_estimators_by_hand(estimator, value, slope):
    logprobs, ref = jnp.array([[-1.0]]), jnp.array([[-1.0 - LN2]])
    found = jax.value_and_grad(lambda x: kl(estimator, x, ref)[0, 0])(logprobs)
    assert float(found[0]) == pytest.approx(value, abs=1e-6)
    assert float(found[1][0, 0]) == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_is_added_to_tokens_without_loss_and_may_be_times_the_ratio(
    estimator, corrected
):
    # Entropy leaves token (1, 0) alone a loss: 4, of gradient 4. The reference is 1/2
    # as likely as the policy everywhere; ratios are 1, 2, 1/2 and 4.
    value, slope = {
        "k1": (LN2, 1.0),
        "k2": (LN2**2 / 2, LN2),
        "k3": (LN2 - 0.5, 0.5),
    }[estimator]
    chosen = options(
        beta=0.1,
        kl_estimator=estimator,
        use_bias_correction_kl=corrected,
        top_entropy_quantile=0.0,
    )
    loss, rows, grad = by_hand(chosen, ref=OLD + jnp.log(RATIOS) - LN2)
    weights = RATIOS * MASK if corrected else MASK
    total = float(jnp.sum(weights))
    assert float(loss) == pytest.approx(4.0 + 0.1 * value * total, abs=1e-5)
    # d(w k) = w (k' + k), for the ratio's own derivative is the ratio.
    each = 0.1 * weights * (slope + value if corrected else slope)
    np.testing.assert_allclose(grad, each.at[1, 0].add(4.0), rtol=0, atol=1e-5)
    found = policy_metrics(rows, MASK, ADVANTAGES, chosen)["kl"]
    assert float(found) == pytest.approx(value * total / 4, abs=1e-6)


def test_the_entropy_bonus_is_the_mean_over_tokens_with_a_loss():
    logprobs = OLD + jnp.log(RATIOS)

    def loss_fn(entropy, coefficient, share):
        chosen = options(entropy_coef=coefficient, top_entropy_quantile=share)
        return policy_loss(
            logprobs,
            entropy,
            ADVANTAGES,
            MASK,
            ONES,
            chosen,
            OLD,
            bonus_weight=0.5,
        )[0]

    # Entropies 1/2, 2, 1 and 3 of four tokens, in one of two micro-batches.
    plain = loss_fn(ENTROPY, 0.0, 1.0)
    bonus = plain - loss_fn(ENTROPY, 0.1, 1.0)
    assert float(bonus) == pytest.approx(0.1 * 0.5 * 6.5 / 4, abs=1e-6)
    grad = jax.grad(loss_fn)(ENTROPY, 0.1, 1.0)
    np.testing.assert_allclose(grad, -0.1 * 0.5 * MASK / 4, rtol=0, atol=1e-7)
    # Of the two highest alone: the threshold of share 1/2 is 1.5.
    grad = jax.grad(loss_fn)(ENTROPY, 0.1, 0.5)
    expected = [[0.0, -0.025, 0.0], [-0.025, 0.0, 0.0]]
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-7)


def test_quantiles_are_of_masked_in_values():
    values = jnp.array([[5.0, 1.0, 99.0], [-99.0, 2.0, 4.0]])
    mask = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    found = masked_quantiles(values, mask, (0.0, 0.25, 0.5, 0.9, 1.0))
    np.testing.assert_allclose(found, [1.0, 1.75, 3.0, 4.7, 5.0], rtol=1e-6)


LENGTHS = (3, 1, 0, 2)


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        # A row without tokens counts as a row; one with all of them, never ended, too.
        *((kind, [1 / 12, 1 / 4, 1 / 4, 1 / 8]) for kind in ("grpo", "sapo")),
        ("bnpo", [1 / 6] * 4),
        ("dr_grpo", [1 / 44] * 4),
        ("luspo", [1 / 4] * 4),
        *((kind, [1 / 13] * 4) for kind in ("dapo", "cispo", "vespo")),
    ],
)
def test_row_weights_by_hand(loss_type, expected):
    weights = row_weights(loss_type, LENGTHS, max_new_tokens=11, num_tokens=13)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-6)


@pytest.mark.parametrize("loss_type", NUM_CASES)
def test_rows_that_are_all_masked_have_finite_weights(loss_type):
    weights = row_weights(loss_type, [0, 0], max_new_tokens=5, num_tokens=0)
    assert np.isfinite(weights).all() and weights.shape == (2,)


def test_dr_grpo_by_hand():
    # The sums of the clipping test over 2 rows of at most 5 tokens.
    weights = row_weights("dr_grpo", [3, 1], max_new_tokens=5, num_tokens=4)
    loss, rows, _ = by_hand(options(loss_type="dr_grpo"), weights=jnp.asarray(weights))
    assert float(loss) == pytest.approx((-2.7 + 4.0) / 10, abs=1e-6)
    np.testing.assert_allclose(rows["policy_loss"], [-0.27, 0.4], rtol=0, atol=1e-6)


def test_micro_batches_add_up_to_the_batch():
    chosen = options(loss_type="grpo", beta=0.1)
    logprobs, ref = OLD + jnp.log(jnp.maximum(RATIOS, 0.1)), OLD + 0.3
    weights = jnp.asarray(row_weights("grpo", [3, 1], max_new_tokens=3, num_tokens=4))
    arrays = (logprobs, ENTROPY, ADVANTAGES, MASK, weights)
    step = jax.jit(partial(policy_loss, options=chosen))
    whole, rows = step(*arrays, old_logprobs=OLD, ref_logprobs=ref)
    parts = [
        step(
            *(x[i : i + 1] for x in arrays),
            old_logprobs=OLD[i : i + 1],
            ref_logprobs=ref[i : i + 1],
        )
        for i in range(2)
    ]
    assert float(whole) == pytest.approx(sum(float(p[0]) for p in parts), abs=1e-6)
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *(p[1] for p in parts))
    measure = jax.jit(policy_metrics, static_argnums=3)
    for name, value in measure(rows, MASK, ADVANTAGES, chosen).items():
        again = measure(joined, MASK, ADVANTAGES, chosen)[name]
        assert float(value) == pytest.approx(float(again), abs=1e-6), name


@pytest.mark.parametrize("loss_type", NUM_CASES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_all_masked_is_no_loss_and_no_nan(loss_type, level):
    chosen = options(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.1,
        top_entropy_quantile=0.5,
        entropy_coef=0.1,
    )
    nothing = jnp.zeros_like(MASK)
    bad = jnp.full_like(OLD, jnp.nan)
    weights = jnp.asarray(
        row_weights(loss_type, [0, 0], max_new_tokens=3, num_tokens=0)
    )
    loss, rows, grad = by_hand(
        chosen, logprobs=bad, mask=nothing, old=bad, ref=bad, weights=weights
    )
    assert float(loss) == 0.0
    np.testing.assert_array_equal(grad, 0.0)
    metrics = policy_metrics(rows, nothing, ADVANTAGES, chosen)
    of_rows = {"vespo/phi_seq_mean", "entropy_coef"}
    if level == "sequence":
        # Rows without tokens have a ratio of 1, and 1 is above cispo's cap.
        of_rows |= {"cispo_clip_ratio"}
    assert all(float(v) == 0.0 for k, v in metrics.items() if k not in of_rows)
    assert np.isfinite([float(v) for v in metrics.values()]).all()
    assert {f"ratio/{name}" for name in RATIO_QUANTILES} <= set(metrics)


def test_what_is_masked_changes_nothing():
    dirty = [x.at[1, 1].set(jnp.nan).at[1, 2].set(-jnp.inf) for x in (OLD, OLD + 0.5)]
    chosen = options(beta=0.1)
    clean = by_hand(chosen, logprobs=OLD + 0.1, ref=OLD + 0.5)
    found = by_hand(chosen, logprobs=dirty[0] + 0.1, old=dirty[0], ref=dirty[1])
    assert float(found[0]) == float(clean[0])
    np.testing.assert_array_equal(found[2], clean[2])


def test_a_completion_of_one_token_weighs_as_much_as_a_long_one_in_grpo():
    # EOS first: row 1 has one token. No old logprobs: ratio 1, gradient -A.
    weights = jnp.asarray(row_weights("grpo", [3, 1], max_new_tokens=3, num_tokens=4))
    loss, _, grad = by_hand(DEFAULTS, old=None, logprobs=OLD, weights=weights)
    assert float(loss) == pytest.approx(-0.5 + 0.5, abs=1e-6)
    np.testing.assert_allclose(
        grad, [[-1 / 6] * 3, [1 / 2, 0.0, 0.0]], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"loss_type": "ppo"},
            "trainer.loss_type='ppo' is unknown; choose one of grpo",
        ),
        ({"importance_sampling_level": "word"}, "importance_sampling_level='word'"),
        ({"kl_estimator": "k4"}, "trainer.kl_estimator='k4' is unknown"),
        ({"epsilon": -0.1}, "trainer.epsilon=-0.1 must be at least 0"),
        ({"epsilon_high": -0.1}, "trainer.epsilon_high=-0.1 must be at least 0"),
        ({"beta": math.nan}, "trainer.beta=nan must be at least 0"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile=1.5 must be in"),
        ({"delta": 1.1}, "trainer.delta=1.1 must be above 1 .* = 1.2"),
        ({"delta": 3.0, "loss_type": "cispo"}, "delta=3.0 does nothing with .*cispo"),
    ],
)
def test_wrong_options_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        options(**fields)


def test_beta_needs_a_reference():
    with pytest.raises(ValueError, match=r"trainer\.beta=0\.1 needs logprobs"):
        by_hand(options(beta=0.1))
