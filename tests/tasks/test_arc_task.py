import io
import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax import LanguageModel, SamplingConfig
from relax.generation.requests import Completion
from relax.model.parameters import parameter_shapes
from relax.sharding import MeshConfig, make_mesh
from relax.tasks.arc import ArcConfig, check, run
from relax.tasks.arc_files import read_tasks
from relax.tasks.arc_grids import format_grid, format_prompt
from relax.text.chat import named_template
from relax.text.tokenizers import TokenizerConfig, make_tokenizer

WRITTEN = ("completions.jsonl", "results.json", "submission.json")
# Seven tasks of one test input, but "c", which has two.
TASKS = {
    name: {
        "train": [{"input": [[i, 1]], "output": [[1, i]]}],
        "test": [
            {"input": [[i, test + 2]], "output": [[test + 2, i]]}
            for test in range(2 if name == "c" else 1)
        ],
    }
    for i, name in enumerate("abcdefg")
}


class Scripted(LanguageModel):
    """A model whose completions are a function's of the prompt's text and the request.

    They come in another order than they are asked for. asked: the requests so far;
    stop_after: completions before which it gets a signal.
    """

    answer = staticmethod(
        lambda text, request: Completion("0", [48], finish_reason="x")
    )
    stop_after = None

    def complete(self, requests, sampling, batch_size):
        self.asked = [*getattr(self, "asked", []), *requests]
        self.sampling, self.batch_size = sampling, batch_size
        order = np.random.default_rng(len(requests)).permutation(len(requests))
        for count, place in enumerate(order.tolist()):
            if count == self.stop_after:
                os.kill(os.getpid(), signal.SIGINT)
            request = requests[place]
            text = self.tokenizer.decode(request.prompt)
            answer = self.answer(text, request)
            if isinstance(answer, str):
                ids = list(answer.encode())
                answer = Completion(answer, ids, finish_reason="stop")
            yield place, answer


@pytest.fixture(scope="module")
def make_model(make_config):
    """A callable: a model of bytes; `kind` and the length of its context given."""
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes", encoding=None, path=None))
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))

    def make(kind=Scripted, context=40_000, seed=5):
        config = make_config(vocab_size=257, max_position_embeddings=context)
        rng = np.random.default_rng(seed)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(
                rng.normal(scale=0.5, size=leaf.shape), leaf.dtype
            ),
            parameter_shapes(config),
        )
        return kind(config, params, tokenizer, mesh)

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(TASKS))
    return ArcConfig(
        kind="arc",
        path=str(path),
        solutions=None,
        output_path=str(tmp_path / "out"),
        ids=(),
        limit=None,
        num_attempts=2,
        chat=False,
        template=None,
        instruction="Find the rule.",
        separator=" ",
        answer_after=None,
        pictures=False,
        batch_size=5,
    )


def solver(path):
    """An answer that is right, with what a task's prompt must be as the key."""
    right = {
        format_prompt(task.demonstrations, grid, " "): format_grid(output, " ")
        for task in read_tasks(Path(path)).values()
        for grid, output in zip(task.inputs, task.outputs, strict=True)
    }
    return lambda text, request: right[text]


def done(config, model, **sampling):
    """Runs the task; the table, and each file's content by its name."""
    terminal = io.StringIO()
    check(config)
    run(config, model, SamplingConfig(**sampling), terminal)
    folder = Path(config.output_path)
    texts = {name: (folder / name).read_text() for name in WRITTEN}
    lines = texts["completions.jsonl"].splitlines()
    return (
        terminal.getvalue(),
        [json.loads(line) for line in lines],
        json.loads(texts["results.json"]),
        json.loads(texts["submission.json"]),
    )


def bytes_of(config):
    folder = Path(config.output_path)
    return {name: (folder / name).read_bytes() for name in WRITTEN}


def test_an_oracle_solves_all_training_tasks(config, model, data_dir):
    path = str(data_dir / "arc_agi" / "training")
    model.answer = solver(path)
    table, rows, results, submitted = done(replace(config, path=path), model)
    assert results["tasks_solved"] == results["tasks_known"] == results["tasks"] == 400
    assert results["test_inputs_solved"] == results["test_inputs"] == 416
    assert results["attempts_right"] == results["attempts"] == len(rows) == 832
    assert results["pass_at_k"] == {"1": 1.0, "2": 1.0}
    assert results["attempts_without_grid"] == {} and results["over_context"] == []
    assert "400 (100.0%)" in table and "416 (100.0%)" in table
    # The expected form and grids, from the files themselves.
    assert len(submitted) == 400
    for file in Path(path).glob("*.json"):
        pairs = json.loads(file.read_text())["test"]
        assert submitted[file.stem] == [
            {"attempt_1": pair["output"], "attempt_2": pair["output"]} for pair in pairs
        ]


