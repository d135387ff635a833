"""Numbers in texts, read and compared exactly."""

import re
from fractions import Fraction

from relax.rewards.samples import Sample, tagged_answer

# Possessive and atomic throughout: a number is read whole or not at all, so that 1,23
# or 1.5,2 is none rather than a part of it.
_DIGITS = r"(?>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?>{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)"
_NUMBER = re.compile(
    # A sign behind a word or a number is a hyphen or a difference.
    r"(?P<sign>(?:(?<![\w.)])[-+])?)(?:\$\s*(?P<sign_behind>[-+]?))?"
    r"(?<![0-9])(?<![0-9][.,])"
    r"(?:(?P<whole>[0-9]+)\s+(?=[0-9]+\s*/))?+"
    rf"(?P<number>{_DECIMAL})(?P<power>[eE][-+]?[0-9]+(?!\w))?+"
    rf"(?:\s*/\s*(?P<below>{_DECIMAL}))?+(?!,?[0-9])"
)
_FRACTION = re.compile(
    r"\\[dt]?frac\s*(?:\{\s*([^{}]*?)\s*\}|([0-9]))\s*(?:\{\s*([^{}]*?)\s*\}|([0-9]))"
)
# Whitespace, units and marks of LaTeX that leave a number as it is.
_LATEX = (
    (re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}"), " "),
    (re.compile(r"\{,\}|\\[,!;]"), ""),
    (re.compile(r"\\(?:left|right|quad)\b|\\ |~|\^\{?\\circ\}?"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
)
_BRACE = re.compile(r"\\boxed\{|[{}]")
_UNREAD = re.compile(r"\\[a-zA-Z]|\^")
_MAX_LENGTH = 1000  # characters; beyond some 4,000 digits Python refuses to read any
_MAX_POWER = 400  # beyond a double's range; 10**power is written out


def numeric_answer(sample: Sample) -> float | None:
    """Returns 1 where the marked answer of the completion is the number of the answer.

    Marked: within the last <answer> tags, else behind the last ####, else in the last
    \\boxed{}. Raises ValueError where the record's answer is no number.
    """
    return _compare(sample, marked_number(sample.completion))


def last_number(sample: Sample) -> float | None:
    """Returns what `numeric_answer` does, an unmarked answer being the last number."""
    if _marked(sample.completion) is not None:
        return numeric_answer(sample)
    found = None
    for match in _NUMBER.finditer(_plain(sample.completion)):
        found = _value(match)
    return _compare(sample, found)


def marked_number(text: str) -> Fraction | None:
    """Returns the number of a marked answer, or None where there is none.

    Commas between thousands, $, %, a trailing dot and units are no part of it; 3/4,
    1 1/2 and \\frac{3}{4} are fractions. A box with other mathematics has none.
    """
    marked = _marked(text)
    return None if marked is None else first_number(marked)


def first_number(text: str) -> Fraction | None:
    """Returns the first number of a text, or None."""
    match = _NUMBER.search(_plain(text))
    return _value(match) if match else None


def _compare(sample: Sample, found: Fraction | None) -> float | None:
    if sample.answer is None:
        return None
    answer = _marked(sample.answer)
    wanted = first_number(sample.answer if answer is None else answer)
    if wanted is None:
        raise ValueError(f"the answer {sample.answer!r} is no number")
    return float(found == wanted)


def _marked(text: str) -> str | None:
    """Returns the text of the marked answer, or None where nothing marks one."""
    tagged = tagged_answer(text)
    if tagged is not None:
        text = tagged
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    boxed = _boxed(text)
    if boxed is not None:
        return "" if _UNREAD.search(_plain(boxed)) else boxed
    return tagged


def _boxed(text: str) -> str | None:
    """Returns what stands in the braces of the last \\boxed{} that is closed."""
    open_braces: list[int | None] = []  # where a box begins, None: another brace
    start, end = -1, -1
    for brace in _BRACE.finditer(text):
        if brace[0] != "}":
            open_braces.append(brace.end() if brace[0] != "{" else None)
        elif open_braces and (begun := open_braces.pop()) is not None and begun > start:
            start, end = begun, brace.start()
    return None if start < 0 else text[start:end]


def _plain(text: str) -> str:
    """Returns the text with LaTeX's ways to write a number undone."""
    text = text.replace("−", "-")
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return _FRACTION.sub(_slash, text)


def _slash(match: re.Match) -> str:
    above, below = match[1] or match[2], match[3] or match[4]
    mixed = match.string[: match.start()][-1:].isdigit()
    return f"{' ' if mixed else ''}{above}/{below}"


def _value(match: re.Match) -> Fraction | None:
    """Returns the number, or None where it has no value or is beyond all bounds."""
    power = match["power"] or ""
    if len(match[0]) > _MAX_LENGTH or abs(int(power[1:] or 0)) > _MAX_POWER:
        return None
    value = Fraction(match["number"].replace(",", "") + power)
    if match["below"]:
        below = Fraction(match["below"].replace(",", ""))
        if not below:
            return None
        value /= below
    if match["whole"]:
        value += int(match["whole"])
    negative = (match["sign"] == "-") != (match["sign_behind"] == "-")
    return -value if negative else value
