"""experiments/bench: the benchmarks run at tiny sizes and compare equal work."""

import re
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).parents[2] / "experiments" / "bench"
TINY_MODEL = [
    "model.hidden_size=24",
    "model.intermediate_size=40",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=3",
    "model.num_key_value_heads=1",
    "model.vocab_size=64",
    "batch_size=2",
    "context=7",
    "warmup=1",
    "rounds=2",
    "steps=1",
    "memory_steps=1",
]


@pytest.fixture
def relax_side(monkeypatch):
    """The module, without what it sets for its whole process."""
    import relax_side

    monkeypatch.setattr(relax_side, "configure", lambda config: None)
    return relax_side


@pytest.fixture
def torch_side():
    """The module, where PyTorch and transformers are installed."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import torch_side

    return torch_side


@pytest.mark.parametrize("layout", ["true", "false"])
def test_train_step_prints_ratios_of_equal_work(relax_side, torch_side, capsys, layout):
    import common
    import train_step

    overrides = [*TINY_MODEL, f"model.scan_layers={layout}"]
    config = common.load("train_step", overrides)
    seconds = train_step.compare(config)
    train_step.report(config, seconds, {"relax": (3 * 2**20, 2**20)})
    printed = capsys.readouterr().out
    assert list(seconds) == ["relax", "pytorch", "pytorch, fused AdamW"]
    assert all(len(times) == 2 for times in seconds.values())
    assert "relax / pytorch, tokens/s: " in printed
    assert "3 MiB peak, 1 of it before the model" in printed


def test_both_sides_learn_alike(relax_side, torch_side):
    """Equal losses after five steps: clip, decay and moments agree too."""
    import common

    config = common.load("train_step", [*TINY_MODEL, "optimizer.clip_norm=0.5"])
    ours = relax_side.TrainStep(config)
    theirs = torch_side.TrainStep(config, ours.weights())
    assert ours.run(5) == pytest.approx(theirs.run(5), abs=1e-5)


def test_sides_that_differ_are_refused(relax_side, torch_side, monkeypatch):
    import common
    import train_step

    config = common.load("train_step", TINY_MODEL)
    weights = relax_side.TrainStep.weights
    spoilt = {"model.norm.weight": np.full(24, 1.5, np.float32)}
    monkeypatch.setattr(
        relax_side.TrainStep, "weights", lambda side: {**weights(side), **spoilt}
    )
    with pytest.raises(ValueError, match="first losses differ"):
        train_step.compare(config)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["relax_side", "torch_side"])
def test_peak_memory_is_that_of_a_fresh_process(module):
    pytest.importorskip("transformers")
    import common

    config = common.load("train_step", TINY_MODEL)
    peak, imports = common.peak_memory(module, config, steps=1)
    assert peak > imports > 2**20


def test_attention_prints_ratios_of_equal_work(monkeypatch, capsys):
    pytest.importorskip("torch")
    import attention

    monkeypatch.setattr(attention, "configure", lambda config: None)
    monkeypatch.setattr(attention, "use_cores", lambda count: None)
    sizes = ["num_heads=6", "head_dim=10", "kv_heads=[1,3,6]", "batch_size=2"]
    shapes = ["context=7", "cache_slots=11", "train_calls=1", "decode_calls=3"]
    attention.main([*sizes, *shapes, "warmup=1", "rounds=2"])
    printed = capsys.readouterr().out
    assert printed.count("/ torch enable_gqa ") == 9
    assert "decode, 3 kv heads, cache of 0.0 MiB" in printed


SMALL_LOAD = [
    "model.hidden_size=512",
    "model.intermediate_size=1536",
    "model.num_hidden_layers=5",
    "model.num_attention_heads=8",
    "model.num_key_value_heads=2",
    "model.vocab_size=1024",
    "cases=[[bfloat16,float32]]",
    "shards=[2]",
    "keep_freed_memory=[false]",
]


def test_load_stays_within_its_bound(monkeypatch, capsys):
    import load

    monkeypatch.setattr(load, "PEER", "nothing_installed")
    assert load.main(SMALL_LOAD) == 0
    printed = capsys.readouterr().out
    assert "bfloat16 in 2 files as float32, relax, keep_freed_memory=false" in printed
    assert printed.count("\n") == 1
    peak, size = (
        int(re.search(rf"{name} (\d+)", printed)[1]) for name in ("peak", "parameters")
    )
    assert size == 60
    assert peak >= 0.95 * size  # the whole model was there, and was seen


@pytest.mark.slow
def test_load_measures_transformers_alike(tmp_path):
    pytest.importorskip("transformers")
    import load

    config = load.load_config("load", SMALL_LOAD)
    _, peer = load.plan(config)
    size = load.target_of(load.model_config(config, "float32")).size
    load.write_checkpoint(tmp_path / "weights", config, "bfloat16", 2)
    usage = load.run(config, peer, tmp_path / "weights")
    assert peer.loader == "transformers"
    assert 0.95 * size < usage.peak < 2 * size


@pytest.mark.parametrize(("above", "code"), [(0, 0), (1, 1)])
def test_load_fails_above_its_bound(monkeypatch, capsys, above, code):
    """In bytes: 2 layers of 24x40, the largest of all, and what holds all layers."""
    import load

    numbers = 64 * 24 + 2 * (2 * 24 * 24 + 2 * 24 * 8 + 3 * 24 * 40 + 2 * 24) + 24
    bound = 4 * (numbers + 2 * 2 * 24 * 40)
    monkeypatch.setattr(load, "PEER", "nothing_installed")
    monkeypatch.setattr(load, "run", lambda *_: load.Usage(bound + above, 2.0))
    sizes = [override for override in TINY_MODEL if override.startswith("model.")]
    cases = ["cases=[[float32,float32]]", "shards=[1]", "keep_freed_memory=[true]"]
    assert load.main([*sizes, *cases]) == code
    assert "peak / bound of 0: 1.00; 2.00 s, " in capsys.readouterr().out


def test_cores_that_are_not_there_are_refused():
    import common

    with pytest.raises(ValueError, match="threads=100000 needs as many cores"):
        common.use_cores(100000)


def test_speed_ratio_is_taken_round_by_round():
    import common

    assert common.speed_ratio([2.0, 1.0, 4.0], [1.0, 1.0, 8.0]) == "1.00 (0.50 to 2.00)"


def test_profile_names_the_work(relax_side, capsys):
    import common
    import profile_step

    config = common.load("train_step", TINY_MODEL)
    step = relax_side.TrainStep(config)
    step.run(1)
    events = profile_step.trace(step, steps=2)
    profile_step.report(step, events, 2, 0.0)
    printed = capsys.readouterr().out
    for kind in ("mlp projections, backward", "attention, forward", "optimizer"):
        assert kind in printed


PROGRAM = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/user/relax/ops/rope.py"
2 "/usr/lib/jax/lax.py"

FunctionNames
1 "rotate"
2 "mul"

FileLocations
1 {file_name_id=1 function_name_id=1 line=41 end_line=41 column=4 end_column=9}
2 {file_name_id=2 function_name_id=2 line=7 end_line=7 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

ENTRY %main (x: f32[5]) -> f32[5] {
  %x = f32[5]{0} parameter(0)
  %loop = (s32[], f32[5]{0}) while(%x), condition=%c, body=%b
  ROOT %mul.3 = f32[5]{0} multiply(%x, %x), metadata={op_name="jit(step)/jvp(llama)/\
mul" stack_frame_id=2}
}
"""


