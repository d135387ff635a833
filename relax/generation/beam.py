"""Beam search: the most likely completions of a prompt, a few kept at every length.

Candidates, scores and the rule that ends a search are those of transformers 5.23 but
for one thing: where a vocabulary or a constraint leaves fewer hypotheses than beams, a
place that stays empty is empty, and no copy of another with a score near -1e9.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from relax.generation.requests import Request, allowed_tokens, bias_of, bucket
from relax.model.cache import empty_cache
from relax.model.config import LlamaConfig
from relax.ops.logprobs import compute_logits
from relax.sampling import (
    SamplingConfig,
    append,
    process_logits,
    sampling_params,
    start_text,
)


class Beam(NamedTuple):
    """One completion found.

    token_ids: the stop id included where it came. score: what the search added up, over
    length ** length_penalty. finish_reason: "stop" or "length". logprobs: of the tokens
    under the model's full softmax, before any processor.
    """

    token_ids: list[int]
    score: float
    finish_reason: str
    logprobs: list[float]


class Beams(NamedTuple):
    """Hypotheses of each prompt, best first, as arrays.

    tokens, logprobs: of what follows the prompt; the first `lengths` count. scores: of
    running ones the sum of processed logprobs, of finished ones that over the length's
    norm; -inf is a place without a hypothesis. stopped: whether a stop id ended it.
    """

    tokens: Int[Array, "B n N"]
    logprobs: Float[Array, "B n N"]
    lengths: Int[Array, "B n"]
    scores: Float[Array, "B n"]
    stopped: Bool[Array, "B n"]


class Rules(NamedTuple):
    """What a hypothesis is worth and when a search ends.

    norms: what divides the score of a length. limits: the most new tokens a prompt may
    get. until_full: a search ends with its n-th finished hypothesis. optimistic: what
    still runs is compared with what has finished as though it got to its limit.
    ignore_eos: a stop id is a token like others.
    """

    norms: Float[Array, "N+1"]
    limits: Int[Array, "B"]
    stop_ids: Int[Array, "stops"]
    until_full: Bool[Array, ""]
    optimistic: Bool[Array, ""]
    ignore_eos: Bool[Array, ""]


class Search(NamedTuple):
    """The searches of B prompts after `made` tokens; `alive` ones go on."""

    running: Beams
    finished: Beams
    alive: Bool[Array, "B"]
    made: Int[Array, ""]


def make_rules(
    sampling: SamplingConfig,
    limits: Sequence[int],
    stop_ids: Sequence[int],
    width: int,
) -> Rules:
    """Returns a configuration's rules for hypotheses of at most `width` tokens."""
    mode, penalty = sampling.early_stopping, sampling.length_penalty
    with np.errstate(over="ignore", divide="ignore"):
        norms = np.arange(width + 1.0) ** penalty
    return Rules(
        # Within what float32 divides by without an overflow.
        norms=np.clip(norms, 1e-30, 1e30).astype(np.float32),
        limits=np.asarray(limits, np.int32),
        stop_ids=np.asarray(stop_ids, np.int32),
        until_full=np.asarray(mode == "true"),
        optimistic=np.asarray(mode == "never" and penalty > 0),
        ignore_eos=np.asarray(sampling.ignore_eos),
    )


def start_search(limits: Int[Array, "B"], num_beams: int, width: int) -> Search:
    """Returns searches without a token: one hypothesis each, the empty one."""
    shape = (limits.shape[0], num_beams)
    none = Beams(
        tokens=jnp.zeros((*shape, width), jnp.int32),
        logprobs=jnp.zeros((*shape, width), jnp.float32),
        lengths=jnp.zeros(shape, jnp.int32),
        scores=jnp.full(shape, -jnp.inf, jnp.float32),
        stopped=jnp.zeros(shape, bool),
    )
    running = none._replace(scores=none.scores.at[:, 0].set(0.0))
    return Search(running, none, limits > 0, jnp.int32(0))


