"""Released checkpoints against what transformers 5.23 gave for them."""

import dataclasses

import numpy as np
import pytest

import relax
from relax import SamplingConfig

CHECKPOINTS = (
    "llama2_mha_untied",
    "llama3_1_bin_legacy",
    "llama3_1_gqa_scaled",
    "llama_sharded",
    "qwen2_5_bias_tied",
)
# Float32 sums in another order; seen: 1.1e-5 in logits up to 20.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(request, data_dir):
    """A checkpoint loaded by `relax.load`, and the numbers beside it."""
    if request.param.endswith("legacy"):
        pytest.importorskip("torch")
    folder = data_dir / "hf_checkpoints" / request.param
    return relax.load(folder), np.load(folder / "expected.npz")


def each_checkpoint(test):
    return pytest.mark.parametrize(
        "checkpoint", CHECKPOINTS, indirect=True, scope="module"
    )(test)


def hidden_states(model, tokens) -> list[np.ndarray]:
    """Returns what transformers calls hidden states, the last after the norm."""
    found = model.activations(tokens, ["resid_pre", "final_norm"])
    return [*found["resid_pre"][:, 0], found["final_norm"][0]]


def test_every_checkpoint_has_its_case(data_dir):
    folders = sorted(path.name for path in (data_dir / "hf_checkpoints").iterdir())
    assert folders == list(CHECKPOINTS)
    assert len(folders) == 5


@each_checkpoint
def test_logits_are_those_of_transformers_alone_and_left_padded(checkpoint):
    model, expected = checkpoint
    real = expected["attention_mask"].astype(bool)
    assert not real[1, 0] and real[0].all() and real[:, -1].all()
    tokens, peers = expected["input_ids"], expected["logits_padded"]
    unmasked = np.asarray(model.logits(tokens))
    np.testing.assert_allclose(unmasked[0], expected["logits"], 0, TOLERANCE)
    masked = np.asarray(model.logits(tokens, attention_mask=real))
    np.testing.assert_allclose(masked[real], peers[real], 0, TOLERANCE)
    assert np.abs(unmasked[real] - peers[real]).max() > 100 * TOLERANCE


@each_checkpoint
def test_hidden_states_are_those_of_transformers(checkpoint):
    model, expected = checkpoint
    hidden = hidden_states(model, expected["input_ids"][:1])
    assert len(hidden) == model.config.num_hidden_layers + 1 == 4
    for i, state in enumerate(hidden):
        np.testing.assert_allclose(state, expected[f"hidden_{i}"], 0, TOLERANCE)


@each_checkpoint
def test_greedy_completions_are_those_of_transformers(checkpoint):
    """The peer's ids go on after the end of text, 2, of which two cases have one."""
    model, expected = checkpoint
    ids = expected["greedy"][0].tolist()
    made = ids[6:]
    sampling = SamplingConfig(
        temperature=0.0, max_new_tokens=len(made), ignore_eos=True
    )
    [completion] = model.generate([ids[:6]], sampling)
    assert completion.token_ids == made
    assert model.stop_ids == (2,)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS[:1], indirect=True)
def test_a_completion_ends_with_the_end_of_text_of_config_json(checkpoint):
    model, expected = checkpoint
    ids = expected["greedy"][0].tolist()
    [completion] = model.generate([ids[:6]], SamplingConfig(temperature=0.0))
    assert completion.token_ids == ids[6 : ids.index(2, 6) + 1]
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize("checkpoint", CHECKPOINTS[2:3], indirect=True)
@pytest.mark.parametrize(
    "change", [{"rope_factor": 7.0}, {"rms_norm_eps": 1e-3}], ids=str
)
def test_the_comparison_catches_a_changed_configuration(checkpoint, change):
    model, expected = checkpoint
    other = relax.LanguageModel(
        dataclasses.replace(model.config, **change), model.params, None, model.mesh
    )
    logits = np.asarray(other.logits(expected["input_ids"][:1]))[0]
    assert np.abs(logits - expected["logits"]).max() > 10 * TOLERANCE


@pytest.fixture(scope="module")
def stories(data_dir, oracle_dir):
    model = relax.load(data_dir / "stories260K_hf")
    return model, np.load(oracle_dir / "stories260K_forward.npz")


@pytest.mark.parametrize("prompt", [0, 1, 2])
def test_a_trained_model_computes_what_transformers_does(stories, prompt):
    model, peers = stories
    tokens = peers[f"ids_{prompt}"][None]
    hidden = hidden_states(model, tokens)
    assert len(hidden) == 6
    for i, state in enumerate(hidden):
        np.testing.assert_allclose(state, peers[f"hidden_{prompt}_{i}"], 0, TOLERANCE)
    logits = model.logits(tokens)[0]
    np.testing.assert_allclose(logits, peers[f"logits_{prompt}"], 0, TOLERANCE)


def test_attention_patterns_of_a_trained_model_are_those_of_transformers(stories):
    model, peers = stories
    [patterns] = model.activations(peers["ids_0"][None], ["attn.pattern"]).values()
    assert patterns.shape == (5, 1, 8, 10, 10)
    for layer, pattern in enumerate(np.asarray(patterns)[:, 0]):
        np.testing.assert_allclose(pattern, peers[f"attn_0_{layer}"], 0, TOLERANCE)
    swapped = np.asarray(patterns)[1, 0]
    assert np.abs(swapped - peers["attn_0_0"]).max() > 100 * TOLERANCE
