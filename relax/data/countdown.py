"""Countdown: reach a target with each number used once, by + - * and /."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from relax.data.records import Record, Records, RecordsConfig

_MAX_NUMBERS = 6  # whose solution takes 50 ms, that of seven a second
_MOST_DRAWS = 10  # for each held-out puzzle
_LEAST_NEW = 20  # of a hundred draws are to be puzzles that may be trained on
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}
_ATOM = 3


@dataclass(frozen=True, kw_only=True)
class CountdownConfig(RecordsConfig):
    """Which puzzles there are, and how many.

    numbers: how many a puzzle has, each in [1, max_number]. max_target: targets lie in
    [1, max_target], and all can be reached. train_size: puzzles drawn, which may
    repeat. validation_size: held-out puzzles, all different. split_seed: chooses both.
    """

    numbers: int
    max_number: int
    max_target: int
    train_size: int
    validation_size: int
    split_seed: int

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= self.numbers <= _MAX_NUMBERS:
            raise ValueError(
                f"data.numbers={self.numbers} must be at least 2 and at most "
                f"{_MAX_NUMBERS}"
            )
        if self.max_number < 2:
            raise ValueError(f"data.max_number={self.max_number} must be at least 2")
        # So that most draws of numbers have a target at all.
        if self.max_target < self.max_number:
            raise ValueError(
                f"data.max_target={self.max_target} must be at least "
                f"data.max_number={self.max_number}"
            )
        if self.train_size < 1:
            raise ValueError(f"data.train_size={self.train_size} must be at least 1")
        if self.validation_size < 0:
            raise ValueError(
                f"data.validation_size={self.validation_size} must be at least 0"
            )


class _Puzzle(NamedTuple):
    numbers: tuple[int, ...]
    target: int
    solution: str

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """What two puzzles that differ in the order of their numbers share."""
        return tuple(sorted(self.numbers)), self.target

    def record(self) -> Record:
        return {
            "prompt": f"{' '.join(map(str, self.numbers))} -> {self.target}: ",
            "completion": self.solution,
            "answer": str(self.target),
            "numbers": list(self.numbers),
            "target": self.target,
        }


class _Drawn(Sequence):
    """Training records, each a draw by its own index, made when it is asked for."""

    def __init__(self, config: CountdownConfig, held_out: frozenset):
        self._config, self._held_out = config, held_out

    def __len__(self) -> int:
        return self._config.train_size

    def __getitem__(self, place: int) -> Record:
        place = range(len(self))[place]
        draws = _draws(f"train {self._config.split_seed} {place}", self._config)
        return next(x for x in draws if x.key not in self._held_out).record()


def load_countdown(config: CountdownConfig) -> Records:
    """Returns records like `{"prompt": "3 7 2 -> 13: ", "completion": "2*3+7",
    "answer": "13", "numbers": [3, 7, 2], "target": 13}`.

    A held-out puzzle is left out of training in every order of its numbers. A training
    record is a function of (config, index) and is made when it is asked for. Raises
    ValueError where the puzzles are too few for data.validation_size.
    """
    validation: dict[tuple, _Puzzle] = {}
    draws = _draws(f"validation {config.split_seed}", config)
    for puzzle in islice(draws, _MOST_DRAWS * config.validation_size):
        if len(validation) == config.validation_size:
            break
        validation.setdefault(puzzle.key, puzzle)
    new = sum(puzzle.key not in validation for puzzle in islice(draws, 100))
    if len(validation) < config.validation_size or new < _LEAST_NEW:
        raise ValueError(
            f"data.validation_size={config.validation_size} holds out too many of the "
            f"puzzles of data.numbers={config.numbers} up to "
            f"data.max_number={config.max_number}; lower it, or raise one of these"
        )
    return Records(
        _Drawn(config, frozenset(validation)),
        [puzzle.record() for puzzle in validation.values()],
        f"countdown with {config.numbers} numbers up to {config.max_number}",
    )


def _draws(seed: str, config: CountdownConfig) -> Iterator[_Puzzle]:
    """Yields puzzles: numbers drawn evenly, then one of the targets they reach."""
    generator = random.Random(seed)
    while True:
        numbers = tuple(
            generator.randint(1, config.max_number) for _ in range(config.numbers)
        )
        targets, solutions = _solved(tuple(sorted(numbers)), config.max_target)
        if targets:
            target = generator.choice(targets)
            yield _Puzzle(numbers, target, solutions[target])


@lru_cache(maxsize=4096)
def _solved(
    numbers: tuple[int, ...], max_target: int
) -> tuple[list[int], dict[int, str]]:
    """Returns the targets in order, and the solution of each that `_reach` gives."""
    solutions = {
        value: text
        for value, (text, _) in _reach(numbers).items()
        if value <= max_target
    }
    return sorted(solutions), solutions


def _reach(numbers: tuple[int, ...]) -> dict[int, tuple[str, int]]:
    """Returns value -> (shortest expression found, how its outermost operator binds).

    Every number is used once; differences are positive and quotients whole, also within
    an expression. Sets of numbers are bits of a mask: all ways to cut a set in two are
    its submasks.
    """
    reached = {1 << i: {x: (str(x), _ATOM)} for i, x in enumerate(numbers)}
    for mask in range(1, 1 << len(numbers)):
        values = reached.setdefault(mask, {})
        left = (mask - 1) & mask
        while left:
            for a, one in reached[left].items():
                for b, other in reached[mask ^ left].items():
                    for value, operator in _combine(a, b, left < mask ^ left):
                        found = _join(one, operator, other)
                        if value not in values or _rank(found) < _rank(values[value]):
                            values[value] = found
            left = (left - 1) & mask
    return reached[(1 << len(numbers)) - 1]


def _combine(a: int, b: int, first: bool) -> Iterator[tuple[int, str]]:
    """Yields what a and b make in this order; `first`: also what any order makes."""
    if first:
        yield a + b, "+"
        yield a * b, "*"
    if a > b:
        yield a - b, "-"
    if b > 1 and a % b == 0:
        yield a // b, "/"


def _join(
    left: tuple[str, int], operator: str, right: tuple[str, int]
) -> tuple[str, int]:
    """Returns the expression of two, with the parentheses that it needs."""
    binding = _BINDING[operator]
    one, other = left[0], right[0]
    if left[1] < binding:
        one = f"({one})"
    if right[1] < binding or (right[1] == binding and operator in "-/"):
        other = f"({other})"
    return f"{one}{operator}{other}", binding


def _rank(expression: tuple[str, int]) -> tuple[int, str]:
    return len(expression[0]), expression[0]
