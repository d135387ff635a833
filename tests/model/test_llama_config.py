import re

import pytest

# Fields that no model can have, and what the message must name: the path and value of
# each field of the conflict.
IMPOSSIBLE = [
    ({"hidden_size": 0}, ["model.hidden_size=0"]),
    ({"intermediate_size": -1}, ["model.intermediate_size=-1"]),
    ({"num_hidden_layers": 0}, ["model.num_hidden_layers=0"]),
    ({"num_attention_heads": 0}, ["model.num_attention_heads=0"]),
    ({"num_key_value_heads": 0}, ["model.num_key_value_heads=0"]),
    ({"max_position_embeddings": 0}, ["model.max_position_embeddings=0"]),
    ({"vocab_size": 0}, ["model.vocab_size=0"]),
    ({"head_dim": 0}, ["model.head_dim=0"]),
    ({"sliding_window": 0}, ["model.sliding_window=0"]),
    ({"rope_theta": 0.0}, ["model.rope_theta=0.0"]),
    ({"rms_norm_eps": 0.0}, ["model.rms_norm_eps=0.0"]),
    ({"dropout": 1.0}, ["model.dropout=1.0"]),
    ({"dropout": -0.1}, ["model.dropout=-0.1"]),
    (
        {"max_window_layers": 4},
        ["model.max_window_layers=4", "model.num_hidden_layers=3"],
    ),
    ({"max_window_layers": -1}, ["model.max_window_layers=-1"]),
    ({"hidden_act": "swish"}, ["model.hidden_act='swish'", "silu"]),
    ({"rope_type": "longrope"}, ["model.rope_type='longrope'", "llama3"]),
    ({"param_dtype": "f32"}, ["model.param_dtype='f32'", "float32"]),
    ({"compute_dtype": "int8"}, ["model.compute_dtype='int8'", "bfloat16"]),
    ({"remat": "some"}, ["model.remat='some'", "full"]),
    ({"attention": "flash"}, ["model.attention='flash'", "auto"]),
    (
        {"num_key_value_heads": 4},
        ["model.num_attention_heads=6", "model.num_key_value_heads=4"],
    ),
    (
        {"head_dim": None},
        ["model.hidden_size=28", "model.num_attention_heads=6", "model.head_dim"],
    ),
    ({"head_dim": 7}, ["model.head_dim=7"]),
    ({"head_dim": None, "hidden_size": 42}, ["model.head_dim=7"]),
    (
        {"rope_type": "linear", "rope_factor": 0.5},
        ["model.rope_factor=0.5", "model.rope_type=linear"],
    ),
    ({"rope_type": "dynamic", "head_dim": 2}, ["model.rope_type=dynamic", "head_dim"]),
    (
        {"rope_low_freq_factor": 4.0},
        ["model.rope_low_freq_factor=4.0", "model.rope_high_freq_factor=4.0"],
    ),
]


@pytest.mark.parametrize(("fields", "named"), IMPOSSIBLE, ids=str)
def test_an_impossible_model_is_refused_by_path_and_value(make_config, fields, named):
    with pytest.raises(ValueError) as error:
        make_config(**fields)
    message = str(error.value)
    assert "\n" not in message
    for part in named:
        assert re.search(re.escape(part) + r"(?![\w.])", message), message


def test_head_width(make_config):
    assert make_config().head_width == 10
    assert make_config(head_dim=None, hidden_size=24).head_width == 4


@pytest.mark.parametrize(("size", "rows"), [(1, 64), (64, 64), (65, 128), (67, 128)])
def test_vocabulary_is_padded_to_a_multiple_of_64(make_config, size, rows):
    assert make_config(vocab_size=size).padded_vocab_size == rows


def test_a_model_without_a_vocabulary_says_what_to_set(make_config):
    with pytest.raises(ValueError, match=r"model\.vocab_size is null"):
        _ = make_config(vocab_size=None).padded_vocab_size


def test_rope_scaling_reads_its_fields(make_config):
    scaling = make_config(
        rope_type="yarn",
        rope_factor=8.0,
        rope_original_max_position_embeddings=64,
        rope_beta_fast=16.0,
        rope_beta_slow=2.0,
        rope_attention_factor=1.25,
        rope_truncate=False,
    ).rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_context) == ("yarn", 8.0, 64)
    assert (scaling.beta_fast, scaling.beta_slow) == (16.0, 2.0)
    assert (scaling.attention_factor, scaling.truncate) == (1.25, False)


def test_rope_stretches_from_the_whole_context_unless_told_otherwise(make_config):
    scaling = make_config(rope_type="llama3", rope_factor=8.0).rope_scaling
    assert scaling.original_context == 101
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 4.0)
