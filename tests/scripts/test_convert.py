# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""scripts/convert.py as a user runs it."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTImageProcessor,
    pipeline,
)

from mone import MoNEForImageClassification, MoNEModel
from mone.configuration_mone import as_pair


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "conversion"))

import convert
from test_scenic import flat, video_params


@pytest.fixture
def dinov2(tmp_path):
    """A DINOv2 classifier, whose processor makes smaller images than its positions are for."""
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        id2label={0: "cat", 1: "dog", 2: "emu"},
        label2id={"cat": 0, "dog": 1, "emu": 2},
    )
    torch.manual_seed(0)
    model = Dinov2ForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "dinov2")
    ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(
        tmp_path / "dinov2"
    )
    return tmp_path / "dinov2"


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8))


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_folder_classifies_as_the_source_does(tmp_path, dinov2, image, calibrated):
    options = []
    if calibrated:
        (tmp_path / "photos" / "deep").mkdir(parents=True)
        image.save(tmp_path / "photos" / "deep" / "one.PNG")
        options = ["--calibrate", str(tmp_path / "photos")]
    convert.main([str(dinov2), str(tmp_path / "new" / "mone"), *options, "--config_overrides", "num_experts=3"])
    pixel_values = AutoImageProcessor.from_pretrained(dinov2)(image, return_tensors="pt").pixel_values
    folder = tmp_path / "new" / "mone"
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert isinstance(model, MoNEForImageClassification) and model.config.num_experts == 3
    source = Dinov2ForImageClassification.from_pretrained(dinov2)
    weight = source.dinov2.embeddings.patch_embeddings.projection.weight
    assert torch.equal(model.mone.embeddings.patch_embeddings.projection.weight, weight) != calibrated
    with torch.no_grad():
        expected = source(pixel_values).logits
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=0)
    scores = {row["label"]: row["score"] for row in pipeline("image-classification", str(folder))(image)}
    for label, score in zip(["cat", "dog", "emu"], expected.softmax(-1)[0].tolist(), strict=True):
        assert scores[label] == pytest.approx(score, abs=1e-5)
    assert (folder / "modeling_mone.py").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mone"]


def test_to_video(tmp_path, dinov2):
    """From a ViT and from the MoNE made of it: the same spatial encoder."""
    backbone = tmp_path / "backbone"
    Dinov2Model.from_pretrained(dinov2).save_pretrained(backbone)
    shutil.copy(dinov2 / "preprocessor_config.json", backbone)
    convert.main([str(backbone), str(tmp_path / "mone")])
    options = ["--video", "--config_overrides", "num_frames=4,image_size=16", "--num_labels", "5"]
    convert.main([str(backbone), str(tmp_path / "one"), *options])
    convert.main([str(tmp_path / "mone"), str(tmp_path / "two"), *options])
    one, two = (AutoModelForVideoClassification.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert (one.config.num_labels, one.config.num_frames, one.config.image_size) == (5, 4, 16)
    image_model = MoNEModel.from_pretrained(tmp_path / "mone")
    for model in (one, two):
        for key, value in image_model.layers.state_dict().items():
            assert torch.equal(model.mone_vivit.spatial.layers.state_dict()[key], value)
    processor = AutoVideoProcessor.from_pretrained(tmp_path / "one")
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and processor.num_frames == 4
    with pytest.raises(ValueError, match="'mone_vivit' model cannot become a MoNE"):
        convert.main([str(tmp_path / "one"), str(tmp_path / "three"), "--video"])


def test_to_video_from_weights_that_do_not_show_the_heads(tmp_path, dinov2):
    """Both models get what is said of them."""
    options = ["--video", "--config_overrides", "num_frames=4,num_attention_heads=4,layer_norm_eps=1e-3"]
    vit = Dinov2Model.from_pretrained(dinov2, layer_norm_eps=1e-3)
    assert vit.config.num_attention_heads == 4
    torch.save(vit.state_dict(), tmp_path / "vit.bin")
    vit.save_pretrained(tmp_path / "vit")
    convert.main([str(tmp_path / "vit.bin"), str(tmp_path / "one"), *options])
    convert.main([str(tmp_path / "vit"), str(tmp_path / "two"), "--video", "--config_overrides", "num_frames=4"])
    one, two = (AutoModelForVideoClassification.from_pretrained(tmp_path / name) for name in ("one", "two"))
    assert (one.config.num_attention_heads, one.config.layer_norm_eps) == (4, 1e-3)
    two.mone_vivit.temporal.load_state_dict(one.mone_vivit.temporal.state_dict())  # new in each
    two.mone_vivit.spatial.routers.load_state_dict(one.mone_vivit.spatial.routers.state_dict())
    clips = torch.randn(2, 4, 3, *as_pair(one.config.image_size))
    with torch.no_grad():
        one, two = (model.mone_vivit(clips).last_hidden_state for model in (one, two))
    torch.testing.assert_close(one, two)


def test_a_video_model_for_other_clips_and_labels(tmp_path, dinov2, image):
    Dinov2Model.from_pretrained(dinov2).save_pretrained(tmp_path / "vit")
    options = ["--video", "--config_overrides", "num_frames=4", "--num_labels", "5"]
    convert.main([str(tmp_path / "vit"), str(tmp_path / "video"), *options])
    options = ["--config_overrides", "num_frames=8,image_size=16", "--num_labels", "3"]
    convert.main([str(tmp_path / "video"), str(tmp_path / "longer"), *options])
    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "longer")
    assert (model.config.num_frames, model.config.image_size, model.config.num_labels) == (8, 16, 3)
    processor = AutoVideoProcessor.from_pretrained(tmp_path / "longer")
    assert (processor.num_frames, dict(processor.crop_size)["height"]) == (8, 16)
    image.save(tmp_path / "photo.png")
    with pytest.raises(TypeError, match="is no image model: calibrate one"):
        convert.main([str(tmp_path / "video"), str(tmp_path / "fitted"), "--calibrate", str(tmp_path)])


