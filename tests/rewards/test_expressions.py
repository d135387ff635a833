"""Expressions are read, never executed, and to the last character."""

from fractions import Fraction

import pytest

from relax.rewards import REWARDS, Sample
from relax.rewards.expressions import evaluate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        (" 1 + 2 ", 3),
        ("2+3*4", 14),
        ("(2+3)*4", 20),
        ("20-3-4", 13),
        ("24/4/3", 2),
        ("24/(4/3)", 18),
        ("1/3*3", 1),
        ("1/3+1/6", Fraction(1, 2)),
        ("8/(3-8/3)", 24),
        ("((7))", 7),
        ("2×3−8÷4", 4),
        pytest.param("(" * 300 + "7" + ")" * 300, 7, id="deep"),
        ("", None),
        ("()", None),
        ("1 2", None),
        ("1+", None),
        ("+1", None),
        ("-1", None),
        ("2**3", None),
        ("7//2", None),
        ("(1", None),
        ("1)", None),
        (")1(", None),
        ("(1)(2)", None),
        ("2(3)", None),
        ("1/0", None),
        ("1/(2-2)", None),
        ("1.5", None),
        ("1_0", None),
        ("0x1f", None),
        ("٣", None),
        ("²", None),
        ("1+a", None),
        ("__import__('os')", None),
        ("1+2;3", None),
        pytest.param("1+" * 600 + "1", None, id="too long"),
    ],
)
def test_values(text, value):
    assert evaluate(text) == value


def arithmetic(prompt, completion):
    return REWARDS["arithmetic"](Sample(prompt, completion, None, {}, 3, 7, True))


@pytest.mark.parametrize(
    ("prompt", "completion", "reward"),
    [
        ("12+34=", "46", 1),
        ("12+34=", " 46\n", 1),
        ("12+34=", "45", 0),
        ("12+34=", "046", 0),
        ("12+34=", "46 ", 1),
        ("12+34=", "46=46", 0),
        ("12+34=", "4 6", 0),
        ("12+34=", "", 0),
        ("0+0=", "0", 1),
        ("3-10=", "-7", 1),
        ("What is 12 + 34 = ?", "46", 1),
        ("1+1=2\n12+34=", "46", 1),
        ("1/3=", "1/3", 1),
        ([{"role": "user", "content": "12+34="}], "46", 1),
        ([{"role": "user", "content": [{"type": "text", "text": "1+1="}]}], "2", 1),
    ],
)
def test_sums(prompt, completion, reward):
    assert arithmetic(prompt, completion) == reward


@pytest.mark.parametrize("prompt", ["", "12+34", "sum=", "1+=", "1+1=2"])
def test_a_prompt_without_a_sum_is_an_error(prompt):
    with pytest.raises(ValueError, match="doesn't end in a sum"):
        arithmetic(prompt, "46")


def countdown(completion, record):
    return REWARDS["countdown"](Sample("", completion, None, record, 3, 7, True))


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("2*3+7", 1),
        (" 7 + 3 * 2\n", 1),
        ("(2*3)+7", 1),
        ("2×3+7", 1),
        ("2*3+7=13", 1),
        ("2*3+7 = 13", 1),
        ("<think>2*3=6</think><answer>2*3+7</answer>", 1),
        ("2*3+7=14", 0),
        ("2*3+7=13=13", 0),
        ("2*3+7=", 0),
        ("13", 0),
        ("3+7+3", 0),
        ("7+2*3+3-3", 0),
        ("2*3+7*1", 0),
        ("2*3", 0),
        ("7*2-3", 0),
        ("23-7", 0),
        ("2*3+7 is it", 0),
        ("2*3+7/(0)", 0),
        ("2*(3+7", 0),
        ("-2*-3+7", 0),
        ("", 0),
    ],
)
def test_each_number_is_used_once(completion, reward):
    assert countdown(completion, {"numbers": [3, 7, 2], "target": 13}) == reward


def test_values_in_between_are_exact_fractions():
    record = {"numbers": [3, 3, 8, 8], "target": 24}
    assert countdown("8/(3-8/3)", record) == 1
    assert countdown("8/(3-8/3)", {**record, "target": 23}) == 0


def test_numbers_may_repeat_as_often_as_they_are_given():
    record = {"numbers": [4, 4, 2], "target": 10}
    assert countdown("4+4+2", record) == 1
    assert countdown("4*2+2", record) == 0


@pytest.mark.parametrize("record", [{"answer": "13"}, {"numbers": [1]}, {"target": 1}])
def test_a_record_without_a_puzzle_is_an_error(record):
    with pytest.raises(ValueError, match='countdown reads "numbers" and "target"'):
        countdown("1", record)


@pytest.mark.parametrize("prompt", [" " * 50_000, "=" + " " * 50_000 + "x"])
def test_a_prompt_without_a_sum_is_seen_at_once(prompt):
    with pytest.raises(ValueError, match="doesn't end in a sum"):
        REWARDS["arithmetic"](Sample(prompt, "7", None, {}, 3, 7, True))


@pytest.mark.parametrize("end", ["=", " = ", "=?", "= ?\n"])
def test_a_sum_may_end_in_a_question(end):
    sample = Sample(f"What is 3+4{end}", "7", None, {}, 3, 7, True)
    assert REWARDS["arithmetic"](sample) == 1
