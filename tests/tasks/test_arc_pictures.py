import numpy as np
import pytest
from matplotlib.image import imread

from relax.tasks.arc_files import ArcTask
from relax.tasks.arc_grids import EMPTY, Parsed
from relax.tasks.arc_pictures import COLOURS, draw
from relax.tasks.arc_results import Answered

PAIR = {"input": [[0, 1]], "output": [[1], [0]]}


def drawn(tmp_path, output, *grids):
    """The colours in the picture of a task whose test input is [[2]]."""
    task = ArcTask("a", [PAIR, PAIR], [[[2]]], [output])
    attempts = [Parsed(grid, None) if grid else Parsed(None, EMPTY) for grid in grids]
    draw(task, Answered("a", 0, output, 11, False, attempts), tmp_path / "a.png")
    pixels = np.rint(imread(tmp_path / "a.png")[..., :3] * 255).astype(int)
    names = {tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)): c for c in COLOURS}
    counts = dict.fromkeys(COLOURS, 0)
    for pixel, count in zip(
        *np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True), strict=True
    ):
        if tuple(pixel.tolist()) in names:
            counts[names[tuple(pixel.tolist())]] = count
    return [counts[colour] for colour in COLOURS]


def test_input_output_and_attempts_have_their_colours(tmp_path):
    areas = drawn(tmp_path, [[3]], [[4]], [[3]])
    assert min(areas[:5]) > 5000 and max(areas[5:]) < 500
    # 3 is the expected grid and the second attempt, each as large as 4's one.
    assert areas[3] == pytest.approx(2 * areas[4], rel=0.1)


def test_attempts_without_a_grid_and_outputs_not_known_leave_room(tmp_path):
    areas = drawn(tmp_path, None, None, [[4]])
    assert areas[4] > 5000 and areas[3] < 500


def test_of_many_attempts_the_submitted_are_drawn(tmp_path):
    areas = drawn(tmp_path, [[3]], [[6]], *[[[4]]] * 4, *[[[3]]] * 3)
    assert areas[6] < 500 and areas[4] > 5000
    assert areas[3] == pytest.approx(2 * areas[4], rel=0.1)