def test_a_vivit_for_other_clips(tmp_path):
    np.savez(tmp_path / "vivit.npz", **flat(video_params(True)))
    options = ["--config_overrides", "num_frames=16,image_size=48", "--num_labels", "9"]
    convert.main([str(tmp_path / "vivit.npz"), str(tmp_path / "video"), *options])
    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "video")
    assert (model.config.num_frames, model.config.image_size, model.config.num_labels) == (16, 48, 9)
    assert AutoVideoProcessor.from_pretrained(tmp_path / "video").num_frames == 16
    with pytest.raises(ValueError, match=r"vivit\.npz is a video model already: leave out --video"):
        convert.main([str(tmp_path / "vivit.npz"), str(tmp_path / "two"), "--video"])


def test_fields_of_a_video_model_are_none_of_an_image_model(tmp_path, dinov2):
    with pytest.raises(ValueError, match="'num_frames=4' is not FIELD=VALUE with a field of MoNEConfig"):
        convert.main([str(dinov2), str(tmp_path / "mone"), "--config_overrides", "num_frames=4"])


def test_a_destination_with_files_is_left_alone_without_overwrite(tmp_path, dinov2, capsys):
    destination = tmp_path / "mone"
    destination.mkdir()
    convert.main([str(dinov2), str(destination)])  # an empty one is fine
    before = files(destination)
    with pytest.raises(SystemExit):
        convert.main([str(dinov2), str(destination)])
    assert "has files already" in capsys.readouterr().err
    assert files(destination) == before
    (destination / "stale.txt").touch()
    convert.main([str(dinov2), str(destination), "--overwrite", "--config_overrides", "capacity=0.5"])
    assert json.loads((destination / "config.json").read_text())["capacity"] == 0.5
    assert not (destination / "stale.txt").exists()


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_neither_source_nor_working_directory_is_replaced(tmp_path, dinov2, capsys, monkeypatch, options):
    (tmp_path / "config.json").touch()
    before = files(tmp_path)
    for destination in (tmp_path, dinov2):
        with pytest.raises(SystemExit):
            convert.main([str(dinov2), str(destination), *options])
        assert f"{destination} would be replaced, and {dinov2} with it" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(SystemExit):
        convert.main([str(dinov2), ".", *options])
    assert f". would be replaced, and {tmp_path / 'empty'} with it" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_overwrite_replaces_models_only(tmp_path, dinov2, capsys):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter.tex").write_text("years of work")

    def refusal(destination):
        before = files(tmp_path)
        with pytest.raises(SystemExit):
            convert.main([str(dinov2), str(destination), "--overwrite"])
        assert files(tmp_path) == before
        return capsys.readouterr().err

    assert "thesis has no config.json, and --overwrite replaces models only. It holds ['chapter.tex']" in (
        refusal(thesis)
    )
    (thesis / "config.json").touch()
    (thesis / "checkpoint-500").mkdir()
    assert "holds folders, which --overwrite does not remove: ['checkpoint-500']" in refusal(thesis)
    assert "chapter.tex is a file. DESTINATION is a folder." in refusal(thesis / "chapter.tex")


