"""A training run, from composed config to its last checkpoint."""

import contextlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax

from relax.base_model import load_base, trained_on
from relax.build import (
    TOKENIZER_FOLDER,
    abstract_train_state,
    checkpoint_info,
    init_train_state,
    train_state_from,
    with_vocabulary,
)
from relax.checkpoints.native import RunCheckpoints, resolve_run
from relax.checkpoints.pretrained import Origin
from relax.config import load_config, override, save_config, to_dataclass
from relax.data.corpora import KINDS as CORPORA
from relax.data.corpora import DataConfig
from relax.data.records import RecordsConfig
from relax.data.sources import SOURCES
from relax.language_model import LanguageModel
from relax.model.config import LlamaConfig
from relax.model.lora import NO_LORA
from relax.model.parameters import parameter_count
from relax.optim import OptimizerConfig, make_optimizer, make_schedule
from relax.resuming import check_data, check_reached, own_changes
from relax.run_folder import CONFIG_FILE, make_run_folder, write_provenance
from relax.runtime import RuntimeConfig, configure
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig, make_mesh
from relax.text.chat import ChatTemplate, ending_ids, load_template, named_template
from relax.text.tokenizers import TokenizerConfig, load_tokenizer, make_tokenizer
from relax.tracking.config import LoggerConfig
from relax.tracking.tracker import Tracker
from relax.trainers import grpo, pretrain, sft
from relax.trainers.config import LoopConfig, PretrainConfig, Setup, SFTConfig
from relax.trainers.grpo_config import GRPOConfig
from relax.trainers.loop import Loop, Task

logger = logging.getLogger(__name__)


class Trainer(NamedTuple):
    """A way of training: its config, what makes its task, and the data it takes.

    inspect: shows its data. check: raises where trainer, model and sampling don't go
    together, before anything is read. kept: the paths that a resumed run can't change.
    """

    config: type[LoopConfig]
    make_task: Callable[[Setup], Task]
    data: Mapping[str, type]
    inspect: Callable[[Setup], None] | None = None
    check: Callable[..., None] = lambda trainer, model, sampling: None
    kept: Callable[[Any], Sequence[str]] = lambda trainer: ()


