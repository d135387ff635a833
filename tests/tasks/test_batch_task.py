import json
import logging
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.generation.requests import Completion, GenerationStats
from relax.language_model import LanguageModel
from relax.model.parameters import parameter_shapes
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig, make_mesh
from relax.tasks.batch import BatchConfig, check, run
from relax.tasks.batch_progress import Progress
from relax.tasks.journal import Journal
from relax.text.chat import named_template
from relax.text.tokenizers import TokenizerConfig, make_tokenizer

REPOSITORY = Path(__file__).parents[2]
BYTES = TokenizerConfig(kind="bytes", encoding=None, path=None)
ROWS = [
    {"prompt": "one", "id": "a"},
    {"prompt": "three", "max_new_tokens": 2, "tags": [1, {"x": None}], "weight": 1.5},
    {"prompt": "é\u2028\ud800", "id": 7},
    {"prompt": [72, 105]},
    {"prompt": "one", "id": "a"},
    {"prompt": "six6", "max_new_tokens": 5},
    {"prompt": "seven"},
]


class Scripted:
    """A model of bytes that answers by what it was asked, the last of three first.

    stop: an exception, or a signal, that comes after so many completions.
    """

    def __init__(self, config, stop=None, after=0):
        self.config = config
        self.tokenizer = make_tokenizer(BYTES)
        self.chat_template = None
        self.stop_ids = (256,)
        self.params = {"weight": jnp.arange(35.0).reshape(5, 7)}
        self.stats = GenerationStats()
        self.asked = []
        self._stop, self._after = stop, after

    encode = LanguageModel.encode

    def check(self, sampling):
        pass

    def complete(self, requests, sampling, batch_size, *, capacity):
        self.asked += [(r.input_index, r.sample_index) for r in requests]
        self.sampling = sampling
        places = list(range(len(requests)))
        for start in range(0, len(places), 3):
            for place in reversed(places[start : start + 3]):
                if self._after == 0 and self._stop is not None:
                    self._interrupt()
                self._after -= 1
                yield place, self._answer(requests[place], sampling)

    def _answer(self, request, sampling):
        count = min(request.max_new_tokens or 3, sampling.max_new_tokens)
        self.stats.prompt_tokens += len(request.prompt)
        self.stats.new_tokens += count
        name = f"{len(request.prompt)}.{request.input_index}.{request.sample_index}"
        return Completion(name, [7] * count, [-0.1] * count, [-1 / 3] * count, "stop")

    def _interrupt(self):
        if isinstance(self._stop, signal.Signals):
            os.kill(os.getpid(), self._stop)
        else:
            raise self._stop


@pytest.fixture
def scripted(make_config):
    """A callable: a Scripted model, the fields of its config given."""

    def make(stop=None, after=0, **fields):
        config = make_config(**{"vocab_size": 257, **fields})
        return Scripted(config, stop, after)

    return make


