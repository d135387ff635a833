import io
import json
import logging
import math
from dataclasses import replace

import pytest

from relax.language_model import Score
from relax.model.config import LlamaConfig
from relax.sampling import SamplingConfig
from relax.tasks.score import (
    ScoreConfig,
    check,
    describe,
    perplexity,
    run,
    score_rows,
    windows,
)
from relax.text.tokenizers import TokenizerConfig, make_tokenizer


class Counting:
    """A model of ten slots whose token's logprob is minus the tokens before it."""

    tokenizer = None

    def __init__(self, make_config):
        self.config: LlamaConfig = make_config(max_position_embeddings=10)
        self.rows = []

    def encode(self, text):
        return [ord(character) for character in text]

    def score(self, rows, batch_size):
        self.rows += rows
        return [
            Score(list(row), [None, *(-float(i) for i in range(1, len(row)))])
            for row in rows
        ]


@pytest.fixture
def model(make_config):
    return Counting(make_config)


@pytest.fixture
def config():
    return ScoreConfig(
        kind="score",
        prompt="abcd",
        prompts_file=None,
        path=None,
        output_path=None,
        context=None,
        stride=None,
        batch_size=5,
    )


def lines_of(config, model):
    terminal = io.StringIO()
    run(config, model, SamplingConfig(), terminal)
    return [json.loads(line) for line in terminal.getvalue().splitlines()]


def test_a_text_gives_logprobs_nll_and_perplexity(config, model):
    [line] = lines_of(config, model)
    assert line["text"] == "abcd" and line["token_ids"] == [97, 98, 99, 100]
    assert line["logprobs"] == [None, -1.0, -2.0, -3.0]
    assert line["num_scored"] == 3 and line["nll"] == 6.0
    assert line["perplexity"] == pytest.approx(math.e**2)


def test_one_token_has_nothing_to_score(config, model):
    [line] = lines_of(replace(config, prompt="a"), model)
    assert line["logprobs"] == [None]
    assert line["num_scored"] == 0 and line["nll"] == 0.0
    assert line["perplexity"] is None


@pytest.mark.parametrize(
    ("length", "stride", "expected"),
    [
        (10, 5, [(0, 10)]),
        (11, 5, [(0, 10), (5, 11)]),
        (23, 5, [(0, 10), (5, 15), (10, 20), (15, 23)]),
        (12, 99, [(0, 10), (9, 12)]),  # one token of a window is always known before
    ],
)
def test_windows_cover_a_text_of_any_length(length, stride, expected):
    assert list(windows(length, 10, stride)) == expected


def test_every_token_of_a_long_text_is_scored_once_with_the_context_it_has(model):
    """After the first window of 10, windows of 10 each add 4 tokens, 6 before them."""
    rows = [list(range(20)), list(range(3))]
    long, short = score_rows(model, rows, context=10, stride=4, batch_size=2)
    expected = [None, *range(-1, -10, -1)] + [-6, -7, -8, -9] * 2 + [-6, -7]
    assert long.logprobs == expected and len(long.logprobs) == 20
    assert short.logprobs == [None, -1, -2]
    assert model.rows[:4] == [rows[0][0:10], rows[0][4:14], rows[0][8:18], rows[0][12:]]


def test_a_shorter_context_makes_shorter_windows(config, model):
    """Windows of 4 that advance by 2: after the first the third of each is new."""
    [line] = lines_of(replace(config, prompt="abcdefg", context=4), model)
    assert [len(row) for row in model.rows] == [4, 4, 3]
    assert line["logprobs"] == [None, -1.0, -2.0, -3.0, -2.0, -3.0, -2.0]
    assert lines_of(replace(config, prompt="a" * 11, context=10), model)
    with pytest.raises(ValueError, match=r"task.context=11 must be at most 10"):
        lines_of(replace(config, context=11), model)


