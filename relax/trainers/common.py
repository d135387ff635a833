"""What every trainer checks and counts."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from relax.model.parameters import training_flops_per_token
from relax.optim import make_optimizer, make_schedule
from relax.sharding import batch_multiple, shard_batch
from relax.steps import LossFn, make_eval_step, make_train_step
from relax.tracking.flops import peak_flops
from relax.trainers.config import Setup


def check_sizes(setup: Setup) -> None:
    """Raises ValueError where the context or the rows don't fit model and mesh."""
    context, limit = setup.trainer.context, setup.model.max_position_embeddings
    if context > limit:
        raise ValueError(
            f"trainer.context={context} is longer than "
            f"model.max_position_embeddings={limit}; lower the one or raise the other"
        )
    multiple = batch_multiple(setup.mesh)
    trainer = setup.trainer
    for name, rows in (
        (
            "batch_size / trainer.accumulation",
            trainer.batch_size // trainer.accumulation,
        ),
        ("eval_batch_size", trainer.eval_batch_size),
    ):
        if rows % multiple:
            raise ValueError(
                f"trainer.{name}={rows} must be a multiple of mesh.data x mesh.fsdp = "
                f"{multiple}"
            )


def optimisation(setup: Setup, loss_fn: LossFn, **options: Any) -> dict[str, Any]:
    """Returns the fields of a Task that say how a loss is minimised, and its cost.

    options: of `make_train_step`.
    """
    steps = setup.trainer.num_steps
    return {
        "train_step": make_train_step(
            loss_fn,
            make_optimizer(setup.optimizer, steps),
            seed=setup.seed,
            accumulation=setup.trainer.accumulation,
            **options,
        ),
        "schedule": make_schedule(setup.optimizer, steps),
        "cost": cost_per_token(setup),
    }


def cost_per_token(setup: Setup) -> tuple[float, float | None]:
    """Returns FLOPs per token, and the mesh's peak FLOP/s where it is known."""
    flops = training_flops_per_token(setup.model, setup.trainer.context)
    device = setup.mesh.devices.flat[0]
    peak = peak_flops(device.device_kind, setup.model.compute_dtype)
    return flops, peak and peak * setup.mesh.size


def make_validation(
    setup: Setup,
    loss_fn: LossFn,
    batches: Callable[[], Iterable[Mapping[str, np.ndarray]]],
) -> Callable[[Any], dict[str, float]]:
    """Returns params -> the loss function's sums over all batches, by name."""
    eval_step = make_eval_step(loss_fn)

    def validate(params) -> dict[str, float]:
        total: dict[str, float] = {}
        for batch in batches():
            sums = jax.device_get(eval_step(params, shard_batch(setup.mesh, batch)))
            for name, value in sums.items():
                total[name] = total.get(name, 0.0) + float(value)
        return total

    return validate
