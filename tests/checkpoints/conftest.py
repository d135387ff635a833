"""Checkpoints that transformers 5.23 writes, and what its models give."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from relax.checkpoints.pretrained import open_pretrained
from relax.model.parameters import flat_parameters, parameter_shapes
from relax.sharding import MeshConfig, make_mesh, parameter_shardings

# No two of V, D, F, L, N, K, H and T are the same number.
SIZES = {
    "vocab_size": 67,
    "hidden_size": 30,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 101,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
T = 13
TOKENS = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (1, T))


class Peer(NamedTuple):
    """A model of transformers and the folder that it was saved in."""

    folder: Path
    model: Any

    def forward(self, tokens) -> tuple[np.ndarray, list[np.ndarray]]:
        """Returns the logits `[B, T, V]` and the L + 1 hidden states `[B, T, D]`."""
        import torch

        with torch.no_grad():
            out = self.model(torch.tensor(tokens), output_hidden_states=True)
        return out.logits.numpy(), [state.numpy() for state in out.hidden_states]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Returns the `count` most likely next tokens."""
        import torch

        tokens = torch.tensor([prompt])
        with torch.no_grad():
            made = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=count,
                do_sample=False,
            )
        return made[0, len(prompt) :].tolist()


def make_peer(family: str, torch_dtype: str, fields: dict) -> Any:
    """Returns a model whose parameters, biases and norms included, are random."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, **fields}, attn_implementation="eager"
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2, generator=generator)
            if name.endswith("norm.weight"):
                parameter += 1.0
    return model.to(getattr(torch, torch_dtype)).eval()


@pytest.fixture(scope="session")
def save_peer(tmp_path_factory):
    """A callable: a peer of a family with the given fields, saved by itself."""
    folders = tmp_path_factory.mktemp("peers")

    @functools.cache
    def save(family, torch_dtype, max_shard_size, encoded):
        model = make_peer(family, torch_dtype, json.loads(encoded))
        folder = folders / str(len(list(folders.iterdir())))
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return Peer(folder, model)

    def peer(family="Llama", dtype="float32", max_shard_size="1GB", **fields) -> Peer:
        return save(family, dtype, max_shard_size, json.dumps(fields))

    return peer


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    return TOKENS


@pytest.fixture(scope="session")
def single_mesh():
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))


@pytest.fixture(scope="session")
def read_folder(single_mesh):
    """A callable: the configuration and the parameters of a folder, by path."""

    def read(folder: Path, dtype: str | None = None):
        checkpoint = open_pretrained(Path(folder), dtype, "cpu")
        shapes = parameter_shapes(checkpoint.config)
        params = checkpoint.load_params(parameter_shardings(single_mesh, shapes))
        return checkpoint.config, dict(flat_parameters(params))

    return read


@pytest.fixture
def copy_of(tmp_path):
    """A callable: a copy of a peer's folder, to be damaged."""

    def copy(peer: Peer) -> Path:
        return Path(shutil.copytree(peer.folder, tmp_path / "checkpoint"))

    return copy


@pytest.fixture(scope="session")
def assert_same_bits():
    """A callable: fails unless two mappings of arrays are equal bit for bit."""

    def check(ours, theirs):
        assert sorted(ours) == sorted(theirs)
        for name, array in ours.items():
            one, other = np.asarray(array), np.asarray(theirs[name])
            assert one.dtype == other.dtype and one.shape == other.shape, name
            assert one.tobytes() == other.tobytes(), name

    return check


@pytest.fixture(scope="session")
def random_params():
    """A callable: random parameters of a configuration, padded rows zero."""

    def make(config, seed=0):
        rng = np.random.default_rng(seed)
        params = {}
        for path, leaf in flat_parameters(parameter_shapes(config)):
            module, name = path.rsplit("/", 1)
            value = rng.normal(scale=0.2, size=leaf.shape) + module.endswith("norm")
            if module in ("llama/embed_tokens", "llama/lm_head"):
                value[config.vocab_size :] = 0.0
            params.setdefault(module, {})[name] = jax.numpy.asarray(value, leaf.dtype)
        return params

    return make


# A Meta folder's head width is D / N, and four shards divide N, F and V.
META_SIZES = {
    "vocab_size": 68,
    "hidden_size": 24,
    "intermediate_size": 84,
    "num_attention_heads": 4,
    "head_dim": 6,
}
META_PARAMS = {
    "dim": 24,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 4,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-6,
    "vocab_size": 68,
}
_META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def meta_tensors(model) -> dict[str, Any]:
    """Returns a Llama's tensors under Meta's names, pairs of a head side by side."""
    N, K, H = 4, 2, 6
    tensors = {}
    for name, tensor in model.state_dict().items():
        for theirs, metas in _META_NAMES.items():
            name = name.replace(theirs, metas)
        name = name.removeprefix("model.")
        if name.endswith(("wq.weight", "wk.weight")):
            heads, D = (N if "wq" in name else K), tensor.shape[1]
            tensor = tensor.view(heads, 2, H // 2, D).transpose(1, 2)
            tensor = tensor.reshape(heads * H, D)
        tensors[name] = tensor
    return tensors


def meta_part(name, tensor, shard, shards, embedding_axis):
    """Returns what one of the tensor-parallel files holds of a tensor."""
    module = name.removesuffix(".weight")
    if module.endswith("norm"):
        return tensor.clone()
    if module.endswith((".wk", ".wv")) and shards > 2:  # two heads, each in two files
        shards, shard = 2, shard // 2
    axis = 1 if module.endswith((".wo", ".w2")) else 0
    if module == "tok_embeddings":
        axis = embedding_axis
    return tensor.chunk(shards, dim=axis)[shard].clone()


@pytest.fixture(scope="session")
def save_meta():
    """A callable: writes a peer as Meta's folder of tensor-parallel files."""

    def save(peer, folder, shards=1, embedding_axis=1, **params) -> Path:
        torch = pytest.importorskip("torch")
        tensors = meta_tensors(peer.model)
        if peer.model.config.tie_word_embeddings:
            del tensors["output.weight"]
        folder.mkdir(exist_ok=True)
        (folder / "params.json").write_text(json.dumps(META_PARAMS | params))
        for shard in range(shards):
            parts = {
                name: meta_part(name, tensor, shard, shards, embedding_axis)
                for name, tensor in tensors.items()
            }
            parts["rope.freqs"] = torch.ones(3)
            torch.save(parts, folder / f"consolidated.{shard:02d}.pth")
        return folder

    return save


@pytest.fixture(scope="session")
def meta_sizes() -> dict[str, int]:
    """The fields of a peer that `save_meta` can write."""
    return META_SIZES
