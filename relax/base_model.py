"""The trained model that a new run starts from."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from relax.build import load
from relax.checkpoints.pretrained import find_pretrained
from relax.language_model import LanguageModel
from relax.model.config import LlamaConfig
from relax.model.parameters import parameter_shapes
from relax.sharding import MeshConfig

# What a model that is trained on keeps of its checkpoint is what it computes; how it is
# trained and run is said by the config.
_OWN_FIELDS = (
    "dropout",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "param_dtype",
    "compute_dtype",
    "scan_layers",
    "remat",
    "attention",
)


def load_base(
    init: str | None, mesh: MeshConfig, model: LlamaConfig
) -> LanguageModel | None:
    """Returns the model that `init` names, its adapters merged, or None.

    It is in the dtype, and the form of layers, of `model`. Raises ValueError where it
    has no tokenizer.
    """
    if init is None:
        return None
    base = load(
        init,
        mesh,
        dtype=model.param_dtype,
        scan_layers=model.scan_layers,
        option="init",
    )
    if find_pretrained(init, "init") is None or base.config.lora_rank:
        # An adapter trained on this is one of this model, not of where that came from.
        base.origin = replace(base.origin, name=init)
    base.merge_lora()
    if base.tokenizer is None:
        raise ValueError(
            f"init={init} holds no tokenizer; put its tokenizer.json or "
            "tokenizer.model into the folder"
        )
    return base


def trained_on(
    base: LlamaConfig, wanted: LlamaConfig, given: Mapping[str, Any], init: str
) -> LlamaConfig:
    """Returns the config of a model `base` that is trained as `wanted` says.

    given: what the user gave, by dotted path. `model.<field>` replaces the base's own
    value: a longer context, say. Raises ValueError where that would be a model of other
    parameters, or where a whole `model` is given that isn't the base's.
    """
    if "model" in given:
        _check_same(base, wanted, given["model"], init)
    paths = (path.lstrip("+") for path in given)
    named = [path[len("model.") :] for path in paths if path.startswith("model.")]
    own = replace(base, **{name: getattr(wanted, name) for name in _OWN_FIELDS})
    model = replace(own, **{name: getattr(wanted, name) for name in named})
    if model != own:
        _check_parameters(own, model, init)
    return model


def _check_same(base: LlamaConfig, wanted: LlamaConfig, choice: Any, init: str) -> None:
    """Raises ValueError where a chosen model isn't the one that is there."""
    for name in _differing(base, wanted):
        if name not in ("vocab_size", *_OWN_FIELDS):
            raise ValueError(
                f"model={choice}: init={init} brings its own model, whose {name} is "
                f"{getattr(base, name)} and not {getattr(wanted, name)}; leave model "
                "out, or give single values of it (model.lora_rank=8)"
            )


def _check_parameters(base: LlamaConfig, wanted: LlamaConfig, init: str) -> None:
    """Raises ValueError where the parameters of one don't fit the other."""
    shapes = parameter_shapes(base)
    for name in _differing(base, wanted):
        value = getattr(wanted, name)
        changed = replace(base, **{name: value})
        if name == "vocab_size" or parameter_shapes(changed) != shapes:
            raise ValueError(
                f"model.{name}={value}: the parameters of init={init} fit "
                f"{name}={getattr(base, name)} alone; leave it out"
            )


def _differing(one: LlamaConfig, other: LlamaConfig) -> list[str]:
    values = asdict(other)
    return [name for name, value in asdict(one).items() if value != values[name]]
