# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""The image pipelines: `capacity`, and the stock behaviour for everything else.

The models are random: this does not test that classes are right, only that they are those of the model itself.
"""

import base64
import functools
import http.server
import json
import math
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY, check_task
from transformers.pipelines.image_classification import ImageClassificationPipeline
from transformers.pipelines.image_feature_extraction import ImageFeatureExtractionPipeline
from transformers.pipelines.pt_utils import KeyDataset

from mone import MoNEConfig, MoNEForImageClassification
from mone.pipelines import MoNEImageClassificationPipeline


TASK = "image-classification"
NUM_LABELS = 7
# A pipeline would take the first accelerator it finds; the expected values are computed on the CPU.
make_pipeline = functools.partial(pipeline, TASK, device="cpu")
BAD_CAPACITIES = [1.2, 0.1, -0.5, math.nan, True, "high", [0.5, 0.5], [0.5, 0.5, 0.5, 0.5], [], {"a": 1}]


@pytest.fixture(scope="module")
def images():
    """Two photographs and four handwritten digits, the latter in grey levels."""
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    digits = [Image.fromarray((image * 15).astype(np.uint8)).resize((40, 40)) for image in load_digits().images[:4]]
    return photographs + digits


@pytest.fixture(scope="module")
def image_folder(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def paths(images, image_folder):
    return [str(image_folder / f"{i}.png") for i in range(len(images))]


@pytest.fixture
def urls(images, image_folder, monkeypatch):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=image_folder))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield [f"http://127.0.0.1:{server.server_port}/{i}.png" for i in range(len(images))]
    server.shutdown()
    server.server_close()


def save(model, folder):
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,
    # Large, so that the classes' scores, and those of different capacities, lie well apart.
    "initializer_range": 0.3,
    "id2label": {i: f"class {i}" for i in range(NUM_LABELS)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return save(MoNEForImageClassification(MoNEConfig(**SIZES, capacity=0.6)), tmp_path_factory.mktemp("mone"))


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    torch.manual_seed(0)
    return save(ViTForImageClassification(ViTConfig(**SIZES)), tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def logits(folder, images):
    """A function: capacity -> logits of every image, from a direct call of the model, one image at a time."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = ViTImageProcessor.from_pretrained(folder)
    inputs = [processor(image.convert("RGB"), return_tensors="pt").pixel_values for image in images]

    @functools.cache
    @torch.no_grad()
    def at(capacity=None):
        return torch.cat([model(pixel_values, capacity=capacity).logits for pixel_values in inputs])

    return at


def assert_scores(outputs, expected):
    """A pipeline's outputs for several images against (images, classes) scores."""
    assert len(outputs) == len(expected)
    for output, scores in zip(outputs, expected, strict=True):
        best = scores.topk(len(output))
        assert [entry["label"] for entry in output] == [f"class {i}" for i in best.indices]
        torch.testing.assert_close(torch.tensor([entry["score"] for entry in output]), best.values)


