"""The model against transformers 5.23: logits, hidden states and all gradients.

The peer's tensors are renamed and reshaped here by hand: its linear weights are
`[out, in]`, with the heads of a projection in the rows (columns for `o_proj`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.model.llama import make_llama
from relax.model.parameters import flat_parameters, stack_layers, unstack_layers
from relax.ops.logprobs import compute_logits

T, V = 13, 67
TOKENS = np.random.default_rng(0).integers(0, V, (2, T))
WEIGHTS = np.random.default_rng(1).normal(size=(2, T, V)).astype(np.float32)
# Three layers of float32 sums of up to 60 products, and logits of up to 10 or so; seen:
# 8e-6.
TOLERANCE = 2e-5

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 4}
UPPER_WINDOW = {**WINDOW, "max_window_layers": 1}

# The peer's family; fields that both name alike; the peer's own; ours.
CASES = {
    "llama": ("Llama", {}, {}, {}),
    "one kv head": ("Llama", {"num_key_value_heads": 1}, {}, {}),
    "no sharing of kv heads": ("Llama", {"num_key_value_heads": 6}, {}, {}),
    "tied, gelu": ("Llama", {**TIED, "hidden_act": "gelu"}, {}, {}),
    "biases": (
        "Llama",
        {"mlp_bias": True},
        {"attention_bias": True},
        {"qkv_bias": True, "attention_out_bias": True},
    ),
    "llama3 rope": ("Llama", {}, {"rope": ("llama3", 16, LLAMA3)}, {}),
    "yarn rope": ("Llama", {}, {"rope": ("yarn", 8, {"factor": 4.0})}, {}),
    "qwen2": ("Qwen2", {"hidden_size": 60, **TIED}, {}, {"qkv_bias": True}),
    "qwen2 window": (
        "Qwen2",
        {"hidden_size": 60, **UPPER_WINDOW},
        {"use_sliding_window": True},
        {"qkv_bias": True},
    ),
    "qwen3": ("Qwen3", {}, {}, {"qk_norm": True}),
    "mistral window": ("Mistral", WINDOW, {}, {}),
}


def to_relax(tensors, num_heads, num_kv_heads):
    """Returns our parameters (or gradients of them) from the peer's, by name."""
    heads = {"q_proj": num_heads, "k_proj": num_kv_heads, "v_proj": num_kv_heads}
    params = {}
    for name, tensor in tensors.items():
        *modules, module, leaf = name.removeprefix("model.").split(".")
        if modules:
            modules[:2] = [f"layers_{modules[1]}", "block"]
        if module in heads:
            tensor = tensor.reshape(heads[module], -1, *tensor.shape[1:])
        if module == "o_proj" and leaf == "weight":
            tensor = tensor.reshape(len(tensor), num_heads, -1)
        if module.endswith("proj") and leaf == "weight":
            by_input = {"o_proj": (1, 2, 0)}.get(module, (2, 0, 1))
            tensor = tensor.transpose(by_input if tensor.ndim == 3 else (1, 0))
        if module in ("embed_tokens", "lm_head"):
            tensor = np.pad(tensor, ((0, -len(tensor) % 64), (0, 0)))
        path = "/".join(["llama", *modules, module])
        params.setdefault(path, {})[leaf] = jnp.asarray(tensor)
    return stack_layers(params)


def peer_model(family, fields, rope):
    """Returns a peer with random parameters, biases and norm weights included."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        **fields, attn_implementation="eager", rope_parameters=rope_parameters(*rope)
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if name.endswith("norm.weight"):
                parameter += 1.0
    return model


def rope_parameters(kind, original, options):
    parameters = {"rope_type": kind, "rope_theta": 1e4, **options}
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    return parameters


@functools.cache
def peer(case):
    """Returns the peer's parameters, logits and gradients, as numpy arrays."""
    torch = pytest.importorskip("torch")
    family, shared, own, _ = CASES[case]
    own = dict(own)
    rope = own.pop("rope", ("default", None, {}))
    fields = {**SIZES, **shared, **own}
    model = peer_model(family, fields, rope)
    logits = model(torch.tensor(TOKENS)).logits
    (logits * torch.tensor(WEIGHTS)).sum().backward()
    heads = fields["num_attention_heads"], fields["num_key_value_heads"]
    named = dict(model.named_parameters())
    params = to_relax({k: v.detach().numpy() for k, v in named.items()}, *heads)
    gradients = to_relax({k: v.grad.numpy() for k, v in named.items()}, *heads)
    return params, logits.detach().numpy(), gradients


