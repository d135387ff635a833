"""Meta's original folders, made of a Llama of transformers 5.23."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import relax
from relax.checkpoints.pretrained import open_pretrained

# Three layers of float32 sums, as for the peers.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llama(save_peer, meta_sizes):
    return save_peer("Llama", **meta_sizes)


@pytest.mark.parametrize(
    ("shards", "embedding_axis"),
    [(1, 0), (2, 1), (2, 0), (4, 1), (4, 0)],
    ids=["one file", "Llama 2, two", "Llama 3, two", "Llama 2, four", "Llama 3, four"],
)
def test_a_folder_gives_the_parameters_of_its_llama(
    llama, save_meta, read_folder, assert_same_bits, tmp_path, shards, embedding_axis
):
    """Of the two key/value heads, four files hold each one twice."""
    folder = save_meta(llama, tmp_path / "meta", shards, embedding_axis)
    config, params = read_folder(folder)
    expected_config, expected = read_folder(llama.folder)
    assert_same_bits(params, expected)
    assert config.max_position_embeddings == 4096
    assert config.intermediate_size == expected_config.intermediate_size == 84
    assert config.num_key_value_heads == 2
    assert not config.tie_word_embeddings


def test_logits_are_those_of_transformers(llama, save_meta, tmp_path, tokens):
    folder = save_meta(llama, tmp_path / "meta", shards=2)
    logits, _ = llama.forward(tokens)
    found = np.asarray(relax.load(folder).logits(tokens))
    np.testing.assert_allclose(found, logits, 0, TOLERANCE)
    # The rows of a head in Hugging Face's order would be another model.
    import torch

    path = folder / "consolidated.00.pth"
    part = torch.load(path)
    name = "layers.0.attention.wq.weight"
    part[name] = part[name].view(2, 3, 2, 24).transpose(1, 2).reshape(12, 24)
    torch.save(part, path)
    wrong = np.asarray(relax.load(folder).logits(tokens))
    assert np.abs(wrong - logits).max() > 100 * TOLERANCE


def test_a_folder_is_exported_as_the_llama_that_it_came_from(
    llama, save_meta, assert_same_bits, tmp_path
):
    relax.load(save_meta(llama, tmp_path / "meta", shards=2)).save_hf(tmp_path / "hf")
    ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "hf", llama.folder)
    )
    assert_same_bits(ours, theirs)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["model_type"] == "llama"
    assert (written["rms_norm_eps"], written["rope_theta"]) == (1e-6, 1e4)


@pytest.mark.parametrize("kept", [False, True], ids=["absent", "the table once more"])
def test_a_tied_output_layer_may_be_in_the_files(
    save_peer, save_meta, meta_sizes, read_folder, assert_same_bits, tmp_path, kept
):
    torch = pytest.importorskip("torch")
    peer = save_peer("Llama", **meta_sizes, tie_word_embeddings=True)
    folder = save_meta(peer, tmp_path / "meta", shards=2, embedding_axis=0)
    if kept:
        for path in folder.glob("*.pth"):
            part = torch.load(path)
            part["output.weight"] = part["tok_embeddings.weight"].clone()
            torch.save(part, path)
    config, params = read_folder(folder)
    assert config.tie_word_embeddings
    assert_same_bits(params, read_folder(peer.folder)[1])


def rope(config) -> tuple:
    return (
        config.rope_theta,
        config.rope_type,
        config.rope_factor,
        config.rope_original_max_position_embeddings,
        config.rope_low_freq_factor,
        config.rope_high_freq_factor,
        config.max_position_embeddings,
    )


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, (1e4, "default", 1.0, None, 1.0, 4.0, 4096)),
        ({"rope_theta": 5e5}, (5e5, "default", 1.0, None, 1.0, 4.0, 8192)),
        (
            {"rope_theta": 5e5, "use_scaled_rope": True},
            (5e5, "llama3", 8.0, 8192, 1.0, 4.0, 131072),
        ),
        (
            {"rope_theta": 5e5, "use_scaled_rope": True, "rope_scaling_factor": 16},
            (5e5, "llama3", 16.0, 8192, 1.0, 4.0, 131072),
        ),
        ({"max_seq_len": 2048}, (1e4, "default", 1.0, None, 1.0, 4.0, 2048)),
    ],
    ids=["Llama 2", "Llama 3", "Llama 3.1", "a factor of its own", "a context"],
)
def test_rope_is_that_of_the_release(llama, save_meta, tmp_path, params, expected):
    folder = save_meta(llama, tmp_path / "meta", **params)
    assert rope(open_pretrained(folder, None, "cpu").config) == expected


def test_a_tied_scaled_rope_is_that_of_llama_3_2(
    save_peer, save_meta, meta_sizes, tmp_path
):
    peer = save_peer("Llama", **meta_sizes, tie_word_embeddings=True)
    folder = save_meta(peer, tmp_path / "m", rope_theta=5e5, use_scaled_rope=True)
    config = open_pretrained(folder, None, "cpu").config
    assert rope(config) == (5e5, "llama3", 32.0, 8192, 1.0, 4.0, 131072)


@pytest.mark.parametrize(
    ("params", "width"),
    [
        # The releases' own numbers: Llama 2 7B and 70B, Llama 3 8B.
        ({"dim": 4096, "multiple_of": 256}, 11008),
        ({"dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}, 28672),
        ({"dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3}, 14336),
    ],
    ids=["7B", "70B", "8B"],
)
def test_feed_forward_widths_are_those_of_the_releases(
    llama, save_meta, tmp_path, params, width
):
    defaults = {"ffn_dim_multiplier": None, "n_heads": 32}
    folder = save_meta(llama, tmp_path / "meta", **{**defaults, **params})
    assert open_pretrained(folder, None, "cpu").config.intermediate_size == width


def test_a_vocabulary_of_minus_one_is_that_of_the_table(llama, save_meta, tmp_path):
    """As in the params.json of Llama 2."""
    folder = save_meta(llama, tmp_path / "meta", shards=2, embedding_axis=0)
    params = folder / "params.json"
    raw = json.loads(params.read_text()) | {"vocab_size": -1}
    params.write_text(json.dumps(raw))
    assert open_pretrained(folder, None, "cpu").config.vocab_size == 68


def test_heads_without_sharing_need_no_key(save_peer, save_meta, meta_sizes, tmp_path):
    """Llama 2 7B names no n_kv_heads; here it is wrong, as there are two."""
    peer = save_peer("Llama", **meta_sizes)
    folder = save_meta(peer, tmp_path / "meta", n_kv_heads=None)
    with pytest.raises(ValueError, match=r"wk.weight in .* \[12, 24\], .* \[24, 24\]"):
        relax.load(folder)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_missing_file_is_named(llama, save_meta, tmp_path, gone):
    folder = save_meta(llama, tmp_path / "meta", shards=2)
    (folder / f"consolidated.{gone:02d}.pth").unlink()
    message = {0: r"lacks consolidated\.00\.pth", 1: r"embed.*\[68, 12\].*\[68, 24\]"}
    with pytest.raises((FileNotFoundError, ValueError), match=message[gone]):
        relax.load(folder)


def test_a_folder_without_any_weights_names_the_first_file(llama, save_meta, tmp_path):
    folder = save_meta(llama, tmp_path / "meta")
    (folder / "consolidated.00.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks consolidated\.00\.pth"):
        relax.load(folder)


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "norm_eps"])
def test_a_missing_key_is_named(llama, save_meta, tmp_path, key):
    folder = save_meta(llama, tmp_path / "meta")
    params = folder / "params.json"
    raw = json.loads(params.read_text())
    del raw[key]
    params.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"lacks '{key}' in params.json"):
        relax.load(folder)


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.1.ffn_norm.weight"])
def test_a_missing_tensor_is_named(llama, save_meta, tmp_path, name):
    torch = pytest.importorskip("torch")
    folder = save_meta(llama, tmp_path / "meta", shards=2)
    for shard in (0, 1):
        path = folder / f"consolidated.{shard:02d}.pth"
        part = torch.load(path)
        del part[name]
        torch.save(part, path)
    with pytest.raises(ValueError, match=name):
        relax.load(folder)


def test_a_tensor_missing_in_one_file_is_named(llama, save_meta, tmp_path):
    torch = pytest.importorskip("torch")
    folder = save_meta(llama, tmp_path / "meta", shards=2)
    for shard, name in enumerate(("layers.1.attention.wo", "layers.2.attention.wo")):
        other = folder.parent / f"copy{shard}"
        save_meta(llama, other, shards=2)
        path = other / f"consolidated.{shard:02d}.pth"
        part = torch.load(path)
        del part[f"{name}.weight"]
        torch.save(part, path)
        with pytest.raises(ValueError, match=f"{name}.weight"):
            relax.load(other)


def test_a_truncated_file_is_named(llama, save_meta, tmp_path):
    folder = save_meta(llama, tmp_path / "meta", shards=2)
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(
        ValueError, match=r"consolidated.01.pth is truncated or corrupt"
    ):
        relax.load(folder)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"moe_args": {"num_experts": 16}}, "params.json: moe_args=.* plain Llama"),
        ({"quantization_args": {"scheme": "int4"}}, "params.json: quantization_args"),
        ({"dim": "x"}, "params.json: dim='x' must be a whole number above 0"),
        ({"n_heads": 0}, "params.json: n_heads=0 must be"),
    ],
    ids=str,
)
def test_params_of_another_kind_are_refused(
    llama, save_meta, tmp_path, params, message
):
    folder = save_meta(llama, tmp_path / "meta", **params)
    with pytest.raises(ValueError, match=message):
        relax.load(folder)
