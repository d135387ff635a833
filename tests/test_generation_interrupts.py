"""What is left where making completions is broken off, and what comes after it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relax.generation.requests import Request
from relax.generation.run import Run
from relax.language_model import LanguageModel
from relax.model.parameters import parameter_shapes
from relax.sampling import SamplingConfig
from relax.sharding import MeshConfig, make_mesh
from relax.tasks import batch
from relax.text.tokenizers import TokenizerConfig, make_tokenizer

REPOSITORY = Path(__file__).parents[1]
# Of rows that come two at a time, the first end in the second dispatch.
SAMPLING = SamplingConfig(
    max_new_tokens=7, tokens_per_dispatch=5, ignore_eos=True, seed=3
)
PROMPTS = [[*range(40, 60)] + [index] * (1 + index) for index in range(7)]


@pytest.fixture(scope="module")
def model(make_config) -> LanguageModel:
    """A model of bytes with random weights."""
    config = make_config(vocab_size=257, num_hidden_layers=1, scan_layers=False)
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(scale=0.5, size=leaf.shape), leaf.dtype),
        parameter_shapes(config),
    )
    tokenizer = make_tokenizer(TokenizerConfig(kind="bytes", encoding=None, path=None))
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))
    return LanguageModel(config, params, tokenizer, mesh)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Two samples of each prompt."""
    return [
        Request(tuple(prompt), index, sample)
        for index, prompt in enumerate(PROMPTS)
        for sample in (0, 1)
    ]


def complete(model, requests):
    return model.complete(requests, SAMPLING, batch_size=4)


@pytest.fixture(scope="module")
def whole(model, requests):
    return dict(complete(model, requests))


# An iterator that is closed.


@pytest.mark.parametrize("count", [0, 1, 5])
def test_an_iterator_closed_midway_changes_no_later_completion(
    model, requests, whole, count
):
    answers = complete(model, requests)
    first = {}
    for _ in range(count):
        index, completion = next(answers)
        first[index] = completion
    answers.close()
    assert list(answers) == []
    assert first == {index: whole[index] for index in first}
    assert dict(complete(model, requests)) == whole


def test_two_iterators_at_once_do_not_touch_each_other(model, requests, whole):
    one, other = complete(model, requests), complete(model, requests[::-1])
    made, last = {}, len(requests) - 1
    for (index, mine), (place, theirs) in zip(one, other, strict=True):
        made[index] = mine
        assert theirs.token_ids == whole[last - place].token_ids
    assert made == whole


@pytest.mark.parametrize("call", [1, 3])
def test_an_exception_in_a_dispatch_changes_no_later_completion(
    model, requests, whole, monkeypatch, call
):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_collect", in_call(call, interrupt))
        list(complete(model, requests))
    assert dict(complete(model, requests)) == whole


def interrupt():
    raise KeyboardInterrupt


def in_call(call, action):
    """Returns a `_collect` in one call of which something happens."""
    collect, calls = Run._collect, []

    def interrupted(self, made):
        calls.append(made)
        if len(calls) == call:
            action()
        return collect(self, made)

    return interrupted


# A batch of a real model.


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_batch_broken_off_in_a_dispatch_goes_on_from_valid_lines(
    model, tmp_path, monkeypatch, number, code
):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": prompt, "id": index} for index, prompt in enumerate(PROMPTS)]
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    config = batch.BatchConfig(
        kind="batch",
        input_path=str(source),
        output_path=str(out),
        batch_size=2,
        template=None,
        on_error="fail",
        logprobs=True,
        overwrite=False,
    )
    batch.run(config, model, SAMPLING)
    expected = out.read_bytes()
    out.unlink()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit_:
        # Two dispatches for every two of the seven records.
        patch.setattr(Run, "_collect", in_call(5, lambda: os.kill(os.getpid(), number)))
        batch.run(config, model, SAMPLING)
    assert exit_.value.code == code
    assert expected.startswith(out.read_bytes())
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [
        *(0, 1, 2, 3)
    ]
    before = model.stats.new_tokens
    batch.run(config, model, SAMPLING)
    assert out.read_bytes() == expected
    assert model.stats.new_tokens - before == 3 * 7
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


# The program.

IN_A_DISPATCH = """
import os, runpy, signal, sys
from relax.generation.run import Run

collect, calls = Run._collect, []
def interrupted(self, made):
    calls.append(made)
    if len(calls) == 3:
        print("in a dispatch", file=sys.stderr)
        os.kill(os.getpid(), number)
    return collect(self, made)
Run._collect = interrupted
number, sys.argv = int(sys.argv[1]), sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("number", "codes"), [(signal.SIGINT, {130}), (signal.SIGTERM, {143, -15})]
)
def test_generate_broken_off_leaves_no_half_file(model, tmp_path, number, codes):
    model.save(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("".join(f"{i}\n" for i in range(9)))
    before = {path.name for path in tmp_path.iterdir()}
    ran = subprocess.run(
        [
            *(sys.executable, "-c", IN_A_DISPATCH, str(int(number))),
            *(str(REPOSITORY / "infer.py"), f"checkpoint={tmp_path}/model@last"),
            *("prompts_file=prompts.txt", "output_path=out.jsonl"),
            *("task.batch_size=2", "sampling.max_new_tokens=9", "runtime.cache_dir=''"),
        ],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert "in a dispatch" in ran.stderr
    assert ran.returncode in codes, ran.stderr
    assert "Traceback" not in ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == before