class TestCapacity:
    def test_the_reference_tells_capacities_apart(self, logits):
        probabilities = [logits(capacity).softmax(-1) for capacity in (None, 0.3, 0.4, 1.0, (0.0, 0.0, 1.0, 0.0))]
        for i, first in enumerate(probabilities):
            for second in probabilities[:i]:
                assert (first - second).abs().amax(-1).min() > 1e-3

    @pytest.mark.parametrize("at_construction", [None, 0.4])
    @pytest.mark.parametrize("at_call", [None, 0.3, 1.0, (0.0, 0.0, 1.0, 0.0)])
    def test_call_beats_construction_beats_config(self, folder, images, logits, at_construction, at_call):
        pipe = make_pipeline(model=folder, capacity=at_construction)
        used = at_construction if at_call is None else at_call
        assert_scores(pipe(images, capacity=at_call), logits(used).softmax(-1))
        # The call's capacity was for that call.
        assert_scores(pipe(images), logits(at_construction).softmax(-1))

    def test_not_given_is_the_config(self, folder, images, logits):
        torch.testing.assert_close(logits(None), logits(0.6))
        assert_scores(make_pipeline(model=folder)(images), logits(0.6).softmax(-1))

    @pytest.mark.parametrize("capacity", [[0.1, 0.2, 0.3, 0.4], np.array([0.1, 0.2, 0.3, 0.4]), np.float32(0.5), 1])
    def test_every_form_the_model_takes(self, folder, images, logits, capacity):
        key = tuple(capacity) if isinstance(capacity, (list, np.ndarray)) else capacity
        assert_scores(make_pipeline(model=folder)(images, capacity=capacity), logits(key).softmax(-1))

    def test_loaded_model(self, folder, images, logits):
        model = MoNEForImageClassification.from_pretrained(folder)
        pipe = make_pipeline(model=model, image_processor=ViTImageProcessor.from_pretrained(folder), capacity=0.4)
        assert_scores(pipe(images), logits(0.4).softmax(-1))

    def test_bfloat16(self, folder, images):
        pipe = make_pipeline(model=folder, dtype=torch.bfloat16, capacity=0.4)
        assert pipe.dtype == torch.bfloat16
        model = MoNEForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
        pixel_values = ViTImageProcessor.from_pretrained(folder)(images[0], return_tensors="pt").pixel_values
        with torch.no_grad():
            expected = model(pixel_values.bfloat16(), capacity=0.3).logits
        assert expected.dtype == torch.bfloat16
        # In bfloat16 scores may tie, so that only their values are in a certain order.
        scores = torch.tensor([entry["score"] for entry in pipe(images[0], capacity=0.3, top_k=NUM_LABELS)])
        torch.testing.assert_close(scores, expected.float().softmax(-1)[0].sort(descending=True).values)


class TestInputs:
    @pytest.fixture
    def pipe(self, folder):
        return make_pipeline(model=folder, capacity=0.4)

    def test_single_path_url_and_image(self, pipe, images, paths, urls, logits):
        expected = logits(0.3).softmax(-1)
        for i in range(len(images)):
            singles = [pipe(image, capacity=0.3) for image in (paths[i], urls[i], images[i])]
            assert_scores(singles, expected[i].expand(3, -1))

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_lists(self, pipe, images, paths, urls, logits, batch_size):
        expected = logits(0.3).softmax(-1)
        for inputs in (paths, urls, images, [paths[0], urls[1], *images[2:]]):
            outputs = pipe(inputs, capacity=0.3, batch_size=batch_size)
            assert isinstance(outputs, list)
            assert_scores(outputs, expected)

    def test_batch_size_at_construction(self, folder, paths, logits):
        pipe = make_pipeline(model=folder, capacity=0.4, batch_size=4)
        assert_scores(pipe(paths), logits(0.4).softmax(-1))

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_generator(self, pipe, images, logits, batch_size):
        outputs = pipe((image for image in images), capacity=0.3, batch_size=batch_size)
        assert_scores(list(outputs), logits(0.3).softmax(-1))

    def test_generator_is_consumed_on_demand(self, pipe, images):
        drawn = []
        outputs = iter(pipe((drawn.append(i) or image for i, image in enumerate(images)), capacity=0.3))
        next(outputs)
        assert len(drawn) < len(images)

    @pytest.mark.parametrize("batch_size", [1, 4])
    def test_dataset(self, pipe, images, logits, batch_size):
        dataset = KeyDataset([{"image": image} for image in images], "image")
        outputs = pipe(dataset, capacity=0.3, batch_size=batch_size)
        assert_scores(list(outputs), logits(0.3).softmax(-1))

    def test_batches_of_a_model_with_router_outputs(self, pipe, images, logits):
        pipe.model.config.output_router_logits = True
        assert_scores(pipe(images, batch_size=4), logits(0.4).softmax(-1))


