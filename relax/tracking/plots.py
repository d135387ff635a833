"""loss.png and rewards.png: how a run went, at a glance."""

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from relax.tracking.metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIZE = (1200, 800)  # pixels
_DPI = 120
_TRAIN, _EVAL, _RATE, _NORM = "#3b6ea8", "#c8553d", "#3a8f5c", "#8a6bb1"
_LENGTH, _ENTROPY, _KL = "#6b7280", "#2f8f9d", "#b7791f"


class _Side(NamedTuple):
    """One of the two scales of a panel."""

    name: str
    values: np.ndarray
    color: str
    noisy: bool = True  # drawn faint below its running mean


def plot_losses(metrics_path: Path, image_path: Path, title: str) -> bool:
    """Draws a run's losses, learning rate and gradient norm as a PNG of `SIZE`.

    The x axis counts tokens where every training row does, else steps. Returns
    False, and draws nothing, when no row holds a loss, or rows hold rewards: the loss
    of a policy's gradient says nothing of how good the policy is.
    """
    rows = read_metrics(metrics_path)
    train = [row for row in rows if row["kind"] == "train" and "loss" in row]
    evals = [row for row in rows if row["kind"] == "eval" and "val_loss" in row]
    if not (train or evals) or any("reward" in row for row in train):
        return False
    from matplotlib.ticker import EngFormatter

    figure = _figure()
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(7, 2))
    unit = "tokens" if train and all("tokens" in row for row in train) else "step"
    _draw_losses(losses, train, evals, unit)
    _draw_sides(rates, _column(train, unit), _rates(train))
    losses.set_title(title, loc="left", fontweight="bold")
    rates.set_xlabel(unit)
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(image_path)
    return True


def plot_rewards(metrics_path: Path, image_path: Path, title: str) -> bool:
    """Draws rewards, pass@k, lengths, entropy and KL over steps as a PNG of `SIZE`.

    A panel for which no row has a number is left out. Returns False, and draws
    nothing, when no row holds a `reward` or a `val_pass@1`.
    """
    rows = read_metrics(metrics_path)
    train = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval" and "val_pass@1" in row]
    if not any("reward" in row for row in train) and not evals:
        return False
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panels = [sides for sides in map(_known, _reward_panels(train)) if sides]
    figure = _figure()
    heights = (5, *(2 for _ in panels))
    top, *below = np.atleast_1d(
        figure.subplots(len(heights), sharex=True, height_ratios=heights)
    )
    _draw_rewards(top, train, evals)
    top.set_title(title, loc="left", fontweight="bold", pad=26)  # over the legend
    for axes, sides in zip(below, panels, strict=True):
        _draw_sides(axes, _column(train, "step"), sides)
    last = [top, *below][-1]
    last.set_xlabel("step")
    last.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    last.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(image_path)
    return True


def _reward_panels(train: list[dict]) -> list[list[_Side]]:
    length = _column(train, "completions/mean_length")
    return [
        [_Side("length", length, _LENGTH)],
        [
            _Side("entropy", _column(train, "entropy"), _ENTROPY),
            _Side("KL", _column(train, "kl"), _KL),
        ],
        _rates(train),
    ]


def _figure() -> "Figure":
    from matplotlib.figure import Figure

    inches = (SIZE[0] / _DPI, SIZE[1] / _DPI)
    return Figure(figsize=inches, dpi=_DPI, layout="constrained")