# What `auto` stands for among rewards, where the data needs more than exact_match.
_REWARDS = {"countdown": "countdown", "gsm8k": "numeric_answer"}
_CORPORA = dict.fromkeys(CORPORA, DataConfig)
_RECORDS = {kind: source[0] for kind, source in SOURCES.items()}
TRAINERS = {
    "pretrain": Trainer(PretrainConfig, pretrain.make_task, _CORPORA),
    "sft": Trainer(SFTConfig, sft.make_task, _RECORDS, sft.inspect),
    "grpo": Trainer(
        GRPOConfig,
        grpo.make_task,
        _RECORDS,
        grpo.inspect,
        grpo.check_together,
        grpo.kept_on_resume,
    ),
}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The values outside the groups.

    seed: of parameters, order of data, dropout and samples. init: the checkpoint that a
    new run starts from, as `relax.load` takes it, with its tokenizer and template;
    None: from scratch. resume: the run to go on with, None for a new one. run_folder: a
    new run's.
    """

    name: str
    seed: int
    init: str | None
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
    data: DataConfig | RecordsConfig
    tokenizer: TokenizerConfig
    trainer: LoopConfig
    optimizer: OptimizerConfig
    sampling: SamplingConfig
    mesh: MeshConfig
    logger: LoggerConfig
    runtime: RuntimeConfig


_GROUPS = {
    "model": LlamaConfig,
    "tokenizer": TokenizerConfig,
    "optimizer": OptimizerConfig,
    "sampling": SamplingConfig,
    "mesh": MeshConfig,
    "logger": LoggerConfig,
    "runtime": RuntimeConfig,
}


def typed(config: Mapping[str, Any]) -> TrainingConfigs:
    """Returns the composed config as dataclasses; raises ValueError naming the path."""
    for name in ("trainer", "data", *_GROUPS):
        if not isinstance(config.get(name), Mapping):
            raise ValueError(f"{name} is missing; choose a file of conf/{name}")
    kind = config["trainer"].get("kind")
    if kind not in TRAINERS:
        raise ValueError(
            f"trainer.kind={kind!r} is unknown; choose one of {', '.join(TRAINERS)}"
        )
    trainer, data = TRAINERS[kind], config["data"].get("kind")
    if data not in trainer.data:
        raise ValueError(
            f"data.kind={data!r} is nothing that trainer={kind} takes; choose one of "
            f"{', '.join(trainer.data)}"
        )
    config = {**config, "trainer": _with_rewards(config["trainer"], data)}
    classes = {**_GROUPS, "trainer": trainer.config, "data": trainer.data[data]}
    values = {name: value for name, value in config.items() if name not in classes}
    groups = {
        name: to_dataclass(group, config[name], name) for name, group in classes.items()
    }
    return TrainingConfigs(run=to_dataclass(RunConfig, values, ""), **groups)


def _with_rewards(trainer: Mapping[str, Any], data: str) -> dict[str, Any]:
    """Returns a trainer's values with the data's own reward in the place of `auto`."""
    own, values = _REWARDS.get(data, "exact_match"), dict(trainer)
    if values.get("eval_reward") == "auto":
        values["eval_reward"] = own
    if isinstance(names := values.get("rewards"), list):
        values["rewards"] = [own if name == "auto" else name for name in names]
    return values


def start(config: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> None:
    """Trains a new run as the composed config says.

    given: those of its values that the user gave, by dotted path; where a run starts
    from a trained model they alone change what that is. Raises ValueError or OSError,
    in one line, before anything expensive where the config can't work; and what
    `Loop.run` raises.
    """
    configs = typed(config)
    configure(configs.runtime)
    make_schedule(configs.optimizer, configs.trainer.num_steps)  # checks it
    trainer = TRAINERS[configs.trainer.kind]
    trainer.check(configs.trainer, configs.model, configs.sampling)
    base = load_base(configs.run.init, configs.mesh, configs.model)
    setup, origin = _new_setup(configs, base, given or {})
    if getattr(configs.data, "inspect", False):
        trainer.inspect(setup)
        return
    folder = make_run_folder(Path(configs.run.run_folder))
    opened = contextlib.ExitStack()
    try:
        config = {**config, "model": asdict(setup.model)}
        write_provenance(config, folder)
        setup = setup._replace(folder=folder)
        setup.tokenizer.save(folder / TOKENIZER_FOLDER)
        if setup.template is not None:
            setup.template.save(folder / TOKENIZER_FOLDER)
        task = opened.enter_context(contextlib.closing(trainer.make_task(setup)))
        _check_stop_metric(configs.trainer, task)
        optimizer = make_optimizer(configs.optimizer, configs.trainer.num_steps)
        places = optimizer, setup.mesh, setup.seed, task.extra
        if base is None:
            state = init_train_state(setup.model, *places)
        else:
            state = train_state_from(setup.model, base.params, *places)
    except BaseException:
        opened.close()
        shutil.rmtree(folder)  # nothing but what was just written
        raise
    with opened:
        _train(configs, config, setup, task, origin, state)


def resume(reference: str, changes: Mapping[str, Any]) -> None:
    """Goes on with a run from its last checkpoint, exactly where it was.

    `reference` is a run folder or `latest`, and may name a step; `changes` replace the
    run's own values, by dotted path. Raises FileNotFoundError where there is no
    checkpoint, and ValueError, the run left as it was, where it can't go on.
    """
    folder, name = resolve_run(reference, option="resume")
    config = load_config(folder / CONFIG_FILE)
    changes = own_changes(changes, config, folder)
    kept = {**config, "model": NO_LORA | config["model"]}
    config = override(kept, changes)
    configs = typed(config)
    _check_kept(typed(kept), configs, folder)
    configure(configs.runtime)
    keep_last = configs.trainer.keep_last
    with contextlib.ExitStack() as opened:
        with RunCheckpoints(folder, keep_last=keep_last) as checkpoints:
            # The best step is what `resolve_run` says where the reference names none.
            named = name != "best" or reference.endswith("@best")
            step = checkpoints.step_named(name if named else "last")
            if step >= configs.trainer.num_steps:
                raise ValueError(
                    f"{folder} is at step {step}, trainer.num_steps="
                    f"{configs.trainer.num_steps}: nothing is left; raise "
                    "trainer.num_steps to go on"
                )
            info = checkpoints.info(step)
            progress = info.get("progress", {})
            check_reached(progress, configs.trainer, changes, folder)
            origin = Origin(**info.get("origin", {}))
            tokenizer = load_tokenizer(folder / TOKENIZER_FOLDER)
            template = load_template(folder / TOKENIZER_FOLDER, tokenizer)
            if template is None or "data.template" in changes:
                template = _template(configs, tokenizer, template)
            setup = _setup(configs, configs.model, tokenizer, template, origin)
            setup = setup._replace(folder=folder)
            task = TRAINERS[configs.trainer.kind].make_task(setup)
            opened.callback(task.close)
            _check_stop_metric(configs.trainer, task)
            check_data(info.get("data_key"), task, changes, folder)
            optimizer = make_optimizer(configs.optimizer, configs.trainer.num_steps)
            abstract = abstract_train_state(
                setup.model, optimizer, setup.mesh, task.extra
            )
            state = checkpoints.restore(step, abstract)
            checkpoints.delete_after(step)
        task.restore(progress)
        if changes:
            save_config(config, folder / CONFIG_FILE)
        tokens = progress.get("num_tokens", 0)
        _train(configs, config, setup, task, origin, state, tokens)


def _check_kept(old: TrainingConfigs, new: TrainingConfigs, folder: Path) -> None:
    """Raises ValueError for a change that the run's own state has no place for."""
    for path in TRAINERS[old.trainer.kind].kept(old.trainer):
        group, name = path.split(".")
        values = [getattr(getattr(configs, group), name) for configs in (old, new)]
        if values[0] != values[1]:
            raise ValueError(
                f"{path}={values[1]}: {folder} goes on with {values[0]}, which its "
                f"checkpoint depends on; start a new run with init={folder}@last"
            )


