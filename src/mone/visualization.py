# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what a MoNE model does: routed tokens (paper, Figs. 1 and 8) and accuracy against compute (Figs. 3, 5).

matplotlib is an optional dependency: `pip install "mone[demo]"`. Figures are made without pyplot, so that they need
no display, and are freed like any object.

Axis letters: C channels, N patch tokens, E experts (0 = smallest). A grid is (rows, columns) of patches.
"""

import math
import numbers
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.image_utils import ImageInput, is_pil_image

from .capacity import effective_capacity
from .configuration_mone import MoNEConfig, as_pair
from .flops import count_macs


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import BaseImageProcessor

    from .modeling_mone import MoNEPreTrainedModel

# Contrast of a token that did not go to the full model.
FADED = 0.3
# Inches: width of a panel, gap between two, height of a text line. Points: size of the text.
PANEL_WIDTH, GAP, LINE_HEIGHT, FONT_SIZE = 2.0, 0.06, 0.15, 8.5


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
        ImportError: without matplotlib.
    """
    config = model.config
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    if not images:
        raise ValueError("No image to draw: `images` is empty.")
    if isinstance(capacities, (str, numbers.Real)) or len(capacities) == 0:
        raise ValueError(f"capacities={capacities!r} must be a sequence of at least one capacity.")
    num_routers = len(config.router_layers)
    if not -num_routers <= router < num_routers:
        raise ValueError(f"router={router} does not exist: the model has {num_routers}, numbered from 0.")
    if predictions and not hasattr(model, "classifier"):
        raise ValueError(f"predictions=True needs a classifier, which {type(model).__name__} does not have.")
    for capacity in capacities:
        config.resolve_capacity(capacity)

    mode = "L" if config.num_channels == 1 else "RGB"
    images = [image.convert(mode) if is_pil_image(image) else image for image in images]
    pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]
    pixels = _displayable(pixel_values, image_processor)
    size, patch_size = tuple(pixels.shape[-2:]), as_pair(config.patch_size)
    grid = (size[0] // patch_size[0], size[1] // patch_size[1])

    panels, titles, labels = [pixels], ["model input"], [[""] * len(pixels)]
    with _inference(model):
        for capacity in capacities:
            outputs = model(
                pixel_values.to(model.device),
                capacity=capacity,
                interpolate_pos_encoding=interpolate_pos_encoding,
                output_router_logits=True,
                return_dict=True,
            )
            experts = outputs.expert_indices[router].cpu()
            panels.append(fade_patches(pixels, patch_contrast(experts, grid, config.num_experts, all_experts)))
            share = (experts == config.num_experts - 1).float().mean().item()
            titles.append(
                f"{_capacity_name(capacity)}\n{_number(count_macs(config, capacity, size) / 1e9)} GMACs\n"
                f"{_number(100 * share)}% in full model"
            )
            if predictions:
                labels.append([_label(config, index) for index in outputs.logits.argmax(-1).tolist()])

    # Laid out by hand, in inches: the automatic layouts do not know that a picture keeps its shape.
    rows, columns = len(pixels), len(panels)
    panel_height = PANEL_WIDTH * size[0] / size[1]
    row_gap = GAP + (1.2 * LINE_HEIGHT if predictions else 0)
    width = columns * (PANEL_WIDTH + GAP) + GAP
    height = rows * (panel_height + row_gap) + 3 * LINE_HEIGHT + 2 * GAP
    figure = _figure(width, height)
    axes = figure.subplots(
        rows,
        columns,
        squeeze=False,
        gridspec_kw={
            "left": GAP / width,
            "right": 1 - GAP / width,
            "bottom": row_gap / height,
            "top": 1 - (3 * LINE_HEIGHT + 2 * GAP) / height,
            "wspace": GAP / PANEL_WIDTH,
            "hspace": row_gap / panel_height,
        },
    )
    for column, title in enumerate(titles):
        axes[0, column].set_title(title, fontsize=FONT_SIZE, pad=72 * GAP)
        for row in range(rows):
            ax = axes[row, column]
            # Three channels also for grey images: imshow would stretch the contrast of a single one.
            ax.imshow(panels[column][row].permute(1, 2, 0).expand(-1, -1, 3).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if predictions:
                ax.set_xlabel(labels[column][row], fontsize=FONT_SIZE, labelpad=36 * GAP, parse_math=False)
    return _saved(figure, path)


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
    ax.legend(loc="lower right", frameon=False)
    return _saved(figure, path)


# --- pieces of both -------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, with a canvas of its own: pyplot would keep it, and want a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('mone.visualization draws with matplotlib: pip install "mone[demo]"') from error
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)  # attaches itself
    return figure


def _saved(figure: "Figure", path: str | os.PathLike | None) -> "Figure":
    if path is not None:
        figure.savefig(path)
    return figure


def _displayable(pixel_values: torch.Tensor, image_processor: "BaseImageProcessor") -> torch.Tensor:
    """(batch, C, height, width) as a processor makes them -> float32 in [0, 1], its last two steps undone.

    A processor that does not rescale is taken to get images in [0, 1].
    """
    pixels = pixel_values.cpu().float()
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"Images of {pixels.shape[1]} channels cannot be drawn; 1 (grey) and 3 (RGB) can.")
    if image_processor.do_normalize:
        mean, std = (
            torch.as_tensor(value, dtype=pixels.dtype).reshape(-1, 1, 1)
            for value in (image_processor.image_mean, image_processor.image_std)
        )
        pixels = pixels * std + mean
    if image_processor.do_rescale:
        # 1 for the usual factor of 1/255; others map the bytes elsewhere than to [0, 1].
        pixels = pixels / (255 * image_processor.rescale_factor)
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
