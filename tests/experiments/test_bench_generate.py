"""experiments/bench/generate.py: every case runs at tiny sizes and checks its work."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from relax.model.parameters import parameter_shapes

SCRIPTS = Path(__file__).parents[2] / "experiments" / "bench"
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": 61,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "param_dtype": "float32",
}
# One model, and few shapes of it: compiling is what takes the time.
OVERRIDES = [
    "model@small_model=smollm_135m",
    "model@gpu_model=smollm_135m",
    *(
        f"{group}.{name}={value}"
        for group in ("model", "small_model", "gpu_model")
        for name, value in SIZES.items()
    ),
    "warmup=1",
    "rounds=2",
    *(f"batch1.{name}=5" for name in ("shortest", "longest", "new_tokens")),
    "batch8={rows:4,shortest:5,longest:5,new_tokens:7,bar:1.0}",
    "ragged16={rows:4,shortest:2,longest:19,new_tokens:7,bar:1.3,rounds:2}",
    "prefill.lengths=[5,11]",
    "allocation={used:13,few:64,many:128,new_tokens:6,bar:1.15}",
    *(
        f"{name}={{prompts:11,shortest:2,longest:9,mean:4,cap:13,slots:4,bar:2.0,"
        "rounds:2}"
        for name in ("continuous_small", "continuous")
    ),
    "prefix={prompts:5,common:41,own:3,new_tokens:4,slots:4,bar:3.0,rounds:2}",
    "speculation={period:3,prompt:17,new_tokens:19,draft:4,loops:0.001,rounds:2}",
    "gpu={copy_mib:1,prompt:5,new_tokens:6,goal:0.7,requests:5,shortest:3,longest:7,"
    "slots:4,rounds:2}",
]
RATIO = r"\d+\.\d\d \(-?\d+\.\d\d to -?\d+\.\d\d\)"


@pytest.fixture(scope="module")
def kept():
    """The models of the cases, which so share what they compiled."""
    return {}


@pytest.fixture
def run(kept, monkeypatch, capsys):
    """A callable: what `generate.py` prints for one case."""
    import generate
    import generate_sides

    monkeypatch.setattr(generate, "use_cores", lambda count: None)
    monkeypatch.setattr(generate, "configure", lambda config: None)
    make = generate_sides.random_model

    def model_of(fields, seed):
        key = repr((*fields.items(), seed))
        if key not in kept:
            kept[key] = make(fields, seed)
        return kept[key]

    monkeypatch.setattr(generate_sides, "random_model", model_of)

    def main(case):
        generate.main([*OVERRIDES, f"cases=[{case}]"])
        return capsys.readouterr().out

    return main


@pytest.fixture
def peer():
    """Skips where PyTorch and transformers are not installed."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("case", "rows", "bar"),
    [("batch1", 1, 1.2), ("batch8", 4, 1.0), ("ragged16", 4, 1.3)],
)
def test_completions_are_those_of_transformers(run, peer, case, rows, bar):
    printed = run(case)
    assert f"same tokens: {rows} of {rows} rows" in printed
    assert re.search(rf"relax / transformers: {RATIO}, bar {bar:.2f}: m", printed)


def test_prefill_is_measured_per_length(run, peer):
    printed = run("prefill")
    assert printed.count("same tokens: 1 of 1 rows") == 2
    assert "1 prompt of 5 tokens, 1 new" in printed
    assert "1 prompt of 11 tokens, 1 new" in printed
    assert len(re.findall(rf"{RATIO}, bar 0.90: m", printed)) == 2


def test_sides_that_differ_are_refused(run, peer, monkeypatch):
    import generate_sides

    complete = generate_sides.Transformers.complete

    def spoilt(side, prompts, new_tokens):
        return [row[::-1] for row in complete(side, prompts, new_tokens)]

    monkeypatch.setattr(generate_sides.Transformers, "complete", spoilt)
    with pytest.raises(ValueError, match=r"row 0 parts at new token 0: .* different"):
        run("batch1")


def test_a_row_that_ends_early_is_refused(kept, run, peer):
    from generate_sides import Transformers

    run("batch1")
    model = next(iter(kept.values()))
    side = Transformers(model, threads=1)
    tokens = side.complete([[5, 3]], 7)[0]
    first = tokens.index(tokens[3])
    side._model.generation_config.eos_token_id = tokens[3]
    with pytest.raises(ValueError, match=rf"made \[{first + 1}\] tokens, not \[7\]"):
        side.complete([[5, 3]], 7)


