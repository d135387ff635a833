"""What `save_hf` and `save` write, read by transformers 5.23 and by ourselves."""

import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import load_file

import relax
from relax import LanguageModel
from relax.checkpoints import hf_export
from relax.language_model import Origin
from relax.model.parameters import flat_parameters

# As for the checkpoints that are read.
TOLERANCE = 1e-4
UPPER_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "beta_fast": 20.0,
    "original_max_position_embeddings": 8,
}
FAMILIES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"hidden_size": 60, "rope_parameters": YARN, **UPPER_WINDOW}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
}


def reload(folder):
    """Returns what transformers makes of a folder, and complains of nothing."""
    transformers = pytest.importorskip("transformers")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="float32",
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(report.values()), report
    return model.eval()


def peer_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def config_keys(folder) -> dict:
    """Returns what transformers reads of a config.json, but for how it was written."""
    transformers = pytest.importorskip("transformers")
    keys = transformers.AutoConfig.from_pretrained(folder).to_dict()
    written = ("transformers_version", "_name_or_path", "architectures")
    return {key: value for key, value in keys.items() if key not in written}


@pytest.fixture(scope="module")
def exported(save_peer, tmp_path_factory):
    """A callable: a peer of a case, our model of it, and the folder we wrote."""
    folders, made = tmp_path_factory.mktemp("exported"), {}

    def export(case):
        if case not in made:
            family, fields = FAMILIES[case]
            peer = save_peer(family, **fields)
            model, folder = relax.load(peer.folder), folders / str(len(made))
            model.save_hf(folder)
            made[case] = peer, model, folder
        return made[case]

    return export


@pytest.mark.parametrize("case", FAMILIES)
def test_every_tensor_comes_back_bit_for_bit(exported, assert_same_bits, case):
    peer, _, folder = exported(case)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    theirs = load_file(peer.folder / "model.safetensors")
    ours = load_file(folder / "model.safetensors")
    assert_same_bits(ours, theirs)
    changed = {name: np.nextafter(x, np.inf) for name, x in ours.items()}
    with pytest.raises(AssertionError):
        assert_same_bits(changed, theirs)


@pytest.mark.parametrize("case", FAMILIES)
def test_the_configuration_means_the_same_to_transformers(exported, case):
    peer, _, folder = exported(case)
    theirs, ours = config_keys(peer.folder), config_keys(folder)
    assert len(theirs) > 25
    if not theirs.get("use_sliding_window", True):  # the layers then have no window
        theirs.pop("max_window_layers"), ours.pop("max_window_layers")
    rope = theirs.pop("rope_parameters")
    ours_rope = ours.pop("rope_parameters")
    assert {key: ours_rope.get(key) for key in rope} == rope
    if case == "qwen2":  # what the file left out is written at its default
        assert ours_rope.keys() - rope.keys() == {"beta_slow", "truncate"}
    assert ours == theirs


@pytest.mark.parametrize("case", ["llama 3.2", "mistral", "qwen2", "qwen3"])
def test_transformers_computes_the_same_logits(exported, tokens, case):
    peer, model, folder = exported(case)
    logits = peer_logits(reload(folder), tokens)
    np.testing.assert_allclose(model.logits(tokens), logits, 0, TOLERANCE)
    np.testing.assert_allclose(peer.forward(tokens)[0], logits, 0, TOLERANCE)


def born(config, params, mesh, **fields) -> LanguageModel:
    return LanguageModel(config, params, None, mesh, **fields)


BORN = {
    # The options of conf/model/tiny, which is trained by default.
    "tiny": {
        "head_dim": None,
        "hidden_size": 60,
        "sliding_window": 7,
        "tie_word_embeddings": True,
        "scan_layers": False,
    },
    "width that heads do not divide": {"hidden_size": 28, "head_dim": 10},
    "gelu, biases": {
        "hidden_size": 30,
        "hidden_act": "gelu_tanh",
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    },
    "linear rope": {"hidden_size": 30, "rope_type": "linear", "rope_factor": 3.0},
}


