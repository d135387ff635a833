"""The README's main job, run as it is written, reaches the loss it promises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
BAR, PEER, TOKENS = 1.60, 1.886, 1_600_000  # nats; nanoGPT's CPU recipe; tokens


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The default run on the whole corpus, and what its metrics say."""
    folder = tmp_path_factory.mktemp("default") / "run"
    command = ["train.py", "model=tiny", "data=shakespeare", f"run_folder={folder}"]
    environment = {"RELAX_DATA_DIR": str(data_dir)}
    subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        env={**os.environ, **environment},
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return folder, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_default_run_reaches_its_loss_within_its_tokens(finished):
    _, rows = finished
    assert max(row.get("tokens", 0) for row in rows) <= TOKENS
    final = [row for row in rows if row["kind"] == "eval"][-1]
    assert final["val_loss"] <= BAR


@pytest.mark.slow
def test_default_run_passes_the_peer_within_its_first_third(finished):
    _, rows = finished
    steps = max(row["step"] for row in rows)
    early = [r for r in rows if r["kind"] == "eval" and r["step"] <= steps / 3]
    assert min(row["val_loss"] for row in early) < PEER


@pytest.mark.slow
def test_what_was_trained_speaks_in_words_of_the_corpus(finished, data_dir):
    folder, _ = finished
    result = subprocess.run(
        [sys.executable, "infer.py", f"checkpoint={folder}", "sampling.top_p=0.9"],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    corpus = (data_dir / "tinyshakespeare.txt").read_text()
    words = result.stdout.split()
    known = set(corpus.split())
    assert len(words) > 20
    assert sum(word in known for word in words) / len(words) > 0.5
