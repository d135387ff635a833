"""What decides the completions of a batch, in a form that can be compared."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from relax.language_model import LanguageModel
from relax.sampling import SamplingConfig

# Numbers looked at along each axis of a parameter.
NUMBERS = 16


def model_digest(model: LanguageModel) -> str:
    """Returns a digest of a model: its config, and evenly spaced numbers of it.

    They are of every array, so that a model trained further has another digest. Where a
    checkpoint lies changes nothing.
    """
    config = {**asdict(model.config), "stop_ids": model.stop_ids}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        spaced = tuple(slice(None, None, -(-size // NUMBERS)) for size in leaf.shape)
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf[spaced]).tobytes())
    return digest.hexdigest()


def tokens_digest(rows: Sequence[Sequence[int]]) -> str:
    """Returns a digest of lists of token ids."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.asarray([len(row), *row], np.int64).tobytes())
    return digest.hexdigest()


def sampling_values(sampling: SamplingConfig) -> Mapping[str, Any]:
    """Returns the settings that decide completions, by their config paths."""
    values = asdict(sampling)
    # These change how fast a completion is made, not the completion.
    del values["tokens_per_dispatch"]
    return {f"sampling.{name}": value for name, value in values.items()}