@pytest.mark.parametrize("case", BORN)
def test_a_model_trained_here_is_one_for_transformers(
    make_config, random_params, single_mesh, tmp_path, tokens, case
):
    config = make_config(**BORN[case])
    model = born(config, random_params(config), single_mesh)
    model.save_hf(tmp_path / "new")
    peer = reload(tmp_path / "new")
    logits = peer_logits(peer, tokens)
    np.testing.assert_allclose(model.logits(tokens), logits, 0, TOLERANCE)
    doubled = jax.tree.map(lambda leaf: leaf * 1.01, model.params)
    other = born(config, doubled, single_mesh).logits(tokens)
    assert np.abs(np.asarray(other) - logits).max() > 10 * TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_model_comes_back_from_a_hugging_face_folder_bit_for_bit(
    make_config,
    random_params,
    single_mesh,
    tmp_path,
    assert_same_bits,
    dtype,
    scan_layers,
):
    config = make_config(
        qkv_bias=True, param_dtype=dtype, compute_dtype=dtype, scan_layers=scan_layers
    )
    params = random_params(config)
    born(config, params, single_mesh).save_hf(tmp_path / "new")
    back = relax.load(tmp_path / "new", dtype="auto", scan_layers=True)
    assert back.config.param_dtype == dtype
    if scan_layers:
        assert_same_bits(
            dict(flat_parameters(back.params)), dict(flat_parameters(params))
        )
    else:
        for layer in range(3):
            np.testing.assert_array_equal(
                back.params["llama/layers/block/mlp/up_proj"]["weight"][layer],
                params[f"llama/layers_{layer}/block/mlp/up_proj"]["weight"],
            )
    assert config_dtype(tmp_path / "new") == dtype


def config_dtype(folder) -> str:
    return json.loads((folder / "config.json").read_text())["torch_dtype"]


@pytest.mark.parametrize(("limit", "files"), [(20_000, 8), (1, 30), (10**6, 1)])
def test_large_models_are_split_over_files(
    save_peer, tmp_path, assert_same_bits, read_folder, limit, files
):
    peer = save_peer("Llama")
    folder = tmp_path / "new"
    relax.load(peer.folder).save_hf(folder, max_shard_bytes=limit)
    shards = sorted(folder.glob("*.safetensors"))
    assert_same_bits(read_folder(folder)[1], read_folder(peer.folder)[1])
    joined = {}
    for shard in shards:
        tensors = load_file(shard)
        assert not joined.keys() & tensors.keys()
        sizes = [tensor.nbytes for tensor in tensors.values()]
        assert len(sizes) == 1 or sum(sizes) <= limit
        joined |= tensors
    assert_same_bits(joined, load_file(peer.folder / "model.safetensors"))
    assert len(shards) == files
    index = folder / "model.safetensors.index.json"
    assert index.is_file() == (files > 1)
    if files == 1:
        return
    content = json.loads(index.read_text())
    assert content["metadata"]["total_size"] == sum(x.nbytes for x in joined.values())
    assert content["weight_map"].keys() == joined.keys()
    assert shards[0].name == f"model-00001-of-{files:05d}.safetensors"
    if files == 8:
        reload(folder)


