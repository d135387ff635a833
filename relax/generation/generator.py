"""Completions of prompts: batches, buckets and the loop over dispatches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from relax.generation.decode import PAD, DecodeState, Rows, make_steps
from relax.model.config import LlamaConfig
from relax.sampling import Choice, SamplingConfig, row_key, sampling_params
from relax.text.detokenizer import StopStrings, StreamingDetokenizer
from relax.text.tokenizers import Tokenizer

BUCKET = 64


@dataclass(frozen=True)
class Request:
    """One row to complete: a prompt, and which sample of which input it is."""

    prompt: tuple[int, ...]
    input_index: int
    sample_index: int


@dataclass
class Completion:
    """What one row gave.

    text: what the tokens add to the prompt's, up to the first stop string. token_ids:
    the end of text included where it came, and the token that completed a stop string.
    logprobs: of these tokens under the full softmax at temperature 1. sampled_logprobs:
    under the distribution drawn from. finish_reason: "stop" (end of text or a stop
    string) or "length".
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
        num_ids = min(config.vocab_size, tokenizer.vocab_size)
        self._steps = make_steps(apply, config, stop_ids, num_ids)

    def check(self, request: Request) -> None:
        """Raises ValueError where the prompt can't be completed."""
        name = f"prompt {request.input_index}"
        check_tokens(name, request.prompt, self._config, room=1)

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
        texts = [
            _Text(self._tokenizer, request.prompt, sampling.stop_strings)
            for request in requests
        ]
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
            running = self._extend(completions, texts, choice, sampling, state)
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

    def _batch(self, requests: Sequence[Request], sampling: SamplingConfig) -> "_Batch":
        limit = self._config.max_position_embeddings
        lengths = [len(request.prompt) for request in requests]
        for request in requests:
            self.check(request)
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
        texts: list["_Text"],
        choice: Choice,
        sampling: SamplingConfig,
        state: DecodeState,
    ) -> np.ndarray:
        """Appends a dispatch's tokens; returns which rows go on `[B]`."""
        choice, remaining = jax.device_get((choice, state.remaining))
        running = remaining > 0
        for row, (completion, text) in enumerate(zip(completions, texts, strict=True)):
            made = choice.tokens[row] != PAD
            if not made.any():
                continue
            columns = [column[row][made].tolist() for column in choice]
            stopped = _append(completion, text, *columns)
            ended = completion.token_ids[-1] in self._stop_ids
            if stopped or (ended and not sampling.ignore_eos):
                completion.finish_reason = "stop"
                running[row] = False
            if not running[row]:
                completion.text += text.flush()
        return running


def _append(completion: Completion, text: "_Text", tokens, logprobs, sampled) -> bool:
    """Appends tokens up to one that completes a stop string; returns whether one did.

    Those after it are left out, so that the size of a dispatch changes nothing.
    """
    for token, logprob, sampled_logprob in zip(tokens, logprobs, sampled, strict=True):
        completion.token_ids.append(token)
        completion.logprobs.append(logprob)
        completion.sampled_logprobs.append(sampled_logprob)
        piece, stopped = text.add(token)
        completion.text += piece
        if stopped:
            return True
    return False


class _Text:
    """What a row's tokens add to the text of its prompt, up to a stop string."""

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], stop_strings: Sequence[str]
    ):
        self._detokenizer = StreamingDetokenizer(tokenizer)
        # Sentencepiece drops a space at the start of a text: here the prompt's.
        self._detokenizer.add(prompt)
        self._stops = StopStrings(stop_strings)

    def add(self, token: int) -> tuple[str, bool]:
        """Returns the text that has become final, and whether a stop string came."""
        return self._stops.add(self._detokenizer.add([token]))

    def flush(self) -> str:
        """Returns the text held back, where nothing more will come."""
        piece, stopped = self._stops.add(self._detokenizer.flush())
        return piece if stopped else piece + self._stops.flush()


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


def check_tokens(
    name: str, tokens: Sequence[int], config: LlamaConfig, room: int = 0
) -> None:
    """Raises ValueError for tokens that the model can't take, `room` more to come."""
    limit = config.max_position_embeddings - room
    if not 1 <= len(tokens) <= limit:
        raise ValueError(
            f"{name} has {len(tokens)} tokens; give 1 to {limit} "
            f"(model.max_position_embeddings={config.max_position_embeddings})"
        )
    if not 0 <= min(tokens) <= max(tokens) < config.vocab_size:
        raise ValueError(
            f"{name} holds ids from {min(tokens)} to {max(tokens)}; give ids below "
            f"model.vocab_size={config.vocab_size}"
        )
