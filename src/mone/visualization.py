# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Pictures and videos of what a MoNE model does: which tokens go to the full model (paper, Figs. 1 and 8).

They need matplotlib, which is an optional dependency.

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

from .configuration_mone import MoNEConfig, MoNEViViTConfig
from .flops import count_macs
from .modeling_mone import patch_grid
from .pixels import normalisation
from .plots import FONT_SIZE, capacity_name, empty_figure, saved
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
# Inches: width of a panel, and of one in a grid of frames; gap between two; width of a letter, height of a text line,
# both in FONT_SIZE.
PANEL_WIDTH, FRAME_WIDTH, GAP, LETTER_WIDTH, LINE_HEIGHT = 2.0, 1.1, 0.06, 0.065, 0.15
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
        TypeError: a video model, or one that is no MoNE.
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
    return saved(figure, path)


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
        TypeError: an image model, one that is no MoNE, or what is no video.
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
    return saved(figure, path)


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
    header = empty_figure((full_width + 0.5) / dpi, (top + 0.5) / dpi)  # 0.5: not to lose a pixel to rounding
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


# --- pieces of the above ---------------------------------------------------------------------------------------------


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
                f"{capacity_name(capacity)}\n{_number(count_macs(config, capacity, size) / 1e9)} GMACs\n"
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
    figure = empty_figure(width, height)
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


def _number(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{float(f'{value:.3g}'):,.10g}"


def _label(config: MoNEConfig, index: int) -> str:
    """Name of a class, short enough for a panel. ImageNet's names list synonyms after a comma."""
    name = str(config.id2label.get(index, index)).split(",")[0]
    return name if len(name) <= 26 else name[:25] + "…"