def test_a_near_tie_is_no_difference(capsys):
    import generate_sides

    class Model:
        @staticmethod
        def logits(tokens):
            assert tokens.tolist() == [[8, 1]]
            return np.asarray([[[0.0] * 3, [0.5, 0.50005, 0.6]]])

    generate_sides.check_same(Model, [[8]], [[1, 0, 2]], [[1, 1, 0]])
    assert "same tokens: 0 of 1 rows, 1 up to a near-tie" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"new token 1: 0 and 2, .* differ by 1\.0e-01"
    ):
        generate_sides.check_same(Model, [[8]], [[1, 0, 2]], [[1, 2, 0]])


def test_allocation_compares_decoding_alone(run):
    printed = run("allocation")
    assert "1 prompt of 10 tokens, 6 new, 64 and 128 slots" in printed
    assert "same tokens: 1 of 1 rows" in printed
    assert re.search(
        rf"time with 128 / 64 slots: -?{RATIO}, bar at most 1.15: m", printed
    )


@pytest.mark.parametrize("case", ["continuous_small", "continuous"])
def test_refilled_slots_give_what_batches_give(run, case):
    printed = run(case)
    assert "same tokens: 11 of 11 rows" in printed
    assert re.search(
        r"11 prompts of \d to \d tokens, \d+ new: \d to \d+, mean", printed
    )
    assert re.search(rf"refilled slots / batches: {RATIO}, bar 2.00: m", printed)
    assert "compiled while timed" not in printed


def test_steps_of_refilled_slots_and_of_batches():
    """Two slots: 5 and 1 beside 2, 3 and 1; batches wait for 5, 3 and 1."""
    from generate_self import decode_steps

    assert decode_steps([5, 2, 3, 1, 1], 2) == (6, 5 + 3 + 1)


def test_a_shared_prefix_is_counted(run):
    printed = run("prefix")
    assert "same tokens: 5 of 5 rows" in printed
    shared = int(re.search(r"(\d+) of 220 prompt tokens were shared", printed)[1])
    assert 0 < shared <= 4 * 41
    assert re.search(rf"shared / on their own: {RATIO}, bar 3.00: m", printed)


def test_speculation_is_counted(run):
    printed = run("speculation")
    assert printed.count("same tokens: 1 of 1 rows") == 2
    found = re.findall(r"distinct of 19 new tokens: accepted (\d+) of (\d+)", printed)
    accepted, drafted = zip(*((int(a), int(b)) for a, b in found), strict=True)
    assert all(a <= b for a, b in zip(accepted, drafted, strict=True))
    assert accepted[1] > 0
    assert len(re.findall(rf"speculating / plain: {RATIO}, no bar", printed)) == 2


def test_gpu_is_left_out_elsewhere(run):
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    assert "left out: it needs a GPU, and this is cpu" in run("gpu")


def test_what_a_gpu_is_asked_for_runs(run, monkeypatch):
    import generate_gpu

    monkeypatch.setattr(generate_gpu, "has_gpu", lambda: True)
    printed = run("gpu")
    # 61 rows padded to 64, 2 layers, tied.
    layer = 2 * 24 * 24 + 2 * 24 * 8 + 3 * 24 * 40 + 2 * 24
    assert "copying 1 MiB: " in printed
    assert f"{4 * (64 * 24 + 2 * layer + 24) / 1e9:.2f} GB of weights each" in printed
    assert re.search(rf"share of the bandwidth: -?{RATIO}, goal 0.70: m", printed)
    assert re.search(r"5 prompts of \d to \d tokens, \d to \d new, 4 slots: ", printed)


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_one_table_of_the_vocabulary(make_config, tied):
    from generate_gpu import weight_bytes

    config = make_config(tie_word_embeddings=tied)
    zeros = jax.tree.map(
        lambda leaf: np.zeros(leaf.shape, leaf.dtype), parameter_shapes(config)
    )
    model = SimpleNamespace(config=config, params=zeros)
    layer = 2 * 28 * 60 + 2 * 28 * 20 + 3 * 28 * 44 + 2 * 28
    assert weight_bytes(model) == 4 * (128 * 28 + 3 * layer + 28)


def test_unknown_cases_are_refused(run):
    with pytest.raises(
        ValueError, match=r"cases=\['batch2'\] are unknown; choose of b"
    ):
        run("batch2")
