"""What a run that goes on may change, and what it must find as it was."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relax.trainers.config import LoopConfig
from relax.trainers.loop import Task


def own_changes(
    changes: Mapping[str, Any], config: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Returns the changes without choices of groups that the run has made itself.

    `trainer=grpo` is how the command line comes by a trainer's values. Raises
    ValueError for what a resumed run keeps.
    """
    changes = {path.lstrip("+"): value for path, value in changes.items()}
    changes = {
        path: value
        for path, value in changes.items()
        if not (path in ("trainer", "data") and value == config[path].get("kind"))
    }
    if "run_folder" in changes:
        raise ValueError(
            f"run_folder={changes['run_folder']}: a resumed run goes on in its own "
            f"folder, {folder}; resume a copy of it to keep the original"
        )
    for group, what in (("tokenizer", "tokenizer"), ("init", "starting point")):
        if fixed := [p for p in changes if p == group or p.startswith(f"{group}.")]:
            raise ValueError(
                f"{fixed[0]}={changes[fixed[0]]}: a resumed run keeps its {what}; "
                "start a new run for another"
            )
    return changes


def check_reached(
    progress: Mapping[str, Any], trainer: LoopConfig, changes: Mapping, folder: Path
) -> None:
    """Raises ValueError where the run has come to its goal, and has no other now."""
    other = {"trainer.stop_metric", "trainer.stop_value"} & changes.keys()
    if progress.get("reached") and trainer.stop_metric is not None and not other:
        raise ValueError(
            f"{folder} has reached trainer.stop_metric={trainer.stop_metric} "
            f"trainer.stop_value={trainer.stop_value}: nothing is left; to go on, give "
            "another value, or null for both"
        )


def check_data(key: str | None, task: Task, changes: Mapping, folder: Path) -> None:
    """Raises ValueError where the data is other than it was, and that wasn't asked for.

    key: of the data before, None in checkpoints from when there was none.
    """
    asked = any(path == "data" or path.startswith("data.") for path in changes)
    if key not in (None, task.data_key) and not asked:
        raise ValueError(
            f"the data of {folder} has changed since: put data.path back as it was, or "
            "name it again (data.path=...) to go on with what is there now"
        )
