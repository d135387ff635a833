"""conf/: every file of every group composes, and becomes its dataclass."""

import os
import re
import shlex
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from relax.config import to_dataclass, to_values
from relax.inference import TASKS
from relax.model.llama import make_llama
from relax.model.parameters import parameter_shapes
from relax.runtime import RuntimeConfig
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig
from relax.training import TrainingConfigs, typed

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
HERE = Path(__file__).parent
OPTIONS = [
    (file.parent.name, file.stem)
    for file in sorted(CONF.glob("*/*.yaml"))
    if not file.stem.startswith("_")
]
MODELS = [name for group, name in OPTIONS if group == "model"]
EXPERIMENTS = [name for group, name in OPTIONS if group == "experiment"]
# Groups of infer.yaml alone, and those of both programs.
INFERENCE_ONLY = ("task",)
SHARED = ("sampling", "mesh", "runtime")
# Options that leave a value to the command line.
OPEN = {
    ("data", "text"): "data.path=corpus.txt",
    ("data", "arithmetic"): "trainer=sft",
    ("data", "countdown"): "trainer=grpo",
    ("data", "conversations"): "trainer=sft data.path=chats.jsonl",
    ("data", "gsm8k"): "trainer=grpo",
    ("data", "prompts"): "trainer=grpo data.path=prompts.jsonl",
    ("tokenizer", "sentencepiece"): "tokenizer.path=tokenizer.model",
    ("tokenizer", "huggingface"): "tokenizer.path=tokenizer.json",
    ("task", "score"): "prompt=text",
    ("task", "export"): "output_path=folder",
    ("task", "arc"): "task.path=tasks output_path=folder",
    ("task", "batch"): "input_path=in.jsonl output_path=out.jsonl",
}


def composed(program: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(program, overrides=list(overrides))


def training(*overrides: str) -> TrainingConfigs:
    """Returns the typed config of `python train.py <overrides>`.

    The name and the folder of a run come from Hydra's own state, which there is in the
    program alone.
    """
    config = composed("train", *overrides, "run_folder=runs/test")
    if "hydra:" in OmegaConf.to_container(config)["name"]:
        config.name = "test"
    return typed(to_values(config))


def inference(*overrides: str) -> dict:
    """Returns the dataclasses of `python infer.py <overrides>`, by group."""
    values = to_values(composed("infer", *overrides))
    classes = {"sampling": SamplingConfig, "mesh": MeshConfig, "runtime": RuntimeConfig}
    classes["task"] = TASKS[values["task"]["kind"]][0]
    return {
        group: to_dataclass(cls, values[group], group) for group, cls in classes.items()
    }


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_becomes_its_dataclass(group, name):
    overrides = [f"{group}={name}", *OPEN.get((group, name), "").split()]
    configs = inference if group in INFERENCE_ONLY else training
    assert configs(*overrides)


@pytest.mark.parametrize(
    ("option", "path"),
    [("data=text", "data.path"), ("tokenizer=sentencepiece", "tokenizer.path")],
)
def test_a_value_left_to_the_command_line_is_asked_for(option, path):
    with pytest.raises(ValueError, match=rf"^{re.escape(path)}"):
        training(option)


@pytest.mark.parametrize(
    ("group", "name"), [option for option in OPTIONS if option[0] in SHARED]
)
def test_both_programs_take_the_same_options(group, name):
    override = f"{group}={name}"
    assert inference(override)[group] == getattr(training(override), group)


def test_sampling_s_defaults_are_those_of_its_file():
    assert training().sampling == SamplingConfig()


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_shapes(name):
    """The forward pass too, traced and not computed."""
    config = training(f"model={name}").model
    config = replace(config, vocab_size=config.vocab_size or 257)
    params = parameter_shapes(config)
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    out = jax.eval_shape(make_llama(config).apply, params, tokens)
    assert out.hidden.shape == (2, 5, config.hidden_size)
    assert out.hidden.dtype == config.compute_dtype
    assert out.unembedding.shape == (config.padded_vocab_size, config.hidden_size)


def heading(name: str) -> dict[str, str]:
    """Returns what the comment at the head of an experiment says under each word."""
    text = (CONF / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    package, *lines = text.splitlines()
    assert package == "# @package _global_"
    comment = [line[2:] for line in takewhile(lambda line: line[:1] == "#", lines)]
    parts = re.split(r"^(\w+): ", "\n".join(comment), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_says_why_and_how(name):
    assert {"Question", "Expected", "Command"} <= set(heading(name))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_s_command_composes_to_it(name):
    program, script, *overrides = shlex.split(heading(name)["Command"])
    assert (program, script) == ("python", "train.py")
    assert f"experiment={name}" in overrides
    assert training(*overrides).run.name == name


@pytest.mark.parametrize("experiment", [None, *EXPERIMENTS])
def test_smoke_makes_two_steps_of_anything(experiment):
    overrides = [f"experiment={experiment}"] if experiment else []
    trainer = training(*overrides, "debug=smoke").trainer
    assert (trainer.num_steps, trainer.batch_size, trainer.context) == (2, 8, 32)


def test_later_words_win():
    """The command line over debug, debug over the experiment, it over the groups."""
    experiment = "experiment=shakespeare_baby"
    assert training(experiment).trainer.batch_size == 64
    assert training(experiment).model.hidden_size == 384
    assert training(experiment, "debug=smoke").trainer.batch_size == 8
    both = training(experiment, "debug=smoke", "trainer.batch_size=24", "model=tiny")
    assert both.trainer.batch_size == 24
    assert both.model.hidden_size == 128


def test_a_run_is_named_after_its_trainer_and_model():
    config = OmegaConf.to_container(composed("train"))
    choices = "${hydra:runtime.choices.trainer}_${hydra:runtime.choices.model}"
    assert config["name"] == choices
    assert config["run_folder"].startswith("runs/${name}/")


@pytest.mark.parametrize("program", ["train", "infer"])
def test_a_program_composes_to_the_golden_config(program):
    """What a change of conf/ does to the whole stands in the golden file's diff."""
    golden = HERE / f"golden_{program}.yaml"
    text = OmegaConf.to_yaml(composed(program))
    if os.environ.get("RELAX_UPDATE_GOLDEN"):
        golden.write_text(text, encoding="utf-8")
    assert golden.read_text(encoding="utf-8") == text, (
        f"conf/{program}.yaml no longer composes to {golden.name}; if that is meant, "
        "RELAX_UPDATE_GOLDEN=1 pytest tests/conf/test_composition.py writes it anew"
    )
