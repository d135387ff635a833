"""The checkpoints of a training run, written in the background through orbax.

A run folder holds `checkpoints/<step>/`, and a step three items: `params`,
`optimizer` (every other field of the train state) and `info` (JSON), so that
inference reads parameters without the optimizer's arrays.
"""

import json
import logging
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
CHECKPOINTS = "checkpoints"
INFO = "info.json"
UNFINISHED = ".orbax-checkpoint-tmp"  # orbax's suffix of a folder not yet complete

logger = logging.getLogger(__name__)


class RunCheckpoints(AbstractContextManager):
    """The checkpoints of one run folder: the best by val_loss and the last few.

    Use it in a `with` block: a program that ends while a checkpoint is being written
    loses that one (never an earlier one) unless `close` has waited for it. Only one
    process at a time may write to a run folder: opening it removes unfinished steps.
    """

    def __init__(
        self, run_folder: Path, *, keep_last: int = 1, read_only: bool = False
    ) -> None:
        self.folder = (Path(run_folder) / CHECKPOINTS).absolute()
        self._read_only = read_only
        self._manager = _make_manager(self.folder, keep_last)
        if not read_only:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        try:
            self.close()
        except OSError as failure:
            if error is None:
                raise
            logger.error("%s", failure)  # and the program's own error goes on

    def save(
        self, step: int, state: PyTree, metrics: dict[str, float] | None, info: dict
    ) -> Path:
        """Starts writing a checkpoint and returns the folder that it will fill.

        `state` has a field or key `params`; it may be donated as soon as this returns.
        `metrics["val_loss"]` ranks the checkpoint; `info` is kept as JSON. Raises
        OSError where the previous checkpoint was not written or this one not begun,
        ValueError where the step is not later than the last one.
        """
        import orbax.checkpoint as ocp

        assert not self._read_only, self.folder
        self.wait()
        if later := [saved for saved in self.steps() if saved >= step]:
            raise ValueError(
                f"step {step} cannot be saved: {self.folder} already holds {later}; "
                f"delete_after({step - 1}) takes the run back"
            )
        trees = _items(jax.tree.map(_unaliased, state)).items()
        items = {item: ocp.args.StandardSave(tree) for item, tree in trees}
        items["info"] = ocp.args.JsonSave(json.loads(json.dumps(info)))
        args = ocp.args.Composite(**items)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        self._manager.save(step, args=args, metrics=metrics, force=True)
        return self.folder / str(step)

    def wait(self) -> None:
        """Returns once everything is on disk; raises OSError if writing failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # orbax passes on whatever its writer raised
            self._sweep()
            raise OSError(f"writing {self.folder} failed: {_cause(error)}") from error

    def close(self) -> None:
        """Waits and ends the background threads; raises what `wait` raises."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps whose checkpoints are complete on disk, in order."""
        return _steps_in(self.folder)

    def latest_step(self) -> int | None:
        """Returns the last complete step, or None where there is none."""
        return max(self.steps(), default=None)

    def best_step(self) -> int | None:
        """Returns the step of the lowest val_loss, of equals the latest, or None."""
        metrics = {step: self._manager.metrics(step) or {} for step in self.steps()}
        losses = {k: _val_loss(v) for k, v in metrics.items() if "val_loss" in v}
        return min(losses, key=lambda step: (losses[step], -step), default=None)

    def step_named(self, name: str) -> int:
        """Returns the step that "best", "last" or a number stands for, or ValueError.

        "best" is the last one, and a warning, where no checkpoint has a val_loss.
        """
        steps = self.steps()
        best = self.best_step() if name == "best" else None
        if name == "best" and best is None and steps:
            logger.warning("no val_loss in %s: taking the last step", self.folder)
        if name in ("best", "last") and steps:
            return steps[-1] if best is None else best
        if name.isdecimal() and int(name) in steps:
            return int(name)
        raise ValueError(f"{self.folder} holds no step {name!r}; it holds {steps}")

    def restore(self, step: int, abstract_state: PyTree) -> PyTree:
        """Returns the train state of a step, bit for bit, on the shardings asked for.

        The leaves of `abstract_state` are `jax.ShapeDtypeStruct`s with a sharding; the
        mesh may be another than the one that saved. Raises ValueError where there is no
        such step or it holds other arrays, OSError where the checkpoint is damaged.
        """
        restored = self._restore(step, _items(abstract_state), cast=False)
        return type(abstract_state)(params=restored["params"], **restored["optimizer"])

    def restore_params(self, step: int, abstract_params: PyTree) -> PyTree:
        """Returns the parameters alone, cast to the dtypes asked for; see `restore`."""
        return self._restore(step, {"params": abstract_params}, cast=True)["params"]

    def info(self, step: int) -> dict:
        """Returns the JSON that was saved with a step; raises as `restore` does."""
        with self._reading(step) as folder:
            return json.loads((folder / "info" / INFO).read_text())

    def delete_after(self, step: int) -> None:
        """Removes the checkpoints later than `step`, where the run is taken up."""
        assert not self._read_only, self.folder
        self.wait()
        # Renamed first: a kill between two files leaves no half checkpoint in view.
        for later in reversed([later for later in self.steps() if later > step]):
            (self.folder / str(later)).rename(self.folder / f"{later}{UNFINISHED}")
        self._sweep()

    def _restore(self, step: int, wanted: dict[str, PyTree], *, cast: bool) -> Any:
        import orbax.checkpoint as ocp

        with self._reading(step) as folder:
            items = self._manager.item_metadata(step)
            stored = {item: items[item].tree for item in wanted}
        flat = [ocp.tree.to_flat_dict(tree, sep="/") for tree in (stored, wanted)]
        # Orbax itself finds a misfit while it reads, and complains on stderr.
        if misfits := _misfits(*flat, cast=cast):
            raise ValueError(
                f"checkpoint {folder} was saved with another configuration; use that "
                f"({len(misfits)} arrays differ: {'; '.join(misfits[:3])})"
            )
        args = {item: ocp.args.StandardRestore(tree) for item, tree in wanted.items()}
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(**args))

    @contextmanager
    def _reading(self, step: int) -> Iterator[Path]:
        self.wait()
        folder = self.folder / str(self.step_named(str(step)))
        try:
            yield folder
        except Exception as error:  # orbax raises plain Exception for a damaged array
            raise OSError(
                f"checkpoint {folder} cannot be read: {_cause(error)}; "
                f"if it is damaged, take another of {self.steps()}"
            ) from error

    def _sweep(self) -> None:
        for folder in self.folder.glob(f"*{UNFINISHED}"):
            shutil.rmtree(folder, ignore_errors=True)
        self._manager.reload()


