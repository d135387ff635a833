"""From parameters to a Hugging Face folder: safetensors and the JSON files beside."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from relax.checkpoints.hf_config import Json, write_config
from relax.checkpoints.names import Leaf, leaves
from relax.checkpoints.pretrained import CONFIG, GENERATION_CONFIG, Origin
from relax.checkpoints.progress import Progress
from relax.checkpoints.tensors import SAFETENSORS
from relax.model.config import LlamaConfig
from relax.model.parameters import Params, parameter_count

# Keys that are written anew, and that would contradict them in another form.
_REPLACED = ("rope_parameters", "dtype", "layer_types", "transformers_version")


def write_model(
    folder: Path,
    config: LlamaConfig,
    params: Params,
    config_json: Mapping[str, Any],
    generation_json: Mapping[str, Any],
    max_shard_bytes: int,
) -> None:
    """Writes config.json, generation_config.json and the weights into a folder.

    `config_json` and `generation_json` are those that the model came with: their other
    keys are kept. Raises ValueError where no released family has such a model.
    """
    own = write_config(config, config_json.get("model_type"))
    kept = {k: v for k, v in config_json.items() if k not in _REPLACED}
    write_json(folder / CONFIG, kept | own)
    write_json(folder / GENERATION_CONFIG, dict(generation_json))
    _write_weights(folder, config, params, max_shard_bytes)


def write_json(path: Path, value: Json) -> None:
    """Writes an object as indented UTF-8 JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


class NewFolder:
    """A folder that is there complete or not at all.

    Entering gives another one beside it to be filled, which takes its name at the end.
    Raises FileExistsError where the name is taken by anything but an empty folder.
    """

    def __init__(self, folder: Path, option: str) -> None:
        self._folder = folder = folder.absolute()
        self._partial = folder.with_name(f"{folder.name}.partial")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(
                f"{option}={folder} is there already; name a new folder, or delete it"
            )

    def __enter__(self) -> Path:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self._partial

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        if kind is None:
            self._partial.replace(self._folder)
        else:
            shutil.rmtree(self._partial, ignore_errors=True)


def released_json(
    origin: Origin, bos_id: int | None, stop_ids: Sequence[int]
) -> tuple[Json, Json]:
    """Returns config.json's other keys and generation_config.json.

    What the origin says stays, but for stop ids that it doesn't know.
    """
    ids: Json = {} if bos_id is None else {"bos_token_id": bos_id}
    if stops := list(stop_ids):
        ids["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    config_json = ids | dict(origin.config_json or {})
    generation_json = ids | dict(origin.generation_json or {})
    if set(stops) - set(np.atleast_1d(generation_json.get("eos_token_id", []))):
        generation_json["eos_token_id"] = ids["eos_token_id"]
    return config_json, generation_json


def _write_weights(
    folder: Path, config: LlamaConfig, params: Params, max_shard_bytes: int
) -> None:
    """Writes one file, or several and their index where one would be too large."""
    from safetensors.numpy import save_file

    shards = _plan(config, max_shard_bytes)
    weight_map, total = {}, 0
    progress = Progress("wrote", parameter_count(config))
    for number, shard in enumerate(shards, 1):
        name = SAFETENSORS
        if len(shards) > 1:
            stem = SAFETENSORS.removesuffix(".safetensors")
            name = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            theirs: host_tensor(config, params, leaf, layer)
            for theirs, leaf, layer in shard
        }
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        progress.add(sum(tensor.size for tensor in tensors.values()))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{SAFETENSORS}.index.json", index)


def _plan(
    config: LlamaConfig, max_shard_bytes: int
) -> list[list[tuple[str, Leaf, int | None]]]:
    """Returns the tensors of each file, in the order of the forward pass."""
    itemsize = jax.numpy.dtype(config.param_dtype).itemsize
    shards: list[list] = [[]]
    room = max_shard_bytes
    for theirs, leaf, layer in sorted(_tensors(config), key=_forward_order):
        size = int(np.prod(leaf.their_shape(config.vocab_size))) * itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((theirs, leaf, layer))
        room -= size
    return shards


def _tensors(config: LlamaConfig) -> Iterator[tuple[str, Leaf, int | None]]:
    for leaf in leaves(config):
        for layer, theirs in enumerate(leaf.names):
            yield theirs, leaf, layer if leaf.stacked else None


def _forward_order(entry: tuple[str, Leaf, int | None]) -> tuple[int, int, str]:
    theirs = entry[0]
    ends = {"model.embed_tokens.weight": 0, "model.norm.weight": 2, "lm_head.weight": 3}
    parts = theirs.split(".")
    layer = int(parts[2]) if parts[1] == "layers" else 0
    return ends.get(theirs, 1), layer, theirs


def host_tensor(
    config: LlamaConfig, params: Params, leaf: Leaf, layer: int | None
) -> np.ndarray:
    """Returns one tensor as the files hold it, on the host; layer: of a stacked one."""
    array = params[leaf.module][leaf.name]
    numbers = np.asarray(array if layer is None else array[layer])
    if leaf.is_table:
        return np.ascontiguousarray(numbers[: config.vocab_size])
    if leaf.input_axes:
        rows, columns = leaf.their_shape(config.vocab_size)
        return np.ascontiguousarray(numbers.reshape(columns, rows).T)
    return np.ascontiguousarray(numbers.reshape(-1))
