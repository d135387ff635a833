"""One transformer layer."""

import dataclasses

import haiku as hk
import jax
from jax import Array

from relax.model.attention import SelfAttention, residual_std
from relax.model.config import LlamaConfig
from relax.model.context import Context, LayerInputs
from relax.model.layers import Linear, RMSNorm, adapter_for
from relax.ops.dropout import dropout
from relax.ops.feed_forward import gate


@dataclasses.dataclass
class FeedForward(hk.Module):
    """down(act(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    config: LlamaConfig
    name: str | None = None

    def __call__(self, x: Array, layer: LayerInputs, context: Context) -> Array:
        """Returns `[B, T, D]` for `[B, T, D]`."""
        config, key = self.config, layer.dropout_key
        width, inner = config.hidden_size, config.intermediate_size
        std = config.initializer_range
        hidden = gate(
            self._linear(width, inner, std, "gate_proj")(x, key),
            self._linear(width, inner, std, "up_proj")(x, key),
            config.hidden_act,
        )
        hidden = context.constrain(hidden, ("batch", "length", "mlp"))
        down = self._linear(inner, width, residual_std(config), "down_proj")
        return down(hidden, key)

    @hk.transparent
    def _linear(self, inputs: int, outputs: int, std: float, name: str) -> Linear:
        dtype, bias = self.config.param_dtype, self.config.mlp_bias
        adapter = adapter_for(self.config, name)
        return Linear((inputs,), (outputs,), std, dtype, bias, adapter, name=name)


@dataclasses.dataclass
class Block(hk.Module):
    """A pre-norm layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    config: LlamaConfig
    name: str | None = None

    def __call__(self, carry, layer: LayerInputs, context: Context):
        """Returns the new carry `(x, cache buffers)` and what this layer captured."""
        x, buffers = carry
        before = x
        keys = (None, None)
        if layer.dropout_key is not None:
            keys = jax.random.split(layer.dropout_key)
        attended, buffers, captured = SelfAttention(self.config, name="self_attn")(
            self._norm("input_layernorm")(x), buffers, layer, context
        )
        x = x + dropout(attended, self.config.dropout, keys[0])
        x = context.constrain(x, RESIDUAL)
        fed = FeedForward(self.config, name="mlp")(
            self._norm("post_attention_layernorm")(x), layer, context
        )
        x = x + dropout(fed, self.config.dropout, keys[1])
        x = context.constrain(x, RESIDUAL)
        captured |= {"resid_pre": before, "resid_post": x}
        return (x, buffers), {site: captured[site] for site in context.capture}

    @hk.transparent
    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.rms_norm_eps, self.config.param_dtype, name=name)


RESIDUAL = ("batch", "length", None)