def resolve_run(
    reference: str, runs_folder: Path = Path("runs"), option: str = "checkpoint"
) -> tuple[Path, str]:
    """Returns the run folder and the name of the step that a reference stands for.

    A reference is `latest` (the run under `runs_folder`, at most three folders deep,
    with the newest checkpoint), a run folder, its checkpoints folder or one step's
    folder; `@best`, `@last` or `@<step>` may follow. The step's name is one for
    `RunCheckpoints.step_named`, "best" where none is given. Raises FileNotFoundError
    where there is no complete checkpoint, ValueError where it has no such step; both
    name the `option` that gave the reference.
    """
    place, name = re.fullmatch(r"(.*?)(?:@(best|last|\d+))?", reference).groups()
    folder = _newest(runs_folder) if place == "latest" else Path(place)
    if not name and folder.name.isdecimal() and folder.parent.name == CHECKPOINTS:
        folder, name = folder.parent, folder.name
    folder = folder if folder.name == CHECKPOINTS else folder / CHECKPOINTS
    steps = _steps_in(folder)
    if not steps:
        raise FileNotFoundError(
            f"{option}={reference}: no complete checkpoint in {folder}; give latest "
            "or a run folder (with @last, say), or train first: python train.py"
        )
    if name and name.isdecimal() and int(name) not in steps:
        raise ValueError(f"{option}={reference}: {folder} holds only {steps}")
    return folder.parent, name or "best"


