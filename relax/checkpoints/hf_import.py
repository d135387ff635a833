"""From the tensors of a released checkpoint to parameters, a piece at a time.

Besides the parameters themselves, no more of the host's memory is held than one array,
as far as devices of this process have parts of it, and one piece of a tensor.
"""

import math
from typing import Any

import jax
import numpy as np

from relax.checkpoints.names import IGNORED, Leaf, leaves
from relax.checkpoints.progress import Progress
from relax.checkpoints.tensors import Tensor, Tensors
from relax.model.config import LlamaConfig
from relax.model.parameters import Params

_PIECE_BYTES = 2**24


def load_params(
    config: LlamaConfig, tensors: Tensors, shardings: Any, source: str = "hf"
) -> Params:
    """Returns parameters in `config.param_dtype`, each array on its sharding.

    `shardings` is the tree of `sharding.parameter_shardings`; `source` says whose names
    the tensors have. Raises ValueError, before any number is read, for tensors that are
    missing, unknown or of another shape.
    """
    return load_leaves(config, tensors, shardings, list(leaves(config, source)))


def load_leaves(
    config: LlamaConfig, tensors: Tensors, shardings: Any, wanted: list[Leaf]
) -> Params:
    """Returns the parameters `wanted` alone, those that `tensors` hold; as above."""
    check_tensors(config, tensors, wanted)
    sizes = [
        len(leaf.names) * math.prod(leaf.their_shape(config.vocab_size))
        for leaf in wanted
    ]
    progress, params = Progress("read", sum(sizes)), {}
    for leaf, size in zip(wanted, sizes, strict=True):
        sharding = shardings[leaf.module][leaf.name]
        array = _load_leaf(config, tensors, leaf, sharding)
        params.setdefault(leaf.module, {})[leaf.name] = array
        progress.add(size)
    return params


def check_tensors(config: LlamaConfig, tensors: Tensors, wanted: list[Leaf]) -> None:
    """Raises ValueError naming each tensor that doesn't fit the configuration."""
    shapes = {
        name: leaf.their_shape(config.vocab_size)
        for leaf in wanted
        for name in leaf.names
    }
    tied = {"lm_head.weight", "output.weight"} if config.tie_word_embeddings else set()
    misfits = [f"{name} is missing" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes and name not in tied and not IGNORED.fullmatch(name):
            misfits.append(f"{name} {list(tensor.shape)} in {tensor.file} is unknown")
        elif name in shapes and tensor.shape != shapes[name]:
            misfits.append(
                f"{name} in {tensor.file} has shape {list(tensor.shape)}, the "
                f"configuration asks for {list(shapes[name])}"
            )
    if misfits:
        more = f"; and {len(misfits) - 3} more" if len(misfits) > 3 else ""
        raise ValueError(
            f"the checkpoint doesn't fit its configuration: {'; '.join(misfits[:3])}"
            f"{more}"
        )


def _load_leaf(config: LlamaConfig, tensors: Tensors, leaf: Leaf, sharding) -> Any:
    shape = (len(leaf.names), *leaf.shape) if leaf.stacked else leaf.shape
    dtype = jax.numpy.dtype(config.param_dtype)
    made: dict[tuple, np.ndarray] = {}

    def numbers(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if key not in made:  # replicas share one array
            made[key] = _read(config, tensors, leaf, [range(*part) for part in key])
        return made[key]

    array = jax.make_array_from_callback(shape, sharding, numbers, dtype=dtype)
    # Devices copy in the background: several host arrays would be waiting at a time.
    return jax.block_until_ready(array)


def _read(
    config: LlamaConfig, tensors: Tensors, leaf: Leaf, index: list[range]
) -> np.ndarray:
    """Returns one device's part of an array; `index` is a range per axis."""
    out = np.empty([len(part) for part in index], jax.numpy.dtype(config.param_dtype))
    layers = index.pop(0) if leaf.stacked else [0]
    for place, layer in enumerate(layers):
        part = out[place] if leaf.stacked else out
        tensor = tensors[leaf.names[layer]]
        if leaf.input_axes:
            _read_matrix(part, tensor, leaf, index, config.head_width)
        elif leaf.is_table:
            _read_table(part, tensor, index)
        else:
            whole = tensor.read((slice(None),)).reshape(leaf.shape)
            part[...] = whole[tuple(slice(p.start, p.stop) for p in index)]
    return out


def _read_matrix(
    out: np.ndarray, tensor: Tensor, leaf: Leaf, index: list[range], head_width: int
) -> None:
    """Fills `out`, `[*in, *out]`, from rows and columns of an `[out, in]` tensor."""
    axes = leaf.input_axes
    columns = _flat(index[:axes], leaf.shape[:axes])
    rows = _flat(index[axes:], leaf.shape[axes:])
    flat = out.reshape(len(columns), len(rows))
    width = max(1, len(columns)) * tensor.dtype.itemsize
    # Whole heads at a time: a tensor may be one whose heads are permuted as it is read.
    step = max(1, _PIECE_BYTES // (width * head_width)) * head_width
    for start in range(0, len(rows), step):
        stop = min(start + step, len(rows))
        piece = slice(rows.start + start, rows.start + stop)
        numbers = tensor.read((piece, slice(columns.start, columns.stop)))
        flat[:, start:stop] = numbers.T


def _read_table(out: np.ndarray, tensor: Tensor, index: list[range]) -> None:
    """Fills rows of the vocabulary; those past its end are padding, zeros."""
    rows, columns = index
    width = max(1, len(columns)) * tensor.dtype.itemsize
    step = max(1, _PIECE_BYTES // width)
    end = max(rows.start, min(rows.stop, tensor.shape[0]))
    for start in range(rows.start, end, step):
        stop = min(start + step, end)
        numbers = tensor.read((slice(start, stop), slice(columns.start, columns.stop)))
        out[start - rows.start : stop - rows.start] = numbers
    out[end - rows.start :] = 0


def _flat(index: list[range], shape: tuple[int, ...]) -> range:
    """Returns the range of one axis that stands for several, the first of them cut."""
    first, *rest = index
    assert [len(part) for part in rest] == list(shape[1:]), (index, shape)
    inner = int(np.prod(shape[1:], dtype=int))
    return range(first.start * inner, first.stop * inner)
