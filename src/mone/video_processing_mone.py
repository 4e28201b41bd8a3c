# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Video processor of MoNE-ViViT: files or frames in, sampled and normalised `pixel_values` out."""

import contextlib
import os
import tempfile
from typing import Any, TypedDict

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import httpx
from PIL import Image
from transformers import BatchFeature
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    PILImageResampling,
)
from transformers.utils import TensorType, logging
from transformers.video_processing_utils import BaseVideoProcessor

from .pixels import check_bit_depth
from .video_decoding import VideoDecodeError, VideoReader, check_positive, clip_indices, uniform_indices


logger = logging.get_logger(__name__)


SAMPLINGS = ("dense", "uniform")
# What saved files hold beside the options.
SERVICE_KEYS = {
    "auto_map",
    "feature_extractor_type",
    "image_processor_type",
    "processor_class",
    "video_processor_type",
}
# Seconds without a byte after which a server is given up.
DOWNLOAD_TIMEOUT = 20.0


class MoNEViViTVideoProcessorKwargs(TypedDict, total=False):
    """Options of [`MoNEViViTVideoProcessor`], at construction and per call."""

    do_sample_frames: bool | None
    sampling: str | None
    num_frames: int | None
    frame_sampling_rate: int | None
    num_clips: int | None
    evaluation_clips: int | None
    do_convert_rgb: bool | None
    do_resize: bool | None
    size: int | list[int] | tuple[int, ...] | dict[str, int] | None
    resample: PILImageResampling | int | None
    do_center_crop: bool | None
    crop_size: int | list[int] | tuple[int, ...] | dict[str, int] | None
    do_rescale: bool | None
    rescale_factor: float | int | None
    do_normalize: bool | None
    image_mean: float | int | list[float | int] | tuple[float | int, ...] | None
    image_std: float | int | list[float | int] | tuple[float | int, ...] | None
    input_data_format: str | ChannelDimension | None
    device: str | torch.device | None
    return_tensors: str | TensorType | None


