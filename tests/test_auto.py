# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Auto classes: with the package, and through `trust_remote_code` in a process that cannot import it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    ViTImageProcessor,
    ViTImageProcessorPil,
    pipeline,
)
from videos import make

from mone import (
    MoNEConfig,
    MoNEForImageClassification,
    MoNEModel,
    MoNEViViTConfig,
    MoNEViViTForVideoClassification,
    MoNEViViTModel,
    MoNEViViTVideoProcessor,
)


CAPACITIES = [None, 1.0, 0.5, 0.2, (0.1, 0.2, 0.3, 0.4)]
CODE = {
    "capacity.py",
    "checkpoints.py",
    "configuration_mone.py",
    "modeling_mone.py",
    "nested_linear.py",
    "packed_linear.py",
    "routing.py",
    "triton_linear.py",
}
VIDEO_MODEL_CODE = CODE | {"modeling_mone_vivit.py"}
VIDEO_PROCESSOR_CODE = {"pixels.py", "video_decoding.py", "video_processing_mone.py"}
VIDEO_CODE = {
    "video": VIDEO_MODEL_CODE | VIDEO_PROCESSOR_CODE,
    "video_base": VIDEO_MODEL_CODE,
    "video_processor": VIDEO_PROCESSOR_CODE,
}


def make_config():
    return MoNEConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=4,
        router_layers=(0, 2),
        capacity=0.6,
        # Large, so that the outputs of different capacities lie well apart.
        initializer_range=0.3,
        id2label={i: f"class {i}" for i in range(7)},
    )


def make_video_config():
    return MoNEViViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_temporal_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        tubelet_size=(2, 4, 4),
        num_frames=4,
        router_layers=(0, 2),
        capacity=0.6,
        initializer_range=0.3,
        id2label={i: f"class {i}" for i in range(7)},
    )


def make_video_processor():
    # Every number differs from the default.
    return MoNEViViTVideoProcessor(
        num_frames=4, frame_sampling_rate=3, size={"shortest_edge": 36}, crop_size=32, image_mean=[0.4, 0.5, 0.6]
    )


def nonzero_alpha(model):
    # As trained: at the initial alpha of 0 the gates would not show in the outputs.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.7)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For images and for video: a folder with a classifier and its processor, one with a base model, and the inputs.

    For images also a folder that a pipeline wrote, for video one with a processor alone.
    """
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    for name, cls in (("classifier", MoNEForImageClassification), ("base", MoNEModel)):
        nonzero_alpha(cls(make_config())).save_pretrained(root / name)
        processor.save_pretrained(root / name)
    pipeline("image-classification", model=root / "classifier", device="cpu").save_pretrained(root / "pipeline")
    images = [Image.fromarray(image) for image in load_sample_images().images]
    for i, image in enumerate(images):
        image.save(root / f"{i}.png")
    torch.save(processor(images, return_tensors="pt").pixel_values, root / "pixel_values.pt")

    nonzero_alpha(MoNEViViTForVideoClassification(make_video_config())).save_pretrained(root / "video")
    nonzero_alpha(MoNEViViTModel(make_video_config())).save_pretrained(root / "video_base")
    video_processor = make_video_processor()
    for name in ("video", "video_processor"):
        video_processor.save_pretrained(root / name)
    (root / "clip.webm").write_bytes(make(40, "libvpx-vp9", "webm", first=1000))
    torch.save(video_processor(root / "clip.webm", return_tensors="pt").pixel_values, root / "clip.pt")
    return root


@pytest.fixture(scope="module")
def expected(saved):
    """This process's outputs at every capacity."""
    pixel_values, clip = torch.load(saved / "pixel_values.pt"), torch.load(saved / "clip.pt")
    classifier = MoNEForImageClassification.from_pretrained(saved / "classifier")
    video = MoNEViViTForVideoClassification.from_pretrained(saved / "video")
    models = {
        "classifier": (classifier, pixel_values),
        "backbone": (classifier.mone, pixel_values),
        "base": (MoNEModel.from_pretrained(saved / "base"), pixel_values),
        "video": (video, clip),
        "video_backbone": (video.mone_vivit, clip),
        "video_base": (MoNEViViTModel.from_pretrained(saved / "video_base"), clip),
    }
    with torch.no_grad():
        # The first field is the logits, or the last hidden state.
        return {
            name: [model(inputs, capacity=capacity)[0] for capacity in CAPACITIES]
            for name, (model, inputs) in models.items()
        }


