"""One growing text whose cache outlives a reply."""

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from relax.generation.decode import grown
from relax.generation.generator import (
    Batch,
    Completion,
    Generator,
    Request,
    bucket,
    pad,
)
from relax.model.cache import Cache
from relax.model.parameters import Params
from relax.sampling import SamplingConfig


class _Kept(NamedTuple):
    """A cache, the ids whose keys and values it holds, and the parameters behind them.

    The parameters are known by their leaves, which this does not keep alive.
    """

    tokens: list[int]
    cache: Cache | None
    leaves: list[weakref.ref]


_NOTHING = _Kept([], None, [])


class Session:
    """One growing text with its cache: each reply runs only the tokens that are new.

    completion: of the last reply, filled as it goes. prefilled, reused: how many tokens
    of its prompt were run, and were found in the cache.
    """

    def __init__(self, generator: Generator):
        self._generator = generator
        self._kept = _NOTHING
        self._open: Iterator[str] | None = None
        self.completion = Completion()
        self.prefilled = 0
        self.reused = 0

    @property
    def length(self) -> int:
        """How many tokens the cache holds."""
        return len(self._surviving().tokens)

    def reply(
        self,
        params: Params,
        tokens: Sequence[int],
        sampling: SamplingConfig,
        *,
        sample_index: int = 0,
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
    ) -> Iterator[str]:
        """Returns an iterator that makes a reply and yields its text by dispatch.

        tokens: the whole text so far. What it shares with what the cache holds, prompts
            and replies, is not run again, but for its last token.
        stop_ids, stop_strings: besides the generator's and those of `sampling`.

        The reply is that of `Generator.run` for input 0. The iterator may be closed
        before its end, which another call does too: the session keeps what was made. A
        piece may be empty. Raises ValueError for a text that can't be completed.
        """
        request = Request(tuple(map(int, tokens)), 0, sample_index)
        stop_strings = (*sampling.stop_strings, *stop_strings)
        sampling = replace(sampling, stop_strings=stop_strings)
        batch = self._generator.prepare([request], sampling, stop_ids)
        if self._open is not None:
            self._open.close()
        self._open = self._reply(params, request.prompt, batch)
        return self._open

    def _reply(self, params, prompt: tuple[int, ...], batch: Batch) -> Iterator[str]:
        completion = self.completion = Completion()
        leaves = [weakref.ref(leaf) for leaf in jax.tree.leaves(params)]
        start, sent = self._start(params, prompt, batch), 0
        for state in self._generator.dispatches(params, start, batch, [completion]):
            # The newest token has not been through the model.
            tokens = [*prompt, *completion.token_ids[:-1]]
            self._kept = _Kept(tokens, state.cache, leaves)
            yield completion.text[sent:]
            sent = len(completion.text)

    def _start(self, params, prompt: tuple[int, ...], batch: Batch):
        """Returns the state after the prompt, and its first token."""
        cache = self._take(params, prompt)
        if cache is None:
            return self._generator.prefill(params, batch)
        if cache.capacity < batch.capacity:
            cache = grown(cache, batch.capacity)
        new, B = prompt[self.reused :], len(batch.lengths)
        return self._generator.steps.extend(
            params,
            cache,
            pad([new] * B, bucket(len(new), cache.capacity)),
            np.full(B, len(new), np.int32),
            pad([prompt] * B, cache.capacity),
            batch.remaining,
            batch.rows,
            filters=batch.filters,
        )

    def _take(self, params, prompt: tuple[int, ...]) -> Cache | None:
        """Returns the cache, cut to what it shares with the prompt; None for nothing.

        Leaves the session empty: the steps use the cache up.
        """
        kept, self._kept = self._surviving(), _NOTHING
        self.reused = 0
        if _same_arrays(kept.leaves, params):
            # The last token is run in any case: it gives the first logits.
            self.reused = min(_common_length(prompt, kept.tokens), len(prompt) - 1)
        self.prefilled = len(prompt) - self.reused
        return _shortened(kept.cache, self.reused) if self.reused else None

    def _surviving(self) -> _Kept:
        """Returns what is kept, unless a dispatch failed after it had used it up."""
        cache = self._kept.cache
        return _NOTHING if cache is None or cache.keys.is_deleted() else self._kept


def _shortened(cache: Cache, length: int) -> Cache:
    """Returns the cache of the first `length` tokens: what is after may be anything."""
    return cache._replace(lengths=jnp.full_like(cache.lengths, length))


def _same_arrays(leaves: list[weakref.ref], params) -> bool:
    given = jax.tree.leaves(params)
    return len(leaves) == len(given) and all(
        known() is leaf for known, leaf in zip(leaves, given, strict=True)
    )


def _common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Returns how many ids two lists begin with alike."""
    pairs = zip(first, second, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