class MoNEViViTVideoProcessor(BaseVideoProcessor):
    r"""
    Samples frames of videos, resizes, crops and normalises them. The defaults are ViViT's for Kinetics-400 (Scenic,
    `projects/vivit`); they differ for Something-Something-v2: rate 1, size 288, crop 256.

    Files are decoded with PyAV ([`VideoReader`]), only where needed, each frame being resized and cropped before the
    next one is decoded. All kinds of input go through the same steps and give the same result; floating pixels, which
    resizing does not round, differ by at most half a grey level at each step.

    Args:
        do_sample_frames (`bool`, *optional*, defaults to `True`):
            `False` takes every frame.
        sampling (`str`, *optional*, defaults to `"dense"`):
            `"dense"`: clips of frames that are `frame_sampling_rate` apart. `"uniform"`: one clip of frames spread
            evenly over the video.
        num_frames (`int`, *optional*, defaults to 32):
            Frames of a clip. A video that has fewer repeats its last one (dense), or all evenly (uniform).
        frame_sampling_rate (`int`, *optional*, defaults to 2):
            Distance between the frames of a dense clip. Lowered, where the clip would not fit in the video, to the
            largest that does; so a video of exactly `num_frames` frames is taken as it is.
        num_clips (`int`, *optional*, defaults to 1):
            Dense clips of a video that a call takes: the middle one, or several with linearly spaced starts.
        evaluation_clips (`int`, *optional*, defaults to 8):
            Dense clips of a video over whose logits pipelines and evaluations average, as in the paper. Not of a call.
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            Whether to turn PIL images of other modes and grey arrays into RGB.
        do_resize, size, resample (*optional*, default to `True`, `{"shortest_edge": 256}`, bilinear):
            Resizing, with antialiasing. A single number is the shortest edge.
        do_center_crop, crop_size (*optional*, default to `True`, `{"height": 224, "width": 224}`):
            Central crop; a smaller frame is padded with black.
        do_rescale, rescale_factor, do_normalize, image_mean, image_std (*optional*):
            `(pixel * rescale_factor - mean) / std`, by default 1/255, 0.5 and 0.5: 0..255 becomes -1..1.
        input_data_format (`str`, *optional*):
            `"channels_first"` or `"channels_last"` for arrays; by default told from their shape.
        device (`str` or `torch.device`, *optional*):
            Where to rescale and normalise, and where the result is. By default where the frames are.
        return_tensors (`str`, *optional*):
            `"pt"` or `"np"`: one array. By default a list with a tensor per video.

    Raises:
        ValueError: an option has a value that is not allowed.
        TypeError: an unknown option, such as a misspelt one.

    Example:

    ```python
    >>> from mone import MoNEViViTVideoProcessor

    >>> processor = MoNEViViTVideoProcessor(num_clips=8)
    >>> pixel_values = processor(["a.mp4", "b.webm"], return_tensors="pt").pixel_values  # (2, 8, 32, 3, 224, 224)
    >>> logits = model(pixel_values.flatten(0, 1)).logits.unflatten(0, pixel_values.shape[:2]).mean(1)
    ```"""

    valid_kwargs = MoNEViViTVideoProcessorKwargs
    model_input_names = ["pixel_values"]

    do_sample_frames = True
    sampling = "dense"
    num_frames = 32
    frame_sampling_rate = 2
    num_clips = 1
    evaluation_clips = 8
    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 256}
    resample = PILImageResampling.BILINEAR
    do_center_crop = True
    crop_size = {"height": 224, "width": 224}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD
    input_data_format = None
    device = None
    return_tensors = None

    def __init__(self, **kwargs):
        _check_types({name: value for name, value in kwargs.items() if name not in SERVICE_KEYS})
        super().__init__(**kwargs)
        _check_values(**{name: getattr(self, name) for name in self._valid_kwargs_names})

    @property
    def clips_to_average(self) -> int:
        """`evaluation_clips`, or 1 where frames are not sampled densely."""
        return self.evaluation_clips if self.do_sample_frames and self.sampling == "dense" else 1

    def preprocess(self, videos, **kwargs) -> BatchFeature:
        """Also what calling the processor does.

        Args:
            videos:
                One video or a list of videos. A video is a path, an http(s) URL, `bytes`, a binary file object, an
                array or tensor of shape (frames, height, width, channels) or (frames, channels, height, width), or a
                list of frames: PIL images or arrays or tensors of three axes. Arrays of five axes are batches.
                Pixels in memory are in 0..255, whole numbers or not; channels are 1 or 3.
            kwargs: any option of the class but `evaluation_clips`, for this call. `None` is the processor's own.

        Returns:
            `BatchFeature` with `pixel_values` (batch, frames, channels, height, width); with `num_clips > 1`
            (batch, clips, frames, channels, height, width). float32 unless neither rescaled nor normalised.

        Raises:
            ValueError: an option or a video that is not allowed, before any work (but whole pixels outside 0..255 on
                meeting them); videos of different shapes that `return_tensors` asks to stack.
            TypeError: an unknown option, or something that is no video.
            VideoDecodeError: a file that cannot be downloaded or decoded; names it.
        """
        _check_types(kwargs)
        if kwargs.get("evaluation_clips") is not None:
            raise TypeError("evaluation_clips is for pipelines and evaluations; a call takes num_clips.")
        options: dict[str, Any] = {
            name: getattr(self, name) if kwargs.get(name) is None else kwargs[name]
            for name in self._valid_kwargs_names
        }
        options = self._standardize_kwargs(**options)
        self._validate_preprocess_kwargs(**options)
        _check_values(**options)
        return_tensors = options.pop("return_tensors")
        batch = [
            video if _is_file(video) else _check_frames(video, f"videos[{number}]", options["input_data_format"])
            for number, video in enumerate(_as_batch(videos))
        ]

        outputs = [self._process(video, **options) for video in batch]
        if return_tensors is not None:
            shapes = sorted({tuple(output.shape) for output in outputs})
            if len(shapes) > 1:
                raise ValueError(
                    f"videos give pixel_values of different shapes, which cannot be stacked: {shapes}. Allowed are "
                    "one shape, as do_sample_frames and do_center_crop give, or return_tensors=None."
                )
            # torch.stack would copy a single video too.
            outputs = torch.stack(outputs) if len(outputs) > 1 else outputs[0][None]
        return BatchFeature({"pixel_values": outputs}, tensor_type=return_tensors)

    def _process(self, video, **options) -> torch.Tensor:
        """`pixel_values` of one video: a file, or (frames, whether channels are last)."""

        def indices(total: int) -> np.ndarray:
            """(clips, frames)"""
            if not options["do_sample_frames"]:
                return np.arange(total)[None]
            if options["sampling"] == "uniform":
                return uniform_indices(total, options["num_frames"])[None]
            return clip_indices(total, options["num_clips"], options["num_frames"], options["frame_sampling_rate"])

        def resize_and_crop(frame: torch.Tensor) -> torch.Tensor:
            """(channels, height, width)"""
            if options["do_resize"]:
                frame = self.resize(frame, options["size"], resample=options["resample"])
            if options["do_center_crop"]:
                frame = self.center_crop(frame, options["crop_size"])
            return frame

        if _is_file(video):
            with contextlib.ExitStack() as stack:
                name = None
                if isinstance(video, str) and video.startswith(("http://", "https://")):
                    name, video = video, stack.enter_context(_download(video))
                reader = stack.enter_context(VideoReader(video, name=name))
                pixels = reader.read(
                    indices(len(reader)),
                    lambda image: resize_and_crop(torch.from_numpy(image).permute(2, 0, 1)).numpy(),
                )
                clips = torch.from_numpy(pixels)
        else:
            frames, channels_last = video
            wanted = indices(len(frames))
            done = {
                index: resize_and_crop(_as_tensor(frames[index], channels_last, options["do_convert_rgb"]))
                for index in np.unique(wanted).tolist()
            }
            clips = torch.stack([done[index] for index in wanted.flatten().tolist()]).unflatten(0, wanted.shape)
            if clips.is_floating_point() and options["do_rescale"] and clips.amax() <= 1:
                logger.warning_once(
                    "The pixels of a video are floats of at most 1, but count as up to 255: multiply them by 255, or "
                    "pass do_rescale=False."
                )

        clips = self.rescale_and_normalize(
            clips.to(options["device"]) if options["device"] is not None else clips,
            options["do_rescale"],
            options["rescale_factor"],
            options["do_normalize"],
            options["image_mean"],
            options["image_std"],
        )
        return clips if options["num_clips"] > 1 else clips[0]


