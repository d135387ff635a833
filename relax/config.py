"""The boundary between composed YAML and typed, frozen dataclasses."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

T = TypeVar("T")


def to_dataclass(cls: type[T], node: DictConfig | Mapping[str, Any], path: str) -> T:
    """Returns one config group as its dataclass; `path` is "" at the top of the config.

    Raises ValueError in one line, naming the config path, for an unknown, missing or
    mistyped key, and passes on what the dataclass's own checks raise.
    """
    prefix = f"{path}." if path else ""
    known = [field.name for field in fields(cls)]
    try:
        values = OmegaConf.to_container(
            node if OmegaConf.is_config(node) else OmegaConf.create(dict(node)),
            resolve=True,
            throw_on_missing=True,
        )
        for key in known:
            if key not in values:
                raise ValueError(f"{prefix}{key} is missing; add it to the config")
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
    except ConfigKeyError as error:
        key = str(error.key)
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"{prefix}{key} is no key of the config; {hint}") from None
    except MissingMandatoryValue as error:
        where = f"{prefix}{error.key}"
        raise ValueError(f"{where} has no value; give {where}=...") from None
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key)
        where = key if key.startswith(prefix) else f"{prefix}{key}"
        reason = str(error).splitlines()[0]
        raise ValueError(f"{where}: {reason}") from None


def to_values(config: DictConfig) -> dict[str, Any]:
    """Returns the composed config as plain values, interpolations resolved.

    Raises ValueError naming the config path of one that can't be.
    """
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{error.full_key or error.key}: {reason}") from None


def save_config(values: Mapping[str, Any], path: Path) -> None:
    """Writes plain values as YAML, all of them or none."""
    partial = path.with_name(f"{path.name}.partial")
    text = OmegaConf.to_yaml(OmegaConf.create(dict(values)))
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def load_config(path: Path) -> dict[str, Any]:
    """Returns the plain values that `save_config` wrote."""
    return to_values(OmegaConf.load(path))


def override(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `values` with those at dotted paths replaced.

    Raises ValueError where a path names no single value that `values` holds: a saved
    config takes values, not other groups.
    """
    config = OmegaConf.create(dict(values))
    known = set(_leaves(values))
    for path, value in changes.items():
        if path not in known:
            raise ValueError(
                f"{path}={value}: a resumed run keeps its own configuration; override "
                "single values by their dotted path (trainer.num_steps=...)"
            )
        OmegaConf.update(config, path, value)
    return to_values(config)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted path of every value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
