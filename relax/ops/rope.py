"""Rotary position embeddings, half-rotation layout, angles in float32."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the frequencies of RoPE are stretched beyond the training context.

    `kind` is one of KINDS; `factor` the stretch; `original_context` the context before
    stretching; `low_freq_factor`, `high_freq_factor` belong to llama3, `beta_fast`,
    `beta_slow`, `attention_factor` (None: computed) and `truncate` to yarn.
    """

    kind: str
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


def rotate(
    x: Float[Array, "B T heads H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
) -> Float[Array, "B T heads H"]:
    """Rotates the pairs (x[i], x[i + H/2]) by angles given as cos and sin."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def rope_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: RopeScaling
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Returns float32 cos and sin of position x frequency, times the attention factor.

    Su et al. 2021, https://arxiv.org/abs/2104.09864, eq. 34. With `dynamic` scaling
    the base of a position depends on that position alone (the sequence that ends
    there), never on what else is in the batch or the cache: this equals decoding token
    by token in transformers.
    """
    angles = positions.astype(jnp.float32)[..., None] * _frequencies_at(
        positions, head_dim, theta, scaling
    )
    factor = attention_factor(scaling)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _frequencies_at(positions, head_dim, theta, scaling):
    """Returns `[H/2]` frequencies, or `[B, T, H/2]` where positions change them."""
    if scaling.kind != "dynamic":
        return jnp.asarray(frequencies(head_dim, theta, scaling))
    length = jnp.maximum(positions + 1, scaling.original_context).astype(jnp.float32)
    stretch = scaling.factor * length / scaling.original_context - (scaling.factor - 1)
    base = theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / base[..., None] ** _exponents(head_dim)


def frequencies(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Returns the `[H/2]` float32 frequencies in radians per position.

    For `dynamic`, those of positions inside the original context.
    """
    # Correctly rounded powers: a last-bit error in a frequency would be an angle of
    # 0.01 at position 100,000.
    powers = np.float64(theta) ** _exponents(head_dim).astype(np.float64)
    freqs = np.float32(1.0) / powers.astype(np.float32)
    if scaling.kind == "linear":
        freqs = freqs / np.float32(scaling.factor)
    elif scaling.kind == "llama3":
        freqs = _llama3(freqs, scaling)
    elif scaling.kind == "yarn":
        freqs = _yarn(freqs, head_dim, theta, scaling)
    return freqs.astype(np.float32)


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def attention_factor(scaling: RopeScaling) -> float:
    """Returns what cos and sin are multiplied by (1 but for yarn, its eq. 22)."""
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1.0 else 1.0


def _llama3(freqs: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched, short ones kept, a ramp between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_context / (2 * math.pi / freqs)
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 - keep) * freqs / scaling.factor + keep * freqs


def _yarn(freqs, head_dim, theta, scaling) -> np.ndarray:
    """Peng et al. 2023, https://arxiv.org/abs/2309.00071, eqs. 17 to 21."""

    def dimension(turns: float) -> float:
        wavelength_ratio = scaling.original_context / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength_ratio) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    ramp = ramp.astype(np.float32)
    return freqs / scaling.factor * ramp + freqs * (1.0 - ramp)