def test_the_reference_tells_capacities_apart(expected):
    for outputs in expected.values():
        # The first, None, is the config's 0.6.
        for i, first in enumerate(outputs):
            for second in outputs[:i]:
                assert (first - second).abs().max() > 1e-2


class TestWithThePackage:
    @pytest.fixture(autouse=True)
    def no_prompt(self, monkeypatch):
        def prompt(*args):
            raise AssertionError("a prompt to trust remote code")

        monkeypatch.setattr("builtins.input", prompt)

    def test_auto_map_names_every_class(self, saved):
        for folder in ("classifier", "base", "pipeline"):
            assert json.loads((saved / folder / "config.json").read_text())["auto_map"] == {
                "AutoConfig": "configuration_mone.MoNEConfig",
                "AutoModel": "modeling_mone.MoNEModel",
                "AutoModelForImageClassification": "modeling_mone.MoNEForImageClassification",
            }
            assert {path.name for path in (saved / folder).glob("*.py")} == CODE

    @pytest.mark.parametrize("folder", ["classifier", "base", "pipeline"])
    @pytest.mark.parametrize("trust_remote_code", [None, False, True])
    def test_the_classes_are_the_package_s(self, saved, folder, trust_remote_code):
        for auto, cls in (
            (AutoConfig, MoNEConfig),
            (AutoModel, MoNEModel),
            (AutoModelForImageClassification, MoNEForImageClassification),
            (AutoImageProcessor, ViTImageProcessor),
        ):
            assert type(auto.from_pretrained(saved / folder, trust_remote_code=trust_remote_code)) is cls

    def test_auto_map_names_every_video_class(self, saved):
        for folder in ("video", "video_base"):
            assert json.loads((saved / folder / "config.json").read_text())["auto_map"] == {
                "AutoConfig": "configuration_mone.MoNEViViTConfig",
                "AutoModel": "modeling_mone_vivit.MoNEViViTModel",
                "AutoModelForVideoClassification": "modeling_mone_vivit.MoNEViViTForVideoClassification",
            }
        for folder in ("video", "video_processor"):
            fields = json.loads((saved / folder / "video_preprocessor_config.json").read_text())
            assert fields["auto_map"] == {"AutoVideoProcessor": "video_processing_mone.MoNEViViTVideoProcessor"}
        for folder, code in VIDEO_CODE.items():
            assert {path.name for path in (saved / folder).glob("*.py")} == code

    @pytest.mark.parametrize("trust_remote_code", [None, False, True])
    def test_the_video_classes_are_the_package_s(self, saved, trust_remote_code):
        for auto, cls, folder in (
            (AutoConfig, MoNEViViTConfig, "video"),
            (AutoModel, MoNEViViTModel, "video"),
            (AutoModel, MoNEViViTModel, "video_base"),
            (AutoModelForVideoClassification, MoNEViViTForVideoClassification, "video"),
            (AutoVideoProcessor, MoNEViViTVideoProcessor, "video"),
            (AutoVideoProcessor, MoNEViViTVideoProcessor, "video_processor"),
        ):
            assert type(auto.from_pretrained(saved / folder, trust_remote_code=trust_remote_code)) is cls

    def test_from_config(self):
        assert type(AutoModel.from_config(make_config())) is MoNEModel
        assert type(AutoModelForImageClassification.from_config(make_config())) is MoNEForImageClassification

    def test_from_video_config(self):
        assert type(AutoModel.from_config(make_video_config())) is MoNEViViTModel
        assert (
            type(AutoModelForVideoClassification.from_config(make_video_config())) is MoNEViViTForVideoClassification
        )

    def test_config_round_trip(self, saved):
        config = AutoConfig.from_pretrained(saved / "classifier")
        for name, value in make_config().to_dict().items():
            if name not in ("architectures", "dtype", "auto_map", "_name_or_path", "transformers_version"):
                assert config.to_dict()[name] == value, name

    @torch.no_grad()
    def test_outputs(self, saved, expected):
        pixel_values, clip = torch.load(saved / "pixel_values.pt"), torch.load(saved / "clip.pt")
        models = {
            "classifier": (AutoModelForImageClassification.from_pretrained(saved / "classifier"), pixel_values),
            "backbone": (AutoModel.from_pretrained(saved / "classifier"), pixel_values),
            "base": (AutoModel.from_pretrained(saved / "base"), pixel_values),
            "video": (AutoModelForVideoClassification.from_pretrained(saved / "video"), clip),
            "video_backbone": (AutoModel.from_pretrained(saved / "video"), clip),
            "video_base": (AutoModel.from_pretrained(saved / "video_base"), clip),
        }
        for name, (model, inputs) in models.items():
            for capacity, outputs in zip(CAPACITIES, expected[name], strict=True):
                # The first field is the logits, or the last hidden state.
                torch.testing.assert_close(model(inputs, capacity=capacity)[0], outputs)

    def test_image_processor_that_the_folder_does_not_name(self, saved, tmp_path):
        # Found by the config's class, as registered.
        AutoConfig.from_pretrained(saved / "classifier").save_pretrained(tmp_path)
        path = tmp_path / "preprocessor_config.json"
        fields = json.loads((saved / "classifier" / path.name).read_text())
        del fields["image_processor_type"]
        path.write_text(json.dumps(fields))
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is ViTImageProcessor
        assert type(AutoImageProcessor.from_pretrained(tmp_path, backend="pil")) is ViTImageProcessorPil

    def test_image_processor_keeps_its_fields(self, saved):
        image = Image.open(saved / "0.png")
        processor = AutoImageProcessor.from_pretrained(saved / "classifier")
        pixel_values = processor(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(pixel_values, torch.load(saved / "pixel_values.pt")[:1])


def run_python(code, *args, cwd, **environment):
    """Run `code` in a new process, in another folder and without a network, and return what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=cwd,
        env={**inherited, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout, process.stderr


WITHOUT_THE_PACKAGE = """
import sys
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mone":
            raise ImportError("mone is not installed")

sys.meta_path.insert(0, Block())
try:
    import mone
except ImportError:
    pass
else:
    raise AssertionError("mone is importable")

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

root, folders, out, capacities = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), eval(sys.argv[4])
pixel_values = torch.load(root / "pixel_values.pt")
results = {"classes": [], "infos": []}

