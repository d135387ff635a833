"""`relax.load` of folders, and models whose vocabulary has grown."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import relax
from relax import LanguageModel
from relax.language_model import Origin
from relax.model.parameters import flat_parameters, parameter_shapes, with_layers
from relax.sharding import MeshConfig, make_mesh
from relax.text.chat import named_template
from relax.text.tokenizers import TokenizerConfig, make_tokenizer

V = 257  # of bytes and the end of text
CHAT = [{"role": "user", "content": "Hello"}]
# Two layers of float32 sums.
TOLERANCE = 1e-4


@pytest.fixture
def make_model(make_config):
    """A callable: a fresh model of bytes, whose parameters are random."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes", encoding=None, path=None))

    def make(tokenizer=tokenizer, chat_template=None, origin=None, **fields):
        sizes = {"vocab_size": V, "hidden_size": 30, "num_hidden_layers": 2}
        config = make_config(**{**sizes, **fields})
        rng = np.random.default_rng(5)
        params = {}
        for path, leaf in flat_parameters(parameter_shapes(config)):
            module, name = path.rsplit("/", 1)
            value = rng.normal(scale=0.2, size=leaf.shape) + module.endswith("norm")
            params.setdefault(module, {})[name] = jnp.asarray(value, leaf.dtype)
        return LanguageModel(
            config, params, tokenizer, mesh, chat_template=chat_template, origin=origin
        )

    return make


def bits(model) -> dict[str, bytes]:
    return bits_of(model.params)


def bits_of(params) -> dict[str, bytes]:
    return {path: np.asarray(leaf).tobytes() for path, leaf in flat_parameters(params)}


def layers_of(params) -> dict[str, bytes]:
    """Without the tables, whose padded rows no checkpoint keeps."""
    return {path: bits for path, bits in bits_of(params).items() if "layers" in path}


def test_a_saved_model_comes_back_whole(make_model, tmp_path):
    origin = Origin(stop_ids=(3, 7), generation_json={"temperature": 0.7})
    model = make_model(param_dtype="bfloat16", compute_dtype="bfloat16", origin=origin)
    model.chat_template = named_template("chatml", model.tokenizer)
    model.save(tmp_path / "new")
    back = relax.load(tmp_path / "new", scan_layers=True)
    assert bits(back) == bits(model)
    assert back.config == model.config
    assert back.tokenizer.fingerprint == model.tokenizer.fingerprint
    assert back.stop_ids == model.stop_ids == (3, 7, 256)
    assert back.origin.generation_json == {"temperature": 0.7}
    assert back.chat_template.source == model.chat_template.source
    assert back.encode(CHAT) == model.encode(CHAT)
    (np.asarray(back.params["llama/norm"]["weight"]) == 1).any()
    wide = relax.load(tmp_path / "new", dtype="float32")
    assert wide.config.param_dtype == wide.config.compute_dtype == "float32"
    table = wide.params["llama/embed_tokens"]["weight"]
    expected = model.params["llama/embed_tokens"]["weight"].astype(jnp.float32)
    np.testing.assert_array_equal(table, expected)


@pytest.mark.parametrize("save", ["save", "save_hf"])
def test_layers_come_in_the_form_that_is_asked_for(make_model, tmp_path, save):
    model = make_model()
    getattr(model, save)(tmp_path / "new")
    for scan_layers in (True, False):
        back = relax.load(tmp_path / "new", scan_layers=scan_layers)
        assert back.config.scan_layers == scan_layers
        expected = with_layers(model.config, model.params, scan_layers)[1]
        assert layers_of(back.params) == layers_of(expected) != {}


