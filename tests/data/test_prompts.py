"""Prompts with answers: which column is what, and where GSM8K is looked for."""

import json
from pathlib import Path

import pytest
import yaml

from relax.config import to_dataclass
from relax.data.prompts import PromptsConfig, load_prompts

CONF = Path(__file__).parents[2] / "conf" / "data"
QUESTIONS = [
    {"question": f"How many is {n} thousand?", "answer": f"Think.\n#### {n},000"}
    for n in range(1, 8)
]


def config_of(name, **changes) -> PromptsConfig:
    values = {**read("_records"), **read(name), **changes}
    del values["defaults"]
    return to_dataclass(PromptsConfig, values, "data")


def read(name):
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())


def write(path: Path, records) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_columns_are_named(tmp_path):
    messages = [{"role": "user", "content": "2+2?"}]
    rows = [
        {"ask": "1+1?", "gold": 2, "why": "1+1 is 2", "level": "easy"},
        {"ask": messages, "gold": "four", "why": "so", "level": None},
    ]
    config = config_of(
        "prompts",
        path=write(tmp_path / "mine.jsonl", rows),
        validation_fraction=0.5,
        prompt_field="ask",
        answer_field="gold",
        completion_field="why",
        suffix=" Answer:",
    )
    records = load_prompts(config)
    assert records.train == [
        {**rows[0], "prompt": "1+1? Answer:", "answer": "2", "completion": "1+1 is 2"}
    ]
    assert records.validation == [
        {
            **rows[1],
            "prompt": messages,
            "answer": "four",
            "completion": [{"role": "assistant", "content": "so"}],
        }
    ]
    assert records.source == str(tmp_path / "mine.jsonl")


USER = {"role": "user", "content": "1+1?"}
REPLY = {"role": "assistant", "content": "2"}
ALIKE = [
    ("1+1?", 2, "1+1?", "2"),
    ("1+1?", [REPLY], [USER], [REPLY]),
    ([USER], "2", [USER], [REPLY]),
    ([USER], 2, [USER], [REPLY]),
    ([USER], [REPLY], [USER], [REPLY]),
]


def with_completions(tmp_path, *rows):
    rows = [{"prompt": p, "why": why} for p, why in rows]
    path = write(tmp_path / "a.jsonl", rows)
    changes = {"answer_field": None, "completion_field": "why"}
    changes["validation_fraction"] = 0.0
    return load_prompts(config_of("prompts", path=path, **changes)).train


def test_prompts_and_completions_are_both_texts_or_both_messages(tmp_path):
    records = with_completions(tmp_path, *[row[:2] for row in ALIKE])
    for record, (_, why, prompt, completion) in zip(records, ALIKE, strict=True):
        assert record == {"prompt": prompt, "completion": completion, "why": why}


def test_tools_of_messages_are_a_list(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"prompt": p, "tools": json.dumps(tools)} for p in ([USER], "1+1?")]
    path = write(tmp_path / "a.jsonl", rows)
    config = config_of("prompts", path=path, answer_field=None)
    assert [r["tools"] for r in load_prompts(config).train] == [tools, rows[1]["tools"]]
    config = config_of("prompts", path=path, answer_field=None, template="chatml")
    assert [r["tools"] for r in load_prompts(config).train] == [tools] * 2
    path = write(tmp_path / "a.jsonl", [rows[0], {"prompt": [USER], "tools": 3}])
    with pytest.raises(ValueError, match=r"record 1: tools=3 is no list of JSON"):
        load_prompts(config)


@pytest.mark.parametrize(
    ("prompt", "completion", "message"),
    [
        (
            "x",
            True,
            r"=why holds true, neither a text nor a number; write it as a text",
        ),
        ("x", {"a": 1}, r'=why holds \{"a": 1\}, neither a text nor a number'),
        ("x", ["2"], r"=why\[0\] is no object with a role and a content"),
        ([USER], [], r"=why is neither a text nor messages"),
    ],
)
def test_a_bad_completion_is_named(tmp_path, prompt, completion, message):
    with pytest.raises(ValueError, match=rf"record 1: data\.completion_field{message}"):
        with_completions(tmp_path, ("x", "2"), (prompt, completion))


def test_answers_may_be_missing_where_none_is_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "numbers": [1, 2]}])
    config = config_of("prompts", path=path, answer_field=None)
    assert load_prompts(config).train == [{"prompt": "x", "numbers": [1, 2]}]


