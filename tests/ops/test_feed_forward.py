import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.ops.feed_forward import ACTIVATIONS, gate

# Negative, zero, positive; where gelu and its approximation differ most (about 2).
POINTS = np.float32([-7.0, -2.0, -0.5, -0.0625, 0.0, 0.3, 1.0, 2.2, 11.0])


def silu(x):
    return x / (1.0 + math.exp(-x))


def gelu(x):
    return x * 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def gelu_tanh(x):
    return x * 0.5 * (1.0 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def relu(x):
    return max(x, 0.0)


DEFINITIONS = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}


def test_every_activation_has_a_definition_here():
    assert set(DEFINITIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", DEFINITIONS)
def test_gate_equals_its_definition(activation):
    up = np.float32(np.random.default_rng(1).normal(size=(3, len(POINTS))))
    actual = gate(jnp.tile(POINTS, (3, 1)), jnp.asarray(up), activation)
    expected = up * [DEFINITIONS[activation](float(x)) for x in POINTS]
    # In the left tail 1 + erf and 1 + tanh cancel to a float32 spacing of 6e-8, times
    # an x of 7.
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=5e-7)


@pytest.mark.parametrize("activation", DEFINITIONS)
def test_gate_and_its_gradients_equal_those_of_torch(activation):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    peers = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
    }
    up = np.float32(np.random.default_rng(2).normal(size=len(POINTS)))
    d_out = np.float32(np.random.default_rng(3).normal(size=len(POINTS)))
    out, vjp = jax.vjp(
        lambda g, u: gate(g, u, activation), jnp.asarray(POINTS), jnp.asarray(up)
    )
    gate_torch = torch.tensor(POINTS, requires_grad=True)
    up_torch = torch.tensor(up, requires_grad=True)
    peer = peers[activation](gate_torch) * up_torch
    peer.backward(torch.tensor(d_out))
    np.testing.assert_allclose(out, peer.detach(), rtol=1e-6, atol=5e-7)
    d_gate, d_up = vjp(jnp.asarray(d_out))
    np.testing.assert_allclose(d_gate, gate_torch.grad, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(d_up, up_torch.grad, rtol=1e-6, atol=5e-7)
