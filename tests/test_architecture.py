"""Who may import whom (docs/architecture.md), and how long files and functions get."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PROGRAMS = ("train.py", "infer.py")
SOURCES = {
    str(path.relative_to(REPOSITORY)): path.read_text(encoding="utf-8")
    for path in [
        *sorted((REPOSITORY / "relax").rglob("*.py")),
        *(REPOSITORY / program for program in PROGRAMS),
    ]
}

ALONE = ("ops", "optim", "sharding", "data", "rewards", "text", "tracking")
LOSSES = {"losses", "policy_losses", "advantages"}
PARTS = {*ALONE, *LOSSES, "sampling", "model", "generation", "steps", "checkpoints"}
# Room -> the rooms that it may import besides itself; "relax" is the public API.
ROOMS = {
    **{room: set() for room in (*ALONE, "runtime", "config")},
    **{room: set() for room in ("policy_losses", "advantages")},
    **{room: {"ops"} for room in ("model", "losses", "sampling")},
    "generation": {"model", "sampling", "ops", "sharding", "text"},
    "steps": {"losses", "policy_losses", "model", "ops"},
    "checkpoints": {"model", "ops", "sharding"},
    "language_model": PARTS - LOSSES - {"data", "optim", "rewards", "tracking"},
    "trainers": PARTS,
    "tasks": PARTS | {"language_model"},
    "build": PARTS | {"language_model", "config"},
    "resuming": {"trainers"},
    "base_model": PARTS | {"build", "language_model"},
    "run_folder": {"config"},
    "training": PARTS
    | {
        *("base_model", "build", "config", "language_model", "resuming"),
        *("run_folder", "runtime", "trainers"),
    },
    "inference": PARTS | {"build", "config", "runtime", "language_model", "tasks"},
    "cli": {"trainers"},
    "relax": {"build", "language_model", "sampling"},
    "train": {"training", "config", "cli"},
    "infer": {"inference", "config", "cli"},
}
# Library -> the only files that may import it.
LIBRARIES = {
    "haiku": ["relax/model/*"],
    "omegaconf": ["relax/config.py"],
    "hydra": PROGRAMS,
    "wandb": ["relax/tracking/wandb_logger.py"],
    "pebble": ["relax/rewards/scorer.py"],
    "experiments": [],
    "tests": [],
}


def room_of(path: str) -> str:
    """Returns the room of a file, or of a dotted module of ours."""
    parts = path.removesuffix(".py").replace("/", ".").split(".")
    names = [part for part in parts if part not in ("relax", "__init__")]
    return names[0] if names else "relax"


def imported_modules(source: str) -> Iterator[str]:
    """Yields the dotted names of all that a file imports, wherever it does so."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom):
            within = node.module == "relax"
            yield from (
                f"relax.{name.name}" if within else node.module for name in node.names
            )


def breaches(path: str, source: str) -> list[str]:
    """Returns a line for each import that the table does not allow."""
    room, found = room_of(path), []
    for module in sorted(set(imported_modules(source))):
        top = module.split(".")[0]
        if not top:
            found.append(f"{path} imports {module}: write the whole name")
        elif top == "relax" and room_of(module) not in {room, *ROOMS[room]}:
            found.append(f"{path} imports {module}: {room} may not")
        elif top in LIBRARIES and not any(fnmatch(path, p) for p in LIBRARIES[top]):
            found.append(f"{path} imports {module}: {LIBRARIES[top]} may, no other")
    return found


def test_every_room_has_its_line_in_the_table():
    assert {room_of(path) for path in SOURCES} == set(ROOMS)


def test_every_file_imports_what_its_room_may():
    assert [
        breach for path in SOURCES for breach in breaches(path, SOURCES[path])
    ] == []


@pytest.mark.parametrize(
    ("path", "planted"),
    [
        ("relax/ops/norm.py", "from relax.model.config import LlamaConfig"),
        ("relax/ops/norm.py", "import relax.sharding"),
        ("relax/data/windows.py", "from relax import text"),
        ("relax/trainers/loop.py", "def f():\n    from relax.build import load"),
        ("relax/steps.py", "import haiku as hk"),
        ("relax/training.py", "from omegaconf import OmegaConf"),
        ("relax/training.py", "from hydra.core.hydra_config import HydraConfig"),
        ("relax/tracking/console.py", "import wandb"),
        ("relax/losses.py", "from experiments.bench import common"),
        ("relax/losses.py", "import tests"),
        ("relax/model/block.py", "from . import layers"),
        ("train.py", "from relax.trainers import pretrain"),
    ],
)
def test_a_planted_breach_is_caught(path, planted):
    assert len(breaches(path, f"import jax\n{planted}\n")) == 1


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("relax/model/block.py", "import haiku as hk\nfrom relax.ops import norm"),
        ("relax/config.py", "from omegaconf import OmegaConf"),
        ("train.py", "import hydra\nfrom relax import training"),
        ("infer.py", "from hydra.core.hydra_config import HydraConfig"),
        ("relax/tracking/wandb_logger.py", "def f():\n    import wandb"),
    ],
)
def test_what_is_allowed_passes(path, allowed):
    assert breaches(path, allowed) == []


def test_files_stay_short():
    sizes = {path: len(source.splitlines()) for path, source in SOURCES.items()}
    limits = {path: 60 if path in PROGRAMS else 400 for path in SOURCES}
    assert {path: size for path, size in sizes.items() if size > limits[path]} == {}


def test_functions_stay_short():
    sizes = [
        (node.end_lineno - node.lineno + 1, node.name, path)
        for path, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    assert [function for function in sizes if function[0] > 60] == []