def test_validation_from_its_own_file(tmp_path):
    train = write(tmp_path / "a.jsonl", [{"prompt": "x", "answer": 1}])
    other = tmp_path / "b.json"
    other.write_text('[{"prompt": "y", "answer": 2.5}]')
    records = load_prompts(config_of("prompts", path=train, validation_path=str(other)))
    assert records.train == [{"prompt": "x", "answer": "1"}]
    assert records.validation == [{"prompt": "y", "answer": "2.5"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 1}, r"record 1: data\.prompt_field=prompt is not among .* answer"),
        (
            {"prompt": "x", "answer": None},
            r"record 1: data\.answer_field=answer is not",
        ),
        ({"prompt": 3, "answer": 1}, r"record 1: .*prompt is neither a text nor mess"),
        ({"prompt": "x", "answer": [1]}, r"=answer holds \[1\], neither a .*as a text"),
        (
            {"prompt": "x", "answer": True},
            r"1: data\.answer_field=answer holds true, n",
        ),
        (
            {"prompt": ["hi"], "answer": 1},
            r"record 1: data\.prompt_field=prompt\[0\] is no object with a role",
        ),
        (
            {"prompt": [{"role": "user", "content": 3}], "answer": 1},
            r"record 1: data\.prompt_field=prompt\[0\]\.content is no text but a int",
        ),
    ],
)
def test_a_bad_record_is_named(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "answer": 1}, row])
    with pytest.raises(ValueError, match=message):
        load_prompts(config_of("prompts", path=path))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("prompts", {}, r"data\.path=null, but data\.kind=prompts"),
        ("prompts", {"kind": "prompt"}, r"data\.kind=prompt: choose one of prompts"),
        ("gsm8k", {"answer_field": None}, r"data\.answer_field=null, but data\.kind=g"),
        ("gsm8k", {"validation_fraction": 1.0}, r"data\.validation_fraction=1\.0: mus"),
    ],
)
def test_mistakes_in_the_configuration_are_named(name, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(name, **changes)


def test_nothing_left_to_train_on_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "answer": 1}])
    with pytest.raises(ValueError, match=r"data\.validation_fraction=0\.9 leaves not"):
        load_prompts(config_of("prompts", path=path, validation_fraction=0.9))


@pytest.fixture
def gsm8k(tmp_path, monkeypatch):
    """A data folder with a gsm8k of five questions and two."""
    monkeypatch.setenv("RELAX_DATA_DIR", str(tmp_path))
    write(tmp_path / "gsm8k" / "train.jsonl", QUESTIONS[:5])
    write(tmp_path / "gsm8k" / "test.jsonl", QUESTIONS[5:])
    return tmp_path / "gsm8k"


def test_gsm8k_gives_the_number_and_the_solution(gsm8k):
    records = load_prompts(config_of("gsm8k"))
    assert records.train[0] == {
        "question": "How many is 1 thousand?",
        "prompt": "How many is 1 thousand?\n",
        "completion": "Think.\n#### 1,000",
        "answer": "1000",
    }
    assert [x["answer"] for x in records.validation] == ["6000", "7000"]
    assert records.source == str(gsm8k / "train.jsonl")


def test_where_gsm8k_is_looked_for(gsm8k, monkeypatch, tmp_path):
    def sizes(**changes):
        return tuple(map(len, load_prompts(config_of("gsm8k", **changes))[:2]))

    assert sizes(validation_fraction=0.4) == (3, 2)
    assert sizes(validation_path=str(gsm8k / "train.jsonl")) == (5, 5)
    monkeypatch.delenv("RELAX_DATA_DIR")
    assert sizes(path=str(gsm8k)) == (5, 2)
    assert sizes(path=str(gsm8k / "test.jsonl")) == (2, 0)
    with pytest.raises(FileNotFoundError, match="RELAX_DATA_DIR, below which gsm8k"):
        sizes()
    monkeypatch.setenv("RELAX_DATA_DIR", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"data\.path=.*train.jsonl is no file"):
        sizes()


def test_a_gsm8k_answer_needs_its_mark(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "q", "answer": "4"}])
    with pytest.raises(ValueError, match=r"record 0: the answer has no ####"):
        load_prompts(config_of("gsm8k", path=path))


def test_the_real_gsm8k(data_dir):
    records = load_prompts(config_of("gsm8k"))
    assert (len(records.train), len(records.validation)) == (7473, 1319)
    assert records.train[0]["answer"] == "72"
    assert records.validation[0]["prompt"].startswith("Janet’s ducks lay 16 eggs")
