"""A run that is taken back to an earlier step, and one that can't be."""

import json
import shutil
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from relax import training
from relax.checkpoints.native import RunCheckpoints
from relax.config import load_config, to_values

CONF = Path(__file__).parents[1] / "conf"
SMALL = (
    "model.num_hidden_layers=1",
    "model.hidden_size=20",
    "model.intermediate_size=28",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "data=text",
    "optimizer=lion",
    "optimizer.warmup_steps=1",
    "trainer.num_steps=6",
    "trainer.batch_size=2",
    "trainer.context=11",
    "trainer.eval_every=2",
    "trainer.keep_last=3",
    "trainer.sample_tokens=0",
    "name=small",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of six steps with checkpoints at 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text("To be, or not to be: that is the question.\n" * 7)
    places = (
        f"data.path={folder}/text.txt",
        f"data.cache_dir={folder}/cache",
        f"run_folder={folder}/run",
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = to_values(compose("train", overrides=[*SMALL, *places]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "configure", lambda config: None)
        training.start(config)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path, monkeypatch) -> Path:
    """A copy of the run."""
    monkeypatch.setattr(training, "configure", lambda config: None)
    return shutil.copytree(finished, tmp_path / "run")


def steps(run: Path) -> list[int]:
    with RunCheckpoints(run, read_only=True) as checkpoints:
        return checkpoints.steps()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.hidden_size": 24}, "saved with another configuration"),
        (
            {"trainer.num_steps": 4},
            "is at step 4, trainer.num_steps=4: nothing is left",
        ),
        ({"mesh.tensor": 7919}, "mesh.tensor=7919 needs 7919 devices"),
    ],
)
def test_a_step_that_cannot_be_resumed_costs_no_later_one(run, changes, message):
    before = load_config(run / "config.yaml")
    with pytest.raises(ValueError, match=message):
        training.resume(f"{run}@4", changes)
    assert steps(run) == [2, 4, 6]
    assert load_config(run / "config.yaml") == before


def test_an_earlier_step_takes_the_run_back(run, finished):
    training.resume(f"{run}@2", {"trainer.eval_every": 0})
    assert steps(run) == [2, 6]
    config = load_config(finished / "config.yaml")
    config["trainer"]["eval_every"] = 0
    assert load_config(run / "config.yaml") == config


def test_a_finished_run_named_without_a_step_is_at_its_last(run):
    with pytest.raises(ValueError, match=r"is at step 6, .* nothing is left"):
        training.resume(str(run), {})


def test_the_best_step_is_taken_where_it_is_asked_for(run):
    metrics = run / "checkpoints" / "2" / "metrics" / "metrics"
    metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"val_loss": 0.0}))
    with pytest.raises(ValueError, match=r"is at step 2, .*=2: nothing is left"):
        training.resume(f"{run}@best", {"trainer.num_steps": 2})
    with pytest.raises(ValueError, match=r"is at step 6, .*=2: nothing is left"):
        training.resume(str(run), {"trainer.num_steps": 2})


def test_a_new_run_takes_no_folder_from_another(tmp_path):
    made = [training.make_run_folder(tmp_path / "runs" / "a") for _ in range(3)]
    assert [folder.name for folder in made] == ["a", "a-1", "a-2"]
    assert all(folder.is_dir() for folder in made)


def test_choices_that_the_run_made_itself_may_be_said_again(run):
    training.resume(
        f"{run}@4", {"trainer": "pretrain", "data": "text", "+trainer.eval_every": 0}
    )
    assert load_config(run / "config.yaml")["trainer"]["eval_every"] == 0
    with pytest.raises(ValueError, match="a resumed run keeps its own configuration"):
        training.resume(f"{run}@4", {"trainer": "sft"})


def goal(metric: str, value: float) -> dict:
    return {"trainer.stop_metric": metric, "trainer.stop_value": value}


def test_a_metric_that_no_evaluation_gives_is_refused(run):
    with pytest.raises(ValueError, match="stop_metric=val_pass@1 is none of what an"):
        training.resume(f"{run}@4", goal("val_pass@1", 0.5))
    assert steps(run) == [2, 4, 6]


def test_a_run_that_has_come_to_its_goal_ends_and_stays_ended(run):
    training.resume(f"{run}@2", goal("val_loss", 99.0))
    assert steps(run) == [2, 4]
    with pytest.raises(ValueError, match=r"has reached .*=val_loss .*=99.0: nothing"):
        training.resume(str(run), {})
    assert steps(run) == [2, 4]
    training.resume(str(run), goal("val_loss", 0.0))
    assert steps(run) == [2, 4, 6]


def test_data_that_has_changed_is_noticed(run, finished):
    """Put back, or named again, the run goes on."""
    text = finished.parent / "text.txt"
    before = text.read_text()
    try:
        text.write_text(before + "Ay, there's the rub.\n")
        with pytest.raises(ValueError, match=r"the data of .* has changed since: put "):
            training.resume(f"{run}@4", {})
        assert steps(run) == [2, 4, 6]
        training.resume(f"{run}@4", {"data.path": str(text)})
    finally:
        text.write_text(before)
    assert steps(run) == [2, 4, 6]
    with pytest.raises(ValueError, match=r"the data of .* has changed since: put "):
        training.resume(f"{run}@6", {"trainer.num_steps": 7})


def composed(*overrides) -> training.TrainingConfigs:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", ["name=small", "run_folder=small", *overrides])
    return training.typed(to_values(config))


@pytest.mark.parametrize(
    ("data", "reward"),
    [
        (("data=arithmetic",), "exact_match"),
        (("data=countdown",), "countdown"),
        (("data=gsm8k", "data.path=x.jsonl"), "numeric_answer"),
        (("data=prompts", "data.path=x.jsonl"), "exact_match"),
    ],
)
def test_data_is_judged_by_its_own_reward(data, reward):
    assert composed("trainer=grpo", *data).trainer.rewards == (reward,)
    assert composed("trainer=sft", *data).trainer.eval_reward == reward
    both = "trainer.rewards=[auto,ends]", "trainer.outcome_reward=ends"
    assert composed("trainer=grpo", *data, *both).trainer.rewards == (reward, "ends")
    assert (
        composed("trainer=sft", *data, "trainer.eval_reward=null").trainer.eval_reward
        is None
    )


@pytest.mark.parametrize(
    ("before", "change", "refused"),
    [
        ((), "trainer.num_iterations=2", "trainer.num_iterations=2: .* goes on with 1"),
        ((), "trainer.num_generations=4", None),
        ((), "sampling.top_k=5", None),
        (("trainer.num_iterations=2",), "sampling.top_k=5", r"sampling\.top_k=5: "),
        (("trainer.num_iterations=2",), "trainer.epsilon=0.1", None),
        (
            ("trainer.beta=0.1", "trainer.reference=frozen"),
            "trainer.reference=synced",
            r"trainer\.reference=synced: .* goes on with frozen, which .* start a ",
        ),
    ],
)
def test_a_resumed_run_keeps_what_its_state_depends_on(before, change, refused):
    old = composed("trainer=grpo", *before)
    new = composed("trainer=grpo", *before, change)
    if refused is None:
        training._check_kept(old, new, Path("there"))
    else:
        with pytest.raises(ValueError, match=refused):
            training._check_kept(old, new, Path("there"))
