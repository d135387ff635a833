"""Losses and metrics of group-relative policy optimisation.

Pure functions, one per formula, under the names and with the meaning of TRL 1.16's
GRPOTrainer. `policy_loss` joins them; rows of the batch are weighed by `row_weights`,
which know the whole optimizer step, so that micro-batches add up.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

CLIPPED_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED_TYPES, "cispo", "sapo", "vespo")
IMPORTANCE_LEVELS = ("token", "sequence", "sequence_token")
KL_ESTIMATORS = ("k1", "k2", "k3")
RATIO_QUANTILES = {"min": 0.0, "p01": 0.01, "p50": 0.5, "p99": 0.99, "max": 1.0}

# Temperatures of SAPO and (k, lambda) of VESPO by the advantage's sign, as published.
_SAPO_POSITIVE, _SAPO_NEGATIVE = 1.0, 1.05
_VESPO_POSITIVE, _VESPO_NEGATIVE = (2.0, 3.0), (3.0, 2.0)

Rows = dict[str, Array]


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """What `policy_loss` computes; hashable, so that it may be static under jit.

    epsilon_high: None: as `epsilon`; with cispo it is the cap of the ratio itself.
    delta: upper bound of the ratio where clipping has none (A < 0); None: none. beta:
    weight of the KL to the reference. use_bias_correction_kl: the KL is times the
    ratio. top_entropy_quantile: the share of tokens, those of highest entropy, that
    have a loss; 1: all. entropy_coef: weight of the entropy bonus.
    """

    loss_type: str
    importance_sampling_level: str
    epsilon: float
    epsilon_high: float | None
    delta: float | None
    beta: float
    kl_estimator: str
    use_bias_correction_kl: bool
    top_entropy_quantile: float
    entropy_coef: float

    def __post_init__(self):
        for name, choices in (
            ("loss_type", LOSS_TYPES),
            ("importance_sampling_level", IMPORTANCE_LEVELS),
            ("kl_estimator", KL_ESTIMATORS),
        ):
            _check_choice(name, getattr(self, name), choices)
        for name in ("epsilon", "epsilon_high", "beta", "entropy_coef"):
            value = getattr(self, name)
            if value is not None and not value >= 0.0:
                raise ValueError(f"trainer.{name}={value} must be at least 0")
            if value == math.inf:
                raise ValueError(
                    f"trainer.{name}={value} must be finite; give a number of at least "
                    "0"
                )
        if not 0.0 <= self.top_entropy_quantile <= 1.0:
            raise ValueError(
                f"trainer.top_entropy_quantile={self.top_entropy_quantile} must be in "
                "[0, 1] (1 is off)"
            )
        if self.delta is not None and self.loss_type not in CLIPPED_TYPES:
            raise ValueError(
                f"trainer.delta={self.delta} does nothing with trainer.loss_type="
                f"{self.loss_type}, which does not clip; set it to null"
            )
        if self.delta == math.inf:
            raise ValueError(
                f"trainer.delta={self.delta} must be finite; set it to null, which is "
                "off"
            )
        if self.delta is not None and not self.delta > 1.0 + self.upper:
            raise ValueError(
                f"trainer.delta={self.delta} must be above 1 + epsilon_high = "
                f"{1.0 + self.upper} (null is off)"
            )

    @property
    def upper(self) -> float:
        """The upper epsilon."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high


def row_weights(
    loss_type: str,
    lengths: Sequence[int] | np.ndarray,
    *,
    max_new_tokens: int,
    num_tokens: int,
) -> np.ndarray:
    """Returns what the summed loss of each row is multiplied by, float32 `[rows]`.

    lengths: tokens in the loss of every row of the optimizer step, 0 where all are
    masked (such rows count as rows). num_tokens: the tokens in the loss of the rows
    that were generated, per optimizer step.

    grpo, sapo: mean over rows of the mean over tokens (DeepSeekMath, equation 3).
    bnpo: mean over the step's tokens. dapo, cispo, vespo: over those generated (DAPO,
    https://arxiv.org/abs/2503.14476, equation 8). dr_grpo: by the constant
    `max_new_tokens` (https://arxiv.org/abs/2503.20783). luspo: mean over rows of sums
    (https://arxiv.org/abs/2602.05261).
    """
    _check_choice("loss_type", loss_type, LOSS_TYPES)
    lengths = np.asarray(lengths, np.float64)
    if loss_type in ("grpo", "sapo"):
        divisors = lengths.size * np.maximum(lengths, 1.0)
    elif loss_type == "bnpo":
        divisors = np.maximum(lengths.sum(), 1.0)
    elif loss_type == "dr_grpo":
        divisors = lengths.size * max_new_tokens
    elif loss_type == "luspo":
        divisors = lengths.size
    else:
        divisors = max(num_tokens, 1)
    return np.broadcast_to(1.0 / divisors, lengths.shape).astype(np.float32)


