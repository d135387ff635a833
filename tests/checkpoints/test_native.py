"""What a training run writes is what it reads back, whatever happens in between."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from relax.checkpoints.native import RunCheckpoints, resolve_run


class TrainState(NamedTuple):
    """The shape of the trainers' state."""

    step: Any
    params: Any
    opt_state: Any


@jax.jit
def make_state(step: int = 0) -> TrainState:
    """Returns a state with adamw on one module, Muon on all, and masks in between."""
    keys = jax.random.split(jax.random.key(step), 4)
    params = {
        "layers/block/up": {
            "w": jax.random.normal(keys[0], (3, 5)),
            "half": jax.random.normal(keys[1], (7, 11)).astype(jnp.bfloat16),
        },
        "embed": {"table": jax.random.normal(keys[2], (13, 3))},
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.masked(optax.adamw(0.1), {"layers/block/up": True, "embed": False}),
        optax.contrib.muon(0.1),
    )
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    extra = jax.random.bits(keys[3], (2,), jnp.uint32)
    return TrainState(jnp.int32(step), params, (opt_state, {"bits": extra}))


def abstract(tree: Any) -> Any:
    """Returns what `restore` takes for a tree: shapes, dtypes and shardings."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )


def assert_same(restored: Any, saved: Any) -> None:
    """Fails unless structure, dtypes, shardings and every bit are equal."""
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for got, want in zip(
        jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True
    ):
        assert got.dtype == want.dtype
        assert got.sharding == want.sharding
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def save_steps(run: Path, losses: dict[int, float | None], keep_last: int = 99) -> None:
    """Writes one checkpoint per step, with its val_loss where there is one."""
    with RunCheckpoints(run, keep_last=keep_last) as checkpoints:
        for step, loss in losses.items():
            metrics = None if loss is None else {"val_loss": loss}
            checkpoints.save(step, make_state(step), metrics, {"step": step})


def run_script(script: str, *arguments: object) -> str:
    """Returns what a child Python wrote, both streams; fails where it failed."""
    child = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout + child.stderr


def test_a_state_comes_back_bit_for_bit_with_its_structure(tmp_path):
    state = make_state(7)
    with RunCheckpoints(tmp_path) as checkpoints:
        folder = checkpoints.save(7, state, {"val_loss": 2.5}, {"tokens": 17})
        checkpoints.wait()
        assert folder == tmp_path / "checkpoints" / "7"
        assert_same(checkpoints.restore(7, abstract(state)), state)
        assert checkpoints.info(7) == {"tokens": 17}
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(state)}
    assert dtypes == {"float32", "bfloat16", "int32", "uint32"}


def test_a_dict_state_comes_back_too(tmp_path):
    state = make_state(1)._asdict()
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, None, {})
        assert_same(checkpoints.restore(1, abstract(state)), state)


def test_params_are_restored_alone_and_cast_to_the_dtypes_asked_for(tmp_path):
    params = make_state(3).params
    save_steps(tmp_path, {3: None})
    (tmp_path / "checkpoints/3/optimizer").rename(tmp_path / "elsewhere")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    with RunCheckpoints(tmp_path, read_only=True) as checkpoints:
        assert_same(checkpoints.restore_params(3, abstract(params)), params)
        assert_same(checkpoints.restore_params(3, abstract(half)), half)


def test_donation_right_after_save_leaves_the_saved_values_on_disk(tmp_path):
    @partial(jax.jit, donate_argnums=0)
    def advance(state):
        return jax.tree.map(lambda x: x + 1, state)

    state = {"params": {"m": {"w": jnp.zeros((1021, 2053))}}, "step": jnp.int32(0)}
    state = advance(state)
    with RunCheckpoints(tmp_path, keep_last=9) as checkpoints:
        for step in range(1, 200):
            if step in (3, 50, 101, 150):
                checkpoints.save(step, state, None, {})
            state = advance(state)
        for step in (3, 50, 101, 150):
            restored = checkpoints.restore(step, abstract(state))
            assert int(restored["step"]) == step
            assert np.unique(restored["params"]["m"]["w"]).tolist() == [step]


def test_save_writes_from_memory_of_its_own(tmp_path, monkeypatch):
    """So that donation is safe whatever the backend does with a buffer in use."""
    import orbax.checkpoint as ocp

    weights = jax.device_put(jnp.zeros((3, 5)), jax.devices("cpu")[0])
    written = []
    save = ocp.CheckpointManager.save

    def spy(self, step, *, args, **rest):
        written.append(args["params"].item["w"].unsafe_buffer_pointer())
        return save(self, step, args=args, **rest)

    monkeypatch.setattr(ocp.CheckpointManager, "save", spy)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"w": weights}, "step": jnp.int32(0)}, None, {})
    assert len(written) == 1
    assert written[0] != weights.unsafe_buffer_pointer()


def test_the_best_and_the_last_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None, 6: 1.5}
    save_steps(tmp_path, losses, keep_last=2)
    with RunCheckpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.best_step() == 2
        assert checkpoints.latest_step() == 6
        assert checkpoints.step_named("best") == 2
        assert checkpoints.step_named("last") == 6
        assert checkpoints.step_named("5") == 5
        with pytest.raises(ValueError, match=r"no step '4'; it holds \[2, 5, 6\]"):
            checkpoints.step_named("4")


def test_of_equal_losses_the_later_is_best(tmp_path):
    save_steps(tmp_path, {1: 2.0, 3: 1.0, 5: 1.0, 7: 1.5}, keep_last=1)
    with RunCheckpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [5, 7]
        assert checkpoints.step_named("best") == 5


def test_best_falls_back_to_last_only_without_any_val_loss(tmp_path, caplog):
    save_steps(tmp_path / "none", {1: None, 2: None})
    save_steps(tmp_path / "one", {1: 5.0, 2: None})
    with RunCheckpoints(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.best_step() is None
        assert checkpoints.step_named("best") == 2
    assert "taking the last step" in caplog.text
    caplog.clear()
    with RunCheckpoints(tmp_path / "one", read_only=True) as checkpoints:
        assert checkpoints.step_named("best") == 1
    assert not caplog.records


def test_read_only_creates_nothing(tmp_path):
    with RunCheckpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.latest_step() is None
        with pytest.raises(ValueError, match="holds no step 'best'"):
            checkpoints.step_named("best")
        with pytest.raises(AssertionError):
            checkpoints.save(1, make_state(), None, {})
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_is_not_later_is_refused_until_the_run_is_cut_back(tmp_path):
    save_steps(tmp_path, {2: 4.0, 4: 3.0, 6: 1.0})
    with RunCheckpoints(tmp_path, keep_last=9) as checkpoints:
        for step, later in {3: [4, 6], 6: [6]}.items():
            with pytest.raises(ValueError, match=re.escape(f"already holds {later}")):
                checkpoints.save(step, make_state(step), None, {})
        checkpoints.delete_after(2)
        assert checkpoints.steps() == [2]
        assert checkpoints.step_named("best") == 2
        checkpoints.save(4, make_state(5), {"val_loss": 9.0}, {})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 4]
        assert_same(checkpoints.restore(4, abstract(make_state())), make_state(5))
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4"]


def test_two_runs_in_one_process_do_not_meet(tmp_path):
    with (
        RunCheckpoints(tmp_path / "a") as first,
        RunCheckpoints(tmp_path / "b") as second,
    ):
        for step in (1, 2, 3):
            first.save(step, make_state(step), None, {"run": "a"})
            second.save(step, make_state(step + 10), None, {"run": "b"})
        first_state = first.restore(3, abstract(make_state()))
        second_state = second.restore(3, abstract(make_state()))
        assert (first.info(3), second.info(3)) == ({"run": "a"}, {"run": "b"})
    assert_same(first_state, make_state(3))
    assert_same(second_state, make_state(13))


def test_info_that_is_no_json_is_refused_by_save(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match="not JSON serializable"):
            checkpoints.save(1, make_state(), None, {"path": tmp_path})
        assert os.listdir(checkpoints.folder) == []


KILLED_CHILD = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from relax.checkpoints.native import RunCheckpoints

def state(step, size):
    params = {"m": {"w": jax.random.normal(jax.random.key(step), (size,))}}
    return {"params": params, "step": jnp.int32(step)}

checkpoints = RunCheckpoints(Path(sys.argv[1]), keep_last=9)
checkpoints.save(1, state(1, 1009), None, {})
checkpoints.wait()
checkpoints.save(2, state(2, 40_000_000), None, {})
checkpoints.wait()
"""


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path):
    folder = tmp_path / "checkpoints"
    unfinished = folder / "2.orbax-checkpoint-tmp"
    child = subprocess.Popen([sys.executable, "-c", KILLED_CHILD, str(tmp_path)])
    while not unfinished.exists() and child.poll() is None:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert unfinished.exists()

    with RunCheckpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]
    weights = jax.random.normal(jax.random.key(1), (1009,))
    state = {"params": {"m": {"w": weights}}, "step": jnp.int32(1)}
    with RunCheckpoints(tmp_path, keep_last=9) as checkpoints:
        assert not unfinished.exists()
        assert_same(checkpoints.restore(1, abstract(state)), state)
        checkpoints.save(2, state, None, {})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
        assert_same(checkpoints.restore(2, abstract(state)), state)