def _newest(runs_folder: Path) -> Path:
    """Returns the folder of the newest checkpoint, or the pattern none fits."""
    newest = {
        folder: max((folder / str(step)).stat().st_mtime_ns for step in steps)
        for depth in ("*", "*/*", "*/*/*")
        for folder in runs_folder.glob(f"{depth}/{CHECKPOINTS}")
        if (steps := _steps_in(folder))
    }
    none = runs_folder / "**" / CHECKPOINTS
    return max(newest, key=lambda path: (newest[path], str(path)), default=none)


def _steps_in(folder: Path) -> list[int]:
    """Returns the complete steps: orbax renames a folder to its number when done."""
    names = (params.parent.name for params in folder.glob("*/params"))
    return sorted(int(name) for name in names if name.isdecimal())


def _make_manager(folder: Path, keep_last: int) -> Any:
    """Returns orbax's manager, which keeps the best and the `keep_last` last steps."""
    import orbax.checkpoint as ocp
    from orbax.checkpoint import checkpoint_managers as policies

    logging.getLogger("absl").setLevel(logging.WARNING)
    logging.getLogger("absl").addFilter(_without_traceback)
    best = policies.BestN(get_metric_fn=_val_loss, reverse=True, n=1)
    last = policies.LatestN(keep_last)
    options = ocp.CheckpointManagerOptions(
        create=False,
        best_fn=_val_loss,  # without it no metrics are stored
        preservation_policy=policies.AnyPreservationPolicy([best, last]),
        # So that an unwritable folder raises in save itself.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    handlers = ocp.handlers.create_default_handler_registry(
        params=ocp.StandardCheckpointHandler(),
        optimizer=ocp.StandardCheckpointHandler(),
        info=ocp.JsonCheckpointHandler(INFO),
    )
    return ocp.CheckpointManager(folder, options=options, handler_registry=handlers)


def _val_loss(metrics: dict[str, float]) -> float:
    """Returns the loss to rank by; one that is missing or NaN comes last."""
    loss = metrics.get("val_loss", math.inf)
    return math.inf if math.isnan(loss) else loss


def _items(state: PyTree) -> dict[str, PyTree]:
    """Returns the parameters and the rest of a NamedTuple or dict."""
    rest = state._asdict() if hasattr(state, "_asdict") else dict(state)
    return {"params": rest.pop("params"), "optimizer": rest}


def _unaliased(leaf: jax.Array) -> jax.Array:
    """Returns a copy of an array in host memory, any other as it is.

    Orbax writes host memory out in place, while the next step is donated it.
    """
    device = next(iter(leaf.sharding.device_set))
    return jnp.copy(leaf) if device.platform == "cpu" else leaf


def _misfits(stored: dict, wanted: dict, *, cast: bool) -> list[str]:
    """Returns a phrase for each array that is missing, extra or different."""
    there, here = (
        {k: f"{'' if cast else v.dtype}{list(v.shape)}" for k, v in arrays.items()}
        for arrays in (stored, wanted)
    )
    return [
        f"{k} is {there.get(k, 'missing')} there, {here.get(k, 'missing')} here"
        for k in sorted(there | here)
        if there.get(k) != here.get(k)
    ]


def _cause(error: BaseException) -> str:
    """Returns the first line of what an exception says or, better, its cause."""
    return (str(error.__cause__ or error) or repr(error)).splitlines()[0][:300]


def _without_traceback(record: logging.LogRecord) -> bool:
    """Returns True, having cut what `wait` will raise in the user's own thread."""
    if "orbax" in record.pathname:
        record.exc_info = None
    return True
