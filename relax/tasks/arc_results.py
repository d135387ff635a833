"""What attempts at ARC tasks come to: the submission, and how many are right."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TextIO

import rich.box
import rich.console
from rich.table import Table

from relax.tasks.arc_grids import Grid, Parsed

# What the competition's own sample holds where a grid must stand and there is none.
PLACEHOLDER: Grid = [[0, 0], [0, 0]]
OVER_CONTEXT = "prompt over the context"


@dataclass(frozen=True)
class Answered:
    """A test input with all attempts at it.

    output: the right grid, None where it isn't known. tokens: of the prompt.
    over_context: it and the room for an answer exceed the context, so that the attempts
    were not made.
    """

    task_id: str
    test: int
    output: Grid | None
    tokens: int
    over_context: bool
    attempts: Sequence[Parsed]

    @property
    def right(self) -> int | None:
        """How many attempts are right, None where that isn't known."""
        if self.output is None:
            return None
        return sum(attempt.grid == self.output for attempt in self.attempts)

    @property
    def solved(self) -> bool | None:
        """Whether a submitted grid is right; a placeholder never is."""
        if self.output is None:
            return None
        return self.output in choose_two([attempt.grid for attempt in self.attempts])


def choose_two(grids: Sequence[Grid | None]) -> list[Grid | None]:
    """Returns the two grids to submit.

    Of two attempts each its own; of one, its grid twice; of more, the two grids that
    most attempts gave, of equally many the first given, and a single one twice.
    """
    if len(grids) == 2:
        return list(grids)
    votes = Counter(_frozen(grid) for grid in grids if grid is not None)
    # most_common keeps the order of first appearance among equals.
    chosen = [[list(row) for row in grid] for grid, _ in votes.most_common(2)]
    return [*chosen, *(chosen[:1] or [None]) * 2][:2]


def submission(answered: Sequence[Answered]) -> dict[str, list[dict[str, Grid]]]:
    """Returns the competition's form, PLACEHOLDER where an attempt gave no grid."""
    entries: dict[str, list[dict[str, Grid]]] = {}
    for one in answered:
        grids = choose_two([attempt.grid for attempt in one.attempts])
        first, second = (PLACEHOLDER if grid is None else grid for grid in grids)
        entry = {"attempt_1": first, "attempt_2": second}
        entries.setdefault(one.task_id, []).append(entry)
    return entries


def summarise(answered: Sequence[Answered]) -> dict[str, Any]:
    """Returns the counts, and what became of each task; see `pass_at` for pass_at_k.

    A task is solved when each of its test inputs has a right grid among the two that
    were submitted; those whose outputs aren't all known count in neither number.
    """
    tasks = {
        name: list(group) for name, group in groupby(answered, lambda one: one.task_id)
    }
    known = [one for one in answered if one.output is not None]
    whole = [g for g in tasks.values() if all(one.output is not None for one in g)]
    reasons = Counter(
        attempt.reason
        for one in answered
        for attempt in one.attempts
        if attempt.grid is None
    )
    num_attempts = len(answered[0].attempts)
    return {
        "tasks": len(tasks),
        "tasks_known": len(whole),
        "tasks_solved": sum(all(one.solved for one in group) for group in whole),
        "test_inputs": len(answered),
        "test_inputs_known": len(known),
        "test_inputs_solved": sum(one.solved for one in known),
        "attempts": num_attempts * len(answered),
        "attempts_right": sum(one.right for one in known),
        "attempts_without_grid": dict(sorted(reasons.items())),
        "pass_at_k": {
            str(k): math.fsum(pass_at(k, num_attempts, one.right) for one in known)
            / len(known)
            for k in range(1, num_attempts + 1)
            if known
        },
        "over_context": [
            {"task": one.task_id, "test": one.test, "tokens": one.tokens}
            for one in answered
            if one.over_context
        ],
        "by_task": {name: _task(group) for name, group in tasks.items()},
    }


def pass_at(k: int, n: int, right: int) -> float:
    """Returns how likely `k` of `n` attempts, drawn without order, hold a right one.

    1 - C(n - right, k) / C(n, k) (Chen et al. 2021, equation 1,
    https://arxiv.org/abs/2107.03374).
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def show(results: dict[str, Any], terminal: TextIO) -> None:
    """Writes the counts as a table."""
    table = Table(box=rich.box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for unit in ("tasks", "test_inputs"):
        known, name = results[f"{unit}_known"], unit.replace("_", " ")
        table.add_row(name, str(results[unit]))
        table.add_row(f"  solved of {known} known", _share(results, unit))
    passes = results["pass_at_k"]
    for k, value in passes.items():
        power_of_two = int(k).bit_count() == 1
        if power_of_two or int(k) == len(passes):
            table.add_row(f"pass@{k} of test inputs", f"{value:.1%}")
    without = results["attempts_without_grid"]
    table.add_row("attempts", str(results["attempts"]))
    table.add_row("  right", str(results["attempts_right"]))
    table.add_row("  without a grid", str(sum(without.values())))
    for reason, count in without.items():
        table.add_row(f"    {reason}", str(count))
    console = rich.console.Console(file=terminal, highlight=False)
    console.print(table)


def _share(results: dict[str, Any], unit: str) -> str:
    solved, known = results[f"{unit}_solved"], results[f"{unit}_known"]
    return f"{solved} ({solved / known:.1%})" if known else "-"


def _task(group: Sequence[Answered]) -> dict[str, Any]:
    known = all(one.output is not None for one in group)
    return {
        "solved": all(one.solved for one in group) if known else None,
        "test_inputs": [{"solved": one.solved, "right": one.right} for one in group],
    }


def _frozen(grid: Grid) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in grid)
