"""A small model whose every parameter matters."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.model.config import LlamaConfig
from relax.model.llama import LlamaOutput, make_llama
from relax.model.parameters import flat_parameters, parameter_shapes
from relax.ops.logprobs import compute_logits


class SmallModel(NamedTuple):
    """A model of `config` with random parameters."""

    config: LlamaConfig
    params: dict

    def forward(self, params, tokens, **inputs) -> LlamaOutput:
        """Returns what the model returns, compiled once per configuration."""
        return _compiled(self.config)(params, jnp.asarray(tokens), **inputs)

    def logits(self, tokens, **inputs) -> np.ndarray:
        """Returns the float32 logits `[B, T, V]` of the real vocabulary."""
        return self.logits_of(self.params, tokens, **inputs)

    def logits_of(self, params, tokens, **inputs):
        out = self.forward(params, tokens, **inputs)
        logits = compute_logits(out.hidden, out.unembedding, self.config.vocab_size)
        return logits[..., : self.config.vocab_size]


@functools.cache
def _compiled(config):
    return jax.jit(make_llama(config).apply)


@pytest.fixture(scope="session")
def small_model(make_config):
    """A callable: the small model with the given fields of its configuration replaced.

    Biases and the weights of norms are random too, so that none of them can be left
    out, and the others large enough for attention to be far from uniform.
    """

    @functools.cache
    def build(**fields) -> SmallModel:
        config = make_config(**fields)
        return SmallModel(config, random_params(config))

    return build


def random_params(config) -> dict:
    """Returns parameters that depend on their path and shape alone."""
    params = {}
    for path, leaf in flat_parameters(parameter_shapes(config)):
        module, name = path.rsplit("/", 1)
        rng = np.random.default_rng(list(path.encode()))
        value = rng.normal(scale=0.2, size=leaf.shape) + module.endswith("norm")
        params.setdefault(module, {})[name] = jnp.asarray(value, leaf.dtype)
    return params
