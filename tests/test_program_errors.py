"""What a user's mistake shows: one line that names the config path, and no run."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import jax
import pytest
import yaml

from relax.config import to_dataclass
from relax.language_model import LanguageModel
from relax.model.parameters import parameter_shapes
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig, make_mesh
from relax.text.tokenizers import TokenizerConfig, make_tokenizer

REPOSITORY = Path(__file__).parents[1]
# What a program says of its progress before it meets the mistake.
PROGRESS = ("data: ", "attention implementation: ", "read ", "checkpoint: ")


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
            r"optimizer\.warmup_steps=50 must be less than trainer\.num_steps=50; .*",
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


# Many mistakes in one process, since most of what one takes is to start.
ALL_IN_ONE = """
import contextlib, io, json, runpy, sys
out, stdout = io.StringIO(), sys.stdout
sys.stdout = out
from relax import inference
from relax.generation.beam import BeamSearch
from relax.generation.run import Run

def never(name):
    def called(*arguments):
        raise AssertionError(f"{name}: too late for an error")
    return called

Run.dispatches = BeamSearch.__call__ = never("the model ran")
load, shown = inference.load, []
for loads, arguments in json.load(sys.stdin):
    inference.load = load if loads else never("the model was loaded")
    sys.argv = ["infer.py", *arguments]
    code = None
    out.seek(0), out.truncate()
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path("infer.py", run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code
    shown.append((code, out.getvalue(), err.getvalue()))
stdout.write(json.dumps(shown))
"""
LOADS = True
# Of 101 tokens, the context of the model, 1 is to be made; "{}" is a folder with it.
LONG = "a" * 101
PROMPTS = ("task=batch", "input_path={}/prompts.jsonl")
WRITTEN = "output_path={}/out.jsonl"
# Name: whether a model is needed to see it, the arguments, the line.
MISTAKES = {
    "an empty prompt": (
        *(not LOADS, ["prompt="]),
        r"task\.prompt='' holds no prompt, or an empty one; give at least one .*",
    ),
    "an empty line of prompts": (
        *(not LOADS, ["prompts_file={}/empty.jsonl"]),
        r"task\.prompts_file='.*/empty\.jsonl' holds no prompt, or an empty one; .*",
    ),
    "a prompt over the context": (
        *(LOADS, [f"prompt={LONG}"]),
        r"prompt 0 has 101 tokens; give 1 to 100 "
        r"\(model\.max_position_embeddings=101\)",
    ),
    "a prompt over the context for beams": (
        *(LOADS, [f"prompt={LONG}", "sampling=beam", WRITTEN]),
        r"prompt 0 has 101 tokens; give 1 to 100 .*",
    ),
    "a line over the context": (
        *(LOADS, ["task=batch", "input_path={}/long.jsonl", WRITTEN]),
        r"input_path=.*/long\.jsonl, line 2: its prompt has 101 tokens; give 1 to 100 "
        r"\(model\.max_position_embeddings=101\); mend them, or .*",
    ),
    "no new tokens": (
        *(not LOADS, ["sampling.max_new_tokens=0"]),
        r"sampling\.max_new_tokens=0 must be at least 1",
    ),
    "beams that are sampled": (
        *(not LOADS, ["sampling.num_beams=4"]),
        r"sampling\.num_beams=4 with sampling\.temperature=1\.0: beams are searched, "
        r"not sampled; set sampling=greedy or sampling\.temperature=0",
    ),
    "more sequences than beams": (
        *(not LOADS, ["sampling=beam", "sampling.num_return_sequences=5"]),
        r"sampling\.num_return_sequences=5 must be at most sampling\.num_beams=4, .*",
    ),
    "beams with stop strings": (
        *(LOADS, ["sampling=beam", "sampling.stop_strings=[x]", WRITTEN]),
        r"sampling\.stop_strings=.*'x'.* does not go with beams; set .*num_beams=1.*",
    ),
    "an id that the model lacks": (
        *(LOADS, ["sampling.stop_token_ids=[257]", WRITTEN]),
        r"sampling\.stop_token_ids has the id 257; .* give ids from 0 to 256",
    ),
    "a misspelt field of sampling": (
        *(not LOADS, ["+sampling.top_pp=0.9"]),
        r"sampling\.top_pp is no key of the config; did you mean top_p\?",
    ),
    "a batch without an input": (
        *(not LOADS, ["task=batch", WRITTEN]),
        r"input_path=null: task=batch needs a file, input_path=prompts\.jsonl",
    ),
    "a batch without an output": (
        *(not LOADS, [*PROMPTS]),
        r"output_path=null: task=batch needs a file, output_path=out\.jsonl",
    ),
    "a batch of a file that is not there": (
        *(not LOADS, ["task=batch", "input_path={}/none.jsonl", WRITTEN]),
        r"input_path=.*/none\.jsonl does not exist",
    ),
    "a batch written over its input": (
        *(not LOADS, [*PROMPTS, "output_path={}/prompts.jsonl"]),
        r"input_path=.* and output_path=.*: .*/prompts\.jsonl would be written over; "
        r"give another output_path",
    ),
    "a malformed line": (
        *(not LOADS, ["task=batch", "input_path={}/malformed.jsonl", WRITTEN]),
        r"input_path=.*/malformed\.jsonl, line 3: not JSON: .*; mend them, or "
        r"task\.on_error=skip leaves them out",
    ),
    "tasks of ARC without a path": (
        *(not LOADS, ["task=arc", "output_path={}/arc"]),
        r"task\.path has no value; give task\.path=\.\.\.",
    ),
    "tasks of ARC without an output": (
        *(not LOADS, ["task=arc", "task.path={}"]),
        r"output_path=null: name a folder.*",
    ),
    "layers scanned perhaps": (
        *(not LOADS, ["scan_layers=maybe"]),
        r"scan_layers='maybe' must be true or false",
    ),
}


@pytest.fixture(scope="module")
def places(make_config, tmp_path_factory) -> Path:
    """A folder with a model of bytes and files of prompts."""
    folder = tmp_path_factory.mktemp("places")
    config = make_config(vocab_size=257)
    params = jax.tree.map(
        lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), parameter_shapes(config)
    )
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes", encoding=None, path=None))
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    LanguageModel(config, params, tokenizer, mesh).save(folder / "model")
    good, long = json.dumps({"prompt": "a"}), json.dumps({"prompt": LONG})
    for name, lines in {
        "prompts": [good],
        "empty": [good, '{"prompt": ""}'],
        "malformed": [good, "", '{"prompt": "a"'],
        "long": [good, long],
    }.items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def told(script: str, cases: list):
    """Returns the JSON that a script prints of the cases, in a process of its own."""
    bare = {k: v for k, v in os.environ.items() if not k.startswith("XLA_")}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**bare, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPOSITORY)},
        input=json.dumps(cases),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def mistakes(places) -> dict[str, tuple[int | None, str, str]]:
    """By name of a mistake: the exit code, and what was on stdout and stderr."""
    fixed = [f"checkpoint={places / 'model'}@last", "runtime.cache_dir=''"]
    cases = [
        (loads, [argument.replace("{}", str(places)) for argument in arguments] + fixed)
        for loads, arguments, _ in MISTAKES.values()
    ]
    return dict(zip(MISTAKES, told(ALL_IN_ONE, cases), strict=True))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_before_the_model_runs(name, mistakes):
    code, out, err = mistakes[name]
    lines = [line for line in err.splitlines() if line]
    lines = [line for line in lines if not line.startswith(PROGRESS)]
    assert (code, out, len(lines)) == (1, "", 1), err
    assert re.fullmatch(MISTAKES[name][2], lines[0]), lines[0]


def test_mistakes_leave_no_file(mistakes, places):
    assert len(mistakes) == len(MISTAKES)
    assert sorted(path.name for path in places.iterdir()) == [
        *("empty.jsonl", "long.jsonl", "malformed.jsonl", "model", "prompts.jsonl"),
    ]


# Mistakes of trainer=grpo, in one process too.
TRAIN_ALL = """
import contextlib, io, json, runpy, sys
out, stdout = io.StringIO(), sys.stdout
sys.stdout = out
from relax import training
from relax.generation.run import Run

def never(*arguments):
    raise AssertionError("too late for an error: parameters are made, or completions")

training.init_train_state = Run.dispatches = never
shown = []
for arguments in json.load(sys.stdin):
    sys.argv = ["train.py", *arguments]
    code = None
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_path("train.py", run_name="__main__")
        except SystemExit as exit_:
            code = exit_.code
    shown.append((code, err.getvalue()))
stdout.write(json.dumps([shown, out.getvalue()]))
"""
# Name: the arguments, and the line. "{}" is a folder with files.
GRPO_MISTAKES = {
    "groups of one": (
        ["trainer.num_generations=1"],
        r"trainer\.num_generations=1 must be at least 2 with trainer\.scale_rewards="
        r"group: a group of one has no spread",
    ),
    "rows that are no whole groups": (
        ["trainer.num_generations=7"],
        r"trainer\.batch_size x trainer\.steps_per_generation = 64 must be a multiple "
        r"of trainer\.num_generations=7",
    ),
    "rows that are no whole parts": (
        ["trainer.accumulation=3"],
        r"trainer\.batch_size=64 must be a multiple of trainer\.accumulation=3",
    ),
    "beta without a reference": (
        ["trainer.beta=0.1"],
        r"trainer\.beta=0\.1 and trainer\.reference=none: a KL penalty needs a .*",
    ),
    "a reference without beta": (
        ["trainer.reference=frozen"],
        r"trainer\.beta=0\.0 and trainer\.reference=frozen: a KL penalty needs a .*",
    ),
    "the base of a model without adapters": (
        ["trainer.reference=base", "trainer.beta=0.1"],
        r"trainer\.reference=base is the model without its adapters, and "
        r"model\.lora_rank=0 has none; set trainer\.reference=frozen",
    ),
    "an unknown loss": (
        ["trainer.loss_type=ppo"],
        r"trainer\.loss_type='ppo' is unknown; choose one of grpo, bnpo, .*",
    ),
    "an unknown reward": (
        ["trainer.rewards=[exact]"],
        r"trainer\.rewards=exact is unknown; choose among exact_match, .*, or name a "
        r"function of yours as module:function",
    ),
    "a reward's module that is not there": (
        ["trainer.rewards=['nowhere:reward']"],
        r"trainer\.rewards=nowhere:reward: 'nowhere' can't be imported: "
        r"ModuleNotFoundError: .*",
    ),
    "a reward's function that is not there": (
        ["trainer.rewards=['json:reward']"],
        r"trainer\.rewards=json:reward: json has no function 'reward'",
    ),
    "weights for other rewards": (
        ["trainer.reward_weights=[1.0,2.0]"],
        r"trainer\.reward_weights=\[1\.0, 2\.0\] must have one number for each of .*",
    ),
    "an outcome that is no reward": (
        ["trainer.outcome_reward=ends"],
        r"trainer\.outcome_reward='ends' is none of trainer\.rewards=.*",
    ),
    "a time limit without processes": (
        ["trainer.reward_seconds=2.0"],
        r"trainer\.reward_seconds=2\.0 needs trainer\.reward_processes>=1 \(now 0\).*",
    ),
    "prompts longer than the context": (
        ["trainer.context=20"],
        r"prompt \d+ of the data has \d+ tokens, and with sampling\.max_new_tokens=16 "
        r"trainer\.context=20 has room for 1 to 4; raise trainer\.context, .*",
    ),
    "a context longer than the model's": (
        ["trainer.context=2048"],
        r"trainer\.context=2048 is longer than model\.max_position_embeddings=1024; .*",
    ),
    "messages without a template": (
        ["data=prompts", "data.path={}/messages.jsonl"],
        r"data\.template=null, and the model has no chat template of its own: .*",
    ),
    "prompts without answers": (
        ["data=prompts", "data.path={}/texts.jsonl", "data.answer_field=null"],
        r"trainer\.rewards has exact_match, which compares with an answer, and a "
        r"record of the data has none, but prompt; give each an answer, or choose .*",
    ),
    "a text": (
        ["data=shakespeare"],
        r"data\.kind='shakespeare' is nothing that trainer=grpo takes; choose .*",
    ),
    "rows to look at": (
        ["data.inspect=true"],
        r"data\.inspect=true shows the rows of trainer=sft; grpo has none: .*",
    ),
    "no held-out prompts": (
        ["data.validation_size=0"],
        r"trainer\.eval_prompts=64, and the data holds no validation records; .*",
    ),
    "the likeliest tokens": (
        ["sampling=greedy"],
        r"sampling\.temperature=0 makes all completions of a prompt alike; set .*",
    ),
    "beams": (["sampling=beam"], r"sampling\.temperature=0 makes all completions .*"),
    "a penalty": (
        ["sampling.repetition_penalty=1.1"],
        r"sampling\.repetition_penalty=1\.1 would bias the ratio of grpo, whose .*",
    ),
    "a constraint": (
        ["sampling.constraint=digits"],
        r"sampling\.constraint=digits would bias the ratio of grpo, whose loss .*",
    ),
    "dropout": (
        ["model.dropout=0.1"],
        r"model\.dropout=0\.1 would train another policy than the one that samples; .*",
    ),
    "dropout of adapters": (
        ["model.lora_rank=2", "model.lora_dropout=0.1"],
        r"model\.lora_dropout=0\.1 would train another policy than the one that .*",
    ),
}


@pytest.fixture(scope="module")
def grpo_mistakes(tmp_path_factory) -> dict[str, tuple[int | None, str]]:
    """By name of a mistake: the exit code, and what was on stderr."""
    folder = tmp_path_factory.mktemp("grpo")
    messages = [{"role": "user", "content": "a"}]
    for name, prompt in {"messages": messages, "texts": "a"}.items():
        row = {"prompt": prompt, "answer": "b"} if name == "messages" else {}
        lines = [json.dumps({"prompt": prompt, **row})] * 40
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    fixed = (f"run_folder={folder}/run", "runtime.cache_dir=''", "trainer.num_steps=60")
    cases = [
        ["trainer=grpo", *fixed, *(each.replace("{}", str(folder)) for each in given)]
        for given, _ in GRPO_MISTAKES.values()
    ]
    shown, out = told(TRAIN_ALL, cases)
    # Of none of them a run is left.
    assert sorted(path.name for path in folder.iterdir()) == [
        *("messages.jsonl", "texts.jsonl"),
    ]
    assert out == ""
    return dict(zip(GRPO_MISTAKES, shown, strict=True))


@pytest.mark.parametrize("name", GRPO_MISTAKES)
def test_a_mistake_of_grpo_is_told_before_anything_compiles(name, grpo_mistakes):
    code, err = grpo_mistakes[name]
    lines = [line for line in err.splitlines() if line]
    lines = [line for line in lines if not line.startswith((*PROGRESS, "rollouts: "))]
    assert (code, len(lines)) == (1, 1), err
    assert re.fullmatch(GRPO_MISTAKES[name][1], lines[0]), lines[0]


# By field: values just out of its range, or of no meaning.
INF, NAN = float("inf"), float("nan")
OUT_OF_RANGE = {
    "max_new_tokens": [0, -1],
    "temperature": [-0.1, INF, NAN],
    "top_k": [-1],
    "top_p": [-0.1, 1.1, NAN],
    "min_p": [-0.1, 1.1, NAN],
    "typical_p": [0.0, 1.1, NAN],
    "repetition_penalty": [0.0, -1.0, INF, NAN],
    "presence_penalty": [INF, -INF, NAN],
    "frequency_penalty": [INF, -INF, NAN],
    "no_repeat_ngram_size": [-1],
    "min_new_tokens": [-1, 257],
    "logit_bias": [{-1: 1.0}, {5: INF}, {5: NAN}],
    "num_return_sequences": [0, -1],
    "num_top_logprobs": [-1],
    "stop_strings": [["a", ""]],
    "stop_token_ids": [[5, -1]],
    "constraint": ["", "words", "choices", ":", "module:", ":function"],
    "choices": [["a"], [""]],
    "num_beams": [0, -1, 2],
    "length_penalty": [INF, -INF, NAN],
    "early_stopping": ["", "sometimes"],
    "speculate": [-1],
    "seed": [-1, 2**32],
    "tokens_per_dispatch": [0, -1],
}


def test_every_field_that_has_a_range_is_here():
    names = {field.name for field in fields(SamplingConfig)}
    assert set(OUT_OF_RANGE) == names - {"ignore_eos"}


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, values in OUT_OF_RANGE.items() for value in values],
    ids=str,
)
def test_a_value_out_of_its_range_is_named(name, value):
    """Through the boundary that every composed config passes."""
    path = REPOSITORY / "conf" / "sampling" / "default.yaml"
    values = yaml.safe_load(path.read_text())
    to_dataclass(SamplingConfig, values, "sampling")
    with pytest.raises(ValueError) as raised:
        to_dataclass(SamplingConfig, {**values, name: value}, "sampling")
    (line,) = str(raised.value).splitlines()
    # Of two that don't go together, either may come first.
    assert re.search(rf"\bsampling\.{name}=", line)
    assert re.search(r" must (be|map) | does not go with .*; set |; set sampling", line)
