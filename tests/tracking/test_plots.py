"""loss.png is drawn at its stated size from whatever rows there are."""

import json
import struct

import numpy as np
import pytest

from relax.tracking import plots
from relax.tracking.plots import SIZE, plot_losses

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
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plot_losses(metrics, image, "a run")
    assert png_size(image) == SIZE == (1200, 800)


def test_the_curves_are_in_the_picture(tmp_path):
    """Pixels of the training and validation colours appear, and only where due."""
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    def colours(rows):
        metrics, image = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
        metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
        plot_losses(metrics, image, "a run")
        pixels = imread(image)[..., :3]
        return [
            int((np.abs(pixels - to_rgb(colour)).max(axis=-1) < 0.01).sum())
            for colour in (plots._TRAIN, plots._EVAL)
        ]

    train, validation = colours(TRAIN + EVAL)
    assert train > 500 and validation > 100
    train, validation = colours(TRAIN)
    assert train > 500 and validation == 0


@pytest.mark.parametrize("text", ["", '{"step": 1, "kind": "train", "reward": 2.0}\n'])
def test_nothing_is_drawn_without_a_loss(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert not plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "a run")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_is_a_centred_mean_that_passes_over_nan():
    # 121 values: windows of 3. The neighbours of a NaN are means of what is known.
    values = np.zeros(121)
    values[:4] = [3.0, 6.0, np.nan, 9.0]
    np.testing.assert_allclose(plots._smooth(values)[:5], [4.5, 4.5, 7.5, 4.5, 3.0])


def test_an_evaluation_without_tokens_lies_at_those_of_its_step():
    train = [{"step": 10, "tokens": 100.0}, {"step": 20, "tokens": 300.0}]
    evals = [{"step": 5}, {"step": 15}, {"step": 20, "tokens": 310.0}]
    assert plots._eval_x(train, evals, "tokens").tolist() == [50.0, 200.0, 310.0]
