"""The logger group: its YAMLs are valid, mistakes are named."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from relax.tracking.config import LoggerConfig

CONF = Path(__file__).parents[2] / "conf" / "logger"
NONE = {
    "kind": "none",
    "project": None,
    "entity": None,
    "group": None,
    "tags": None,
    "mode": None,
}


@pytest.mark.parametrize(
    ("option", "changes"),
    [("none", {}), ("wandb", {"kind": "wandb", "project": "relax"})],
)
def test_yaml_holds_these_values(option, changes):
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{option}.yaml"))
    assert LoggerConfig(**values) == LoggerConfig(**{**NONE, **changes})


def test_tags_are_split_at_commas():
    assert LoggerConfig(**{**NONE, "tags": "first, second"}).tag_list == [
        "first",
        "second",
    ]
    assert LoggerConfig(**NONE).tag_list == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "tensorboard"}, r"logger\.kind is 'tensorboard'; .* none, wandb"),
        ({"mode": "on"}, r"logger\.mode is 'on'; .* online, offline, disabled, null"),
        ({"kind": "wandb"}, r"logger\.project is None .* logger\.project=relax"),
        ({"tags": "first,,second"}, r"logger\.tags is 'first,,second'.* empty tag"),
    ],
)
def test_a_mistake_names_its_path_and_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        LoggerConfig(**{**NONE, **changes})
