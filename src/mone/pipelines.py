# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Pipelines that take `capacity`: image and video classification, image features.

`import mone` puts them in the place of transformers' own for this process. For every other model they are the stock
ones.

```python
>>> import mone
>>> from transformers import pipeline

>>> pipe = pipeline("image-classification", model=folder, capacity=0.4)
>>> pipe(["cat.jpg", "https://example.org/dog.jpg"], batch_size=2)  # at 0.4
>>> pipe("cat.jpg", capacity=0.2)
```
"""

import os

import PIL.Image
from huggingface_hub.utils import httpx
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline
from transformers.pipelines.video_classification import VideoClassificationPipeline

from .pixels import check_bit_depth
from .video_processing_mone import is_one_video


class CapacityMixin:
    """Adds `capacity` to a stock pipeline class, which follows it among the bases.

    A call's `capacity` wins over the constructor's; with neither (`None`) the model takes `config.capacity`.
    """

    input_axes = 3  # of an image, or a video, as an array

    def __call__(self, inputs, **kwargs):
        if self._takes_capacity() and getattr(inputs, "ndim", 0) == self.input_axes + 1:
            inputs = list(inputs)  # a batch, of which the stock call would return the first result
        # Before the stock call, which draws the first item of a generator or a data set.
        self._check_capacity(kwargs.get("capacity"))
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, capacity=None, **kwargs):
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        if capacity is not None:
            self._check_capacity(capacity)
            forward_params = {**forward_params, "capacity": capacity}
        return preprocess_params, forward_params, postprocess_params

    def _forward(self, model_inputs, capacity=None):
        if self._takes_capacity():
            # Without router outputs, whatever the config says: the stock pipelines cannot split them by image.
            model_inputs = {**model_inputs, "capacity": capacity, "output_router_logits": False}
        return super()._forward(model_inputs)

    def _takes_capacity(self):
        # Not by class: a MoNE model may be wrapped, or come from trust_remote_code.
        return hasattr(self.model.config, "resolve_capacity")

    def _check_capacity(self, capacity):
        if capacity is None:
            return
        if not self._takes_capacity():
            raise TypeError(f"capacity={capacity!r} is for MoNE models only; {type(self.model).__name__} takes none.")
        self.model.config.resolve_capacity(capacity)


class ImageMixin(CapacityMixin):
    """Adds what the stock image pipelines, which make images of more than 8 bits black and white, do not say."""

    def preprocess(self, image, *args, **kwargs):
        if not self._takes_capacity():
            return super().preprocess(image, *args, **kwargs)
        name = image if isinstance(image, str) else "the image"
        name = name if len(name) <= 200 else f"{name[:100]}..."  # base64
        try:
            if isinstance(image, str) and os.path.isfile(image):
                image = PIL.Image.open(image)
            if isinstance(image, PIL.Image.Image):  # of a URL the bits are not known here
                check_bit_depth(image.mode, name)
            return super().preprocess(image, *args, **kwargs)
        except (httpx.HTTPError, OSError, PIL.Image.DecompressionBombError) as error:
            raise ValueError(f"{name}: no image could be loaded from there ({error}).") from error


class MoNEImageClassificationPipeline(ImageMixin, ImageClassificationPipeline):
    """transformers' image-classification pipeline with a `capacity` argument, at construction and per call.

    Args:
        capacity (`float` or sequence of `float`, *optional*, defaults to `model.config.capacity`):
            Share of the dense model's projections to compute, in [1 / 2**(E-1), 1]; or E shares of the tokens,
            smallest expert first, that sum to 1. A call's value wins over the constructor's. `save_pretrained`
            does not keep it: set `model.config.capacity` for that.
        inputs, top_k, function_to_apply, timeout, batch_size and all others:
            As in [`~transformers.ImageClassificationPipeline`].

    Raises:
        ValueError: `capacity` is not allowed, which is raised before any image is loaded; an image with grey levels of
            more than 8 bits, unless it comes by URL or in base64; a file or a URL without an image.
        TypeError: `capacity` for a model that is not MoNE, or an unknown keyword, such as a misspelt one.
    """


class MoNEImageFeatureExtractionPipeline(ImageMixin, ImageFeatureExtractionPipeline):
    """transformers' image-feature-extraction pipeline with a `capacity` argument, at construction and per call.

    Args:
        capacity:
            As in [`MoNEImageClassificationPipeline`].
        inputs, pool, return_tensors, image_processor_kwargs, timeout, batch_size and all others:
            As in [`~transformers.ImageFeatureExtractionPipeline`].

    Raises:
        ValueError: as [`MoNEImageClassificationPipeline`].
        TypeError: `capacity` for a model that is not MoNE, or, for one that is, an unknown keyword.
    """

    # What the stock class takes; it drops all else without a word.
    OPTIONS = ("image_processor_kwargs", "return_tensors", "pool", "timeout")

    def _sanitize_parameters(self, capacity=None, **kwargs):
        unknown = sorted(set(kwargs) - set(self.OPTIONS))
        if unknown and self._takes_capacity():
            raise TypeError(f"Unknown arguments {unknown}; allowed are {['capacity', *self.OPTIONS]}.")
        return super()._sanitize_parameters(capacity, **kwargs)


class MoNEVideoClassificationPipeline(CapacityMixin, VideoClassificationPipeline):
    """transformers' video-classification pipeline with `capacity`, several clips and batches, for MoNE models.

    For a MoNE video model it decodes with the model's own video processor; for every other model it is the stock one.

    Args:
        capacity:
            As in [`MoNEImageClassificationPipeline`].
        inputs (`str`, `bytes`, array, or a list of these):
            Paths, http(s) URLs, the bytes of a file, arrays (frames, height, width, channels), lists of frames. An
            array of five axes is a list of videos.
        num_clips (`int`, *optional*, defaults to the video processor's `clips_to_average`, 8 as in the paper):
            Clips of each video with linearly spaced starts, over whose logits the result is averaged. 1, the middle
            one, takes an eighth of the time; of a video no longer than a clip all are the same.
        frame_sampling_rate (`int`, *optional*, defaults to the video processor's):
            Distance between the frames of a clip.
        num_frames (`int`, *optional*, defaults to `model.config.num_frames`):
            Frames of a clip, of which a MoNE model takes only its own number.
        top_k, function_to_apply, batch_size and all others:
            As in [`~transformers.VideoClassificationPipeline`]. A batch is of videos: `num_clips` times as many clips
            go through the model at once.

    Raises:
        ValueError: `capacity`, an option or a video is not allowed; a file that cannot be decoded is named.
        TypeError: `capacity` or `num_clips` for a model that is not MoNE, or an unknown keyword.
    """

    input_axes = 4

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self._takes_capacity() and self.feature_extractor is None:
            # Where the base class looks for what batches inputs and what to save beside the model.
            self.feature_extractor = self.video_processor

    def __call__(self, inputs=None, **kwargs):
        if self._takes_capacity() and isinstance(inputs, list) and is_one_video(inputs):
            return super().__call__([inputs], **kwargs)[0]  # the stock call takes every list for one of videos
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, num_clips=None, **kwargs):
        preprocess_params, forward_params, postprocess_params = super()._sanitize_parameters(**kwargs)
        if num_clips is not None:
            if not self._takes_capacity():
                raise TypeError(f"num_clips={num_clips!r} is for MoNE models only, not {type(self.model).__name__}.")
            preprocess_params = {**preprocess_params, "num_clips": num_clips}
        return preprocess_params, forward_params, postprocess_params

    def preprocess(self, video, num_clips=None, **options):
        if not self._takes_capacity():
            return super().preprocess(video, **options)
        num_clips = self.video_processor.clips_to_average if num_clips is None else num_clips
        options = {"num_frames": self.model.config.num_frames, **options, "num_clips": num_clips}
        return self.video_processor(video, return_tensors="pt", **options).to(self.dtype)

    def _forward(self, model_inputs, capacity=None):
        pixel_values = model_inputs.get("pixel_values")
        if not self._takes_capacity() or pixel_values.dim() == 5:
            return super()._forward(model_inputs, capacity)
        batch = pixel_values.shape[:2]  # (videos, clips)
        outputs = super()._forward({"pixel_values": pixel_values.flatten(0, 1)}, capacity)
        outputs.logits = outputs.logits.unflatten(0, batch).mean(dim=1)
        return outputs


def register_pipelines() -> None:
    """Make `transformers.pipeline` use these classes. The tasks' default models and Auto classes stay.

    Not `PIPELINE_REGISTRY.register_pipeline`: it warns, and the pipelines' `save_pretrained` would then write
    `custom_pipelines`, with which a folder needs `trust_remote_code` even where this package is imported.
    """
    for task, pipeline_class in {
        "image-classification": MoNEImageClassificationPipeline,
        "image-feature-extraction": MoNEImageFeatureExtractionPipeline,
        "video-classification": MoNEVideoClassificationPipeline,
    }.items():
        PIPELINE_REGISTRY.supported_tasks[task]["impl"] = pipeline_class
