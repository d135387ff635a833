"""config.json of every form, to LlamaConfig."""

import dataclasses
import math

import numpy as np
import pytest

from relax.checkpoints.hf_config import FAMILIES, read_config
from relax.model.config import LlamaConfig
from relax.ops.rope import attention_factor, frequencies

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 512}


def read(family="llama", **keys) -> LlamaConfig:
    raw = {"architectures": [FAMILIES[family].architecture], "model_type": family}
    return read_config(raw | keys, "some/config.json", "float32")


@pytest.mark.parametrize("family", CLASSES)
def test_defaults_are_those_of_transformers(family):
    transformers = pytest.importorskip("transformers")
    peer = getattr(transformers, f"{CLASSES[family]}Config")
    theirs = {field.name: field.default for field in dataclasses.fields(peer)}
    ours = dict(FAMILIES[family].defaults)
    if family == "qwen2":  # which has no key for it
        assert ours.pop("head_dim") is None and "head_dim" not in theirs
    assert len(ours) >= 13
    for key, value in ours.items():
        assert theirs[key] == value and type(theirs[key]) is type(value), key
    unnamed = {"use_cache", "attention_dropout", "pretraining_tp", "layer_types"}
    unnamed |= {"pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters"}
    own = set(vars(peer)["__annotations__"]) & set(theirs)
    assert own - unnamed == set(ours)
    assert f"{CLASSES[family]}ForCausalLM" == FAMILIES[family].architecture


@pytest.mark.parametrize("family", CLASSES)
def test_an_empty_file_is_the_peers_default_model(family):
    transformers = pytest.importorskip("transformers")
    peer = getattr(transformers, f"{CLASSES[family]}Config")()
    config = read(family)
    assert config.num_key_value_heads == peer.num_key_value_heads
    assert config.head_width == getattr(peer, "head_dim", 4096 // 32)
    assert config.sliding_window == getattr(peer, "sliding_window", None)
    rope = {"rope_theta": config.rope_theta, "rope_type": config.rope_type}
    assert rope == peer.rope_parameters
    assert (config.qkv_bias, config.attention_out_bias) == (family == "qwen2", False)
    assert config.qk_norm == (family == "qwen3")
    assert not config.mlp_bias


@pytest.mark.parametrize(
    ("old", "new", "fields"),
    [
        (
            {"rope_theta": 5e5, "rope_scaling": None},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_type": "default", "rope_factor": 1.0},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
            {
                "rope_theta": 5e5,
                "rope_type": "llama3",
                "rope_factor": 8.0,
                "rope_low_freq_factor": 1.0,
                "rope_high_freq_factor": 4.0,
                "rope_original_max_position_embeddings": 8192,
            },
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 3}},
            {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
            {"rope_theta": 1e4, "rope_type": "linear", "rope_factor": 3.0},
        ),
        (
            {"rope_theta": 2e4, "rope_scaling": {"rope_type": "dynamic", "factor": 2}},
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "dynamic", "factor": 2.0},
                    "sliding_attention": {"rope_type": "dynamic", "factor": 2.0},
                },
                "rope_theta": 2e4,
            },
            {"rope_theta": 2e4, "rope_type": "dynamic", "rope_factor": 2.0},
        ),
    ],
    ids=["default", "llama3", "linear", "dynamic, nested"],
)
def test_both_forms_of_rope_give_one_configuration(old, new, fields):
    config = read(**old)
    assert config == read(**new)
    assert {name: getattr(config, name) for name in fields} == fields


def test_rope_scaling_wins_over_rope_parameters():
    """All of the second is then dropped, as transformers does it."""
    config = read(
        rope_scaling={"rope_type": "linear", "factor": 3.0},
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 7e3},
        rope_theta=5e3,
    )
    assert (config.rope_type, config.rope_factor) == ("linear", 3.0)
    assert config.rope_theta == 5e3


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"rope_theta": 5e5},
        {"rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5},
        {"rope_scaling": {**YARN, "factor": 4.0}},
        {"rope_scaling": {**YARN, "factor": None}},
        {"rope_scaling": {**YARN, "factor": 4.0, "attention_factor": 1.3}},
        {"rope_scaling": {**YARN, "factor": 4.0, "mscale": 0.7}},
        {
            "rope_scaling": {
                **YARN,
                "factor": 4.0,
                "mscale": 0.7,
                "mscale_all_dim": 1.1,
            }
        },
        {
            "rope_scaling": {
                **YARN,
                "factor": None,
                "mscale": 1.0,
                "mscale_all_dim": 0.8,
            }
        },
        {
            "rope_scaling": {
                **YARN,
                "factor": 4.0,
                "beta_fast": 20,
                "beta_slow": 2,
                "truncate": False,
            }
        },
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {**YARN, "factor": 4.0, "rope_theta": 3e4}},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_frequencies_are_those_that_transformers_makes_of_the_file(family, keys):
    transformers = pytest.importorskip("transformers")
    module = getattr(transformers.models, family)
    keys = {"max_position_embeddings": 2048, **keys}
    peer = getattr(module, f"modeling_{family}")
    rope = getattr(peer, f"{CLASSES[family]}RotaryEmbedding")(
        getattr(transformers, f"{CLASSES[family]}Config").from_dict(keys)
    )
    config = read(family, **keys)
    ours = frequencies(config.head_width, config.rope_theta, config.rope_scaling)
    np.testing.assert_allclose(ours, rope.inv_freq, rtol=2e-6)
    assert math.isclose(
        attention_factor(config.rope_scaling), rope.attention_scaling, rel_tol=1e-9
    )


