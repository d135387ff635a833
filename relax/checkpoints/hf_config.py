"""config.json of the released families, to LlamaConfig and back.

Read are the form with `rope_theta` and `rope_scaling` (transformers 4) and the one with
`rope_parameters` (5); written is the first, which both read. A key that a file leaves
out has the default of its family in transformers 5.23.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from relax.model.config import LlamaConfig
from relax.model.lora import NO_LORA
from relax.ops.feed_forward import ACTIVATIONS
from relax.ops.rope import KINDS

Json = dict[str, Any]


class Family(NamedTuple):
    """What a `model_type` stands for where its config.json is silent."""

    architecture: str
    defaults: Json


_SHARED = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        _SHARED
        | {
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "num_key_value_heads": None,
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _SHARED
        | {
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family("Qwen2ForCausalLM", _SHARED | _QWEN),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _SHARED | _QWEN | {"head_dim": 128, "attention_bias": False},
    ),
}
_SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)
_NULL_COUNTS = ("sliding_window", "num_key_value_heads")  # null is not the default
_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}  # ours where theirs differs
_DEFAULT_THETA = 10000.0
# The fields by which a kind of RoPE scaling differs from the default one.
_ROPE_FIELDS = {
    "default": (),
    "linear": ("rope_factor",),
    "dynamic": ("rope_factor",),
    "llama3": ("rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"),
    "yarn": (
        "rope_factor",
        "rope_beta_fast",
        "rope_beta_slow",
        "rope_attention_factor",
        "rope_truncate",
    ),
}
_ORIGINAL = "rope_original_max_position_embeddings"
# What decides which family has a model, if one has.
_DISTINCTIVE = (
    "qkv_bias",
    "attention_out_bias",
    "mlp_bias",
    "qk_norm",
    "sliding_window",
    "max_window_layers",
    "rope_type",
    _ORIGINAL,
)
# What no config.json says: how a model is held and run.
_OURS = {
    *("dropout", "param_dtype", "compute_dtype", "scan_layers", "remat", "attention"),
    *NO_LORA,
}


def read_config(raw: Mapping[str, Any], source: str, dtype: str) -> LlamaConfig:
    """Returns the model that a config.json describes, held and run in `dtype`.

    `source` names the file in errors. Raises ValueError for an architecture, a RoPE
    scaling or a layer pattern that the model doesn't have.
    """
    try:
        return _read(raw, dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None


def write_config(config: LlamaConfig, model_type: str | None = None) -> Json:
    """Returns the config.json of a model, of family `model_type` where that can be.

    Otherwise it is of the first family that reads back as the same model. Raises
    ValueError where none does.
    """
    preferred = [model_type] if model_type in FAMILIES else []
    for family in dict.fromkeys([*preferred, *FAMILIES]):
        if family == "llama" and config.hidden_size % config.num_attention_heads:
            continue  # which transformers refuses in this family alone
        raw = _write_as(config, family)
        if _meaning(read_config(raw, family, config.param_dtype)) == _meaning(config):
            return raw
    told = ", ".join(f"model.{name}={getattr(config, name)}" for name in _DISTINCTIVE)
    raise ValueError(
        f"no family of {', '.join(FAMILIES)} has {told} together: the model can't be "
        "exported"
    )


def _read(raw: Mapping[str, Any], dtype: str) -> LlamaConfig:
    family = _family(raw)
    values = FAMILIES[family].defaults | {
        key: value
        for key, value in raw.items()
        if value is not None or key in _NULL_COUNTS
    }
    if values.get("quantization_config"):
        raise ValueError(
            f"quantization_config={values['quantization_config']}: quantised weights "
            "can't be read; use the unquantised checkpoint"
        )
    bias = family == "qwen2" or values.get("attention_bias", False)
    window, first = _window(values, family)
    fields = {name: values[name] for name in _SAME_NAMES} | {
        "num_key_value_heads": values["num_key_value_heads"]
        or values["num_attention_heads"],
        "hidden_act": _activation(values["hidden_act"]),
        "qkv_bias": bias,
        "attention_out_bias": bias and family != "qwen2",
        "mlp_bias": values.get("mlp_bias", False),
        "qk_norm": family == "qwen3",
        "sliding_window": window,
        "max_window_layers": first,
        "dropout": 0.0,
        "param_dtype": dtype,
        "compute_dtype": dtype,
        "scan_layers": True,
        "remat": "none",
        "attention": "auto",
    }
    return LlamaConfig(**fields, **NO_LORA, **_read_rope(values))


def _family(raw: Mapping[str, Any]) -> str:
    known = {family.architecture: name for name, family in FAMILIES.items()}
    given = (raw.get("architectures") or [None])[0]
    name = raw.get("model_type")
    if name not in FAMILIES or given not in (None, FAMILIES[name].architecture):
        raise ValueError(
            f"model_type={name!r} with architectures={given!r} is unknown; "
            f"known are {', '.join(f'{known[a]} ({a})' for a in known)}"
        )
    return name


def _activation(name: str) -> str:
    ours = {theirs: name for name, theirs in _ACTIVATIONS.items()}.get(name, name)
    if ours not in ACTIVATIONS:
        known = [_ACTIVATIONS.get(name, name) for name in ACTIVATIONS]
        raise ValueError(
            f"hidden_act={name!r} is unknown; known are {', '.join(known)}"
        )
    return ours


def _window(values: Json, family: str) -> tuple[int | None, int]:
    """Returns the window, and the number of first layers that are without it."""
    L = values["num_hidden_layers"]
    window = values.get("sliding_window") if family != "llama" else None
    if family.startswith("qwen") and not values["use_sliding_window"]:
        window = None
    first = min(values["max_window_layers"], L) if "max_window_layers" in values else 0
    if types := values.get("layer_types"):
        first = types.count("full_attention")
        if types != ["full_attention"] * first + ["sliding_attention"] * (L - first):
            raise ValueError(
                f"layer_types={types} is not supported: layers with full attention "
                f"must come first, then those with sliding_attention, {L} in all"
            )
    return (None, 0) if window is None or first == L else (window, first)


def _read_rope(values: Json) -> Json:
    """Returns the rope fields of a LlamaConfig."""
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    if nested and all(value == nested[0] for value in nested):
        rope = dict(nested[0])
    elif nested:
        raise ValueError(
            f"rope_parameters={rope} differ between layers, which is not supported"
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in KINDS:
        raise ValueError(
            f"rope_type={kind!r} is not supported; known are {', '.join(KINDS)}"
        )
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1))
    if partial not in (None, 1):
        raise ValueError(
            f"partial_rotary_factor={partial} is not supported: RoPE turns whole heads"
        )
    theta = rope.get("rope_theta") or values.get("rope_theta") or _DEFAULT_THETA
    original = None
    if kind in ("llama3", "yarn"):
        original = values.get("original_max_position_embeddings") or rope.get(
            "original_max_position_embeddings"
        )
    factor = rope.get("factor")
    if factor is None and kind == "yarn" and original:
        factor = values["max_position_embeddings"] / original
    if factor is None and kind != "default":
        raise ValueError(f"rope_type={kind!r} needs a factor")
    return {
        "rope_theta": float(theta),
        "rope_type": kind,
        "rope_factor": 1.0 if kind == "default" else float(factor),
        _ORIGINAL: original,
        "rope_low_freq_factor": float(rope.get("low_freq_factor") or 1.0),
        "rope_high_freq_factor": float(rope.get("high_freq_factor") or 4.0),
        "rope_beta_fast": float(rope.get("beta_fast") or 32.0),
        "rope_beta_slow": float(rope.get("beta_slow") or 1.0),
        "rope_attention_factor": _attention_factor(rope, factor),
        "rope_truncate": bool(rope.get("truncate", True)),
    }


def _attention_factor(rope: Json, factor: float | None) -> float | None:
    """Returns yarn's factor where a file fixes it, by itself or by two mscales."""
    scales = rope.get("mscale"), rope.get("mscale_all_dim")
    if rope.get("attention_factor") is not None or not all(scales):
        return rope.get("attention_factor")
    top, bottom = (0.1 * scale * math.log(factor) + 1.0 for scale in scales)
    return top / bottom if factor > 1.0 else 1.0


