# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what a MoNE model does: routed tokens (paper, Figs. 1 and 8) and accuracy against compute (Figs. 3, 5).

matplotlib is an optional dependency. Figures are made without pyplot, so that they need no display, and are freed like
any object.

Axis letters: C channels, F frames, T temporal indices (one for each tubelet), N patch tokens of an image or temporal
index, E experts (0 = smallest). A grid is (rows, columns) of patches.
"""

import math
import numbers
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers.image_utils import ImageInput, is_pil_image

from .capacity import effective_capacity
from .configuration_mone import MoNEConfig, MoNEViViTConfig
from .flops import count_macs
from .modeling_mone import patch_grid
from .pixels import normalisation
from .video_decoding import check_positive, uniform_indices
from .video_encoding import check_destination, write_video


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import BaseImageProcessor
    from transformers.utils import ModelOutput
    from transformers.video_processing_utils import BaseVideoProcessor

    from .modeling_mone import MoNEPreTrainedModel
    from .modeling_mone_vivit import MoNEViViTPreTrainedModel

# Contrast of a token that did not go to the full model.
FADED = 0.3
# Inches: width of a panel, and of one in a grid of frames; gap between two; width of a letter, height of a text line.
# Points: size of the text.
PANEL_WIDTH, FRAME_WIDTH, GAP, LETTER_WIDTH, LINE_HEIGHT, FONT_SIZE = 2.0, 1.1, 0.06, 0.065, 0.15, 8.5
# Pixels, in a video: least width of a panel, gap between two.
VIDEO_PANEL_WIDTH, VIDEO_GAP = 224, 8


def patch_contrast(
    expert_indices: torch.Tensor, grid: tuple[int, int], num_experts: int, all_experts: bool = False
) -> torch.Tensor:
    """How clearly to show every patch: 1 where the full model, the largest expert, processed it (Fig. 8).

    Args:
        expert_indices: (..., N) integers, one router's entry of a model output's `expert_indices`.
        grid: patches (vertically, horizontally), whose product is N.
        num_experts: E.
        all_experts: one level for each expert, evenly from `FADED` for the smallest to 1, instead of `FADED` for all
            but the full model.

    Returns:
        (..., *grid) float32, row by row as in the image.

    Raises:
        ValueError: N is not the size of the grid.
    """
    if expert_indices.shape[-1] != grid[0] * grid[1]:
        raise ValueError(f"{expert_indices.shape[-1]} tokens do not fill a grid of {grid[0]}x{grid[1]} patches.")
    levels = torch.linspace(FADED, 1.0, num_experts) if all_experts else torch.full((num_experts,), FADED)
    levels[-1] = 1.0
    return levels[expert_indices.cpu()].unflatten(-1, tuple(grid))


def fade_patches(pixels: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """Fade every patch of an image towards grey; a contrast of 1 keeps the pixels exactly.

    Towards grey and not black, so that dark patches, too, show where they went.

    Args:
        pixels: (..., C, height, width) in [0, 1].
        contrast: (..., rows, columns), which divide height and width; leading axes as those of `pixels`.
    """
    height, width = pixels.shape[-2] // contrast.shape[-2], pixels.shape[-1] // contrast.shape[-1]
    weight = contrast.repeat_interleave(height, -2).repeat_interleave(width, -1).unsqueeze(-3)
    return torch.lerp(torch.full_like(pixels, 0.5), pixels, weight.expand_as(pixels))


def draw_routed_tokens(
    model: "MoNEPreTrainedModel",
    image_processor: "BaseImageProcessor",
    images: ImageInput,
    capacities: Sequence[float | Sequence[float]],
    path: str | os.PathLike | None = None,
    *,
    router: int = 0,
    all_experts: bool = False,
    predictions: bool = False,
    interpolate_pos_encoding: bool = False,
) -> "Figure":
    """The tokens that the full model processes, in full colour; all others faded (paper, Figs. 1 and 8a).

    One row per image: the image as the model sees it, resized and cropped by the processor, then one panel per
    capacity. A column's title gives the capacity, the cost of one image and the share of tokens in the full model.

    Args:
        model: an image model; it runs in eval mode, on its device, and gets its modes back.
        image_processor: the model's own.
        images: one image or several, as the processor takes them, in 1 or 3 channels.
        capacities: one column each; as the model's `capacity`. An arg-max router ignores them.
        path: also write the figure there, 150 dots per inch; the extension gives the format.
        router: number of the router whose decision is shown, for a model that has several; negative from the end.
        all_experts: show the experts between by contrast too: the larger the expert, the clearer its tokens.
        predictions: write the label with the largest logit under every panel.
        interpolate_pos_encoding: as in the model's forward, for a processor of another size.

    Returns:
        A matplotlib figure whose axes are (images, 1 + capacities), row by row.

    Raises:
        ValueError: no image, no capacity, one that is not allowed, an unknown router, images that are neither grey
            nor RGB or not of the model's size, or `predictions` of a model without a classifier.
        TypeError: a video model.
        ImportError: without matplotlib.
    """
    config = model.config
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if not images:
        raise ValueError("No image to draw: `images` is empty.")
    if isinstance(config, MoNEViViTConfig):
        raise TypeError(f"draw_routed_tokens takes an image model, got {type(model).__name__}: use draw_routed_video.")
    _check_arguments(config, capacities, router)
    if predictions and not hasattr(model, "classifier"):
        raise ValueError(f"predictions=True needs a classifier, which {type(model).__name__} does not have.")

    mode = "L" if config.num_channels == 1 else "RGB"
    images = [image.convert(mode) if is_pil_image(image) else image for image in images]
    pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
    panels, titles, outputs = _routed_panels(
        model, image_processor, pixel_values, capacities, router, all_experts, interpolate_pos_encoding
    )
    row_gap = GAP + (1.2 * LINE_HEIGHT if predictions else 0)
    figure, axes = _picture_grid(
        torch.stack(panels, dim=1), PANEL_WIDTH, left=GAP, top=3 * LINE_HEIGHT + 2 * GAP, row_gap=row_gap
    )
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title, fontsize=FONT_SIZE, pad=72 * GAP)
    if predictions:
        for column, output in zip(axes.T[1:], outputs, strict=True):
            for ax, index in zip(column, output.logits.argmax(-1).tolist(), strict=True):
                ax.set_xlabel(_label(config, index), fontsize=FONT_SIZE, labelpad=36 * GAP, parse_math=False)
    return _saved(figure, path)


def draw_routed_video(
    model: "MoNEViViTPreTrainedModel",
    video_processor: "BaseVideoProcessor",
    video,
    capacities: Sequence[float | Sequence[float]],
    path: str | os.PathLike | None = None,
    *,
    router: int = 0,
    all_experts: bool = False,
    max_columns: int = 8,
    interpolate_pos_encoding: bool = False,
) -> "Figure":
    """The tokens that the full model processes in one clip, in full colour; all others faded (paper, Fig. 8b).

    A column is a temporal index, shown by the first frame of its tubelet; its title is the frame's number in the
    clip. The first row has the frames as the model sees them, resized and cropped by the processor, and every other
    row those of one capacity; its title gives the capacity, the cost of the clip and the share of tokens in the full
    model, of all temporal indices.

    Args:
        model: a video model; it runs in eval mode, on its device, and gets its modes back.
        video_processor: the model's own.
        video: one video, as the processor takes it: a path, URL, bytes, array or list of frames. Its middle clip is
            drawn.
        capacities: one row each; as the model's `capacity`. An arg-max router ignores them.
        path: also write the figure there, 150 dots per inch; the extension gives the format.
        router: number of the router whose decision is shown, for a model that has several; negative from the end.
        all_experts: show the experts between by contrast too: the larger the expert, the clearer its tokens.
        max_columns: where the clip has more temporal indices, so many of them are drawn, spread evenly.
        interpolate_pos_encoding: as in the model's forward, for a processor of another size.

    Returns:
        A matplotlib figure whose axes are (1 + capacities, temporal indices), row by row.

    Raises:
        ValueError: no capacity, one that is not allowed, an unknown router, a `max_columns` below 1, or a video that
            is not allowed or whose clip does not fit the model.
        TypeError: an image model, or what is no video.
        VideoDecodeError: a file that cannot be downloaded or decoded.
        ImportError: without matplotlib.
    """
    check_positive(max_columns=max_columns)
    panels, titles = _routed_clip(
        model, video_processor, video, capacities, router, all_experts, interpolate_pos_encoding
    )
    tubelet = model.config.tubelet_size[0]
    time = panels.shape[1] // tubelet
    frames = tubelet * uniform_indices(time, min(time, max_columns))

    panel_height = FRAME_WIDTH * panels.shape[-2] / panels.shape[-1]
    figure, axes = _picture_grid(
        panels[:, frames],
        FRAME_WIDTH,
        left=LETTER_WIDTH * max(len(line) for title in titles for line in title.split("\n")) + 3 * GAP,
        top=LINE_HEIGHT + 2 * GAP,
        row_gap=GAP + max(0, 3 * LINE_HEIGHT - panel_height),  # very wide frames are lower than their title
    )
    for ax, frame in zip(axes[0], frames, strict=True):
        ax.set_title(f"frame {frame}", fontsize=FONT_SIZE, pad=72 * GAP)
    for ax, title in zip(axes[:, 0], titles, strict=True):
        ax.set_ylabel(title, fontsize=FONT_SIZE, labelpad=2 * 72 * GAP, rotation="horizontal", ha="right", va="center")
    return _saved(figure, path)


def write_routed_video(
    model: "MoNEViViTPreTrainedModel",
    video_processor: "BaseVideoProcessor",
    video,
    capacities: Sequence[float | Sequence[float]],
    path: str | os.PathLike,
    *,
    fps: int = 8,
    router: int = 0,
    all_experts: bool = False,
    interpolate_pos_encoding: bool = False,
) -> None:
    """[`draw_routed_video`] to be watched, as H.264: all frames of the clip, capacities side by side (Fig. 8b).

    The clip as the model sees it comes first and then one panel per capacity, under the titles of
    `draw_routed_video`. All frames of a tubelet show its routing. Frames narrower than 224 pixels are enlarged by the
    smallest whole factor that makes them as wide.

    Args:
        path: the file, which ends in `.mp4`.
        fps: frames per second. The clip's frames are shown one after the other, however far apart in the video.
        all others: as in `draw_routed_video`.

    Raises:
        ValueError: as `draw_routed_video`, or for a `path` or `fps` that is not allowed.
        FileNotFoundError: the folder of `path` does not exist.
        TypeError, VideoDecodeError, ImportError: as `draw_routed_video`.
    """
    if Path(path).suffix != ".mp4":
        raise ValueError(f"path={str(path)!r} must end in .mp4.")
    check_destination(path, fps)
    panels, titles = _routed_clip(
        model, video_processor, video, capacities, router, all_experts, interpolate_pos_encoding
    )
    scale = math.ceil(VIDEO_PANEL_WIDTH / panels.shape[-1])
    pixels = (255 * panels).round().byte().permute(0, 1, 3, 4, 2)  # (panels, F, height, width, C)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).numpy()
    height, width = pixels.shape[2:4]
    pitch = width + VIDEO_GAP

    # The titles as an image, in the proportions of the figures; H.264 wants the whole even in height and width.
    dpi = width / PANEL_WIDTH
    top = round((3 * LINE_HEIGHT + 2 * GAP) * dpi)
    top += (top + height) % 2
    full_width = len(panels) * pitch - VIDEO_GAP
    full_width += full_width % 2
    header = _figure((full_width + 0.5) / dpi, (top + 0.5) / dpi)  # 0.5: not to lose a pixel to rounding
    header.set_dpi(dpi)
    for number, title in enumerate(titles):
        x = (number * pitch + width / 2) / full_width
        header.text(x, 0.5, title, fontsize=FONT_SIZE, ha="center", va="center")
    header.canvas.draw()

    frames = np.full((panels.shape[1], top + height, full_width, 3), 255, np.uint8)
    frames[:, :top] = np.asarray(header.canvas.buffer_rgba())[..., :3]
    for number, panel in enumerate(pixels):
        frames[:, top:, number * pitch : number * pitch + width] = panel
    write_video(path, frames, fps, options={"crf": "18"})


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

    figure = _figure(6.4, 4.2)
    from matplotlib.patheffects import withStroke  # after _figure, which explains a missing matplotlib

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
    return _saved(figure, path)


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
    figure = _figure(3.6 * len(panels), 3.4)
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
    return _saved(figure, path)


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
    figure = _figure(2.7 * len(names), 6.4)
    figure.set_layout_engine("constrained")
    axes = figure.subplots(3, len(names), squeeze=False, sharex="col", sharey="row")
    for column, name in zip(axes.T, names, strict=True):
        of_axis = [row for row in rows if row["axis"] == name]
        for number, capacity in enumerate(dict.fromkeys(row["capacity"] for row in of_axis)):
            # The dense model is timed in eager mode whatever the mode of the others, and also in some of these.
            points = {row["value"]: row for row in of_axis if row["capacity"] == capacity}
            style = {"color": "grey" if capacity is None else f"C{number - 1}", "marker": "o", "markersize": 4}
            label = "dense" if capacity is None else _capacity_name(capacity)
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
    return _saved(figure, path)


# --- pieces of the above ---------------------------------------------------------------------------------------------


def check_matplotlib() -> None:
    """Raise ImportError, with what to do, where there is none: before long work whose end is a picture."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("Pictures are drawn with matplotlib: pip install matplotlib") from error


