"""A run on Weights & Biases, which neither asks anything nor waits long."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from relax.tracking.config import LoggerConfig

log = logging.getLogger(__name__)

# Seconds after which a run goes on without the server; what it logs stays on disk.
_INIT_TIMEOUT = 20
_FINISH_TIMEOUT = 60
_ID_FILE = "wandb_id.txt"


def stored_run_id(folder: Path) -> str | None:
    """Returns the wandb run id that an earlier part of this run left behind."""
    path = folder / _ID_FILE
    return path.read_text().strip() if path.exists() else None


class WandbLogger:
    """One wandb run; without an API key or a network it is an offline run.

    With `resume_id` it continues that run. wandb's own step only grows, so that rows
    logged again after a resume would be lost: the x axis is a metric `step` instead.
    """

    def __init__(
        self,
        config: LoggerConfig,
        run_config: dict,
        folder: Path,
        name: str,
        resume_id: str | None,
    ) -> None:
        import wandb

        self._wandb = wandb
        self._run = _start(
            wandb,
            config.mode,
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tag_list,
            name=name,
            config=run_config,
            dir=str(folder),
            id=resume_id,
            resume="allow",
        )
        (folder / _ID_FILE).write_text(self._run.id + "\n")
        log.info("wandb run %s: %s", self._run.id, self._run.url or folder / "wandb")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def log_table(self, step: int, name: str, rows: list[dict]) -> None:
        """Logs the rows as one table, a column per key."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        cells = [[_encodable(row.get(column)) for column in columns] for row in rows]
        table = self._wandb.Table(columns=columns, data=cells)
        self._run.log({"step": step, name: table})

    def log_checkpoint(self, step: int, path: Path) -> None:
        """Notes where the newest checkpoint lies; nothing is uploaded."""
        self._run.summary.update({"checkpoint": str(path), "checkpoint_step": step})

    def finish(self, failed: bool = False) -> None:
        """Ends the run; warns where the rest of the upload had to be left undone."""
        try:
            self._run.finish(exit_code=int(failed))
        except Exception as error:  # no trouble of wandb's may fail a training now
            log.warning("wandb did not finish: %s; `wandb sync` can, later", error)


def _encodable(cell: Any) -> Any:
    """Returns a text with half surrogate pairs, which UTF-8 lacks, spelled out."""
    if not isinstance(cell, str):
        return cell
    return cell.encode("utf-8", "backslashreplace").decode()


def _start(wandb: ModuleType, mode: str | None, **options: Any) -> Any:
    """Returns a started run, an offline one where the server is out of reach."""
    mode = mode or os.environ.get("WANDB_MODE") or "online"
    settings = wandb.Settings(
        mode=mode,
        silent=True,
        console="off",  # the live line would be captured as thousands of lines
        init_timeout=_INIT_TIMEOUT,
        finish_timeout=_FINISH_TIMEOUT,
        finish_timeout_raises=True,
    )
    wandb.setup(settings)
    if mode == "online":
        try:
            # Without a key, init would ask for one; login(prompt=False) does not.
            if wandb.login(prompt=False, verify=False):
                return wandb.init(mode=mode, settings=settings, **options)
            reason = "no API key: set WANDB_API_KEY or run `wandb login`"
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            wandb.teardown()  # its service still holds the run id that failed
            wandb.setup(settings)
        log.warning("wandb stays offline: %s", reason)
        mode = "offline"
    return wandb.init(mode=mode, settings=settings, **options)
