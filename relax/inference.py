"""What infer.py runs, from composed config to the task's result."""

from collections.abc import Mapping
from typing import Any

from relax.build import load
from relax.config import to_dataclass
from relax.runtime import RuntimeConfig, configure
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig
from relax.tasks import arc, batch, chat, export, generate, score

TASKS = {
    "generate": (generate.GenerateConfig, generate),
    "chat": (chat.ChatConfig, chat),
    "score": (score.ScoreConfig, score),
    "arc": (arc.ArcConfig, arc),
    "batch": (batch.BatchConfig, batch),
    "export": (export.ExportConfig, export),
}


def start(config: Mapping[str, Any]) -> None:
    """Runs the configured task with the configured checkpoint.

    Raises ValueError or OSError, in one line, where the config can't work.
    """
    kind = config["task"]["kind"]
    if kind not in TASKS:
        raise ValueError(
            f"task.kind={kind!r} is unknown; choose one of {', '.join(TASKS)}"
        )
    config_class, task = TASKS[kind]
    known = {
        *("checkpoint", "adapter", "dtype", "scan_layers", "prompt", "prompts_file"),
        *("input_path", "output_path"),
        *("task", "sampling", "mesh", "runtime"),
    }
    if unknown := sorted(set(config) - known):
        raise ValueError(
            f"{unknown[0]} is no key of the config; known: {', '.join(sorted(known))}"
        )
    scan_layers = config["scan_layers"]
    if not isinstance(scan_layers, bool):
        raise ValueError(f"scan_layers={scan_layers!r} must be true or false")
    task_config = to_dataclass(config_class, config["task"], "task")
    sampling = to_dataclass(SamplingConfig, config["sampling"], "sampling")
    mesh = to_dataclass(MeshConfig, config["mesh"], "mesh")
    configure(to_dataclass(RuntimeConfig, config["runtime"], "runtime"))
    task.check(task_config)
    dtype = config["dtype"] or getattr(task, "DTYPE", None)
    model = load(config["checkpoint"], mesh, dtype, scan_layers, config["adapter"])
    task.run(task_config, model, sampling)
