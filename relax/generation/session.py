"""One growing text whose cache outlives a reply."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from relax.generation.generator import Generator
from relax.generation.requests import Completion, Request
from relax.generation.run import Run
from relax.generation.slots import Slots
from relax.model.parameters import Params
from relax.sampling import SamplingConfig


class Session:
    """One growing text with its cache: each reply runs only the tokens that are new.

    completion: of the last reply, filled as it goes. prefilled, reused: how many tokens
    of its prompt were run, and were found in the cache.
    """

    def __init__(self, generator: Generator):
        self._generator = generator
        self._slots: Slots | None = None
        self._row = 0
        self._open: Iterator[str] | None = None
        self.completion = Completion()
        self.prefilled = 0
        self.reused = 0

    @property
    def length(self) -> int:
        """How many tokens the cache holds."""
        return 0 if self._slots is None else self._slots.surviving(self._row)

    def reply(
        self,
        params: Params,
        tokens: Sequence[int],
        sampling: SamplingConfig,
        *,
        sample_index: int = 0,
        limit: int | None = None,
        stop_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
    ) -> Iterator[str]:
        """Returns an iterator that makes a reply and yields its text by dispatch.

        tokens: the whole text so far. What it shares with what the cache holds, prompts
            and replies, is not run again, but for its last token.
        limit: tokens between two pieces, at most `sampling.tokens_per_dispatch`.
        stop_ids, stop_strings: besides the generator's and those of `sampling`.

        The reply is that of `Generator.run` for input 0. The iterator may be closed
        before its end, which another call does too: the session keeps what was made. A
        piece may be empty. Raises ValueError for a text that can't be completed.
        """
        if sampling.num_beams > 1:
            raise ValueError(
                f"sampling.num_beams={sampling.num_beams}: a reply is made token by "
                "token; set sampling.num_beams=1"
            )
        request = Request(tuple(map(int, tokens)), 0, sample_index)
        stop_strings = (*sampling.stop_strings, *stop_strings)
        sampling = replace(sampling, stop_strings=stop_strings)
        generator = self._generator
        longest = generator.longest([request], sampling)
        if self._slots is None:
            self._slots = generator.new_slots(1, longest)
        slots = self._slots
        plan = generator.plan(slots.rows, sampling, True, limit, 1, stop_ids)
        completion = Completion()
        run = generator.start(slots, [request], plan, [completion])
        if self._open is not None:
            self._open.close()
        capacity = generator.rounded(longest)
        self._open = self._reply(params, run, request, completion, capacity)
        return self._open

    def _reply(
        self,
        params: Params,
        run: Run,
        request: Request,
        completion: Completion,
        capacity: int,
    ) -> Iterator[str]:
        self.completion, sent = completion, 0
        self._slots.grow(capacity)
        for _ in run.dispatches(params):
            self._row, self.reused = run.row, run.shared
            self.prefilled = len(request.prompt) - run.shared
            yield completion.text[sent:]
            sent = len(completion.text)