class TestStockOptions:
    @pytest.mark.parametrize("top_k", [1, 3, NUM_LABELS, 100])
    def test_top_k(self, folder, images, logits, top_k):
        expected = logits(0.4).softmax(-1)
        at_call = make_pipeline(model=folder)(images, capacity=0.4, top_k=top_k)
        at_construction = make_pipeline(model=folder, capacity=0.4, top_k=top_k)(images)
        assert at_call == at_construction
        assert {len(output) for output in at_call} == {min(top_k, NUM_LABELS)}
        assert_scores(at_call, expected)

    def test_top_k_default(self, folder, images):
        assert len(make_pipeline(model=folder)(images[0], capacity=0.4)) == 5

    @pytest.mark.parametrize(
        ("name", "function"), [("softmax", lambda x: x.softmax(-1)), ("sigmoid", torch.sigmoid), ("none", lambda x: x)]
    )
    def test_function_to_apply(self, folder, images, logits, name, function):
        pipe = make_pipeline(model=folder, capacity=0.4)
        assert_scores(pipe(images, function_to_apply=name, top_k=NUM_LABELS), function(logits(0.4)))

    def test_function_of_the_problem_type(self, folder, images, logits):
        pipe = make_pipeline(model=folder, capacity=0.4)
        pipe.model.config.problem_type = "multi_label_classification"
        assert_scores(pipe(images), logits(0.4).sigmoid())

    def test_timeout(self, folder, urls, logits):
        pipe = make_pipeline(model=folder)
        assert_scores([pipe(urls[0], capacity=0.4, timeout=30)], logits(0.4)[:1].softmax(-1))


class TestErrors:
    @pytest.mark.parametrize("task", ["image-classification", "image-feature-extraction"])
    def test_more_grey_levels_than_bytes_hold_are_refused(self, folder, tmp_path, task):
        """transformers' own loading makes them black and white."""
        image = Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)
        image.save(tmp_path / "deep.png")
        pipe = pipeline(task, model=folder, device="cpu")
        for item, name in ((image, "the image"), (str(tmp_path / "deep.png"), "deep.png")):
            with pytest.raises(ValueError, match=rf"{name} has mode 'I;16', grey levels of more than 8 bits"):
                pipe(item)

    @pytest.mark.parametrize("size", [8, 1000])
    def test_a_file_without_a_whole_image_is_named(self, folder, images, tmp_path, size):
        images[0].resize((200, 200)).save(tmp_path / "whole.png")
        data = (tmp_path / "whole.png").read_bytes()[:size]
        (tmp_path / "broken.png").write_bytes(data)
        pipe = make_pipeline(model=folder)
        with pytest.raises(ValueError, match=r"broken\.png: no image could be loaded from there"):
            pipe([images[0], str(tmp_path / "broken.png")], batch_size=2)
        if size > 8:  # or transformers' own error comes first
            with pytest.raises(ValueError, match=r"^\S{100}\.\.\.: no image could be loaded from there"):
                pipe(base64.b64encode(data).decode())

    def test_a_url_without_an_image_is_named(self, folder, images, urls):
        """Among others in a batch, whose own errors do not say which one it was."""
        missing, closed = urls[0].replace("/0.png", "/no.png"), "http://127.0.0.1:1/0.png"
        pipe = make_pipeline(model=folder)
        for url in (missing, closed):
            with pytest.raises(ValueError, match=f"{url}: no image could be loaded from there"):
                pipe([images[0], url], batch_size=2)

    @pytest.mark.parametrize("capacity", BAD_CAPACITIES)
    def test_bad_capacity_at_construction(self, folder, capacity):
        with pytest.raises(ValueError, match=r"capacity=.* Allowed are .* in \[0\.125, 1\]"):
            make_pipeline(model=folder, capacity=capacity)

    @pytest.mark.parametrize("capacity", BAD_CAPACITIES)
    def test_bad_capacity_at_a_call_is_found_before_any_image_is_loaded(self, folder, capacity):
        class Images(torch.utils.data.Dataset):
            def __len__(self):
                return 3

            def __getitem__(self, i):
                raise AssertionError("an image was loaded")

        pipe = make_pipeline(model=folder)
        generator = (Images()[i] for i in range(3))
        for inputs in (
            "missing.png",
            ["missing.png"],
            "http://127.0.0.1:9/",
            KeyDataset(Images(), "image"),
            generator,
        ):
            with pytest.raises(ValueError, match=r"capacity=.* Allowed are .* in \[0\.125, 1\]"):
                pipe(inputs, capacity=capacity)

    def test_the_capacity_range_is_the_config_s(self, tmp_path, images):
        folder = save(MoNEForImageClassification(MoNEConfig(**SIZES, num_experts=2)), tmp_path)
        with pytest.raises(ValueError, match=r"capacity=0\.4 is out of range.*\[0\.5, 1\]"):
            make_pipeline(model=folder, capacity=0.4)
        assert len(make_pipeline(model=folder, capacity=[0.5, 0.5])(images)) == len(images)

    def test_misspelt_keyword(self, folder, images):
        with pytest.raises(TypeError, match="unexpected keyword argument 'capasity'"):
            make_pipeline(model=folder, capasity=0.4)
        pipe = make_pipeline(model=folder)
        with pytest.raises(TypeError, match="unexpected keyword argument 'capasity'"):
            pipe(images, capasity=0.4)

    def test_no_inputs(self, folder):
        pipe = make_pipeline(model=folder)
        with pytest.raises(ValueError, match="without an inputs argument"):
            pipe(None, capacity=0.4)
        with pytest.raises(TypeError, match="inputs"):
            pipe(capacity=0.4)