def _check_stop_metric(trainer: LoopConfig, task: Task) -> None:
    """Raises ValueError where no evaluation would give the metric to stop at."""
    name = trainer.stop_metric
    if name is not None and name not in task.evaluates:
        found = ", ".join(task.evaluates) or "nothing"
        raise ValueError(
            f"trainer.stop_metric={name} is none of what an evaluation of this run "
            f"gives: {found}"
        )


def _new_setup(
    configs: TrainingConfigs, base: LanguageModel | None, given: Mapping[str, Any]
) -> tuple[Setup, Origin]:
    """Returns the setup of a new run, from scratch or from a trained model."""
    if base is None:
        tokenizer, origin = make_tokenizer(configs.tokenizer), Origin()
        model = with_vocabulary(configs.model, tokenizer)
        template = _template(configs, tokenizer, None)
        return _setup(configs, model, tokenizer, template, origin), origin
    model = trained_on(base.config, configs.model, given, configs.run.init)
    template = _template(configs, base.tokenizer, base.chat_template)
    return _setup(configs, model, base.tokenizer, template, base.origin), base.origin


def _template(configs: TrainingConfigs, tokenizer, own: ChatTemplate | None):
    """Returns the chat template that `data.template` names, or the model's own."""
    named = getattr(configs.data, "template", None)
    return own if named is None else named_template(named, tokenizer, "data.template")


def _setup(configs: TrainingConfigs, model, tokenizer, template, origin) -> Setup:
    named = getattr(configs.data, "template", None)
    sampling = configs.sampling
    is_chat = named is not None or configs.data.kind in ("conversations", "prompts")
    if is_chat and template is not None:
        # A turn that no special token ends is ended by what the template writes.
        strings = template.end_of_turn(tokenizer)[1]
        stops = dict.fromkeys((*sampling.stop_strings, *strings))
        sampling = replace(sampling, stop_strings=tuple(stops))
    return Setup(
        trainer=configs.trainer,
        model=model,
        optimizer=configs.optimizer,
        sampling=sampling,
        data=configs.data,
        tokenizer=tokenizer,
        mesh=make_mesh(configs.mesh),
        seed=configs.run.seed,
        template=template,
        stop_ids=ending_ids(origin.stop_ids, tokenizer, template),
    )


def _train(
    configs, config, setup: Setup, task: Task, origin: Origin, state, num_tokens=0
) -> None:
    step, total, folder = int(state.step), configs.trainer.num_steps, setup.folder
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
        info = checkpoint_info(setup.model, origin) | {"data_key": task.data_key}
        places = setup.mesh, checkpoints, tracker, folder, info, num_tokens
        Loop(configs.trainer, task, *places).run(state)
        tracker.message(f"done: python infer.py checkpoint={folder}")