def policy_loss(
    logprobs: Float[Array, "B C"],
    entropy: Float[Array, "B C"],
    advantages: Float[Array, "B"],
    mask: Float[Array, "B C"],
    row_weights: Float[Array, "B"],
    options: PolicyOptions,
    old_logprobs: Float[Array, "B C"] | None = None,
    ref_logprobs: Float[Array, "B C"] | None = None,
    *,
    bonus_weight: float = 1.0,
) -> tuple[Float[Array, ""], Rows]:
    """Returns the loss of C completion tokens per row, and rows for `policy_metrics`.

    The loss is the sum over rows of weight · Σₜ mask · ℓₜ, less the entropy bonus:
    coefficient · `bonus_weight` (1 / number of micro-batches) · mean entropy of the
    tokens in the loss. Per token: the loss of its type, times the mask of high entropy,
    plus beta · KL. `old_logprobs` None: those of the policy itself. What is masked may
    hold any number, -inf and NaN too. The `"policy_loss"` of the rows sums up to the
    loss without the bonus. Raises ValueError where beta has no reference.
    """
    seen = mask > 0
    logprobs, entropy = jnp.where(seen, logprobs, 0.0), jnp.where(seen, entropy, 0.0)
    old = jax.lax.stop_gradient(logprobs) if old_logprobs is None else old_logprobs
    log_ratio = jnp.where(seen, logprobs - jnp.where(seen, old, 0.0), 0.0)
    ratio = importance_ratio(log_ratio, mask, options.importance_sampling_level)
    rows = {"entropy": entropy, "ratio": ratio}
    if options.importance_sampling_level != "token":
        rows["ratio"] = ratio[:, 0]
    if options.loss_type == "vespo":
        rows["phi"] = vespo_weights(log_ratio, mask, advantages)
    losses = _token_losses(options, ratio, logprobs, advantages, rows.get("phi"))
    kept = mask
    if options.top_entropy_quantile < 1.0:
        high = high_entropy(entropy, mask, options.top_entropy_quantile)
        losses, kept = losses * high, mask * high
    if options.beta:
        if ref_logprobs is None:
            raise ValueError(
                f"trainer.beta={options.beta} needs logprobs of a reference"
            )
        ref = jnp.where(seen, ref_logprobs, 0.0)
        rows["kl"] = kl(options.kl_estimator, logprobs, ref)
        if options.use_bias_correction_kl:
            rows["kl"] = rows["kl"] * ratio
        losses = losses + options.beta * rows["kl"]
    rows["policy_loss"] = row_weights * jnp.sum(losses * mask, axis=-1)
    loss = jnp.sum(rows["policy_loss"])
    if options.entropy_coef:
        bonus = options.entropy_coef * bonus_weight
        loss = loss - bonus * masked_mean(entropy, kept)
    return loss, jax.lax.stop_gradient(rows)


def importance_ratio(
    log_ratio: Float[Array, "B C"], mask: Float[Array, "B C"], level: str
) -> Float[Array, "B C"] | Float[Array, "B 1"]:
    """Returns π/π_old of each token, or the geometric mean of its sequence.

    Zheng et al. 2025 (GSPO), https://arxiv.org/abs/2507.18071. "sequence", section 4.1:
    `[B, 1]`, the gradient spread evenly over the tokens. "sequence_token", section 4.3
    (GSPO-token): the same values, each with the gradient of its own token. They part
    where tokens of a row weigh differently: high entropy, KL times the ratio.
    """
    if level == "token":
        return jnp.exp(log_ratio)
    lengths = jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1.0)
    mean = jnp.sum(log_ratio * mask, axis=-1, keepdims=True) / lengths
    if level == "sequence":
        return jnp.exp(mean)
    own = jnp.exp(log_ratio - jax.lax.stop_gradient(log_ratio))
    return jax.lax.stop_gradient(jnp.exp(mean)) * own


