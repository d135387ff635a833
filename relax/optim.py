"""Optimizers and learning-rate schedules, as optax chains."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

KINDS = ("adamw", "muon", "lion")
SCHEDULES = ("constant", "cosine", "linear", "wsd")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer and its schedule.

    `learning_rate` is the peak, reached after `warmup_steps`; the schedule falls to
    `final_fraction` of it. `decay_fraction` is the share of steps in which
    warm-up-stable-decay (`wsd`) decays, linearly. Muon moves the layers' matrices at
    `learning_rate`, and all else goes to Adam, with Nesterov's momentum too, at
    `adam_learning_rate`. `weight_decay` acts on matrices alone, embedding and head
    among them but with Muon. `clip_norm` bounds the global norm of the gradients;
    null: no bound.
    """

    kind: str
    learning_rate: float
    adam_learning_rate: float | None
    b1: float
    b2: float
    eps: float
    momentum: float | None
    weight_decay: float
    clip_norm: float | None
    schedule: str
    warmup_steps: int
    decay_fraction: float
    final_fraction: float

    def __post_init__(self):
        for name, choices in (("kind", KINDS), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"optimizer.{name}={value!r} is unknown; choose one of "
                    f"{', '.join(choices)}"
                )
        if self.kind == "muon" and None in (self.momentum, self.adam_learning_rate):
            raise ValueError(
                "optimizer.kind=muon needs optimizer.momentum and "
                f"optimizer.adam_learning_rate, not {self.momentum} and "
                f"{self.adam_learning_rate}"
            )
        for name in ("learning_rate", "adam_learning_rate", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"optimizer.{name}={value} must be above 0")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} must be at least 0"
                )
        for name in ("decay_fraction", "final_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} must lie in [0, 1]"
                )


def make_schedule(
    config: OptimizerConfig, num_steps: int, peak: float | None = None
) -> optax.Schedule:
    """Returns step -> learning rate over `num_steps`, for `peak` (the config's own).

    Raises ValueError where warm-up leaves none of `num_steps`.
    """
    peak = config.learning_rate if peak is None else peak
    steps = num_steps - config.warmup_steps
    if steps < 1:
        raise ValueError(
            f"optimizer.warmup_steps={config.warmup_steps} must be less than "
            f"trainer.num_steps={num_steps}; lower it, or train for longer"
        )
    final = config.final_fraction
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, steps, alpha=final)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, peak * final, steps)
    elif config.schedule == "wsd":
        decay = min(steps, max(1, round(num_steps * config.decay_fraction)))
        stable = optax.constant_schedule(peak)
        fall = optax.linear_schedule(peak, peak * final, decay)
        after = optax.join_schedules([stable, fall], [steps - decay])
    else:
        after = optax.constant_schedule(peak)
    if not config.warmup_steps:
        return after
    # Step 0 takes the first rung, not a rate of 0.
    warmup = optax.linear_schedule(
        peak / config.warmup_steps, peak, max(1, config.warmup_steps - 1)
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(
    config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
    """Returns clip, then the optimizer with its schedule and decay on matrices only.

    It computes, and keeps its moments, in float32 whatever the dtype of the parameters.
    """
    rate = make_schedule(config, num_steps)
    if config.kind == "adamw":
        update = optax.adamw(
            rate,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        )
    elif config.kind == "lion":
        update = optax.lion(
            rate,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        )
    else:
        update = optax.contrib.muon(
            rate,
            beta=config.momentum,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_learning_rate=make_schedule(
                config, num_steps, config.adam_learning_rate
            ),
            muon_weight_dimension_numbers=muon_dimensions,
        )
    if config.clip_norm is not None:
        update = optax.chain(optax.clip_by_global_norm(config.clip_norm), update)
    return _in_float32(update)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns an optimizer that sees float32 alone.

    A second moment in bfloat16 never falls: 0.999 of it rounds to itself.
    """

    def cast(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(grads, state, params):
        return inner.update(cast(grads), state, cast(params))

    return optax.GradientTransformation(lambda params: inner.init(cast(params)), update)


# What is a matrix is said by name: stacked norms are [L, D] and stacked projections
# [L, D, N, H], so that a rule by number of axes would take both wrongly.
_MATRIX_INPUT_AXES = {
    "q_proj": 1,
    "k_proj": 1,
    "v_proj": 1,
    "o_proj": 2,
    "gate_proj": 1,
    "up_proj": 1,
    "down_proj": 1,
}
_TABLES = ("embed_tokens", "lm_head")


def is_matrix(params):
    """Returns a tree of booleans: weights of projections, embedding and head.

    The two factors of an adapter are matrices too.
    """

    def decide(path, leaf):
        del leaf
        module, name = _names(path)
        known = module in _MATRIX_INPUT_AXES or module in _TABLES
        return known and name in ("weight", "lora_a", "lora_b")

    return jax.tree_util.tree_map_with_path(decide, params)


def muon_dimensions(params):
    """Returns MuonDimensionNumbers for the layers' projections and None for the rest.

    The axes before a projection's own are batches: each layer is orthogonalised alone,
    so that scanned and unrolled layers move alike.
    """

    def dimensions(path, leaf):
        module, name = _names(path)
        if module not in _MATRIX_INPUT_AXES or name != "weight":
            return None
        inputs = _MATRIX_INPUT_AXES[module]
        first = leaf.ndim - (
            inputs + (2 if module in ("q_proj", "k_proj", "v_proj") else 1)
        )
        axes = range(first, leaf.ndim)
        return MuonDimensionNumbers(tuple(axes[:inputs]), tuple(axes[inputs:]))

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _names(path) -> tuple[str, str]:
    """Returns the last part of the module's path and the parameter's name."""
    module, name = (key.key for key in path[-2:])
    return module.rsplit("/", 1)[-1], name
