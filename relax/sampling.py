"""From logits to the next token."""

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from relax.ops import draws
from relax.ops import filters as ops


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to choose tokens; named as in transformers where they agree.

    conf/sampling/default.yaml says which value of a field is off. temperature: 0 takes
    the most likely token. repetition_penalty and no_repeat_ngram_size look at prompt
    and completion, presence and frequency at the completion alone. logit_bias: added to
    the logits of ids, given as a mapping and kept as sorted pairs; -inf bans an id.
    Before min_new_tokens no id that ends a row is chosen. stop_token_ids end a row as
    the end of text does, past which ignore_eos goes on. stop_strings end a completion
    and are left out of its text. num_top_logprobs: how many of the most likely tokens
    are told with each. constraint: "digits", "choices" or "module:function", see
    generation/constraints.py. num_beams: above 1 a search, ruled by length_penalty and
    early_stopping ("true", "false" or "never"). speculate: how many tokens are guessed
    at a time. seed: a row's random key is folded from it, the input's index, the
    sample's index and the position, so that the row, the batch and the other prompts
    change nothing. tokens_per_dispatch: how many tokens the device makes before the
    host looks at them; it changes no token.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    logit_bias: dict[int, float] | None = None
    num_return_sequences: int = 1
    num_top_logprobs: int = 0
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    constraint: str | None = None
    choices: tuple[str, ...] = ()
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: str = "false"
    speculate: int = 0
    seed: int = 0
    tokens_per_dispatch: int = 64

    def __post_init__(self):
        for name in ("stop_strings", "choices", "stop_token_ids"):
            values = getattr(self, name)
            if isinstance(values, str | int):
                kind = "token ids" if name == "stop_token_ids" else "strings"
                raise ValueError(f"sampling.{name}={values!r} must be a list of {kind}")
            object.__setattr__(self, name, tuple(values))
        object.__setattr__(self, "logit_bias", _as_pairs(self.logit_bias))
        # YAML's true and false are booleans, or words made of them.
        object.__setattr__(self, "early_stopping", str(self.early_stopping).lower())
        for names, holds, bound in _BOUNDS:
            for name in names.split():
                value = getattr(self, name)
                if not holds(value):
                    raise ValueError(f"sampling.{name}={value!r} must be {bound}")
        self._check_together()

    def _check_together(self):
        """Raises ValueError for values that are right alone and not together."""
        beams = f"sampling.num_beams={self.num_beams}"
        searched = self.num_beams > 1
        for wrong, message in (
            (
                self.min_new_tokens > self.max_new_tokens,
                f"sampling.min_new_tokens={self.min_new_tokens} must be at most "
                f"sampling.max_new_tokens={self.max_new_tokens}",
            ),
            (
                (self.constraint == "choices") != bool(self.choices),
                f"sampling.choices={list(self.choices)} does not go with "
                f"sampling.constraint={self.constraint}; set both, constraint=choices "
                "and a list of choices, or neither",
            ),
            (
                searched and self.temperature != 0,
                f"{beams} with sampling.temperature={self.temperature}: beams are "
                "searched, not sampled; set sampling=greedy or sampling.temperature=0",
            ),
            (
                searched and self.speculate,
                f"{beams} with sampling.speculate={self.speculate}: beams take no "
                "guesses; set sampling.speculate=0",
            ),
            (
                searched and self.num_return_sequences > self.num_beams,
                f"sampling.num_return_sequences={self.num_return_sequences} must be at "
                f"most {beams}, all that there are",
            ),
        ):
            if wrong:
                raise ValueError(message)


def _as_pairs(bias) -> tuple[tuple[int, float], ...]:
    """Returns a mapping, or pairs, of ids and numbers as sorted pairs."""
    try:
        pairs = bias.items() if isinstance(bias, Mapping) else bias or ()
        numbers = {operator.index(token): float(value) for token, value in pairs}
    except (TypeError, ValueError):
        raise ValueError(
            f"sampling.logit_bias={bias!r} must map ids to numbers: {{5: -100.0}}"
        ) from None
    return tuple(sorted(numbers.items()))


