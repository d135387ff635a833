"""Numbers in texts, read and compared exactly."""

from fractions import Fraction

import regex as re  # the standard library's misreads these patterns before 3.11.5

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
_PART = r"\s*+(?:\{([^{}]*+)\}|([0-9]))"
_FRACTION = re.compile(rf"\\[dt]?frac{_PART}{_PART}")
# Whitespace, units and marks of LaTeX that leave a number as it is.
_LATEX = (
    (re.compile(r"\\(?:text|mathrm|mbox)\s*+\{[^{}]*+\}"), " "),
    (re.compile(r"\{,\}|\\[,!;]"), ""),
    (re.compile(r"\\(?:left|right|quad)\b|\\ |~|\^\{?\\circ\}?"), " "),
    (re.compile(r"\\([$%])"), r"\1"),
)
_BRACE = re.compile(r"\\boxed\{|[{}]")
_EMPHASIS = re.compile(r"\*\*|`|\\[()\[\]]")  # Markdown's, and LaTeX's formulas
_LETTER = r"[^\W\d_]"
# Behind a number: a unit, a word too long for a product of variables, or per hour.
_UNIT = re.compile(
    r"[\s°]*(?:[ckm]?m|[km]?g|m?[lL]|[kKMG][BW]|kWh|lbs?|oz|ft|in|yds?|mi|[kKm]ph|[ap]m"
    rf"|ms|s|secs?|mins?|h|hrs?|st|nd|rd|th|[CF])(?:\^[23]|[²³]|/{_LETTER}+)?(?!\w)"
    rf"|{_LETTER}{{4,}}+(?!\w)|\s*/\s*{_LETTER}{{2,}}+(?!\w)"
)
_JOINT = re.compile(rf"(?<={_LETTER})[-/](?={_LETTER})")
_MATHS = re.compile(r"[\d²³¹¼½¾*/^+<>|_\\√×÷·±∞≤≥≠-]")
_BEFORE = re.compile(rf"(?:(?<!{_LETTER}){_LETTER}|{_LETTER}[(\[{{])\Z")  # x7, f(7)
_BEHIND = re.compile(r"[\w(\[{]|\s*!")  # 7x, 7(x), 7!
_AFTER = re.compile(rf"=|(?<!\w)(?<!['’])(?!a){_LETTER}(?!['’\w])")  # 7 = x, 7 x
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
    1 1/2 and \\frac{3}{4} are fractions; words may stand around it, as in x = 7. An
    answer with other mathematics or a further number has none: 5x, 5!, 12:30, 5 or 6.
    """
    marked = _marked(text)
    return None if marked is None else _only_number(marked)


def first_number(text: str) -> Fraction | None:
    """Returns the first number of a text, or None."""
    match = _NUMBER.search(_plain(text))
    return _value(match) if match else None


def _only_number(text: str) -> Fraction | None:
    """Returns the number of a text that holds one, and of mathematics nothing else."""
    text = _EMPHASIS.sub(" ", _plain(text))
    match = _NUMBER.search(text)
    if match is None:
        return None
    before, after = text[: match.start()], text[match.end() :]
    if unit := _UNIT.match(after):
        after = after[unit.end() :]
    elif _BEHIND.match(after):
        return None
    others = (_MATHS.search(_JOINT.sub(" ", part)) for part in (before, after))
    if any(others) or _BEFORE.search(before) or _AFTER.search(after):
        return None
    return _value(match)


def _compare(sample: Sample, found: Fraction | None) -> float | None:
    if sample.answer is None:
        return None
    answer = _marked(sample.answer)
    wanted = first_number(sample.answer) if answer is None else _only_number(answer)
    if wanted is None:
        raise ValueError(f"the answer {sample.answer!r} is no number")
    return float(found == wanted)


def _marked(text: str) -> str | None:
    """Returns the text of the marked answer, or None where nothing marks one."""
    tagged = tagged_answer(text)
    if tagged is not None:
        text = tagged
    if "####" in text:
        tagged = text = text.rpartition("####")[2].strip().partition("\n")[0]
    boxed = _boxed(text)
    return tagged if boxed is None else boxed


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
    above, below = ((match[i] or match[i + 1]).strip() for i in (1, 3))
    mixed = match.string[max(match.start() - 1, 0) : match.start()].isdigit()
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
