import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import relax
from relax.language_model import LanguageModel
from relax.model.parameters import parameter_shapes
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig, make_mesh
from relax.tasks.export import ExportConfig, check, run
from relax.text.tokenizers import TokenizerConfig, make_tokenizer

TOKENS = [[72, 101, 108, 111, 256]]


@pytest.fixture
def model(make_config):
    """A model of bytes: ids up to 256, and 63 padded rows."""
    config = make_config(vocab_size=257, hidden_size=30)
    rng = np.random.default_rng(7)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.3, size=leaf.shape), leaf.dtype),
        parameter_shapes(config),
    )
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes", encoding=None, path=None))
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    return LanguageModel(config, params, tokenizer, mesh)


@pytest.fixture
def config(tmp_path):
    return ExportConfig(
        kind="export",
        output_path=str(tmp_path / "model"),
        max_shard_gigabytes=5.0,
        add_special_tokens=(),
        new_rows="mean",
        template=None,
        adapter=False,
    )


def test_what_is_written_loads_with_the_same_logits(model, config):
    run(config, model, SamplingConfig())
    again = relax.load(config.output_path, scan_layers=True)
    np.testing.assert_array_equal(again.logits(TOKENS), model.logits(TOKENS))
    assert again.tokenizer.encode("héllo") == model.tokenizer.encode("héllo")
    assert again.stop_ids == (256,) and again.chat_template is None


def test_special_tokens_and_template_go_with_it(model, config):
    before = np.asarray(model.logits(TOKENS))
    table = np.asarray(model.params["llama/embed_tokens"]["weight"])[:257]
    names = ("<|im_start|>", "<|im_end|>")
    config = replace(config, add_special_tokens=names, template="chatml")
    run(config, model, SamplingConfig())
    again = relax.load(config.output_path, scan_layers=True)
    assert again.config.vocab_size == 259
    np.testing.assert_allclose(again.logits(TOKENS)[..., :257], before, 0, 1e-5)
    rows = np.asarray(again.params["llama/embed_tokens"]["weight"])
    np.testing.assert_allclose(rows[257:259], [table.mean(0)] * 2, 0, 1e-6)
    assert again.encode([{"role": "user", "content": "a<|im_end|>"}]) == [
        *(257, *b"user\na<|im_end|>", 258, *b"\n"),
        *(257, *b"assistant\n"),
    ]
    assert again.stop_ids == (256, 258)
    written = json.loads(
        (Path(config.output_path) / "generation_config.json").read_text()
    )
    assert written["eos_token_id"] == [256, 258]


def test_a_template_needs_a_tokenizer(model, config):
    model = LanguageModel(model.config, model.params, None, model.mesh)
    with pytest.raises(ValueError, match=r"task.template='chatml', .* no tokenizer"):
        run(replace(config, template="chatml"), model, SamplingConfig())
    assert not Path(config.output_path).exists()


def test_a_template_is_checked_before_the_model_is_loaded(config):
    check(replace(config, template="chatml"))
    with pytest.raises(ValueError, match=r"task.template='chatlm' is unknown; choose"):
        check(replace(config, template="chatlm"))
    with pytest.raises(FileNotFoundError, match=r"task.template='no.jinja'"):
        check(replace(config, template="no.jinja"))


def test_large_weights_go_into_several_files(model, config):
    run(replace(config, max_shard_gigabytes=3e-5), model, SamplingConfig())
    files = sorted(path.name for path in Path(config.output_path).glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    again = relax.load(config.output_path, scan_layers=True)
    np.testing.assert_array_equal(again.logits(TOKENS), model.logits(TOKENS))


def test_a_folder_with_something_in_it_is_refused_before_any_model_is_read(config):
    folder = Path(config.output_path)
    folder.mkdir()
    check(config)
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match=r"output_path=.*is there already"):
        check(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_path": None}, "output_path=null: name the folder"),
        ({"max_shard_gigabytes": 0.0}, "task.max_shard_gigabytes=0.0 must be above 0"),
        ({"new_rows": "median"}, "task.new_rows='median' is unknown.*mean, zeros"),
    ],
)
def test_options_out_of_range_are_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)