def test_new_tokens_are_kept_by_both_forms(make_model, tmp_path):
    """And transformers gives them their ids and the same logits."""
    transformers = pytest.importorskip("transformers")
    import torch

    model = make_model(tie_word_embeddings=False)
    before = np.asarray(model.logits(np.array([[72, 105, 33]])))
    ids = model.add_special_tokens(["<|user|>", "<|tool|>"])
    assert ids == {"<|user|>": 257, "<|tool|>": 258}
    tokens = [72, 257, 105, 258, 33]
    logits = np.asarray(model.logits(np.array([tokens])))
    assert model.config.vocab_size == logits.shape[-1] == 259
    after = np.asarray(model.logits(np.array([[72, 105, 33]])))
    np.testing.assert_allclose(after[..., :V], before, 0, 1e-5)

    model.save(tmp_path / "own")
    model.save_hf(tmp_path / "hf")
    for folder in ("own", "hf"):
        back = relax.load(tmp_path / folder)
        assert back.tokenizer.special_tokens["<|tool|>"] == 258
        assert back.tokenizer.vocab_size == 259
        found = back.logits(np.array([tokens]))
        np.testing.assert_allclose(found, logits, 0, 1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "H<|user|>i<|tool|>!"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == tokens
    assert tokenizer.convert_tokens_to_ids("<|user|>") == 257
    assert tokenizer.decode([72, 258, 33], skip_special_tokens=True) == "H!"
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype="float32", attn_implementation="eager"
    )
    with torch.no_grad():
        theirs = peer(torch.tensor([tokens])).logits.numpy()
    np.testing.assert_allclose(theirs, logits, 0, TOLERANCE)
    swapped = np.asarray(model.logits(np.array([[72, 258, 105, 257, 33]])))
    assert np.abs(swapped[0, -1] - logits[0, -1]).max() < TOLERANCE  # both are means
    plain = np.asarray(model.logits(np.array([[72, 65, 105, 66, 33]])))
    assert np.abs(plain[0, -1] - logits[0, -1]).max() > 10 * TOLERANCE


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_token_is_the_mean_of_the_others(make_model, tied):
    model = make_model(tie_word_embeddings=tied)
    tables = ["llama/embed_tokens"] if tied else ["llama/embed_tokens", "llama/lm_head"]
    old = {name: np.asarray(model.params[name]["weight"]) for name in tables}
    model.add_special_tokens(["<|a|>"])
    for name in tables:
        table = np.asarray(model.params[name]["weight"])
        np.testing.assert_array_equal(table[:V], old[name][:V])
        np.testing.assert_allclose(
            table[V], old[name][:V].mean(axis=0, dtype=np.float64), 0, 1e-6
        )


def test_a_known_token_is_not_added_again(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="endoftext"):
        model.add_special_tokens(["<|endoftext|>"])
    model.add_special_tokens(["<|a|>"], rows="zeros")
    with pytest.raises(ValueError, match="a"):
        model.add_special_tokens(["<|a|>"])
    assert model.config.vocab_size == V + 1


def test_tokens_without_a_tokenizer_cannot_be_added(make_model):
    with pytest.raises(ValueError, match="no tokenizer"):
        make_model(tokenizer=None).add_special_tokens(["<|a|>"])


def test_a_tokenizer_larger_than_the_embedding_is_refused(make_model, tmp_path):
    small, large = make_model(), make_model()
    large.add_special_tokens(["<|a|>", "<|b|>"])
    small.save_hf(tmp_path / "small")
    large.save_hf(tmp_path / "large")
    shutil.copy(tmp_path / "large" / "tokenizer.json", tmp_path / "small")
    message = r"the tokenizer has 259 ids, the embedding 257 rows"
    with pytest.raises(ValueError, match=message):
        relax.load(tmp_path / "small")
    shutil.rmtree(tmp_path / "small")
    small.save(tmp_path / "small")
    large.tokenizer.save(tmp_path / "small" / "tokenizer")
    with pytest.raises(ValueError, match=message):
        relax.load(tmp_path / "small")


def test_a_padded_embedding_is_larger_than_its_tokenizer(make_model, tmp_path):
    """As Qwen's: new tokens then take rows that are there."""
    make_model(vocab_size=300).save_hf(tmp_path / "new")
    model = relax.load(tmp_path / "new")
    assert (model.config.vocab_size, model.tokenizer.vocab_size) == (300, V)
    old = np.asarray(model.params["llama/embed_tokens"]["weight"])
    assert model.add_special_tokens(["<|a|>"]) == {"<|a|>": V}
    assert model.config.vocab_size == 300
    table = np.asarray(model.params["llama/embed_tokens"]["weight"])
    np.testing.assert_allclose(table[V], old[:V].mean(axis=0), 0, 1e-6)
    np.testing.assert_array_equal(np.delete(table, V, 0), np.delete(old, V, 0))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{", r"config\.json is truncated or corrupt"),
        ("config.json", "[]", r"config\.json holds no JSON object"),
        ("config.json", "{}", r"config\.json: model_type=None"),
        ("generation_config.json", "{", r"generation_config\.json is truncated"),
        ("tokenizer.json", "{", r"tokenizer\.json"),
    ],
)
def test_a_damaged_file_is_named(make_model, tmp_path, name, text, message):
    make_model().save_hf(tmp_path / "new")
    (tmp_path / "new" / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        relax.load(tmp_path / "new")


def test_a_folder_of_neither_kind_says_what_it_lacks(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint=.*no complete checkpoint"):
        relax.load(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors"):
        relax.load(tmp_path)
