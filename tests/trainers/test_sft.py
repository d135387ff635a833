"""Supervised fine-tuning: what a step's loss counts, what it trains, and resuming."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from relax import training
from relax.build import init_train_state, with_vocabulary
from relax.checkpoints.native import RunCheckpoints
from relax.config import to_values
from relax.model.llama import make_llama
from relax.model.parameters import flat_parameters
from relax.ops.logprobs import compute_logits
from relax.optim import make_optimizer
from relax.sharding import make_mesh
from relax.text.chat import named_template
from relax.text.tokenizers import make_tokenizer
from relax.trainers import common, sft
from relax.trainers.config import Setup

CONF = Path(__file__).parents[2] / "conf"
ROWS, CONTEXT = 8, 41
SMALL = (
    "trainer=sft",
    "data=conversations",
    "data.template=plain",
    "data.validation_fraction=0.2",
    "model.num_hidden_layers=1",
    "model.hidden_size=20",
    "model.intermediate_size=28",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.max_position_embeddings=67",
    "model.initializer_range=0.3",
    f"trainer.batch_size={ROWS}",
    f"trainer.context={CONTEXT}",
    "trainer.num_steps=5",
    "trainer.eval_every=0",
    "trainer.eval_batch_size=3",
    "trainer.eval_prompts=0",
    "optimizer=adamw",
    "optimizer.warmup_steps=1",
    "name=small",
)
# Close to plain descent, where rounding is not turned into signs.
DESCENT = ("optimizer.eps=1.0", "optimizer.learning_rate=1.0")
NOISY = (
    "model.lora_rank=3",
    "model.lora_targets=[q_proj,down_proj]",
    "model.lora_dropout=0.2",
    "trainer.neftune_alpha=5",
    "trainer.label_smoothing=0.1",
    "trainer.accumulation=2",
    "trainer.batch_size=2",
    "data.packing=true",
    "trainer.context=64",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Sixteen conversations, whose replies have 2 to 17 letters."""
    file = tmp_path_factory.mktemp("records") / "chats.jsonl"
    chats = (
        [
            {"role": "user", "content": "b" * (count % 3 + 1)},
            {"role": "assistant", "content": "abcdefghijklmnopq"[: count + 2]},
        ]
        for count in range(16)
    )
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return file


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory):
    """Keeps what is compiled here for the runs that need it again."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def composed(path):
    """A callable: the composed config of a small run, with overrides."""

    def compose_with(*overrides: str) -> dict:
        places = f"data.path={path}", f"data.cache_dir={path.parent}/cache"
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("train", overrides=[*SMALL, *places, *overrides])
        return to_values(config)

    return compose_with


@pytest.fixture(scope="module")
def prepared(composed):
    """A callable: setup, task and first state of a small run, with overrides."""

    def prepare(*overrides: str):
        configs = training.typed(composed(*overrides))
        tokenizer = make_tokenizer(configs.tokenizer)
        setup = Setup(
            trainer=configs.trainer,
            model=with_vocabulary(configs.model, tokenizer),
            optimizer=configs.optimizer,
            sampling=configs.sampling,
            data=configs.data,
            tokenizer=tokenizer,
            mesh=make_mesh(configs.mesh),
            seed=configs.run.seed,
            template=named_template("plain", tokenizer, "data.template"),
        )
        optimizer = make_optimizer(configs.optimizer, configs.trainer.num_steps)
        state = init_train_state(setup.model, optimizer, setup.mesh, setup.seed)
        return setup, sft.make_task(setup), state

    return prepare


@pytest.fixture(scope="module")
def plain(prepared):
    """What a step of all rows at once, without any noise, comes to."""
    setup, task, state = prepared(*DESCENT)
    before = arrays(state.params)
    evaluated = task.evaluate(state.params).metrics
    expected = loss_by_hand(setup, state.params, task.batch_at(0))
    return expected, before, *stepped(task, state), evaluated


def loss_by_hand(setup: Setup, params, batch) -> tuple[float, np.ndarray]:
    """Returns the mean over all targets of a batch, and that over each row's."""
    V, apply = setup.model.vocab_size, make_llama(setup.model).apply

    @jax.jit
    def logits_of(params, tokens):
        out = apply(params, tokens)
        return compute_logits(out.hidden, out.unembedding, V)[..., :V]

    logits = np.asarray(logits_of(params, batch["tokens"]), np.float64)
    total = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    costs, mask = (total - chosen) * batch["loss_mask"], batch["loss_mask"]
    return costs.sum() / mask.sum(), costs.sum(1) / mask.sum(1)


def stepped(task, state) -> tuple[dict, dict]:
    """Returns the parameters after the first step, and its metrics."""
    batch = {name: rows[None] for name, rows in task.batch_at(0).items()}
    state, metrics = task.train_step(state, batch)
    return arrays(state.params), {name: v.tolist() for name, v in metrics.items()}