@pytest.mark.parametrize(
    ("prompt", "logprob", "summary"),
    [
        ("abcd", -2.0, "3 tokens scored: 2.0000 nats per token, perplexity 7.389"),
        ("a", -2.0, "nothing to score"),
        (
            *("ab", -701.0),
            "1 tokens scored: 701.0000 nats per token, perplexity beyond floats",
        ),
    ],
)
def test_the_log_sums_up_what_can_be(config, model, caplog, prompt, logprob, summary):
    def score(rows, batch_size):
        return [Score(row, [None] + [logprob] * (len(row) - 1)) for row in rows]

    model.score = score
    with caplog.at_level(logging.INFO, "relax.tasks.score"):
        lines_of(replace(config, prompt=prompt), model)
    assert [record.getMessage() for record in caplog.records] == [f"1 texts: {summary}"]


def test_tokens_of_sentencepiece_keep_their_spaces(model, data_dir):
    path = str(data_dir / "stories260K_hf" / "tokenizer.model")
    tokenizer = make_tokenizer(
        TokenizerConfig(kind="sentencepiece", encoding=None, path=path)
    )
    model.tokenizer = tokenizer
    ids = [tokenizer.bos_id, *tokenizer.encode("Tom had a dog. Tom"), tokenizer.eos_id]
    tokens = describe(model, Score(ids, [None] * len(ids)))["tokens"]
    assert (tokens[0], tokens[-1]) == ("<s>", "</s>")
    assert "".join(tokens[1:-1]) == " Tom had a dog. Tom"


def test_tokens_of_parts_of_a_character_are_shown_as_replaced(model):
    config = TokenizerConfig(kind="bytes", encoding=None, path=None)
    model.tokenizer = make_tokenizer(config)
    tokens = describe(model, Score([97, *"é".encode(), 256], [None] * 4))["tokens"]
    assert tokens == ["a", "\ufffd", "\ufffd", "<|endoftext|>"]


def test_lines_of_files_are_scored_one_by_one(config, model, tmp_path):
    plain, jsonl = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("ab\n\ncd\n")
    jsonl.write_text('{"text": "x\\ny"}\n{"prompt": "z"}\n')
    from_plain = lines_of(replace(config, prompt=None, prompts_file=str(plain)), model)
    from_jsonl = lines_of(replace(config, prompt=None, prompts_file=str(jsonl)), model)
    assert [line["text"] for line in from_plain] == ["ab", "cd"]
    assert [line["text"] for line in from_jsonl] == ["x\ny", "z"]


def test_files_are_scored_whole_and_named(config, model, tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"{name}\n")
    output = tmp_path / "out.jsonl"
    config = replace(
        config, prompt=None, path=f"{tmp_path}/*.txt", output_path=str(output)
    )
    assert lines_of(config, model) == []
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a.txt\n", "b.txt\n"]
    assert [row["path"] for row in rows] == [
        str(tmp_path / "a.txt"),
        str(tmp_path / "b.txt"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None}, "give one of prompt, prompts_file and task.path"),
        ({"path": "*.txt"}, "task.prompt='abcd' and task.path='[*].txt'"),
        ({"context": 1}, "task.context=1 must be at least 2"),
        ({"stride": 0}, "task.stride=0 must be at least 1"),
        ({"batch_size": 0}, "task.batch_size=0 must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_what_cannot_be_read_is_named_before_any_model_is(config, tmp_path):
    nothing = replace(config, prompt=None, path=str(tmp_path / "*.txt"))
    with pytest.raises(FileNotFoundError, match="fits no file"):
        check(nothing)
    with pytest.raises(ValueError, match="holds an empty text"):
        check(replace(config, prompt=""))
    with pytest.raises(FileNotFoundError, match="is no folder; make it"):
        check(replace(config, output_path=str(tmp_path / "none" / "out.jsonl")))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        check(nothing)


def test_a_perplexity_beyond_floats_is_none():
    assert perplexity(7000.0, 10) == pytest.approx(math.exp(700))
    assert perplexity(7000.1, 10) is None
