"""GRPO: killed anywhere and resumed as if it had not been, and what a step computes.

The runs are of a one-layer model in this process. Each rollout serves four steps, its
rewards are a module's, and its groups are replaced where they say nothing.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hydra import compose, initialize_config_dir

from relax import training
from relax.checkpoints.native import RunCheckpoints
from relax.config import load_config, to_values
from relax.generation.requests import Completion, Request
from relax.sharding import MeshConfig, make_mesh
from relax.steps import MISMATCH, init_state
from relax.text.tokenizers import TokenizerConfig, make_tokenizer
from relax.trainers import common, grpo, policy
from relax.trainers.config import Setup
from relax.trainers.prompts import Prompt
from relax.trainers.rollout import Counts, Group
from relax.trainers.sampler import Sampler

ROOT = Path(__file__).parents[2]
ROWS, LONGEST, CONTEXT, WIDTH = 8, 7, 13, 11
BYTES = make_tokenizer(TokenizerConfig(kind="bytes", encoding=None, path=None))
SGD = optax.sgd(0.5)


def composed(*overrides: str) -> dict:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return to_values(compose("train", overrides=list(overrides)))


class Output(NamedTuple):
    hidden: jax.Array
    unembedding: jax.Array


def bigram(params, tokens):
    """A token's logits depend on it alone."""
    params = params["bigram"]
    return Output(jnp.tanh(params["embed"][tokens]), params["head"])


def bigram_params():
    rng = np.random.default_rng(0)
    size = (BYTES.vocab_size, WIDTH)
    weights = {
        name: jnp.asarray(rng.normal(size=size), jnp.float32)
        for name in ("embed", "head")
    }
    return {"bigram": weights}


def groups_of(rewards, ended, seed: int = 1) -> list[Group]:
    """Returns groups of random completions, of up to LONGEST tokens."""
    rng = np.random.default_rng(seed)
    groups = []
    for number, totals in enumerate(rewards):
        requests, completions = [], []
        for sample in range(len(totals)):
            ids = rng.integers(97, 123, size=rng.integers(1, LONGEST + 1)).tolist()
            requests.append(Request((65 + number, 61), number, sample))
            completions.append(
                Completion(
                    token_ids=ids,
                    sampled_logprobs=rng.normal(size=len(ids)).tolist(),
                    finish_reason="stop" if ended else "length",
                )
            )
        totals = np.array(totals, float)
        prompt = Prompt(requests[0].prompt, "", "1", {})
        groups.append(Group(prompt, requests, completions, totals[:, None], totals))
    return groups


VARIED = [[0.0, 1.0, 0.3, 2.0], [1.0, -1.0, 0.1, np.nan]]


@pytest.fixture(scope="module")
def configs():
    """The defaults of trainer=grpo, with few sums."""
    data = ("data.digits=1", "data.validation_size=7")
    sizes = ("trainer.num_steps=60", "trainer.eval_prompts=0")
    names = ("name=unit", "run_folder=unit")
    config = composed("trainer=grpo", "optimizer.warmup_steps=1", *data, *sizes, *names)
    return training.typed(config)


@pytest.fixture
def step(configs, monkeypatch, make_config, tmp_path):
    """A callable: state and metrics after a step on given groups, of a task as it is.

    Only its model, its optimizer and its completions are others.
    """
    apply = SimpleNamespace(apply=bigram)
    monkeypatch.setattr(policy, "make_llama", lambda *_: apply)
    monkeypatch.setattr(common, "make_optimizer", lambda *_: SGD)

    def run(rewards=VARIED, ended=True, **fields):
        sizes = {"batch_size": ROWS, "num_generations": len(rewards[0])}
        trainer = replace(configs.trainer, context=CONTEXT, **sizes, **fields)
        setup = Setup(
            trainer=trainer,
            model=make_config(vocab_size=BYTES.vocab_size),
            optimizer=configs.optimizer,
            sampling=replace(configs.sampling, max_new_tokens=LONGEST),
            data=configs.data,
            tokenizer=BYTES,
            mesh=make_mesh(MeshConfig(data=1, fsdp=1, tensor=1)),
            seed=0,
            folder=tmp_path,
        )
        made = groups_of(rewards, ended), Counts(2, 2, 40, 0, 0.5)
        monkeypatch.setattr(policy.RolloutMaker, "make", lambda *_: made)
        task = grpo.make_task(setup)
        params = bigram_params()
        prepared = task.prepare(init_state(params, SGD, task.extra(params)), 0)
        batch = jax.tree.map(lambda x: x[None], task.batch_at(0))
        # Op by op: what is compiled for one loss serves all others.
        with jax.disable_jit():
            state, metrics = task.train_step(prepared.state, batch)
        task.close()
        return state, {name: float(value[0]) for name, value in metrics.items()}

    return run