def clipped_loss(
    ratio: Float[Array, "B C"],
    advantages: Float[Array, "B 1"],
    epsilon: float,
    epsilon_high: float,
    delta: float | None = None,
) -> Float[Array, "B C"]:
    """Returns -min(w A, clip(w, 1 - ε, 1 + ε_high) A), w at most `delta` in the first.

    Shao et al. 2024 (DeepSeekMath), https://arxiv.org/abs/2402.03300, equation 3; its
    upper bound by Yu et al. 2025 (DAPO), https://arxiv.org/abs/2503.14476, equation 8;
    delta by Prime Intellect 2025 (INTELLECT-2), https://arxiv.org/abs/2505.07291.
    """
    bounded = ratio if delta is None else jnp.minimum(ratio, delta)
    clipped = jnp.clip(ratio, 1.0 - epsilon, 1.0 + epsilon_high)
    # Within the bounds both are the same and the gradient is that of the ratio; outside
    # them the clipped one is a constant.
    clipped = jax.lax.stop_gradient(clipped) * advantages
    bounded = bounded * advantages
    return -jnp.where(bounded <= clipped, bounded, clipped)


def cispo_loss(
    ratio: Float[Array, "B C"],
    logprobs: Float[Array, "B C"],
    advantages: Float[Array, "B 1"],
    epsilon_high: float,
) -> Float[Array, "B C"]:
    """Returns -min(w, ε_high) A log π, without gradient through the weight.

    MiniMax 2025 (MiniMax-M1), https://arxiv.org/abs/2506.13585, equations 4 and 5; the
    cap is ε_high itself, not 1 + ε_high.
    """
    weights = jax.lax.stop_gradient(jnp.minimum(ratio, epsilon_high))
    return -weights * advantages * logprobs


def sapo_loss(
    ratio: Float[Array, "B C"], advantages: Float[Array, "B 1"]
) -> Float[Array, "B C"]:
    """Returns -4/τ σ(τ (w - 1)) A, a soft gate in place of the clip.

    Gao et al. 2025 (SAPO), https://arxiv.org/abs/2511.20347.
    """
    temperature = jnp.where(advantages > 0, _SAPO_POSITIVE, _SAPO_NEGATIVE)
    gate = jax.nn.sigmoid(temperature * (ratio - 1.0)) * 4.0 / temperature
    return -gate * advantages


def vespo_weights(
    log_ratio: Float[Array, "B C"],
    mask: Float[Array, "B C"],
    advantages: Float[Array, "B"],
) -> Float[Array, "B"]:
    """Returns φ(W) = e^λ W^k e^(-λW), W the ratio of whole sequences; no gradient.

    The loss is -φ A log π. Shen et al. 2026 (VESPO), https://arxiv.org/abs/2602.10693.
    """
    log_w = jnp.sum(jnp.clip(log_ratio, -20.0, 20.0) * mask, axis=-1)
    log_w = jnp.clip(log_w, math.log(1e-8), 20.0)
    k, lam = (
        jnp.where(advantages >= 0, positive, negative)
        for positive, negative in zip(_VESPO_POSITIVE, _VESPO_NEGATIVE, strict=True)
    )
    return jax.lax.stop_gradient(jnp.exp(lam + k * log_w - lam * jnp.exp(log_w)))


def kl(
    estimator: str, logprobs: Float[Array, "B C"], ref_logprobs: Float[Array, "B C"]
) -> Float[Array, "B C"]:
    """Returns an estimate of KL(π, π_ref) at tokens sampled from π.

    Schulman 2020, http://joschu.net/blog/kl-approx.html: with d = log π_ref - log π,
    k1 = -d, k2 = d²/2, k3 = eᵈ - 1 - d.
    """
    d = ref_logprobs - logprobs
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return 0.5 * jnp.square(d)
    return jnp.expm1(d) - d


def high_entropy(
    entropy: Float[Array, "B C"], mask: Float[Array, "B C"], share: float
) -> Bool[Array, "B C"]:
    """Returns which masked-in tokens have at least the 1 - share quantile of entropy.

    The quantile is of the tokens given, interpolated linearly; share 0 keeps the
    highest alone. Wang et al. 2025, https://arxiv.org/abs/2506.01939, section 5.1.
    """
    threshold = masked_quantiles(entropy, mask, (1.0 - share,))[0]
    return (entropy >= threshold) & (mask > 0)


