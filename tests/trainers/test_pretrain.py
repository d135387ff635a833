"""Pretraining: what is evaluated and sampled, and what is refused beforehand."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.build import init_train_state
from relax.config import load_config
from relax.data.corpora import DataConfig
from relax.model.llama import make_llama
from relax.ops.logprobs import compute_logits
from relax.optim import OptimizerConfig, make_optimizer
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig, make_mesh, shard_batch
from relax.text.tokenizers import TokenizerConfig, make_tokenizer
from relax.trainers.config import Setup
from relax.trainers.pretrain import make_task

CONF = Path(__file__).parents[2] / "conf"
CONTEXT = 13
# 253 bytes: 252 targets, 19 rows of 13 and one of 5.
VALIDATION = "Größe, ça va? " * 13 + "And the end, at 253 bytes. Fin.\n"
TRAINING = "What a piece of work is a man! " * 60


@pytest.fixture(scope="module")
def make_setup(tmp_path_factory, make_config, make_trainer):
    """A callable: a byte-level setup on a text of TRAINING, then VALIDATION."""
    folder = tmp_path_factory.mktemp("data")
    text = TRAINING + VALIDATION
    (folder / "text.txt").write_text(text, encoding="utf-8")
    data = load_config(CONF / "data/text.yaml") | {
        "path": str(folder / "text.txt"),
        "validation_fraction": (len(VALIDATION) - 0.5) / len(text),
        "cache_dir": str(folder / "cache"),
    }
    optimizer = load_config(CONF / "optimizer/adamw.yaml") | {"warmup_steps": 2}
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes", encoding=None, path=None))
    base = Setup(
        trainer=make_trainer(context=CONTEXT, batch_size=4),
        model=make_config(vocab_size=tokenizer.vocab_size),
        optimizer=OptimizerConfig(**optimizer),
        sampling=SamplingConfig(),
        data=DataConfig(**data),
        tokenizer=tokenizer,
        mesh=make_mesh(MeshConfig(data=1, fsdp=1, tensor=1)),
        seed=5,
    )

    def make(trainer=None, **groups):
        fields = {"context": CONTEXT, "batch_size": 4, **(trainer or {})}
        return base._replace(trainer=make_trainer(**fields), **groups)

    return make


def init(setup: Setup):
    optimizer = make_optimizer(setup.optimizer, setup.trainer.num_steps)
    return init_train_state(setup.model, optimizer, setup.mesh, setup.seed)


@pytest.fixture(scope="module")
def params(make_setup):
    """Parameters larger than at birth, so that targets differ in likelihood."""
    return jax.tree.map(lambda x: 7 * x, init(make_setup()).params)


def plain_evaluation(setup: Setup, params) -> tuple[float, float]:
    """Returns the mean nats of VALIDATION's targets, row by row, and the accuracy."""
    ids = np.frombuffer(VALIDATION.encode(), np.uint8).astype(np.int32)
    forward = jax.jit(make_llama(setup.model).apply)
    nats, correct = [], []
    for start in range(0, len(ids) - 1, CONTEXT):
        row, targets = ids[start : start + CONTEXT], ids[start + 1 :][:CONTEXT]
        out = forward(params, jnp.asarray(row)[None])
        logits = compute_logits(out.hidden, out.unembedding, setup.model.vocab_size)
        logits = np.asarray(logits, np.float64)[0, :, : setup.model.vocab_size]
        logits = logits[: len(targets)]
        total = np.log(np.exp(logits).sum(axis=-1))
        nats.extend(total - logits[np.arange(len(targets)), targets])
        correct.extend(logits.argmax(axis=-1) == targets)
    assert len(nats) == 252
    return float(np.mean(nats)), float(np.mean(correct))