def test_an_error_leaves_nothing_behind(tmp_path, dinov2, monkeypatch):
    weights = load_file(dinov2 / "model.safetensors")
    weights["classifier.extra"] = torch.zeros(1)
    save_file(weights, dinov2 / "model.safetensors", metadata={"format": "pt"})
    destination = tmp_path / "out" / "mone"
    with pytest.raises(ValueError, match=r"classifier\.extra"):
        convert.main([str(dinov2), str(destination)])
    del weights["classifier.extra"]
    save_file(weights, dinov2 / "model.safetensors", metadata={"format": "pt"})
    convert.main([str(dinov2), str(destination)])
    before = files(tmp_path / "out")

    def full_disk(self, folder, **kwargs):
        (Path(folder) / "preprocessor_config.json").write_text("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(ViTImageProcessor, "save_pretrained", full_disk)
    for options in (["--overwrite"], []):
        with pytest.raises(OSError, match="No space left"):
            convert.main([str(dinov2), str(destination if options else tmp_path / "out" / "second"), *options])
        assert files(tmp_path / "out") == before
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mone"]


def test_the_old_folder_stays_where_the_new_one_cannot_take_its_place(tmp_path, dinov2, monkeypatch):
    destination = tmp_path / "out" / "mone"
    convert.main([str(dinov2), str(destination)])
    before, rename = files(tmp_path / "out"), Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError("Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        convert.main([str(dinov2), str(destination), "--overwrite"])
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize(("override", "kept"), [("num_frames=4", (0,)), ("num_frames=4,router_layers=[1]", (1,))])
def test_a_video_model_keeps_its_fitted_routers(tmp_path, dinov2, image, override, kept):
    (tmp_path / "photos").mkdir()
    image.save(tmp_path / "photos" / "one.png")
    Dinov2Model.from_pretrained(dinov2).save_pretrained(tmp_path / "vit")
    options = ["--video", "--calibrate", str(tmp_path / "photos"), "--num_labels", "5"]
    convert.main(
        [str(tmp_path / "vit"), str(tmp_path / "video"), *options, "--config_overrides", f"num_experts=3,{override}"]
    )
    model = AutoModelForVideoClassification.from_pretrained(tmp_path / "video")
    assert (model.config.num_experts, tuple(model.config.router_layers)) == (3, kept)
    proj = model.mone_vivit.spatial.routers[0].proj
    # Multiples of one direction, which a new router's weights are not.
    assert proj.weight[1].norm() > 0
    torch.testing.assert_close(proj.weight, torch.arange(3.0)[:, None] * proj.weight[1])
    torch.testing.assert_close(proj.bias, torch.arange(3.0) * proj.bias[1])


def test_images_that_cannot_be_read(tmp_path, dinov2, image, caplog):
    photos = tmp_path / "photos"
    with pytest.raises(NotADirectoryError, match=r"needs a folder of images, and .*photos is none"):
        convert.main([str(tmp_path / "not_read"), str(tmp_path / "m"), "--calibrate", str(photos)])
    photos.mkdir()
    with pytest.raises(ValueError, match="photos has no images"):
        convert.main([str(tmp_path / "not_read"), str(tmp_path / "m"), "--calibrate", str(photos)])
    image.save(photos / "cut.png")
    (photos / "cut.png").write_bytes((photos / "cut.png").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"None of the 1 images can be read, of which the first is .*cut\.png"):
        convert.main([str(dinov2), str(tmp_path / "m"), "--calibrate", str(photos)])
    assert not (tmp_path / "m").exists()
    image.save(photos / "whole.png")
    caplog.clear()
    convert.main([str(dinov2), str(tmp_path / "m"), "--calibrate", str(photos)])
    assert "cut.png is left out, as it cannot be read" in caplog.text and "whole.png" not in caplog.text
    (photos / "cut.png").unlink()
    convert.main([str(dinov2), str(tmp_path / "n"), "--calibrate", str(photos)])
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "mn")
    assert all(torch.equal(first[key], second[key]) for key in first)
