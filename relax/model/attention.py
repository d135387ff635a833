"""Self-attention with rotary positions, grouped queries and an optional cache."""

import dataclasses

import haiku as hk
from jax import Array

from relax.model.cache import read, write
from relax.model.config import LlamaConfig
from relax.model.context import Context
from relax.model.layers import Linear, RMSNorm
from relax.ops.attention import attention, attention_pattern
from relax.ops.rope import rotate


@dataclasses.dataclass
class SelfAttention(hk.Module):
    """Grouped-query attention (Ainslie et al. 2023) with RoPE on queries and keys."""

    config: LlamaConfig
    name: str | None = None

    def __call__(self, x: Array, buffers, layer, context: Context):
        """Returns `[B, T, D]`, the cache buffers with this layer's new slots, captures.

        `buffers` is the pair of `[L, B, S, K, H]` keys and values, or None.
        """
        config = self.config
        q = self._project(x, config.num_attention_heads, "q")
        k = self._project(x, config.num_key_value_heads, "k")
        v = self._project(x, config.num_key_value_heads, "v")
        q = rotate(context.constrain(q, HEADS), context.cos, context.sin)
        k = rotate(context.constrain(k, KV_HEADS), context.cos, context.sin)
        v = context.constrain(v, KV_HEADS)
        if buffers is not None:
            slots = context.mask.query_slots
            buffers = (
                write(buffers[0], layer.index, slots, k),
                write(buffers[1], layer.index, slots, v),
            )
            k, v = (read(buffer, layer.index) for buffer in buffers)
        mask = context.mask._replace(window=layer.window)
        captured = {}
        if "attn.pattern" in context.capture:
            captured["attn.pattern"] = attention_pattern(q, k, mask)
        out = attention(q, k, v, mask, context.attention)
        return self._output(context.constrain(out, HEADS)), buffers, captured

    @hk.transparent
    def _project(self, x: Array, heads: int, letter: str) -> Array:
        config = self.config
        y = Linear(
            (config.hidden_size,),
            (heads, config.head_width),
            init_std=config.initializer_range,
            dtype=config.param_dtype,
            bias=config.qkv_bias,
            name=f"{letter}_proj",
        )(x)
        if config.qk_norm and letter != "v":
            norm = RMSNorm(
                config.rms_norm_eps, config.param_dtype, name=f"{letter}_norm"
            )
            y = norm(y)
        return y

    @hk.transparent
    def _output(self, out: Array) -> Array:
        config = self.config
        return Linear(
            (config.num_attention_heads, config.head_width),
            (config.hidden_size,),
            init_std=residual_std(config),
            dtype=config.param_dtype,
            bias=config.attention_out_bias,
            name="o_proj",
        )(out)


HEADS = ("batch", "length", "heads", None)
KV_HEADS = ("batch", "length", "kv_heads", None)


def residual_std(config: LlamaConfig) -> float:
    """Returns the initial scale of what is added to the residual stream.

    Divided by sqrt(2L), so that the sum over the 2L additions keeps its scale (Radford
    et al. 2019, GPT-2, section 2.3).
    """
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
