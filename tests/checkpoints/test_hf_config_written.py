"""LlamaConfig to a config.json that reads back as the same model."""

import dataclasses
import functools
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from relax.checkpoints.hf_config import FAMILIES, read_config, write_config
from relax.config import to_dataclass
from relax.model.config import LlamaConfig

CONF = Path(__file__).parents[2] / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("[!_]*.yaml"))


@functools.cache
def model_config(name: str) -> LlamaConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(overrides=[f"+model={name}"])
    config = to_dataclass(LlamaConfig, composed.model, "model")
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size or 257,
        head_dim=config.head_width,
        dropout=0.0,
        scan_layers=True,
        remat="none",
        attention="auto",
        compute_dtype=config.param_dtype,
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_conf_is_written_and_read_back(name):
    config = model_config(name)
    raw = write_config(config)
    family = next((f for f in ("qwen2", "qwen3", "mistral") if name.startswith(f)), "")
    released = name.startswith(("llama", "qwen", "mistral", "smollm"))
    if released and config.sliding_window is None and family != "mistral":
        assert raw["model_type"] == (family or "llama")
    assert read_config(raw, name, config.param_dtype) == config


def test_a_known_family_is_kept_where_it_has_the_model():
    config = model_config("mistral_7b_v0_3")
    assert write_config(config)["model_type"] == "llama"
    assert write_config(config, "mistral")["model_type"] == "mistral"
    assert write_config(config, "qwen3")["model_type"] == "llama"
    assert write_config(config, "gpt2")["model_type"] == "llama"
    assert write_config(config, "mistral")["sliding_window"] is None


@st.composite
def configurations(draw):
    """LlamaConfigs that some family has, each written in one way only."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    heads = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 7))
    bias = draw(st.booleans())
    window, first = None, 0
    if family != "llama" and draw(st.booleans()):
        window = draw(st.integers(1, 50))
        first = draw(st.integers(0, layers - 1)) if family != "mistral" else 0
    return dataclasses.replace(
        model_config("smollm_135m"),
        **{
            "vocab_size": draw(st.integers(1, 999)),
            "hidden_size": draw(st.integers(1, 50)),
            "intermediate_size": draw(st.integers(1, 50)),
            "num_hidden_layers": layers,
            "num_attention_heads": heads * draw(st.integers(1, 4)),
            "num_key_value_heads": heads,
            "head_dim": 2 * draw(st.integers(2, 20)),
            "max_position_embeddings": draw(st.integers(1, 5000)),
            "hidden_act": draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"])),
            "rms_norm_eps": draw(st.floats(1e-8, 1e-2)),
            "tie_word_embeddings": draw(st.booleans()),
            "qkv_bias": family == "qwen2" or (family == "qwen3" and bias),
            "attention_out_bias": family == "qwen3" and bias,
            "qk_norm": family == "qwen3",
            "sliding_window": window,
            "max_window_layers": first,
            "rope_theta": draw(st.floats(10.0, 1e7)),
        }
        | draw(ropes()),
    )


@st.composite
def ropes(draw):
    kind = draw(st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn"]))
    fields = {"rope_type": kind}
    if kind != "default":
        fields["rope_factor"] = draw(st.floats(1.0, 64.0))
    if kind in ("llama3", "yarn"):
        fields["rope_original_max_position_embeddings"] = draw(
            st.none() | st.integers(1, 5000)
        )
    if kind == "llama3":
        fields["rope_low_freq_factor"] = draw(st.floats(0.5, 2.0))
        fields["rope_high_freq_factor"] = draw(st.floats(2.5, 9.0))
    if kind == "yarn":
        fields["rope_beta_fast"] = draw(st.floats(8.0, 64.0))
        fields["rope_beta_slow"] = draw(st.floats(0.5, 4.0))
        fields["rope_attention_factor"] = draw(st.none() | st.floats(0.5, 2.0))
        fields["rope_truncate"] = draw(st.booleans())
    return fields


@settings(max_examples=300, deadline=None, derandomize=True)
@given(configurations())
def test_a_written_configuration_reads_back_as_itself(config):
    assert read_config(write_config(config), "written", config.param_dtype) == config


@pytest.mark.parametrize(
    "fields",
    [
        {"qk_norm": True, "mlp_bias": True},
        {"attention_out_bias": True},
        {"qkv_bias": True, "mlp_bias": True},
        {"qk_norm": True, "qkv_bias": True},
        {"mlp_bias": True, "sliding_window": 7},
        {"rope_type": "dynamic", "rope_original_max_position_embeddings": 50},
        {"mlp_bias": True, "hidden_size": 29},
        {"max_window_layers": 1, "sliding_window": 7},
    ],
    ids=str,
)
def test_what_no_family_has_cannot_be_written(make_config, fields):
    config = make_config(**{"hidden_size": 30, **fields})
    name = next(iter(fields))
    message = rf"no family of llama.* model\.{name}=.* can't be exported"
    with pytest.raises(ValueError, match=message):
        write_config(config)


def test_a_width_that_heads_do_not_divide_is_no_llama(make_config):
    """The LlamaConfig of transformers refuses it; MistralConfig has the same model."""
    config = make_config(hidden_size=28, num_attention_heads=6, head_dim=10)
    assert write_config(config)["model_type"] == "mistral"
    transformers = pytest.importorskip("transformers")
    peer = transformers.MistralConfig.from_dict(write_config(config))
    assert (peer.hidden_size, peer.head_dim, peer.sliding_window) == (28, 10, None)
    with pytest.raises(Exception, match=r"hidden size \(28\) is not a multiple"):
        transformers.LlamaConfig(hidden_size=28, num_attention_heads=6, head_dim=10)
