"""Requests on their way through the slots of a cache."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from relax.generation.decode import Made, Rows, Steps
from relax.generation.requests import (
    Completion,
    CompletionText,
    GenerationStats,
    Request,
)
from relax.generation.slots import Slots
from relax.model.parameters import Params
from relax.sampling import Choice, Filters, SamplingConfig, SamplingParams


@dataclass(frozen=True)
class Plan:
    """What holds for all rows of a run.

    params: `[B]` each. stop_ids: the model's and those asked for. share: whether rows
    copy prefixes from one another. limit: tokens of a dispatch; first_limit: of the
    first one, where something is to be seen soon.
    """

    sampling: SamplingConfig
    params: SamplingParams
    filters: Filters
    stop_ids: tuple[int, ...]
    logit_bias: np.ndarray | None
    share: bool
    limit: int
    first_limit: int


class Work(NamedTuple):
    """Requests, how many tokens each may get, and what their answers have come to."""

    requests: Sequence[Request]
    limits: Sequence[int]
    texts: Sequence[CompletionText]
    completions: list[Completion]


class Run:
    """Requests, each in the first slot that gets free, until all are complete.

    row, shared: of the last request that began, its slot, and how many tokens of its
    prompt were in the cache.
    """

    def __init__(
        self,
        steps: Steps,
        slots: Slots,
        work: Work,
        plan: Plan,
        stats: GenerationStats,
    ):
        """`work.completions` grow with every dispatch."""
        self._steps, self._slots, self._work = steps, slots, work
        self._plan, self._stats = plan, stats
        self.row = self.shared = 0
        B = slots.rows
        self._owner: list[int | None] = [None] * B
        self._prompt_lengths, self._lengths = np.zeros((2, B), np.int32)
        self._remaining = np.zeros(B, np.int32)
        self._inputs, self._samples = np.zeros((2, B), np.uint32)

    def dispatches(self, params: Params) -> Iterator[list[int]]:
        """Yields after each dispatch the requests that it completed.

        A dispatch ends early where rows have ended and others wait for them.
        """
        self._slots.use(params)
        waiting = deque(range(len(self._work.requests)))
        limit = self._plan.first_limit
        while waiting or any(owner is not None for owner in self._owner):
            self._admit(waiting)
            self._slots.fill(params)
            # To leave a few rows idle for a while costs less than to fill each alone.
            patience = max(1, self._slots.rows // 4) if waiting else self._slots.rows
            made = self._decode(params, limit, patience)
            limit = self._plan.limit
            yield self._collect(made)

    def _admit(self, waiting: deque[int]) -> None:
        idle = [row for row, owner in enumerate(self._owner) if owner is None]
        while waiting and idle:
            index = waiting.popleft()
            request = self._work.requests[index]
            row, shared = self._slots.place(request.prompt, idle, self._plan.share)
            idle.remove(row)
            self._owner[row] = index
            self._prompt_lengths[row] = self._lengths[row] = len(request.prompt)
            self._remaining[row] = self._work.limits[index]
            self._inputs[row] = request.input_index
            self._samples[row] = request.sample_index
            self._stats.prompt_tokens += len(request.prompt)
            self._stats.shared_tokens += shared
            self.row, self.shared = row, shared

    def _decode(self, params: Params, limit: int, patience: int) -> Made:
        plan, sampling = self._plan, self._plan.sampling
        B = self._slots.rows
        rows = Rows(
            text=self._slots.text,
            lengths=self._lengths,
            prompt_lengths=self._prompt_lengths,
            remaining=self._remaining,
            seeds=np.full(B, sampling.seed, np.uint32),
            inputs=self._inputs,
            samples=self._samples,
            ignore_eos=np.full(B, sampling.ignore_eos),
            params=plan.params,
            stop_ids=np.asarray(plan.stop_ids, np.int32),
            logit_bias=plan.logit_bias,
        )
        cache, made = self._steps.decode(
            params,
            self._slots.take_cache(),
            rows,
            limit,
            patience,
            chunk=sampling.tokens_per_dispatch,
            drafts=sampling.speculate,
            filters=plan.filters,
        )
        self._slots.put_cache(cache)
        return jax.device_get(made)

    def _collect(self, made: Made) -> list[int]:
        """Appends a dispatch's tokens; returns the requests that are complete."""
        self._stats.new_tokens += int(made.counts.sum())
        self._stats.drafted_tokens += int(made.drafted)
        self._stats.accepted_tokens += int(made.accepted)
        self._remaining[:] = made.remaining
        ended = []
        for row, index in enumerate(self._owner):
            if index is None:
                continue
            count, length = int(made.counts[row]), self._lengths[row]
            tokens = made.choices.tokens[row, :count]
            self._slots.text[row, length : length + count] = tokens
            if self._append(index, made.choices, row, tokens.tolist()):
                self._remaining[row] = 0
            completion = self._work.completions[index]
            self._lengths[row] = self._prompt_lengths[row] + len(completion.token_ids)
            # The newest token has not been through the model.
            self._slots.held[row] = self._lengths[row] - 1
            if self._remaining[row] == 0:
                self._owner[row] = None
                completion.text += self._work.texts[index].flush()
                ended.append(index)
        return ended

    def _append(self, index: int, made: Choice, row: int, tokens: list[int]) -> bool:
        """Appends a row's tokens; returns whether they have come to a stop.

        Those after the one that completes a stop string are left out, so that the size
        of a dispatch changes nothing.
        """
        completion, plan = self._work.completions[index], self._plan
        count, text, stopped = self._read(index, tokens)
        completion.text += text
        completion.token_ids += tokens[:count]
        completion.logprobs += made.logprobs[row, :count].tolist()
        completion.sampled_logprobs += made.sampled_logprobs[row, :count].tolist()
        if plan.filters.num_top_logprobs:
            ids = made.top_ids[row, :count].tolist()
            logprobs = made.top_logprobs[row, :count].tolist()
            for pair in zip(ids, logprobs, strict=True):
                completion.top_logprobs.append(list(zip(*pair, strict=True)))
        if plan.filters.keep_support:
            completion.support += list(made.support[row, :count])
        # The device makes nothing after a token that ends the row.
        if not plan.sampling.ignore_eos:
            stopped |= not set(tokens[count - 1 : count]).isdisjoint(plan.stop_ids)
        if stopped:
            completion.finish_reason = "stop"
        return stopped

    def _read(self, index: int, tokens: list[int]) -> tuple[int, str, bool]:
        """Returns how many tokens count, their text, and whether a stop string came."""
        text = self._work.texts[index]
        if not self._plan.sampling.stop_strings:
            return len(tokens), text.add(*tokens)[0], False
        pieces = []
        for count, token in enumerate(tokens, 1):
            piece, stopped = text.add(token)
            pieces.append(piece)
            if stopped:
                return count, "".join(pieces), True
        return len(tokens), "".join(pieces), False