@pytest.mark.parametrize("eval_batch_size", [1, 7, 23])
def test_evaluation_covers_every_target_once(make_setup, params, eval_batch_size):
    setup = make_setup({"eval_batch_size": eval_batch_size})
    metrics = make_task(setup).evaluate(params).metrics
    loss, accuracy = plain_evaluation(setup, params)
    assert metrics["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert metrics["val_accuracy"] == pytest.approx(accuracy, abs=1e-7)
    # A target is a byte.
    assert metrics["val_bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-6)
    assert set(metrics) == {"val_loss", "val_bits_per_byte", "val_accuracy"}


def test_bits_per_byte_count_the_bytes_of_the_targets(make_setup, data_dir):
    """With pieces of several bytes, a target is not a byte."""
    path = str(data_dir / "stories260K_hf/tokenizer.model")
    tokenizer = make_tokenizer(
        TokenizerConfig(kind="sentencepiece", encoding=None, path=path)
    )
    model = replace(make_setup().model, vocab_size=tokenizer.vocab_size)
    setup = make_setup(tokenizer=tokenizer, model=model)
    metrics = make_task(setup).evaluate(init(setup).params).metrics
    ids = tokenizer.encode(VALIDATION)
    # The pieces spell VALIDATION's 253 bytes and the space that goes before a text.
    size = 1 + 253 - len(tokenizer.token_bytes(ids[0]))
    nats = metrics["val_loss"] * (len(ids) - 1)
    assert len(ids) < size
    assert metrics["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / size)


def test_without_a_validation_split_nothing_is_evaluated(make_setup):
    setup = make_setup()
    data = replace(setup.data, validation_fraction=0.0)
    assert make_task(setup._replace(data=data)).evaluate is None


def test_training_learns_the_text(make_setup):
    setup = make_setup({"num_steps": 60, "steps_per_dispatch": 30})
    optimizer = replace(setup.optimizer, learning_rate=0.01)
    setup = setup._replace(optimizer=optimizer)
    task, state = make_task(setup), init(setup)
    losses = []
    for start in (0, 30):
        rows = [task.batch_at(step) for step in range(start, start + 30)]
        stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        state, metrics = task.train_step(state, shard_batch(setup.mesh, stacked, 1))
        losses += metrics["loss"].tolist()
    assert losses[0] == pytest.approx(math.log(257), abs=0.2)
    assert losses[-1] < 1.0
    assert int(state.step) == 60


def test_samples_repeat_and_start_after_the_prompt(make_setup, params):
    fields = {"sample_prompt": "To be", "sample_tokens": 11}
    evaluate = make_task(make_setup(fields)).evaluate
    first, again = evaluate(params).samples, evaluate(params).samples
    assert first == again
    assert [set(row) for row in first] == [{"prompt", "completion"}]
    assert first[0]["prompt"] == "To be"
    assert 0 < len(first[0]["completion"]) <= 11


def test_no_sample_tokens_no_samples(make_setup, params):
    setup = make_setup({"sample_prompt": "", "sample_tokens": 0})
    assert make_task(setup).evaluate(params).samples == []


@pytest.mark.parametrize("prompt", ["", "a" * 101])
def test_a_sample_prompt_that_cannot_be_used_is_refused(make_setup, prompt):
    setup = make_setup({"sample_prompt": prompt, "sample_tokens": 3})
    with pytest.raises(ValueError) as raised:
        make_task(setup)
    assert str(raised.value) == (
        f"trainer.sample_prompt={prompt!r} is {len(prompt)} tokens; give 1 to 100 "
        "(model.max_position_embeddings=101), or trainer.sample_tokens=0"
    )


def test_a_context_longer_than_the_models_is_refused(make_setup):
    with pytest.raises(ValueError) as raised:
        make_task(make_setup({"context": 102}))
    assert str(raised.value) == (
        "trainer.context=102 is longer than model.max_position_embeddings=101; lower "
        "the one or raise the other"
    )


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (
            {"batch_size": 12, "accumulation": 4},
            "batch_size / trainer.accumulation=3",
        ),
        ({"batch_size": 12, "eval_batch_size": 7}, "eval_batch_size=7"),
    ],
)
def test_rows_that_the_mesh_cannot_share_are_refused(make_setup, fields, name):
    mesh = SimpleNamespace(shape={"data": 3, "fsdp": 2, "tensor": 1})
    with pytest.raises(ValueError) as raised:
        make_task(make_setup(fields, mesh=mesh))
    assert str(raised.value) == (
        f"trainer.{name} must be a multiple of mesh.data x mesh.fsdp = 6"
    )
