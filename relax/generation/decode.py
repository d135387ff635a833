"""The jitted parts of generation: filling a cache, and a loop of decode steps."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from relax.generation.drafts import draft_tokens
from relax.model.cache import Cache, copy_slots, empty_cache
from relax.model.config import LlamaConfig
from relax.model.context import Constrain, unconstrained
from relax.ops.logprobs import compute_logits
from relax.sampling import (
    Choice,
    Filters,
    SamplingParams,
    TextState,
    append,
    choose_tokens,
    row_key,
    start_text,
)


class Rows(NamedTuple):
    """What the host says of each row of the cache at the start of a dispatch.

    text: prompt and completion so far; the cache holds all of it but the newest token.
    remaining: how many more tokens a row may get; 0 for one that is idle. seeds,
    inputs, samples: what its random key is folded from. Any of `stop_ids` ends a row.
    logit_bias: what is added to the logits of every row, None for nothing.
    """

    text: Int[Array, "B S"]
    lengths: Int[Array, "B"]
    prompt_lengths: Int[Array, "B"]
    remaining: Int[Array, "B"]
    seeds: UInt[Array, "B"]
    inputs: UInt[Array, "B"]
    samples: UInt[Array, "B"]
    ignore_eos: Bool[Array, "B"]
    params: SamplingParams
    stop_ids: Int[Array, "stops"]
    logit_bias: Float[Array, "V"] | None


class Made(NamedTuple):
    """What a dispatch made: the first `counts[b]` columns of row b.

    choices: `[B, W, ...]`. remaining: as in Rows, after it. drafted, accepted: tokens
    that were guessed, and guessed right.
    """

    choices: Choice
    counts: Int[Array, "B"]
    remaining: Int[Array, "B"]
    drafted: Int[Array, ""]
    accepted: Int[Array, ""]


class Steps(NamedTuple):
    """The jitted functions over one model; `cache` is donated and comes back.

    new_cache(batch_size, capacity) -> cache
    prefill(params, cache, tokens [P, T], rows [P], starts [P], lengths [P]) -> cache:
        tokens go to the slots of their row from `starts` on. With as many as the cache
        has rows these are its rows in order; a row that the cache lacks is padding
    copy(cache, pairs [B, 3], count) -> cache: for each of the first `count` pairs, in
        order, (source, target, length): a row's first slots in another row
    decode(params, cache, rows, limit, patience, *, chunk, drafts, filters) -> (cache,
        Made): until a row has `limit` more tokens, at most `chunk`, or `patience` rows
        have ended. drafts: how many tokens are guessed at a time, 0 for none
    programs: () -> how many programs were compiled so far
    """

    new_cache: Callable
    prefill: Callable
    copy: Callable
    decode: Callable
    programs: Callable[[], int]


def make_steps(
    apply: Callable,
    config: LlamaConfig,
    num_ids: int,
    constrain: Constrain = unconstrained,
) -> Steps:
    """Returns the steps for `apply`, which is what training differentiates.

    Only ids below `num_ids` are chosen: a model may have more than its tokenizer.
    """
    traced = []

    @partial(jax.jit, static_argnames=("batch_size", "capacity"))
    def new_cache(batch_size, capacity):
        traced.append("new_cache")
        return constrain_cache(empty_cache(config, batch_size, capacity), constrain)

    @partial(jax.jit, donate_argnums=1)
    def prefill(params, cache, tokens, rows, starts, lengths):
        traced.append("prefill")
        if len(tokens) == len(cache.lengths):
            cache, some = cache._replace(lengths=starts), {}
        else:
            before = cache.lengths.at[rows].set(starts, mode="drop")
            cache, some = cache._replace(lengths=before), {"cache_rows": rows}
        out = apply(params, tokens, cache=cache, lengths=lengths, **some)
        return constrain_cache(out.cache, constrain)

    @partial(jax.jit, donate_argnums=0)
    def copy(cache, pairs, count):
        traced.append("copy")

        def step(index, cache):
            return copy_slots(cache, *pairs[index])

        return constrain_cache(jax.lax.fori_loop(0, count, step, cache), constrain)

    @partial(jax.jit, static_argnames=("chunk", "drafts", "filters"), donate_argnums=1)
    def decode(params, cache, rows, limit, patience, *, chunk, drafts, filters):
        traced.append("decode")
        run = partial(apply, params)
        loop = _Loop(run, config, num_ids, rows, chunk, drafts, filters)
        cache, made = loop.run(cache, limit, patience)
        return constrain_cache(cache, constrain), made

    return Steps(new_cache, prefill, copy, decode, lambda: len(traced))


def constrain_cache(cache: Cache, constrain: Constrain) -> Cache:
    """Returns the cache laid out over devices by rows and heads."""

    def of(buffer):
        layers = (None,) * (buffer.ndim - 4)
        return constrain(buffer, (*layers, "batch", "kv_heads", None, None))

    keys, values = jax.tree.map(of, (cache.keys, cache.values))
    return cache._replace(keys=keys, values=values)


class _Carry(NamedTuple):
    cache: Cache
    text: TextState
    made: Made


class _Loop:
    """Decode steps over the rows of one dispatch, as traced."""

    def __init__(self, apply, config, num_ids, rows: Rows, chunk, drafts, filters):
        self._apply, self._config, self._num_ids = apply, config, num_ids
        self._rows, self._filters = rows, filters
        self._width, self._drafts = chunk + drafts, drafts
        self._keys = jax.vmap(row_key)(rows.seeds, rows.inputs, rows.samples)

    def run(self, cache: Cache, limit, patience) -> tuple[Cache, Made]:
        rows = self._rows
        idle = jnp.sum(rows.remaining == 0)

        def running(carry: _Carry):
            made = carry.made
            ended = jnp.sum(made.remaining == 0) - idle
            room = jnp.max(made.counts) < limit
            return room & jnp.any(made.remaining > 0) & (ended < patience)

        places = (rows.text, rows.lengths, rows.prompt_lengths)
        columns = self._config.padded_vocab_size
        start = _Carry(
            cache._replace(lengths=jnp.maximum(rows.lengths - 1, 0)),
            start_text(*places, self._filters, columns),
            self._nothing(),
        )
        end = jax.lax.while_loop(running, self._step, start)
        return end.cache, end.made

    def _nothing(self) -> Made:
        B, W, n = len(self._rows.lengths), self._width, self._filters.num_top_logprobs
        columns = self._config.padded_vocab_size if self._filters.keep_support else 0
        choices = Choice(
            tokens=jnp.zeros((B, W), jnp.int32),
            logprobs=jnp.zeros((B, W)),
            sampled_logprobs=jnp.zeros((B, W)),
            top_ids=jnp.zeros((B, W, n), jnp.int32),
            top_logprobs=jnp.zeros((B, W, n)),
            support=jnp.zeros((B, W, -(-columns // 8)), jnp.uint8),
        )
        none = jnp.zeros((), jnp.int32)
        remaining = jnp.asarray(self._rows.remaining)
        return Made(choices, jnp.zeros(B, jnp.int32), remaining, none, none)

    def _step(self, carry: _Carry) -> _Carry:
        """Gives each row that is alive its next token, and those guessed right."""
        nothing = jnp.zeros_like(carry.text.lengths)
        if not self._drafts:
            return self._advance(carry, self._newest(carry), nothing)
        # More tokens in a pass take longer: only where there is something to gain. Two
        # loops of at most one turn, since a conditional would copy the cache.
        drafts, guessed = self._guesses(carry)
        some = jnp.any(guessed > 0)

        def once(when, advance, carry):
            def body(carry_and_turn):
                return advance(carry_and_turn[0]), False

            return jax.lax.while_loop(lambda c: c[1], body, (carry, when))[0]

        def narrow(carry):
            return self._advance(carry, self._newest(carry), nothing)

        def wide(carry):
            tokens = jnp.concatenate([self._newest(carry), drafts], axis=1)
            return self._advance(carry, tokens, guessed)

        return once(some, wide, once(~some, narrow, carry))

    def _newest(self, carry: _Carry):
        last = jnp.maximum(carry.text.lengths - 1, 0)[:, None]
        return jnp.take_along_axis(carry.text.text, last, axis=1)

    def _guesses(self, carry: _Carry):
        """Returns tokens `[B, drafts]`, and how many of them a row may take."""
        drafts, known = draft_tokens(carry.text.text, carry.text.lengths, self._drafts)
        most = jnp.maximum(carry.made.remaining - 1, 0)
        return drafts, jnp.clip(known, 0, most)

    def _advance(self, carry: _Carry, tokens, guessed) -> _Carry:
        """Runs each row's newest token and `guessed` ones after it; keeps the right."""
        cache, text, made = carry
        alive, before = made.remaining > 0, made.counts
        out = self._apply(tokens, cache=cache, lengths=jnp.where(alive, 1 + guessed, 0))
        logits = compute_logits(out.hidden, out.unembedding, self._config.vocab_size)

        def keep(index, carry):
            text, made, going = carry
            text, made, chosen = self._choose(logits[:, index], text, made, going)
            guess = jnp.take(tokens, index + 1, axis=1, mode="clip")
            going &= (made.remaining > 0) & (index < guessed) & (chosen == guess)
            return text, made, going

        kept = keep(0, (text, made, alive))
        if tokens.shape[1] > 1:
            kept = jax.lax.fori_loop(1, tokens.shape[1], keep, kept)
        text, made, _ = kept
        right = made.counts - before - alive
        made = made._replace(
            drafted=made.drafted + jnp.sum(guessed),
            accepted=made.accepted + jnp.sum(right),
        )
        # Slots after the newest token may hold guesses that were wrong.
        cache = out.cache._replace(lengths=jnp.maximum(text.lengths - 1, 0))
        return _Carry(cache, text, made)

    def _choose(self, logits, text: TextState, made: Made, going):
        """Returns text and record after the next token of the rows that are going."""
        rows = self._rows
        choice = choose_tokens(
            logits,
            self._keys,
            text,
            rows.params,
            self._filters,
            rows.logit_bias,
            rows.stop_ids,
            self._num_ids,
        )
        row, column = jnp.arange(len(going)), jnp.where(going, made.counts, self._width)
        choices = jax.tree.map(
            lambda all, one: all.at[row, column].set(one, mode="drop"),
            made.choices,
            choice,
        )
        ended = jnp.isin(choice.tokens, rows.stop_ids) & ~rows.ignore_eos
        left = jnp.where(ended, 0, made.remaining - 1)
        made = made._replace(
            choices=choices,
            counts=made.counts + going,
            remaining=jnp.where(going, left, made.remaining),
        )
        return append(text, choice.tokens, going), made, choice.tokens


__all__ = ["Filters", "Made", "Rows", "Steps", "make_steps"]