def _names_constraint(name: str | None) -> bool:
    return name is None or bool(re.fullmatch("digits|choices|[^:]+:[^:]+", name))


def _is_bias(pairs) -> bool:
    return all(token >= 0 and -math.inf <= bias < 3e38 for token, bias in pairs)


_MODES = ("true", "false", "never")
# Fields, what holds for the value of each, and that in words.
_BOUNDS: tuple[tuple[str, Callable, str], ...] = (
    ("max_new_tokens num_return_sequences", lambda n: n >= 1, "at least 1"),
    ("num_beams tokens_per_dispatch", lambda n: n >= 1, "at least 1"),
    ("min_new_tokens top_k", lambda n: 0 <= n < 2**31, "in [0, 2^31) (0 is off)"),
    ("no_repeat_ngram_size speculate", lambda n: n >= 0, "at least 0 (0 is off)"),
    ("num_top_logprobs", lambda n: n >= 0, "at least 0 (0 is off)"),
    ("temperature", lambda t: 0 <= t < 3e38, "in [0, 3e38), 0 is greedy"),
    ("top_p", lambda p: 0 <= p <= 1, "in [0, 1] (1 is off)"),
    ("min_p", lambda p: 0 <= p <= 1, "in [0, 1] (0 is off)"),
    ("typical_p", lambda p: 0 < p <= 1, "in (0, 1] (1 is off)"),
    ("repetition_penalty", lambda p: 0 < p < math.inf, "above 0, finite (1 is off)"),
    ("presence_penalty", math.isfinite, "a finite number (0 is off)"),
    ("frequency_penalty", math.isfinite, "a finite number (0 is off)"),
    ("length_penalty", math.isfinite, "a finite number (0 adds logprobs up)"),
    ("logit_bias", _is_bias, "of ids from 0 on and of numbers below 3e38, -inf too"),
    ("stop_token_ids", lambda ids: all(i >= 0 for i in ids), "ids from 0 on"),
    ("stop_strings choices", all, "free of empty strings"),
    ("constraint", _names_constraint, "digits, choices, module:function or null"),
    ("early_stopping", lambda mode: mode in _MODES, '"true", "false" or "never"'),
    ("seed", lambda n: 0 <= n < 2**32, "in [0, 2^32)"),
)


