"""The trainer's own defaults, at the size of a test."""

from pathlib import Path

import pytest

from relax.config import load_config
from relax.trainers.config import PretrainConfig

DEFAULTS = Path(__file__).parents[2] / "conf/trainer/pretrain.yaml"
TINY = {
    "num_steps": 6,
    "batch_size": 3,
    "context": 5,
    "eval_every": 0,
    "eval_batch_size": 7,
    "sample_tokens": 0,
}


@pytest.fixture(scope="session")
def make_trainer():
    """A callable: conf/trainer/pretrain.yaml for a tiny run, with fields replaced."""
    return lambda **fields: PretrainConfig(
        **{**load_config(DEFAULTS), **TINY, **fields}
    )
