"""The Llama: embedding, layers, final norm."""

import dataclasses
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from relax.model.block import RESIDUAL, Block
from relax.model.cache import Cache
from relax.model.config import LlamaConfig
from relax.model.context import (
    SITES,
    CachePlace,
    Constrain,
    Context,
    LayerInputs,
    unconstrained,
)
from relax.model.layers import Embed, RMSNorm, lookup
from relax.ops.attention import resolve_implementation
from relax.ops.cached_attention import BLOCKS, LARGE_BLOCK
from relax.ops.dropout import dropout
from relax.ops.masks import AttentionMask
from relax.ops.rope import rope_tables


class LlamaOutput(NamedTuple):
    """What a forward pass returns.

    hidden: the final norm's output, in the compute dtype. unembedding: the table whose
    rows give the logits (`ops.logprobs`), padded rows included. cache: with the new
    tokens' keys and values and the new lengths, or None. captured: for each site asked
    for, every layer's values `[L, ...]`.
    """

    hidden: Float[Array, "B T D"]
    unembedding: Float[Array, "rows D"]
    cache: Cache | None
    captured: dict[str, Array] | None = None


def make_llama(
    config: LlamaConfig, constrain: Constrain = unconstrained
) -> hk.Transformed:
    """Returns the pair `init(key, tokens)`, `apply(params, tokens, ...)`.

    `apply` takes what `Llama.__call__` takes.
    """
    platform = jax.default_backend()
    attention = resolve_implementation(config.attention, platform, config.compute_dtype)

    def forward(tokens, **inputs):
        return Llama(config, attention, constrain, name="llama")(tokens, **inputs)

    return hk.without_apply_rng(hk.transform(forward))


@dataclasses.dataclass
class Llama(hk.Module):
    """A decoder of the Llama family (Touvron et al. 2023, arxiv.org/abs/2307.09288)."""

    config: LlamaConfig
    attention: str
    constrain: Constrain
    name: str | None = None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        key_valid: Bool[Array, "B S"] | None = None,
        mask: Bool[Array, "B N T S"] | None = None,
        cache: Cache | None = None,
        cache_rows: Int[Array, "B"] | None = None,
        lengths: Int[Array, "B"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
        neftune_alpha: float = 0.0,
        capture: tuple[str, ...] = (),
    ) -> LlamaOutput:
        """Returns hidden states for right-padded rows of tokens.

        positions: for RoPE; None counts from 0, from the cache's lengths, or from the
            start of each segment.
        segment_ids: packed documents; each sees itself alone.
        key_valid: False where a token must be seen by none.
        mask: a caller's own mask, combined with causality.
        cache: what came before; the tokens go to the slots after it.
        cache_rows: which rows of the cache these are, none twice; None: all, in order.
            A row that the cache lacks is run and kept nowhere.
        lengths: number of real tokens per row (the rest is padding); only the cache
            needs it, since causality hides right padding anyway.
        dropout_key: None in evaluation and generation, which turns dropout off, and
            NEFTune with it.
        neftune_alpha: of the noise added to the embedded tokens, 0 for none (static).
        capture: sites of `context.SITES` whose values come back too (static).

        S is the cache's capacity, or T without one. Raises ValueError for a `key_valid`
        or `mask` of another S, for segments with a cache, and for an unknown site.
        """
        slots = tokens.shape[1] if cache is None else cache.capacity
        _check_inputs(slots, key_valid, mask, cache, segment_ids, capture)
        place, query_slots = _place(tokens, cache, cache_rows, lengths)
        attention_mask = AttentionMask(
            query_slots=query_slots,
            key_valid=key_valid,
            query_segments=segment_ids,
            key_segments=segment_ids,
            extra=mask,
        )
        if positions is None:
            positions = _positions(tokens, query_slots, segment_ids)
        shared = attention_mask, self.attention, self.constrain, capture, place
        context = Context(*self._rotations(positions), *shared)
        config, table = self.config, self._embed("embed_tokens")()
        x, layers_key = self._embedded(table, tokens, dropout_key, neftune_alpha)
        buffers = None if cache is None else (cache.keys, cache.values)
        inputs = self._layer_inputs(layers_key, slots)
        (x, buffers), captured = self._layers((x, buffers), inputs, context)
        hidden = RMSNorm(config.rms_norm_eps, config.param_dtype, name="norm")(x)
        unembedding = table if config.tie_word_embeddings else self._embed("lm_head")()
        if cache is not None:
            cache = Cache(*buffers, _advanced(cache, cache_rows, tokens, lengths))
        return LlamaOutput(hidden, unembedding, cache, captured)

    def _embedded(self, table, tokens, key, neftune_alpha):
        """Returns the layers' input `[B, T, D]`, and the key that is left for them."""
        config = self.config
        keys = (None, None) if key is None else jax.random.split(key)
        # A lookup in a table split along its width would gather all of it late.
        rows = self.constrain(table, ("vocab", None))
        x = lookup(rows, tokens, config.compute_dtype)
        if neftune_alpha and key is not None:
            # 0 and 1 are what the split above took.
            x = x + _noise(x, neftune_alpha, jax.random.fold_in(key, 2))
        x = self.constrain(dropout(x, config.dropout, keys[0]), RESIDUAL)
        return x, keys[1]

    def _rotations(self, positions: Int[Array, "B T"]) -> tuple[Array, Array]:
        """Returns the cosines and sines of RoPE."""
        config = self.config
        return rope_tables(
            positions, config.head_width, config.rope_theta, config.rope_scaling
        )

    @hk.transparent
    def _embed(self, name: str) -> Embed:
        config = self.config
        rows, width = config.padded_vocab_size, config.hidden_size
        return Embed(
            rows, width, config.initializer_range, config.param_dtype, name=name
        )

    @hk.transparent
    def _layers(self, carry, inputs: LayerInputs, context: Context):
        def block(carry, layer: LayerInputs):
            return Block(self.config, name="block")(carry, layer, context)

        # What goes into a cache has no gradient, so nothing would be recomputed.
        if self.config.remat != "none" and carry[1] is None:
            block = hk.remat(block, policy=_POLICIES[self.config.remat])
        if self.config.scan_layers:
            stack = hk.layer_stack(
                self.config.num_hidden_layers, with_per_layer_inputs=True, name="layers"
            )
            return stack(block)(carry, inputs)
        outputs = []
        for index in range(self.config.num_hidden_layers):
            layer = jax.tree.map(lambda x, i=index: x[i], inputs)
            with hk.name_scope(f"layers_{index}"):
                carry, output = block(carry, layer._replace(index=index))
            outputs.append(output)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    def _layer_inputs(self, key: Array | None, slots: int) -> LayerInputs:
        """Returns every layer's own inputs, stacked `[L, ...]`; `slots` is S."""
        config, L = self.config, self.config.num_hidden_layers
        index = jnp.arange(L)
        windows = None
        if config.sliding_window is not None and config.sliding_window < slots:
            everything = jnp.iinfo(jnp.int32).max
            inside = index >= config.max_window_layers
            windows = jnp.where(inside, config.sliding_window, everything)
        drops = config.dropout or (config.lora_rank and config.lora_dropout)
        keys = None if key is None or not drops else jax.random.split(key, L)
        return LayerInputs(index, windows, keys)


