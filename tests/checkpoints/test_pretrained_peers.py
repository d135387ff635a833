"""Checkpoints of every family, as transformers 5.23 saves and runs them."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import relax
from relax import SamplingConfig
from relax.checkpoints.pretrained import open_pretrained

# Three layers of float32 sums of up to 60 products; seen: 1.8e-5 in hidden states.
TOLERANCE = 1e-4
NEW = 7

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}
UPPER_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
CASES = {
    "llama 3.2: tied, llama3 rope": (
        "Llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    ),
    "llama with all biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with linear rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 1e4,
                "factor": 3.0,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral with a window": ("Mistral", {"sliding_window": 5}),
    "qwen2 with an upper window": ("Qwen2", {"hidden_size": 60, **UPPER_WINDOW}),
    "qwen2 with yarn": (
        "Qwen2",
        {"hidden_size": 60, "rope_parameters": YARN, "sliding_window": 4},
    ),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3 with biases and a window": (
        "Qwen3",
        {"attention_bias": True, **UPPER_WINDOW},
    ),
}
# Those whose keys and values differ in the cache; the windows are left by the text.
CACHED = (
    "llama 3.2: tied, llama3 rope",
    "mistral with a window",
    "qwen2 with an upper window",
    "qwen3 with biases and a window",
)


def change(folder, tmp_path, **keys):
    """Returns a folder with the same weights and other keys in its config.json."""
    other = tmp_path / "changed"
    other.mkdir()
    raw = json.loads((folder / "config.json").read_text()) | keys
    (other / "config.json").write_text(json.dumps(raw))
    (other / "model.safetensors").symlink_to(folder / "model.safetensors")
    return other


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_computes_what_transformers_does(save_peer, tokens, case):
    family, fields = CASES[case]
    peer = save_peer(family, **fields)
    model = relax.load(peer.folder)
    assert model.config.param_dtype == model.config.compute_dtype == "float32"
    logits, hidden = peer.forward(tokens)
    np.testing.assert_allclose(model.logits(tokens), logits, 0, TOLERANCE)
    found = model.activations(tokens, ["resid_pre", "final_norm"])
    ours = [*found["resid_pre"], found["final_norm"]]
    assert len(ours) == len(hidden) == 4
    for state, theirs in zip(ours, hidden, strict=True):
        np.testing.assert_allclose(state, theirs, 0, TOLERANCE)


@pytest.mark.parametrize("case", CACHED)
def test_greedy_completions_are_those_of_transformers(save_peer, tokens, case):
    family, fields = CASES[case]
    peer = save_peer(family, **fields)
    prompt = tokens[0, :6].tolist()
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=NEW)
    [completion] = relax.load(peer.folder).generate([prompt], greedy)
    assert completion.token_ids == peer.greedy(prompt, NEW)


@pytest.mark.parametrize(
    ("case", "keys"),
    [
        ("qwen2 with an upper window", {"layer_types": ["sliding_attention"] * 3}),
        ("mistral with a window", {"sliding_window": 6}),
        ("qwen2 with yarn", {"rope_parameters": {**YARN, "attention_factor": 1.0}}),
        ("llama 3.2: tied, llama3 rope", {"rope_scaling": {**LLAMA3, "factor": 7.0}}),
    ],
    ids=str,
)
def test_the_comparison_catches_a_changed_key(save_peer, tokens, tmp_path, case, keys):
    family, fields = CASES[case]
    peer = save_peer(family, **fields)
    logits, _ = peer.forward(tokens)
    model = relax.load(change(peer.folder, tmp_path, **keys))
    assert np.abs(np.asarray(model.logits(tokens)) - logits).max() > 10 * TOLERANCE


def test_a_dynamic_rope_is_that_of_decoding_token_by_token(save_peer, tokens):
    """Two of the thirteen tokens lie beyond the original context."""
    torch = pytest.importorskip("torch")
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}
    peer = save_peer(rope_parameters=rope, max_position_embeddings=11)
    logits, cache = [], None
    with torch.no_grad():
        for token in tokens[0]:
            out = peer.model(
                torch.tensor([[token]]), past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            logits.append(out.logits[0, 0].numpy())
    ours = relax.load(peer.folder).logits(tokens)[0]
    np.testing.assert_allclose(ours, logits, 0, TOLERANCE)
    other = relax.load(save_peer(max_position_embeddings=11).folder).logits(tokens)[0]
    assert np.abs(other[11:] - np.stack(logits)[11:]).max() > 10 * TOLERANCE


def test_a_window_moves_with_left_padding(save_peer, tokens):
    torch = pytest.importorskip("torch")
    peer = save_peer("Mistral", sliding_window=5)
    padded = np.concatenate([tokens, np.roll(tokens, 1, axis=1)])
    real = np.ones(padded.shape, int)
    real[1, :3] = 0
    with torch.no_grad():
        theirs = peer.model(
            torch.tensor(padded), attention_mask=torch.tensor(real)
        ).logits.numpy()
    ours = np.asarray(relax.load(peer.folder).logits(padded, attention_mask=real))
    seen = real.astype(bool)
    np.testing.assert_allclose(ours[seen], theirs[seen], 0, TOLERANCE)


@pytest.mark.parametrize("file_dtype", ["bfloat16", "float16"])
def test_narrow_files_are_widened_exactly_and_kept_with_auto(
    save_peer, read_folder, assert_same_bits, tokens, file_dtype
):
    """Widened on a CPU by default, where the peer is also run in float32."""
    peer = save_peer("Qwen2", file_dtype, hidden_size=60)
    config, wide = read_folder(peer.folder)
    assert config.param_dtype == config.compute_dtype == "float32"
    kept_config, kept = read_folder(peer.folder, "auto")
    assert kept_config.param_dtype == kept_config.compute_dtype == file_dtype
    assert {array.dtype.name for array in kept.values()} == {file_dtype}
    assert_same_bits({k: v.astype(np.float32) for k, v in kept.items()}, wide)
    named, _ = read_folder(peer.folder, file_dtype)
    assert named == kept_config
    transformers = pytest.importorskip("transformers")
    widened = transformers.AutoModelForCausalLM.from_pretrained(
        peer.folder, dtype="float32"
    )
    logits, _ = peer._replace(model=widened).forward(tokens)
    np.testing.assert_allclose(
        relax.load(peer.folder).logits(tokens), logits, 0, TOLERANCE
    )


def test_what_is_not_read_does_not_decide_the_dtype(save_peer, tmp_path):
    """Old files hold float32 buffers, and tied ones an output layer of their own."""
    folder = save_peer("Llama", "float16", tie_word_embeddings=True).folder
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    more = {name: np.ones(4, np.float32), "lm_head.weight": np.ones((5, 3), np.float32)}
    save_file(tensors | more, path)
    config = open_pretrained(tmp_path / "model", "auto", "cpu").config
    assert config.param_dtype == config.compute_dtype == "float16"


def test_wide_files_are_rounded_to_the_nearest(save_peer, read_folder):
    """Of the tensor's numbers, each is rounded as PyTorch does."""
    torch = pytest.importorskip("torch")
    peer = save_peer("Mistral", sliding_window=None)
    table = peer.model.model.embed_tokens.weight.detach()
    for dtype in ("bfloat16", "float16"):
        config, params = read_folder(peer.folder, dtype)
        ours = np.asarray(params["llama/embed_tokens/weight"][:67].astype(np.float32))
        np.testing.assert_array_equal(ours, table.to(getattr(torch, dtype)).float())
        assert config.param_dtype == dtype
    assert read_folder(peer.folder, "auto")[0].param_dtype == "float32"


@pytest.mark.parametrize("dtype", ["int8", "float64", "bf16", ""])
def test_an_unknown_dtype_names_the_known_ones(tmp_path, dtype):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"dtype='\w*' .*auto, float32, bfloat16, flo"):
        relax.load(tmp_path, dtype=dtype)


def test_a_checkpoint_without_tokenizer_reads_ids_alone(save_peer):
    model = relax.load(save_peer("Mistral", sliding_window=5).folder)
    assert model.tokenizer is None and model.chat_template is None
    with pytest.raises(ValueError, match="no tokenizer"):
        model.generate(["text"])