def test_an_operation_is_traced_to_its_source():
    import hlo
    import profile_step

    operations = hlo.parse(PROGRAM)
    multiply = operations["mul.3"]
    assert operations["loop"].opcode == "while"
    assert (multiply.shape, multiply.path) == ("f32[5]", "jit(step)/jvp(llama)/mul")
    assert [frame.line for frame in multiply.frames] == [7, 41]
    assert multiply.source() == ("/home/user/relax/ops/rope.py", "rotate", 41)
    assert profile_step.kind_of(multiply) == "rope, forward"


def test_time_is_shared_by_the_operations_in_flight():
    """Loops are left out, and what outlives its dispatch runs to its end."""
    import hlo
    import profile_step

    operations = {
        name: hlo.Operation(name, "f32[]", opcode, "", ())
        for name, opcode in (("dot", "dot"), ("add", "add"), ("loop", "while"))
    }
    events = [
        {"ph": "X", "name": "loop", "ts": 0, "dur": 100},
        {"ph": "X", "name": "dot", "ts": 10, "dur": 1},
        {"ph": "X", "name": "add", "ts": 14, "dur": 2},
        {"ph": "X", "name": "end: dot", "ts": 20, "dur": 0},
        {"ph": "X", "name": "dot", "ts": 30, "dur": 5},
    ]
    intervals = list(profile_step.find_intervals(events, operations))
    assert profile_step.divide(intervals) == {
        "dot": 4 + 1 + 4 + 5,
        "add": 1,
        profile_step.IDLE: 10,
    }