def outputs(auto, folder, save_to=None, processor=AutoImageProcessor, pixel_values=pixel_values):
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not model.training
    results["classes"].append((auto.__name__, type(model).__module__, type(model).__name__))
    results["infos"].append({name: sorted(keys) for name, keys in info.items()})
    if save_to:
        model.save_pretrained(save_to)
        if processor is not None:
            processor.from_pretrained(folder, trust_remote_code=True).save_pretrained(save_to)
    with torch.no_grad():
        return [model(pixel_values, capacity=capacity)[0] for capacity in capacities]

results["untrusted"] = []
for auto, name in (
    (AutoModelForImageClassification, "classifier"),
    (AutoModelForVideoClassification, "video"),
    (AutoVideoProcessor, "video_processor"),
):
    try:
        auto.from_pretrained(folders / name)
    except ValueError as error:
        results["untrusted"].append(str(error))

results["classifier"] = outputs(AutoModelForImageClassification, folders / "classifier", out / "classifier")
results["backbone"] = outputs(AutoModel, folders / "classifier")
results["base"] = outputs(AutoModel, folders / "base", out / "base")
results["config"] = AutoConfig.from_pretrained(folders / "base", trust_remote_code=True).to_dict()
results["processor"] = type(AutoImageProcessor.from_pretrained(folders / "classifier")).__name__

pipe = pipeline("image-classification", model=str(folders / "pipeline"), trust_remote_code=True, device="cpu")
results["pipeline_class"] = type(pipe).__module__
results["pipeline"] = pipe([str(root / f"{i}.png") for i in range(len(pixel_values))], batch_size=2, top_k=7)
pipe.save_pretrained(out / "pipeline")

