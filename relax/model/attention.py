"""Self-attention with rotary positions, grouped queries and an optional cache."""

import dataclasses

import haiku as hk
import jax.numpy as jnp
from jax import Array

from relax.model.cache import read, write
from relax.model.config import LlamaConfig
from relax.model.context import CachePlace, Context
from relax.model.layers import Linear, RMSNorm, adapter_for
from relax.ops.attention import attention, attention_pattern
from relax.ops.cached_attention import cached_attention
from relax.ops.masks import AttentionMask
from relax.ops.rope import rotate


@dataclasses.dataclass
class SelfAttention(hk.Module):
    """Grouped-query attention (Ainslie et al. 2023) with RoPE on queries and keys."""

    config: LlamaConfig
    name: str | None = None

    def __call__(self, x: Array, buffers, layer, context: Context):
        """Returns `[B, T, D]`, the cache buffers with this layer's new slots, captures.

        `buffers` is the pair of the cache's keys and values, or None.
        """
        config = self.config
        key = layer.dropout_key
        q = self._project(x, config.num_attention_heads, "q", key)
        k = self._project(x, config.num_key_value_heads, "k", key)
        v = self._project(x, config.num_key_value_heads, "v", key)
        q = rotate(context.constrain(q, HEADS), context.cos, context.sin)
        k = rotate(context.constrain(k, KV_HEADS), context.cos, context.sin)
        v = context.constrain(v, KV_HEADS)
        mask = context.mask._replace(window=layer.window)
        if buffers is not None:
            buffers = _written(buffers, layer.index, context.place, k, v)
        captured = {}
        if "attn.pattern" in context.capture:
            keys = k if buffers is None else _all_keys(buffers, layer.index, context)
            captured["attn.pattern"] = attention_pattern(q, keys, mask)
        if buffers is None:
            out = attention(q, k, v, mask, context.attention)
        else:
            out = _attend_cached(q, buffers, layer.index, context.place, mask)
        return self._output(context.constrain(out, HEADS), key), buffers, captured

    @hk.transparent
    def _project(self, x: Array, heads: int, letter: str, key: Array | None) -> Array:
        config = self.config
        y = Linear(
            (config.hidden_size,),
            (heads, config.head_width),
            init_std=config.initializer_range,
            dtype=config.param_dtype,
            bias=config.qkv_bias,
            adapter=adapter_for(config, f"{letter}_proj"),
            name=f"{letter}_proj",
        )(x, key)
        if config.qk_norm and letter != "v":
            norm = RMSNorm(
                config.rms_norm_eps, config.param_dtype, name=f"{letter}_norm"
            )
            y = norm(y)
        return y

    @hk.transparent
    def _output(self, out: Array, key: Array | None) -> Array:
        config = self.config
        return Linear(
            (config.num_attention_heads, config.head_width),
            (config.hidden_size,),
            init_std=residual_std(config),
            dtype=config.param_dtype,
            bias=config.attention_out_bias,
            adapter=adapter_for(config, "o_proj"),
            name="o_proj",
        )(out, key)


def _written(buffers, index, place: CachePlace, k: Array, v: Array):
    """Returns the buffers with new keys and values `[B, T, K, H]` in one layer.

    What is no finite value is kept as 0: a slot outlives its text, and attention gives
    unused slots a weight of 0, which would spread it. The text's own residual stream
    shows that it is broken.
    """
    v = jnp.where(jnp.isfinite(v), v, jnp.zeros_like(v))
    return tuple(
        write(buffer, index, place.rows, place.slots, new)
        for buffer, new in zip(buffers, (k, v), strict=True)
    )


def _all_keys(buffers, index, context: Context) -> Array:
    """Returns a layer's keys `[B, S, K, H]`, those of unused slots included."""
    place = context.place
    keys = read(buffers[0], index, place.rows, 0, place.capacity)
    return keys.transpose(0, 2, 1, 3)


def _attend_cached(q: Array, buffers, index, place: CachePlace, mask: AttentionMask):
    def block(start, size):
        return tuple(read(buffer, index, place.rows, start, size) for buffer in buffers)

    return cached_attention(q, block, mask, place.capacity, place.block)


HEADS = ("batch", "length", "heads", None)
KV_HEADS = ("batch", "length", "kv_heads", None)


def residual_std(config: LlamaConfig) -> float:
    """Returns the initial scale of what is added to the residual stream.

    Divided by sqrt(2L), so that the sum over the 2L additions keeps its scale (Radford
    et al. 2019, GPT-2, section 2.3).
    """
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5
