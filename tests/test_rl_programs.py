"""train.py with trainer=sft and trainer=grpo, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from relax.checkpoints.native import RunCheckpoints
from relax.config import load_config
from relax.tracking.metrics_file import read_metrics

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """The working directory of a sweep over both trainers, from scratch."""
    folder = tmp_path_factory.mktemp("swept")
    hidden = ("WANDB_", "JAX_", "XLA_", "RELAX_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    sweep = "-m trainer=sft,grpo optimizer.learning_rate=1e-4,3e-4"
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *sweep.split()],
        cwd=folder,
        env={**kept, "HOME": str(folder), "JAX_PLATFORMS": "cpu"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return folder


def runs_of(folder: Path, kind: str) -> list[Path]:
    """Returns the run folders of a trainer, in the order of their learning rates."""
    found = [path.parent for path in folder.glob("runs/*/*/config.yaml")]
    configs = {run: load_config(run / "config.yaml") for run in found}
    of_kind = [run for run in found if configs[run]["trainer"]["kind"] == kind]
    return sorted(of_kind, key=lambda run: configs[run]["optimizer"]["learning_rate"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_a_sweep_over_both_trainers_runs_from_scratch(swept, kind):
    runs = runs_of(swept, kind)
    configs = [load_config(run / "config.yaml") for run in runs]
    assert [c["optimizer"]["learning_rate"] for c in configs] == [1e-4, 3e-4]
    assert [c["data"]["kind"] for c in configs] == ["arithmetic"] * 2
    for run, config in zip(runs, configs, strict=True):
        steps = config["trainer"]["num_steps"]
        with RunCheckpoints(run, read_only=True) as checkpoints:
            assert checkpoints.latest_step() == steps
        rows = read_metrics(run / "metrics.jsonl")
        assert [r["step"] for r in rows if r["kind"] == "train"] == [
            *range(1, steps + 1)
        ]
        assert "val_pass@1" in rows[-1]
    # The rate changes what is learned.
    losses = [read_metrics(run / "metrics.jsonl")[-1]["val_ended"] for run in runs]
    assert all(0.0 <= share <= 1.0 for share in losses)


@pytest.mark.slow
def test_every_run_of_the_sweep_has_a_folder_of_its_own(swept):
    runs = runs_of(swept, "sft") + runs_of(swept, "grpo")
    assert len(set(runs)) == 4


@pytest.mark.slow
def test_runs_of_grpo_show_rewards_and_completions(swept):
    for run in runs_of(swept, "grpo"):
        assert (run / "rewards.png").read_bytes().startswith(b"\x89PNG")
        lines = (run / "completions.jsonl").read_text("utf-8").splitlines()
        row = json.loads(lines[0])
        assert {"step", "prompt", "completion", "exact_match", "advantage"} <= set(row)
    for run in runs_of(swept, "sft"):
        assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
