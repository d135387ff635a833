"""The jitted steps: what they compute, and in how many parts they may compute it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from relax.model.llama import make_llama
from relax.ops.dropout import dropout as ops_dropout
from relax.steps import (
    Aux,
    init_state,
    make_eval_step,
    make_language_model_loss,
    make_logprob_step,
    make_train_step,
)

ROWS, LENGTH, WIDTH, VOCABULARY = 8, 13, 11, 67
SGD = optax.sgd(0.5)


class Output(NamedTuple):
    hidden: jax.Array
    unembedding: jax.Array


def bigram(params, tokens, *, dropout=0.0, dropout_key=None, **unused):
    """A model that compiles in no time: a token's logits depend on it alone."""
    params = params["bigram"]
    hidden = jnp.tanh(params["embed"][tokens] @ params["square"])
    return Output(ops_dropout(hidden, dropout, dropout_key), params["head"])


def bigram_params():
    """Returns parameters large enough for logits that differ."""
    rng = np.random.default_rng(0)
    shapes = {
        "embed": (VOCABULARY, WIDTH),
        "square": (WIDTH, WIDTH),
        "head": (VOCABULARY, WIDTH),
    }
    weights = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }
    return {"bigram": weights}


def loss_of(dropout: float = 0.0, z_loss_weight: float = 0.0):
    return make_language_model_loss(
        partial(bigram, dropout=dropout),
        VOCABULARY,
        z_loss_weight=z_loss_weight,
        max_logits=2**25,
    )


def random_batches(steps: int = 1):
    """Returns `[steps, B, T]` batches with weights from 0 to 1, whole rows of them 0.

    Rows 0 and 4 are the whole of one of four micro-batches.
    """
    rng = np.random.default_rng(1)
    tokens = rng.integers(VOCABULARY, size=(steps, ROWS, LENGTH + 1))
    mask = rng.uniform(size=(steps, ROWS, LENGTH)) * (rng.uniform(size=(ROWS, 1)) < 0.9)
    mask[:, [0, 3, 4]] = 0.0
    mask[:, 1, 2:] = 0.0
    return {
        "tokens": jnp.asarray(tokens[..., :-1], jnp.int32),
        "targets": jnp.asarray(tokens[..., 1:], jnp.int32),
        "loss_mask": jnp.asarray(mask, jnp.float32),
    }


def one_batch(batches, index: int = 0):
    return jax.tree.map(lambda x: x[index], batches)


def run(loss_fn, batches, optimizer=SGD, *, seed=0, accumulation=1):
    """Returns the state and the metrics `[steps]` after all batches in one dispatch."""
    step = make_train_step(loss_fn, optimizer, seed=seed, accumulation=accumulation)
    return step(init_state(bigram_params(), optimizer), batches)


def assert_close(one, other, **tolerances):
    jax.tree.map(partial(np.testing.assert_allclose, **tolerances), one, other)


def largest_difference(one, other) -> float:
    differences = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), one, other)
    return max(map(float, jax.tree.leaves(differences)))


@pytest.fixture(scope="module")
def logits():
    """The logits of the first batch, before any step."""
    out = bigram(bigram_params(), one_batch(random_batches())["tokens"])
    return out.hidden @ out.unembedding.T


def test_metrics_are_means_over_the_mask(logits):
    batch = one_batch(random_batches())
    state, metrics = run(loss_of(), random_batches())
    mask = batch["loss_mask"]
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, batch["targets"][..., None], -1)[..., 0]
    correct = logits.argmax(-1) == batch["targets"]
    targets = mask > 0
    assert metrics["loss"][0] == pytest.approx(-(chosen * mask).sum() / targets.sum())
    accuracy = (correct * targets).sum() / targets.sum()
    assert metrics["mean_token_accuracy"][0] == pytest.approx(accuracy)
    leaves = jax.tree.leaves(state.params)
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in leaves))
    assert metrics["param_norm"][0] == pytest.approx(norm)
    assert set(metrics) == {"loss", "mean_token_accuracy", "grad_norm", "param_norm"}
    assert {value.shape for value in metrics.values()} == {(1,)}