processors = [
    AutoVideoProcessor.from_pretrained(folders / name, trust_remote_code=True) for name in ("video_processor", "video")
]
processors[0].save_pretrained(out / "video_processor")
results["video_processors"] = [(type(processor).__module__, processor.to_dict()) for processor in processors]
results["clips"] = [processor(root / "clip.webm", return_tensors="pt").pixel_values for processor in processors]
clip, video, base = results["clips"][0], folders / "video", folders / "video_base"
results["video"] = outputs(AutoModelForVideoClassification, video, out / "video", AutoVideoProcessor, clip)
results["video_backbone"] = outputs(AutoModel, video, pixel_values=clip)
results["video_base"] = outputs(AutoModel, base, out / "video_base", None, clip)
results["video_config"] = AutoConfig.from_pretrained(base, trust_remote_code=True).to_dict()
pipe = pipeline("video-classification", model=str(video), trust_remote_code=True, device="cpu")
results["video_pipeline_class"] = type(pipe).__module__
results["video_pipeline"] = pipe(str(root / "clip.webm"), top_k=7)

results["mone_modules"] = [name for name in sys.modules if name.partition(".")[0] == "mone"]
torch.save(results, out / "results.pt")
"""


def without_the_package(saved, folders, tmp_path):
    tmp_path.mkdir()
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run_python(WITHOUT_THE_PACKAGE, saved, folders, tmp_path, repr(CAPACITIES), cwd=tmp_path, **environment)
    return torch.load(tmp_path / "results.pt")


@pytest.fixture(scope="module")
def processes(saved, tmp_path_factory):
    """Results of two processes without the package; the second loads what the first saved. And what that saved."""
    root = tmp_path_factory.mktemp("processes")
    first = without_the_package(saved, saved, root / "first")
    second = without_the_package(saved, root / "first", root / "second")
    return {"first": first, "second": second}, root


@pytest.fixture(params=["first", "second"])
def results(request, processes):
    return processes[0][request.param]


class TestWithoutThePackage:
    def test_the_code_comes_from_the_folder(self, results):
        assert results["mone_modules"] == []
        names = [(auto, name) for auto, _, name in results["classes"]]
        assert names == [
            ("AutoModelForImageClassification", "MoNEForImageClassification"),
            ("AutoModel", "MoNEModel"),
            ("AutoModel", "MoNEModel"),
            ("AutoModelForVideoClassification", "MoNEViViTForVideoClassification"),
            ("AutoModel", "MoNEViViTModel"),
            ("AutoModel", "MoNEViViTModel"),
        ]
        for _, module, name in results["classes"]:
            file = ".modeling_mone_vivit" if "ViViT" in name else ".modeling_mone"
            assert module.startswith("transformers_modules.") and module.endswith(file)
        for module, _ in results["video_processors"]:
            assert module.startswith("transformers_modules.") and module.endswith(".video_processing_mone")

    def test_it_has_to_be_trusted(self, results):
        for error in results["untrusted"]:
            assert "trust_remote_code=True" in error
        assert len(results["untrusted"]) == 3

    @pytest.mark.parametrize("name", ["classifier", "backbone", "base", "video", "video_backbone", "video_base"])
    def test_outputs(self, results, expected, name):
        for here, there in zip(expected[name], results[name], strict=True):
            torch.testing.assert_close(there, here)

    def test_every_weight_has_its_place(self, results):
        for classifier, backbone, base in (results["infos"][:3], results["infos"][3:]):
            for info in (classifier, base):
                assert not any(info.values())
            assert backbone.pop("unexpected_keys") == ["classifier.bias", "classifier.weight"]
            assert not any(backbone.values())

    def test_config(self, results):
        for config, loaded in ((make_config(), "config"), (make_video_config(), "video_config")):
            for name, value in config.to_dict().items():
                if name not in ("architectures", "dtype", "auto_map", "_name_or_path", "transformers_version"):
                    assert results[loaded][name] == value, name

    def test_image_processor(self, results):
        assert results["processor"] == "ViTImageProcessor"

    def test_video_processor(self, saved, results):
        clip, options = torch.load(saved / "clip.pt"), make_video_processor().to_dict()
        assert clip.shape == (1, 4, 3, 32, 32)
        for there, (_, fields) in zip(results["clips"], results["video_processors"], strict=True):
            assert torch.equal(there, clip)
            assert {name: fields[name] for name in options} == options
        assert len(results["clips"]) == 2  # by itself, and beside the model

    def test_stock_pipeline_at_the_config_s_capacity(self, results, expected):
        assert results["pipeline_class"] == "transformers.pipelines.image_classification"
        for output, logits in zip(results["pipeline"], expected["classifier"][0], strict=True):
            best = logits.softmax(-1).topk(7)
            assert [entry["label"] for entry in output] == [f"class {i}" for i in best.indices]
            np.testing.assert_allclose([entry["score"] for entry in output], best.values, rtol=1e-4, atol=1e-6)

    def test_stock_video_pipeline_at_the_config_s_capacity(self, results, expected):
        assert results["video_pipeline_class"] == "transformers.pipelines.video_classification"
        best = expected["video"][0][0].softmax(-1).topk(7)
        assert [entry["label"] for entry in results["video_pipeline"]] == [f"class {i}" for i in best.indices]
        scores = [entry["score"] for entry in results["video_pipeline"]]
        np.testing.assert_allclose(scores, best.values, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("run", ["first", "second"])
    def test_what_it_saved_loads_with_the_package(self, saved, processes, expected, run):
        folder = processes[1] / run
        for name in ("classifier", "base", "pipeline"):
            config, original = (json.loads((root / name / "config.json").read_text()) for root in (folder, saved))
            assert config == original
            assert {path.name for path in (folder / name).glob("*.py")} == CODE
        pixel_values = torch.load(saved / "pixel_values.pt")
        model = AutoModelForImageClassification.from_pretrained(folder / "classifier")
        assert type(model) is MoNEForImageClassification
        with torch.no_grad():
            for capacity, logits in zip(CAPACITIES, expected["classifier"], strict=True):
                torch.testing.assert_close(model(pixel_values, capacity=capacity).logits, logits)
        pipe = pipeline("image-classification", model=str(folder / "pipeline"), capacity=0.5, device="cpu", top_k=1)
        labels = [output[0]["label"] for output in pipe([str(saved / "0.png"), str(saved / "1.png")])]
        assert labels == [f"class {i}" for i in expected["classifier"][CAPACITIES.index(0.5)].argmax(-1)]

    @pytest.mark.parametrize("run", ["first", "second"])
    def test_the_video_model_it_saved_loads_with_the_package(self, saved, processes, expected, run):
        folder = processes[1] / run
        for name, code in VIDEO_CODE.items():
            assert {path.name for path in (folder / name).glob("*.py")} == code
            for file in ("config.json", "video_preprocessor_config.json"):
                assert (folder / name / file).exists() == (saved / name / file).exists()
                if (saved / name / file).exists():
                    written, original = (json.loads((root / name / file).read_text()) for root in (folder, saved))
                    assert written == original
        model = AutoModelForVideoClassification.from_pretrained(folder / "video")
        base = AutoModel.from_pretrained(folder / "video_base")
        assert type(model) is MoNEViViTForVideoClassification and type(base) is MoNEViViTModel
        for name in ("video", "video_processor"):
            processor = AutoVideoProcessor.from_pretrained(folder / name)
            assert type(processor) is MoNEViViTVideoProcessor
            clip = processor(saved / "clip.webm", return_tensors="pt").pixel_values
            assert torch.equal(clip, torch.load(saved / "clip.pt"))
        with torch.no_grad():
            for i, capacity in enumerate(CAPACITIES):
                torch.testing.assert_close(model(clip, capacity=capacity).logits, expected["video"][i])
                hidden = base(clip, capacity=capacity).last_hidden_state
                torch.testing.assert_close(hidden, expected["video_base"][i])
        pipe = pipeline("video-classification", model=str(folder / "video"), capacity=0.5, device="cpu", top_k=1)
        best = expected["video"][CAPACITIES.index(0.5)].argmax()
        assert pipe(str(saved / "clip.webm"), num_clips=1)[0]["label"] == f"class {best}"


def test_import_is_silent_and_idempotent(saved, tmp_path):
    code = """
import importlib, sys
import mone
importlib.reload(mone)
for name in [name for name in sys.modules if name.partition(".")[0] == "mone"]:
    del sys.modules[name]
import mone
from mone.pipelines import MoNEImageClassificationPipeline as Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.image_classification import ImageClassificationPipeline as Stock
assert PIPELINE_REGISTRY.supported_tasks["image-classification"]["impl"] is Pipeline
assert Pipeline.__bases__[1] is Stock
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
assert type(model) is mone.MoNEForImageClassification
"""
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    assert run_python(code, saved / "classifier", cwd=tmp_path, **environment) == ("", "")
