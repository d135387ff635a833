"""The jitted steps that every trainer shares."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from relax.losses import cross_entropy, smoothed_cross_entropy, target_mask, z_loss
from relax.model.lora import join, split_trainable
from relax.ops.logprobs import TokenStats, compute_logits, mean_logits, token_stats
from relax.policy_losses import PolicyOptions, policy_loss, policy_metrics

# TRL 1.16's name for |logprob of the rollout - logprob of training|.
MISMATCH = "sampling/sampling_logp_difference"

Batch = Mapping[str, Array]
Sums = dict[str, Array]


class Aux(NamedTuple):
    """What a loss tells besides itself.

    sums: metrics, summed over the rows, and `weight`, what they are divided by. rows:
    arrays `[B, ...]` for metrics that are no sums.
    """

    sums: Sums
    rows: Mapping[str, Array] = {}


LossFn = Callable[[Any, Batch, Array | None], tuple[Array, Aux]]


class TrainState(NamedTuple):
    """All that a run needs to go on: steps done, parameters, optimizer.

    With LoRA `opt_state` is of the adapters alone. extra: what a trainer keeps besides.
    """

    step: Array
    params: Any
    opt_state: Any
    extra: Any = {}


def init_state(
    params, optimizer: optax.GradientTransformation, extra: Any = None
) -> TrainState:
    """Returns the state before the first step."""
    opt_state = optimizer.init(split_trainable(params)[0])
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, opt_state, {} if extra is None else extra)


def make_language_model_loss(
    apply: Callable,
    vocab_size: int,
    *,
    z_loss_weight: float,
    max_logits: int,
    label_smoothing: float = 0.0,
    neftune_alpha: float = 0.0,
    with_entropy: bool = False,
) -> LossFn:
    """Returns the loss of next-token prediction, summed over a batch's loss mask.

    The function takes parameters, a batch (`tokens, targets, loss_mask` `[B, T]`, and
    `segment_ids` where rows are packed) and a dropout key (None: no dropout, and no
    noise on the embeddings). It gives the sum to be minimised and sums of metrics,
    `weight` (how many targets, whatever they weigh) among them. `loss` is the cross
    entropy alone, and accuracy and entropy are of every target alike.
    """

    def loss_fn(params, batch, key):
        out = apply(
            params,
            batch["tokens"],
            segment_ids=batch.get("segment_ids"),
            dropout_key=key,
            neftune_alpha=neftune_alpha,
        )
        table, mask = out.unembedding, batch["loss_mask"]
        stats = token_stats(
            out.hidden, table, batch["targets"], vocab_size, max_logits=max_logits
        )
        loss, weight = cross_entropy(stats.logprobs, mask)
        targets = target_mask(mask)
        sums = {
            "loss": loss,
            "weight": weight,
            "mean_token_accuracy": jnp.sum(stats.correct * targets),
        }
        if with_entropy:
            sums["entropy"] = jnp.sum(stats.entropy * targets)
        if label_smoothing and key is not None:
            mean = mean_logits(out.hidden, table, vocab_size)
            loss = smoothed_cross_entropy(stats, mean, mask, label_smoothing)
        if z_loss_weight:
            sums["z_loss"] = z_loss(stats, mask)
            loss = loss + z_loss_weight * sums["z_loss"]
        return loss, Aux(sums)

    return loss_fn


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    accumulation: int = 1,
    summarize: Callable[[Mapping[str, Array]], Sums] = lambda rows: {},
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """Returns the jitted `(state, batches) -> (state, metrics)`; `state` is donated.

    `batches` has leaves `[steps, B, ...]`; the steps run one after another in one
    dispatch and each metric comes back as `[steps]`. With `accumulation`, gradients of
    B / accumulation rows at a time are summed, and divided by the weight of all rows:
    the loss is the big batch's whatever the masks. Where there are LoRA adapters, they
    alone are trained. A step's dropout key is folded from (seed, step, micro-batch).
    summarize: makes metrics of the loss's `rows`, all of the step's.
    """

    def one_step(state: TrainState, batch: Batch):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        trainable, frozen = split_trainable(state.params)

        def loss_of(trainable, part, key):
            return loss_fn(join(trainable, frozen), part, key)

        grads, aux = _summed_grads(loss_of, trainable, batch, key, accumulation)
        sums = aux.sums
        weight = jnp.where(sums["weight"] > 0.0, sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        metrics = {name: s / weight for name, s in sums.items() if name != "weight"}
        metrics |= summarize(aux.rows)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["param_norm"] = optax.tree.norm(trainable)
        params = join(trainable, frozen)
        return TrainState(state.step + 1, params, opt_state, state.extra), metrics

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batches: Batch):
        return jax.lax.scan(one_step, state, batches)

    return train_step


def _summed_grads(loss_fn, params, batch, key, accumulation):
    """Returns gradients and the Aux of all rows, in `accumulation` parts."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if accumulation == 1:
        return grad_fn(params, batch, key)

    def split(x):
        # Rows are dealt out in turn, so that every part keeps the batch's sharding.
        parts = x.reshape(x.shape[0] // accumulation, accumulation, *x.shape[1:])
        return jnp.moveaxis(parts, 1, 0)

    def rejoin(parts):
        return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])

    def add(total, inputs):
        index, part = inputs
        grads, aux = grad_fn(params, part, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, (grads, aux.sums)), aux.rows

    parts = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], parts)
    grads, aux = jax.eval_shape(grad_fn, params, first, key)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (grads, aux.sums))
    (grads, sums), rows = jax.lax.scan(add, zeros, (jnp.arange(accumulation), parts))
    return grads, Aux(sums, jax.tree.map(rejoin, rows))