def _check_arguments(config: MoNEConfig, capacities: Sequence[float | Sequence[float]], router: int) -> None:
    if isinstance(capacities, (str, numbers.Real)) or len(capacities) == 0:
        raise ValueError(f"capacities={capacities!r} must be a sequence of at least one capacity.")
    if not isinstance(config, MoNEConfig):
        raise TypeError(f"The tokens of a MoNE are drawn, not of a {config.model_type!r} model, which has no experts.")
    num_routers = len(config.router_layers)
    if not -num_routers <= router < num_routers:
        raise ValueError(f"router={router} does not exist: the model has {num_routers}, numbered from 0.")
    for capacity in capacities:
        config.resolve_capacity(capacity)


def _routed_panels(
    model: "MoNEPreTrainedModel",
    processor: "BaseImageProcessor | BaseVideoProcessor",
    pixel_values: torch.Tensor,
    capacities: Sequence[float | Sequence[float]],
    router: int,
    all_experts: bool,
    interpolate_pos_encoding: bool,
) -> tuple[list[torch.Tensor], list[str], list["ModelOutput"]]:
    """Run the model at each capacity and fade what did not go to the full model.

    Args:
        pixel_values: (batch, C, height, width), or (batch, F, C, height, width) of a video model.

    Returns:
        Panels and their titles, the model input first and then one per capacity; the outputs, one per capacity.
        A panel has the shape of `pixel_values` and values in [0, 1].
    """
    config = model.config
    pixels = _displayable(pixel_values, processor)
    size = tuple(pixels.shape[-2:])
    panels, titles, outputs = [pixels], ["model input"], []
    with _inference(model):
        for capacity in capacities:
            output = model(
                pixel_values.to(model.device),
                capacity=capacity,
                interpolate_pos_encoding=interpolate_pos_encoding,
                output_router_logits=True,
                return_dict=True,
            )
            experts = output.expert_indices[router]
            contrast = patch_contrast(experts, patch_grid(config, size), config.num_experts, all_experts)
            if isinstance(config, MoNEViViTConfig):
                contrast = contrast.repeat_interleave(config.tubelet_size[0], 1)  # (batch, T, ...) -> (batch, F, ...)
            share = (experts == config.num_experts - 1).float().mean().item()
            panels.append(fade_patches(pixels, contrast))
            titles.append(
                f"{_capacity_name(capacity)}\n{_number(count_macs(config, capacity, size) / 1e9)} GMACs\n"
                f"{_number(100 * share)}% in full model"
            )
            outputs.append(output)
    return panels, titles, outputs