def test_an_answer_that_is_nearly_right_solves_no_task(config, model, data_dir):
    path = str(data_dir / "arc_agi" / "training")
    right = solver(path)

    def wrong(text, request):
        grid = right(text, request)
        last = (int(grid[-1]) + 1) % 10
        return f"{grid[:-1]}{last}"

    model.answer = wrong
    _, _, results, _ = done(replace(config, path=path), model)
    assert (results["tasks_solved"], results["tasks_known"]) == (0, 400)
    assert results["test_inputs_solved"] == results["attempts_right"] == 0
    assert results["attempts_without_grid"] == {}
    assert results["pass_at_k"] == {"1": 0.0, "2": 0.0}


def test_every_completion_is_kept_in_the_order_of_the_tasks(config, model):
    answers = iter(["3 x", "", "9 9\n9"] * 6)
    model.answer = lambda text, request: (
        Completion("5 6", [53, 32, 54], finish_reason="length")
        if request.sample_index
        else next(answers)
    )
    _, rows, results, submitted = done(config, model)
    places = [(row["task"], row["test"], row["attempt"]) for row in rows]
    assert places == [
        (name, test, attempt)
        for name in "abcdefg"
        for test in range(2 if name == "c" else 1)
        for attempt in (1, 2)
    ]
    assert rows[1] == {
        "task": "a",
        "test": 0,
        "attempt": 2,
        "prompt_tokens": len("Input:\n0 1\nOutput:\n1 0\n\nInput:\n0 2\nOutput:\n"),
        "completion": "5 6",
        "token_ids": [53, 32, 54],
        "finish_reason": "length",
        "grid": None,
        "reason": "cut off at max_new_tokens",
        "right": False,
    }
    assert {row["completion"] for row in rows[::2]} == {"3 x", "", "9 9\n9"}
    assert all(row["grid"] is None for row in rows)
    assert sum(results["attempts_without_grid"].values()) == 16
    assert submitted["a"] == [{"attempt_1": [[0, 0]] * 2, "attempt_2": [[0, 0]] * 2}]


def test_attempts_at_an_input_stand_together_and_are_named_by_the_task(config, model):
    done(replace(config, num_attempts=3), model)
    everything = {(r.input_index, r.sample_index): r.prompt for r in model.asked}
    assert [r.sample_index for r in model.asked] == [0, 1, 2] * 8
    assert len(everything) == 24 and len(set(everything.values())) == 8
    model.asked = []
    chosen = replace(config, ids=("f", "c"), output_path=f"{config.output_path}2")
    done(chosen, model)
    assert len(model.asked) == 6
    for request in model.asked:
        key = request.input_index, request.sample_index
        assert everything[key] == request.prompt
    # zlib.crc32(b"c/1"): numbers that were drawn stay those of the task.
    assert 4_128_412_732 in {r.input_index for r in model.asked}


def test_a_plain_answer_ends_at_a_blank_line(config, model):
    done(config, model, stop_strings=("Input",))
    assert model.sampling.stop_strings == ("Input", "\n\n")
    assert model.batch_size == 5


@pytest.mark.parametrize("stop_after", [0, 1, 9, 15])
def test_an_interrupted_task_goes_on_to_the_same_files(
    config, model, caplog, stop_after
):
    model.answer = solver(config.path)
    done(config, model)
    whole = bytes_of(config)
    other = replace(config, output_path=f"{config.output_path}2")
    model.asked, model.stop_after = [], stop_after
    with pytest.raises(SystemExit) as stopped, caplog.at_level(logging.WARNING):
        done(other, model)
    assert stopped.value.code == 130
    assert f"SIGINT: {stop_after} of 16 attempts are made" in caplog.text
    assert sorted(os.listdir(other.output_path)) == ["journal.jsonl"]
    model.asked, model.stop_after = [], None
    done(other, model)
    assert len(model.asked) == 16 - stop_after
    assert bytes_of(other) == whole
    model.asked = []
    done(other, model)
    assert model.asked == [] and bytes_of(other) == whole


def test_a_torn_line_of_the_journal_is_made_again(config, model):
    model.answer = solver(config.path)
    done(config, model)
    whole = bytes_of(config)
    journal = Path(config.output_path) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-7])
    model.asked = []
    done(config, model)
    assert len(model.asked) == 1 and bytes_of(config) == whole


