"""From logits to the next token."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from relax.ops.filters import (
    ban_repeated_ngrams,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How to sample; names as in transformers' GenerationConfig where they agree.

    temperature: 0 takes the most likely token. top_k 0, top_p 1, min_p 0,
    repetition_penalty 1 and no_repeat_ngram_size 0 are off. no_repeat_ngram_size: no
    run of so many tokens comes twice in prompt and completion taken together.
    stop_strings end a completion and are left out of its text. ignore_eos goes on past
    the end of text. seed: a row's random key is folded from it, the input's index, the
    sample's index and the position, so that the row, the batch and the other prompts
    change nothing. tokens_per_dispatch: how many tokens the device makes before the
    host looks at them; it changes no token.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_return_sequences: int = 1
    stop_strings: tuple[str, ...] = ()
    ignore_eos: bool = False
    seed: int = 0
    tokens_per_dispatch: int = 64

    def __post_init__(self):
        if isinstance(self.stop_strings, str):
            raise ValueError(
                f"sampling.stop_strings={self.stop_strings!r} must be a list of strings"
            )
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        for name, ok, bound in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            (
                "temperature",
                0 <= self.temperature < math.inf,
                "in [0, inf), 0 is greedy",
            ),
            ("top_k", self.top_k >= 0, "at least 0 (0 is off)"),
            ("top_p", 0 <= self.top_p <= 1, "in [0, 1] (1 is off)"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1] (0 is off)"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0 (1 is off)"),
            (
                "no_repeat_ngram_size",
                self.no_repeat_ngram_size >= 0,
                "at least 0 (0 is off)",
            ),
            ("num_return_sequences", self.num_return_sequences >= 1, "at least 1"),
            ("tokens_per_dispatch", self.tokens_per_dispatch >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2^32)"),
            ("stop_strings", all(self.stop_strings), "free of empty strings"),
        ):
            if not ok:
                raise ValueError(
                    f"sampling.{name}={getattr(self, name)} must be {bound}"
                )


class SamplingParams(NamedTuple):
    """The numbers of a SamplingConfig, one per row `[B]`."""

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]
    no_repeat_ngram_size: Int[Array, "B"]


class Filters(NamedTuple):
    """Which filters any row needs: static, so that the others cost nothing."""

    top_k: bool
    top_p: bool
    min_p: bool
    repetition_penalty: bool
    no_repeat_ngram: bool
    sampled: bool  # whether any row draws at all


class Choice(NamedTuple):
    """Chosen tokens, and their logprobs under the model and as they were drawn.

    logprobs: under the full softmax at temperature 1. sampled_logprobs: under the
    distribution drawn from (0 for a greedy choice).
    """

    tokens: Int[Array, "B"]
    logprobs: Float[Array, "B"]
    sampled_logprobs: Float[Array, "B"]


def sampling_params(configs: list[SamplingConfig]) -> tuple[SamplingParams, Filters]:
    """Returns the rows' numbers and which filters they need."""
    columns = [[getattr(c, name) for c in configs] for name in SamplingParams._fields]
    params = SamplingParams(*(jnp.asarray(column) for column in columns))
    filters = Filters(
        top_k=any(c.top_k > 0 for c in configs),
        top_p=any(c.top_p < 1 for c in configs),
        min_p=any(c.min_p > 0 for c in configs),
        repetition_penalty=any(c.repetition_penalty != 1 for c in configs),
        no_repeat_ngram=any(c.no_repeat_ngram_size > 0 for c in configs),
        sampled=any(c.temperature > 0 for c in configs),
    )
    return params, filters


def row_key(seed: int, input_index: int, sample_index: int) -> Key[Array, ""]:
    """Returns the key of a row; `choose_tokens` folds the position into it."""
    key = jax.random.fold_in(jax.random.key(seed), input_index)
    return jax.random.fold_in(key, sample_index)


def choose_tokens(
    logits: Float[Array, "B V"],
    keys: Key[Array, "B"],
    positions: Int[Array, "B"],
    params: SamplingParams,
    filters: Filters,
    seen: Bool[Array, "B V"] | None,
    text: Int[Array, "B S"] | None,
    num_ids: int,
) -> Choice:
    """Returns each row's next token below `num_ids`, drawn with (row key, position).

    Order: repetition penalty, repeated n-grams, temperature, top-k, top-p, min-p. Of
    the prompt and the completion so far, `seen` marks the tokens (None without a
    repetition penalty), and `text` holds them, one at each place before the position
    (None where n-grams may repeat).
    """
    shaped = jnp.where(jnp.arange(logits.shape[-1]) < num_ids, logits, -jnp.inf)
    if filters.repetition_penalty:
        shaped = penalise_repetition(shaped, seen, params.repetition_penalty)
    if filters.no_repeat_ngram:
        size = params.no_repeat_ngram_size
        shaped = ban_repeated_ngrams(shaped, text, positions, size)
    greedy = jnp.argmax(shaped, axis=-1)
    if filters.sampled:
        drawn, drawn_logprobs = _draw(shaped, keys, positions, params, filters)
        is_greedy = params.temperature == 0
        tokens = jnp.where(is_greedy, greedy, drawn)
        sampled_logprobs = jnp.where(is_greedy, 0.0, drawn_logprobs)
    else:
        tokens, sampled_logprobs = greedy, jnp.zeros(greedy.shape, jnp.float32)
    logprobs = _at(jax.nn.log_softmax(logits, axis=-1), tokens)
    return Choice(tokens.astype(jnp.int32), logprobs, sampled_logprobs)


def _draw(logits, keys, positions, params, filters):
    """Returns tokens drawn from the filtered distribution, and their logprobs."""
    # A greedy row's draw is thrown away: any temperature above 0 will do.
    temperature = jnp.where(params.temperature == 0, 1.0, params.temperature)
    logits = logits / temperature[:, None]
    if filters.top_k:
        logits = keep_top_k(logits, params.top_k)
    if filters.top_p:
        logits = keep_top_p(logits, params.top_p)
    if filters.min_p:
        logits = keep_min_p(logits, params.min_p)
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    tokens = jax.vmap(jax.random.categorical)(keys, logits)
    return tokens, _at(jax.nn.log_softmax(logits, axis=-1), tokens)


def _at(values, tokens):
    return jnp.take_along_axis(values, tokens[:, None], axis=-1)[:, 0]
