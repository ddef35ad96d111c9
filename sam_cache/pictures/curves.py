"""How a run went: its metrics as one picture."""

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sam_cache.pictures.files import replace_file

HELD_OUT = "held_out/"
BOUNDARY = "boundary_iou/"  # kept in the metrics; with these too the picture would be full
LOSSES = {
    "loss": "total",
    "focal": "focal",
    "dice": "dice",
    "iou": "IoU head",
    "bce": "cross entropy",
    "balanced_bce": "balanced cross entropy",
    "soft_iou": "soft IoU",
}
COLOURS = ("#222222", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito


def draw_curves(metrics: list[dict], path: str | Path) -> None:
    """Plot a run's metrics, the lines of its `metrics.jsonl`, as a PNG.

    Every line has `step`; `loss` and its parts (the names in `LOSSES`), `learning_rate` and any
    `held_out/NAME` are drawn where they occur.
    """
    figure = Figure(figsize=(8, 7.5), dpi=150, layout="constrained")
    losses, held_out, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))

    for (name, label), colour in zip(LOSSES.items(), COLOURS, strict=False):
        steps, values = _series(metrics, name)
        if len(steps) and (values > 0).any():
            losses.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            losses.plot(steps, _smooth(values), color=colour, linewidth=1.6, label=label)
    losses.set_yscale("log")
    _finish(losses, "training loss")

    names = {name for line in metrics for name in line if name.startswith(HELD_OUT) and BOUNDARY not in name}
    names = sorted(names, key=lambda name: (name != HELD_OUT + "score", name))
    for number, name in enumerate(names):
        steps, values = _series(metrics, name)
        colour = COLOURS[number % len(COLOURS)]
        label = f"{name.removeprefix(HELD_OUT)}  {values[-1]:.3f}" if len(values) else name
        held_out.plot(steps, values, "o-", color=colour, markersize=4, linewidth=1.6, label=label)
    _finish(held_out, "held-out IoU")

    steps, values = _series(metrics, "learning_rate")
    rate.plot(steps, values, color=COLOURS[1], linewidth=1.6)
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    _finish(rate, "learning rate")
    rate.set_xlabel("step")
    rate.xaxis.set_major_locator(MaxNLocator(integer=True))

    content = io.BytesIO()
    figure.savefig(content, format="png")
    replace_file(path, content.getvalue())


def _series(metrics: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
    return tuple(np.array(pairs, dtype=float).reshape(-1, 2).T)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over a twentieth of the run, centred, so that it does not lag behind."""
    window = np.ones(2 * (len(values) // 40) + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0)
