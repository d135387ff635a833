"""Grouped-query attention: one meaning, several implementations chosen by name."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from relax.ops.blocked_attention import blocked_attention
from relax.ops.masks import AttentionMask, dense_mask

logger = logging.getLogger(__name__)


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    implementation: str = "xla",
) -> Float[Array, "B T N H"]:
    """Returns softmax(q·kᵀ/√H)·v where query head n reads key/value head n // (N/K).

    Scores and softmax are float32 whatever the dtype of `q`; a query that sees no key
    gives zeros. Keys and values are never repeated (Ainslie et al. 2023,
    https://arxiv.org/abs/2305.13245). `implementation` is a name that
    `resolve_implementation` returned.
    """
    return IMPLEMENTATIONS[implementation](q, k, v, mask)


def resolve_implementation(name: str, platform: str, compute_dtype: str) -> str:
    """Returns the implementation that `name` stands for on a platform, and logs it.

    `auto` is `cudnn` on GPU with 16-bit activations, `xla` on TPU, else `blocked`.
    Raises ValueError where `name` is unknown or can't run there: nothing falls back.
    """
    if name != "auto" and name not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"model.attention={name!r} is unknown; choose one of {known}")
    half = compute_dtype in ("bfloat16", "float16")
    if name == "cudnn" and (platform not in ("gpu", "cuda") or not half):
        raise ValueError(
            f"model.attention='cudnn' needs a GPU and 16-bit activations, not "
            f"{platform} with model.compute_dtype={compute_dtype}; set "
            "model.attention=auto"
        )
    if name == "auto":
        name = {"gpu": "cudnn" if half else "blocked", "tpu": "xla"}.get(
            platform.replace("cuda", "gpu"), "blocked"
        )
    _log_once(name, platform)
    return name


@functools.cache
def _log_once(name: str, platform: str) -> None:
    logger.info("attention implementation: %s (on %s)", name, platform)


def _xla(q, k, v, mask):
    """The definition, written out; holds the whole `[B, N, T, S]` array of scores."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    pattern = attention_pattern(q, k, mask).reshape(B, K, N // K, T, S)
    out = jnp.einsum("bkgts,bskh->btkgh", pattern.astype(v.dtype), v)
    return out.reshape(B, T, N, H)


def attention_pattern(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: AttentionMask
) -> Float[Array, "B N T S"]:
    """Returns the float32 weights with which each head of a query reads each key."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    grouped = q.reshape(B, T, K, N // K, H)
    scores = jnp.einsum(
        "btkgh,bskh->bkgts", grouped, k, preferred_element_type=jnp.float32
    )
    scores = scores.reshape(B, N, T, S) / math.sqrt(H)
    return masked_softmax(scores, dense_mask(mask, range(T), range(S)))


def masked_softmax(scores: Array, visible: Array) -> Array:
    """Returns the softmax over what is visible of the last axis, or zeros."""
    scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    top = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0.0, total, 1.0)


def _cudnn(q, k, v, mask):
    """cuDNN's flash attention for plainly causal rows, `blocked` for all others.

    cuDNN takes other masks only as a dense array over all scores, which is what a
    flash kernel is there to avoid.
    """
    if not mask.is_plainly_causal():
        return blocked_attention(q, k, v, mask)
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


IMPLEMENTATIONS = {"xla": _xla, "blocked": blocked_attention, "cudnn": _cudnn}