def masked_quantiles(
    values: Array, mask: Array, quantiles: Sequence[float]
) -> Float[Array, "quantiles"]:
    """Returns quantiles of the masked-in values, interpolated; 0 if there are none."""
    ordered = jnp.sort(jnp.where(mask > 0, values, jnp.inf).reshape(-1))
    count = jnp.sum(mask > 0)
    last = jnp.maximum(count - 1, 0)
    position = jnp.asarray(quantiles, jnp.float32) * last
    below = jnp.floor(position).astype(jnp.int32)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, last)]
    return jnp.where(count > 0, low + (position - below) * (high - low), 0.0)


def masked_mean(values: Array, mask: Array) -> Float[Array, ""]:
    """Returns the mean of the masked-in values, 0 where there are none."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def policy_metrics(
    rows: Rows,
    mask: Float[Array, "B C"],
    advantages: Float[Array, "B"],
    options: PolicyOptions,
) -> Rows:
    """Returns TRL's metrics of rows of one or more micro-batches, as scalars.

    Means are over tokens, those of the ratio over rows where it is one per row; the
    quantiles of the ratio leave rows without tokens out. All are 0 where every token is
    masked.
    """
    metrics = {"entropy": masked_mean(rows["entropy"], mask)}
    if options.beta:
        metrics["kl"] = masked_mean(rows["kl"], mask)
    if options.entropy_coef:
        metrics["policy_loss"] = jnp.sum(rows["policy_loss"])
        metrics["entropy_coef"] = jnp.asarray(options.entropy_coef, jnp.float32)
    ratio, has_tokens = rows["ratio"], jnp.any(mask > 0, axis=-1)
    if options.importance_sampling_level == "token":
        weights, counted, signs = mask, mask, advantages[:, None]
    else:
        weights, counted, signs = jnp.ones_like(ratio), has_tokens, advantages
    if options.loss_type in CLIPPED_TYPES:
        metrics |= _clip_ratios(ratio, weights, signs, options)
    elif options.loss_type == "cispo":
        clipped = (ratio > options.upper) & (signs > 0)
        metrics["cispo_clip_ratio"] = masked_mean(clipped, weights)
    elif options.loss_type == "vespo":
        metrics["vespo/phi_seq_mean"] = jnp.mean(rows["phi"])
    found = masked_quantiles(ratio, counted, tuple(RATIO_QUANTILES.values()))
    return metrics | {
        f"ratio/{name}": found[i] for i, name in enumerate(RATIO_QUANTILES)
    }


def _token_losses(options, ratio, logprobs, advantages, phi):
    """Returns the loss of each token `[B, C]`, or `[B, 1]` where all have the same."""
    A = advantages[:, None]
    if options.loss_type == "cispo":
        return cispo_loss(ratio, logprobs, A, options.upper)
    if options.loss_type == "sapo":
        return sapo_loss(ratio, A)
    if options.loss_type == "vespo":
        return -phi[:, None] * A * logprobs
    return clipped_loss(ratio, A, options.epsilon, options.upper, options.delta)


def _clip_ratios(ratio, weights, signs, options):
    bounded = ratio if options.delta is None else jnp.minimum(ratio, options.delta)
    low = (bounded < 1.0 - options.epsilon) & (signs < 0)
    high = (bounded > 1.0 + options.upper) & (signs > 0)
    by_row = weights.reshape(weights.shape[0], -1)
    counts = jnp.sum(by_row, axis=-1)

    def shares(clipped):
        clipped = clipped.reshape(by_row.shape) * by_row
        return jnp.sum(clipped, axis=-1) / jnp.maximum(counts, 1.0)

    lowest = jnp.min(jnp.where(counts > 0, shares(low), jnp.inf))
    return {
        "clip_ratio/low_mean": masked_mean(low, weights),
        "clip_ratio/high_mean": masked_mean(high, weights),
        "clip_ratio/region_mean": masked_mean(low | high, weights),
        "clip_ratio/low_min": jnp.where(jnp.any(counts > 0), lowest, 0.0),
        "clip_ratio/high_max": jnp.max(shares(high)),
    }


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"trainer.{name}={value!r} is unknown; choose one of {', '.join(choices)}"
        )