def make_eval_step(loss_fn: LossFn) -> Callable[[Any, Batch], Sums]:
    """Returns the jitted `(params, batch) -> sums`, with dropout off."""
    return jax.jit(lambda params, batch: loss_fn(params, batch, None)[1].sums)


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


def completion_stats(
    apply: Callable,
    params: Any,
    batch: Batch,
    num_ids: int,
    *,
    temperature: float,
    max_logits: int,
) -> TokenStats:
    """Returns what softmax(logits / temperature) says of the completions, `[B, C]`.

    Rows of `tokens` `[B, T]` hold a prompt of `prompt_lengths` `[B]` tokens, then the
    completion, which stands alone in `completions` `[B, C]`. support: the ids among
    which each token was drawn, as packed bits `[B, C, rows / 8]`, where not all were.
    """
    out = apply(params, batch["tokens"])
    C, T = batch["completions"].shape[1], batch["tokens"].shape[1]
    places = jnp.minimum(batch["prompt_lengths"][:, None] - 1 + jnp.arange(C), T - 1)
    hidden = jnp.take_along_axis(out.hidden, places[..., None], axis=1)
    return token_stats(
        hidden,
        out.unembedding,
        batch["completions"],
        num_ids,
        temperature=temperature,
        max_logits=max_logits,
        support=batch.get("support"),
    )


def make_completion_step(
    apply: Callable, num_ids: int, *, temperature: float, max_logits: int
) -> Callable[[Any, Batch], Array]:
    """Returns the jitted `(params, batch) -> logprobs` of `completion_stats`."""

    @jax.jit
    def completion_step(params, batch):
        return completion_stats(
            apply,
            params,
            batch,
            num_ids,
            temperature=temperature,
            max_logits=max_logits,
        ).logprobs

    return completion_step


def make_policy_loss(
    apply: Callable,
    num_ids: int,
    options: PolicyOptions,
    *,
    temperature: float,
    max_logits: int,
    accumulation: int = 1,
) -> LossFn:
    """Returns the loss of policy optimisation on completions that were sampled.

    Besides what `completion_stats` reads, a batch holds `completion_mask` and
    `loss_mask` `[B, C]`, `rollout_logprobs` `[B, C]` (as drawn), `advantages` and
    `row_weights` `[B]` (which sum a step's rows up to its loss), and where needed
    `old_logprobs` and `ref_logprobs` `[B, C]`. Without old ones, the step is the first
    with the rollout's parameters, and they are this step's own. The rows for
    `policy_summary` come back.
    """

    def loss_fn(params, batch, key):
        del key  # no dropout: what samples is what trains
        stats = completion_stats(
            apply,
            params,
            batch,
            num_ids,
            temperature=temperature,
            max_logits=max_logits,
        )
        old = batch.get("old_logprobs")
        loss, rows = policy_loss(
            stats.logprobs,
            stats.entropy,
            batch["advantages"],
            batch["loss_mask"],
            batch["row_weights"],
            options,
            old_logprobs=old,
            ref_logprobs=batch.get("ref_logprobs"),
            bonus_weight=1.0 / accumulation,
        )
        known = jax.lax.stop_gradient(stats.logprobs if old is None else old)
        apart = jnp.abs(known - batch["rollout_logprobs"]) * batch["completion_mask"]
        names = ("completion_mask", "loss_mask", "advantages")
        rows |= {"mismatch": apart, **{name: batch[name] for name in names}}
        sums = {"loss": loss, "weight": jnp.float32(1.0 / accumulation)}
        return loss, Aux(sums, jax.lax.stop_gradient(rows))

    return loss_fn


def policy_summary(options: PolicyOptions) -> Callable[[Mapping[str, Array]], Sums]:
    """Returns the function from all rows of a step to its metrics.

    Those of `losses.policy_metrics`, and how far the logprobs of rollout and training
    are apart, `sampling/sampling_logp_difference/{mean,max}`.
    """

    def summarize(rows: Mapping[str, Array]) -> Sums:
        count = jnp.maximum(jnp.sum(rows["completion_mask"]), 1.0)
        metrics = policy_metrics(rows, rows["loss_mask"], rows["advantages"], options)
        return metrics | {
            f"{MISMATCH}/mean": jnp.sum(rows["mismatch"]) / count,
            f"{MISMATCH}/max": jnp.max(rows["mismatch"]),
        }

    return summarize