def as_lines(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def batch(tmp_path):
    """A callable: the config for an input of rows, or of bytes, with more fields."""

    def make(rows=ROWS, name="in.jsonl", **fields) -> BatchConfig:
        data = rows if isinstance(rows, bytes) else as_lines(rows)
        (tmp_path / name).write_bytes(data)
        values = {
            "kind": "batch",
            "input_path": str(tmp_path / name),
            "output_path": str(tmp_path / "out.jsonl"),
            "batch_size": 2,
            "template": None,
            "on_error": "fail",
            "logprobs": True,
            "overwrite": False,
        }
        return BatchConfig(**{**values, **fields})

    return make


def lines_of(config: BatchConfig) -> list[bytes]:
    data = Path(config.output_path).read_bytes()
    assert data.endswith(b"\n") or not data
    return data.split(b"\n")[:-1]


def rows_of(config: BatchConfig) -> list[dict]:
    return [json.loads(line) for line in lines_of(config)]


def complete(config, model, sampling=None) -> list[dict]:
    """Returns the rows written, with all that the program does before and after."""
    check(config)
    run(config, model, sampling or SamplingConfig())
    assert not config.journal_path.exists()
    return rows_of(config)


def test_a_line_keeps_its_fields_and_gets_its_completion(batch, scripted):
    rows = complete(batch(), scripted())
    assert [
        {k: row[k] for k in given} for row, given in zip(rows, ROWS, strict=True)
    ] == ROWS
    assert rows[1] == {
        **ROWS[1],
        "completion": "5.1.0",
        "token_ids": [7, 7],
        "logprobs": [-0.1, -0.1],
        "sampled_logprobs": [-1 / 3, -1 / 3],
        "finish_reason": "stop",
    }
    assert [row["completion"] for row in rows] == [
        *("3.0.0", "5.1.0", "8.2.0", "2.3.0", "3.4.0", "4.5.0", "5.6.0"),
    ]


def test_the_output_is_readable_text(batch, scripted):
    config = batch()
    complete(config, scripted())
    assert lines_of(config)[2].startswith('{"prompt": "é\u2028\\ud800", '.encode())


def test_logprobs_can_be_left_out(batch, scripted):
    rows = complete(batch(ROWS[:1], logprobs=False), scripted())
    assert rows == [{**ROWS[0], "completion": "3.0.0", "finish_reason": "stop"}]


def test_samples_stand_in_a_list_of_their_record(batch, scripted):
    sampling = SamplingConfig(num_return_sequences=2)
    rows = complete(batch(ROWS[:3], logprobs=False), scripted(), sampling)
    assert len(rows) == 3
    assert rows[1] == {
        **ROWS[1],
        "completions": [
            {"completion": "5.1.0", "finish_reason": "stop"},
            {"completion": "5.1.1", "finish_reason": "stop"},
        ],
    }


def test_lines_of_a_text_file_are_prompts(batch, scripted):
    data = "one\r\n\n  \n sé\u2028\nlast".encode()
    rows = complete(batch(data, "in.txt", logprobs=False), scripted())
    assert [(row["prompt"], row["completion"]) for row in rows] == [
        *(("one", "3.0.0"), (" sé\u2028", "7.1.0"), ("last", "4.2.0")),
    ]


def test_messages_go_through_the_template(batch, scripted):
    turns = [{"role": "user", "content": "hi"}]
    rows = [{"messages": turns, "id": 1}, {"prompt": "hi"}]
    model = scripted()
    model.chat_template = named_template("chatml", model.tokenizer)
    written = complete(batch(rows, logprobs=False), model)
    # <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n has 52 bytes.
    assert [row["completion"] for row in written] == ["52.0.0", "2.1.0"]
    assert written[0]["messages"] == turns


def test_a_template_whose_turns_end_by_a_text_stops_messages_alone(batch, scripted):
    turns = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": "hi"}, {"messages": turns}]
    model = scripted()
    asked = []

    def recorded(requests, sampling, *arguments, **options):
        stops = sampling.stop_strings
        asked.extend((request.input_index, stops) for request in requests)
        return Scripted.complete(model, requests, sampling, *arguments, **options)

    model.complete = recorded
    config = batch(rows, template="chatml")
    assert len(complete(config, model, SamplingConfig(stop_strings=["x"]))) == 2
    # The tokenizer of bytes has no token for what ends a turn.
    assert asked == [(1, ("x", "<|im_end|>")), (0, ("x",))]


def test_a_template_may_refuse_to_end_a_turn(batch, scripted, tmp_path):
    """It wants a system message; where it ends a turn can't be asked for."""
    (tmp_path / "strict.jinja").write_text(
        "{% if messages[0].role != 'system' %}{{ raise_exception('who am I?') }}"
        "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    roles = ("system", "user")
    rows = [{"messages": [{"role": role, "content": "hi"} for role in roles]}]
    config = batch(rows, template=str(tmp_path / "strict.jinja"), logprobs=False)
    assert complete(config, scripted())[0]["completion"] == "4.0.0"


def test_messages_without_a_template_are_an_error(batch, scripted):
    rows = [{"messages": [{"role": "user", "content": "hi"}]}]
    with pytest.raises(ValueError, match=r"task.template=null, and the checkpoint"):
        run(batch(rows, on_error="skip"), scripted(), SamplingConfig())


BAD = {
    "torn": (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter"),
    "nan": (b'{"prompt": "a", "x": NaN}', "not JSON: Out of range float values"),
    "huge": (b'{"prompt": "a", "x": 1e999}', "not JSON: Out of range float values"),
    "deep": (b"[" * 99999, "not JSON that can be read: nested too deeply"),
    "list": (b'["prompt"]', "not an object; give "),
    "none": (b'{"text": "a"}', 'give one of "prompt" and "messages"'),
    "both": (b'{"prompt": "a", "messages": []}', 'give one of "prompt" and "messages"'),
    "number": (b'{"prompt": 7}', '"prompt" must be a text or a list of token ids'),
    "truth": (b'{"prompt": [true]}', '"prompt" must be a text or a list of token ids'),
    "empty": (b'{"prompt": ""}', '"prompt" is empty'),
    "no ids": (b'{"prompt": []}', '"prompt" is empty'),
    "no turns": (b'{"messages": []}', '"messages" must be a list of at least one'),
    "turn": (b'{"messages": ["hi"]}', 'each of "messages" must be an object with a'),
    "zero": (b'{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens=0 must be a"),
    "half": (b'{"prompt": "a", "max_new_tokens": 2.5}', "max_new_tokens=2.5 must be"),
    "yes": (b'{"prompt": "a", "max_new_tokens": true}', "max_new_tokens=True must be"),
}
# Found only once there is a model: its context is 101, its ids are below 257.
BAD_FOR_MODEL = {
    "long": (
        as_lines([{"prompt": "a" * 101}]),
        "its prompt has 101 tokens; give 1 to ",
    ),
    "ids": (b'{"prompt": [7, 257]}', "its prompt holds ids from 7 to 257; give ids"),
    "field": (b'{"prompt": "a", "logprobs": 1}', "its field 'logprobs' is one that"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_line_that_cannot_be_read_is_named_before_there_is_a_model(batch, bad):
    line, message = BAD[bad]
    config = batch(as_lines(ROWS[:2]) + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=r"input_path=.*in.jsonl, line 4: ") as raised:
        check(config)
    assert f"line 4: {message}" in str(raised.value)
    assert not Path(config.output_path).exists()


@pytest.mark.parametrize("bad", BAD_FOR_MODEL)
def test_a_line_that_a_model_cannot_take_is_named_before_it_runs(batch, scripted, bad):
    line, message = BAD_FOR_MODEL[bad]
    config, model = batch(as_lines(ROWS[:2]) + line), scripted()
    check(config)
    with pytest.raises(ValueError, match=r"input_path=.*in.jsonl, line 3: ") as raised:
        run(config, model, SamplingConfig())
    assert f"line 3: {message}" in str(raised.value)
    assert model.asked == []
    assert not Path(config.output_path).exists()


def test_messages_that_the_template_refuses_are_an_error_of_their_line(batch, scripted):
    good, bad = ([{"role": role, "content": "hi"}] for role in ("user", "assistant"))
    model = scripted()
    config = batch(
        [{"messages": good}, {"messages": bad}], template="llama2", on_error="skip"
    )
    rows = complete(config, model)
    assert "completion" in rows[0]
    assert rows[1]["error"].startswith("line 2: chat template llama2")


def test_many_errors_are_counted(batch):
    with pytest.raises(ValueError, match=r"; line 10: .*; and 3 more; mend them, or"):
        check(batch(b"x\n" * 13))


def test_lines_in_error_can_be_skipped(batch, scripted, caplog):
    """The lines of output still are those of the input, blank ones left out."""
    lines = [as_lines(ROWS[:1]), b"\n", b"{x}\n", as_lines([{"prompt": "", "id": 5}])]
    config = batch(b"".join(lines) + as_lines(ROWS[1:2]), on_error="skip")
    rows = complete(config, scripted())
    assert [row.get("completion") for row in rows] == ["3.0.0", None, None, "5.3.0"]
    assert list(rows[1]) == ["error"]
    assert rows[1]["error"].startswith("line 3: not JSON: Expecting property name")
    assert rows[2] == {
        "prompt": "",
        "id": 5,
        "error": 'line 4: "prompt" is empty; give at least one character',
    }
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert [text.partition(": ")[0].split(", ")[1] for text in warned] == [
        *("line 3", "line 4"),
    ]


def test_nothing_but_errors_runs_no_model(batch, scripted):
    model = scripted()
    assert len(complete(batch(b"x\ny", on_error="skip"), model)) == 2
    assert model.asked == []


def test_a_file_without_records_is_an_error(batch):
    with pytest.raises(ValueError, match=r"input_path=.*in.jsonl holds no record"):
        check(batch(b"\n  \n"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_path": None}, "input_path=null: task=batch needs a file, input_path="),
        ({"output_path": None}, "output_path=null: task=batch needs a file, output_"),
        ({"batch_size": 0}, "task.batch_size=0 must be at least 1"),
        (
            {"on_error": "stop"},
            "task.on_error='stop' is unknown; choose one of fail, s",
        ),
    ],
)
def test_settings_that_cannot_work_are_named(batch, fields, message):
    with pytest.raises(ValueError, match=message):
        batch(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_path": "{}/no.jsonl"}, r"input_path=.*no.jsonl does not exist"),
        ({"output_path": "{}/no/out.jsonl"}, r"task.output_path=.*/no is no folder"),
        ({"template": "{}/no.jinja"}, r"task.template=.*no.jinja' is not a file"),
    ],
)
def test_paths_that_cannot_work_are_named(batch, tmp_path, fields, message):
    fields = {name: value.format(tmp_path) for name, value in fields.items()}
    with pytest.raises(OSError, match=message):
        check(batch(**fields))


def test_the_input_is_never_written_over(batch, tmp_path):
    config = batch()
    os.link(config.input_path, tmp_path / "same.jsonl")
    for path in (config.input_path, str(tmp_path / "same.jsonl")):
        with pytest.raises(ValueError, match="would be written over"):
            check(replace(config, output_path=path, overwrite=True))
    config = batch(name="out.jsonl.journal")
    with pytest.raises(ValueError, match=r"out.jsonl.journal would be written over"):
        check(config)


def test_an_output_that_is_there_is_not_written_over(batch, scripted):
    config = batch()
    whole = complete(config, scripted())
    with pytest.raises(FileExistsError, match=r"output_path=.*out.jsonl is there alre"):
        check(config)
    Path(config.output_path).write_text("of an earlier run\n")
    assert complete(replace(config, overwrite=True), scripted()) == whole


STOPS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "code"), STOPS)
@pytest.mark.parametrize("after", [0, 1, 2, 5])
@pytest.mark.parametrize("samples", [1, 2])
def test_an_interrupted_task_goes_on_to_the_same_bytes(
    batch, scripted, caplog, number, code, after, samples
):
    sampling = SamplingConfig(num_return_sequences=samples)
    config = batch()
    complete(config, scripted(), sampling)
    whole = Path(config.output_path).read_bytes()
    Path(config.output_path).unlink()
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit_:
        run(config, scripted(number, after), sampling)
    assert exit_.value.code == code
    assert signal.getsignal(number) is handler
    done = int(caplog.messages[-1].split(" of 7 records")[0].split()[-1])
    assert done <= after // samples
    assert caplog.messages[-1] == (
        f"{number.name}: {done} of 7 records are done; the same command goes on from "
        "there"
    )
    assert whole.startswith(Path(config.output_path).read_bytes())
    rows_of(config)
    rest = scripted()
    complete(config, rest, sampling)
    assert Path(config.output_path).read_bytes() == whole
    assert len(set(rest.asked)) == (7 - done) * samples


def test_lines_are_written_as_soon_as_their_turn_comes(batch, scripted):
    """Of three records the last is finished first: none is written before the third."""
    config, counts = batch(), []
    model = scripted()
    original = model.complete

    def watched(*arguments, **options):
        for answer in original(*arguments, **options):
            counts.append(len(rows_of(config)))
            yield answer
        counts.append(len(rows_of(config)))

    model.complete = watched
    complete(config, model)
    assert counts == [0, 0, 0, 3, 3, 3, 6, 7]


def test_a_kill_anywhere_in_the_files_is_mended(batch, scripted, tmp_path):
    """The output cut off at many places, with any number of records in the journal."""
    config = batch(ROWS[:4], logprobs=False)
    complete(config, scripted())
    out, whole = Path(config.output_path), Path(config.output_path).read_bytes()
    out.unlink()
    with pytest.raises(SystemExit):
        run(config, scripted(signal.SIGINT, 3), SamplingConfig())
    journal = config.journal_path.read_bytes().splitlines(keepends=True)
    assert len(journal) == 4
    assert out.read_bytes().count(b"\n") == 3
    for records in range(4):
        for size in range(0, len(whole), 17):
            config.journal_path.write_bytes(b"".join(journal[: 1 + records])[:-9])
            out.write_bytes(whole[:size])
            assert len(complete(config, scripted())) == 4
            assert out.read_bytes() == whole


def test_an_output_deleted_meanwhile_is_written_again(batch, scripted):
    config = batch()
    with pytest.raises(SystemExit):
        run(config, scripted(signal.SIGINT, 6), SamplingConfig())
    Path(config.output_path).unlink()
    rest = scripted()
    assert len(complete(config, rest)) == 7
    assert set(rest.asked) == {(6, 0)}


def test_an_output_changed_meanwhile_is_left_as_it_is(batch, scripted):
    config = batch()
    with pytest.raises(SystemExit):
        run(config, scripted(signal.SIGINT, 3), SamplingConfig())
    out = Path(config.output_path)
    changed = out.read_bytes().replace(b'"5.1.0"', b'"5.1.1"')
    out.write_bytes(changed)
    with pytest.raises(ValueError, match=r"out.jsonl, line 2: not what this task wrot"):
        run(config, scripted(), SamplingConfig())
    assert out.read_bytes() == changed


CHANGES = {
    "input": "the input's sha256=",
    "tokenizer": "the sha256 of its tokens=",
    "model": "the model's sha256=",
    "logprobs": "task.logprobs=True, and now it is False",
    "seed": "sampling.seed=0, and now it is 5",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_task_goes_on_with_the_same_settings_only(batch, scripted, change):
    config = batch()
    with pytest.raises(SystemExit):
        run(config, scripted(signal.SIGINT, 3), SamplingConfig())
    before = Path(config.output_path).read_bytes()
    model, sampling = scripted(), SamplingConfig()
    if change == "input":
        batch([*ROWS, {"prompt": "more"}])
    elif change == "tokenizer":
        model.encode = lambda prompt: LanguageModel.encode(model, prompt)[:2]
    elif change == "model":
        model.params = {"weight": model.params["weight"].at[4, 6].set(0)}
    elif change == "logprobs":
        config = replace(config, logprobs=False)
    else:
        sampling = SamplingConfig(seed=5)
    with pytest.raises(ValueError, match=f"journal was begun with {CHANGES[change]}"):
        run(config, model, sampling)
    assert Path(config.output_path).read_bytes() == before
    config = replace(config, overwrite=True)
    run(config, model, sampling)
    assert len(rows_of(config)) == len(Path(config.input_path).read_text().splitlines())


def test_what_changes_no_completion_may_change(batch, scripted):
    config = batch()
    with pytest.raises(SystemExit):
        run(config, scripted(signal.SIGINT, 3), SamplingConfig())
    sampling = SamplingConfig(tokens_per_dispatch=3)
    assert len(complete(replace(config, batch_size=5), scripted(), sampling)) == 7


def test_settings_that_the_model_refuses_leave_no_file(batch, scripted):
    config = batch()
    model = scripted(ValueError("sampling.logit_bias={999: 1.0}"))
    with pytest.raises(ValueError, match=r"sampling.logit_bias"):
        run(config, model, SamplingConfig())
    assert not config.journal_path.exists() and not Path(config.output_path).exists()


def test_a_full_disk_keeps_what_was_done(batch, scripted, caplog):
    config = batch()
    complete(config, scripted())
    whole = Path(config.output_path).read_bytes()
    Path(config.output_path).unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*journal'"):
            run(config, scripted(), SamplingConfig())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    done = int(caplog.messages[-1].split(" of 7 records are done")[0])
    assert 0 < done < 7
    assert whole.startswith(Path(config.output_path).read_bytes())
    rest = scripted()
    complete(config, rest)
    assert Path(config.output_path).read_bytes() == whole
    assert len(set(rest.asked)) == 7 - done


def test_the_end_says_what_it_took(batch, scripted, caplog):
    caplog.set_level(logging.INFO)
    complete(batch(), scripted())
    assert caplog.messages[-1].startswith("7 records: 22 tokens in ")
    assert (
        " tokens/s; 30 of prompts, 0 of them shared prefixes; written: "
        in (caplog.messages[-1])
    )


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal(caplog):
    caplog.set_level(logging.INFO)
    times = iter([0.0, 100.0, 103.0, 110.0, 110.0, 110.0, 110.0, 115.0])
    progress = Progress(9, 3, clock=lambda: next(times))
    with progress:
        progress.advance(50)
        progress.advance(70, records=2)
        progress.advance(30, records=1)
    assert caplog.messages == ["5/9 records, 12.0 tokens/s, 0:00:20 left"]


@pytest.fixture(scope="module")
def model(make_config):
    """A model of bytes with random weights."""
    config = make_config(vocab_size=257)
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), leaf.dtype),
        parameter_shapes(config),
    )
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    return LanguageModel(config, params, make_tokenizer(BYTES), mesh)


def test_a_real_model_gives_what_generate_gives(batch, model):
    rows = [{"prompt": row["prompt"]} for row in ROWS]
    sampling = SamplingConfig(max_new_tokens=7, num_return_sequences=2)
    written = complete(batch(rows), model, sampling)
    expected = model.generate([row["prompt"] for row in rows], sampling, batch_size=2)
    made = [sample for row in written for sample in row["completions"]]
    assert [sample["token_ids"] for sample in made] == [c.token_ids for c in expected]
    assert [sample["completion"] for sample in made] == [c.text for c in expected]


def test_a_resumed_task_has_the_same_logprobs_to_the_last_bit(
    batch, model, monkeypatch
):
    """Also where one record is left, and the batch had two rows."""
    config, sampling = batch(), SamplingConfig(max_new_tokens=7)
    complete(config, model, sampling)
    whole = Path(config.output_path).read_bytes()
    Path(config.output_path).unlink()
    add, added = Journal.add, []

    def broken(self, key, record):
        if len(added) == 6:
            raise OSError("unplugged")
        added.append(key)
        add(self, key, record)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", broken)
        with pytest.raises(OSError, match="unplugged"):
            run(config, model, sampling)
    complete(config, model, sampling)
    assert Path(config.output_path).read_bytes() == whole


KILLED = """
import os, runpy, signal, sys
from relax.tasks.journal import Journal

add, count = Journal.add, 0
def killed(self, key, record):
    global count
    add(self, key, record)
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = killed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_killed_program_run_again_ends_with_the_same_bytes(batch, model, tmp_path):
    model.save(tmp_path / "model")
    config = batch()

    def infer(output, *start, code=0):
        overrides = (
            *("task=batch", f"input_path={config.input_path}", f"output_path={output}"),
            *(f"checkpoint={tmp_path}/model", "sampling.max_new_tokens=9"),
            *(f"runtime.cache_dir={tmp_path}/programs", "task.batch_size=2"),
        )
        done = subprocess.run(
            [sys.executable, *start, str(REPOSITORY / "infer.py"), *overrides],
            cwd=tmp_path,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        return done.stderr

    infer(tmp_path / "whole.jsonl")
    infer(tmp_path / "out.jsonl", "-c", KILLED, code=-9)
    journal = (tmp_path / "out.jsonl.journal").read_bytes()
    assert journal.count(b"\n") == 5
    assert "going on: 4 of 7 records are done" in infer(tmp_path / "out.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert whole.count(b"\n") == 7
    assert not (tmp_path / "out.jsonl.journal").exists()
