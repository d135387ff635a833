"""From dataclasses to the things they describe: models, parameters, trained models."""

import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from relax.checkpoints.adapter import ADAPTER_CONFIG, open_adapter
from relax.checkpoints.native import RunCheckpoints, resolve_run
from relax.checkpoints.pretrained import (
    AUTO,
    check_dtype,
    find_pretrained,
    open_pretrained,
)
from relax.config import to_dataclass
from relax.language_model import (
    TOKENIZER_FOLDER,
    LanguageModel,
    Origin,
    check_vocabulary,
)
from relax.model.config import LlamaConfig
from relax.model.llama import make_llama
from relax.model.lora import NO_LORA, with_lora
from relax.model.parameters import Params, parameter_shapes, with_layers
from relax.sharding import (
    MeshConfig,
    make_constrain,
    make_mesh,
    parameter_shardings,
    state_shardings,
)
from relax.steps import TrainState, init_state
from relax.text.chat import ChatTemplate, load_template
from relax.text.folder import load_folder_tokenizer
from relax.text.tokenizers import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

Extra = Callable[[Params], Any]


def no_extra(params: Params) -> dict[str, Any]:
    """Returns what most trainers keep besides the parameters: nothing."""
    del params
    return {}


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


def init_train_state(
    config: LlamaConfig, optimizer, mesh: Mesh, seed: int, extra: Extra = no_extra
) -> TrainState:
    """Returns a fresh train state, born on its shardings.

    extra: from the parameters to what the state keeps besides them.
    """
    model = make_llama(config, make_constrain(mesh))

    def init(key):
        params = model.init(key, jnp.zeros((1, 2), jnp.int32))
        return init_state(params, optimizer, extra(params))

    shardings = _shardings_of(config, optimizer, mesh, extra)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def train_state_from(
    config: LlamaConfig,
    params: Params,
    optimizer,
    mesh: Mesh,
    seed: int,
    extra: Extra = no_extra,
) -> TrainState:
    """Returns the train state of a trained model, whose `params` are used up.

    Adapters that `config` has and the model lacks are drawn with the seed.
    """

    def init(params):
        params = with_lora(config, params, jax.random.key(seed))
        return init_state(params, optimizer, extra(params))

    shardings = _shardings_of(config, optimizer, mesh, extra)
    return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params)


def abstract_train_state(
    config: LlamaConfig, optimizer, mesh: Mesh, extra: Extra = no_extra
) -> TrainState:
    """Returns shapes, dtypes and shardings of a train state, for a restore."""
    params = parameter_shapes(config)
    shardings = parameter_shardings(mesh, params)
    state = jax.eval_shape(lambda p: init_state(p, optimizer, extra(p)), params)
    return _with_shardings(state, state_shardings(mesh, state, shardings))


def _shardings_of(config: LlamaConfig, optimizer, mesh: Mesh, extra: Extra):
    shapes = abstract_train_state(config, optimizer, mesh, extra)
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)


def load(
    path: str | Path,
    mesh: MeshConfig | None = None,
    dtype: str | None = None,
    scan_layers: bool = False,
    adapter: str | Path | None = None,
    option: str = "checkpoint",
) -> LanguageModel:
    """Returns the model of a checkpoint, with its tokenizer and its chat template.

    path: a run (`latest`, its folder, or one of its checkpoints; `@best`, `@last` or
    `@<step>` may follow), a Hugging Face folder, Meta's original folder, or a hub id
    `owner/name[@revision]`. dtype: of parameters and computation; None is that of the
    run, and for released checkpoints float32 on CPU and the file's elsewhere; "auto"
    keeps the file's. scan_layers: True compiles many layers faster, False decodes
    faster; whichever they were saved in, they are converted here. adapter: a folder
    with a LoRA adapter in PEFT's form, for this model. option: what errors call `path`.
    Raises FileNotFoundError where there is no checkpoint, ValueError where it is
    damaged or of an unknown kind.
    """
    if adapter is not None:
        open_adapter(Path(adapter))  # its errors come before the weights are read
    devices = make_mesh(mesh or MeshConfig(data=1, fsdp=1, tensor=1))
    if (folder := find_pretrained(str(path), option)) is not None:
        model = _load_pretrained(str(path), folder, devices, dtype, scan_layers)
    else:
        model = _load_run(str(path), devices, dtype, scan_layers, option)
    if adapter is not None:
        model.load_adapter(adapter)
    return model


def _load_pretrained(
    name: str, folder: Path, mesh: Mesh, dtype: str | None, scan_layers: bool
) -> LanguageModel:
    checkpoint = open_pretrained(folder, dtype, jax.default_backend())
    config = replace(checkpoint.config, scan_layers=scan_layers)
    checkpoint = replace(checkpoint, config=config)
    # Tokenizer and template first: they are read at once, and may not fit.
    tokenizer = load_folder_tokenizer(folder)
    template = _read_template(folder, tokenizer)
    if tokenizer is not None:
        check_vocabulary(checkpoint.config, tokenizer)
    shapes = parameter_shapes(checkpoint.config)
    params = checkpoint.load_params(parameter_shardings(mesh, shapes))
    return LanguageModel(
        checkpoint.config,
        params,
        tokenizer,
        mesh,
        chat_template=template,
        origin=Origin(
            checkpoint.stop_ids,
            checkpoint.config_json,
            checkpoint.generation_json,
            name,
        ),
    )


def _load_run(
    reference: str, mesh: Mesh, dtype: str | None, scan_layers: bool, option: str
) -> LanguageModel:
    check_dtype(dtype)
    if (Path(reference) / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{option}={reference} is a LoRA adapter of a model: infer.py takes "
            f"checkpoint=<that model> adapter={reference}"
        )
    try:
        folder, name = resolve_run(reference, option=option)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} (a released model's folder holds config.json or params.json, and "
            "a hub id is owner/name)"
        ) from None
    with RunCheckpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.step_named(name)
        logger.info("checkpoint: step %d (%s) of %s", step, name, folder)
        info = checkpoints.info(step)
        config = to_dataclass(LlamaConfig, NO_LORA | info["model"], "model")
        if dtype not in (None, AUTO):
            config = replace(config, param_dtype=dtype, compute_dtype=dtype)
        shapes = parameter_shapes(config)
        placed = _with_shardings(shapes, parameter_shardings(mesh, shapes))
        params = checkpoints.restore_params(step, placed)
    config, params = with_layers(config, params, scan_layers)
    folder = folder / TOKENIZER_FOLDER
    tokenizer = load_tokenizer(folder) if folder.is_dir() else None
    template = _read_template(folder, tokenizer)
    origin = Origin(**info.get("origin", {}))
    return LanguageModel(
        config, params, tokenizer, mesh, chat_template=template, origin=origin
    )


def _read_template(folder: Path, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    """Returns a folder's chat template; None without one, or where it can't be read.

    All but chat does without it, so that what is wrong with it is only a warning.
    """
    if tokenizer is None:
        return None
    try:
        return load_template(folder, tokenizer)
    except ValueError as error:
        logger.warning("going on without the chat template: %s", error)
        return None


def checkpoint_info(config: LlamaConfig, origin: Origin) -> dict:
    """Returns what a checkpoint keeps beside its arrays, so that it loads alone."""
    return {"model": asdict(config), "origin": asdict(origin)}


def _with_shardings(shapes, shardings):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        shapes,
        shardings,
    )