def test_the_comparison_of_frequencies_catches_another_file():
    one = read(max_position_embeddings=2048, rope_scaling={**YARN, "factor": 4.0})
    other = read(max_position_embeddings=2048, rope_scaling={**YARN, "factor": 5.0})
    ours, theirs = (frequencies(128, 1e4, c.rope_scaling) for c in (one, other))
    assert np.max(np.abs(ours / theirs - 1.0)) > 0.1


@pytest.mark.parametrize("family", CLASSES)
def test_null_is_the_default_or_none(family):
    silent = read(family)
    nulls = dict.fromkeys(FAMILIES[family].defaults)
    heads = silent.num_attention_heads
    expected = dataclasses.replace(
        silent, num_key_value_heads=heads, sliding_window=None
    )
    rope = {"rope_theta": None, "rope_scaling": None, "rope_parameters": None}
    assert read(family, **nulls, **rope, layer_types=None) == expected


@pytest.mark.parametrize(
    ("family", "keys", "expected"),
    [
        ("mistral", {}, (4096, 0)),
        ("mistral", {"sliding_window": None}, (None, 0)),
        ("llama", {"sliding_window": 7}, (None, 0)),
        ("qwen2", {"sliding_window": 7}, (None, 0)),
        ("qwen2", {"sliding_window": 7, "use_sliding_window": True}, (7, 28)),
        (
            "qwen3",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "max_window_layers": 99,
            },
            (None, 0),
        ),
        (
            "qwen2",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "max_window_layers": 0,
            },
            (7, 0),
        ),
        (
            "qwen3",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["full_attention"] * 5 + ["sliding_attention"] * 27,
            },
            (7, 5),
        ),
        (
            "qwen3",
            {
                "sliding_window": 7,
                "use_sliding_window": True,
                "layer_types": ["full_attention"] * 32,
            },
            (None, 0),
        ),
    ],
    ids=str,
)
def test_windows_are_on_the_layers_that_the_file_says(family, keys, expected):
    config = read(family, **keys)
    assert (config.sliding_window, config.max_window_layers) == expected


def test_biases_are_where_each_family_has_them():
    llama = read("llama", attention_bias=True)
    assert (llama.qkv_bias, llama.attention_out_bias) == (True, True)
    assert read("llama", mlp_bias=True).mlp_bias
    qwen3 = read("qwen3", attention_bias=True)
    assert (qwen3.qkv_bias, qwen3.attention_out_bias) == (True, True)
    qwen2 = read("qwen2", attention_bias=False)
    assert (qwen2.qkv_bias, qwen2.attention_out_bias) == (True, False)


def test_activations_have_their_names_in_transformers():
    assert read(hidden_act="gelu_pytorch_tanh").hidden_act == "gelu_tanh"
    assert read(hidden_act="gelu").hidden_act == "gelu"


ERRORS = {
    r"model_type='gpt2' .*LlamaFor.*unknown.* llama \(Ll.*qwen3 \(Qw": {
        "model_type": "gpt2"
    },
    r"architectures='LlamaForTokenC.*known are llama \(LlamaForCausalLM\)": {
        "architectures": ["LlamaForTokenClassification"]
    },
    "rope_type='longrope' is not supported; known are default, linear": {
        "rope_scaling": {"type": "longrope", "factor": 2.0}
    },
    "rope_type='linear' needs a factor": {"rope_scaling": {"type": "linear"}},
    r"rope_factor=0\.5 must be at least 1": {
        "rope_scaling": {"type": "linear", "factor": 0.5}
    },
    r"partial_rotary_factor=0\.5 is not supported": {"partial_rotary_factor": 0.5},
    r"partial_rotary_factor=0\.25 is not": {
        "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}
    },
    "quantization_config=.*awq.* unquantised": {
        "quantization_config": {"quant_method": "awq"}
    },
    "layer_types=.* is not supported: layers with full attention must come first": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "layer_types=.*32 in all": {"layer_types": ["full_attention"] * 31},
    "hidden_act='swiglu' is unknown; known are silu, gelu, gelu_pytorch_tanh": {
        "hidden_act": "swiglu"
    },
    "rope_parameters=.* differ between layers": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
        }
    },
    "num_attention_heads=32 must be a multiple of": {"num_key_value_heads": 5},
    "not supported between instances of 'str'": {"hidden_size": "x"},
    "'max'": {"rope_theta": "max"},
    "not supported between|str": {"num_hidden_layers": "7", "max_window_layers": 3},
    "dictionary|sequence": {"rope_scaling": "linear"},
    "unhashable": {"model_type": ["llama"]},
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_cannot_be_read_names_file_and_value(message):
    with pytest.raises(ValueError, match=f"^some/config.json: .*({message})") as error:
        read(**ERRORS[message])
    assert str(error.value).count("some/config.json") == 1
