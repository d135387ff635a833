"""The gated feed-forward layer's nonlinearity."""

from functools import partial

import jax
from jaxtyping import Array, Float

# As transformers names them: `gelu` is exact (erf), `gelu_tanh` approximates it.
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


def gate(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"], activation: str
) -> Float[Array, "*batch F"]:
    """Returns `activation(gate) * up` (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""
    return ACTIVATIONS[activation](gate) * up
