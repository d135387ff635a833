"""What a user's mistake shows: one line that names the config path, and no run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
# What a program says of its progress before it meets the mistake.
PROGRESS = ("data: ", "attention implementation: ", "read ")


def fails(program: str, *arguments: str) -> list[str]:
    """Returns the lines on stderr, progress left out, of a program that must fail."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
    ran = subprocess.run(
        [sys.executable, program, *arguments],
        cwd=REPOSITORY,
        env={**bare, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1, ran.stderr
    assert ran.stdout == ""
    assert "Traceback" not in ran.stderr
    lines = [line for line in ran.stderr.splitlines() if line]
    return [line for line in lines if not line.startswith(PROGRESS)]


@pytest.fixture
def train(tmp_path):
    """A callable: what `python train.py` with a short text and more options shows.

    It also makes sure that no run is left.
    """
    (tmp_path / "short.txt").write_text("To be, or not to be, that is the question.\n")

    def run(*arguments: str) -> list[str]:
        given = {argument.split("=")[0] for argument in arguments}
        defaults = {
            "data": "text",
            "data.path": str(tmp_path / "short.txt"),
            "data.cache_dir": str(tmp_path / "cache"),
            "runtime.cache_dir": "''",
            "run_folder": str(tmp_path / "run"),
        }
        rest = [f"{k}={v}" for k, v in defaults.items() if k not in given]
        lines = fails("train.py", *arguments, *rest)
        assert not (tmp_path / "run").exists()
        return lines

    return run


def test_a_misspelt_key_on_the_command_line(train):
    """Hydra's own words: several lines."""
    lines = train("trainer.num_step=3")
    assert lines[0] == "Could not override 'trainer.num_step'."


def test_an_unknown_option_of_a_group(train):
    lines = train("trainer=nonsense")
    assert "Could not find 'trainer/nonsense'" in lines[0]
    assert "\tpretrain" in lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "trainer:\n  num_stepz: 3\n",
            "trainer.num_stepz is no key of the config; did you mean num_steps?",
        ),
        ("sed: 3\n", "sed is no key of the config; did you mean seed?"),
    ],
)
def test_a_misspelt_key_inside_an_experiment(train, tmp_path, text, expected):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "typo.yaml").write_text(f"# @package _global_\n{text}")
    lines = train(f"--config-dir={folder.parent}", "experiment=typo")
    assert lines == [expected]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trainer.num_steps=many"], r"trainer\.num_steps: Value 'many' .* Integer"),
        (["run_folder=null"], r"run_folder: .*None.*"),
        (["data.path=nowhere.txt"], r"data\.path=nowhere\.txt names no file; set .*"),
        (
            ["tokenizer=tiktoken", "tokenizer.encoding=gpt17"],
            r"tokenizer\.encoding='gpt17' is unknown; choose one of .*gpt2.*",
        ),
        (
            ["trainer.context=64"],
            r"trainer\.context=64 needs at least 65 tokens, .* has \d+; lower .*",
        ),
        (
            ["model.max_position_embeddings=32", "trainer.context=33"],
            r"trainer\.context=33 is longer than model\.max_position_embeddings=32; .*",
        ),
        (
            ["trainer.num_steps=50", "trainer.context=8"],
            r"optimizer\.warmup_steps=50 must be less than trainer\.num_steps=50",
        ),
        (
            ["mesh=fsdp", "runtime.host_devices=3"],
            r"trainer\.batch_size / trainer\.accumulation=8 must be a multiple of "
            r"mesh\.data x mesh\.fsdp = 3",
        ),
        (
            ["mesh.tensor=3", "runtime.host_devices=3", "trainer.context=8"],
            r"mesh\.tensor=3 does not divide the 320 of .*; lower mesh\.tensor",
        ),
        (["mesh.data=2"], r"mesh\.data=2, .* needs 2 devices, 1 are present; .*"),
        (["resume=nowhere"], r"resume=nowhere: no complete checkpoint in .*"),
    ],
)
def test_a_value_that_cannot_work(train, arguments, expected):
    lines = train(*arguments)
    assert len(lines) == 1
    assert re.fullmatch(expected, lines[0]), lines[0]


def test_a_run_folder_with_a_file_in_its_path(train, tmp_path):
    (tmp_path / "plain").write_text("")
    wanted = tmp_path / "plain" / "run"
    (line,) = train(f"run_folder={wanted}")
    assert line.startswith(f"run_folder={wanted} can't be made (Not a directory); ")


def test_a_run_folder_that_is_a_file(train, tmp_path):
    (tmp_path / "plain").write_text("")
    (line,) = train(f"run_folder={tmp_path / 'plain'}")
    assert line == f"run_folder={tmp_path / 'plain'}: a file is in the way"


def test_an_empty_prompts_file(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n")
    (line,) = fails("infer.py", f"prompts_file={prompts}")
    assert line.startswith(f"task.prompts_file='{prompts}' holds no prompt")


def test_a_checkpoint_that_is_not_there(tmp_path):
    (line,) = fails("infer.py", f"checkpoint={tmp_path}", "prompt=ROMEO:")
    assert line.startswith(f"checkpoint={tmp_path}: no complete checkpoint in ")


def released(folder: Path, **changes) -> Path:
    """Returns a Hugging Face folder whose weights are cut off."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    return folder


@pytest.mark.parametrize("task", ["generate", "score", "export", "chat"])
def test_a_truncated_released_checkpoint(tmp_path, task):
    checkpoint = f"checkpoint={released(tmp_path)}"
    output = [f"output_path={tmp_path / 'new'}"] if task == "export" else []
    (line,) = fails("infer.py", f"task={task}", checkpoint, "prompt=a", *output)
    weights = tmp_path / "model.safetensors"
    assert line.startswith(f"{weights} is truncated or corrupt: ")
    assert not (tmp_path / "new").exists()


def test_an_unknown_architecture(tmp_path):
    folder = released(tmp_path, model_type="gpt2", architectures=["GPT2LMHeadModel"])
    (line,) = fails("infer.py", f"checkpoint={folder}", "prompt=a")
    assert line == (
        f"{folder / 'config.json'}: model_type='gpt2' with architectures="
        "'GPT2LMHeadModel' is unknown; known are llama (LlamaForCausalLM), mistral "
        "(MistralForCausalLM), qwen2 (Qwen2ForCausalLM), qwen3 (Qwen3ForCausalLM)"
    )


def test_a_dtype_that_there_is_not(tmp_path):
    (line,) = fails("infer.py", f"checkpoint={tmp_path}", "dtype=int8", "prompt=a")
    assert line.startswith("dtype='int8' is unknown; choose one of auto, float32")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["task=export"], "output_path=null: name the folder to write"),
        (["task=score"], "no text given; give one of prompt, prompts_file"),
        (["task=scor"], "In 'infer': Could not find 'task/scor'"),
    ],
)
def test_a_task_that_lacks_what_it_needs(arguments, expected):
    assert fails("infer.py", *arguments)[0].startswith(expected)
