"""The jitted halves of generation: prefill, and a loop of decode steps."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from relax.model.cache import Cache, empty_cache
from relax.model.config import LlamaConfig
from relax.ops.logprobs import compute_logits
from relax.sampling import Choice, SamplingParams, choose_tokens


class Rows(NamedTuple):
    """What belongs to each row for its whole life."""

    keys: Key[Array, "B"]
    params: SamplingParams
    ignore_eos: Bool[Array, "B"]


class DecodeState(NamedTuple):
    """A batch between two tokens.

    cache: without `tokens`. tokens: each row's newest, not yet run through the model.
    remaining: how many more a row may get; 0 for a row that has ended. seen: the
    tokens of the row so far (None where no row has a repetition penalty).
    """

    cache: Cache
    tokens: Int[Array, "B"]
    remaining: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None


class Steps(NamedTuple):
    """The jitted functions over one model; `state` is donated.

    prefill(params, tokens [B, T], lengths [B], remaining [B], rows, *, capacity,
        filters) -> (state, the first tokens as a Choice of [B, 1] arrays)
    decode(params, state, rows, *, chunk, filters) -> (state, Choice of [B, chunk])

    A row that has ended repeats `PAD` to the end of its chunk.
    """

    prefill: Callable
    decode: Callable


PAD = -1


def make_steps(
    apply: Callable, config: LlamaConfig, stop_ids: tuple[int, ...], num_ids: int
) -> Steps:
    """Returns prefill and decode for `apply`, which is what training differentiates.

    Only ids below `num_ids` are chosen: a model may have more than its tokenizer.
    """

    def choose(out_hidden, table, state, rows, filters):
        logits = compute_logits(out_hidden, table, config.vocab_size)
        positions = state.cache.lengths
        choice = choose_tokens(
            logits, rows.keys, positions, rows.params, filters, state.seen, num_ids
        )
        return _record(state, choice, rows, stop_ids)

    @partial(jax.jit, static_argnames=("capacity", "filters"))
    def prefill(params, tokens, lengths, remaining, rows, *, capacity, filters):
        cache = empty_cache(config, tokens.shape[0], capacity)
        out = apply(params, tokens, cache=cache, lengths=lengths)
        seen = _seen_in(tokens, lengths, config) if filters.repetition_penalty else None
        state = DecodeState(out.cache, tokens[:, 0], remaining, seen)
        last = jnp.take_along_axis(out.hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        state, choice = choose(last, out.unembedding, state, rows, filters)
        return state, jax.tree.map(lambda x: x[:, None], choice)

    @partial(jax.jit, static_argnames=("chunk", "filters"), donate_argnums=1)
    def decode(params, state, rows, *, chunk, filters):
        B = state.tokens.shape[0]
        empty = Choice(
            jnp.full((B, chunk), PAD), jnp.zeros((B, chunk)), jnp.zeros((B, chunk))
        )

        def running(carry):
            index, state, _ = carry
            return (index < chunk) & jnp.any(state.remaining > 0)

        def step(carry):
            index, state, choices = carry
            alive = (state.remaining > 0).astype(jnp.int32)
            tokens = state.tokens[:, None]
            out = apply(params, tokens, cache=state.cache, lengths=alive)
            state = state._replace(cache=out.cache)
            state, choice = choose(
                out.hidden[:, 0], out.unembedding, state, rows, filters
            )
            choices = jax.tree.map(
                lambda xs, x: xs.at[:, index].set(x), choices, choice
            )
            return index + 1, state, choices

        _, state, choices = jax.lax.while_loop(running, step, (0, state, empty))
        return state, choices

    return Steps(prefill, decode)


def _record(state: DecodeState, choice: Choice, rows: Rows, stop_ids):
    """Returns the state after a choice, and the choice with ended rows padded."""
    alive = state.remaining > 0
    ended = jnp.isin(choice.tokens, jnp.asarray(stop_ids, jnp.int32)) & ~rows.ignore_eos
    remaining = jnp.where(alive & ~ended, state.remaining - 1, 0)
    tokens = jnp.where(alive, choice.tokens, state.tokens)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(tokens.shape[0]), tokens].set(True)
    padded = choice._replace(tokens=jnp.where(alive, choice.tokens, PAD))
    return state._replace(tokens=tokens, remaining=remaining, seen=seen), padded


def _seen_in(tokens, lengths, config: LlamaConfig) -> Bool[Array, "B V"]:
    """Returns which ids stand in each row's prompt, its padding left out."""
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    rows = jnp.arange(tokens.shape[0])[:, None]
    seen = jnp.zeros((tokens.shape[0], config.padded_vocab_size), bool)
    return seen.at[rows, tokens].max(real)
