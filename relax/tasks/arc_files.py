"""ARC-AGI tasks and their solutions, as they are published."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relax.tasks.arc_grids import MAX_SIDE, Grid, Pair
from relax.tasks.files import read_text


@dataclass(frozen=True)
class ArcTask:
    """Demonstrations (input and output each), test inputs, and what is known of these.

    outputs: the right grid for each test input, None where it isn't known.
    """

    task_id: str
    demonstrations: Sequence[Pair]
    inputs: Sequence[Grid]
    outputs: Sequence[Grid | None]


def read_tasks(path: Path) -> dict[str, ArcTask]:
    """Returns the tasks of a file or a folder by id, in the order of their ids.

    A folder holds a .json file per task, the id its name. A file holds one task, or, as
    in the competition, an object of many by id. Raises ValueError or OSError naming
    the file and the place in it.
    """
    if path.is_dir():
        files = sorted(path.glob("*.json"))
        if not files:
            raise FileNotFoundError(f"task.path={path} holds no .json file")
        tasks = [_task(file.stem, _read(file), str(file)) for file in files]
    elif path.is_file():
        raw = _read(path)
        if not raw:
            raise ValueError(f"{path} holds no task")
        if {"train", "test"} & set(raw):
            tasks = [_task(path.stem, raw, str(path))]
        else:
            tasks = [_task(name, raw[name], f"{path}: {name}") for name in sorted(raw)]
    else:
        raise FileNotFoundError(f"task.path={path} does not exist")
    return {task.task_id: task for task in tasks}


def with_solutions(tasks: Mapping[str, ArcTask], path: Path) -> dict[str, ArcTask]:
    """Returns the tasks with the outputs of a file `{task id: [grid, ...]}`.

    Tasks that the file lacks stay as they are, and it may hold others. Raises
    ValueError or OSError where it can't be read, or doesn't fit the tasks.
    """
    if not path.is_file():
        raise FileNotFoundError(f"task.solutions={path} does not exist")
    raw = _read(path)
    if not set(raw) & set(tasks):
        raise ValueError(
            f"task.solutions={path} solves none of the {len(tasks)} tasks; name the "
            "file that belongs to task.path"
        )
    return {
        name: _solved(task, raw[name], f"{path}: {name}") if name in raw else task
        for name, task in tasks.items()
    }


def choose_tasks(
    tasks: Mapping[str, ArcTask], ids: Sequence[str], limit: int | None
) -> list[ArcTask]:
    """Returns those with the given ids (all, if none are), at most `limit`, by id.

    Raises ValueError for ids that there are not.
    """
    # The command line reads an id like 5117e062 as a number.
    numbers = {_as_number(name): name for name in tasks}
    unknown = [i for i in ids if i not in tasks and i not in numbers]
    if unknown:
        raise ValueError(
            f"task.ids holds {unknown[0]!r}, which is none of the {len(tasks)} tasks; "
            f"they go from {next(iter(tasks))!r} on"
        )
    chosen = {i if i in tasks else numbers[i] for i in ids} or set(tasks)
    return [tasks[name] for name in sorted(chosen)][:limit]


def _as_number(name: str) -> str:
    try:
        return str(float(name))
    except ValueError:
        return name


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(read_text(path, "file"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    return _expect(raw, dict, str(path))


def _task(task_id: str, raw: Any, where: str) -> ArcTask:
    _expect(raw, dict, where)
    train, test = (_pairs(raw, key, where) for key in ("train", "test"))
    for index, pair in enumerate(train):
        _grid(pair, "output", f"{where}: train[{index}]")
    for index, pair in enumerate(test):
        if pair.get("output") is not None:
            _grid(pair, "output", f"{where}: test[{index}]")
    return ArcTask(
        task_id,
        [{key: pair[key] for key in ("input", "output")} for pair in train],
        [pair["input"] for pair in test],
        [pair.get("output") for pair in test],
    )


def _pairs(raw: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """Returns the pairs under a key, the input of each checked."""
    if key not in raw:
        raise ValueError(f'{where} has no "{key}"; a task has "train" and "test"')
    pairs = _expect(raw[key], list, f"{where}: {key}")
    if not pairs:
        raise ValueError(f"{where}: {key} is empty; give at least one pair")
    for index, pair in enumerate(pairs):
        place = f"{where}: {key}[{index}]"
        _grid(_expect(pair, dict, place), "input", place)
    return pairs


def _solved(task: ArcTask, raw: Any, where: str) -> ArcTask:
    grids = _expect(raw, list, where)
    if len(grids) != len(task.inputs):
        raise ValueError(
            f"{where} holds {len(grids)} grids, and the task has {len(task.inputs)} "
            "test inputs; give one grid for each"
        )
    for index, (grid, known) in enumerate(zip(grids, task.outputs, strict=True)):
        _check_grid(grid, f"{where}[{index}]")
        if known is not None and known != grid:
            raise ValueError(
                f'{where}[{index}] is not the "output" that task.path gives; leave '
                "task.solutions out, or mend one of them"
            )
    return ArcTask(task.task_id, task.demonstrations, task.inputs, grids)


def _grid(pair: Mapping[str, Any], key: str, where: str) -> None:
    if key not in pair:
        raise ValueError(f'{where} has no "{key}"')
    _check_grid(pair[key], f"{where}.{key}")


def _check_grid(grid: Any, where: str) -> None:
    """Raises ValueError for what is no rectangle of digits, 1 to 30 on each side."""
    rows = _expect(grid, list, where)
    if not 1 <= len(rows) <= MAX_SIDE:
        raise ValueError(f"{where} has {len(rows)} rows; a grid has 1 to {MAX_SIDE}")
    for index, row in enumerate(rows):
        cells = _expect(row, list, f"{where}[{index}]")
        if len(cells) != len(rows[0]) or not 1 <= len(cells) <= MAX_SIDE:
            raise ValueError(
                f"{where}[{index}] has {len(cells)} cells and {where}[0] "
                f"{len(rows[0])}; rows have one length, 1 to {MAX_SIDE}"
            )
        for cell in cells:
            if type(cell) is not int or not 0 <= cell <= 9:
                raise ValueError(
                    f"{where}[{index}] holds {cell!r}; cells are whole numbers 0 to 9"
                )


def _expect(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind):
        names = {dict: "an object", list: "a list"}
        raise ValueError(f"{where} is {type(value).__name__}, not {names[kind]}")
    return value
