"""The jitted steps that every trainer shares."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from relax.losses import cross_entropy, z_loss
from relax.ops.logprobs import compute_logits, token_stats

Batch = Mapping[str, Array]
Sums = dict[str, Array]
LossFn = Callable[[Any, Batch, Array | None], tuple[Array, Sums]]


class TrainState(NamedTuple):
    """All that a run needs to go on: steps done, parameters, optimizer."""

    step: Array
    params: Any
    opt_state: Any


def init_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_language_model_loss(
    apply: Callable, vocab_size: int, *, z_loss_weight: float, max_logits: int
) -> LossFn:
    """Returns the loss of next-token prediction, summed over a batch's loss mask.

    The function takes parameters, a batch (`tokens, targets, loss_mask` `[B, T]`, and
    `segment_ids` where rows are packed) and a dropout key (None: no dropout). It gives
    the sum to be minimised and sums of metrics, `weight` (the mask's sum) among them.
    """

    def loss_fn(params, batch, key):
        out = apply(
            params,
            batch["tokens"],
            segment_ids=batch.get("segment_ids"),
            dropout_key=key,
        )
        stats = token_stats(
            out.hidden,
            out.unembedding,
            batch["targets"],
            vocab_size,
            max_logits=max_logits,
        )
        mask = batch["loss_mask"]
        loss, weight = cross_entropy(stats.logprobs, mask)
        accuracy = jnp.sum(stats.correct * mask)
        sums = {"loss": loss, "weight": weight, "accuracy": accuracy}
        if z_loss_weight:
            sums["z_loss"] = z_loss(stats, mask)
            loss = loss + z_loss_weight * sums["z_loss"]
        return loss, sums

    return loss_fn


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    accumulation: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Returns the jitted `(state, batches) -> (state, metrics)`; `state` is donated.

    `batches` has leaves `[steps, B, ...]`; the steps run one after another in one
    dispatch and each metric comes back as `[steps]`. With `accumulation`, gradients of
    B / accumulation rows at a time are summed, and divided by the weight of all rows:
    the loss is the big batch's whatever the masks. A step's dropout key is folded from
    (seed, step, micro-batch).
    """

    def one_step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        grads, sums = _summed_grads(loss_fn, state.params, batch, key, accumulation)
        weight = jnp.where(sums["weight"] > 0.0, sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {name: s / weight for name, s in sums.items() if name != "weight"}
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["param_norm"] = optax.tree.norm(params)
        return TrainState(state.step + 1, params, opt_state), metrics

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batches: Batch):
        return jax.lax.scan(one_step, state, batches)

    return train_step


def _summed_grads(loss_fn, params, batch, key, accumulation):
    """Returns gradients and metric sums of all rows, in `accumulation` parts."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if accumulation == 1:
        return grad_fn(params, batch, key)

    def split(x):
        # Rows are dealt out in turn, so that every part keeps the batch's sharding.
        parts = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:])
        return jnp.moveaxis(parts, 1, 0)

    def add(total, inputs):
        index, part = inputs
        part_grads = grad_fn(params, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, part_grads), None

    parts = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(grad_fn, params, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, (jnp.arange(accumulation), parts))[0]


def make_eval_step(loss_fn: LossFn) -> Callable[[Any, Batch], Sums]:
    """Returns the jitted `(params, batch) -> sums`, with dropout off."""
    return jax.jit(lambda params, batch: loss_fn(params, batch, None)[1])


def make_logprob_step(
    apply: Callable,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    max_logits: int = 2**25,
) -> Callable[[Any, Array, Array], Array]:
    """Returns the jitted `(params, tokens, targets) -> logprobs`, all `[B, T]`."""

    @jax.jit
    def logprob_step(params, tokens, targets):
        out = apply(params, tokens)
        return token_stats(
            out.hidden,
            out.unembedding,
            targets,
            vocab_size,
            temperature=temperature,
            max_logits=max_logits,
        ).logprobs

    return logprob_step


def make_logits_step(
    apply: Callable, vocab_size: int
) -> Callable[[Any, Array, Mapping[str, Array]], Array]:
    """Returns the jitted `(params, tokens, inputs) -> logits`, float32 `[B, T, V]`.

    `inputs` are further arguments of `apply`, by name.
    """

    @jax.jit
    def logits_step(params, tokens, inputs):
        out = apply(params, tokens, **inputs)
        return compute_logits(out.hidden, out.unembedding, vocab_size)[..., :vocab_size]

    return logits_step


def make_capture_step(
    apply: Callable,
) -> Callable[[Any, tuple[str, ...], Array, Mapping[str, Array]], dict[str, Array]]:
    """Returns the jitted `(params, sites, tokens, inputs) -> values by site`.

    Sites are those of a layer, `[L, B, ...]`, and `final_norm`, `[B, T, D]`.
    """

    @partial(jax.jit, static_argnums=1)
    def capture_step(params, sites, tokens, inputs):
        in_layers = tuple(site for site in sites if site != "final_norm")
        out = apply(params, tokens, capture=in_layers, **inputs)
        final = {"final_norm": out.hidden} if "final_norm" in sites else {}
        return dict(out.captured) | final

    return capture_step


def visibility(tokens, lengths, attention_mask) -> dict[str, Array]:
    """Returns the inputs of `apply` that say what is padding and what is seen.

    lengths: tokens per right-padded row `[B]`, or None. attention_mask: `[B, T]`, which
    tokens are no padding, `[B, T, T]`, which of them each one sees, or None. Raises
    ValueError for another shape.
    """
    B, T = tokens.shape
    inputs = {}
    if lengths is not None:
        inputs["key_valid"] = jnp.arange(T) < jnp.asarray(lengths)[:, None]
    if attention_mask is None:
        return inputs
    given = jnp.asarray(attention_mask).astype(bool)
    if given.shape == (B, T):
        inputs["key_valid"] = inputs.get("key_valid", True) & given
        inputs["positions"] = jnp.maximum(jnp.cumsum(given, axis=1) - 1, 0)
    elif given.shape == (B, T, T):
        inputs["mask"] = given[:, None]
    else:
        raise ValueError(
            f"attention_mask has shape {given.shape}; for tokens {(B, T)} give "
            f"{(B, T)} or {(B, T, T)}"
        )
    return inputs
