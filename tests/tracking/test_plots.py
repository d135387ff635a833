"""Pictures are drawn at their stated size from whatever rows there are."""

import json
import struct

import numpy as np
import pytest

from relax.tracking import plots
from relax.tracking.plots import SIZE, plot_losses, plot_rewards

TRAIN = [
    {
        "step": step,
        "kind": "train",
        "loss": 4.0 / step,
        "tokens": 768 * step,
        "learning_rate": 1e-3,
        "grad_norm": 1.0 + step / 8,
    }
    for step in range(1, 90)
]
EVAL = [
    {"step": step, "kind": "eval", "val_loss": 1.5 / step, "val_bits_per_byte": 2.0}
    for step in (13, 29, 83)
]


POLICY = [
    {
        "step": step,
        "kind": "train",
        "loss": 0.001,
        "reward": step / 97,
        "reward_std": 0.25,
        "completions/mean_length": 7.0,
        "entropy": 0.5,
        "kl": 0.01,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
    }
    for step in range(1, 90)
]
SOLVED = [
    {"step": step, "kind": "eval", "val_pass@1": step / 89, "val_pass@16": 1.0}
    for step in (13, 29, 83)
]
BARE = [{"step": 7, "kind": "train", "reward": None}]


def png_size(path):
    """Width and height stand big-endian at byte 16 of a PNG."""
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", head[16:])


@pytest.mark.parametrize(
    "rows",
    [
        TRAIN + EVAL,
        TRAIN,
        EVAL,
        TRAIN[:1],
        EVAL[:1],
        [{"step": 7, "kind": "train", "loss": 2.5}],
        [{"step": 7, "kind": "train", "loss": None}],
        [*TRAIN[:19], {"step": 20, "kind": "train", "loss": None}],
    ],
    ids=[
        "all",
        "no-evaluation",
        "no-training",
        "one-row",
        "one-evaluation",
        "loss-alone",
        "nan-alone",
        "nan-last",
    ],
)
def test_a_png_of_the_stated_size_is_drawn(tmp_path, rows):
    metrics, image = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    write(metrics, rows)
    assert plot_losses(metrics, image, "a run")
    assert png_size(image) == SIZE == (1200, 800)


def test_the_curves_are_in_the_picture(tmp_path):
    """Pixels of the training and validation colours appear, and only where due."""
    both = (plots._TRAIN, plots._EVAL)
    train, validation = colours(tmp_path, plot_losses, TRAIN + EVAL, both)
    assert train > 500 and validation > 100
    train, validation = colours(tmp_path, plot_losses, TRAIN, both)
    assert train > 500 and validation == 0


REWARD_COLOURS = {
    "reward": plots._TRAIN,
    "val_pass@1": plots._EVAL,
    "completions/mean_length": plots._LENGTH,
    "entropy": plots._ENTROPY,
    "kl": plots._KL,
    "grad_norm": plots._NORM,
}


@pytest.mark.parametrize(
    ("rows", "missing"),
    [
        (POLICY + SOLVED, set()),
        ([{**row, "kl": None} for row in POLICY], {"val_pass@1", "kl"}),
        (POLICY[:1] + SOLVED[:1], set()),
        (SOLVED, REWARD_COLOURS.keys() - {"val_pass@1"}),
        (BARE, set(REWARD_COLOURS)),
    ],
    ids=["all", "no-evaluation-no-kl", "one-row", "no-training", "nan-alone"],
)
def test_a_picture_of_rewards_has_what_the_rows_have(tmp_path, rows, missing):
    found = colours(tmp_path, plot_rewards, rows, REWARD_COLOURS.values())
    names = zip(REWARD_COLOURS, found, strict=True)
    assert {name for name, pixels in names if pixels < 30} == missing
    assert png_size(tmp_path / "run.png") == SIZE


def test_the_loss_of_a_policy_is_not_drawn(tmp_path):
    write(tmp_path / "metrics.jsonl", POLICY)
    assert not plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a run")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def colours(folder, plot, rows, wanted):
    """Returns how many pixels of a run's picture have each of the colours."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    write(folder / "metrics.jsonl", rows)
    assert plot(folder / "metrics.jsonl", folder / "run.png", "a run")
    pixels = imread(folder / "run.png")[..., :3]
    return [
        int((np.abs(pixels - to_rgb(colour)).max(axis=-1) < 0.01).sum())
        for colour in wanted
    ]


@pytest.mark.parametrize("text", ["", '{"step": 1, "kind": "train", "reward": 2.0}\n'])
def test_nothing_is_drawn_without_a_loss(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert not plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a run")
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("rows", [[], TRAIN[:2] + EVAL])
def test_no_rewards_are_drawn_where_there_are_none(tmp_path, rows):
    write(tmp_path / "metrics.jsonl", rows)
    assert not plot_rewards(tmp_path / "metrics.jsonl", tmp_path / "r.png", "a run")


def test_smoothing_is_a_centred_mean_that_passes_over_nan():
    # 121 values: windows of 3. The neighbours of a NaN are means of what is known.
    values = np.zeros(121)
    values[:4] = [3.0, 6.0, np.nan, 9.0]
    np.testing.assert_allclose(plots._smooth(values)[:5], [4.5, 4.5, 7.5, 4.5, 3.0])


def test_an_evaluation_without_tokens_lies_at_those_of_its_step():
    train = [{"step": 10, "tokens": 100.0}, {"step": 20, "tokens": 300.0}]
    evals = [{"step": 5}, {"step": 15}, {"step": 20, "tokens": 310.0}]
    assert plots._eval_x(train, evals, "tokens").tolist() == [50.0, 200.0, 310.0]
