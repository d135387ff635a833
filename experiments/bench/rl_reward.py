"""The reward of the GRPO benchmark, which both sides give to the same texts."""

from collections.abc import Sequence

CHARACTERS = 120


def of_text(text: str) -> float:
    """Returns 0 for a text of CHARACTERS, and less for shorter and longer ones."""
    return -abs(len(text) - CHARACTERS) / CHARACTERS


def relax(sample) -> float:
    """Returns what a `relax.rewards.Sample` is worth."""
    return of_text(sample.completion)


def trl(completions: Sequence[str], **columns) -> list[float]:
    """Returns what completions are worth, as TRL asks for it."""
    return [of_text(text) for text in completions]