LOSSES = {
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {},
    "dapo": {},
    "luspo": {},
    "cispo": {"epsilon_high": 5.0},
    "sapo": {},
    "vespo": {},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "gspo-token": {
        "loss_type": "dapo",
        "importance_sampling_level": "sequence_token",
        "scale_rewards": "batch",
        "mask_truncated_completions": True,
    },
}


def assert_same(one, other):
    """Same parameters and metrics, to a millionth."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
        one[0].params,
        other[0].params,
    )
    assert one[1] == pytest.approx(other[1], rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_is_the_same_in_parts(step, name):
    fields = {"loss_type": name, **LOSSES[name]}
    whole = step(**fields)
    assert whole[1]["grad_norm"] > 1e-2
    for accumulation in (2, 4) if name in ("grpo", "dapo") else (4,):
        assert_same(step(**fields, accumulation=accumulation), whole)
    moved = jax.tree.map(jnp.subtract, whole[0].params, bigram_params())
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(moved)) > 1e-3


def assert_nothing_happens(state, metrics):
    assert metrics["grad_norm"] == 0.0
    assert all(np.isfinite(list(metrics.values())))
    jax.tree.map(np.testing.assert_array_equal, state.params, bigram_params())


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["grpo", "bnpo", "dapo", "cispo", "vespo"])
def test_where_all_completions_are_masked_nothing_changes(step, name, accumulation):
    fields = {"mask_truncated_completions": True, "accumulation": accumulation}
    fields |= {"top_entropy_quantile": 0.5, "entropy_coef": 0.1}
    state, metrics = step(ended=False, loss_type=name, **fields)
    assert_nothing_happens(state, metrics)
    assert metrics["loss"] == 0.0


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_reward_that_is_constant_teaches_nothing(step, scale):
    rewards = [[0.1, 0.1, 0.1, 0.1]] * 2
    assert_nothing_happens(*step(rewards, scale_rewards=scale))


def test_where_nothing_could_be_scored_nothing_changes(step):
    assert_nothing_happens(*step([[np.nan] * 4] * 2))


def test_a_group_of_one_teaches_nothing(step):
    rewards = [[float(number)] for number in range(ROWS)]
    assert_nothing_happens(*step(rewards, scale_rewards="none"))


# Runs, from here on with compiled programs kept: those above compile many small ones.
MODULE = """
import os, signal, time
calls, stop_at = [], None

def outcome(sample):
    calls.append((sample.prompt, sample.completion))
    if len(calls) == stop_at:
        raise KeyboardInterrupt
    if len(calls) == int(os.environ.get("KILL_AT", 0)):
        while not os.path.exists(os.environ["KILL_AFTER"]):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    return float(sum(sample.completion.encode()) % 7 == 0)

def varied(sample):
    return sum(sample.completion.encode()) % 11 / 11
