"""experiments/parity: the comparison with transformers, on each family and broken."""

from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "experiments" / "parity"
FAMILIES = (
    "Llama 2",
    "Llama 3.1, scaled RoPE",
    "Llama 3.2, tied, own head width",
    "Llama with biases",
    "Mistral, window",
    "Mistral, no window",
    "Qwen2, window in upper layers",
    "Qwen2, YaRN",
    "Qwen3",
)
SMALLER = {
    "vocab_size": 131,
    "hidden_size": 60,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
}
# Both sides round at the same places, ours less often (its logits stay in float32), and
# a mean over 17,000 logits hardly depends on chance. Seen: 0.78 to 0.94, and up to 1.01
# at the script's own sizes.
ROUNDING_BOUND = 1.1


FINE = {
    "dtype": "float32",
    "logits": 9e-5,
    "mean_logits": 1e-6,
    "hidden": (0.0, 9e-5),
    "hidden_sizes": (1.0, 7.0),
    "padded_logits": 9e-5,
    "agreed": 64,
    "new_tokens": 64,
    "gap": None,
    "rounding": None,
    "peer_rounding": None,
}


@pytest.fixture
def peers():
    """Skips where PyTorch or transformers is not installed."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


@pytest.fixture
def checkpoint(peers, tmp_path):
    """A callable: the folder of a small checkpoint of a family."""
    import families

    def write(family, dtype):
        sizes = families.SIZES | SMALLER
        families.write_checkpoint(tmp_path, family, dtype, sizes)
        return tmp_path

    return write


def test_every_family_is_compared(peers):
    import families

    assert tuple(families.FAMILIES) == FAMILIES
    assert len(FAMILIES) == 9


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_agrees(checkpoint, family):
    import measure

    parity = measure.measure(checkpoint(family, "float32"), "float32")
    assert parity.excesses() == []
    assert max(parity.logits, parity.padded_logits, *parity.hidden) < 1e-4
    assert len(parity.hidden) == 4
    assert (parity.agreed, parity.new_tokens, parity.gap) == (64, 64, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_rounds_no_worse_than_transformers(checkpoint, family):
    import measure

    import relax

    folder = checkpoint(family, "bfloat16")
    model = relax.load(folder, dtype="auto")
    assert model.config.compute_dtype == "bfloat16"
    tokens = measure.make_inputs(model, 64, 1).tokens
    peer = measure.load_peer(folder, "bfloat16")
    rounding, peer_rounding = measure.rounding_errors(model, peer, tokens)
    assert 1e-3 < peer_rounding < 0.2  # it is bfloat16, and the same model
    assert rounding < ROUNDING_BOUND * peer_rounding


def test_a_norm_changed_by_a_thousandth_is_caught(checkpoint):
    import measure

    import relax

    folder = checkpoint("Llama 2", "float32")
    model = relax.load(folder, dtype="float32")
    leaves = model.params["llama/layers_1/block/input_layernorm"]
    leaves["weight"] *= 1.001
    inputs = measure.make_inputs(model, 64, new_tokens=4)
    parity = measure.compare(model, measure.load_peer(folder, "float32"), inputs)
    assert parity.logits > 10 * measure.TOLERANCE
    caught = " ".join(parity.excesses())
    assert "logits are" in caught and "left-padded logits are" in caught
    # The second layer's norm: what comes before that layer is untouched.
    assert parity.hidden[1] < 1e-4
    assert "hidden states 1 are" not in caught and "hidden states 2 are" in caught


@pytest.mark.parametrize(
    ("change", "excess"),
    [
        ({}, None),
        ({"logits": 1.1e-4}, "logits are 1.1e-04 apart, more than 1.0e-04"),
        ({"logits": float("nan")}, "logits are nan apart, more than 1.0e-04"),
        ({"hidden": (0.0, 2e-4)}, "hidden states 1 are 2.0e-04 apart, more than"),
        ({"hidden": (0.0, 2e-4), "hidden_sizes": (1.0, 300.0)}, None),
        ({"agreed": 5, "gap": 1e-4}, None),
        ({"agreed": 5, "gap": 0.3}, "the logits of greedy id 5, which differs, are"),
        ({"dtype": "bfloat16", "logits": 0.3}, None),
    ],
    ids=str,
)
def test_what_exceeds_the_tolerance(peers, change, excess):
    import measure

    excesses = measure.Parity(**{**FINE, **change}).excesses()
    assert [text.startswith(excess or "") for text in excesses] == [True] * bool(excess)


@pytest.mark.parametrize(("largest", "code"), [(9e-5, 0), (1.1e-4, 1)])
def test_the_script_prints_a_table(checkpoint, monkeypatch, capsys, largest, code):
    import compare
    import measure

    folder = str(checkpoint("Qwen3", "float32"))
    parity = measure.Parity(**{**FINE, "logits": largest})
    monkeypatch.setattr(measure, "measure", lambda *arguments: parity)
    assert compare.main([folder, "--dtype", "float32", "--layers"]) == code
    printed = capsys.readouterr()
    row = f"| {folder} | float32 | {largest:.1e} | 1.0e-06 | 9.0e-05 (1) | 9.0e-05 | "
    assert f"\n{row}64/64 |  |\n" in printed.out
    assert f"\n- {folder}, float32: 0.0e+00 9.0e-05\n" in printed.out
    assert printed.err.startswith(f"{folder}: logits are 1.1e-04 apart" * code)


def test_the_script_compares_each_family_in_both_dtypes(peers, monkeypatch):
    import compare
    import families
    import measure

    written, measured = [], []
    monkeypatch.setattr(
        families, "write_checkpoint", lambda _, *what: written.append(what)
    )
    monkeypatch.setattr(
        measure,
        "measure",
        lambda _, dtype, *numbers: (
            measured.append((dtype, *numbers)) or measure.Parity(**FINE)
        ),
    )
    assert compare.main(["--tokens", "32", "--new-tokens", "5"]) == 0
    dtypes = ("float32", "bfloat16")
    assert written == [(family, dtype) for family in FAMILIES for dtype in dtypes]
    assert measured == [(dtype, 32, 5) for _, dtype in written]


def test_texts_are_read_by_the_models_own_tokenizer(peers, data_dir):
    import measure

    import relax

    model = relax.load(data_dir / "stories260K_hf")
    inputs = measure.make_inputs(model, 32, 4)
    assert inputs.tokens[:, 0].tolist() == [1, 1]
    assert model.tokenizer.decode(inputs.prompt) == "HAMLET:"
    assert inputs.padded[1, :13].tolist() == [0] * 12 + [inputs.tokens[1, 12]]


def test_a_context_too_short_is_refused(checkpoint):
    import measure

    folder = checkpoint("Llama 2", "float32")
    with pytest.raises(ValueError, match="a context of 264; the model has 256"):
        measure.measure(folder, "float32", num_tokens=80, new_tokens=244)


def test_missing_peers_are_named_in_one_line(monkeypatch, capsys):
    import compare

    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    assert compare.main([]) == 2
    error = capsys.readouterr().err
    assert error == (
        "torch and transformers missing: pip install 'relax-lm[experiments]'\n"
    )