def _draw_rewards(axes: "Axes", train: list[dict], evals: list[dict]) -> None:
    """Draws the training rewards on the left scale, held-out pass@k on the right."""
    from matplotlib.ticker import PercentFormatter

    x, reward, std = (_column(train, key) for key in ("step", "reward", "reward_std"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    shown: list = []
    right = axes
    if np.isfinite(reward).any():
        mean, spread = _smooth(reward), _smooth(std)
        axes.fill_between(
            x, mean - spread, mean + spread, color=_TRAIN, alpha=0.12, linewidth=0
        )
        axes.plot(x, reward, color=_TRAIN, alpha=0.3, linewidth=0.8)
        marker = "o" if len(train) == 1 else None
        shown += axes.plot(x, mean, color=_TRAIN, marker=marker, label="reward ± std")
        edges = np.concatenate([mean - spread, mean + spread, reward])
        axes.set_ylim(_limits(edges, edges))
        axes.set_ylabel("training reward", color=_TRAIN)
        axes.tick_params(axis="y", colors=_TRAIN)
        right = axes.twinx() if evals else axes
    if evals:
        right.spines["top"].set_visible(False)
        axes.spines["right"].set_visible(right is not axes)
        right.set_ylim(0, 1.03)
        right.yaxis.set_major_formatter(PercentFormatter(1))
        right.set_ylabel("held-out prompts solved", color=_EVAL)
        right.tick_params(axis="y", colors=_EVAL)
        shown += _draw_passes(right, evals)
    above = {"loc": "lower left", "bbox_to_anchor": (0, 0.99), "borderaxespad": 0}
    axes.legend(handles=shown, ncols=len(shown), frameon=False, **above)


def _draw_passes(axes: "Axes", evals: list[dict]) -> list:
    """Draws each pass@k, pass@1 heaviest; returns what a legend names."""
    x = _column(evals, "step")
    found = {key for row in evals for key in row if key.startswith("val_pass@")}
    styles = itertools.cycle(("s--", "^-.", "D:"))
    shown: list = []
    for key in sorted(found, key=_natural):
        first = key == "val_pass@1"
        shown += axes.plot(
            *(x, _column(evals, key), "o-" if first else next(styles)),
            color=_EVAL,
            markersize=4,
            linewidth=1.5 if first else 1,
            alpha=1 if first else 0.5,
            label=key.removeprefix("val_"),
        )
    first = _column(evals, "val_pass@1")
    if np.isfinite(first).any():
        best = int(np.nanargmax(first))
        _annotate(axes, x[best], first[best], f"best {first[best]:.1%}", _EVAL, -50)
    return shown


def _natural(key: str) -> tuple[int, str]:
    """Returns a sort key by which pass@4 comes before pass@16."""
    return len(key), key


def _draw_losses(axes: "Axes", train: list[dict], evals: list[dict], unit: str) -> None:
    x, loss = _column(train, unit), _column(train, "loss")
    smooth = _smooth(loss)
    eval_x, eval_loss = _eval_x(train, evals, unit), _column(evals, "val_loss")
    axes.plot(x, loss, color=_TRAIN, alpha=0.3, linewidth=0.8)
    if train:
        marker = "o" if len(train) == 1 else None
        axes.plot(x, smooth, color=_TRAIN, marker=marker, label="training (smoothed)")
    if evals:
        axes.plot(
            eval_x, eval_loss, "o-", color=_EVAL, markersize=4, label="validation"
        )
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(_limits(np.concatenate([loss, eval_loss]), eval_loss))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False)
    if np.isfinite(eval_loss).any():
        best = int(np.nanargmin(eval_loss))
        bits = evals[best].get("val_bits_per_byte")
        note = f"best {eval_loss[best]:.4f}"
        note += f"\n{bits:.4f} bits/byte" if bits is not None else ""
        _annotate(axes, eval_x[best], eval_loss[best], note, _EVAL)
    elif np.isfinite(smooth).any():
        best = int(np.nanargmin(smooth))
        _annotate(axes, x[best], smooth[best], f"best {smooth[best]:.4f}", _TRAIN)


def _annotate(
    axes: "Axes", x: float, y: float, note: str, color: str, rise: int = 50
) -> None:
    """Rings a point and writes `rise` above it, towards the middle of the picture."""
    axes.plot([x], [y], "o", markersize=11, fillstyle="none", color=color)
    left, right = axes.get_xlim()
    axes.annotate(
        note,
        (x, y),
        xytext=(0, rise),
        textcoords="offset points",
        ha="right" if x > (left + right) / 2 else "left",
        va="bottom" if rise > 0 else "top",
        color=color,
        fontweight="bold",
        bbox={"color": "white", "alpha": 0.8, "pad": 2},
        arrowprops={"arrowstyle": "-", "color": color, "shrinkB": 6},
    )


def _rates(train: list[dict]) -> list[_Side]:
    return [
        _Side("learning rate", _column(train, "learning_rate"), _RATE, noisy=False),
        _Side("gradient norm", _column(train, "grad_norm"), _NORM),
    ]


def _draw_sides(axes: "Axes", x: np.ndarray, sides: list[_Side]) -> None:
    """Draws the first side on the left scale and the second, if any, on the right."""
    scales = (axes, axes.twinx()) if len(sides) > 1 else (axes,)
    for scale, side in zip(scales, sides, strict=True):
        if side.noisy:
            scale.plot(x, side.values, color=side.color, alpha=0.3, linewidth=0.8)
        values = _smooth(side.values) if side.noisy else side.values
        marker = "o" if len(x) == 1 else None
        scale.plot(x, values, color=side.color, marker=marker)
        scale.set_ylabel(side.name, color=side.color)
        scale.tick_params(axis="y", colors=side.color)
        scale.spines["top"].set_visible(False)
        scale.spines["right"].set_visible(len(sides) > 1)
        if np.isfinite(side.values).any():
            # One spike must not flatten the rest.
            top = np.nanpercentile(side.values, 98)
            bottom = min(0, np.nanpercentile(side.values, 2))
            scale.set_ylim(1.15 * bottom, 1.15 * top if top > 0 else 1)
    axes.grid(alpha=0.25)


def _known(sides: list[_Side]) -> list[_Side]:
    return [side for side in sides if np.isfinite(side.values).any()]


def _column(rows: list[dict], key: str) -> np.ndarray:
    """Returns a key's values, NaN where a row has none."""
    return np.array([row.get(key) for row in rows], dtype=float)


def _eval_x(train: list[dict], evals: list[dict], unit: str) -> np.ndarray:
    """Returns where evaluations lie; one without `tokens` takes its step's."""
    x = _column(evals, unit)
    steps, train_x = (np.append(0, _column(train, key)) for key in ("step", unit))
    return np.where(np.isnan(x), np.interp(_column(evals, "step"), steps, train_x), x)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the centred mean over a fortieth of the run, passing over NaNs."""
    if not len(values):
        return values
    window = np.ones(len(values) // 40 | 1)
    known = np.isfinite(values)
    total = np.convolve(np.where(known, values, 0), window, "same")
    count = np.convolve(known, window, "same")
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _limits(values: np.ndarray, must_show: np.ndarray) -> tuple[float, float] | None:
    """Returns a y range that leaves out the first plunge and single spikes."""
    finite = values[np.isfinite(values)]
    if len(finite) < 2:
        return None
    low, high = np.percentile(finite, [0.5, 97])
    low = min(low, np.nanmin(must_show, initial=low))
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin
