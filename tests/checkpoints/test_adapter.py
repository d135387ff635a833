"""LoRA adapters in PEFT's form, written for PEFT 0.21 and read from it."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

import relax
from relax import LanguageModel, SamplingConfig, inference
from relax.checkpoints.adapter import open_adapter
from relax.config import to_values
from relax.model.lora import base_of, merge, with_lora
from relax.model.parameters import flat_parameters
from relax.tasks import export, score

CONF = Path(__file__).parents[2] / "conf"

# As for the checkpoints that are read.
TOLERANCE = 1e-4
# PEFT asks transformers for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
# Two families: one with biases that an adapter adds to, and one without.
FAMILIES = {
    "Llama": ("q_proj", "v_proj", "o_proj", "down_proj"),
    "Qwen2": ("k_proj", "q_proj", "gate_proj", "up_proj"),
}


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def with_random_adapter(base: LanguageModel, targets) -> LanguageModel:
    """Returns a model of the same matrices and of adapters in which nothing is 0."""
    fields = {"lora_rank": 5, "lora_alpha": 8.0, "lora_targets": targets}
    config = replace(base.config, **fields)
    params = with_lora(config, base.params, jax.random.key(0))
    rng = np.random.default_rng(1)
    random = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.asarray(rng.normal(scale=0.2, size=leaf.shape), leaf.dtype)
            if path[-1].key == "lora_b"
            else leaf
        ),
        params,
    )
    return LanguageModel(config, random, None, base.mesh, origin=base.origin)


@pytest.fixture(scope="module")
def adapted(save_peer, tmp_path_factory):
    """A callable: a family's peer, our model with an adapter, the adapter's folder."""
    made = {}

    def make(family):
        if family not in made:
            peer = save_peer(family)
            model = with_random_adapter(relax.load(peer.folder), FAMILIES[family])
            folder = tmp_path_factory.mktemp("adapters") / family
            model.save_adapter(folder)
            made[family] = peer, model, folder
        return made[family]

    return make


def peer_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def fresh_peer(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="float32", attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_the_same_logits(adapted, peft, tokens, family):
    peer, model, folder = adapted(family)
    ours = model.logits(tokens)
    wrapped = peft.PeftModel.from_pretrained(fresh_peer(peer.folder), folder)
    theirs = peer_logits(wrapped, tokens)
    assert np.max(np.abs(theirs - peer_logits(peer.model, tokens))) > 0.1
    np.testing.assert_allclose(ours, theirs, 0, TOLERANCE)


def test_an_adapter_that_peft_made_is_read(save_peer, peft, tokens, tmp_path):
    import torch

    peer = save_peer("Qwen2")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        lora_dropout=0.125,
        target_modules=["v_proj", "o_proj", "down_proj"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(fresh_peer(peer.folder), config).eval()
    wrapped.save_pretrained(tmp_path)
    model = relax.load(peer.folder, adapter=tmp_path)
    assert model.config.lora_targets == ("v_proj", "o_proj", "down_proj")
    assert (model.config.lora_rank, model.config.lora_alpha) == (3, 7.0)
    assert model.config.lora_dropout == 0.125
    theirs = peer_logits(wrapped, tokens)
    assert np.max(np.abs(theirs - peer_logits(peer.model, tokens))) > 0.1
    np.testing.assert_allclose(model.logits(tokens), theirs, 0, TOLERANCE)
    model.merge_lora()
    assert model.config.lora_rank == 0
    np.testing.assert_allclose(model.logits(tokens), theirs, 0, TOLERANCE)


def test_an_adapter_comes_back_bit_for_bit(adapted, assert_same_bits):
    peer, model, folder = adapted("Llama")
    back = relax.load(peer.folder, adapter=folder)
    assert back.config == replace(model.config, lora_targets=FAMILIES["Llama"])
    assert_same_bits(*(dict(flat_parameters(m.params)) for m in (back, model)))


def test_the_folder_is_one_of_peft_s(adapted):
    peer, _, folder = adapted("Llama")
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(peer.folder),
        "r": 5,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
        "bias": "none",
        "inference_mode": True,
    }
    shapes = {name: t.shape for name, t in open_adapter(folder).tensors.items()}
    layer = "base_model.model.model.layers.2."
    assert len(shapes) == 3 * 4 * 2
    assert shapes[layer + "self_attn.q_proj.lora_A.weight"] == (5, 30)
    assert shapes[layer + "self_attn.q_proj.lora_B.weight"] == (60, 5)
    assert shapes[layer + "self_attn.o_proj.lora_A.weight"] == (5, 60)
    assert shapes[layer + "mlp.down_proj.lora_B.weight"] == (30, 5)


def test_a_whole_model_is_written_merged(adapted, tmp_path, assert_same_bits):
    _, model, _ = adapted("Qwen2")
    model.save_hf(tmp_path / "merged")
    back = relax.load(tmp_path / "merged")
    _, expected = merge(model.config, model.params)
    assert back.config.lora_rank == 0
    ours = dict(flat_parameters(back.params))
    assert_same_bits(ours, dict(flat_parameters(expected)))
    assert model.config.lora_rank == 5


def test_a_run_keeps_its_adapter(adapted, tmp_path, assert_same_bits):
    peer, model, _ = adapted("Llama")
    model.save(tmp_path / "run")
    back = relax.load(tmp_path / "run")
    assert back.config == model.config and back.origin.name == str(peer.folder)
    assert_same_bits(*(dict(flat_parameters(m.params)) for m in (back, model)))


def test_a_checkpoint_from_before_adapters_loads(adapted, tmp_path, assert_same_bits):
    _, model, _ = adapted("Llama")
    config, params = base_of(model.config, model.params)
    LanguageModel(config, params, None, model.mesh).save(tmp_path / "run")
    [info] = tmp_path.glob("run/checkpoints/0/info/info.json")
    told = json.loads(info.read_text())
    told["model"] = {k: v for k, v in told["model"].items() if "lora" not in k}
    info.write_text(json.dumps(told))
    back = relax.load(tmp_path / "run")
    assert back.config.lora_rank == 0
    assert_same_bits(dict(flat_parameters(back.params)), dict(flat_parameters(params)))


@pytest.fixture
def options(tmp_path):
    return export.ExportConfig(
        kind="export",
        output_path=str(tmp_path / "new"),
        max_shard_gigabytes=5.0,
        add_special_tokens=(),
        new_rows="mean",
        template=None,
        adapter=True,
    )


def test_the_task_writes_the_adapter_alone(adapted, options, assert_same_bits):
    peer, model, _ = adapted("Llama")
    export.run(options, model, SamplingConfig())
    folder = Path(options.output_path)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    back = relax.load(peer.folder, adapter=folder)
    assert_same_bits(*(dict(flat_parameters(m.params)) for m in (back, model)))


def test_there_must_be_an_adapter_to_write(save_peer, options):
    model = relax.load(save_peer("Llama").folder)
    with pytest.raises(ValueError, match=r"no adapter .*task.adapter=false writes"):
        export.run(options, model, SamplingConfig())
    assert not Path(options.output_path).exists()
    with pytest.raises(ValueError, match=r"task.adapter=true writes no tokens"):
        replace(options, add_special_tokens=("<|x|>",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, r"peft_type='IA3' is not supported"),
        ({"use_dora": True}, r"use_dora=True is not supported.*merge the adapter"),
        ({"use_rslora": True}, r"use_rslora=True is not supported"),
        ({"bias": "lora_only"}, r"bias='lora_only' is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern=.* is not supported"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' is not supported"),
        ({"r": 7}, r"adapter=.*lora_A.weight in .* has shape \[5, 44\], .*\[7, 44\]"),
    ],
)
def test_what_is_no_plain_lora_is_refused(adapted, tmp_path, changes, message):
    peer, _, folder = adapted("Llama")
    told = json.loads((folder / "adapter_config.json").read_text()) | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    weights = "adapter_model.safetensors"
    (tmp_path / weights).symlink_to(folder / weights)
    with pytest.raises(ValueError, match=message):
        relax.load(peer.folder, adapter=tmp_path)


def test_an_adapter_of_another_model_is_refused(adapted):
    peer, model, _ = adapted("Llama")
    _, _, other = adapted("Qwen2")
    with pytest.raises(ValueError, match=r"adapter=.* has adapters already; merge"):
        model.load_adapter(other)
    with pytest.raises(FileNotFoundError, match=r"adapter=nowhere: nowhere is not"):
        relax.load(peer.folder, adapter="nowhere")


def test_infer_reads_an_adapter_beside_its_model(adapted, tmp_path, monkeypatch):
    """By the scores of a text, which the model alone gives otherwise."""
    peer, model, folder = adapted("Llama")
    monkeypatch.setattr(inference, "configure", lambda config: None)
    seen = []
    monkeypatch.setattr(
        score, "run", lambda config, model, sampling: seen.append(model)
    )
    for name in (None, str(folder)):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(
                "infer", ["task=score", f"checkpoint={peer.folder}", "prompt=a"]
            )
        inference.start(to_values(config) | {"adapter": name})
    assert [loaded.config.lora_rank for loaded in seen] == [0, 5]
    tokens = np.arange(6)[None]
    np.testing.assert_array_equal(seen[1].logits(tokens), model.logits(tokens))
    assert np.abs(seen[0].logits(tokens) - seen[1].logits(tokens)).max() > 0.1


def test_an_adapter_is_no_checkpoint(adapted):
    _, _, folder = adapted("Llama")
    with pytest.raises(
        ValueError, match=r"is a LoRA adapter of a model: infer\.py takes "
    ):
        relax.load(folder)
