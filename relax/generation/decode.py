"""The jitted parts of generation: running a prompt, and a loop of decode steps."""

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
    """What belongs to each row for its whole life; any of `stop_ids` ends a row."""

    keys: Key[Array, "B"]
    params: SamplingParams
    ignore_eos: Bool[Array, "B"]
    stop_ids: Int[Array, "stops"]


class DecodeState(NamedTuple):
    """A batch between two tokens.

    cache: without `tokens`. tokens: each row's newest, not yet run through the model.
    remaining: how many more a row may get; 0 for a row that has ended. seen: the
    tokens of the row so far (None where no row has a repetition penalty). text: these
    in order, the newest at the cache's length (None where all n-grams may repeat).
    """

    cache: Cache
    tokens: Int[Array, "B"]
    remaining: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None
    text: Int[Array, "B S"] | None


class Steps(NamedTuple):
    """The jitted functions over one model; `cache` and `state` are donated.

    prefill(params, tokens [B, T], lengths [B], remaining [B], rows, *, capacity,
        filters) -> (state, the first tokens as a Choice of [B, 1] arrays)
    extend(params, cache, tokens [B, T], lengths [B], text [B, S], remaining [B], rows,
        *, filters) -> as prefill, for tokens that go on what the cache holds; `text`
        is all of it from the start, right-padded to the capacity S
    decode(params, state, rows, *, chunk, filters) -> (state, Choice of [B, chunk])

    A row that has ended repeats `PAD` to the end of its chunk.
    """

    prefill: Callable
    extend: Callable
    decode: Callable


PAD = -1


def make_steps(apply: Callable, config: LlamaConfig, num_ids: int) -> Steps:
    """Returns the steps for `apply`, which is what training differentiates.

    Only ids below `num_ids` are chosen: a model may have more than its tokenizer.
    """
    choose = partial(_choose, vocab_size=config.vocab_size, num_ids=num_ids)

    @partial(jax.jit, static_argnames="filters", donate_argnums=1)
    def extend(params, cache, tokens, lengths, text, remaining, rows, *, filters):
        out = apply(params, tokens, cache=cache, lengths=lengths)
        seen = None
        if filters.repetition_penalty:
            seen = _seen_in(text, out.cache.lengths, config)
        text = text if filters.no_repeat_ngram else None
        state = DecodeState(out.cache, tokens[:, 0], remaining, seen, text)
        last = jnp.take_along_axis(out.hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        state, choice = choose(last, out.unembedding, state, rows, filters)
        return state, jax.tree.map(lambda x: x[:, None], choice)

    @partial(jax.jit, static_argnames=("capacity", "filters"))
    def prefill(params, tokens, lengths, remaining, rows, *, capacity, filters):
        cache = empty_cache(config, tokens.shape[0], capacity)
        text = jnp.pad(tokens, ((0, 0), (0, capacity - tokens.shape[1])))
        return extend(
            params, cache, tokens, lengths, text, remaining, rows, filters=filters
        )

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

    return Steps(prefill, extend, decode)


def _choose(
    hidden, table, state: DecodeState, rows: Rows, filters, vocab_size, num_ids
):
    """Returns the state after each row's next token, and these tokens."""
    logits = compute_logits(hidden, table, vocab_size)
    choice = choose_tokens(
        logits,
        rows.keys,
        state.cache.lengths,
        rows.params,
        filters,
        state.seen,
        state.text,
        num_ids,
    )
    return _record(state, choice, rows)


def _record(state: DecodeState, choice: Choice, rows: Rows):
    """Returns the state after a choice, and the choice with ended rows padded."""
    alive = state.remaining > 0
    ended = jnp.isin(choice.tokens, rows.stop_ids) & ~rows.ignore_eos
    remaining = jnp.where(alive & ~ended, state.remaining - 1, 0)
    tokens = jnp.where(alive, choice.tokens, state.tokens)
    row, seen, text = jnp.arange(tokens.shape[0]), state.seen, state.text
    if seen is not None:
        seen = seen.at[row, tokens].set(True)
    if text is not None:
        text = text.at[row, state.cache.lengths].set(tokens, mode="drop")
    padded = choice._replace(tokens=jnp.where(alive, choice.tokens, PAD))
    return DecodeState(state.cache, tokens, remaining, seen, text), padded


def _seen_in(text, lengths, config: LlamaConfig) -> Bool[Array, "B V"]:
    """Returns which ids stand in each row's text, its padding left out."""
    real = jnp.arange(text.shape[1]) < lengths[:, None]
    rows = jnp.arange(text.shape[0])[:, None]
    seen = jnp.zeros((text.shape[0], config.padded_vocab_size), bool)
    return seen.at[rows, text].max(real)


@partial(jax.jit, static_argnames="capacity")
def grown(cache: Cache, capacity: int) -> Cache:
    """Returns the cache with `capacity` slots, the new ones empty."""
    more = ((0, 0), (0, 0), (0, capacity - cache.capacity), (0, 0), (0, 0))
    keys, values = jnp.pad(cache.keys, more), jnp.pad(cache.values, more)
    return cache._replace(keys=keys, values=values)
