"""Completions of prompts: batches, buckets and the loop over dispatches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from relax.generation.decode import PAD, DecodeState, Rows, make_steps
from relax.model.config import LlamaConfig
from relax.sampling import Choice, Filters, SamplingConfig, row_key, sampling_params
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
        tokenizer: Tokenizer | None,
        stop_ids: tuple[int, ...],
        batch_multiple: int = 1,
    ):
        """`tokenizer`: None gives completions without text.

        `batch_multiple`: what the number of rows must be a multiple of (a mesh).
        """
        self._config = config
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._batch_multiple = batch_multiple
        num_ids = config.vocab_size
        if tokenizer is not None:
            num_ids = min(num_ids, tokenizer.vocab_size)
        self.steps = make_steps(apply, config, num_ids)

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
        batch = self.prepare(requests, sampling)
        start = self.prefill(params, batch)
        for _ in self.dispatches(params, start, batch, completions):
            yield

    def prepare(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        stop_ids: Sequence[int] = (),
    ) -> "Batch":
        """Returns what the steps need to know of each row; `stop_ids` add to its own.

        Raises ValueError where a prompt can't be completed.
        """
        for request in requests:
            self.check(request)
        # Rows that fill up the batch repeat the first, and are allowed no token.
        extra = -len(requests) % self._batch_multiple
        padded = [*requests, *[requests[0]] * extra]
        lengths = [len(request.prompt) for request in padded]
        limit = self._config.max_position_embeddings
        new = [min(sampling.max_new_tokens, limit - length) for length in lengths]
        stop_ids = (*self._stop_ids, *stop_ids)
        keys = [row_key(sampling.seed, r.input_index, r.sample_index) for r in padded]
        params, filters = sampling_params([sampling] * len(padded))
        return Batch(
            tokens=pad(
                [request.prompt for request in padded], bucket(max(lengths), limit)
            ),
            lengths=np.asarray(lengths, np.int32),
            remaining=np.asarray(new[: len(requests)] + [0] * extra, np.int32),
            rows=Rows(
                jnp.stack(keys),
                params,
                ignore_eos=np.full(len(padded), sampling.ignore_eos),
                stop_ids=np.asarray(stop_ids, np.int32),
            ),
            capacity=bucket(max(map(sum, zip(lengths, new, strict=True))), limit),
            filters=filters,
            sampling=sampling,
            stop_ids=stop_ids,
            texts=[
                _Text(self._tokenizer, request.prompt, sampling.stop_strings)
                for request in requests
            ],
        )

    def prefill(self, params, batch: "Batch") -> tuple[DecodeState, Choice]:
        """Returns the state after the prompts, and the first tokens."""
        return self.steps.prefill(
            params,
            batch.tokens,
            batch.lengths,
            batch.remaining,
            batch.rows,
            capacity=batch.capacity,
            filters=batch.filters,
        )

    def dispatches(
        self,
        params,
        start: tuple[DecodeState, Choice],
        batch: "Batch",
        completions: list[Completion],
    ) -> Iterator[DecodeState]:
        """Extends `completions` from a start on, and yields after each dispatch.

        What it yields belongs to it: the next dispatch uses up the arrays.
        """
        state, choice = start
        while True:
            running = _collect(completions, batch, choice, state)
            yield state
            if not running.any():
                return
            state, choice = self.steps.decode(
                params,
                state._replace(remaining=jnp.where(running, state.remaining, 0)),
                batch.rows,
                chunk=batch.sampling.tokens_per_dispatch,
                filters=batch.filters,
            )


@dataclass(frozen=True)
class Batch:
    """Rows to complete: what the steps take of them, and what their text has come to.

    tokens, lengths: the prompts `[B, T]`, right-padded, and how long they are `[B]`.
    remaining: how many tokens each row may get `[B]`. capacity: slots that hold any row
    to its end. stop_ids: those of `rows`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    remaining: np.ndarray
    rows: Rows
    capacity: int
    filters: Filters
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    texts: list["_Text"]


def _collect(
    completions: list[Completion], batch: Batch, choice: Choice, state: DecodeState
) -> np.ndarray:
    """Appends a dispatch's tokens; returns which rows go on `[B]`."""
    choice, remaining = jax.device_get((choice, state.remaining))
    running = remaining > 0
    for row, (completion, text) in enumerate(
        zip(completions, batch.texts, strict=True)
    ):
        made = choice.tokens[row] != PAD
        if not made.any():
            continue
        columns = [column[row][made].tolist() for column in choice]
        stopped = _append(completion, text, *columns)
        ended = completion.token_ids[-1] in batch.stop_ids
        if stopped or (ended and not batch.sampling.ignore_eos):
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
    """What a row's tokens add to the text of its prompt, up to a stop string.

    Nothing where there is no tokenizer; stop strings are a ValueError then.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        stop_strings: Sequence[str],
    ):
        if tokenizer is None and stop_strings:
            raise ValueError(
                f"sampling.stop_strings={list(stop_strings)} need a tokenizer, which "
                "this model lacks; set sampling.stop_strings=[]"
            )
        self._detokenizer = tokenizer and StreamingDetokenizer(tokenizer)
        self._stops = StopStrings(stop_strings)
        if tokenizer is not None:
            # Sentencepiece drops a space at the start of a text: here the prompt's.
            self._detokenizer.add(prompt)

    def add(self, token: int) -> tuple[str, bool]:
        """Returns the text that has become final, and whether a stop string came."""
        if self._detokenizer is None:
            return "", False
        return self._stops.add(self._detokenizer.add([token]))

    def flush(self) -> str:
        """Returns the text held back, where nothing more will come."""
        if self._detokenizer is None:
            return ""
        piece, stopped = self._stops.add(self._detokenizer.flush())
        return piece if stopped else piece + self._stops.flush()


def bucket(length: int, limit: int) -> int:
    """Returns the next power of two, at least BUCKET: few shapes are compiled.

    At most `limit`, the context, which no row exceeds.
    """
    return min(limit, max(BUCKET, 1 << (length - 1).bit_length()))


def pad(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Returns rows of ids `[B, width]`, right-padded."""
    padded = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


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
