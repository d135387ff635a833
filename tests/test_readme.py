"""Every command and every line of Python in the README runs as it is written."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FIRST = "python train.py model=tiny data=shakespeare"
README = (REPOSITORY / "README.md").read_text()
COMMANDS = [
    line.strip().split("&& ")[-1]
    for line in README.splitlines()
    if line.startswith("    python ")
]
# So that each takes seconds; sizes and lengths are not what is shown here.
SMALL = ["debug=smoke"]
UNSHOWN = [
    *("trainer.sample_tokens=0", "data.validation_fraction=0.01"),
    "model.num_hidden_layers=2",
]


def programs(name: str) -> list[str]:
    return [command for command in COMMANDS if command.startswith(f"python {name}")]


def words(command: str) -> set[str]:
    return {word for part in shlex.split(command) for word in part.split("=")}


HUB_ID = "Qwen/Qwen2.5-0.5B-Instruct"


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, monkeypatch_module):
    """A folder with what the README's reader has: programs, some text, a first run."""
    # The programs' own are short, and compile longer than they run.
    monkeypatch_module.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
    folder = tmp_path_factory.mktemp("readme")
    cached = Path(os.environ.get("RELAX_DATA_DIR", "")) / "tiktoken_cache"
    if "RELAX_DATA_DIR" in os.environ and cached.is_dir():
        # A copy: tiktoken deletes cached files that it finds damaged.
        copy = shutil.copytree(cached, tmp_path_factory.mktemp("cache") / "tiktoken")
        monkeypatch_module.setenv("TIKTOKEN_CACHE_DIR", str(copy))
    for name in ("train.py", "infer.py", "conf"):
        (folder / name).symlink_to(REPOSITORY / name)
    (folder / "prompts.txt").write_text("ROMEO:\nJULIET:\n")
    records = [{"id": n, "prompt": f"{name}:"} for n, name in enumerate("ABCDE")]
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (folder / "prompts.jsonl").write_text(lines)
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "I."},
    ]
    chats = f"{json.dumps({'messages': turns})}\n" * 40
    (folder / "chats.jsonl").write_text(chats)
    question = {"prompt": "1+1=", "answer": "2"}
    (folder / "questions.jsonl").write_text(f"{json.dumps(question)}\n" * 40)
    (folder / "my_rewards.py").write_text("def polite(sample):\n    return 1.0\n")
    pair = {"input": [[1, 0], [0, 2]], "output": [[2, 0], [0, 1]]}
    (folder / "arc_tasks").mkdir()
    (folder / "arc_tasks" / "0a1b2c3d.json").write_text(
        json.dumps({"train": [pair], "test": [pair]})
    )
    (folder / "notes").mkdir()
    (folder / "notes" / "one.txt").write_text("What is written, is written.\n" * 99)
    run(FIRST, folder, [*SMALL, *UNSHOWN])
    shutil.copytree(folder, folder / "of_one_run", symlinks=True)
    return folder


def run(command: str, folder: Path, extra: list[str], typed: str = "") -> str:
    arguments = [sys.executable, *shlex.split(command)[1:], *extra]
    result = subprocess.run(
        arguments, cwd=folder, capture_output=True, text=True, input=typed
    )
    assert result.returncode == 0, f"{command}\n{result.stderr}"
    return result.stdout


def test_the_readme_shows_its_commands():
    assert len(programs("train.py")) >= 9
    assert len(programs("infer.py")) >= 10
    installs = [c for c in README.splitlines() if "pip install -e" in c]
    assert len(installs) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        command
        for command in programs("train.py")
        # Those of both trainers run as they are written, in test_rl_programs.
        if not re.search("resume|--cfg|-m trainer=", command)
    ],
)
def test_a_training_command(workplace, command):
    if "tiktoken" in command and "TIKTOKEN_CACHE_DIR" not in os.environ:
        pytest.skip("neither RELAX_DATA_DIR nor TIKTOKEN_CACHE_DIR is set")
    extra = [] if "debug=smoke" in command else [*SMALL]
    if not re.search("trainer=|experiment=arithmetic", command):
        extra += UNSHOWN
    if "data.inspect=true" in command:
        assert "26 tokens, 4 in the loss" in run(command, workplace, extra)
        return
    if command != FIRST:  # has run
        run(command, workplace, extra)
    runs = list((workplace / "runs").glob("*/*/metrics.jsonl"))
    assert runs
    if "-m" in command.split():
        assert len({folder.parent for folder in runs}) >= 4


@pytest.mark.slow
def test_the_resume_commands(workplace):
    workplace = workplace / "of_one_run"
    for steps, command in enumerate(c for c in programs("train.py") if "resume" in c):
        extra = [f"trainer.num_steps={3 + steps}", "trainer.eval_every=0"]
        run(re.sub(r"trainer.num_steps=\d+", "", command), workplace, extra)
        metrics = workplace.glob("runs/*/*/metrics.jsonl")
        newest = max(metrics, key=lambda path: path.stat().st_mtime)
        assert json.loads(newest.read_text().splitlines()[-1])["step"] == 3 + steps


@pytest.mark.slow
def test_the_composing_command(workplace):
    [command] = [c for c in programs("train.py") if "--cfg" in c]
    assert "num_hidden_layers: 4" in run(command, workplace, [])


SHORT = "sampling.max_new_tokens=8"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in programs("infer.py") if not {"my_model", HUB_ID} & words(c)]
)
def test_a_sampling_command(workplace, command):
    extra = [] if "max_new_tokens" in command else [SHORT]
    printed = run(command, workplace, extra)
    if "task=batch" in command:
        lines = (workplace / "batch.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == [0, 1, 2, 3, 4]
    elif "task=arc" in command:
        submission = json.loads((workplace / "arc_answers/submission.json").read_text())
        assert list(submission) == ["0a1b2c3d"]
    elif "output_path" in command:
        assert len((workplace / "out.jsonl").read_text().splitlines()) == 8
    else:
        assert printed.startswith(("ROMEO:", "JULIET:"))


@pytest.mark.slow
def test_the_commands_for_released_models(workplace, monkeypatch, tmp_path):
    """The hub's model is the exported one, where the hub's cache would have it."""
    of_folder = [c for c in programs("infer.py") if "my_model" in words(c)]
    export, chat, score, score_files = of_folder
    run(export, workplace, [])
    assert run(chat, workplace, [SHORT], "Who is there?\n").endswith("\n")
    [line] = run(score, workplace, []).splitlines()
    assert len(json.loads(line)["logprobs"]) == len("To be or not to be")
    run(score_files, workplace, [])
    assert len((workplace / "scores.jsonl").read_text().splitlines()) == 1

    repository = tmp_path / f"models--{HUB_ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(workplace / "my_model", repository / "snapshots" / ("0" * 40))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chat, complete = [c for c in programs("infer.py") if HUB_ID in words(c)]
    assert run(chat, workplace, [SHORT], "Who is there?\n").endswith("\n")
    assert run(complete, workplace, [SHORT]).startswith("JULIET:")


@pytest.mark.slow
def test_the_notebook_code(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    [code] = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["completion"].token_ids) == 40
    assert len(names["score"].logprobs) == len("To be, or not to be")
    assert names["logits"].shape == (1, 5, 257)
    assert capsys.readouterr().out
    assert names["seen"]["attn.pattern"].shape == (2, 1, 4, 3, 3)
    assert names["again"].config.vocab_size == 259
    assert names["reply"].finish_reason in ("stop", "length")
