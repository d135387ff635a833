"""The boundary between composed YAML and typed, frozen dataclasses."""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

T = TypeVar("T")


def to_dataclass(cls: type[T], node: DictConfig | Mapping[str, Any], path: str) -> T:
    """Returns one config group as its dataclass.

    Raises ValueError in one line, naming the config path, for an unknown, missing or
    mistyped key, and passes on what the dataclass's own checks raise.
    """
    try:
        values = OmegaConf.to_container(
            node if OmegaConf.is_config(node) else OmegaConf.create(dict(node)),
            resolve=True,
            throw_on_missing=True,
        )
        known = [field.name for field in fields(cls)]
        for key in known:
            if key not in values:
                raise ValueError(f"{path}.{key} is missing; add it to the config")
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except ConfigKeyError as error:
        key = str(error.key)
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"{path}.{key} is no key of this group; {hint}") from None
    except OmegaConfBaseException as error:
        key = error.full_key or error.key
        where = str(key) if str(key).startswith(path) else f"{path}.{key}"
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: {reason}") from None


def to_values(config: DictConfig) -> dict[str, Any]:
    """Returns the composed config as plain values, interpolations resolved."""
    return OmegaConf.to_container(config, resolve=True)


def save_config(values: Mapping[str, Any], path: Path) -> None:
    """Writes plain values as YAML."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(dict(values))))


def load_config(path: Path) -> DictConfig:
    """Returns a config that `save_config` wrote."""
    return OmegaConf.load(path)


def override(config: DictConfig, overrides: list[str]) -> DictConfig:
    """Returns `config` with dotted `key=value` overrides applied.

    Raises ValueError where an override names a key that `config` does not hold: a saved
    config takes values, not other groups.
    """
    changes = OmegaConf.from_dotlist(overrides)
    for text in overrides:
        key = text.split("=", 1)[0]
        current = OmegaConf.select(config, key, throw_on_missing=False)
        if OmegaConf.is_config(current) or key not in _leaves(config):
            raise ValueError(
                f"{text}: a resumed run keeps its own configuration; override single "
                "values by their dotted path (trainer.num_steps=...)"
            )
    return OmegaConf.merge(config, changes)


def _leaves(config: DictConfig, prefix: str = "") -> set[str]:
    paths = set()
    for key in config:
        child = config._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            paths |= _leaves(child, f"{prefix}{key}.")
        else:
            paths.add(f"{prefix}{key}")
    return paths
