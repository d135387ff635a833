"""loss.png: how a run went, at a glance."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relax.tracking.metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = (1200, 800)  # pixels
_DPI = 120
_TRAIN, _EVAL, _RATE, _NORM = "#3b6ea8", "#c8553d", "#3a8f5c", "#8a6bb1"


def plot_losses(metrics_path: Path, image_path: Path, title: str) -> bool:
    """Draws a run's losses, learning rate and gradient norm as a PNG of `SIZE`.

    The x axis counts tokens where every training row does, else steps. Returns
    False, and draws nothing, when no row holds a loss.
    """
    rows = read_metrics(metrics_path)
    train = [row for row in rows if row["kind"] == "train" and "loss" in row]
    evals = [row for row in rows if row["kind"] == "eval" and "val_loss" in row]
    if not train and not evals:
        return False
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    inches = (SIZE[0] / _DPI, SIZE[1] / _DPI)
    figure = Figure(figsize=inches, dpi=_DPI, layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(7, 2))
    unit = "tokens" if train and all("tokens" in row for row in train) else "step"
    _draw_losses(losses, train, evals, unit)
    _draw_rates(rates, train, unit)
    losses.set_title(title, loc="left", fontweight="bold")
    rates.set_xlabel(unit)
    rates.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(image_path)
    return True


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


def _annotate(axes: "Axes", x: float, y: float, note: str, color: str) -> None:
    """Rings a point and writes above it, towards the middle of the picture."""
    axes.plot([x], [y], "o", markersize=11, fillstyle="none", color=color)
    left, right = axes.get_xlim()
    axes.annotate(
        note,
        (x, y),
        xytext=(0, 50),
        textcoords="offset points",
        ha="right" if x > (left + right) / 2 else "left",
        va="bottom",
        color=color,
        fontweight="bold",
        bbox={"color": "white", "alpha": 0.8, "pad": 2},
        arrowprops={"arrowstyle": "-", "color": color, "shrinkB": 6},
    )


def _draw_rates(axes: "Axes", train: list[dict], unit: str) -> None:
    """Draws the learning rate on the left scale, the gradient norm on the right."""
    x, rate, norm = (
        _column(train, key) for key in (unit, "learning_rate", "grad_norm")
    )
    right = axes.twinx()
    axes.plot(x, rate, color=_RATE)
    right.plot(x, norm, color=_NORM, alpha=0.3, linewidth=0.8)
    right.plot(x, _smooth(norm), color=_NORM)
    sides = (
        (axes, "learning rate", rate, _RATE),
        (right, "gradient norm", norm, _NORM),
    )
    for side, name, values, color in sides:
        side.set_ylabel(name, color=color)
        side.tick_params(axis="y", colors=color)
        side.spines["top"].set_visible(False)
        if np.isfinite(values).any():
            top = np.nanpercentile(values, 98)  # one spike must not flatten the rest
            side.set_ylim(0, 1.15 * top if top > 0 else 1)
    axes.grid(alpha=0.25)


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