def test_what_came_with_the_model_is_kept(save_peer, copy_of, tmp_path):
    folder = copy_of(save_peer("Mistral", sliding_window=5))
    generation = {"eos_token_id": [5, 2, 11], "temperature": 0.7, "bos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | {"eos_token_id": 11, "pad_token_id": 3}
    path.write_text(json.dumps(raw | {"pretraining_tp": 2}))
    model = relax.load(folder)
    assert model.stop_ids == (2, 5, 11)
    model.save_hf(tmp_path / "new")
    kept = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert kept == generation
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["model_type"] == "mistral"
    named = {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    assert named == {"eos_token_id": 11, "pad_token_id": 3}
    assert config["pretraining_tp"] == 2
    assert relax.load(tmp_path / "new").stop_ids == (2, 5, 11)


def test_an_end_of_text_of_config_json_alone_goes_on_ending_texts(
    save_peer, copy_of, tmp_path
):
    """Where both files name some, transformers looks at the second."""
    folder = copy_of(save_peer("Mistral", sliding_window=5))
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | {"eos_token_id": 11}
    path.write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    relax.load(folder).save_hf(tmp_path / "new")
    kept = json.loads((tmp_path / "new" / "generation_config.json").read_text())
    assert kept == {"eos_token_id": [5, 11]}


def test_keys_of_the_newer_form_do_not_contradict(save_peer, tmp_path):
    """The peer writes rope_parameters and layer_types, which are dropped."""
    rope = {"rope_type": "linear", "rope_theta": 5e3, "factor": 3.0}
    peer = save_peer("Qwen3", rope_parameters=rope, **UPPER_WINDOW)
    raw = json.loads((peer.folder / "config.json").read_text())
    assert raw["rope_parameters"]["factor"] == 3.0 and len(raw["layer_types"]) == 3
    model = relax.load(peer.folder)
    config = replace(model.config, rope_factor=2.0, max_window_layers=2)
    origin = model.origin
    born(config, model.params, model.mesh, origin=origin).save_hf(tmp_path / "new")
    keys = config_keys(tmp_path / "new")
    assert keys["rope_parameters"]["factor"] == 2.0
    assert keys["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"]


def test_a_folder_that_is_there_is_not_touched(save_peer, tmp_path):
    model = relax.load(save_peer("Llama").folder)
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    for save in (model.save_hf, model.save):
        with pytest.raises(FileExistsError, match=r"folder=.*new is there already"):
            save(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (folder / "mine").read_text() == "kept"
    (folder / "mine").unlink()
    model.save_hf(folder)  # an empty one is taken
    assert (folder / "config.json").is_file()


def test_a_failure_in_the_middle_leaves_nothing(save_peer, tmp_path, monkeypatch):
    model = relax.load(save_peer("Llama").folder)
    saved = []
    real = safetensors.numpy.save_file

    def save_file(tensors, path, **options):
        saved.append(path)
        if len(saved) == 2:
            raise OSError("No space left on device")
        real(tensors, path, **options)

    monkeypatch.setattr(safetensors.numpy, "save_file", save_file)
    with pytest.raises(OSError, match="No space left"):
        model.save_hf(tmp_path / "new", max_shard_bytes=20_000)
    assert len(saved) == 2
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    model.save_hf(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_an_earlier_crash_left_does_not_get_into_the_folder(save_peer, tmp_path):
    left = tmp_path / "new.partial"
    left.mkdir()
    (left / "model-00007-of-00009.safetensors").write_text("old")
    relax.load(save_peer("Llama").folder).save_hf(tmp_path / "new")
    assert not list((tmp_path / "new").glob("*00007*"))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_model_that_no_family_has_leaves_nothing(
    make_config, random_params, single_mesh, tmp_path
):
    config = make_config(qk_norm=True, mlp_bias=True)
    model = born(config, random_params(config), single_mesh)
    with pytest.raises(ValueError, match=r"no family of .* model\.mlp_bias=True"):
        model.save_hf(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_comes_back_from_our_own_folder(
    make_config, random_params, single_mesh, tmp_path, assert_same_bits, dtype
):
    config = make_config(
        scan_layers=False, qk_norm=True, mlp_bias=True, param_dtype=dtype
    )
    origin = Origin((2, 5), {"model_type": "qwen3", "x": [1, {"y": None}]}, {"z": 0.7})
    model = born(config, random_params(config), single_mesh, origin=origin)
    model.save(tmp_path / "new")
    back = relax.load(tmp_path / "new")
    assert back.config == config
    assert back.stop_ids == (2, 5)
    assert back.origin == replace(origin, stop_ids=back.origin.stop_ids)
    assert back.tokenizer is None
    assert_same_bits(*(dict(flat_parameters(m.params)) for m in (back, model)))
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_new_folder_is_replaced_by_name_alone(tmp_path):
    with hf_export.NewFolder(tmp_path / "deep" / "new", "folder") as new:
        (new / "file").write_text("here")
        assert not (tmp_path / "deep" / "new").exists()
    assert (tmp_path / "deep" / "new" / "file").read_text() == "here"
    shutil.rmtree(tmp_path / "deep")