def _check_types(kwargs: dict[str, Any]) -> None:
    # transformers logs unknown names at most.
    unknown = kwargs.keys() - MoNEViViTVideoProcessorKwargs.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"unknown option {', '.join(sorted(unknown))}. Allowed are "
            f"{', '.join(MoNEViViTVideoProcessorKwargs.__annotations__)}."
        )
    try:
        validate_typed_dict(MoNEViViTVideoProcessorKwargs, kwargs)
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error


def _check_values(
    sampling,
    num_frames,
    frame_sampling_rate,
    num_clips,
    evaluation_clips,
    do_sample_frames,
    size,
    crop_size,
    return_tensors,
    **other,
) -> None:
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling={sampling!r} must be one of {SAMPLINGS}.")
    check_positive(num_frames=num_frames, frame_sampling_rate=frame_sampling_rate, evaluation_clips=evaluation_clips)
    check_num_clips(num_clips, do_sample_frames, sampling)
    for name, value in (("size", dict(size)), ("crop_size", dict(crop_size))):
        if any(length is not None and length < 1 for length in value.values()):
            raise ValueError(f"{name}={value} must hold lengths of at least 1.")
    if return_tensors is not None:
        TensorType(return_tensors)  # raises ValueError with what is allowed


def check_num_clips(num_clips: int, do_sample_frames: bool, sampling: str) -> None:
    """Raise ValueError for what is no number of clips, and for several where frames are not sampled densely."""
    check_positive(num_clips=num_clips)
    if num_clips > 1 and not (do_sample_frames and sampling == "dense"):
        raise ValueError(
            f"num_clips={num_clips} must be 1 unless do_sample_frames=True and sampling='dense', got "
            f"do_sample_frames={do_sample_frames} and sampling={sampling!r}."
        )