SIZES = {
    "vocab_size": V,
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 101,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


def our_config(make_config, case, **changes):
    _, shared, own, ours = CASES[case]
    kind, original, options = own.get("rope", ("default", None, {}))
    rope = {f"rope_{name}": value for name, value in options.items()}
    rope |= {"rope_type": kind, "rope_original_max_position_embeddings": original}
    return make_config(**{**SIZES, **shared, **rope, **ours, **changes})


def our_logits(config, params):
    out = make_llama(config).apply(params, TOKENS)
    return compute_logits(out.hidden, out.unembedding, V)[..., :V]


def logits_error(make_config, case, **changes):
    """Returns how far our logits are from the peer's, with fields of ours changed."""
    config = our_config(make_config, case, **changes)
    params, peer_logits, _ = peer(case)
    logits = jax.jit(functools.partial(our_logits, config))(params)
    return np.max(np.abs(logits - peer_logits))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(make_config, case):
    assert logits_error(make_config, case) < TOLERANCE


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama", {"rms_norm_eps": 1e-3}),
        ("llama3 rope", {"rope_factor": 7.0}),
        ("qwen2 window", {"max_window_layers": 0}),
        ("mistral window", {"sliding_window": 5}),
        ("tied, gelu", {"hidden_act": "gelu_tanh"}),
    ],
    ids=str,
)
def test_the_comparison_catches_a_changed_model(make_config, case, change):
    assert logits_error(make_config, case, **change) > 10 * TOLERANCE


@pytest.mark.parametrize("case", ["tied, gelu", "biases", "qwen3"])
def test_all_gradients_equal_those_of_transformers(make_config, case):
    config = our_config(make_config, case)
    params, _, peer_gradients = peer(case)

    def weighted(params):
        return jnp.sum(our_logits(config, params) * WEIGHTS)

    gradients = jax.jit(jax.grad(weighted))(params)
    for (path, ours), (other, theirs) in zip(
        flat_parameters(gradients), flat_parameters(peer_gradients), strict=True
    ):
        assert path == other and ours.shape == theirs.shape
        scale = float(jnp.max(jnp.abs(theirs)))
        np.testing.assert_allclose(ours, theirs, 0, 1e-5 * scale, err_msg=path)


@pytest.fixture(scope="module")
def stories(data_dir, make_config):
    """The configuration and parameters of a trained model."""
    safetensors = pytest.importorskip("safetensors.numpy")
    tensors = safetensors.load_file(data_dir / "stories260K_hf" / "model.safetensors")
    config = make_config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=None,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        scan_layers=False,
    )
    return config, unstack_layers(to_relax(tensors, 8, 4))


def hidden_states(config, params, tokens):
    """Returns the logits `[T, V]` and what the peer calls hidden states, L + 1 of them.

    The last is that of the final norm, the others come before a layer. Each layer
    constrains its residual stream twice, which is where it can be seen.
    """
    residual = []

    def seen(x, axes):
        if axes == ("batch", "length", None):
            residual.append(x[0])
        return x

    def forward(params, tokens):
        out = make_llama(config, seen).apply(params, tokens)
        logits = compute_logits(out.hidden, out.unembedding, config.vocab_size)
        return logits[0], [*residual[:-1:2], out.hidden[0]]

    return jax.jit(forward)(params, tokens[None])


@pytest.mark.parametrize("prompt", [0, 1, 2])
def test_hidden_states_and_logits_of_a_trained_model(stories, oracle_dir, prompt):
    peers = np.load(oracle_dir / "stories260K_forward.npz")
    logits, hidden = hidden_states(*stories, peers[f"ids_{prompt}"])
    # Seen: errors of 1.2e-5 in logits up to 20 and of 8e-6 in hidden states up to 18.
    np.testing.assert_allclose(logits, peers[f"logits_{prompt}"], 0, 5e-5)
    assert len(hidden) == 6
    for i, state in enumerate(hidden):
        np.testing.assert_allclose(state, peers[f"hidden_{prompt}_{i}"], 0, 3e-5)
