"""Meta's original checkpoints: params.json and tensor-parallel consolidated.*.pth.

Their rotary weights turn neighbouring pairs of a head; ours, like Hugging Face's, turn
its two halves, so the rows of `wq` and `wk` are put in another order as they are read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from relax.checkpoints.hf_config import Json
from relax.checkpoints.tensors import Tensor, Tensors, open_torch

PARAMS = "params.json"
_SPLIT_ROWS = (".wq", ".wk", ".wv", ".w1", ".w3", "output")
_SPLIT_COLUMNS = (".wo", ".w2")
_SIZES = ("dim", "n_layers", "n_heads", "multiple_of")
_ELSEWHERE = ("moe_args", "vision_chunk_size", "quantization_args", "quantizer")


def open_meta(folder: Path, params: Mapping[str, Any]) -> tuple[Json, Tensors]:
    """Returns the config.json that `params` amount to, and the joined tensors.

    Raises FileNotFoundError where a shard is missing, ValueError where the shards don't
    fit together or the model is of another kind.
    """
    paths = sorted(folder.glob("consolidated.*.pth"))
    expected = [folder / f"consolidated.{i:02d}.pth" for i in range(len(paths))]
    if not paths or paths != expected:
        missing = next(p for p in [*expected, "consolidated.00.pth"] if p not in paths)
        raise FileNotFoundError(f"{folder} lacks {Path(missing).name}")
    if odd := [name for name in _ELSEWHERE if params.get(name)]:
        raise ValueError(
            f"{folder / PARAMS}: {odd[0]}={params[odd[0]]} is not supported: the "
            "model must be a plain Llama"
        )
    for name in _SIZES:
        if not isinstance(size := params.get(name, 1), int) or size < 1:
            raise ValueError(
                f"{folder / PARAMS}: {name}={size!r} must be a whole number above 0"
            )
    try:
        shards = [open_torch(path) for path in paths]
        tensors = {
            name: _joined(name, [shard[name] for shard in shards], params)
            for name in shards[0]
        }
        tied = _is_tied(tensors)
        if tied:
            tensors.pop("output.weight", None)
        rows = tensors["tok_embeddings.weight"].shape[0]
        return _config(params, rows, tied), tensors
    except KeyError as error:
        raise ValueError(f"{folder} lacks {error} in {PARAMS} or a shard") from None


def _config(params: Mapping[str, Any], rows: int, tied: bool) -> Json:
    """Returns the config.json of a Llama; the context is what each release has."""
    theta, scaled = params.get("rope_theta", 1e4), params.get("use_scaled_rope", False)
    vocab_size = params.get("vocab_size", -1)
    rope = {
        "rope_type": "llama3",
        # Not in every file: Llama 3.2, whose tables are tied, stretches by 32.
        "factor": params.get("rope_scaling_factor") or (32.0 if tied else 8.0),
        "low_freq_factor": 1.0,
        "high_freq_factor": params.get("rope_high_freq_factor") or 4.0,
        "original_max_position_embeddings": 8192,
    }
    context = 131072 if scaled else 8192 if theta > 1e4 else 4096
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size if vocab_size > 0 else rows,
        "hidden_size": params["dim"],
        "intermediate_size": _intermediate_size(params),
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": _kv_heads(params),
        "rms_norm_eps": params["norm_eps"],
        "max_position_embeddings": params.get("max_seq_len") or context,
        "tie_word_embeddings": tied,
        "rope_theta": theta,
        "rope_scaling": rope if scaled else None,
    }


def _intermediate_size(params: Mapping[str, Any]) -> int:
    """Returns the feed-forward width as Meta's model.py computes it."""
    width = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        width = int(params["ffn_dim_multiplier"] * width)
    multiple = params["multiple_of"]
    return multiple * -(-width // multiple)


def _is_tied(tensors: Tensors) -> bool:
    """Whether the output layer is absent, or the embedding once more."""
    if "output.weight" not in tensors:
        return True
    tables = tensors["tok_embeddings.weight"], tensors["output.weight"]
    if tables[0].shape != tables[1].shape:
        return False
    for start in range(0, tables[0].shape[0], 4096):
        rows = (slice(start, start + 4096), slice(None))
        if not np.array_equal(*(table.read(rows) for table in tables)):
            return False
    return True


def _kv_heads(params: Mapping[str, Any]) -> int:
    return params.get("n_kv_heads") or params["n_heads"]


def _joined(name: str, parts: list[Tensor], params: Mapping[str, Any]) -> Tensor:
    """Returns one tensor of all shards' parts, its heads in our order."""
    module, width = name.removesuffix(".weight"), params["dim"] // params["n_heads"]
    if module.endswith((".wk", ".wv")):
        # With more shards than key/value heads, neighbours hold the same head.
        rows = len(parts) * parts[0].shape[0]
        parts = parts[:: max(1, rows // (_kv_heads(params) * width))]
    if module.endswith(_SPLIT_COLUMNS):
        tensor = _concatenated(parts, axis=1)
    elif module.endswith(_SPLIT_ROWS):
        tensor = _concatenated(parts, axis=0)
    elif module == "tok_embeddings":  # Llama 3 splits the vocabulary, 2 the width
        tensor = _concatenated(parts, axis=int(parts[0].shape[1] != params["dim"]))
    else:
        tensor = parts[0]  # norms are the same in every shard
    return _half_rotated(tensor, width) if module.endswith((".wq", ".wk")) else tensor


def _concatenated(parts: list[Tensor], axis: int) -> Tensor:
    sizes = [part.shape[axis] for part in parts]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    shape = list(parts[0].shape)
    shape[axis] = int(starts[-1])

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        begin, end, _ = slices[axis].indices(shape[axis])
        pieces = []
        for part, start, stop in zip(parts, starts[:-1], starts[1:], strict=True):
            low, high = max(begin, start), min(end, stop)
            if low < high:
                inner = list(slices)
                inner[axis] = slice(int(low - start), int(high - start))
                pieces.append(part.read(tuple(inner)))
        return np.concatenate(pieces, axis=axis)

    return parts[0]._replace(shape=tuple(shape), read=read)


def _half_rotated(tensor: Tensor, width: int) -> Tensor:
    """Returns the tensor with each head's even rows first; read in whole heads."""

    def read(slices: tuple[slice, ...]) -> np.ndarray:
        piece = tensor.read(slices)
        rows, columns = piece.shape
        pairs = piece.reshape(rows // width, width // 2, 2, columns)
        return pairs.swapaxes(1, 2).reshape(rows, columns)

    return tensor._replace(read=read)
