"""Uses a trained model: python infer.py prompt="ROMEO:" sampling.top_p=0.9."""

import hydra

from relax import inference
from relax.cli import exit_on_error
from relax.config import to_values


@hydra.main(version_base="1.3", config_path="conf", config_name="infer")
def main(config) -> None:
    """Runs the configured task."""
    exit_on_error(lambda: inference.start(to_values(config)))


if __name__ == "__main__":
    main()
