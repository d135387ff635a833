"""Sums and puzzles, checked by reading expressions: nothing is ever executed."""

import re
from fractions import Fraction

from relax.rewards.samples import Sample, prompt_text, tagged_answer

_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-"})
_MAX_LENGTH = 1000  # characters
_SUM = "-+*/()0123456789 ×·÷−"  # characters
_SUM_END = re.compile(r"[0-9)] ?\Z")


def arithmetic(sample: Sample) -> float:
    """Returns 1 where the completion is the value of the expression before the last =.

    A whole value is written in digits, as 46, another as a fraction in lowest terms.
    Raises ValueError where the prompt doesn't end in an expression and =.
    """
    prompt = prompt_text(sample)
    value = _value_asked(prompt.rstrip().removesuffix("?").rstrip())
    if value is None:
        raise ValueError(
            f"the prompt {prompt[-80:]!r} doesn't end in a sum, like 12+34="
        )
    return float(sample.completion.strip() == str(value))


def countdown(sample: Sample) -> float:
    """Returns 1 where the completion reaches the target with each number used once.

    It is an expression of + - * / and parentheses, whose values in between are exact
    fractions, within the last <answer> tags where there are such; "= 13" may follow,
    where 13 is the target. The record holds "numbers" and "target"; ValueError where it
    doesn't.
    """
    numbers, target = sample.record.get("numbers"), sample.record.get("target")
    if numbers is None or target is None:
        raise ValueError(
            'countdown reads "numbers" and "target" of a record, which has '
            f"{', '.join(sample.record)}"
        )
    tagged = tagged_answer(sample.completion)
    text = sample.completion if tagged is None else tagged
    expression, equals, result = text.partition("=")
    tokens = _tokens(expression)
    if tokens is None or (equals and result.strip() != str(target)):
        return 0.0
    used = [int(token) for token in tokens if token.isdigit()]
    if sorted(used) != sorted(numbers):
        return 0.0
    return float(_evaluate(tokens) == target)


def evaluate(text: str) -> Fraction | None:
    """Returns the exact value of an expression of numbers, + - * / and parentheses.

    None where it is no such expression, divides by zero or is longer than a thousand
    characters. There are no signs: -3 is no expression.
    """
    tokens = _tokens(text)
    return None if tokens is None else _evaluate(tokens)


def _value_asked(text: str) -> Fraction | None:
    """Returns the value of the expression before the = that ends a text, or None."""
    if not text.endswith("="):
        return None
    text = text[:-1]
    expression = text[len(text.rstrip(_SUM)) :]
    return evaluate(expression) if _SUM_END.search(expression[-2:]) else None


def _tokens(text: str) -> list[str] | None:
    text = text.translate(_SIGNS).strip()
    tokens, place = [], 0
    while len(text) <= _MAX_LENGTH and (match := _TOKEN.match(text, place)):
        tokens.append(match[1])
        place = match.end()
    return tokens if tokens and place == len(text) else None


def _evaluate(tokens: list[str]) -> Fraction | None:
    """Returns the value by two stacks (Dijkstra's shunting yard), or None.

    Without recursion, so that nesting needs no bound.
    """
    values: list[Fraction] = []
    operators: list[str] = []
    operand_next = True
    try:
        for token in tokens:
            if operand_next != (token == "(" or token.isdigit()):
                return None
            if token.isdigit():
                values.append(Fraction(int(token)))
                operand_next = False
            elif token == "(":
                operators.append(token)
            elif token == ")":
                while operators[-1] != "(":
                    _apply(operators.pop(), values)
                operators.pop()
            else:
                while operators and _BINDING.get(operators[-1], 0) >= _BINDING[token]:
                    _apply(operators.pop(), values)
                operators.append(token)
                operand_next = True
        while operators:
            _apply(operators.pop(), values)
    except (ZeroDivisionError, IndexError, KeyError):
        return None
    return None if operand_next else values[0]


def _apply(operator: str, values: list[Fraction]) -> None:
    """Puts the result of the last two values in their place.

    KeyError for a parenthesis that is not closed.
    """
    right, left = values.pop(), values.pop()
    if operator == "/":
        values.append(left / right)
    else:
        values.append(
            {"+": left + right, "-": left - right, "*": left * right}[operator]
        )