def arrays(params) -> dict[str, np.ndarray]:
    return {name: np.array(leaf) for name, leaf in flat_parameters(params)}


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {n for n in before if before[n].tobytes() != after[n].tobytes()}


def test_the_loss_is_the_mean_over_all_targets_of_the_rows(plain):
    (expected, by_row), _, _, metrics, _ = plain
    assert metrics["loss"] == [pytest.approx(expected, rel=1e-6)]
    # Rows have so different a number of targets that a mean of means would show.
    assert abs(by_row.mean() - expected) > 1e-3


def test_accumulation_counts_the_targets_of_all_parts(plain, prepared):
    _, before, after, metrics, _ = plain
    _, task, state = prepared(*DESCENT, "trainer.accumulation=4")
    in_parts, of_parts = stepped(task, state)
    assert of_parts["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    assert of_parts["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-6)
    for name, value in after.items():
        np.testing.assert_allclose(in_parts[name], value, rtol=0, atol=1e-6)
        assert np.abs(value - before[name]).max() > 1e-4, name


def test_label_smoothing_is_in_the_gradient_alone(plain, prepared):
    _, _, after, metrics, evaluated = plain
    _, task, state = prepared(*DESCENT, "trainer.label_smoothing=0.2")
    assert task.evaluate(state.params).metrics == evaluated
    smoothed, of_smoothed = stepped(task, state)
    assert of_smoothed["loss"] == pytest.approx(metrics["loss"], rel=1e-6)
    apart = {name: np.abs(smoothed[name] - after[name]).max() for name in after}
    assert min(apart.values()) > 1e-5, apart


def test_noise_on_the_embeddings_is_in_training_alone(plain, prepared):
    *_, metrics, evaluated = plain
    _, task, state = prepared(*DESCENT, "trainer.neftune_alpha=5")
    assert task.evaluate(state.params).metrics == evaluated
    _, noisy = stepped(task, state)
    assert abs(noisy["loss"][0] - metrics["loss"][0]) > 1e-4


@pytest.fixture
def in_process(monkeypatch):
    """Leaves the process's own settings as they are."""
    monkeypatch.setattr(training, "configure", lambda config: None)