@pytest.fixture
def no_large_files():
    """Lets no file grow past 64 KiB, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def large_state(step: int) -> dict[str, Any]:
    """Returns a state of a megabyte."""
    weights = jax.random.normal(jax.random.key(step), (1 << 18,))
    return {"params": {"m": {"w": weights}}, "step": jnp.int32(step)}


@pytest.mark.parametrize("surfaces_at", ["wait", "save", "close"])
def test_a_full_disk_raises_and_the_checkpoint_before_stays(
    tmp_path, no_large_files, surfaces_at
):
    small = {"params": {"m": {"w": jnp.ones(3)}}, "step": jnp.int32(1)}
    checkpoints = RunCheckpoints(tmp_path, keep_last=1)
    checkpoints.save(1, small, None, {})
    checkpoints.save(2, large_state(2), None, {})
    with pytest.raises(OSError, match=f"writing {tmp_path}/checkpoints failed"):
        if surfaces_at == "save":
            checkpoints.save(3, large_state(3), None, {})
        else:
            getattr(checkpoints, surfaces_at)()
    assert os.listdir(tmp_path / "checkpoints") == ["1"]

    no_large_files()  # the user makes room
    if surfaces_at != "close":
        assert_same(checkpoints.restore(1, abstract(small)), small)
        checkpoints.save(2, large_state(2), None, {})
        checkpoints.close()
        assert os.listdir(tmp_path / "checkpoints") == ["2"]


def test_a_failed_save_does_not_hide_the_error_of_the_program(
    tmp_path, no_large_files, caplog
):
    def program():
        with RunCheckpoints(tmp_path) as checkpoints:
            checkpoints.save(1, large_state(1), None, {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program()
    assert f"writing {tmp_path}/checkpoints failed" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.folder.rmdir()
        checkpoints.folder.write_text("")
        with pytest.raises(OSError, match=f"{tmp_path}/checkpoints"):
            checkpoints.save(1, make_state(), None, {})
        with pytest.raises(OSError, match=f"{tmp_path}/checkpoints"):
            RunCheckpoints(tmp_path)
        checkpoints.folder.unlink()
        checkpoints.save(1, make_state(), None, {})


def largest_array(folder: Path) -> Path:
    """Returns the file that holds most of a checkpoint's parameters."""
    files = [path for path in folder.glob("params/**/d/*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    "damage",
    [
        lambda step: largest_array(step).unlink(),
        lambda step: os.truncate(largest_array(step), 1009),
        lambda step: (step / "params/manifest.ocdbt").unlink(),
        lambda step: (step / "params/_METADATA").write_text("{"),
    ],
    ids=["array deleted", "array truncated", "manifest deleted", "metadata cut"],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    state = large_state(7)
    with RunCheckpoints(tmp_path) as checkpoints:
        step = checkpoints.save(7, state, None, {})
        checkpoints.wait()
        damage(step)
        with pytest.raises(OSError, match=f"checkpoint {step} cannot be read"):
            checkpoints.restore(7, abstract(state))


def test_a_checkpoint_of_another_configuration_is_told_from_a_damaged_one(tmp_path):
    save_steps(tmp_path, {3: None})
    state = make_state(3)
    wider = abstract(state.params)
    wider["embed"]["table"] = jax.ShapeDtypeStruct((13, 5), jnp.float32)
    wider["norm"] = {"scale": jax.ShapeDtypeStruct((5,), jnp.float32)}
    other = abstract(state)._replace(step=jax.ShapeDtypeStruct((), jnp.uint32))
    with RunCheckpoints(tmp_path, read_only=True) as checkpoints:
        with pytest.raises(ValueError) as raised:
            checkpoints.restore_params(3, wider)
        with pytest.raises(ValueError, match=r"optimizer/step is int32\[\] there"):
            checkpoints.restore(3, other)
    message = str(raised.value)
    assert "params/embed/table is [13, 3] there, [13, 5] here" in message
    assert "params/norm/scale is missing there, [5] here" in message
    assert "\n" not in message


MESHES = """
import os, sys
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from relax.checkpoints.native import RunCheckpoints

def placed(make, devices):
    mesh = jax.make_mesh(
        (devices,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    def leaf(value, spec):
        return make(value, NamedSharding(mesh, spec))
    values = np.arange(8 * 24, dtype=np.float32).reshape(8, 24)
    return {
        "params": {"m": {"w": leaf(values, P("x", None)), "b": leaf(values[0], P())}},
        "opt_state": (leaf(-values, P(None, "x")),),
        "step": leaf(np.int32(5), P()),
    }

abstract = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
with RunCheckpoints(Path(sys.argv[1])) as checkpoints:
    checkpoints.save(5, placed(jax.device_put, 4), None, {})
    for devices in (1, 4, 8):
        restored = checkpoints.restore(5, placed(abstract, devices))
        expected = placed(jax.device_put, devices)
        for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(expected)):
            assert got.sharding == want.sharding, (got.sharding, want.sharding)
            assert (np.asarray(got) == np.asarray(want)).all()
        print(devices, len(restored["params"]["m"]["w"].sharding.device_set))
"""


def test_a_checkpoint_of_one_mesh_restores_on_another(tmp_path):
    assert run_script(MESHES, tmp_path).splitlines() == ["1 1", "4 4", "8 8"]


ENDINGS = """
import os, signal, sys, threading
from pathlib import Path
import jax, jax.numpy as jnp
from relax.checkpoints.native import RunCheckpoints

def loop(checkpoints):
    weights = jax.random.normal(jax.random.key(0), (4_000_000,))
    state = {"params": {"m": {"w": weights}}, "step": jnp.int32(1)}
    checkpoints.save(1, state, None, {})
    if sys.argv[2] == "interrupted wait":
        threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
        checkpoints.wait()
        threading.Event().wait(60)
    raise KeyboardInterrupt

try:
    if sys.argv[2] == "never closed":
        loop(RunCheckpoints(Path(sys.argv[1])))
    with RunCheckpoints(Path(sys.argv[1])) as checkpoints:
        loop(checkpoints)
except KeyboardInterrupt:
    pass
"""


@pytest.mark.parametrize("ending", ["interrupted", "interrupted wait"])
def test_an_interrupted_program_finishes_its_last_checkpoint(tmp_path, ending):
    output = run_script(ENDINGS, tmp_path, ending)
    assert "Traceback" not in output
    with RunCheckpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1]


def test_a_program_that_never_closes_ends_without_tracebacks(tmp_path):
    assert "Traceback" not in run_script(ENDINGS, tmp_path, "never closed")


def test_orbax_keeps_quiet_and_the_import_is_light(tmp_path):
    script = """
import logging, sys
from pathlib import Path
logging.basicConfig(level=logging.INFO)
import jax.numpy as jnp
from relax.checkpoints.native import RunCheckpoints
assert "orbax" not in sys.modules
with RunCheckpoints(Path(sys.argv[1])) as checkpoints:
    state = {"params": {"w": jnp.ones(3)}, "step": jnp.int32(1)}
    checkpoints.save(1, state, None, {})
    checkpoints.info(1)
with RunCheckpoints(Path(sys.argv[1]), read_only=True) as checkpoints:
    checkpoints.info(1)
"""
    lines = run_script(script, tmp_path).splitlines()
    assert [line for line in lines if "absl" in line or "orbax" in line] == []


def make_run(run: Path, steps: list[int], modified: int) -> Path:
    """Makes the folders of a run whose newest checkpoint has a modification time."""
    for step in steps:
        (run / f"checkpoints/{step}/params").mkdir(parents=True)
        os.utime(run / f"checkpoints/{step}", (modified, modified))
    return run


def test_a_reference_names_a_run_and_a_step(tmp_path):
    run = make_run(tmp_path / "shakespeare/2031", [5, 120], modified=1000)
    assert resolve_run(f"{run}") == (run, "best")
    assert resolve_run(f"{run}/checkpoints") == (run, "best")
    assert resolve_run(f"{run}/checkpoints/5") == (run, "5")
    assert resolve_run(f"{run}@best") == (run, "best")
    assert resolve_run(f"{run}@last") == (run, "last")
    assert resolve_run(f"{run}/checkpoints@120") == (run, "120")


def test_latest_is_the_newest_complete_checkpoint_at_any_depth(tmp_path):
    make_run(tmp_path / "old", [9], modified=1000)
    newest = make_run(tmp_path / "sweep/7/3", [1, 2], modified=3000)
    make_run(tmp_path / "chat/2031", [4], modified=2000)
    make_run(tmp_path / "too/deep/for/this", [4], modified=5000)
    half = tmp_path / "killed/checkpoints/1.orbax-checkpoint-tmp/params"
    half.mkdir(parents=True)
    assert resolve_run("latest", tmp_path) == (newest, "best")
    assert resolve_run("latest@2", tmp_path) == (newest, "2")


@pytest.mark.parametrize("reference", ["latest", "latest@last", "{runs}/none@best"])
def test_a_reference_to_nothing_says_how_to_get_a_checkpoint(tmp_path, reference):
    reference = reference.format(runs=tmp_path)
    with pytest.raises(FileNotFoundError) as raised:
        resolve_run(reference, tmp_path)
    message = str(raised.value)
    assert message.startswith(f"checkpoint={reference}: no complete checkpoint in ")
    assert str(tmp_path) in message
    assert message.endswith("train first: python train.py")
    assert "\n" not in message


def test_a_reference_to_a_step_that_is_not_there_lists_those_that_are(tmp_path):
    run = make_run(tmp_path / "run", [5, 120], modified=1000)
    with pytest.raises(ValueError, match=r"@7: .* holds only \[5, 120\]"):
        resolve_run(f"{run}@7")
    with pytest.raises(FileNotFoundError, match="5@best: no complete checkpoint"):
        resolve_run(f"{run}/checkpoints/5@best")
