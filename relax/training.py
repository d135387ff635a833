"""A training run, from composed config to its last checkpoint."""

import importlib.metadata
import logging
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from relax.build import (
    TOKENIZER_FOLDER,
    abstract_train_state,
    checkpoint_info,
    init_train_state,
    with_vocabulary,
)
from relax.checkpoints.native import RunCheckpoints, resolve_run
from relax.config import load_config, override, save_config, to_dataclass
from relax.data.corpora import DataConfig
from relax.model.config import LlamaConfig
from relax.model.parameters import parameter_count
from relax.optim import OptimizerConfig, make_optimizer
from relax.runtime import RuntimeConfig, configure
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig, make_mesh
from relax.text.tokenizers import TokenizerConfig, load_tokenizer, make_tokenizer
from relax.tracking.config import LoggerConfig
from relax.tracking.tracker import Tracker
from relax.trainers import pretrain
from relax.trainers.config import LoopConfig, PretrainConfig, Setup
from relax.trainers.loop import Loop

logger = logging.getLogger(__name__)

TRAINERS = {"pretrain": (PretrainConfig, pretrain.make_task)}
CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The values outside the groups.

    seed: of parameters, order of data, dropout and samples. resume: the run to go on
    with, None for a new one. run_folder: a new run's.
    """

    name: str
    seed: int
    resume: str | None
    run_folder: str

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie in [0, 2^32)")
        if not Path(self.run_folder).name:
            raise ValueError(f"run_folder={self.run_folder!r} names no new folder")


@dataclass(frozen=True)
class TrainingConfigs:
    """The typed form of a composed training config."""

    run: RunConfig
    model: LlamaConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    trainer: LoopConfig
    optimizer: OptimizerConfig
    sampling: SamplingConfig
    mesh: MeshConfig
    logger: LoggerConfig
    runtime: RuntimeConfig


_GROUPS = {
    "model": LlamaConfig,
    "data": DataConfig,
    "tokenizer": TokenizerConfig,
    "optimizer": OptimizerConfig,
    "sampling": SamplingConfig,
    "mesh": MeshConfig,
    "logger": LoggerConfig,
    "runtime": RuntimeConfig,
}


def typed(config: Mapping[str, Any]) -> TrainingConfigs:
    """Returns the composed config as dataclasses; raises ValueError naming the path."""
    for name in ("trainer", *_GROUPS):
        if not isinstance(config.get(name), Mapping):
            raise ValueError(f"{name} is missing; choose a file of conf/{name}")
    kind = config["trainer"].get("kind")
    if kind not in TRAINERS:
        raise ValueError(
            f"trainer.kind={kind!r} is unknown; choose one of {', '.join(TRAINERS)}"
        )
    classes = {**_GROUPS, "trainer": TRAINERS[kind][0]}
    values = {name: value for name, value in config.items() if name not in classes}
    groups = {
        name: to_dataclass(group, config[name], name) for name, group in classes.items()
    }
    return TrainingConfigs(run=to_dataclass(RunConfig, values, ""), **groups)


def start(config: Mapping[str, Any]) -> None:
    """Trains a new run as the composed config says.

    Raises ValueError or OSError, in one line, before anything expensive where the
    config can't work; and what `Loop.run` raises.
    """
    configs = typed(config)
    configure(configs.runtime)
    folder = make_run_folder(Path(configs.run.run_folder))
    try:
        _write_provenance(config, folder)
        setup = _setup(configs, make_tokenizer(configs.tokenizer))
        setup.tokenizer.save(folder / TOKENIZER_FOLDER)
        task = TRAINERS[configs.trainer.kind][1](setup)
        optimizer = make_optimizer(configs.optimizer, configs.trainer.num_steps)
        state = init_train_state(setup.model, optimizer, setup.mesh, setup.seed)
    except BaseException:
        shutil.rmtree(folder)  # nothing but what was just written
        raise
    _train(configs, config, setup, task, folder, state)


def resume(reference: str, changes: Mapping[str, Any]) -> None:
    """Goes on with a run from its last checkpoint, exactly where it was.

    `reference` is a run folder or `latest`, and may name a step; `changes` replace the
    run's own values, by dotted path. Raises FileNotFoundError where there is no
    checkpoint, and ValueError, the run left as it was, where it can't go on.
    """
    folder, name = resolve_run(reference, option="resume")
    if "run_folder" in changes:
        raise ValueError(
            f"run_folder={changes['run_folder']}: a resumed run goes on in its own "
            f"folder, {folder}; resume a copy of it to keep the original"
        )
    if fixed := [path for path in changes if path.startswith("tokenizer.")]:
        raise ValueError(
            f"{fixed[0]}={changes[fixed[0]]}: a resumed run keeps its tokenizer; start "
            "a new run for another"
        )
    config = override(load_config(folder / CONFIG_FILE), changes)
    configs = typed(config)
    configure(configs.runtime)
    setup = _setup(configs, load_tokenizer(folder / TOKENIZER_FOLDER))
    task = TRAINERS[configs.trainer.kind][1](setup)
    optimizer = make_optimizer(configs.optimizer, configs.trainer.num_steps)
    with RunCheckpoints(folder, keep_last=configs.trainer.keep_last) as checkpoints:
        # The best step is what `resolve_run` says where the reference names none.
        named = name != "best" or reference.endswith("@best")
        step = checkpoints.step_named(name if named else "last")
        if step >= configs.trainer.num_steps:
            raise ValueError(
                f"{folder} is at step {step}, trainer.num_steps="
                f"{configs.trainer.num_steps}: nothing is left; raise "
                "trainer.num_steps to go on"
            )
        abstract = abstract_train_state(setup.model, optimizer, setup.mesh)
        state = checkpoints.restore(step, abstract)
        checkpoints.delete_after(step)
    if changes:
        save_config(config, folder / CONFIG_FILE)
    _train(configs, config, setup, task, folder, state)


def _setup(configs: TrainingConfigs, tokenizer) -> Setup:
    return Setup(
        trainer=configs.trainer,
        model=with_vocabulary(configs.model, tokenizer),
        optimizer=configs.optimizer,
        sampling=configs.sampling,
        data=configs.data,
        tokenizer=tokenizer,
        mesh=make_mesh(configs.mesh),
        seed=configs.run.seed,
    )


def _train(configs, config, setup: Setup, task, folder: Path, state) -> None:
    step, total = int(state.step), configs.trainer.num_steps
    with (
        RunCheckpoints(folder, keep_last=configs.trainer.keep_last) as checkpoints,
        Tracker(
            folder, config, configs.logger, configs.run.name, total, start_step=step
        ) as tracker,
    ):
        tracker.message(
            f"{parameter_count(setup.model):,} parameters on {setup.mesh.size} "
            f"{jax.default_backend()} device(s), steps {step} to {total}, in {folder}"
        )
        info = checkpoint_info(setup.model)
        Loop(configs.trainer, task, setup.mesh, checkpoints, tracker, folder, info).run(
            state
        )
        tracker.message(f"done: python infer.py checkpoint={folder}")


def make_run_folder(wanted: Path) -> Path:
    """Returns a new folder named `wanted`, or with -1, -2 ... where others took it.

    Raises OSError naming `run_folder` where it can't be made.
    """
    for suffix in ("", *(f"-{index}" for index in range(1, 1000))):
        folder = wanted.with_name(wanted.name + suffix)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise OSError(f"run_folder={wanted}: a file is in the way") from None
            continue
        except OSError as error:
            raise OSError(
                f"run_folder={wanted} can't be made ({error.strerror}); set run_folder "
                "to a folder that you may write to"
            ) from None
        return folder
    raise OSError(f"run_folder={wanted} and 999 after it exist; set another run_folder")


def _write_provenance(config, folder: Path) -> None:
    """Keeps the resolved config, the code's revision and the libraries' versions."""
    save_config(config, folder / CONFIG_FILE)
    libraries = ("jax", "dm-haiku", "optax", "orbax-checkpoint", "grain")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    save_config({**_revision(), **versions}, folder / "versions.yaml")


def _revision() -> dict[str, Any]:
    """Returns the code's git revision and whether it was changed, if there is git."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    if shutil.which("git") is None:
        return {"revision": None, "changed": None}
    return {
        "revision": git("rev-parse", "HEAD") or None,
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
    }
