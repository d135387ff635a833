"""Small random checkpoints of the released families, written by transformers."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 331,
    "hidden_size": 96,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
# Shorter than the texts that are compared, so that they show.
WINDOW = 16
ORIGINAL_CONTEXT = 32


def _llama3(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL_CONTEXT,
    }


_THETA_1E6 = {"rope_type": "default", "rope_theta": 1e6}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": SIZES["max_position_embeddings"] / ORIGINAL_CONTEXT,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}
# Name -> model_type, and what its config.json has besides SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 2": ("llama", {"num_key_value_heads": 6}),
    "Llama 3.1, scaled RoPE": ("llama", {"rope_parameters": _llama3(8.0)}),
    "Llama 3.2, tied, own head width": (
        "llama",
        {
            "tie_word_embeddings": True,
            "head_dim": 24,
            "rope_parameters": _llama3(32.0),
        },
    ),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral, window": ("mistral", {"sliding_window": WINDOW}),
    "Mistral, no window": ("mistral", {"sliding_window": None}),
    "Qwen2, window in upper layers": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            "rope_parameters": _THETA_1E6,
        },
    ),
    "Qwen2, YaRN": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    "Qwen3": (
        "qwen3",
        {"tie_word_embeddings": True, "head_dim": 32, "rope_parameters": _THETA_1E6},
    ),
}


def write_checkpoint(
    folder: Path, family: str, dtype: str, sizes: Mapping[str, Any] = SIZES
) -> None:
    """Writes a checkpoint of `family` in `dtype`, the same numbers at each call."""
    model_type, fields = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **{**sizes, **fields})
    model = AutoModelForCausalLM.from_config(config)
    randomise(model)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


@torch.no_grad()
def randomise(model: torch.nn.Module) -> None:
    """Draws all parameters so that each part of the model matters.

    Logits come out with a spread of about 3, attention is neither flat nor one-hot, and
    biases and norms are not at their neutral values.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            mean, std = 1.0, 0.2
        elif name.endswith("bias"):
            mean, std = 0.0, 0.2
        elif name.endswith("proj.weight"):
            mean, std = 0.0, 1.2 / math.sqrt(parameter.shape[1])
        else:  # the tables
            mean, std = 0.0, 3.0 / math.sqrt(parameter.shape[1])
        parameter.normal_(mean, std, generator=generator)
