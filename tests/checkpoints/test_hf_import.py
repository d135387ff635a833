"""Tensors to parameters: which number goes where, on one device and on several."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import relax
from relax.checkpoints import hf_import
from relax.checkpoints.hf_import import load_params
from relax.checkpoints.pretrained import open_pretrained
from relax.model.parameters import flat_parameters, parameter_shapes, stack_layers
from relax.sharding import parameter_shardings

N, K, H, V = 6, 2, 10, 67
BLOCK = "llama/layers/block"


@pytest.fixture(scope="module")
def peer(save_peer):
    """A model with every kind of parameter."""
    return save_peer("Qwen3", attention_bias=True)


@pytest.fixture(scope="module")
def tensors(peer):
    return load_file(peer.folder / "model.safetensors")


@pytest.fixture(scope="module")
def params(peer, read_folder):
    return {name: np.asarray(x) for name, x in read_folder(peer.folder)[1].items()}


def assert_heads(ours, theirs, count):
    """Compares `[D, heads, H]` with `[heads * H, D]` in three places of each head."""
    assert ours.shape == (theirs.shape[1], count, H)
    for head in range(count):
        for place in (0, 3, H - 1):
            np.testing.assert_array_equal(
                ours[:, head, place], theirs[head * H + place]
            )


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_each_matrix_has_its_numbers_where_the_model_looks_for_them(
    params, tensors, layer
):
    theirs = f"model.layers.{layer}.self_attn"
    for letter, count in (("q", N), ("k", K), ("v", K)):
        ours = params[f"{BLOCK}/self_attn/{letter}_proj/weight"][layer]
        assert_heads(ours, tensors[f"{theirs}.{letter}_proj.weight"], count)
        bias = params[f"{BLOCK}/self_attn/{letter}_proj/bias"][layer]
        assert bias.shape == (count, H)
        their_bias = tensors[f"{theirs}.{letter}_proj.bias"]
        assert bias[1, 3] == their_bias[H + 3]
        assert bias[0, 9] == their_bias[9]
    out = params[f"{BLOCK}/self_attn/o_proj/weight"][layer]
    assert_heads(np.moveaxis(out, 2, 0), tensors[f"{theirs}.o_proj.weight"].T, N)
    for name in ("o_proj/bias", "q_norm/weight", "k_norm/weight"):
        np.testing.assert_array_equal(
            params[f"{BLOCK}/self_attn/{name}"][layer],
            tensors[f"{theirs}.{name.replace('/', '.')}"],
        )
    for name in ("gate", "up", "down"):
        np.testing.assert_array_equal(
            params[f"{BLOCK}/mlp/{name}_proj/weight"][layer],
            tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"].T,
        )
    for name in ("input_layernorm", "post_attention_layernorm"):
        np.testing.assert_array_equal(
            params[f"{BLOCK}/{name}/weight"][layer],
            tensors[f"model.layers.{layer}.{name}.weight"],
        )


def test_tables_are_padded_with_zeros(params, tensors):
    for ours, theirs in (("embed_tokens", "model.embed_tokens"), ("lm_head",) * 2):
        table = params[f"llama/{ours}/weight"]
        assert table.shape == (128, 30)
        np.testing.assert_array_equal(table[:V], tensors[f"{theirs}.weight"])
        assert not table[V:].any()
    np.testing.assert_array_equal(
        params["llama/norm/weight"], tensors["model.norm.weight"]
    )


def load(folder, mesh, **changes):
    checkpoint = open_pretrained(Path(folder), None, "cpu")
    config = dataclasses.replace(checkpoint.config, **changes)
    shardings = parameter_shardings(mesh, parameter_shapes(config))
    return load_params(config, checkpoint.tensors, shardings)


def test_unrolled_layers_have_the_same_numbers(
    peer, params, single_mesh, assert_same_bits
):
    unrolled = load(peer.folder, single_mesh, scan_layers=False)
    assert "llama/layers_2/block/mlp/up_proj" in unrolled
    assert_same_bits(dict(flat_parameters(stack_layers(unrolled))), params)
    swapped = {**unrolled}
    names = [f"llama/layers_{i}/block/mlp/up_proj" for i in (0, 1)]
    swapped[names[0]], swapped[names[1]] = unrolled[names[1]], unrolled[names[0]]
    with pytest.raises(AssertionError):
        assert_same_bits(dict(flat_parameters(stack_layers(swapped))), params)


@pytest.mark.parametrize("size", [1, 700, 2500])
def test_small_pieces_join_to_the_same_numbers(
    peer, params, single_mesh, assert_same_bits, monkeypatch, size
):
    reads = []
    monkeypatch.setattr(hf_import, "_PIECE_BYTES", size)
    checkpoint = open_pretrained(peer.folder, None, "cpu")

    def counted(tensor):
        def read(slices):
            reads.append(tensor.read(slices))
            return reads[-1]

        return tensor._replace(read=read)

    found = {name: counted(tensor) for name, tensor in checkpoint.tensors.items()}
    shapes = parameter_shapes(checkpoint.config)
    loaded = load_params(
        checkpoint.config, found, parameter_shardings(single_mesh, shapes)
    )
    assert_same_bits(dict(flat_parameters(loaded)), params)
    # A head of `o_proj`, whose rows are the longest, is the least that is read.
    assert max(piece.nbytes for piece in reads) <= max(size, H * N * H * 4)
    assert len(reads) > 1.5 * len(found)


def edit(peer, tmp_path, change):
    """Returns a folder with the peer's files and other tensors."""
    folder = Path(shutil.copytree(peer.folder, tmp_path / "checkpoint"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def narrow(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((43, 30), np.float32)


def drop(tensors, *names):
    for name in names:
        del tensors[name]


ERRORS = {
    r"model.layers.1.mlp.up_proj.weight in .*model.safetensors has shape \[43, 30\], "
    r"the configuration asks for \[44, 30\]": narrow,
    "fit its configuration: lm_head.weight is missing$": lambda tensors: drop(
        tensors, "lm_head.weight"
    ),
    "model.layers.2.self_attn.q_proj.bias is missing": lambda tensors: drop(
        tensors, "model.layers.2.self_attn.q_proj.bias"
    ),
    r"model.layers.3.mlp.up_proj.weight \[44, 30\] in .*model.safetensors is unknown": (
        lambda tensors: tensors.update(
            {"model.layers.3.mlp.up_proj.weight": np.zeros((44, 30), np.float32)}
        )
    ),
    r"model.norm.weight in .* has shape \[30, 1\], .* \[30\]": lambda tensors: (
        tensors.update({"model.norm.weight": np.zeros((30, 1), np.float32)})
    ),
    r"embed_tokens.weight in .* has shape \[66, 30\], .* \[67, 30\]": lambda tensors: (
        tensors.update({"model.embed_tokens.weight": np.zeros((66, 30), np.float32)})
    ),
    "k_proj.weight is missing; and 2 more": lambda tensors: drop(
        tensors,
        *[name for name in tensors if "layers.0.self_attn.k" in name],
        "model.norm.weight",
        "model.layers.0.self_attn.q_norm.weight",
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_a_tensor_that_does_not_fit_is_named(peer, tmp_path, message):
    folder = edit(peer, tmp_path, ERRORS[message])
    with pytest.raises(ValueError, match=message):
        relax.load(folder)


def test_buffers_of_old_files_are_ignored(
    peer, tmp_path, params, read_folder, assert_same_bits
):
    folder = edit(
        peer,
        tmp_path,
        lambda tensors: tensors.update(
            {
                f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": np.ones(5, "f4")
                for layer in range(3)
            }
        ),
    )
    assert_same_bits(read_folder(folder)[1], params)


def test_an_output_layer_in_the_file_of_a_tied_model_is_ignored(
    save_peer, tmp_path, tokens
):
    """As config.json wins in transformers."""
    peer = save_peer(tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(peer.folder / "model.safetensors")
    junk = {"lm_head.weight": np.full((V, 30), 9.0, np.float32)}
    folder = edit(peer, tmp_path, lambda tensors: tensors.update(junk))
    model = relax.load(folder)
    assert "llama/lm_head" not in model.params
    logits, _ = peer.forward(tokens)
    np.testing.assert_allclose(model.logits(tokens), logits, 0, 1e-4)


@pytest.fixture(scope="module")
def eight_devices(save_peer, save_meta, meta_sizes, tmp_path_factory):
    """What mesh_script.py found for a Hugging Face folder and one of Meta's."""
    peer = save_peer("Qwen3", "bfloat16", attention_bias=True, hidden_size=24)
    llama = save_peer("Llama", **meta_sizes)
    meta = save_meta(llama, tmp_path_factory.mktemp("meta") / "meta", shards=2)
    script = Path(__file__).with_name("mesh_script.py")
    flags = "--xla_force_host_platform_device_count=8"
    ran = subprocess.run(
        [sys.executable, "-W", "error", script, peer.folder, meta],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return dict(zip(("hf", "meta"), json.loads(ran.stdout), strict=True))


MESHES = ("single", "fsdp", "tensor", "mixed", "unrolled", "exported")


@pytest.mark.parametrize("source", ["hf", "meta"])
@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_holds_the_same_numbers(eight_devices, source, mesh):
    arrays = eight_devices[source][mesh]["arrays"]
    assert len(arrays) == {"hf": 18, "meta": 12}[source]
    assert [path for path, (equal, _) in arrays.items() if not equal] == []


# L=3 D=24 N=6 K=2 H=10 F=44, 128 rows of 67 ids.
PARTS = {
    "fsdp": {
        "llama/embed_tokens/weight": [128, 3],
        f"{BLOCK}/self_attn/q_proj/weight": [3, 3, 6, 10],
        f"{BLOCK}/self_attn/o_proj/weight": [3, 6, 10, 3],
        f"{BLOCK}/mlp/down_proj/weight": [3, 44, 3],
        f"{BLOCK}/self_attn/q_norm/weight": [3, 10],
    },
    "tensor": {
        "llama/lm_head/weight": [64, 24],
        f"{BLOCK}/self_attn/k_proj/weight": [3, 24, 1, 10],
        f"{BLOCK}/self_attn/q_proj/bias": [3, 3, 10],
        f"{BLOCK}/self_attn/o_proj/weight": [3, 3, 10, 24],
        f"{BLOCK}/mlp/up_proj/weight": [3, 24, 22],
    },
    "mixed": {
        "llama/embed_tokens/weight": [64, 12],
        f"{BLOCK}/self_attn/v_proj/weight": [3, 12, 1, 10],
        f"{BLOCK}/mlp/down_proj/weight": [3, 22, 12],
    },
}


@pytest.mark.parametrize("mesh", PARTS)
def test_a_device_holds_and_reads_its_part_alone(eight_devices, mesh):
    found = eight_devices["hf"][mesh]
    for path, shape in PARTS[mesh].items():
        assert found["arrays"][path][1] == shape, path
    # Of each mesh, the largest piece of a tensor of 67 * 24 or 60 * 24 numbers.
    largest = {"fsdp": 67 * 3, "tensor": 64 * 24, "mixed": 64 * 12}[mesh]
    assert found["largest"] == largest
    assert eight_devices["hf"]["single"]["largest"] == 67 * 24
