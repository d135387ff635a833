"""ReLax's side of the benchmarks of trainers: its own steps, one at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import CONF
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import relax
from relax.build import train_state_from
from relax.optim import make_optimizer
from relax.runtime import configure
from relax.sharding import shard_batch
from relax.trainers.config import Setup
from relax.training import TRAINERS, typed


class TrainerSteps:
    """Optimizer steps of a trainer from a checkpoint's weights, without a loop."""

    def __init__(self, overrides: Sequence[str], checkpoint: str, folder: Path):
        """`overrides` are those of `train.py`; `folder` is a new run's."""
        folder.mkdir()
        own = ["name=bench", f"run_folder={folder}", *overrides]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", own)
        configs = typed(OmegaConf.to_container(config, resolve=True))
        configure(configs.runtime)
        self.model = relax.load(checkpoint, configs.mesh, dtype="float32")
        setup = Setup(
            trainer=configs.trainer,
            model=self.model.config,
            optimizer=configs.optimizer,
            sampling=configs.sampling,
            data=configs.data,
            tokenizer=self.model.tokenizer,
            mesh=self.model.mesh,
            seed=configs.run.seed,
            template=self.model.chat_template,
            stop_ids=self.model.stop_ids,
            folder=folder,
        )
        self._mesh = setup.mesh
        self._task = TRAINERS[configs.trainer.kind].make_task(setup)
        optimizer = make_optimizer(configs.optimizer, configs.trainer.num_steps)
        params = jax.tree.map(lambda leaf: leaf.copy(), self.model.params)
        self._state = train_state_from(
            setup.model, params, optimizer, setup.mesh, setup.seed, self._task.extra
        )
        self._step = 0

    def run(self) -> dict[str, Any]:
        """Returns the metrics of one more step, which is over when it returns."""
        state, metrics = self._state, {}
        if self._task.prepare is not None:
            state, metrics, _ = self._task.prepare(state, self._step)
        batch = self._task.batch_at(self._step)
        stacked = {name: np.asarray(array)[None] for name, array in batch.items()}
        batches = shard_batch(self._mesh, stacked, leading=1)
        self._state, found = self._task.train_step(state, batches)
        jax.block_until_ready(self._state)
        self._step += 1
        return {**metrics, **{n: float(v[0]) for n, v in jax.device_get(found).items()}}

    def close(self) -> None:
        """Ends what the trainer holds open."""
        self._task.close()