@pytest.fixture(scope="module")
def whole(composed, tmp_path_factory) -> Path:
    """A run of five steps that nothing interrupted, with checkpoints at 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    kept = "trainer.save_every=2", "trainer.keep_last=3"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "configure", lambda config: None)
        training.start(composed(*NOISY, *kept, f"run_folder={folder}"))
    return folder


@pytest.fixture
def uncompiled(in_process, monkeypatch):
    """Fails a run that gets as far as its first parameters or step."""

    def reached(*arguments, **named):
        raise AssertionError("the mistake was not seen")

    monkeypatch.setattr(training, "init_train_state", reached)
    monkeypatch.setattr(common, "make_train_step", reached)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("trainer.eval_prompts=3", "data.validation_fraction=0.0"),
            r"trainer\.eval_prompts=3, and the data holds no validation records; hold "
            r"some out, or set trainer\.eval_prompts=0",
        ),
        (
            ("data.template=null",),
            r"data\.template=null, and the model has no chat template: choose one of "
            r".*plain.*",
        ),
        (
            ("trainer.eval_prompts=3", "data.template=null"),
            r"data\.template=null, and the model has no chat template.* choose one of "
            r".*plain.*",
        ),
        (
            ("trainer.context=71",),
            r"trainer\.context=71 is longer than model\.max_position_embeddings=67; .*",
        ),
        (
            ("trainer.eval_prompts=3", "trainer.eval_reward=nonsense"),
            r".*nonsense.*exact_match.*",
        ),
        (("data.path=/nowhere.jsonl",), r"data\.path=/nowhere\.jsonl.*"),
        (("trainer.context=1",), r"the training split of data has no examples \(13 .*"),
    ],
)
def test_mistakes_are_named_before_anything_compiles(
    composed, uncompiled, tmp_path, overrides, message
):
    with pytest.raises((ValueError, OSError), match=message) as raised:
        training.start(composed(*overrides, f"run_folder={tmp_path}/run"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_records_that_were_cut_are_counted(composed, uncompiled, tmp_path, caplog):
    """Of c = 0 to 12, conversation c has 23 + c + c % 3 tokens."""
    with pytest.raises(AssertionError, match="the mistake was not seen"):
        training.start(composed("trainer.context=33", f"run_folder={tmp_path}/run"))
    (line,) = (record.message for record in caplog.records if "cut" in record.message)
    assert line == (
        "data: 2 of 13 records are longer than 34 tokens and are cut at their end"
    )


TEXT = {"text": "abc"}
CHAT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
ASKING, BEGINNING = {"messages": CHAT}, {"messages": CHAT[::-1]}
LONG = {"messages": [{"role": "user", "content": "b" * 61}, CHAT[1]]}


@pytest.mark.parametrize(
    ("held_out", "line", "evaluates"),
    [
        pytest.param([ASKING] * 3, None, True, id="all ask"),
        pytest.param(
            [TEXT, ASKING, LONG],
            "data: 2 of the first 3 held-out records are not completed: record 3 of "
            "the data holds no prompt, but text; give prompt or messages, to name the "
            "first",
            True,
            id="texts come first",
        ),
        pytest.param(
            [TEXT] * 3,
            "data: plain texts ask nothing, so no prompts are completed",
            False,
            id="none asks",
        ),
        pytest.param(
            [BEGINNING, LONG, TEXT],
            "data: 3 of the first 3 held-out records are not completed: record 3 of "
            "the data begins with the assistant, to name the first",
            False,
            id="none fits",
        ),
    ],
)
def test_what_asks_nothing_refuses_no_run(
    composed, uncompiled, tmp_path, monkeypatch, caplog, held_out, line, evaluates
):
    caplog.set_level("INFO")
    monkeypatch.setattr(common, "make_train_step", lambda *args, **named: None)
    file = tmp_path / "mixed.jsonl"
    records = [ASKING] * 3 + held_out
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = composed(
        f"data.path={file}",
        "data.validation_fraction=0.5",
        "data.loss_on=all",
        "trainer.eval_prompts=2",
        "trainer.eval_every=2",
        "trainer.stop_metric=val_ended",
        "trainer.stop_value=0.5",
        "sampling.max_new_tokens=5",
        f"run_folder={tmp_path}/run",
    )
    given = "the mistake was not seen" if evaluates else "val_ended is none of what an"
    with pytest.raises((AssertionError, ValueError), match=given):
        training.start(config)
    said = [m for m in caplog.messages if "completed" in m]
    assert said == ([line] if line else [])


def test_a_resumed_run_equals_one_that_was_not_interrupted(whole, in_process, tmp_path):
    """Packed rows, adapters with dropout, noise, smoothing and micro-batches."""
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    training.resume(f"{resumed}@2", {})
    assert changed(saved(whole, 5), saved(resumed, 5)) == set()
    rows = untimed(whole)
    assert untimed(resumed) == rows
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 5]


def test_a_resumed_run_keeps_its_template_and_notices_other_data(
    composed, in_process, tmp_path, path
):
    """The template's file may change and go; one that is named again is read."""
    file, chats = tmp_path / "own.jinja", tmp_path / "chats.jsonl"
    tokenizer = make_tokenizer(training.typed(composed()).tokenizer)
    file.write_text(named_template("plain", tokenizer, "data.template").source)
    chats.write_text(path.read_text())
    places = f"data.template={file}", f"data.path={chats}", f"run_folder={tmp_path}/run"
    training.start(
        composed(
            *places,
            "trainer.num_steps=2",
            "trainer.save_every=1",
            "trainer.keep_last=2",
        )
    )
    run = tmp_path / "run"
    saved_at_2 = saved(run, 2)
    file.unlink()
    shutil.rmtree(run / "checkpoints" / "2")
    training.resume(f"{run}@1", {})
    assert changed(saved_at_2, saved(run, 2)) == set()
    with pytest.raises(FileNotFoundError, match=r"^data\.template='.*' is not a file$"):
        training.resume(f"{run}@1", {"data.template": str(file)})
    chats.write_text(path.read_text() * 2)
    with pytest.raises(ValueError, match=r"the data of .* has changed since"):
        training.resume(f"{run}@2", {"trainer.num_steps": 3})


def test_adapters_alone_are_trained(whole):
    states = saved(whole, 2), saved(whole, 5)
    adapters = {name for name in states[0] if "lora_" in name}
    # A and B of two projections, and two moments of each: none of what is frozen.
    assert len(adapters) == 2 * 2 * 3
    counted = {name for name in states[0] if "count" in name or "step" in name}
    assert changed(*states) == adapters | counted
    frozen = states[0].keys() - adapters - counted
    assert all(name.startswith("['params']") for name in frozen)


def saved(run: Path, step: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a checkpoint, parameters and optimizer, by path."""
    import orbax.checkpoint as ocp

    with RunCheckpoints(run, read_only=True) as checkpoints:
        folder = checkpoints.folder / str(step)
    items = ("params", "optimizer")
    tree = {item: ocp.StandardCheckpointer().restore(folder / item) for item in items}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def untimed(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    timed = ("time", "step_time", "tokens_per_second", "mfu")
    return [
        {name: value for name, value in json.loads(line).items() if name not in timed}
        for line in lines
    ]
