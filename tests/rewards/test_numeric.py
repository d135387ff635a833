"""Numbers read from texts, as people and models write them."""

import json
from fractions import Fraction

import pytest

from relax.rewards import REWARDS, Sample
from relax.rewards.numeric import first_number, marked_number


def score(name, completion, answer):
    return REWARDS[name](Sample("", completion, answer, {}, 3, 7, True))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", 18),
        ("18.", 18),
        ("18.00", 18),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        ("-5", -5),
        ("−5", -5),
        ("+5", 5),
        ("$1,234.50", Fraction(2469, 2)),
        ("-$3", -3),
        ("$-3", -3),
        ("$ 3", 3),
        ("12,345,678", 12345678),
        ("50%", 50),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("1 1/2", Fraction(3, 2)),
        ("-1 1/2", Fraction(-3, 2)),
        ("1,000/3", Fraction(1000, 3)),
        ("0.5/0.25", 2),
        ("1e3", 1000),
        ("2.5E-1", Fraction(1, 4)),
        ("18 dollars", 18),
        ("18cm", 18),
        ("x = 7", 7),
        ("x=-7", -7),
        ("5-3", 5),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{ 3 }{ 4 }", Fraction(-3, 4)),
        (r"\frac12", Fraction(1, 2)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        (r"\$1{,}234", 1234),
        (r"1\,234", 1234),
        (r"18\%", 18),
        (r"90^{\circ}", 90),
        (r"\text{about 3 } 7", 7),
        pytest.param("1" * 999, int("1" * 999), id="long"),
        # What is no number, or not one that can be told.
        ("", None),
        ("none", None),
        (".", None),
        ("-", None),
        ("1,23", None),
        ("1,2345", None),
        ("12,34,567", None),
        ("12.5,3", None),
        ("3/4,5", None),
        ("1/0", None),
        ("1e999999999", None),
        pytest.param("9" * 5000, None, id="too long"),
        ("٣", None),
    ],
)
def test_a_number_is_read_whole_or_not_at_all(text, number):
    assert first_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4\n#### 7", 7),
        ("####7", 7),
        ("#### 5\n#### 7", 7),
        ("#### 7\nLet me check 9.", 7),
        ("#### $7,000.00.", 7000),
        ("#### \\boxed{7}", 7),
        ("#### **7** apples!", 7),
        ("#### x = 7", 7),
        ("#### 7 cm^2", 7),
        ("#### 7 km/h", 7),
        ("#### 7°C", 7),
        ("#### $7/day", 7),
        (r"<answer>\(7\)</answer>", 7),
        ("#### seven\n9", None),
        ("####", None),
        (r"thus \boxed{7}.", 7),
        (r"\boxed{5} no, \boxed{7}", 7),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{7} and \boxed{5", 7),
        (r"\boxed{5 \boxed{7}", 7),
        (r"\boxed{\boxed{7}}", 7),
        (r"\boxed{7}} {\boxed", 7),
        pytest.param(r"\boxed{" * 20_000 + "7}", 7, id="many boxes"),
        (r"\boxed{\$7 \text{ per day}}", 7),
        (r"\boxed{}", None),
        (r"\boxed{2\sqrt{3}}", None),
        (r"\boxed{2^3}", None),
        (r"\boxed{2\pi}", None),
        ("<think>1 #### 5</think><answer>7</answer>", 7),
        ("<answer>5</answer> <answer> 7 apples</answer>", 7),
        (r"<answer>it is \boxed{7}, not 5</answer>", 7),
        ("<answer>", None),
        ("it is 7", None),
        ("", None),
    ],
)
def test_an_answer_is_marked(text, number):
    assert marked_number(text) == number


# What a list of guesses, or mathematics around a number, could pass as.
@pytest.mark.parametrize(
    "answer",
    [
        "5 or 6",
        "5, 6",
        "5 6 7 8",
        "5\\quad 6",
        "12:30",
        "2*3",
        "5**2",
        "5-3",
        "5-x",
        "- 5",
        "5/x",
        "5 + x",
        "5 = x",
        "3 + 4 = 7",
        "5x",
        "5 x",
        "x5",
        "5ab",
        "5(x)",
        "f(5)",
        "5!",
        "5 !",
        "5_2",
        "5²",
        "5½",
        "x < 5",
        "√5",
        "|5",
        r"5\pi",
        "5π",
    ],
)
def test_an_answer_with_other_mathematics_has_no_number(answer):
    for text in (
        f"#### {answer}",
        rf"\boxed{{{answer}}}",
        f"<answer>{answer}</answer>",
    ):
        assert marked_number(text) is None
    for guess in "56":
        assert score("numeric_answer", f"#### {answer}", guess) == 0
    with pytest.raises(ValueError, match="is no number"):
        score("numeric_answer", "#### 5", f"#### {answer}")


# A search that tries each way to share out the whitespace takes days at 20,000.
@pytest.mark.parametrize("size", [1000, 20_000])
def test_the_time_goes_by_the_length(size):
    space = " " * size
    for text in (
        rf"\frac{{{space}x",
        rf"\frac{{1}}{{{space}x",
        rf"\frac{space}x",
        rf"\frac12{space}x",
        f"${space}x",
    ):
        assert marked_number(f"#### {text}") is None
        assert score("last_number", f"{text} so 7", "7") == 1
    assert marked_number(rf"#### \frac{{{space}3{space}}}{space}{{4{space}}}") == (
        Fraction(3, 4)
    )
    assert marked_number(f"#### 7{space}/{space}") is None
    assert marked_number(f"#### 7{space}apples{space}") == 7


@pytest.mark.parametrize(
    ("completion", "answer", "marked", "last"),
    [
        ("#### 1,000", "1000.0", 1, 1),
        ("#### 0.75", "3/4", 1, 1),
        ("#### 0.3333", "1/3", 0, 0),
        ("#### 5", "7", 0, 0),
        ("first 5, then 7.", "7", 0, 1),
        ("first 5, then 7.", "#### 7", 0, 1),
        ("5 - 12 is -7", "-7", 0, 1),
        ("from 5-7", "7", 0, 1),
        ("#### no idea, not 7", "7", 1, 1),
        ("#### no idea\nperhaps 7", "7", 0, 0),
        ("no idea", "7", 0, 0),
        ("", "7", 0, 0),
    ],
)
def test_answers_are_compared_as_numbers(completion, answer, marked, last):
    assert score("numeric_answer", completion, answer) == marked
    assert score("last_number", completion, answer) == last


@pytest.mark.parametrize("name", ["numeric_answer", "last_number"])
def test_answers_that_are_none(name):
    assert score(name, "#### 7", None) is None
    with pytest.raises(ValueError, match="the answer 'seven' is no number"):
        score(name, "#### 7", "seven")


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_answer_of_gsm8k_is_read(data_dir, split, count):
    text = (data_dir / "gsm8k" / f"{split}.jsonl").read_text(encoding="utf-8")
    answers = [json.loads(line)["answer"] for line in text.splitlines()]
    assert len(answers) == count
    for answer in answers:
        number = answer.rpartition("####")[2].strip()
        plain = int(number.replace(",", ""))
        assert score("numeric_answer", answer, number) == 1
        assert score("last_number", answer, answer) == 1
        assert marked_number(answer) == plain
        for wrong in (plain + 1, -plain - 1, plain * 10 + 1):
            assert score("numeric_answer", answer, str(wrong)) == 0