"""
REWARDS = ("policy_rewards:outcome", "policy_rewards:varied")
MODEL = (
    "model.num_hidden_layers=1",
    "model.hidden_size=20",
    "model.intermediate_size=28",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.scan_layers=true",
    "model.initializer_range=0.3",
)
# Two rollouts of two groups; checkpoints at 3, 6 and 8, the first two while a rollout
# is in use.
RUN = (
    *MODEL,
    "trainer=grpo",
    "optimizer=adamw",
    "optimizer.warmup_steps=1",
    "optimizer.learning_rate=1e-2",
    "trainer.num_steps=8",
    "trainer.batch_size=4",
    "trainer.num_generations=4",
    "trainer.steps_per_generation=2",
    "trainer.num_iterations=2",
    "trainer.context=16",
    "trainer.eval_every=0",
    "trainer.eval_prompts=0",
    "trainer.save_every=3",
    "trainer.keep_last=3",
    "trainer.reference=synced",
    "trainer.ref_sync_steps=2",
    "trainer.beta=0.1",
    "trainer.dynamic_sampling=true",
    "trainer.log_completions_every=1",
    f"trainer.rewards=[{','.join(REWARDS)}]",
    "trainer.reward_weights=[1.0,0.5]",
    "sampling.max_new_tokens=5",
    "sampling.temperature=0.7",
    "sampling.top_k=7",
    "sampling.top_p=0.95",
    f"sampling.stop_token_ids={[*range(0, 256, 6)]}".replace(" ", ""),
    "name=small",
)
ROLLED_OUT, G = 8, 4  # completions of a rollout, and of a group
TIMED = ("time", "tokens_per_second", "mfu")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with the rewards and with the programs compiled for these runs."""
    folder = tmp_path_factory.mktemp("policy")
    (folder / "policy_rewards.py").write_text(MODULE)
    options = {
        "jax_compilation_cache_dir": str(folder / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "configure", lambda config: None)
        patch.syspath_prepend(folder)
        for name, value in options.items():
            jax.config.update(name, value)
        yield folder
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="module")
def rewards(work):
    return importlib.import_module("policy_rewards")


@pytest.fixture
def asked(rewards, monkeypatch):
    """What the rewards were called with in a test."""
    monkeypatch.setattr(rewards, "calls", [])
    return rewards.calls


@pytest.fixture(scope="module")
def whole(work, rewards) -> Path:
    """The folder of a run that nothing interrupted."""
    training.start(composed(*RUN, f"run_folder={work}/whole"))
    (work / "calls.json").write_text(json.dumps(rewards.calls))
    return work / "whole"


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "run")