def advance(
    search: Search,
    processed: Float[Array, "B n V"],
    logprobs: Float[Array, "B n V"],
    rules: Rules,
) -> tuple[Search, Int[Array, "B n"]]:
    """Returns the searches one token on, and which beam each running one came from.

    processed: the next token's logprobs as processors left them, which scores add up.
    logprobs: the model's own. A search that has ended stays as it is.
    """
    n, made = processed.shape[1], search.made + 1
    candidates, parents = _candidates(search, processed, logprobs, rules)
    ends = candidates.stopped | (made >= rules.limits[:, None])
    remaining = jnp.where(ends, -jnp.inf, candidates.scores)
    scores, order = jax.lax.top_k(remaining, n)
    running = _pick(candidates, order)._replace(scores=scores)
    # Only the first n may finish: the others are there so that n can go on.
    ends &= jnp.arange(ends.shape[1]) < n
    scores = jnp.where(ends, candidates.scores / rules.norms[made], -jnp.inf)
    finished = _best_of(search.finished, candidates._replace(scores=scores))
    alive = may_improve(running, finished, made, rules)
    new = Search(running, finished, search.alive & alive, made)
    kept = jax.tree.map(
        lambda new, old: jnp.where(_over(search.alive, new), new, old),
        new[:3],
        search[:3],
    )
    parents = jnp.take_along_axis(parents, order, axis=1)
    parents = jnp.where(search.alive[:, None], parents, jnp.arange(n))
    return Search(*kept, made), parents


def _candidates(search: Search, processed, logprobs, rules: Rules):
    """Returns the best continuations, and the beams that they continue.

    So many that n of them go on even where every beam's best are all the stop ids.
    """
    B, n, V = processed.shape
    count = min(max(2, 1 + rules.stop_ids.shape[0]), V) * n
    totals = search.running.scores[..., None] + processed
    scores, index = jax.lax.top_k(totals.reshape(B, n * V), count)
    parents, ids = index // V, index % V
    chosen = jnp.take_along_axis(logprobs.reshape(B, n * V), index, axis=1)
    beams = _pick(search.running, parents)
    candidates = beams._replace(
        tokens=beams.tokens.at[:, :, search.made].set(ids),
        logprobs=beams.logprobs.at[:, :, search.made].set(chosen),
        lengths=beams.lengths + 1,
        scores=scores,
        stopped=jnp.isin(ids, rules.stop_ids) & ~rules.ignore_eos,
    )
    return candidates, parents


def _best_of(old: Beams, new: Beams) -> Beams:
    """Returns the best of both, as many as there are old ones."""
    both = jax.tree.map(lambda *two: jnp.concatenate(two, axis=1), old, new)
    return _pick(both, jax.lax.top_k(both.scores, old.scores.shape[1])[1])


def may_improve(running: Beams, finished: Beams, made, rules: Rules):
    """Returns whether the best that runs may beat the worst that has finished `[B]`.

    Its score at a later length is guessed: as it stands, over the length it has or,
    optimistic, over the longest it may get. Nothing runs on where it has come to -inf.
    """
    length = jnp.where(rules.optimistic, rules.limits, made)
    best = running.scores[:, 0] / rules.norms[length]
    worst = jnp.min(finished.scores, axis=1)
    return (best > worst) & ~(rules.until_full & (worst > -jnp.inf))


def _pick(beams: Beams, index: Int[Array, "B m"]) -> Beams:
    """Returns m of each prompt's beams."""
    return jax.tree.map(
        lambda x: jnp.take_along_axis(
            x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1
        ),
        beams,
    )


def _over(rows: Bool[Array, "B"], x: Array) -> Array:
    """Returns `rows` with axes of 1 for all of `x` but its first."""
    return rows.reshape(-1, *[1] * (x.ndim - 1))