def _routed_clip(
    model: "MoNEViViTPreTrainedModel",
    video_processor: "BaseVideoProcessor",
    video,
    capacities: Sequence[float | Sequence[float]],
    router: int,
    all_experts: bool,
    interpolate_pos_encoding: bool,
) -> tuple[torch.Tensor, list[str]]:
    """`_routed_panels` of one clip of one video: (1 + capacities, F, C, height, width) and their titles."""
    if not isinstance(model.config, MoNEViViTConfig):
        raise TypeError(f"A video needs a video model, got {type(model).__name__}: use draw_routed_tokens for images.")
    _check_arguments(model.config, capacities, router)
    # As a list of one: the processor refuses several videos, then.
    pixel_values = video_processor([video], num_clips=1, return_tensors="pt")["pixel_values"]
    panels, titles, _ = _routed_panels(
        model, video_processor, pixel_values, capacities, router, all_experts, interpolate_pos_encoding
    )
    return torch.cat(panels), titles


def _picture_grid(
    pictures: torch.Tensor, panel_width: float, left: float, top: float, row_gap: float
) -> tuple["Figure", np.ndarray]:
    """A figure of pictures, and its axes, (rows, columns).

    Laid out by hand: the automatic layouts do not know that a picture keeps its shape.

    Args:
        pictures: (rows, columns, C, height, width) in [0, 1].
        panel_width, left, top, row_gap: inches; width of a picture, room for titles on the left and at the top, and
            room under every row.
    """
    rows, columns = pictures.shape[:2]
    panel_height = panel_width * pictures.shape[-2] / pictures.shape[-1]
    width = left + columns * (panel_width + GAP)
    height = top + rows * (panel_height + row_gap)
    figure = _figure(width, height)
    axes = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": left / width,
            "right": 1 - GAP / width,
            "bottom": row_gap / height,
            "top": 1 - top / height,
            "wspace": GAP / panel_width,
            "hspace": row_gap / panel_height,
        },
    )
    for ax, picture in zip(axes.flat, pictures.flatten(0, 1), strict=True):
        # Three channels also for grey pictures: imshow would stretch the contrast of a single one.
        ax.imshow(picture.permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    return figure, axes


def _figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, with a canvas of its own: pyplot would keep it, and want a display."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)  # attaches itself
    return figure


def _saved(figure: "Figure", path: str | os.PathLike | None) -> "Figure":
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return figure


def _displayable(pixel_values: torch.Tensor, processor: "BaseImageProcessor | BaseVideoProcessor") -> torch.Tensor:
    """(..., C, height, width) as a processor makes them -> float32 in [0, 1], its last two steps undone.

    An image processor that does not rescale is taken to get images in [0, 1]; videos are always in [0, 255].
    """
    pixels = pixel_values.cpu().float()
    if pixels.shape[-3] not in (1, 3):
        raise ValueError(f"Images of {pixels.shape[-3]} channels cannot be drawn; 1 (grey) and 3 (RGB) can.")
    mean, std = normalisation(processor, pixels.shape[-3])
    pixels = pixels * std + mean
    if processor.do_rescale:
        # 1 for the usual factor of 1/255; others map the bytes elsewhere than to [0, 1].
        pixels = pixels / (255 * processor.rescale_factor)
    elif pixels.ndim == 5:
        pixels = pixels / 255
    return pixels.clamp(0, 1)


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients. Afterwards every module, a frozen one too, has the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _capacity_name(capacity: float | Sequence[float]) -> str:
    """Such as "capacity 0.4"; of a distribution its shares."""
    if isinstance(capacity, numbers.Real):
        return f"capacity {capacity:g}"
    return "shares " + "/".join(f"{share:.2g}" for share in capacity)


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.10g}"


def _label(config: MoNEConfig, index: int) -> str:
    """Name of a class, short enough for a panel. ImageNet's names list synonyms after a comma."""
    name = str(config.id2label.get(index, index)).split(",")[0]
    return name if len(name) <= 26 else name[:25] + "…"
