"""Released checkpoints: a Hugging Face folder, a hub id, or Meta's original folder."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relax.checkpoints.hf_config import Json, read_config
from relax.checkpoints.hf_import import load_params
from relax.checkpoints.hub import fetch, split_hub_id
from relax.checkpoints.meta import PARAMS, open_meta
from relax.checkpoints.names import leaves
from relax.checkpoints.tensors import Tensors, open_tensors, read_json, widest_dtype
from relax.model.config import DTYPES, LlamaConfig
from relax.model.parameters import Params

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
AUTO = "auto"
RUNS = "runs"


@dataclass(frozen=True)
class Origin:
    """What a checkpoint said besides its model, kept for the next one.

    stop_ids end a text. config_json, generation_json: of the released folder that the
    model came from (None for a model trained here). name: how that folder was called.
    """

    stop_ids: tuple[int, ...] = ()
    config_json: Mapping[str, Any] | None = None
    generation_json: Mapping[str, Any] | None = None
    name: str | None = None


@dataclass(frozen=True)
class Pretrained:
    """A released checkpoint whose tensors are still in their files.

    config_json, generation_json: as they stand in the folder ({} where they don't).
    """

    folder: Path
    config: LlamaConfig
    tensors: Tensors
    source: str  # of the names: hf or meta
    config_json: Json
    generation_json: Json

    def load_params(self, shardings: Any) -> Params:
        """Returns the parameters; see `hf_import.load_params`."""
        return load_params(self.config, self.tensors, shardings, self.source)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text by config.json and generation_config.json."""
        given = (
            raw.get("eos_token_id") for raw in (self.config_json, self.generation_json)
        )
        lists = [ids if isinstance(ids, list) else [ids] for ids in given]
        return tuple(sorted({i for ids in lists for i in ids if i is not None}))


def find_pretrained(reference: str, option: str = "checkpoint") -> Path | None:
    """Returns the folder that a reference stands for, None where it is no checkpoint.

    A reference that is no path here may be a hub id, `owner/name[@revision]`, which is
    then fetched. Raises OSError, which calls the reference `option`, where that fails.
    """
    folder = Path(reference)
    if folder.exists():
        return folder if _holds_model(folder) else None
    hub_id = split_hub_id(reference)
    if hub_id is None:
        return None
    if Path(hub_id[0]).parent.name == RUNS:  # a mistyped path rather
        return None
    folder = fetch(*hub_id, option)
    if not _holds_model(folder):
        raise FileNotFoundError(
            f"{option}={reference}: the hub's repository holds neither {CONFIG} nor "
            f"{PARAMS} (a GGUF file, say, can't be read); take the original model's"
        )
    return folder


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG, PARAMS))


def check_dtype(dtype: str | None) -> None:
    """Raises ValueError for what can't be asked for; see `open_pretrained`."""
    if dtype not in (None, AUTO, *DTYPES):
        raise ValueError(
            f"dtype={dtype!r} is unknown; choose one of {', '.join((AUTO, *DTYPES))}, "
            "or null: float32 on CPU, the checkpoint's own elsewhere"
        )


def open_pretrained(folder: Path, dtype: str | None, platform: str) -> Pretrained:
    """Returns the checkpoint in a folder, checked as far as its headers go.

    dtype: of the parameters and the computation; "auto" keeps the file's; None is
    float32 on a CPU and the file's elsewhere. Raises ValueError and OSError naming the
    file at fault.
    """
    check_dtype(dtype)
    generation = folder / GENERATION_CONFIG
    generation_json = read_json(generation) if generation.is_file() else {}
    asked = "float32" if dtype in (None, AUTO) else dtype
    if (folder / CONFIG).is_file():
        path, source = folder / CONFIG, "hf"
        config_json = read_json(path)
        config = read_config(config_json, str(path), asked)  # before files are opened
        tensors = open_tensors(folder)
    else:
        path, source = folder / PARAMS, "meta"
        config_json, tensors = open_meta(folder, read_json(path))
        config = read_config(config_json, str(path), asked)
    if dtype == AUTO or (dtype is None and platform != "cpu"):
        # Of what is read: old files hold float32 buffers beside float16 weights.
        names = {name for leaf in leaves(config, source) for name in leaf.names}
        own = widest_dtype({n: t for n, t in tensors.items() if n in names})
        config = replace(config, param_dtype=own, compute_dtype=own)
    return Pretrained(folder, config, tensors, source, config_json, generation_json)
