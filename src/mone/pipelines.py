# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Image-classification pipeline that takes `capacity`.

`import mone` puts it in the place of transformers' own for this process. For every other model it is the stock one.

```python
>>> import mone
>>> from transformers import pipeline

>>> pipe = pipeline("image-classification", model=folder, capacity=0.4)
>>> pipe(["cat.jpg", "https://example.org/dog.jpg"], batch_size=2)  # at 0.4
>>> pipe("cat.jpg", capacity=0.2)
```
"""

from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.image_classification import ImageClassificationPipeline


class CapacityMixin:
    """Adds `capacity` to a stock pipeline class, which follows it among the bases.

    A call's `capacity` wins over the constructor's; with neither (`None`) the model takes `config.capacity`.
    """

    def __call__(self, inputs, **kwargs):
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


class MoNEImageClassificationPipeline(CapacityMixin, ImageClassificationPipeline):
    """transformers' image-classification pipeline with a `capacity` argument, at construction and per call.

    Args:
        capacity (`float` or sequence of `float`, *optional*, defaults to `model.config.capacity`):
            Share of the dense model's projections to compute, in [1 / 2**(E-1), 1]; or E shares of the tokens,
            smallest expert first, that sum to 1. A call's value wins over the constructor's. `save_pretrained`
            does not keep it: set `model.config.capacity` for that.
        inputs, top_k, function_to_apply, timeout, batch_size and all others:
            As in [`~transformers.ImageClassificationPipeline`].

    Raises:
        ValueError: `capacity` is not allowed. Raised before any image is loaded.
        TypeError: `capacity` for a model that is not MoNE, or an unknown keyword, such as a misspelt one.
    """


def register_pipelines() -> None:
    """Make `transformers.pipeline` use these classes. The tasks' default models and Auto classes stay.

    Not `PIPELINE_REGISTRY.register_pipeline`: it warns, and the pipelines' `save_pretrained` would then write
    `custom_pipelines`, with which a folder needs `trust_remote_code` even where this package is imported.
    """
    PIPELINE_REGISTRY.supported_tasks["image-classification"]["impl"] = MoNEImageClassificationPipeline