def _write_as(config: LlamaConfig, family: str) -> Json:
    windowed = config.sliding_window is not None
    own = {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "use_sliding_window": windowed,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.max_window_layers,
    }
    return {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        **{name: getattr(config, name) for name in _SAME_NAMES},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_width,
        "hidden_act": _ACTIVATIONS.get(config.hidden_act, config.hidden_act),
        **{k: v for k, v in own.items() if k in FAMILIES[family].defaults},
        "rope_theta": config.rope_theta,
        "rope_scaling": _write_rope(config),
        "torch_dtype": config.param_dtype,
        "use_cache": True,
    }


def _write_rope(config: LlamaConfig) -> Json | None:
    if config.rope_type == "default":
        return None
    fields = _ROPE_FIELDS[config.rope_type]
    values = {name.removeprefix("rope_"): getattr(config, name) for name in fields}
    original = getattr(config, _ORIGINAL)
    if original is not None and config.rope_type in ("llama3", "yarn"):
        values["original_max_position_embeddings"] = original
    given = {name: value for name, value in values.items() if value is not None}
    return {"rope_type": config.rope_type, **given}


def _meaning(config: LlamaConfig) -> Json:
    """Returns the fields that change what a model computes, in one form."""
    if config.sliding_window is None or (
        config.max_window_layers == config.num_hidden_layers
    ):
        config = replace(config, sliding_window=None, max_window_layers=0)
    rope = {
        "scaling": {n: getattr(config, n) for n in _ROPE_FIELDS[config.rope_type]},
        "original": config.rope_scaling.original_context
        if config.rope_type in ("llama3", "yarn", "dynamic")
        else None,
    }
    fields = {
        name: value
        for name, value in asdict(config).items()
        if name not in _OURS and not name.startswith("rope_")
    }
    return (
        fields
        | rope
        | {
            "head_dim": config.head_width,
            "rope": (config.rope_type, config.rope_theta),
        }
    )