def test_a_step_goes_down_the_gradient_of_the_mean():
    loss_fn, batch = loss_of(), one_batch(random_batches())

    def mean(params):
        loss, (sums, _) = loss_fn(params, batch, None)
        return loss / sums["weight"]

    before = bigram_params()
    gradient = jax.grad(mean)(before)
    state, metrics = run(loss_fn, random_batches())
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, before, gradient)
    assert_close(state.params, expected, rtol=1e-5, atol=1e-6)
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(gradient)))
    assert metrics["grad_norm"][0] == pytest.approx(norm, rel=1e-5)
    assert int(state.step) == 1


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_equals_the_big_batch(accumulation):
    whole, whole_metrics = run(loss_of(), random_batches(2))
    parts, metrics = run(loss_of(), random_batches(2), accumulation=accumulation)
    assert_close(parts.params, whole.params, rtol=1e-5, atol=1e-6)
    assert_close(metrics, whole_metrics, rtol=1e-5)


def test_a_mean_of_means_would_be_caught():
    loss_fn = loss_of()

    def mean_loss(params, batch, key):
        loss, (sums, _) = loss_fn(params, batch, key)
        weight = jnp.maximum(sums["weight"], 1.0)
        return loss / weight, Aux({"loss": loss / weight, "weight": jnp.ones(())})

    whole, whole_metrics = run(mean_loss, random_batches())
    parts, metrics = run(mean_loss, random_batches(), accumulation=4)
    assert abs(float(metrics["loss"][0] - whole_metrics["loss"][0])) > 1e-2
    assert largest_difference(parts.params, whole.params) > 1e-3


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_batch_without_targets_changes_nothing(accumulation):
    batches = random_batches()
    batches["loss_mask"] = jnp.zeros_like(batches["loss_mask"])
    state, metrics = run(loss_of(), batches, accumulation=accumulation)
    assert_close(state.params, bigram_params(), rtol=0)
    assert (metrics["loss"][0], metrics["grad_norm"][0]) == (0.0, 0.0)


def test_steps_of_one_dispatch_equal_single_ones():
    optimizer, batches = optax.adam(0.03), random_batches(3)
    together, metrics = run(loss_of(dropout=0.3), batches, optimizer)
    step = make_train_step(loss_of(dropout=0.3), optimizer, seed=0)
    state, losses = init_state(bigram_params(), optimizer), []
    for index in range(3):
        only = jax.tree.map(lambda x, i=index: x[i : i + 1], batches)
        state, one = step(state, only)
        losses.append(one["loss"][0])
    np.testing.assert_array_equal(metrics["loss"], losses)
    assert_close(together, state, rtol=0)
    assert int(state.step) == 3


def test_the_state_given_is_donated():
    optimizer = optax.adam(0.03)
    given = init_state(bigram_params(), optimizer)
    make_train_step(loss_of(), optimizer, seed=0)(given, random_batches())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))


def drawn_numbers(seed: int, steps: int, accumulation: int) -> np.ndarray:
    """Returns what the micro-batches of every step draw `[steps, parts]`."""

    def loss_fn(params, batch, key):
        part = batch["part"][0]
        drawn = jnp.zeros(accumulation).at[part].set(jax.random.uniform(key))
        sums = {"drawn": drawn, "weight": jnp.ones(()) / accumulation}
        return jnp.sum(params["one"]["w"]), Aux(sums)

    rows = jnp.arange(ROWS) % accumulation
    batches = {"part": jnp.broadcast_to(rows, (steps, ROWS))}
    step = make_train_step(loss_fn, SGD, seed=seed, accumulation=accumulation)
    params = {"one": {"w": jnp.zeros(2)}}
    _, metrics = step(init_state(params, SGD), batches)
    return np.asarray(metrics["drawn"])


