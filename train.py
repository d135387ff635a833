"""Trains a model: python train.py model=tiny data=shakespeare."""

import hydra
from hydra.core.hydra_config import HydraConfig

from relax import training
from relax.cli import exit_on_error
from relax.config import to_values


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config) -> None:
    """Starts a run, or goes on with one where `resume` names it."""
    if config.resume is None:
        exit_on_error(lambda: training.start(to_values(config)))
        return
    given = HydraConfig.get().overrides.task
    overrides = [text for text in given if not text.startswith("resume=")]
    exit_on_error(lambda: training.resume(config.resume, overrides))


if __name__ == "__main__":
    main()