class BeamSearch:
    """Beam search with one model; its compiled programs are kept between calls.

    programs: how many have been compiled.
    """

    def __init__(self, apply: Callable, config: LlamaConfig, num_ids: int):
        """`num_ids`: only ids below it are chosen."""
        self._config = config
        self.programs = 0

        def run(*args, **static):
            # Runs where JAX traces, which it does once for each program.
            self.programs += 1
            return _run(apply, config, num_ids, *args, **static)

        static = ("num_beams", "capacity", "filters")
        self._run = jax.jit(run, static_argnames=static)

    def __call__(
        self,
        params,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
        constraint: Callable | None = None,
    ) -> list[list[Beam]]:
        """Returns the best `sampling.num_return_sequences` beams of each request.

        Best first, and fewer where a constraint leaves fewer completions. What a prompt
        gets is what it gets alone. Any of `stop_ids` ends a beam, unless
        `sampling.ignore_eos`. Prompts must have been checked.
        """
        if not requests:
            return []
        n, limit = sampling.num_beams, self._config.max_position_embeddings
        lengths = np.asarray([len(request.prompt) for request in requests], np.int32)
        limits = [allowed_tokens(r, sampling, self._config) for r in requests]
        row_params, filters = sampling_params(
            [sampling] * (len(requests) * n), constraint
        )
        finished = self._run(
            params,
            _pad([request.prompt for request in requests], bucket(max(lengths), limit)),
            lengths,
            row_params,
            bias_of(sampling, self._config.padded_vocab_size),
            make_rules(sampling, limits, stop_ids, bucket(max(limits), limit)),
            num_beams=n,
            capacity=bucket(max(lengths + limits), limit),
            filters=filters,
        )
        finished = jax.device_get(finished)
        count = sampling.num_return_sequences
        return [
            _beams(jax.tree.map(lambda x, b=b: x[b], finished), count)
            for b in range(len(requests))
        ]


def _run(
    apply: Callable,
    config: LlamaConfig,
    num_ids: int,
    params,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    row_params,
    logit_bias: Float[Array, "V"] | None,
    rules: Rules,
    *,
    num_beams: int,
    capacity: int,
    filters,
) -> Beams:
    """Returns the finished beams of right-padded prompts.

    A prompt is run once, but for its last token, which is the first step of the loop.
    There, cache and text hold a row per beam, those of one prompt next to each other.
    """
    B, T = tokens.shape
    shape = (B, num_beams, config.padded_vocab_size)

    def step(carry):
        search, text, cache = carry
        alive = jnp.repeat(search.alive, num_beams)
        newest = jnp.take_along_axis(text.text, text.lengths[:, None] - 1, axis=1)
        out = apply(params, newest, cache=cache, lengths=alive.astype(jnp.int32))
        logits = compute_logits(out.hidden[:, 0], out.unembedding, config.vocab_size)
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        processed = process_logits(
            logprobs, text, row_params, filters, logit_bias, rules.stop_ids, num_ids
        )
        search, parents = advance(
            search, processed.reshape(shape), logprobs.reshape(shape), rules
        )
        rows = (jnp.arange(B)[:, None] * num_beams + parents).reshape(-1)
        text = jax.tree.map(lambda x: x[rows], text)
        chosen = search.running.tokens[:, :, search.made - 1].reshape(-1)
        return search, append(text, chosen, alive), _take_rows(out.cache, rows)

    cache = empty_cache(config, B, capacity)
    cache = apply(params, tokens, cache=cache, lengths=lengths - 1).cache
    rows = jnp.repeat(jnp.arange(B), num_beams)
    text = jnp.pad(tokens, ((0, 0), (0, capacity - T)))[rows]
    text = start_text(text, lengths[rows], lengths[rows], filters, shape[-1])
    search = start_search(rules.limits, num_beams, rules.norms.shape[0] - 1)
    carry = search, text, _take_rows(cache, rows)
    carry = jax.lax.while_loop(lambda carry: jnp.any(carry[0].alive), step, carry)
    return carry[0].finished


def _take_rows(cache, rows: Int[Array, "rows"]):
    """Returns the cache with these of its rows."""
    keys, values = jax.tree.map(
        lambda buffer: jnp.take(buffer, rows, axis=-4, mode="clip"),
        (cache.keys, cache.values),
    )
    return cache._replace(keys=keys, values=values, lengths=cache.lengths[rows])


def _beams(finished: Beams, count: int) -> list[Beam]:
    """Returns the first beams of one prompt, at most `count`."""
    found = []
    for tokens, logprobs, length, score, stopped in zip(*finished, strict=True):
        if score > -np.inf:
            ids, logprobs = tokens[:length].tolist(), logprobs[:length].tolist()
            reason = "stop" if stopped else "length"
            found.append(Beam(ids, float(score), reason, logprobs))
    return found[:count]


def _pad(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Returns rows of ids `[B, width]`, right-padded."""
    padded = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
