"""experiments/bench/{sft,grpo}.py: both sides run at tiny sizes."""

import os
import re
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "experiments" / "bench"
RATIO = r"\d+\.\d\d \(\d+\.\d\d to \d+\.\d\d\)"
SIZES = ["rounds=2", "warmup=1", "threads=1"]

pytestmark = [
    pytest.mark.slow,  # TRL takes 10 s to import
    pytest.mark.filterwarnings("ignore"),  # the peer's own
]


@pytest.fixture
def run(data_dir, monkeypatch, capsys):
    """A callable: what a script prints."""
    pytest.importorskip("trl")
    import common
    import trainer_side

    monkeypatch.setattr(common, "use_cores", lambda count: None)
    monkeypatch.setattr(trainer_side, "configure", lambda config: None)
    monkeypatch.setitem(os.environ, "RELAX_DATA_DIR", str(data_dir))

    def main(module, *sizes):
        module.main([*SIZES, *sizes])
        return capsys.readouterr().out

    return main


def test_a_step_of_grpo_is_timed_on_both_sides(run):
    import grpo

    out = run(grpo, "prompts=2", "generations=2", "new_tokens=5", "accumulation=2")
    assert "2 prompts, 2 completions each of at most 5 tokens, 1 threads" in out
    for side in ("relax", "trl"):
        assert re.search(
            rf"^{side} +[\d.,]+ completions/s +[\d.,]+ ms/step$", out, re.M
        )
        assert re.search(
            rf"^{side} .*completions/mean_length 5\.0000, reward", out, re.M
        )
    for bar in ("bar 2.00", "goal 3.00"):
        assert re.search(rf"^relax / trl: {RATIO}, {bar}: (met|missed)$", out, re.M)
    with pytest.raises(ValueError, match="prompts=65: there are 64"):
        grpo.make_prompts(65)
    assert len(set(grpo.make_prompts(64))) == 64


def test_a_step_of_sft_is_timed_on_both_sides(run):
    import sft

    out = run(sft, "rows=3", "context=16", "characters=200", "accumulation=3")
    assert "3 rows of 16 tokens, 1 threads" in out
    for side in ("relax", "trl"):
        assert re.search(rf"^{side} +[\d.,]+ rows/s +[\d.,]+ ms/step$", out, re.M)
        assert re.search(rf"^{side} +loss \d", out, re.M)
    assert re.search(rf"^relax / trl: {RATIO}, bar 1.00: (met|missed)$", out, re.M)
