"""Tensors in every kind of file, whole and damaged."""

import builtins
import json
import pickle

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from relax.checkpoints.tensors import open_tensors, read_json, widest_dtype

RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.normal(size=(7, 5)).astype(np.float32),
    "b.weight": RNG.normal(size=(3, 11)).astype(np.float16),
    "b.bias": RNG.normal(size=13).astype(ml_dtypes.bfloat16),
    "c.weight": RNG.normal(size=(2, 17)).astype(np.float64),
}
SAFE_INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"


def to_torch(array: np.ndarray):
    torch = pytest.importorskip("torch")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def save_bin(arrays, path, **options):
    torch = pytest.importorskip("torch")
    torch.save(
        {name: to_torch(array) for name, array in arrays.items()}, path, **options
    )


def save_old_bin(arrays, path):
    save_bin(arrays, path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:2] != b"PK"


def save_shards(save, stem, suffix, folder):
    """Saves the tensors in two files, by a plan that no alphabet gives."""
    weight_map = {}
    for number, names in enumerate((["a.weight", "c.weight"], ["b.weight", "b.bias"])):
        file = f"{stem}-{number + 1:05d}-of-00002.{suffix}"
        save({name: ARRAYS[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


FORMS = {
    "safetensors": lambda d: save_file(ARRAYS, d / "model.safetensors"),
    "safetensors in shards": lambda d: save_shards(
        save_file, "model", "safetensors", d
    ),
    "bin": lambda d: save_bin(ARRAYS, d / "pytorch_model.bin"),
    "bin in shards": lambda d: save_shards(save_bin, "pytorch_model", "bin", d),
    "bin of the form before zip": lambda d: save_old_bin(
        ARRAYS, d / "pytorch_model.bin"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_each_tensor_bit_for_bit(form, tmp_path):
    FORMS[form](tmp_path)
    tensors = open_tensors(tmp_path)
    assert sorted(tensors) == sorted(ARRAYS)
    for name, expected in ARRAYS.items():
        tensor = tensors[name]
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
        whole = tensor.read((slice(None),) * expected.ndim)
        assert whole.dtype == expected.dtype
        assert whole.tobytes() == expected.tobytes()
        assert (tmp_path / tensor.file.name).is_file()


@pytest.mark.parametrize("form", FORMS)
def test_a_piece_of_a_tensor_is_that_piece(form, tmp_path):
    FORMS[form](tmp_path)
    tensors = open_tensors(tmp_path)
    for name in ("a.weight", "b.weight", "c.weight"):
        piece = tensors[name].read((slice(1, 2), slice(2, 5)))
        np.testing.assert_array_equal(piece, ARRAYS[name][1:2, 2:5])
    np.testing.assert_array_equal(
        tensors["b.bias"].read((slice(3, 8),)), ARRAYS["b.bias"][3:8]
    )


def test_a_transposed_view_in_a_bin_is_read_in_its_own_order(tmp_path):
    torch = pytest.importorskip("torch")
    view = torch.from_numpy(ARRAYS["a.weight"]).T
    torch.save({"a": view}, tmp_path / "pytorch_model.bin")
    piece = open_tensors(tmp_path)["a"].read((slice(1, 4), slice(0, 3)))
    np.testing.assert_array_equal(piece, ARRAYS["a.weight"].T[1:4, 0:3])


def test_parameters_in_a_bin_are_tensors(tmp_path):
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.arange(3.0))
    torch.save({"a": parameter}, tmp_path / "pytorch_model.bin")
    piece = open_tensors(tmp_path)["a"].read((slice(None),))
    assert piece.tolist() == [0.0, 1.0, 2.0]


def test_safetensors_are_read_where_both_are_there(tmp_path):
    FORMS["safetensors in shards"](tmp_path)
    save_file({"other": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert list(open_tensors(tmp_path)) == ["other"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.weight"], "float32"),
        (["b.weight"], "float16"),
        (["b.bias"], "bfloat16"),
        (["c.weight"], "float32"),
        (["b.weight", "b.bias"], "float32"),
        (["a.weight", "b.bias"], "float32"),
    ],
    ids=str,
)
def test_the_dtype_of_a_checkpoint_holds_all_its_tensors(names, expected, tmp_path):
    save_file({name: ARRAYS[name] for name in names}, tmp_path / "model.safetensors")
    assert widest_dtype(open_tensors(tmp_path)) == expected


def test_a_folder_without_weights_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds none of model.safetensors, py"):
        open_tensors(tmp_path)
    FORMS["safetensors in shards"](tmp_path)
    (tmp_path / SAFE_INDEX).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"model-00001-of-00002.* without its in"
    ):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("form", "shard"),
    [
        ("safetensors in shards", "model-00002-of-00002.safetensors"),
        ("bin in shards", "pytorch_model-00002-of-00002.bin"),
    ],
)
def test_a_missing_shard_is_named(form, shard, tmp_path):
    FORMS[form](tmp_path)
    (tmp_path / shard).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"{shard} is missing; .*1 of 2 shards"
    ):
        open_tensors(tmp_path)


def edit_index(folder, change):
    path = folder / SAFE_INDEX
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_tensor_that_the_index_lists_must_be_in_its_file(tmp_path):
    FORMS["safetensors in shards"](tmp_path)
    edit_index(
        tmp_path, lambda names: names.update(d="model-00001-of-00002.safetensors")
    )
    with pytest.raises(
        ValueError, match=r"00001-of-00002.safetensors lacks the tensor d "
    ):
        open_tensors(tmp_path)


def test_a_tensor_that_is_in_another_file_than_listed_is_an_error(tmp_path):
    FORMS["safetensors in shards"](tmp_path)
    second = "model-00002-of-00002.safetensors"
    edit_index(tmp_path, lambda names: names.update({"a.weight": second}))
    with pytest.raises(ValueError, match=f"{second} lacks the tensor a.weight"):
        open_tensors(tmp_path)


def test_a_tensor_in_two_shards_names_both(tmp_path):
    FORMS["safetensors in shards"](tmp_path)
    again = {name: ARRAYS[name] for name in ("b.weight", "b.bias", "a.weight")}
    save_file(again, tmp_path / "model-00002-of-00002.safetensors")
    message = "a.weight is doubled: .*00001-of-00002.* and in .*00002-of-00002"
    with pytest.raises(ValueError, match=message):
        open_tensors(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.5, 0.99, -1])
def test_a_truncated_safetensors_file_is_named(kept, tmp_path):
    FORMS["safetensors"](tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else kept])
    with pytest.raises(
        ValueError, match=r"model.safetensors is truncated or corrupt: "
    ):
        open_tensors(tmp_path)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 3}', b"\xff\xfe"])