def test_more_tasks_and_attempts_go_on_from_fewer(config, model):
    model.answer = lambda text, request: f"{request.sample_index}"
    done(replace(config, num_attempts=3), model)
    whole = bytes_of(config)
    other = replace(config, output_path=f"{config.output_path}2")
    model.asked = []
    done(replace(other, limit=3), model)
    done(other, model)
    done(replace(other, num_attempts=3), model)
    assert len(model.asked) == 24 and bytes_of(other) == whole


def test_a_folder_of_other_settings_is_not_gone_on_with(config, model, make_model):
    done(config, model)
    named = replace(config, separator="")
    with pytest.raises(
        ValueError, match=r"journal.jsonl was begun with task.separator"
    ):
        done(named, model)
    with pytest.raises(ValueError, match=r"begun with sampling.temperature=1.0"):
        done(config, model, temperature=0.5)
    with pytest.raises(ValueError, match=r"begun with the model's sha256="):
        done(config, make_model(seed=6))
    done(config, model, tokens_per_dispatch=7)
    changed = {**TASKS, "d": TASKS["e"]}
    Path(config.path).write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"task d from when it had another prompt"):
        done(config, model)


def test_settings_that_the_engine_refuses_leave_no_journal(config, model):
    def refuse(text, request):
        raise ValueError("sampling.stop_token_ids=[999]")

    model.answer = refuse
    with pytest.raises(ValueError, match="999"):
        done(config, model)
    assert os.listdir(config.output_path) == []
    model.answer = solver(config.path)
    done(config, model, seed=7)


def test_prompts_over_the_context_are_told_and_not_solved(config, make_model, caplog):
    """Prompts take 43 tokens, or 67 where there are two demonstrations."""
    long = {**TASKS["b"], "train": TASKS["b"]["train"] * 2}
    Path(config.path).write_text(json.dumps({**TASKS, "b": long}))
    model = make_model(context=43 + 7)
    model.answer = solver(config.path)
    _, rows, results, submitted = done(config, model, max_new_tokens=7)
    assert results["tasks_solved"] == 6 and results["by_task"]["b"]["solved"] is False
    assert results["over_context"] == [{"task": "b", "test": 0, "tokens": 67}]
    assert (results["context"], results["max_new_tokens"]) == (50, 7)
    assert results["attempts_without_grid"] == {"prompt over the context": 2}
    assert "task b, test 0: a prompt of 67 tokens" in caplog.text
    assert "exceed the context of 50" in caplog.text
    assert submitted["b"] == [{"attempt_1": [[0, 0]] * 2, "attempt_2": [[0, 0]] * 2}]
    row = rows[2]
    assert (row["task"], row["completion"], row["grid"]) == ("b", None, None)
    assert row["reason"] == "prompt over the context"
    assert len(rows) == 16 and len(model.asked) == 14
    model.asked = []
    none = replace(config, output_path=f"{config.output_path}2")
    _, _, results, submitted = done(none, model, max_new_tokens=8)
    assert model.asked == [] and len(results["over_context"]) == 8
    assert len(submitted) == 7 and results["tasks_solved"] == 0


def test_the_log_names_ten_prompts_over_the_context_and_counts_them(
    config, make_model, caplog
):
    tasks = {f"{i:02}": TASKS["a"] for i in range(12)}
    Path(config.path).write_text(json.dumps(tasks))
    done(config, make_model(context=40), max_new_tokens=7)
    messages = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(messages) == 11 and messages[9].startswith("task 09")
    assert messages[10].startswith("12 of 12 prompts exceed the context of 40")


def test_solutions_may_stand_in_a_file_of_their_own(config, model, tmp_path):
    asked = {
        name: {**task, "test": [{"input": pair["input"]} for pair in task["test"]]}
        for name, task in TASKS.items()
    }
    model.answer = solver(config.path)
    Path(config.path).write_text(json.dumps(asked))
    _, rows, results, _ = done(config, model)
    assert results["tasks_known"] == 0 and results["pass_at_k"] == {}
    assert results["by_task"]["a"]["solved"] is None and rows[0]["right"] is None
    solutions = tmp_path / "solutions.json"
    grids = {
        name: [pair["output"] for pair in task["test"]] for name, task in TASKS.items()
    }
    del grids["g"]
    solutions.write_text(json.dumps(grids))
    _, rows, results, _ = done(replace(config, solutions=str(solutions)), model)
    assert (results["tasks_known"], results["tasks_solved"]) == (6, 6)
    assert rows[0]["right"] is True and rows[-1]["right"] is None


