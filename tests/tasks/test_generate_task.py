import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from relax.generation.requests import Completion, GenerationStats
from relax.sampling import SamplingConfig
from relax.tasks.generate import GenerateConfig, check, read_prompts, run


class Echo:
    """A model that answers a prompt by its number of characters."""

    def __init__(self):
        self.calls = []
        self.stats = GenerationStats()

    def generate(self, prompts, sampling, batch_size):
        self.calls.append((list(prompts), batch_size))
        return [
            Completion(f" {len(prompt)}.{sample}", [7, 11], [-0.5, -1.5], [-0.25, 0.0])
            for prompt in prompts
            for sample in range(sampling.num_return_sequences)
        ]

    def stream(self, prompt, sampling):
        yield from (" str", "eam", "ed")


@pytest.fixture
def config():
    return GenerateConfig(
        kind="generate",
        prompt=None,
        default_prompt="ROMEO:",
        prompts_file=None,
        output_path=None,
        batch_size=5,
    )


@pytest.fixture
def prompts_file(tmp_path, config):
    """A callable: the config of a file of prompts with the given name and bytes."""

    def write(name: str, data: bytes) -> GenerateConfig:
        path = tmp_path / name
        path.write_bytes(data)
        return replace(config, prompts_file=str(path))

    return write


def shown(config, sampling=None):
    terminal = io.StringIO()
    run(config, Echo(), sampling or SamplingConfig(), terminal)
    return terminal.getvalue()


def written(path: Path) -> list[dict]:
    lines = path.read_text("utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def test_one_prompt_is_streamed_to_the_terminal(config):
    assert shown(config) == "ROMEO: streamed\n"
    assert shown(replace(config, prompt="JULIET:")) == "JULIET: streamed\n"


def test_many_completions_are_shown_one_under_the_other(config):
    rule = "-" * 40
    assert shown(config, SamplingConfig(num_return_sequences=2)) == (
        f"ROMEO: 6.0\n{rule}\nROMEO: 6.1\n{rule}\n"
    )


def test_lines_of_a_text_file_are_prompts(prompts_file):
    data = "first\r\n\n  \n second \u2028é\nthird".encode()
    config = prompts_file("prompts.txt", data)
    assert read_prompts(config) == ["first", " second \u2028é", "third"]


def test_jsonl_prompts_may_hold_any_character(prompts_file):
    prompts = ["a\nb", "a\u2028b\u0085c\x0bd", "\ud800"]
    lines = [json.dumps({"prompt": p, "id": 3}, ensure_ascii=False) for p in prompts]
    lines[2] = '{"prompt": "\\ud800"}'
    config = prompts_file("prompts.jsonl", "\n\n".join(lines).encode())
    assert read_prompts(config) == prompts


def test_output_holds_a_line_for_each_completion(prompts_file, tmp_path):
    config = prompts_file("prompts.txt", b"one\nthree\n")
    config = replace(config, output_path=str(tmp_path / "out.jsonl"))
    check(config)
    model = Echo()
    run(config, model, SamplingConfig(num_return_sequences=2))
    assert model.calls == [(["one", "three"], 5)]
    rows = written(tmp_path / "out.jsonl")
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        ("one", " 3.0"),
        ("one", " 3.1"),
        ("three", " 5.0"),
        ("three", " 5.1"),
    ]
    assert rows[2] == {
        "prompt": "three",
        "completion": " 5.0",
        "token_ids": [7, 11],
        "logprobs": [-0.5, -1.5],
        "sampled_logprobs": [-0.25, 0.0],
        "finish_reason": "length",
    }
    assert list(rows[2]) == [
        "prompt",
        "completion",
        "token_ids",
        "logprobs",
        "sampled_logprobs",
        "finish_reason",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "prompts.txt"]


def test_output_is_readable_text_and_holds_any_prompt(prompts_file, tmp_path):
    config = prompts_file(
        "prompts.jsonl", '{"prompt": "é"}\n{"prompt": "\\ud800"}'.encode()
    )
    out = tmp_path / "out.jsonl"
    run(replace(config, output_path=str(out)), Echo(), SamplingConfig())
    assert [row["prompt"] for row in written(out)] == ["é", "\ud800"]
    assert "é" in out.read_text("utf-8")


@pytest.mark.parametrize("method", ["generate", "dumps"])
def test_an_interrupted_task_leaves_nothing_behind(
    config, tmp_path, monkeypatch, method
):
    """Interrupted in the model, and between two lines of the file."""
    out = tmp_path / "out.jsonl"
    out.write_text("of an earlier run\n")
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if method == "generate" or len(calls) == 2:
            raise KeyboardInterrupt
        return "{}"

    owner = Echo if method == "generate" else json
    monkeypatch.setattr(owner, method, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(
            replace(config, output_path=str(out)),
            Echo(),
            SamplingConfig(num_return_sequences=3),
        )
    assert calls
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text() == "of an earlier run\n"


def test_two_sources_of_prompts_are_an_error(config):
    with pytest.raises(ValueError, match=r"task.prompt='a' and task.prompts_file=b"):
        replace(config, prompt="a", prompts_file="b")


def test_a_batch_holds_a_row(config):
    with pytest.raises(ValueError, match=r"task.batch_size=0 must be at least 1"):
        replace(config, batch_size=0)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"\n  \n", "task.prompts_file=.*a.txt' holds no prompt"),
        ("a.jsonl", b'{"prompt": ""}', "task.prompts_file=.* an empty one"),
        ("a.jsonl", b'\n\n{"prompt": "a"}\nb', "task.prompts_file=.*, line 4: "),
        ("a.jsonl", b'\n{"text": "a"}', 'line 2: no text under "prompt"'),
        ("a.jsonl", b'{"prompt": 7}', 'line 1: no text under "prompt"'),
        ("a.jsonl", b'["prompt"]', 'line 1: no text under "prompt"'),
        ("a.txt", b"caf\xe9", "task.prompts_file=.*a.txt is not UTF-8: "),
    ],
)
def test_prompts_that_cannot_be_read_are_named(prompts_file, name, data, message):
    with pytest.raises(ValueError, match=message):
        check(prompts_file(name, data))


def test_an_empty_prompt_is_named(config):
    with pytest.raises(ValueError, match=r"task.prompt='' holds no prompt"):
        check(replace(config, prompt=""))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts_file": "{}/no.txt"}, "task.prompts_file=.*no.txt does not exist"),
        ({"prompts_file": "{}"}, "task.prompts_file=.* does not exist"),
        ({"output_path": "{}/no/out.jsonl"}, "task.output_path=.*/no is no folder"),
        ({"output_path": "{}"}, "task.output_path=.* is a folder"),
    ],
)
def test_paths_that_cannot_work_are_named_before_the_work(
    config, tmp_path, fields, message
):
    fields = {name: value.format(tmp_path) for name, value in fields.items()}
    with pytest.raises(OSError, match=message):
        check(replace(config, **fields))
