"""Everything a training run reports, sent to everywhere it is kept or shown."""

import contextlib
from pathlib import Path
from typing import Self

from relax.tracking.config import LoggerConfig
from relax.tracking.console import Console, Metrics
from relax.tracking.metrics_file import MetricsFile, cut_back
from relax.tracking.plots import plot_losses, plot_rewards
from relax.tracking.wandb_logger import WandbLogger, stored_run_id

_METRICS, _SAMPLES = "metrics.jsonl", "samples.jsonl"
_COMPLETIONS = "completions.jsonl"


class Tracker:
    """Shows a run's progress and keeps it in `folder`, and on wandb if configured.

    Rows of metrics.jsonl: `{"step": 20, "kind": "train" or "eval", "loss": ...}`; of
    samples.jsonl: `{"step": 20, "prompt": ..., "completion": ...}`; completions.jsonl,
    where a run has such: the same with rewards. With `start_step` all continue after
    the rows of steps up to it. `step` counts the steps done.

    A context manager, or `finish` at the end: both draw loss.png and rewards.png (see
    plots.py), close the files and give the terminal back, also after an exception.
    """

    def __init__(
        self,
        folder: Path,
        run_config: dict,
        logger: LoggerConfig,
        name: str,
        total_steps: int,
        start_step: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        resume_step = start_step or None
        self._folder = folder
        self._name = name
        self._start_step = start_step
        self._wandb: WandbLogger | None = None
        with contextlib.ExitStack() as opened:
            if logger.kind == "wandb":
                resume_id = stored_run_id(folder) if resume_step else None
                self._wandb = WandbLogger(logger, run_config, folder, name, resume_id)
                opened.push(self._finish_wandb)
            self._metrics = MetricsFile(folder / _METRICS, resume_step)
            opened.callback(self._metrics.close)
            self._samples = MetricsFile(folder / _SAMPLES, resume_step)
            opened.callback(self._samples.close)
            self._completions: MetricsFile | None = None
            _cut_completions(folder / _COMPLETIONS, resume_step)
            opened.callback(self._draw)
            self._console = opened.enter_context(Console(total_steps, start_step))
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._opened.__exit__(*exception)

    def finish(self) -> None:
        """Draws the pictures and closes everything; a second call does nothing."""
        self._opened.close()

    def log_step(self, step: int, metrics: Metrics) -> None:
        self._log("train", step, metrics)
        self._console.step(step, metrics)

    def log_evaluation(self, step: int, metrics: Metrics) -> None:
        self._log("eval", step, metrics)
        self._console.evaluation(step, metrics)

    def log_samples(self, step: int, samples: list[dict]) -> None:
        """Keeps samples, each with at least `prompt` and `completion`."""
        for sample in samples:
            self._samples.write({"step": step, **sample})
        if self._wandb:
            self._wandb.log_table(step, "samples", samples)
        self._console.samples(
            step, [sample["prompt"] + sample["completion"] for sample in samples]
        )

    def log_completions(
        self, step: int, rows: list[dict], *, show: bool = True
    ) -> None:
        """Keeps rows of `prompt`, `completion`, rewards (None: without), `advantage`.

        Other keys are kept too. Without `show` neither the console nor wandb has them.
        """
        if self._completions is None:
            self._completions = MetricsFile(
                self._folder / _COMPLETIONS, self._start_step
            )
            self._opened.callback(self._completions.close)
        stepped = [{"step": step, **row} for row in rows]
        for row in stepped:
            self._completions.write(row)
        if not show:
            return
        if self._wandb:
            self._wandb.log_table(step, "completions", stepped)
        self._console.completions(step, rows)

    def log_checkpoint(self, step: int, path: Path) -> None:
        if self._wandb:
            self._wandb.log_checkpoint(step, path)
        self._console.message(f"step {step}  checkpoint {path}")

    def message(self, text: str) -> None:
        self._console.message(text)

    def _log(self, kind: str, step: int, metrics: Metrics) -> None:
        self._metrics.write({"step": step, "kind": kind, **metrics})
        if self._wandb:
            self._wandb.log_metrics(step, metrics)

    def _draw(self) -> None:
        metrics = self._folder / _METRICS
        plot_losses(metrics, self._folder / "loss.png", self._name)
        plot_rewards(metrics, self._folder / "rewards.png", self._name)

    def _finish_wandb(self, exception_type: type | None, *_: object) -> None:
        self._wandb.finish(failed=exception_type is not None)


def _cut_completions(path: Path, resume_step: int | None) -> None:
    """Leaves what `MetricsFile` would leave, but starts no file: few runs need one."""
    if resume_step is None:
        path.unlink(missing_ok=True)
    else:
        cut_back(path, resume_step)
