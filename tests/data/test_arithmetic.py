"""Sums: all of a size, and the held-out ones in no order among those to train on."""

from pathlib import Path

import pytest
import yaml

from relax.config import to_dataclass
from relax.data.arithmetic import ArithmeticConfig, load_arithmetic

CONF = Path(__file__).parents[2] / "conf" / "data"


def config_of(**changes) -> ArithmeticConfig:
    values = {**read("_records"), **read("arithmetic"), **changes}
    del values["defaults"]
    return to_dataclass(ArithmeticConfig, values, "data")


def read(name):
    return yaml.safe_load((CONF / f"{name}.yaml").read_text())


def operands(record) -> tuple[int, ...]:
    return tuple(map(int, record["prompt"].removesuffix("=").split("+")))


@pytest.mark.parametrize(("terms", "size"), [(2, 100), (3, 1000)])
def test_every_sum_is_on_one_side_alone(terms, size):
    records = load_arithmetic(config_of(digits=1, terms=terms, validation_size=17))
    train = [operands(record) for record in records.train]
    held_out = [operands(record) for record in records.validation]
    classes = {tuple(sorted(one)) for one in held_out}
    assert (len(held_out), len(classes)) == (17, 17)
    assert len(records.train) == len(train) == len(set(train))
    everything = {
        tuple(int(digit) for digit in f"{number:0{terms}d}") for number in range(size)
    }
    assert set(train) == {x for x in everything if tuple(sorted(x)) not in classes}


def test_a_record_is_a_prompt_and_its_sum():
    records = load_arithmetic(config_of(digits=2, validation_size=0))
    assert len(records.train) == 10_000
    # 12 * 100 + 34
    assert records.train[1234] == {
        "prompt": "12+34=",
        "completion": "46",
        "answer": "46",
    }
    assert records.train[-1]["prompt"] == "99+99="
    with pytest.raises(IndexError):
        records.train[10_000]
    assert records.source == "sums of 2 operands of up to 2 digits"


def test_the_seed_decides():
    def prompts(**changes):
        records = load_arithmetic(config_of(**changes))
        return [[x["prompt"] for x in split] for split in records[:2]]

    first = prompts(train_size=53, validation_size=29)
    assert first == prompts(train_size=53, validation_size=29)
    other = prompts(train_size=53, validation_size=29, split_seed=1)
    assert first[0] != other[0] and first[1] != other[1]
    # Held out is held out, however many are trained on.
    whole = prompts(validation_size=29)
    assert whole[1] == first[1]
    assert len(set(first[0])) == 53 and set(first[0]) < set(whole[0])


def test_a_huge_size_costs_nothing():
    records = load_arithmetic(config_of(digits=9, validation_size=31))
    assert len(records.train) == 10**18 - 62
    assert operands(records.train[len(records.train) - 1]) == (999999999, 999999999)
    record = records.train[123456789987654321]
    assert record["answer"] == str(sum(operands(record)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"digits": 0}, r"data\.digits=0 must be at least 1"),
        ({"terms": 1}, r"data\.terms=1 must be at least 2 and at most 5"),
        ({"digits": 7, "terms": 3}, r"data\.digits=7 and data\.terms=3 make sums of"),
        # 10 * 11 / 2 sums of two digits, orders aside.
        ({"digits": 1, "validation_size": 28}, r"size=28 must be .* at most 27, half"),
        ({"train_size": 0}, r"data\.train_size=0 must be at least 1, or null"),
        ({"loss_on": "prompt"}, r"data\.loss_on='prompt' is unknown"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of(**changes)


def test_more_sums_than_there_are_is_an_error():
    config = config_of(digits=1, validation_size=0, train_size=101)
    with pytest.raises(ValueError, match=r"data\.train_size=101, but 100 sums are not"):
        load_arithmetic(config)
