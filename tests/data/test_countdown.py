"""Countdown: every puzzle has its solution, and held-out ones are not trained on."""

from pathlib import Path

import pytest
import yaml

from relax.config import to_dataclass
from relax.data.countdown import CountdownConfig, _reach, load_countdown
from relax.rewards import REWARDS, Sample

CONF = Path(__file__).parents[2] / "conf" / "data"


def config_of(**changes) -> CountdownConfig:
    values = {**read("_records"), **read("countdown"), **changes}
    del values["defaults"]
    return to_dataclass(CountdownConfig, values, "data")


def read(name):
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())


def key(record):
    return tuple(sorted(record["numbers"])), record["target"]


def test_what_two_numbers_reach():
    assert {value: text for value, (text, _) in _reach((3, 6)).items()} == {
        9: "3+6",
        18: "3*6",
        3: "6-3",
        2: "6/3",
    }


def test_parentheses_stand_where_they_must():
    texts = {value: text for value, (text, _) in _reach((2, 3, 7)).items()}
    assert texts[13] == "2*3+7"
    assert texts[20] == "2*(3+7)"
    assert texts[2] == "7-2-3"
    assert texts[6] == "2+7-3"
    assert _reach((3, 7, 20))[5][0] == "20/(7-3)"
    assert _reach((2, 3, 12))[8][0] == "2*12/3"


@pytest.mark.parametrize("numbers", [2, 3, 4])
def test_every_solution_is_right(numbers):
    records = load_countdown(
        config_of(numbers=numbers, train_size=211, validation_size=19, max_target=50)
    )
    for record in [*records.train, *records.validation]:
        shown = " ".join(map(str, record["numbers"]))
        assert record["prompt"] == f"{shown} -> {record['target']}: "
        assert record["answer"] == str(record["target"])
        assert len(record["numbers"]) == numbers
        assert all(1 <= number <= 9 for number in record["numbers"])
        assert 1 <= record["target"] <= 50
        completion = record["completion"]
        # Python reads the expression too; it is ours, made of digits and signs.
        assert eval(completion) == record["target"]
        sample = Sample(record["prompt"], completion, None, record, 5, 9, True)
        assert REWARDS["countdown"](sample) == 1.0


def test_held_out_puzzles_are_not_trained_on():
    config = config_of(numbers=2, train_size=997, validation_size=61)
    records = load_countdown(config)
    held_out = {key(record) for record in records.validation}
    trained = {key(record) for record in records.train}
    assert len(records.validation) == len(held_out) == 61
    assert not held_out & trained
    # In no order of their numbers, though both orders of others come up.
    assert len({tuple(record["numbers"]) for record in records.train}) > 45


def test_a_record_depends_on_its_index_alone():
    records, again = (load_countdown(config_of()) for _ in range(2))
    assert len(records.train) == 20_000
    assert records.validation == again.validation
    assert records.train[19_999] == again.train[-1]
    assert [again.train[i] for i in (5, 3)] == [records.train[i] for i in (5, 3)]
    other = load_countdown(config_of(split_seed=1))
    assert [other.train[i] for i in range(7)] != [records.train[i] for i in range(7)]
    with pytest.raises(IndexError):
        records.train[20_000]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numbers": 1}, r"data\.numbers=1 must be at least 2 and at most 6"),
        ({"max_number": 1}, r"data\.max_number=1 must be at least 2"),
        ({"max_target": 8}, r"data\.max_target=8 must be at least data\.max_number=9"),
        ({"train_size": 0}, r"data\.train_size=0 must be at least 1"),
        ({"validation_size": -1}, r"data\.validation_size=-1 must be at least 0"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


@pytest.mark.parametrize("size", [7, 8])
def test_too_few_puzzles_is_an_error(size):
    # 1 1 reaches 1 and 2, 1 2 reaches 1, 2 and 3, 2 2 reaches 1 and 4.
    config = config_of(numbers=2, max_number=2, max_target=4, validation_size=size)
    with pytest.raises(ValueError, match=rf"size={size} holds out too many of the puz"):
        load_countdown(config)