def test_every_step_and_micro_batch_has_a_key_of_its_own():
    drawn = drawn_numbers(seed=0, steps=3, accumulation=4)
    assert len(np.unique(drawn)) == 12
    np.testing.assert_array_equal(drawn, drawn_numbers(0, 3, 4))
    np.testing.assert_array_equal(drawn[:2], drawn_numbers(0, 2, 4))
    assert not np.intersect1d(drawn, drawn_numbers(5, 3, 4)).size


def test_the_largest_seed_is_one():
    assert drawn_numbers(seed=2**32 - 1, steps=1, accumulation=1).size == 1


def test_dropout_acts_in_training_alone():
    batches = random_batches()
    _, without = run(loss_of(), batches)
    _, seeded = run(loss_of(dropout=0.3), batches, seed=0)
    _, otherwise = run(loss_of(dropout=0.3), batches, seed=1)
    losses = [float(each["loss"][0]) for each in (without, seeded, otherwise)]
    assert len({round(loss, 3) for loss in losses}) == 3
    sums = make_eval_step(loss_of(dropout=0.3))(bigram_params(), one_batch(batches))
    assert float(sums["loss"] / sums["weight"]) == pytest.approx(losses[0], rel=1e-6)


def test_the_loss_of_one_batch_falls_to_nearly_nothing(make_config):
    """The only one with a Llama: a loss that no bigram can reach."""
    model = make_llama(make_config(num_hidden_layers=1))
    loss_fn = make_language_model_loss(
        model.apply, VOCABULARY, z_loss_weight=0.0, max_logits=2**25
    )
    optimizer = optax.adam(0.01)
    batches = random_batches()
    batches["loss_mask"] = (batches["loss_mask"] > 0).astype(jnp.float32)
    batches = jax.tree.map(lambda x: jnp.repeat(x, 120, axis=0), batches)
    params = jax.jit(model.init)(jax.random.key(0), batches["tokens"][0])
    step = make_train_step(loss_fn, optimizer, seed=0)
    _, metrics = step(init_state(params, optimizer), batches)
    assert metrics["loss"][0] > 3.0
    assert metrics["loss"][-1] < 0.05
    assert metrics["mean_token_accuracy"][-1] == pytest.approx(1.0)


def test_z_loss_adds_its_gradient():
    batch, before = one_batch(random_batches()), bigram_params()

    def mean_square(params):
        out = bigram(params, batch["tokens"])
        squares = jax.nn.logsumexp(out.hidden @ out.unembedding.T, axis=-1) ** 2
        return jnp.sum(squares * batch["loss_mask"]) / jnp.sum(batch["loss_mask"] > 0)

    plain, without = run(loss_of(), random_batches())
    state, metrics = run(loss_of(z_loss_weight=0.1), random_batches())
    added = jax.tree.map(
        lambda p, g: p - 0.5 * 0.1 * g, plain.params, jax.grad(mean_square)(before)
    )
    assert_close(state.params, added, rtol=1e-4, atol=1e-5)
    assert metrics["z_loss"][0] == pytest.approx(float(mean_square(before)), rel=1e-5)
    # The reported loss stays the cross entropy.
    assert metrics["loss"][0] == pytest.approx(without["loss"][0])
    assert largest_difference(state.params, plain.params) > 1e-2


def test_eval_sums_add_up_over_the_rows():
    step, batch = make_eval_step(loss_of()), one_batch(random_batches())
    params = bigram_params()
    halves = [jax.tree.map(lambda x, s=s: x[s::2], batch) for s in (0, 1)]
    parts = [step(params, half) for half in halves]
    whole = step(params, batch)
    assert set(whole) == {"loss", "weight", "mean_token_accuracy"}
    assert_close(jax.tree.map(jnp.add, *parts), whole, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_scaled_logits(temperature, logits):
    batch = one_batch(random_batches())
    step = make_logprob_step(bigram, VOCABULARY, temperature=temperature)
    logprobs = step(bigram_params(), batch["tokens"], batch["targets"])
    expected = jax.nn.log_softmax(logits / temperature)
    chosen = jnp.take_along_axis(expected, batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(logprobs, chosen, rtol=1e-5, atol=1e-5)