class SamplingParams(NamedTuple):
    """The numbers of a SamplingConfig, one per row `[B]`."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    typical_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    presence_penalty: Float[Array, "B"]
    frequency_penalty: Float[Array, "B"]
    no_repeat_ngram_size: Int[Array, "B"]
    min_new_tokens: Int[Array, "B"]


class Filters(NamedTuple):
    """Which filters any row needs: static, so that the others cost nothing.

    counted: presence or frequency penalty. sampled: whether any row draws at all.
    constraint: from the text so far to the tokens that may follow, `[B, V]`.
    keep_support: whether a choice tells among which tokens it was drawn.
    """

    top_k: bool
    top_p: bool
    min_p: bool
    typical_p: bool
    repetition_penalty: bool
    counted: bool
    no_repeat_ngram: bool
    min_new_tokens: bool
    sampled: bool
    num_top_logprobs: int = 0
    constraint: "Callable[[TextState], Bool[Array, 'B V']] | None" = None
    keep_support: bool = False


class TextState(NamedTuple):
    """The text of each row so far, prompt and completion: the first `lengths` tokens.

    seen: the ids in it; None without a repetition penalty. counts: how often each came
    after the prompt; None without a presence or frequency penalty.
    """

    text: Int[Array, "B S"]
    lengths: Int[Array, "B"]
    prompt_lengths: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None
    counts: Int[Array, "B V"] | None


class Choice(NamedTuple):
    """Chosen tokens, and their logprobs under the model and as they were drawn.

    logprobs: under the full softmax at temperature 1. sampled_logprobs: under the
    distribution drawn from (0 for a greedy choice). top_ids, top_logprobs: the most
    likely of the ids that can be chosen, and their logprobs under the full softmax.
    support: a bit for each id that could be drawn, no byte without keep_support.
    """

    tokens: Int[Array, "B"]
    logprobs: Float[Array, "B"]
    sampled_logprobs: Float[Array, "B"]
    top_ids: Int[Array, "B n"]
    top_logprobs: Float[Array, "B n"]
    support: UInt8[Array, "B bytes"]


def sampling_params(
    configs: list[SamplingConfig],
    constraint: Callable | None = None,
    keep_support: bool = False,
) -> tuple[SamplingParams, Filters]:
    """Returns the rows' numbers and which filters they need.

    The constraint, of `generation.constraints`, holds for all rows.
    """

    def column(name: str) -> Array:
        values = [getattr(c, name) for c in configs]
        return jnp.asarray(values, type(getattr(SamplingConfig, name)))

    params = SamplingParams(*map(column, SamplingParams._fields))
    filters = Filters(
        top_k=any(c.top_k > 0 for c in configs),
        top_p=any(c.top_p < 1 for c in configs),
        min_p=any(c.min_p > 0 for c in configs),
        typical_p=any(c.typical_p < 1 for c in configs),
        repetition_penalty=any(c.repetition_penalty != 1 for c in configs),
        counted=any(c.presence_penalty or c.frequency_penalty for c in configs),
        no_repeat_ngram=any(c.no_repeat_ngram_size > 0 for c in configs),
        min_new_tokens=any(c.min_new_tokens > 0 for c in configs),
        sampled=any(c.temperature > 0 for c in configs),
        num_top_logprobs=max((c.num_top_logprobs for c in configs), default=0),
        constraint=constraint,
        keep_support=keep_support,
    )
    return params, filters


def row_key(seed: int, input_index: int, sample_index: int) -> Key[Array, ""]:
    """Returns the key of a row; `choose_tokens` folds the position into it."""
    key = jax.random.fold_in(jax.random.key(seed), input_index)
    return jax.random.fold_in(key, sample_index)


def start_text(
    text: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    prompt_lengths: Int[Array, "B"],
    filters: Filters,
    num_columns: int,
) -> TextState:
    """Returns the state of texts that are there already; V is `num_columns`."""
    text, lengths, prompt_lengths = map(jnp.asarray, (text, lengths, prompt_lengths))
    seen = counts = None
    if filters.repetition_penalty:
        seen = ops.count_tokens(text, 0 * lengths, lengths, num_columns) > 0
    if filters.counted:
        counts = ops.count_tokens(text, prompt_lengths, lengths, num_columns)
    return TextState(text, lengths, prompt_lengths, seen, counts)


def append(
    state: TextState, tokens: Int[Array, "B"], alive: Bool[Array, "B"]
) -> TextState:
    """Returns the state with one token more in the rows that are alive.

    What comes at slot S or beyond is not written.
    """
    rows, S = jnp.arange(tokens.shape[0]), state.text.shape[1]
    slots = jnp.where(alive, state.lengths, S)
    seen, counts = state.seen, state.counts
    return state._replace(
        text=state.text.at[rows, slots].set(tokens, mode="drop"),
        lengths=state.lengths + alive,
        seen=None if seen is None else seen.at[rows, tokens].max(alive),
        counts=None if counts is None else counts.at[rows, tokens].add(alive),
    )


def process_logits(
    logits: Float[Array, "B V"],
    state: TextState,
    params: SamplingParams,
    filters: Filters,
    logit_bias: Float[Array, "V"] | None,
    stop_ids: Int[Array, "stops"],
    num_ids: int,
) -> Float[Array, "B V"]:
    """Returns what is left to choose from, however it is chosen.

    Ids from `num_ids` on go, then in transformers' order: logit bias, repetition,
    presence and frequency penalties, repeated n-grams, stop ids before min_new_tokens,
    the constraint. A row to which these leave nothing is given its stop ids.
    """
    known = ops.keep_first(logits, num_ids)
    shaped = known if logit_bias is None else known + logit_bias
    if filters.repetition_penalty:
        shaped = ops.penalise_repetition(shaped, state.seen, params.repetition_penalty)
    if filters.counted:
        presence, frequency = params.presence_penalty, params.frequency_penalty
        shaped = ops.penalise_counts(shaped, state.counts, presence, frequency)
    if filters.no_repeat_ngram:
        size = params.no_repeat_ngram_size
        shaped = ops.ban_repeated_ngrams(shaped, state.text, state.lengths, size)
    if filters.min_new_tokens:
        too_short = state.lengths - state.prompt_lengths < params.min_new_tokens
        shaped = ops.ban_stop_ids(shaped, stop_ids, too_short)
    if (constraint := filters.constraint) is None and shaped is known:
        return known  # from which nothing was taken
    allowed = jnp.ones(logits.shape, bool) if constraint is None else constraint(state)
    return ops.keep_allowed(shaped, allowed, known, stop_ids)


def warp_logits(
    logits: Float[Array, "B V"], params: SamplingParams, filters: Filters
) -> Float[Array, "B V"]:
    """Returns the logits to draw from: temperature, top-k, top-p, min-p, typical."""
    # A greedy row's draw is thrown away: any temperature above 0 will do.
    temperature = jnp.where(params.temperature == 0, 1.0, params.temperature)
    logits = logits / temperature[:, None]
    for used, keep, bound in (
        (filters.top_k, ops.keep_top_k, params.top_k),
        (filters.top_p, ops.keep_top_p, params.top_p),
        (filters.min_p, ops.keep_min_p, params.min_p),
        (filters.typical_p, ops.keep_typical, params.typical_p),
    ):
        if used:
            logits = keep(logits, bound)
    return logits


def choose_tokens(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    state: TextState,
    params: SamplingParams,
    filters: Filters,
    logit_bias: Float[Array, "V"] | None,
    stop_ids: Int[Array, "stops"],
    num_ids: int,
) -> Choice:
    """Returns each row's next token below `num_ids`, drawn with (row key, position).

    `process_logits` and, for rows that draw, `warp_logits` say among what. The position
    is that of the new token, `state.lengths`.
    """
    shaped = process_logits(
        logits, state, params, filters, logit_bias, stop_ids, num_ids
    )
    tokens = draws.most_likely(shaped)
    sampled_logprobs = jnp.zeros(tokens.shape, jnp.float32)
    possible = jnp.arange(shaped.shape[-1]) == tokens[:, None]
    if filters.sampled:
        warped = warp_logits(shaped, params, filters)
        keys = jax.vmap(jax.random.fold_in)(keys, state.lengths)
        drawn = draws.draw_tokens(keys, warped)
        is_greedy = params.temperature == 0
        tokens = jnp.where(is_greedy, tokens, drawn)
        drawn_logprobs = draws.logprobs_at(warped, drawn)
        sampled_logprobs = jnp.where(is_greedy, 0.0, drawn_logprobs)
        possible = jnp.where(is_greedy[:, None], possible, warped > -jnp.inf)
    bytes_kept = None if filters.keep_support else 0
    support = draws.pack_support(possible)[:, :bytes_kept]
    logprobs = draws.logprobs_at(logits, tokens)
    top_ids, top_logprobs = _alternatives(logits, num_ids, filters.num_top_logprobs)
    tokens = tokens.astype(jnp.int32)
    return Choice(tokens, logprobs, sampled_logprobs, top_ids, top_logprobs, support)


def _alternatives(logits, num_ids: int, count: int):
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    top_logprobs, top_ids = jax.lax.top_k(ops.keep_first(logprobs, num_ids), count)
    return top_ids, top_logprobs
