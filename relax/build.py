"""From dataclasses to the things they describe: models, parameters, trained models."""

import logging
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from relax.checkpoints.native import RunCheckpoints, resolve_run
from relax.config import to_dataclass
from relax.language_model import LanguageModel
from relax.model.config import LlamaConfig
from relax.model.llama import make_llama
from relax.model.parameters import parameter_shapes
from relax.sharding import (
    MeshConfig,
    make_constrain,
    make_mesh,
    parameter_shardings,
    state_shardings,
)
from relax.steps import init_state
from relax.text.tokenizers import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

TOKENIZER_FOLDER = "tokenizer"


def with_vocabulary(config: LlamaConfig, tokenizer: Tokenizer) -> LlamaConfig:
    """Returns `config` with the tokenizer's vocabulary size where it names none.

    Raises ValueError where it names one too small for the tokenizer.
    """
    if config.vocab_size is None:
        return replace(config, vocab_size=tokenizer.vocab_size)
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.vocab_size} is less than the tokenizer's "
            f"{tokenizer.vocab_size}; set model.vocab_size=null"
        )
    return config


def init_train_state(config: LlamaConfig, optimizer, mesh: Mesh, seed: int):
    """Returns a fresh train state, born on its shardings."""
    key = jax.random.key(seed)
    shapes = abstract_train_state(config, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    model = make_llama(config, make_constrain(mesh))

    def init(key):
        tokens = jnp.zeros((1, 2), jnp.int32)
        return init_state(model.init(key, tokens), optimizer)

    return jax.jit(init, out_shardings=shardings)(key)


def abstract_train_state(config: LlamaConfig, optimizer, mesh: Mesh):
    """Returns shapes, dtypes and shardings of a train state, for a restore."""
    params = parameter_shapes(config)
    shardings = parameter_shardings(mesh, params)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    return _with_shardings(state, state_shardings(mesh, state, shardings))


def load(path: str | Path, mesh: MeshConfig | None = None) -> LanguageModel:
    """Returns the model of a run: `latest`, a run folder, or one of its checkpoints.

    `@best`, `@last` or `@<step>` may follow the path. Raises FileNotFoundError where
    there is no checkpoint.
    """
    folder, name = resolve_run(str(path))
    with RunCheckpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.step_named(name)
        logger.info("checkpoint: step %d (%s) of %s", step, name, folder)
        config = to_dataclass(LlamaConfig, checkpoints.info(step)["model"], "model")
        devices = make_mesh(mesh or MeshConfig(data=1, fsdp=1, tensor=1))
        shapes = parameter_shapes(config)
        placed = _with_shardings(shapes, parameter_shardings(devices, shapes))
        params = checkpoints.restore_params(step, placed)
    tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
    return LanguageModel(config, params, tokenizer, devices)


def checkpoint_info(config: LlamaConfig) -> dict:
    """Returns what a checkpoint keeps beside its arrays, so that it loads alone."""
    return {"model": asdict(config)}


def _with_shardings(shapes, shardings):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        shapes,
        shardings,
    )
