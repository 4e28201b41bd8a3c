# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Plots of measurements: accuracy (paper, Figs. 3 and 5) and time (Fig. 6) against compute, and how the cost grows.

Also what every figure of this package needs. matplotlib is an optional dependency. Figures are made without pyplot, so
that they need no display, and are freed like any object.
"""

import math
import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .capacity import effective_capacity


if TYPE_CHECKING:
    from matplotlib.figure import Figure

FONT_SIZE = 8.5  # points


def plot_accuracy_against_compute(rows: Sequence[dict], path: str | os.PathLike | None = None) -> "Figure":
    """Accuracy against multiply-accumulates (paper, Figs. 3 and 5).

    A model's points are joined by a line and labelled with their capacities; dense models are stars with a dashed
    horizontal line, to compare accuracies at a glance.

    Args:
        rows: one dict for each measurement:
            "model" (`str`): name of the series.
            "capacity" (`float`, E shares or `None`): as in the model's forward; `None` for a dense model. Shares are
                labelled with their effective capacity.
            "gmacs" (`float`): 10^9 multiply-accumulates for one input, as `count_macs` gives them.
            "accuracy" (`float`): in [0, 1], as `evaluate` and `Trainer` report it. Drawn in percent.
        path: also write the figure there, 150 dots per inch; the extension gives the format.

    Raises:
        ValueError: no rows, or one that misses a key or holds a value that is not allowed.
        ImportError: without matplotlib.
    """
    if not rows:
        raise ValueError("No measurement to plot: `rows` is empty.")
    for row in rows:
        missing = {"model", "capacity", "gmacs", "accuracy"} - set(row)
        if missing:
            raise ValueError(f"A row lacks {sorted(missing)}: {row!r}.")
        if not 0 <= row["accuracy"] <= 1:
            raise ValueError(f"accuracy={row['accuracy']!r} must be in [0, 1], not in percent: {row!r}.")
        if not (math.isfinite(row["gmacs"]) and row["gmacs"] > 0):
            raise ValueError(f"gmacs={row['gmacs']!r} must be a positive number: {row!r}.")

    figure = empty_figure(6.4, 4.2)
    from matplotlib.patheffects import withStroke  # after empty_figure, which explains a missing matplotlib

    figure.set_layout_engine("constrained")
    ax = figure.subplots()
    for number, name in enumerate(dict.fromkeys(row["model"] for row in rows)):
        colour = f"C{number % 10}"
        series = sorted((row for row in rows if row["model"] == name), key=lambda row: row["gmacs"])
        dense = [(row["gmacs"], 100 * row["accuracy"]) for row in series if row["capacity"] is None]
        nested = [(row["gmacs"], 100 * row["accuracy"]) for row in series if row["capacity"] is not None]
        capacities = [row["capacity"] for row in series if row["capacity"] is not None]
        if nested:
            ax.plot(*zip(*nested, strict=True), marker="o", markersize=5, color=colour, label=name)
        for point, capacity in zip(nested, capacities, strict=True):
            value = capacity if isinstance(capacity, numbers.Real) else effective_capacity(capacity)
            # Right below the point, where a curve that rises and flattens leaves room; under lines and points.
            text = ax.annotate(
                f"{value:.3g}", point, (4, -4), textcoords="offset points", va="top", color=colour, zorder=1.5
            )
            text.set(fontsize=FONT_SIZE, path_effects=[withStroke(linewidth=4, foreground="white")])
        if dense:
            label = f"{name} (dense)" if nested else name
            ax.plot(*zip(*dense, strict=True), "*", markersize=13, color=colour, label=label)
        for _, accuracy in dense:
            ax.axhline(accuracy, color=colour, linestyle="--", linewidth=1, alpha=0.6, zorder=1)
    ax.set_xlabel("Compute (GMACs per input)")
    ax.set_ylabel("Accuracy (%)")
    ax.margins(0.08)
    ax.grid(alpha=0.25)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="best", frameon=False)
    return saved(figure, path)


def plot_speed(rows: Sequence[dict], path: str | os.PathLike | None = None) -> "Figure":
    """Time of a call against multiply-accumulates, with the line that perfect efficiency would follow (paper, Fig. 6).

    Args:
        rows: as `mone.benchmark.measure` gives them, with a "name" each.
        path: also write the figure there, 150 dots per inch; the extension gives the format.

    Raises:
        ValueError: no rows.
        ImportError: without matplotlib.
    """
    panels = {}
    for row in rows:
        panels.setdefault((row["name"], row["batch_size"]), []).append(row)
    if not panels:
        raise ValueError("No measurement to plot: `rows` is empty.")
    figure = empty_figure(3.6 * len(panels), 3.4)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, ((name, batch_size), measured) in zip(axes, panels.items(), strict=True):
        dense = next(row for row in measured if row["model"] == "dense" and row["mode"] == "eager")
        ax.plot([0, dense["gmacs"]], [0, dense["milliseconds"]], "--", color="grey", linewidth=1, label="efficiency 1")
        ax.plot(dense["gmacs"], dense["milliseconds"], "*", color="grey", markersize=12, label="dense")
        for number, mode in enumerate(dict.fromkeys(row["mode"] for row in measured)):
            points = sorted(
                (row["gmacs"], row["milliseconds"])
                for row in measured
                if row["model"] == "mone" and row["mode"] == mode
            )
            ax.plot(*zip(*points, strict=True), marker="o", markersize=5, color=f"C{number}", label=f"MoNE {mode}")
        ax.set(xlabel="Compute (GMACs per input)", ylabel="Time of a call (ms)", title=f"{name}, batch {batch_size}")
        ax.set_xlim(left=0)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=FONT_SIZE)
    return saved(figure, path)


def plot_growth(rows: Sequence[dict], path: str | os.PathLike | None = None) -> "Figure":
    """Cost of a call against image size, frames, batch and so on, and the part that no capacity reduces.

    A column for each axis; from the top, multiply-accumulates and time of a call, in double logarithmic scales, and
    the share of the multiply-accumulates that attention takes.

    Args:
        rows: as `mone.benchmark.growth` gives them.
        path: also write the figure there, 150 dots per inch; the extension gives the format.

    Raises:
        ValueError: no rows.
        ImportError: without matplotlib.
    """
    names = list(dict.fromkeys(row["axis"] for row in rows))
    if not names:
        raise ValueError("No measurement to plot: `rows` is empty.")
    figure = empty_figure(2.7 * len(names), 6.4)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(3, len(names), squeeze=False, sharex="col", sharey="row")
    for column, name in zip(axes.T, names, strict=True):
        of_axis = [row for row in rows if row["axis"] == name]
        for number, capacity in enumerate(dict.fromkeys(row["capacity"] for row in of_axis)):
            # The dense model is timed in eager mode whatever the mode of the others, and also in some of these.
            points = {row["value"]: row for row in of_axis if row["capacity"] == capacity}
            style = {"color": "grey" if capacity is None else f"C{number - 1}", "marker": "o", "markersize": 4}
            label = "dense" if capacity is None else capacity_name(capacity)
            values, points = list(points), list(points.values())
            column[0].plot(values, [row["gmacs"] * row["batch_size"] for row in points], label=label, **style)
            column[1].plot(values, [row["milliseconds"] for row in points], **style)
            column[2].plot(values, [100 * row["attention_share"] for row in points], **style)
        for ax in column:
            ax.set_xscale("log")
            ax.set_xticks(sorted({row["value"] for row in of_axis}))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
            ax.grid(alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
        for ax in column[:2]:
            ax.set_yscale("log")
        column[2].set_ylim(bottom=0)
        column[2].set_xlabel(name)
    for ax, label in zip(axes[:, 0], ("GMACs of a call", "Time of a call (ms)", "Attention (% of MACs)"), strict=True):
        ax.set_ylabel(label)
    axes[0, 0].legend(frameon=False, fontsize=FONT_SIZE)
    return saved(figure, path)


# --- what all figures share ------------------------------------------------------------------------------------------


def check_matplotlib() -> None:
    """Raise ImportError, with what to do, where there is none: before long work whose end is a picture."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("Pictures are drawn with matplotlib: pip install matplotlib") from error


def empty_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, with a canvas of its own: pyplot would keep it, and want a display."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)  # attaches itself
    return figure


def saved(figure: "Figure", path: str | os.PathLike | None) -> "Figure":
    """The figure itself, also written to `path`, if there is one; its folder is made."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure


def capacity_name(capacity: float | Sequence[float]) -> str:
    """Such as "capacity 0.4"; of a distribution its shares."""
    if isinstance(capacity, numbers.Real):
        return f"capacity {capacity:g}"
    return "shares " + "/".join(f"{share:.2g}" for share in capacity)
