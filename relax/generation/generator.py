"""Completions of prompts: batches, buckets and the loop over dispatches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from relax.generation.decode import PAD, DecodeState, Rows, make_steps
from relax.model.config import LlamaConfig
from relax.sampling import Choice, SamplingConfig, row_key, sampling_params

BUCKET = 64


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, special tokens left out."""


@dataclass(frozen=True)
class Request:
    """One row to complete: a prompt, and which sample of which input it is."""

    prompt: tuple[int, ...]
    input_index: int
    sample_index: int


@dataclass
class Completion:
    """What one row gave.

    token_ids: the end-of-text token included where it came. logprobs: of these tokens
    under the full softmax at temperature 1. sampled_logprobs: under the distribution
    drawn from. finish_reason: "stop" (end of text or a stop string) or "length".
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled_logprobs: list[float] = field(default_factory=list)
    finish_reason: str = "length"


class Generator:
    """Samples from one model; its compiled functions are kept between calls."""

    def __init__(
        self,
        apply: Callable,
        config: LlamaConfig,
        tokenizer: Tokenizer,
        stop_ids: tuple[int, ...],
        batch_multiple: int = 1,
    ):
        """`batch_multiple`: what the number of rows must be a multiple of (a mesh)."""
        self._config = config
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._batch_multiple = batch_multiple
        self._steps = make_steps(apply, config, stop_ids)

    def run(
        self, params, requests: Sequence[Request], sampling: SamplingConfig
    ) -> list[Completion]:
        """Returns one completion per request, in order."""
        completions = [Completion() for _ in requests]
        for _ in self.run_in_chunks(params, requests, sampling, completions):
            pass
        return completions

    def run_in_chunks(
        self,
        params,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        completions: list[Completion],
    ) -> Iterator[None]:
        """Extends `completions` in place, and yields after each dispatch.

        The device runs at most `sampling.tokens_per_dispatch` tokens a dispatch; rows
        that met a stop string between two of them end there.
        """
        batch = self._batch(requests, sampling)
        filters = batch.filters
        state, choice = self._steps.prefill(
            params,
            batch.tokens,
            batch.lengths,
            batch.remaining,
            batch.rows,
            capacity=batch.capacity,
            filters=filters,
        )
        while True:
            running = self._extend(completions, choice, sampling, state)
            yield
            if not running.any():
                break
            remaining = jnp.where(jnp.asarray(running), state.remaining, 0)
            state, choice = self._steps.decode(
                params,
                state._replace(remaining=remaining),
                batch.rows,
                chunk=sampling.tokens_per_dispatch,
                filters=filters,
            )
        for completion in completions:
            completion.text = self._text(completion.token_ids, sampling.stop_strings)

    def _batch(self, requests: Sequence[Request], sampling: SamplingConfig) -> "_Batch":
        limit = self._config.max_position_embeddings
        lengths = [len(request.prompt) for request in requests]
        for request in requests:
            _check_prompt(request.prompt, limit, self._config.vocab_size)
        # Rows that fill up the batch repeat the first, and are allowed no token.
        extra = -len(requests) % self._batch_multiple
        padded = [*requests, *[requests[0]] * extra]
        new = [min(sampling.max_new_tokens, limit - n) for n in lengths]
        width = _bucket(max(lengths))
        capacity = max(width, _bucket(max(map(sum, zip(lengths, new, strict=True)))))
        tokens = np.zeros((len(padded), width), np.int32)
        for row, request in enumerate(padded):
            tokens[row, : len(request.prompt)] = request.prompt
        keys = [row_key(sampling.seed, r.input_index, r.sample_index) for r in padded]
        params, filters = sampling_params([sampling] * len(padded))
        ignore_eos = jnp.full(len(padded), sampling.ignore_eos)
        return _Batch(
            tokens=jnp.asarray(tokens),
            lengths=jnp.asarray([len(r.prompt) for r in padded]),
            remaining=jnp.asarray(new + [0] * extra),
            rows=Rows(jnp.stack(keys), params, ignore_eos),
            capacity=capacity,
            filters=filters,
        )

    def _extend(
        self,
        completions: list[Completion],
        choice: Choice,
        sampling: SamplingConfig,
        state: DecodeState,
    ) -> np.ndarray:
        """Appends a dispatch's tokens; returns which rows go on `[B]`."""
        tokens, logprobs, sampled, remaining = jax.device_get(
            (*choice, state.remaining)
        )
        running = remaining > 0
        for row, completion in enumerate(completions):
            count = int(np.sum(tokens[row] != PAD))
            if not count:
                continue
            before = len(completion.token_ids)
            completion.token_ids += tokens[row, :count].tolist()
            completion.logprobs += logprobs[row, :count].tolist()
            completion.sampled_logprobs += sampled[row, :count].tolist()
            if self._has_stopped(completion, before, sampling):
                completion.finish_reason = "stop"
                running[row] = False
        return running

    def _has_stopped(
        self, completion: Completion, before: int, sampling: SamplingConfig
    ) -> bool:
        """Returns whether the end of text or a stop string came after `before` tokens.

        The tokens after the one that completed a stop string are cut, so that the size
        of a dispatch changes nothing.
        """
        ids = completion.token_ids
        if sampling.stop_strings:
            for end in range(before + 1, len(ids) + 1):
                text = self._tokenizer.decode(ids[:end])
                if any(stop in text for stop in sampling.stop_strings):
                    for values in (
                        ids,
                        completion.logprobs,
                        completion.sampled_logprobs,
                    ):
                        del values[end:]
                    return True
        return ids[-1] in self._stop_ids and not sampling.ignore_eos

    def _text(self, ids: Sequence[int], stops: tuple[str, ...]) -> str:
        """Returns the text of a completion up to its first stop string."""
        text = self._tokenizer.decode(ids)
        found = [text.find(stop) for stop in stops if stop in text]
        return text[: min(found)] if found else text


@dataclass(frozen=True)
class _Batch:
    tokens: jax.Array
    lengths: jax.Array
    remaining: jax.Array
    rows: Rows
    capacity: int
    filters: tuple


def _bucket(length: int) -> int:
    """Returns the next power of two, at least BUCKET: few shapes are compiled."""
    return max(BUCKET, 1 << (length - 1).bit_length())


def _check_prompt(prompt: Sequence[int], limit: int, vocab_size: int) -> None:
    """Raises ValueError where a prompt is empty, too long, or holds an unknown id."""
    if not prompt:
        raise ValueError("prompt is empty; give at least one token")
    if len(prompt) >= limit:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens leaves no room in "
            f"model.max_position_embeddings={limit}; shorten it"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise ValueError(
            f"prompt holds ids from {min(prompt)} to {max(prompt)}, outside the "
            f"vocabulary of {vocab_size}"
        )
