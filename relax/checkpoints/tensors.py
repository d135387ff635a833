"""The tensors of released checkpoints, read piece by piece out of mapped files."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class Tensor(NamedTuple):
    """A tensor that is still in its file; `read` copies the given slices of it."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[slice, ...]], np.ndarray]


Tensors = dict[str, Tensor]


def open_tensors(folder: Path) -> Tensors:
    """Returns the tensors of a Hugging Face folder by name, read from nothing yet.

    Raises FileNotFoundError where there are no weights or a shard is missing, and
    ValueError where a file is truncated or corrupt or a tensor is there twice.
    """
    for name, open_file in ((SAFETENSORS, open_safetensors), (TORCH, open_torch)):
        if (folder / name).is_file():
            return merge([open_file(folder / name)])
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _open_sharded(index, open_file)
    shards = sorted(path.name for path in folder.glob("*-of-*"))
    found = f"; it holds {shards[0]} without its index" if shards else ""
    raise FileNotFoundError(
        f"{folder} holds none of {SAFETENSORS}, {TORCH} and their .index.json{found}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; ValueError names a file that holds none."""
    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=_no_doubles)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def merge(files: list[Tensors]) -> Tensors:
    """Returns the tensors of all files; ValueError where one is in two of them."""
    merged: Tensors = {}
    for tensors in files:
        for name in tensors.keys() & merged.keys():
            raise ValueError(
                f"tensor {name} is doubled: it is in {merged[name].file} and in "
                f"{tensors[name].file}"
            )
        merged |= tensors
    return merged


def open_safetensors(path: Path) -> Tensors:
    """Returns the tensors of one safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from None
    return {
        name: Tensor(
            path,
            tuple(piece.get_shape()),
            _known_dtype(path, name, piece.get_dtype()),
            piece.__getitem__,
        )
        for name, piece in slices.items()
    }


def open_torch(path: Path) -> Tensors:
    """Returns the tensors of one of PyTorch's files, read without running its pickle.

    Raises ModuleNotFoundError where torch isn't installed.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{path} needs PyTorch to be read: pip install 'relax-lm[experiments]', or "
            "convert the checkpoint to safetensors"
        ) from None
    try:
        loaded = _torch_load(torch, path)
    except Exception as error:  # torch raises what its zip, pickle and C++ parts raise
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise ValueError(f"{path} is truncated or corrupt: {reason}") from None
    if not isinstance(loaded, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in loaded.values()
    ):
        raise ValueError(f"{path} holds other things than tensors by name")
    return {name: _torch_tensor(path, name, value) for name, value in loaded.items()}


def _torch_load(torch: Any, path: Path) -> Any:
    options = {"map_location": "cpu", "weights_only": True}
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        return torch.load(path, mmap=True, **options)
    return torch.load(path, **options)  # the form before PyTorch 1.6 can't be mapped


def _torch_tensor(path: Path, name: str, tensor: Any) -> Tensor:
    import torch

    names = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
    }
    dtype = _known_dtype(path, name, names.get(tensor.dtype, str(tensor.dtype)))

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        piece = tensor.detach()[slices].contiguous()
        if dtype == _DTYPES["BF16"]:  # which numpy knows through ml_dtypes alone
            return piece.view(torch.int16).numpy().view(dtype)
        return piece.numpy()

    return Tensor(path, tuple(tensor.shape), dtype, read)


def _known_dtype(path: Path, name: str, dtype: str) -> np.dtype:
    if dtype not in _DTYPES:
        raise ValueError(
            f"{path}: tensor {name} is {dtype}; read are {', '.join(_DTYPES)} "
            "(quantised checkpoints have an unquantised original)"
        )
    return _DTYPES[dtype]


def _open_sharded(index: Path, open_file: Callable[[Path], Tensors]) -> Tensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise ValueError(f"{index} has no weight_map of tensors to files")
    paths = {name: index.parent / file for name, file in weight_map.items()}
    if missing := sorted({str(p) for p in paths.values() if not p.is_file()}):
        raise FileNotFoundError(
            f"{missing[0]} is missing; {index} names it ({len(missing)} of "
            f"{len(set(paths.values()))} shards are missing): copy the checkpoint whole"
        )
    tensors = merge([open_file(path) for path in sorted(set(paths.values()))])
    for name, path in paths.items():
        if name not in tensors or tensors[name].file != path:
            raise ValueError(f"{path} lacks the tensor {name} that {index} puts there")
    return tensors


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = Counter(name for name, _ in pairs)
    for name, count in counts.items():
        if count > 1:
            raise KeyError(f"the key {name} is doubled")
    return dict(pairs)


def widest_dtype(tensors: Mapping[str, Tensor]) -> str:
    """Returns the name of the narrowest dtype, up to float32, that holds them all."""
    dtypes: Iterator[np.dtype] = (tensor.dtype for tensor in tensors.values())
    names = {np.dtype(dtype).name for dtype in dtypes}
    return names.pop() if len(names) == 1 and "float64" not in names else "float32"