def test_a_chat_asks_with_the_instruction_and_reads_what_follows_the_mark(
    config, model
):
    text = (
        "<|im_start|>user\nFind the rule.\n\nInput:\n0 1\nOutput:\n1 0\n\nInput:\n0 2\n"
    )
    seen = []

    def answer(prompt, request):
        seen.append(prompt)
        return "<think>\n\n4 4\n</think>\n\n2 0\n"

    model.answer = answer
    chat = replace(config, template="chatml", answer_after="</think>", ids=("a",))
    _, rows, results, _ = done(chat, model)
    assert results["tasks_solved"] == 1 and rows[0]["grid"] == [[2, 0]]
    assert seen[0].startswith(text) and seen[0].endswith("<|im_start|>assistant\n")
    assert "\n\n" not in model.sampling.stop_strings


def test_a_chat_ends_where_its_template_goes_on(config, model):
    model.chat_template = named_template("plain", model.tokenizer)
    done(replace(config, chat=True, ids=("a",)), model)
    ends = model.chat_template.end_of_turn(model.tokenizer)
    assert model.sampling.stop_strings == ends[1]


def test_pictures_are_drawn_for_each_test_input(config, model):
    chosen = replace(config, ids=("b", "c"), pictures=True)
    done(chosen, model)
    pictures = Path(config.output_path) / "pictures"
    assert sorted(os.listdir(pictures)) == ["b_0.png", "c_0.png", "c_1.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures.iterdir())


def test_greedy_attempts_are_told_to_be_alike(config, model, caplog):
    done(config, model, temperature=0.0)
    assert "the 2 attempts at a test input will be alike" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attempts": 0}, "task.num_attempts=0 must be at least 1"),
        ({"limit": 0}, "task.limit=0 must be at least 1"),
        ({"batch_size": 0}, "task.batch_size=0 must be at least 1"),
        ({"output_path": None}, "output_path=null: name a folder"),
        ({"separator": "\n"}, r"task.separator='\\n' must hold no digit"),
        ({"separator": "0"}, "task.separator='0' must hold no digit"),
        ({"answer_after": "x"}, r"task.answer_after='x' .*needs a chat"),
        ({"answer_after": "", "chat": True}, "task.answer_after='' must be a text"),
    ],
)
def test_options_that_do_not_fit_are_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_what_cannot_work_is_named_before_any_model_is_loaded(config, tmp_path):
    with pytest.raises(
        NotADirectoryError, match=r"tasks.json is a file; name a folder"
    ):
        check(replace(config, output_path=config.path))
    with pytest.raises(FileExistsError, match=r"holds files and no journal.jsonl"):
        check(replace(config, output_path=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"task.path=none does not exist"):
        check(replace(config, path="none"))
    with pytest.raises(ValueError, match=r"task.ids holds 'z'"):
        check(replace(config, ids=("z",)))
    with pytest.raises(ValueError, match="chatmll"):
        check(replace(config, template="chatmll"))


@pytest.mark.parametrize(
    "changes", [{"num_return_sequences": 3}, {"num_beams": 4, "temperature": 0.0}]
)
def test_attempts_are_sampled_one_by_one(config, model, changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=rf"sampling.{name}=\d must be 1"):
        done(config, model, **changes)


def test_a_model_without_tokenizer_or_template_is_named(config, model):
    with pytest.raises(ValueError, match="the checkpoint has no chat template"):
        done(replace(config, chat=True), model)
    model.tokenizer = None
    with pytest.raises(ValueError, match="the checkpoint holds no tokenizer"):
        done(config, model)


@pytest.fixture(scope="module")
def real_model(make_model):
    """It writes bytes at random, within a context of 101."""
    return make_model(LanguageModel, context=101)


def test_attempts_of_a_model_do_not_depend_on_what_else_is_run(config, real_model):
    """All at once, and three of them first, so that all have other neighbours."""
    sampling = {"max_new_tokens": 5, "temperature": 2.0, "seed": 3}
    config = replace(config, batch_size=4)
    done(config, real_model, **sampling)
    whole = bytes_of(config)
    other = replace(config, output_path=f"{config.output_path}2")
    done(replace(other, ids=("c", "e")), real_model, **sampling)
    _, rows, results, _ = done(other, real_model, **sampling)
    assert bytes_of(other) == whole
    drawn = {tuple(row["token_ids"]) for row in rows}
    assert len(rows) == 16 and len(drawn) == 16
    assert max(map(len, drawn)) == 5 and results["over_context"] == []
