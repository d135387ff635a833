"""experiments/bench/lora.py runs at a tiny size, and what it says adds up."""

from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "experiments" / "bench"
TINY = [
    "model.hidden_size=24",
    "model.intermediate_size=40",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=3",
    "model.num_key_value_heads=1",
    "model.vocab_size=64",
    "rank=2",
    "batch_size=2",
    "context=7",
    "warmup=0",
    "rounds=1",
]


def test_lora_keeps_moments_of_its_adapters_alone(monkeypatch, capsys):
    import common
    import lora
    import relax_side

    # What it sets is for the whole process.
    monkeypatch.setattr(relax_side, "configure", lambda config: None)
    config = common.load("lora", TINY)
    seconds, memory = lora.compare(config)
    lora.report(config, seconds, memory)
    attention = 24 * 24 + 2 * 24 * 8 + 24 * 24
    layer = attention + 3 * 24 * 40 + 2 * 24
    base = 64 * 24 + 2 * layer + 24
    widths = 2 * (24 + 24) + 2 * (24 + 8) + 3 * (24 + 40)
    adapters = 2 * 2 * widths
    counts = 4 * 3  # of steps done, in the state and in two parts of the optimizer
    states = {name: state for name, (state, _) in memory.items()}
    assert states["full"] == 4 * 3 * base + counts
    assert states["LoRA, rank 2"] == 4 * (base + 3 * adapters) + counts
    printed = capsys.readouterr().out
    assert "LoRA, rank 2 / full, steps/s: " in printed
    assert "(state 0." in printed
