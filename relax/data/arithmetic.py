"""Sums as text: every sum of a size, some of them held out, none of them stored."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import comb

import numpy as np

from relax.data.records import Record, Records, RecordsConfig

_MAX_DIGITS = 18  # of all operands together: indices are int64
_MAX_TERMS = 5  # every order of a held-out sum is listed


@dataclass(frozen=True, kw_only=True)
class ArithmeticConfig(RecordsConfig):
    """Which sums there are, and how they are split.

    digits: operands lie in [0, 10**digits). terms: operands of a sum. train_size: a
    random choice of that many of the sums that are not held out; None: all of them.
    validation_size: held-out sums, all of different operands. split_seed: chooses both.
    """

    digits: int
    terms: int
    train_size: int | None
    validation_size: int
    split_seed: int

    def __post_init__(self):
        super().__post_init__()
        if self.digits < 1:
            raise ValueError(f"data.digits={self.digits} must be at least 1")
        if not 2 <= self.terms <= _MAX_TERMS:
            raise ValueError(
                f"data.terms={self.terms} must be at least 2 and at most {_MAX_TERMS}"
            )
        if self.digits * self.terms > _MAX_DIGITS:
            raise ValueError(
                f"data.digits={self.digits} and data.terms={self.terms} make sums of "
                f"more than {_MAX_DIGITS} digits; lower one of them"
            )
        most = comb(10**self.digits + self.terms - 1, self.terms) // 2
        if not 0 <= self.validation_size <= most:
            raise ValueError(
                f"data.validation_size={self.validation_size} must be at least 0 and "
                f"at most {most}, half of the sums of data.terms={self.terms} "
                f"operands of up to data.digits={self.digits} digits"
            )
        if self.train_size is not None and self.train_size < 1:
            raise ValueError(
                f"data.train_size={self.train_size} must be at least 1, or null for "
                "all sums that are not held out"
            )


class _Sums(Sequence):
    """Records of the sums at given indices, each made when it is asked for.

    The index of a sum is the number that its operands spell in base 10**digits.
    """

    def __init__(self, indices: Sequence[int], digits: int, terms: int):
        self._indices, self._digits, self._terms = indices, digits, terms

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> Record:
        operands = _operands(self._indices[place], self._digits, self._terms)
        total = str(sum(operands))
        return {
            "prompt": "+".join(map(str, operands)) + "=",
            "completion": total,
            "answer": total,
        }


class _AllBut(Sequence):
    """The numbers of range(size) in order, without those of `left_out`, sorted."""

    def __init__(self, size: int, left_out: Sequence[int]):
        # How many numbers that stay lie below each number that is left out.
        self._below = np.asarray(left_out, np.int64) - np.arange(len(left_out))
        self._size = size - len(left_out)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: int) -> int:
        place = range(self._size)[place]
        return place + int(np.searchsorted(self._below, place, side="right"))


def load_arithmetic(config: ArithmeticConfig) -> Records:
    """Returns `{"prompt": "12+34=", "completion": "46", "answer": "46"}` and so on.

    A sum is held out in every order of its operands. The training sums are ordered by
    their operands; a sum's record is made when it is asked for, so that their number
    costs nothing. Raises ValueError where data.train_size exceeds it.
    """
    size = 10 ** (config.digits * config.terms)
    validation, left_out = _hold_out(config, size)
    train: Sequence[int] = _AllBut(size, left_out)
    if config.train_size is not None:
        if config.train_size > len(train):
            raise ValueError(
                f"data.train_size={config.train_size}, but {len(train)} sums are not "
                "held out; lower it, or null for all of them"
            )
        chosen = random.Random(f"train {config.split_seed}").sample(
            range(len(train)), config.train_size
        )
        train = [train[place] for place in chosen]
    source = f"sums of {config.terms} operands of up to {config.digits} digits"
    return Records(
        _Sums(train, config.digits, config.terms),
        _Sums(validation, config.digits, config.terms),
        source,
    )


def _hold_out(config: ArithmeticConfig, size: int) -> tuple[list[int], list[int]]:
    """Returns the indices of the held-out sums, and, sorted, those of all orders."""
    generator = random.Random(f"validation {config.split_seed}")
    chosen: list[int] = []
    left_out: set[int] = set()
    while len(chosen) < config.validation_size:
        index = generator.randrange(size)
        if index not in left_out:
            chosen.append(index)
            operands = _operands(index, config.digits, config.terms)
            left_out.update(
                _index(order, config.digits) for order in permutations(operands)
            )
    return chosen, sorted(left_out)


def _operands(index: int, digits: int, terms: int) -> list[int]:
    base = 10**digits
    return [index // base**place % base for place in reversed(range(terms))]


def _index(operands: Sequence[int], digits: int) -> int:
    base = 10**digits
    return sum(x * base**place for place, x in enumerate(reversed(operands)))
