"""Completions of prompts: what a model's compiled functions are used through."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from relax.generation.beam import Beam, BeamSearch
from relax.generation.constraints import make_constraint
from relax.generation.decode import make_steps
from relax.generation.requests import (
    Completion,
    CompletionText,
    GenerationStats,
    Request,
    allowed_tokens,
    bias_of,
    bucket,
    check_ids,
    check_request,
    power_of_two,
)
from relax.generation.run import Plan, Run, Work
from relax.generation.slots import Slots
from relax.model.config import LlamaConfig
from relax.model.context import Constrain, unconstrained
from relax.model.parameters import Params
from relax.sampling import SamplingConfig, sampling_params
from relax.text.tokenizers import Tokenizer

CAPACITY_STEP = 32
# A stop string is seen when the host looks: what is made after it was made for nothing.
DISPATCH_WITH_STOP_STRINGS = 16


class Generator:
    """Samples from one model; its compiled functions are kept between calls."""

    def __init__(
        self,
        apply: Callable,
        config: LlamaConfig,
        tokenizer: Tokenizer | None,
        stop_ids: tuple[int, ...],
        batch_multiple: int = 1,
        constrain: Constrain = unconstrained,
    ):
        """`tokenizer`: None gives completions without text.

        `batch_multiple`: what the number of rows must be a multiple of, and `constrain`
        how they are laid out (of a mesh).
        """
        self._config = config
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._batch_multiple = batch_multiple
        self._num_ids = config.vocab_size
        if tokenizer is not None:
            self._num_ids = min(self._num_ids, tokenizer.vocab_size)
        self.steps = make_steps(apply, config, self._num_ids, constrain)
        self.beam_search = BeamSearch(apply, config, self._num_ids)
        self._stats = GenerationStats()

    @property
    def stats(self) -> GenerationStats:
        """What was done so far."""
        programs = self.steps.programs() + self.beam_search.programs
        self._stats.programs = programs
        return self._stats

    def check(self, request: Request) -> None:
        """Raises ValueError where the prompt can't be completed."""
        check_request(request, self._config)

    def run(
        self,
        params: Params,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        *,
        keep_support: bool = False,
    ) -> list[Completion]:
        """Returns one completion per request, in order, all run at a time."""
        completions = [Completion() for _ in requests]
        for _ in self.run_in_chunks(
            params, requests, sampling, completions, keep_support=keep_support
        ):
            pass
        return completions

    def run_in_chunks(
        self,
        params: Params,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        completions: list[Completion],
        *,
        batch_size: int | None = None,
        capacity: int | None = None,
        share_prefixes: bool = True,
        limit: int | None = None,
        first_limit: int | None = None,
        keep_support: bool = False,
        slots: Slots | None = None,
    ) -> Iterator[list[int]]:
        """Extends `completions`, and yields after each dispatch those now complete.

        The device makes at most `limit` tokens a dispatch, `first_limit` in the first
        (None: as many as `sampling.tokens_per_dispatch`, which is the most); rows that
        met a stop string between two of them end there. batch_size: rows at a time,
        None: all. capacity: slots of a row, None: as many as the longest needs.
        keep_support: whether completions tell among which ids each token was drawn.
        slots: of `new_slots`, which so outlive a call: they give the rows, and what
        they hold of the same parameters is not run again. Raises ValueError where a
        request can't be completed.
        """
        if not requests:
            return
        rows = batch_size or len(requests)
        if sampling.num_beams > 1:
            yield from self._search(params, requests, sampling, completions, rows)
            return
        longest = self.longest(requests, sampling)
        if slots is None:
            slots = self.new_slots(rows, longest, capacity)
        elif longest > slots.capacity:
            slots.grow(self.rounded(longest))
        plan = self.plan(
            slots.rows,
            sampling,
            share_prefixes,
            limit,
            first_limit,
            keep_support=keep_support,
        )
        run = self.start(slots, requests, plan, completions)
        yield from run.dispatches(params)

    def _search(
        self,
        params: Params,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        completions: list[Completion],
        rows: int,
    ) -> Iterator[list[int]]:
        """Gives sample s of an input its s-th best beam, `rows` beams at a time."""
        self.longest(requests, sampling)  # checks them
        count = 1 + max(request.sample_index for request in requests)
        if count > sampling.num_beams:
            raise ValueError(
                f"sample {count - 1} is asked for: sampling.num_beams="
                f"{sampling.num_beams} has samples from 0 to {sampling.num_beams - 1}"
            )
        sampling = replace(sampling, num_return_sequences=count)
        plan = self.plan(1, sampling)
        inputs: dict[Request, list[int]] = {}
        for index, request in enumerate(requests):
            inputs.setdefault(replace(request, sample_index=0), []).append(index)
        for some in _batches(inputs.items(), max(1, rows // sampling.num_beams)):
            heads, samples = zip(*some, strict=True)
            found = self.beam_search(
                params, heads, sampling, plan.stop_ids, plan.filters.constraint
            )
            self._stats.prompt_tokens += sum(len(head.prompt) for head in heads)
            for head, indices, beams in zip(heads, samples, found, strict=True):
                for index in indices:
                    rank = requests[index].sample_index
                    if rank < len(beams):
                        self._fill(completions[index], head, beams[rank])
                    else:
                        completions[index].finish_reason = "none"
            yield [index for indices in samples for index in indices]

    def _fill(self, completion: Completion, request: Request, beam: Beam) -> None:
        completion.token_ids, completion.logprobs = beam.token_ids, beam.logprobs
        completion.finish_reason, completion.score = beam.finish_reason, beam.score
        text = CompletionText(self._tokenizer, request.prompt, ())
        pieces = [text.add(token)[0] for token in beam.token_ids]
        completion.text = "".join(pieces) + text.flush()
        self._stats.new_tokens += len(beam.token_ids)

    def longest(self, requests: Sequence[Request], sampling: SamplingConfig) -> int:
        """Returns how many tokens the longest row may come to, its prompt included.

        Raises ValueError where a request can't be completed.
        """
        for request in requests:
            self.check(request)
        return max(
            len(request.prompt) + allowed_tokens(request, sampling, self._config)
            for request in requests
        )

    def new_slots(self, rows: int, longest: int, capacity: int | None = None) -> Slots:
        """Returns room for so many rows of so many tokens, both rounded up.

        To powers of two, so that few shapes are compiled, and to what a mesh needs. A
        `capacity` that is asked for, above `longest`, is rounded to CAPACITY_STEP.
        """
        multiple = self._batch_multiple
        rows = -(-power_of_two(rows) // multiple) * multiple
        # Rows of a mesh are run all together: each is on the devices it is on.
        together = rows if multiple > 1 else 1
        size = self.rounded(longest)
        if capacity is not None:
            size = -(-max(longest, capacity) // CAPACITY_STEP) * CAPACITY_STEP
            size = min(size, self._config.max_position_embeddings)
        return Slots(self.steps, rows, size, together)

    def rounded(self, capacity: int) -> int:
        """Returns the slots to allocate for a capacity."""
        return bucket(capacity, self._config.max_position_embeddings)

    def plan(
        self,
        rows: int,
        sampling: SamplingConfig,
        share: bool = True,
        limit: int | None = None,
        first_limit: int | None = None,
        stop_ids: Sequence[int] = (),
        keep_support: bool = False,
    ) -> Plan:
        """Returns what holds for all rows; `stop_ids` add to the model's.

        Raises ValueError for ids that the model does not choose.
        """
        self._check_sampling(sampling)
        stop_ids = (*self._stop_ids, *sampling.stop_token_ids, *stop_ids)
        stop_ids = tuple(dict.fromkeys(stop_ids))
        columns = self._config.padded_vocab_size
        constraint = make_constraint(sampling, self._tokenizer, stop_ids, columns)
        params, filters = sampling_params([sampling] * rows, constraint, keep_support)
        most = sampling.tokens_per_dispatch
        if sampling.stop_strings:
            most = min(most, DISPATCH_WITH_STOP_STRINGS)
        limit = min(most, limit or most)
        return Plan(
            sampling=sampling,
            params=params,
            filters=filters,
            stop_ids=stop_ids,
            logit_bias=bias_of(sampling, columns),
            share=share,
            limit=limit,
            first_limit=min(limit, first_limit or limit),
        )

    def _check_sampling(self, sampling: SamplingConfig) -> None:
        check_ids(sampling, self._num_ids)
        if sampling.num_beams == 1:
            return
        for name in ("stop_strings", "num_top_logprobs"):
            if value := getattr(sampling, name):
                raise ValueError(
                    f"sampling.{name}={value} does not go with beams; set "
                    f"sampling.num_beams=1 instead of {sampling.num_beams}"
                )

    def start(
        self,
        slots: Slots,
        requests: Sequence[Request],
        plan: Plan,
        completions: list[Completion],
    ) -> Run:
        """Returns the run that fills `completions`.

        Raises ValueError where stop strings need a tokenizer that there is not.
        """
        sampling = plan.sampling
        strings = sampling.stop_strings
        texts = [CompletionText(self._tokenizer, r.prompt, strings) for r in requests]
        limits = [allowed_tokens(r, sampling, self._config) for r in requests]
        todo = Work(requests, limits, texts, completions)
        return Run(self.steps, slots, todo, plan, self._stats)


def _batches(items: Iterable, size: int) -> Iterator[tuple]:
    """Yields the items in tuples of `size`, the last of which may be shorter."""
    iterator = iter(items)
    while batch := tuple(islice(iterator, size)):
        yield batch
