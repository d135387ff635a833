"""A LoRA adapter alone, in the form of PEFT: adapter_config.json and its tensors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from relax.checkpoints.hf_export import host_tensor, write_json
from relax.checkpoints.hf_import import load_leaves
from relax.checkpoints.names import adapter_leaves
from relax.checkpoints.tensors import (
    Tensors,
    open_safetensors,
    open_torch,
    read_json,
)
from relax.model.config import LORA_TARGETS, LlamaConfig
from relax.model.lora import join
from relax.model.parameters import Params, parameter_shapes
from relax.sharding import parameter_shardings

ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_TORCH = "adapter_model.bin"
_TARGET = re.compile(r".*\.layers\.\d+\.(?:self_attn|mlp)\.(\w+)\.lora_A\.weight")
# What changes the sum W + alpha/r·A·B, or which modules have one, unless it is unset.
_UNSUPPORTED = (
    *("use_dora", "use_rslora", "use_qalora", "use_bdlora", "lora_bias"),
    *("fan_in_fan_out", "modules_to_save", "layers_to_transform", "rank_pattern"),
    *("alpha_pattern", "layer_replication", "target_parameters", "arrow_config"),
    *("trainable_token_indices", "alora_invocation_tokens", "kasa_config"),
    *("monteclora_config", "velora_config"),
)
# Initialisations after which the matrices are those of the base model.
_INITIALISATIONS = (True, False, None, "gaussian", "eva")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter whose tensors are still in their file."""

    folder: Path
    fields: Mapping[str, Any]  # of LlamaConfig
    tensors: Tensors

    def add_to(
        self, config: LlamaConfig, params: Params, mesh: Mesh
    ) -> tuple[LlamaConfig, Params]:
        """Returns the model with the adapter, in `config.param_dtype` and on `mesh`.

        Raises ValueError where the model has an adapter, or isn't the one that this
        one was made for.
        """
        if config.lora_rank:
            raise ValueError(
                f"adapter={self.folder}: the model has adapters already; merge them "
                "first (LanguageModel.merge_lora)"
            )
        config = replace(config, **self.fields)
        shardings = parameter_shardings(mesh, parameter_shapes(config))
        wanted = adapter_leaves(config)
        try:
            adapters = load_leaves(config, self.tensors, shardings, wanted)
        except ValueError as error:
            raise ValueError(f"adapter={self.folder}: {error}") from None
        return config, join(adapters, params)


def open_adapter(folder: Path) -> SavedAdapter:
    """Returns the adapter in a folder of PEFT's, checked as far as its headers go.

    Raises FileNotFoundError where there is none, and ValueError for one that is no
    plain LoRA of a layer's projections.
    """
    for path in (folder, folder / ADAPTER_CONFIG):
        if not path.exists():
            raise FileNotFoundError(
                f"adapter={folder}: {path} is not there; give a folder with "
                f"{ADAPTER_CONFIG} and {WEIGHTS}, as PEFT and task.adapter=true write"
            )
    raw = read_json(folder / ADAPTER_CONFIG)
    _check_supported(folder, raw)
    tensors = _open_weights(folder)
    found = {match[1] for name in tensors if (match := _TARGET.fullmatch(name))}
    targets = tuple(name for name in LORA_TARGETS if name in found)
    if not targets:
        raise ValueError(
            f"adapter={folder}: none of its tensors is an adapter of "
            f"{', '.join(LORA_TARGETS)}; it holds {', '.join(sorted(tensors)[:3])}"
        )
    fields = {
        "lora_rank": raw.get("r", 8),
        "lora_alpha": float(raw.get("lora_alpha", 8)),
        "lora_dropout": float(raw.get("lora_dropout", 0.0)),
        "lora_targets": targets,
    }
    return SavedAdapter(folder, fields, tensors)


def write_adapter(
    folder: Path, config: LlamaConfig, params: Params, base_model: str | None
) -> None:
    """Writes a model's adapters into a folder; `base_model` names what they adapt.

    Raises ValueError where it has none.
    """
    from safetensors.numpy import save_file

    if not config.lora_rank:
        raise ValueError(
            "the model has no adapter (model.lora_rank=0) that could be written alone; "
            "task.adapter=false writes the whole model"
        )
    alpha = config.lora_alpha
    raw = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.lora_rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": list(config.lora_targets),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / ADAPTER_CONFIG, raw)
    tensors = {
        theirs: host_tensor(config, params, leaf, layer if leaf.stacked else None)
        for leaf in adapter_leaves(config)
        for layer, theirs in enumerate(leaf.names)
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _check_supported(folder: Path, raw: Mapping[str, Any]) -> None:
    """Raises ValueError for another method than LoRA, and for variants of it."""
    wrong = {name: raw[name] for name in _UNSUPPORTED if raw.get(name)}
    if raw.get("bias", "none") != "none":
        wrong["bias"] = raw["bias"]
    if raw.get("init_lora_weights") not in _INITIALISATIONS:
        wrong["init_lora_weights"] = raw["init_lora_weights"]
    if raw.get("peft_type") != "LORA":
        wrong = {"peft_type": raw.get("peft_type")}
    if wrong:
        name, value = next(iter(wrong.items()))
        raise ValueError(
            f"adapter={folder}: {name}={value!r} is not supported, plain LoRA without "
            "biases is; merge the adapter with PEFT and load the merged model"
        )


def _open_weights(folder: Path) -> Tensors:
    for name, open_file in ((WEIGHTS, open_safetensors), (_TORCH, open_torch)):
        if (folder / name).is_file():
            return open_file(folder / name)
    raise FileNotFoundError(f"adapter={folder} holds neither {WEIGHTS} nor {_TORCH}")