def test_a_corrupt_header_is_named(header, tmp_path):
    data = len(header).to_bytes(8, "little") + header
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(
        ValueError, match=r"model.safetensors is truncated or corrupt: "
    ):
        open_tensors(tmp_path)


@pytest.mark.parametrize("form", ["bin", "bin of the form before zip"])
@pytest.mark.parametrize("kept", [0, 1, 2, 50, 0.5, 0.9, -1])
def test_a_truncated_bin_is_named(form, kept, tmp_path):
    FORMS[form](tmp_path)
    path = tmp_path / "pytorch_model.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else kept])
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin is truncated or corrupt: "
    ):
        open_tensors(tmp_path)


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused(zipped, tmp_path):
    torch = pytest.importorskip("torch")
    trace, path = tmp_path / "trace", tmp_path / "pytorch_model.bin"
    torch.save({"a": Bomb(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"pytorch_model.bin"):
        open_tensors(tmp_path)
    assert not trace.exists()
    with pickle.loads(pickle.dumps(Bomb(trace))):
        assert trace.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": {"b": 3}}, {"step": 7}], ids=str)
def test_a_bin_of_other_things_is_refused(content, tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"pytorch_model.bin holds other things than ten"
    ):
        open_tensors(tmp_path)


def test_integers_are_refused_by_name(tmp_path):
    arrays = {**ARRAYS, "d.weight": np.zeros((2, 3), np.int8)}
    save_file(arrays, tmp_path / "model.safetensors")
    message = "model.safetensors: tensor d.weight is I8; .*unquantised"
    with pytest.raises(ValueError, match=message):
        open_tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_bin(arrays, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"tensor d.weight is torch\.int8; "):
        open_tensors(tmp_path)


def test_a_bin_without_torch_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    real_import = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    message = r"pytorch_model.bin needs PyTorch .*'relax-lm\[experiments\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "truncated or corrupt"),
        (b'{"weight_map": {"a": ', "truncated or corrupt"),
        (b"\xff{}", "truncated or corrupt"),
        (b'{"a": 1, "a": 2}', "key a is doubled"),
        (b"[1]", "holds no JSON object"),
        (b"3", "holds no JSON object"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_malformed_json_file_is_named(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=f"config.json .*{message}"):
        read_json(path)


@pytest.mark.parametrize(
    "index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{"], ids=str
)
def test_a_malformed_index_is_named(index, tmp_path):
    (tmp_path / SAFE_INDEX).write_text(index)
    with pytest.raises(ValueError, match=SAFE_INDEX):
        open_tensors(tmp_path)