def _is_file(video) -> bool:
    return isinstance(video, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(video, "read")


def _is_array(value) -> bool:
    return isinstance(value, (np.ndarray, torch.Tensor))


def _as_batch(videos) -> list:
    """`videos` as a list, each a file, an array of four axes or a list of frames."""
    if _is_file(videos):
        return [videos]
    if _is_array(videos):
        if videos.ndim not in (4, 5):
            raise ValueError(
                f"an array must have 4 axes (a video) or 5 (a batch), got shape {tuple(videos.shape)}; a single frame "
                "is a video as frame[None]."
            )
        videos = list(videos) if videos.ndim == 5 else [videos]
    if isinstance(videos, Image.Image):
        raise ValueError("a video must be a list of images, got a single image; [image] is a video of one frame.")
    if not isinstance(videos, (list, tuple)):
        raise TypeError(f"videos must be a file, an array, a list of frames or a list of these, got {type(videos)}.")
    if len(videos) == 0:
        raise ValueError("videos must hold at least one video or frame, got an empty list.")
    return [videos] if is_one_video(videos) else list(videos)


def is_one_video(videos: list | tuple) -> bool:
    """Whether a list holds the frames of one video and not videos."""
    # Arrays of fewer axes than a video's are frames, good ones or not.
    return len(videos) > 0 and all(
        isinstance(frame, Image.Image) or (_is_array(frame) and frame.ndim < 4) for frame in videos
    )


def _check_frames(video, name: str, input_data_format) -> tuple[Any, bool]:
    """A video in memory as (sequence of frames, whether their channels are last).

    Raises:
        ValueError, TypeError: not a video; says what is allowed.
    """
    if not _is_array(video) and not isinstance(video, (list, tuple)):
        raise TypeError(f"{name} must be a file, an array or a list of frames, got {type(video)}.")
    if _is_array(video) and video.ndim != 4:
        raise ValueError(f"{name} must have 4 axes, got shape {tuple(video.shape)}.")
    if len(video) == 0:
        raise ValueError(f"{name} must have at least one frame, got none.")
    if all(isinstance(frame, Image.Image) for frame in video):
        for mode in sorted({frame.mode for frame in video}):
            check_bit_depth(mode, name)
        shapes = {(frame.height, frame.width, 3) for frame in video}
        dtypes, input_data_format = set(), ChannelDimension.LAST
    elif all(_is_array(frame) for frame in video):
        shapes = {tuple(frame.shape) for frame in video}
        dtypes = {str(frame.dtype).removeprefix("torch.") for frame in video}
    else:
        kinds = sorted({type(frame).__name__ for frame in video})
        raise TypeError(f"{name} must hold PIL images or arrays of three axes as frames, got {', '.join(kinds)}.")
    (shape, *others) = sorted(shapes)
    if others or len(shape) != 3 or 0 in shape:
        raise ValueError(f"{name} must have frames of one size, each with three axes, got shapes {sorted(shapes)}.")
    if not all(dtype.startswith(("uint", "int", "float", "bfloat")) for dtype in dtypes):
        raise ValueError(f"{name} must have integer or floating pixels, got {', '.join(sorted(dtypes))}.")
    if input_data_format is not None:
        channels_last = ChannelDimension(input_data_format) == ChannelDimension.LAST
        if shape[-1 if channels_last else 0] not in (1, 3):
            raise ValueError(
                f"{name} must have 1 or 3 channels, got frames of shape {shape} with {input_data_format}."
            )
        return video, channels_last
    if (shape[0] in (1, 3)) == (shape[-1] in (1, 3)):
        raise ValueError(
            f"{name} must have 1 or 3 channels, first or last, got frames of shape {shape}. Where both could be "
            "meant, pass input_data_format='channels_first' or 'channels_last'."
        )
    return video, shape[-1] in (1, 3)


def _as_tensor(frame, channels_last: bool, do_convert_rgb: bool) -> torch.Tensor:
    """(channels, height, width), uint8 or float32."""
    if isinstance(frame, Image.Image):
        frame = np.asarray(frame.convert("RGB") if do_convert_rgb else frame)
        frame = frame if frame.ndim == 3 else frame[..., None]
    # A copy of arrays, which may be read-only or have negative strides.
    frame = frame if isinstance(frame, torch.Tensor) else torch.tensor(np.ascontiguousarray(frame))
    frame = frame.permute(2, 0, 1) if channels_last else frame
    if frame.is_floating_point():
        frame = frame.float()
    elif frame.dtype != torch.uint8:
        low, high = (bound.item() for bound in frame.long().aminmax())
        if low < 0 or high > 255:
            raise ValueError(f"whole pixels must lie in [0, 255], got {low} to {high}.")
        frame = frame.to(torch.uint8)
    return frame.expand(3, -1, -1) if do_convert_rgb and frame.shape[0] == 1 else frame


@contextlib.contextmanager
def _download(url: str):
    """The content of `url` as a temporary file: long videos are not held in memory."""
    with tempfile.TemporaryFile() as file:
        try:
            with httpx.stream("GET", url, follow_redirects=True, timeout=DOWNLOAD_TIMEOUT) as response:
                response.raise_for_status()
                for chunk in response.iter_bytes():
                    file.write(chunk)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise VideoDecodeError(f"{url}: could not be downloaded ({error}).") from error
        yield file


__all__ = ["MoNEViViTVideoProcessor"]