_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_saveable}


def _noise(x: Array, alpha: float, key: Array) -> Array:
    """Returns NEFTune's noise for embedded tokens `[B, T, D]`.

    Uniform in ±alpha/sqrt(T·D) (Jain et al. 2023, https://arxiv.org/abs/2310.05914,
    algorithm 1); T counts a row's padding too, as transformers does.
    """
    bound = alpha / (x.shape[1] * x.shape[2]) ** 0.5
    return jax.random.uniform(key, x.shape, x.dtype, -bound, bound)


def _check_inputs(slots, key_valid, mask, cache, segment_ids, capture) -> None:
    for name, given in (("key_valid", key_valid), ("mask", mask)):
        if given is not None and given.shape[-1] != slots:
            raise ValueError(
                f"{name} has shape {given.shape}; its last axis must be {slots} slots"
            )
    if cache is not None and segment_ids is not None:
        raise ValueError("segment_ids and a cache are both given; give one")
    if unknown := [site for site in capture if site not in SITES]:
        raise ValueError(f"site {unknown[0]!r} is unknown; known: {', '.join(SITES)}")


def _place(tokens, cache, rows, lengths):
    """Returns where tokens stand in the cache, and the slots that queries look from.

    Padding looks from the last of all, so that it widens nothing that is read.
    """
    if cache is None:
        return None, None
    before = cache.lengths if rows is None else cache.lengths.at[rows].get(mode="clip")
    slots = before[:, None] + jnp.arange(tokens.shape[1])
    capacity = cache.capacity
    block = BLOCKS.get(jax.default_backend(), LARGE_BLOCK)
    if lengths is None:
        return CachePlace(rows, slots, capacity, block), slots
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    queries = jnp.where(real, slots, jnp.max(jnp.where(real, slots, 0)))
    place = CachePlace(rows, jnp.where(real, slots, capacity), capacity, block)
    return place, queries


def _positions(tokens, query_slots, segment_ids):
    """Returns each token's distance from the start of its row or its segment."""
    if query_slots is not None:
        return query_slots
    slots = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        return slots
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return slots - jax.lax.cummax(jnp.where(starts, slots, 0), axis=1)


def _advanced(cache, rows, tokens, lengths):
    """Returns the lengths of the cache's rows after the tokens."""
    added = tokens.shape[1] if lengths is None else lengths
    if rows is None:
        return cache.lengths + added
    return cache.lengths.at[rows].add(added, mode="drop")
