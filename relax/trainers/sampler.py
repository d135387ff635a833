"""Completions in training: the engine, with a training step's own parameters."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from relax.generation.generator import Generator
from relax.generation.requests import Completion, GenerationStats, Request
from relax.model.llama import make_llama
from relax.model.parameters import Params, parameter_shapes, with_layers
from relax.sampling import SamplingConfig
from relax.sharding import batch_multiple, make_constrain
from relax.trainers.config import Setup


class Sampler:
    """Completes prompts with the function that is trained, in the same dtype.

    Scanned layers are unrolled for it, once for each set of parameters: they decode
    faster so. extra_bytes: what that takes.
    """

    def __init__(self, setup: Setup):
        config = setup.model
        self._config = replace(config, scan_layers=False)
        self.extra_bytes = _layer_bytes(setup) if config.scan_layers else 0
        self._unroll = jax.jit(lambda params: with_layers(config, params, False)[1])
        constrain = make_constrain(setup.mesh)
        self._generator = Generator(
            make_llama(self._config, constrain).apply,
            self._config,
            setup.tokenizer,
            setup.stop_ids,
            batch_multiple(setup.mesh),
            constrain,
        )

    @property
    def stats(self) -> GenerationStats:
        """Counts of what was generated so far."""
        return self._generator.stats

    def check(self, sampling: SamplingConfig) -> None:
        """Raises ValueError for what can't be sampled."""
        self._generator.plan(1, sampling)

    def decoding_params(self, params: Params) -> Params:
        """Returns the parameters in the form that is decoded with."""
        return self._unroll(params) if self.extra_bytes else params

    def complete(
        self,
        params: Any,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        rows: int,
        capacity: int | None = None,
        keep_support: bool = False,
    ) -> list[Completion]:
        """Returns a completion per request, `rows` of them run at a time.

        params: of `decoding_params`. capacity: tokens of a row, None: as many as the
        longest needs. keep_support: see `Completion.support`.
        """
        completions = [Completion() for _ in requests]
        for _ in self._generator.run_in_chunks(
            params,
            requests,
            sampling,
            completions,
            batch_size=rows,
            capacity=capacity,
            keep_support=keep_support,
        ):
            pass
        return completions


def _layer_bytes(setup: Setup) -> int:
    """Returns the bytes of the layers' parameters."""
    shapes = parameter_shapes(setup.model)
    return sum(
        leaf.size * leaf.dtype.itemsize
        for module, leaves in shapes.items()
        if "/layers/" in module
        for leaf in leaves.values()
    )