class TestOtherModels:
    def test_the_tasks_entry_keeps_all_but_the_class(self):
        _, entry, _ = check_task(TASK)
        assert entry == {
            "impl": MoNEImageClassificationPipeline,
            "pt": (AutoModelForImageClassification,),
            "default": {"model": ("google/vit-base-patch16-224", entry["default"]["model"][1])},
            "type": "image",
        }
        assert PIPELINE_REGISTRY.supported_tasks[TASK] is entry

    def test_same_attributes_as_the_stock_class(self):
        for name in ("_load_processor", "_load_image_processor", "_load_feature_extractor", "_load_tokenizer"):
            assert getattr(MoNEImageClassificationPipeline, name) is getattr(ImageClassificationPipeline, name)
        assert not hasattr(MoNEImageClassificationPipeline, "_registered_impl")

    @pytest.mark.parametrize(
        "kwargs",
        [{}, {"top_k": 2}, {"function_to_apply": "sigmoid"}, {"batch_size": 4}, {"timeout": 30}, {"capacity": None}],
    )
    def test_same_outputs_as_the_stock_pipeline(self, vit_folder, images, paths, kwargs):
        stock = ImageClassificationPipeline(
            model=ViTForImageClassification.from_pretrained(vit_folder),
            image_processor=ViTImageProcessor.from_pretrained(vit_folder),
            task=TASK,
            device="cpu",
        )
        expected = stock(images, **{name: value for name, value in kwargs.items() if name != "capacity"})
        pipe = make_pipeline(model=vit_folder)
        assert isinstance(pipe, ImageClassificationPipeline)
        assert pipe(images, **kwargs) == expected
        assert pipe(paths, **kwargs) == expected
        assert list(pipe((image for image in images), **kwargs)) == expected
        assert make_pipeline(model=vit_folder, **kwargs)(images) == expected

    def test_capacity_is_refused(self, vit_folder, images):
        message = r"capacity=0\.4 is for MoNE models only; ViTForImageClassification takes none\."
        with pytest.raises(TypeError, match=message):
            make_pipeline(model=vit_folder, capacity=0.4)
        pipe = make_pipeline(model=vit_folder)
        with pytest.raises(TypeError, match=message):
            pipe(images, capacity=0.4)
        with pytest.raises(TypeError, match=message):
            pipe("missing.png", capacity=0.4)

    def test_misspelt_keyword(self, vit_folder, images):
        with pytest.raises(TypeError, match="unexpected keyword argument 'topk'"):
            make_pipeline(model=vit_folder, topk=1)
        pipe = make_pipeline(model=vit_folder)
        with pytest.raises(TypeError, match="unexpected keyword argument 'topk'"):
            pipe(images, topk=1)

    def test_the_log_names_unsupported_models_only(self, folder, vit_folder, monkeypatch):
        errors = []
        monkeypatch.setattr("transformers.pipelines.base.logger.error", errors.append)
        make_pipeline(model=folder)
        make_pipeline(model=vit_folder)
        assert errors == []
        processor = ViTImageProcessor.from_pretrained(vit_folder)
        make_pipeline(model=ViTModel.from_pretrained(vit_folder), image_processor=processor)
        assert len(errors) == 1 and "'ViTModel' is not supported for image-classification" in errors[0]


