"""Trains a model: python train.py model=tiny data=shakespeare."""

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser

from relax.config import to_values

KEPT = "checkpoints are kept"


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config) -> None:
    """Starts a run, or goes on with one where `resume` names it."""
    # Here, so that workers that score rewards, which import this file, need no JAX.
    from relax import training
    from relax.cli import exit_on_error

    given = OverridesParser.create().parse_overrides(HydraConfig.get().overrides.task)
    changes = {change.get_key_element(): change.value() for change in given}
    changes.pop("resume", None)
    if config.resume is None:
        exit_on_error(lambda: training.start(to_values(config), changes), KEPT)
    else:
        exit_on_error(lambda: training.resume(config.resume, changes), KEPT)


if __name__ == "__main__":
    main()