def last_state(folder: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a run's last checkpoint, by path."""
    import orbax.checkpoint as ocp

    with RunCheckpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.folder / str(checkpoints.step_named("last"))
    found = {}
    for item in ("params", "optimizer"):
        tree = ocp.StandardCheckpointer().restore(step / item)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        found |= {f"{item}{jax.tree_util.keystr(k)}": np.asarray(v) for k, v in leaves}
    return found


def untimed(folder: Path, name: str) -> list[dict]:
    rows = map(json.loads, (folder / name).read_text().splitlines())
    return [
        {key: v for key, v in row.items() if not key.endswith(TIMED)} for row in rows
    ]


def differences(folder: Path, other: Path) -> set[str]:
    """Returns what of two runs is not the same to the last bit."""
    first, second = last_state(folder), last_state(other)
    assert first.keys() == second.keys()
    found = {
        path.split("[")[0] + ("/extra" if "extra" in path else "")
        for path in first
        if first[path].tobytes() != second[path].tobytes()
    }
    for name in ("metrics.jsonl", "completions.jsonl"):
        if untimed(folder, name) != untimed(other, name):
            found.add(name)
    return found


def second_rollout(work: Path, whole: Path) -> list[list[str]]:
    """Returns what the reward was called with for the uninterrupted second rollout."""
    with RunCheckpoints(whole, read_only=True) as checkpoints:
        taken = checkpoints.info(3)["progress"]["prompts_consumed"]
    return json.loads((work / "calls.json").read_text())[taken * G :]


def trained(whole: Path) -> list[dict]:
    return untimed(whole, "metrics.jsonl")


def test_the_run_is_worth_resuming(whole):
    """It learns from both rewards, replaces groups, clips ratios, has a reference."""
    rows = trained(whole)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert min(row["grad_norm"] for row in rows) > 0.1
    assert [row["step"] for row in rows if "reward" in row] == [1, 5]
    assert any(row["clip_ratio/region_mean"] > 0 for row in rows)
    assert rows[-1]["kl"] > 1e-3
    shares = [row["completions/clipped_ratio"] for row in rows if "reward" in row]
    assert any(0 < share < 1 for share in shares)
    with RunCheckpoints(whole, read_only=True) as checkpoints:
        assert checkpoints.steps() == [3, 6, 8]
        consumed = [checkpoints.info(s)["progress"]["prompts_consumed"] for s in (3, 6)]
    assert 2 <= consumed[0] < consumed[1]
    assert consumed[1] > 4  # some groups were replaced
    assert len(untimed(whole, "completions.jsonl")) == 2 * ROLLED_OUT


def test_training_prompts_are_none_of_those_held_out(whole, work):
    from relax.data.sources import load_records

    configs = training.typed(load_config(whole / "config.yaml"))
    held_out = {record["prompt"] for record in load_records(configs.data).validation}
    prompts = {prompt for prompt, _ in json.loads((work / "calls.json").read_text())}
    assert len(prompts) >= 5
    assert not prompts & held_out


@pytest.mark.slow
def test_killed_among_the_rewards_of_a_rollout(run, whole, work, rewards, asked):
    """The fourth of the second rollout is never finished."""
    before = second_rollout(work, whole)
    rewards.stop_at = 4
    try:
        with pytest.raises(KeyboardInterrupt):
            training.resume(f"{run}@3", {})
    finally:
        rewards.stop_at = None
    assert [list(call) for call in asked] == before[:4]
    asked.clear()
    training.resume(str(run), {})
    assert differences(run, whole) == set()
    assert [list(call) for call in asked] == before[3:]


@pytest.mark.slow
def test_resumed_among_the_iterations_of_a_rollout(run, whole, asked):
    training.resume(f"{run}@6", {})
    assert differences(run, whole) == set()
    assert asked == []


@pytest.mark.slow
def test_killed_in_a_process_of_its_own(work, whole, rewards, asked):
    """By a signal that no program can handle, with three rewards still to come.

    The checkpoint of step 3 is complete by then.
    """
    folder = work / "killed"
    settings = (f"run_folder={folder}", f"runtime.cache_dir={work}/programs")
    kill_at = len(json.loads((work / "calls.json").read_text())) - 2
    hidden = ("WANDB_", "JAX_", "XLA_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *RUN, *settings],
        cwd=work,
        env={
            **kept,
            "JAX_PLATFORMS": "cpu",
            "KILL_AT": str(kill_at),
            "KILL_AFTER": str(folder / "checkpoints" / "3"),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    training.resume(str(folder), {})
    assert len(asked) == 3
    assert differences(folder, whole) == set()


def forget_prompts(patch):
    patch.setattr(policy.Policy, "restore", lambda self, progress: None)


def forget_rollout(patch):
    restore = RunCheckpoints.restore

    def forgetful(self, step, abstract):
        state = restore(self, step, abstract)
        kept = {"advantages": jnp.zeros_like(state.extra["rollout"]["advantages"])}
        rollout = {**state.extra["rollout"], **kept}
        return state._replace(extra={**state.extra, "rollout": rollout})

    patch.setattr(RunCheckpoints, "restore", forgetful)


@pytest.mark.slow
@pytest.mark.parametrize(("forget", "step"), [(forget_prompts, 3), (forget_rollout, 6)])
def test_a_resume_that_forgets_is_noticed(run, whole, monkeypatch, forget, step):
    forget(monkeypatch)
    training.resume(f"{run}@{step}", {})
    found = differences(run, whole)
    assert found >= {"params", "optimizer", "optimizer/extra", "metrics.jsonl"}


def test_rollout_and_training_agree(whole):
    for row in trained(whole):
        assert row[f"{MISMATCH}/mean"] < 2e-6
        assert row[f"{MISMATCH}/max"] < 5e-5
    # They are not the same computation.
    assert max(row[f"{MISMATCH}/max"] for row in trained(whole)) > 0


def perturb(patch):
    """Samples with parameters that are off by a thousandth."""
    original = Sampler.decoding_params

    def off(self, params):
        return jax.tree.map(lambda x: x * 1.001, original(self, params))

    patch.setattr(Sampler, "decoding_params", off)


def forget_support(patch):
    """Trains as if a token had been drawn among all ids."""
    original = policy.to_arrays

    def all_ids(groups, setup, support):
        arrays, advantages = original(groups, setup, support)
        arrays["support"][:] = 255
        return arrays, advantages

    patch.setattr(policy, "to_arrays", all_ids)


@pytest.mark.slow
@pytest.mark.parametrize("break_it", [perturb, forget_support])
def test_a_mismatch_ends_the_run(work, whole, tmp_path, monkeypatch, break_it):
    break_it(monkeypatch)
    with pytest.raises(grpo.MismatchError) as raised:
        places = "trainer.strict=true", f"run_folder={tmp_path}/run"
        training.start(composed(*RUN, *places))
    assert "trainer.strict=false" in str(raised.value)
    assert str(raised.value).startswith(f"step 1: {MISMATCH}/mean=")
    assert "is above trainer.mismatch_mean=2e-06" in str(raised.value)