class TestSaving:
    def test_saved_pipeline(self, folder, images, logits, tmp_path):
        make_pipeline(model=folder, capacity=0.4).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert "custom_pipelines" not in config
        assert not (tmp_path / "pipelines.py").exists()
        # The capacity of a pipeline is not the model's.
        assert config["capacity"] == 0.6
        assert_scores(make_pipeline(model=str(tmp_path))(images), logits(0.6).softmax(-1))
        assert_scores(make_pipeline(model=str(tmp_path), capacity=0.4)(images), logits(0.4).softmax(-1))

    def test_saved_pipeline_of_another_model(self, vit_folder, images, tmp_path):
        pipe = make_pipeline(model=vit_folder)
        pipe.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert "custom_pipelines" not in config and "auto_map" not in config
        assert make_pipeline(model=str(tmp_path))(images) == pipe(images)


class TestFeatures:
    """The image-feature-extraction pipeline."""

    def test_features_are_the_model_s(self, folder, images):
        pipe = pipeline("image-feature-extraction", model=folder, device="cpu", capacity=0.4)
        model, processor = AutoModel.from_pretrained(folder), ViTImageProcessor.from_pretrained(folder)
        for used, options in ((0.4, {}), (0.3, {"capacity": 0.3}), (1.0, {"capacity": 1.0, "batch_size": 4})):
            tokens, pooled = (pipe(images, return_tensors=True, pool=pool, **options) for pool in (False, True))
            for i, image in enumerate(images):
                with torch.no_grad():
                    outputs = model(processor(image.convert("RGB"), return_tensors="pt").pixel_values, capacity=used)
                torch.testing.assert_close(tokens[i], outputs.last_hidden_state)
                torch.testing.assert_close(pooled[i], outputs.pooler_output)

    def test_errors_come_before_the_image_is_loaded(self, folder):
        pipe = pipeline("image-feature-extraction", model=folder, device="cpu")
        with pytest.raises(ValueError, match=r"capacity=1\.2 .*Allowed are"):
            pipe("missing.png", capacity=1.2)
        with pytest.raises(TypeError, match=r"\['capasity'\]; allowed are \['capacity'"):
            pipe("missing.png", capasity=0.4)

    def test_other_models(self, vit_folder, images):
        pipe = pipeline("image-feature-extraction", model=vit_folder, device="cpu")
        stock = ImageFeatureExtractionPipeline(
            model=ViTModel.from_pretrained(vit_folder),
            image_processor=ViTImageProcessor.from_pretrained(vit_folder),
            task="image-feature-extraction",
            device="cpu",
        )
        assert pipe(images, batch_size=4, ignored=1) == stock(images)
        with pytest.raises(TypeError, match="ViTModel takes none"):
            pipe(images, capacity=0.4)
