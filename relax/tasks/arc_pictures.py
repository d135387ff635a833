"""A picture for each ARC test input: demonstrations, what was right, what came."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from relax.tasks.arc_files import ArcTask
from relax.tasks.arc_grids import Grid
from relax.tasks.arc_results import Answered, choose_two

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

# The ten colours in which ARC's own page shows the digits 0 to 9.
COLOURS = (
    *("#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00"),
    *("#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25"),
)
MOST_ATTEMPTS = 6  # of more, the two that were submitted are shown
_RIGHT, _WRONG, _PLAIN = "#1d8348", "#c0392b", "#333333"
_LINES = "#555555"
_PANEL = 2.2  # inches
_DPI = 80

Panel = tuple[str, Grid | None, str]  # title, what is drawn below, and its colour


def draw(task: ArcTask, answered: Answered, path: Path) -> None:
    """Writes a PNG: demonstrations on top, each above its output, attempts below."""
    from matplotlib.figure import Figure

    panels = _panels(task, answered)
    pairs = task.demonstrations
    columns = max(len(pairs), len(panels))
    size = (_PANEL * columns, _PANEL * 3 + 0.5)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(2, 1.1))
    shown = [
        (f"demonstration {i + 1}", p["input"], _PLAIN) for i, p in enumerate(pairs)
    ]
    _row(above, 2, 0, columns, shown)
    _row(above, 2, 1, columns, [("", pair["output"], _PLAIN) for pair in pairs])
    _row(below, 1, 0, columns, panels)
    below.set_facecolor("#f2f2f2")
    verdict = {True: "solved", False: "not solved", None: "solution not known"}
    title = f"{task.task_id}, test {answered.test}: {verdict[answered.solved]}"
    figure.suptitle(title, fontweight="bold")
    figure.savefig(path)


def _panels(task: ArcTask, answered: Answered) -> list[Panel]:
    panels: list[Panel] = [("test input", task.inputs[answered.test], _PLAIN)]
    if answered.output is not None:
        panels.append(("expected", answered.output, _PLAIN))
    grids = [attempt.grid for attempt in answered.attempts]
    if len(grids) <= MOST_ATTEMPTS:
        named = [(f"attempt {i}", grid) for i, grid in enumerate(grids, 1)]
    else:
        named = [
            (f"submitted {i}, {grids.count(grid)} of {len(grids)}", grid)
            for i, grid in enumerate(choose_two(grids), 1)
        ]
    return panels + [_judged(name, grid, answered.output) for name, grid in named]


def _judged(name: str, grid: Grid | None, output: Grid | None) -> Panel:
    if grid is None:
        return f"{name}: no grid", None, _WRONG
    if output is None:
        return name, grid, _PLAIN
    if grid == output:
        return f"{name}: right", grid, _RIGHT
    return f"{name}: wrong", grid, _WRONG


def _row(
    figure: "SubFigure", rows: int, row: int, columns: int, panels: Sequence[Panel]
) -> None:
    for column, (title, grid, colour) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, row * columns + column + 1)
        axes.set_title(title, fontsize=9, color=colour)
        _draw_grid(axes, grid, colour)


def _draw_grid(axes: "Axes", grid: Grid | None, frame: str) -> None:
    from matplotlib.colors import ListedColormap

    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(frame)
        spine.set_linewidth(1.0 if frame == _PLAIN else 2.5)
    if grid is None:
        axes.set_aspect("equal")
        axes.text(0.5, 0.5, "–", ha="center", va="center", fontsize=20, color=frame)
        return
    axes.imshow(grid, cmap=ListedColormap(COLOURS), vmin=0, vmax=9)
    height, width = len(grid), len(grid[0])
    between = {"color": _LINES, "linewidth": 0.5}
    axes.hlines([y - 0.5 for y in range(1, height)], -0.5, width - 0.5, **between)
    axes.vlines([x - 0.5 for x in range(1, width)], -0.5, height - 0.5, **between)
