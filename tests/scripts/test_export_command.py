"""The command line of export: from a saved folder to a file that runs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import ViTImageProcessor

from mone import MoNEConfig, MoNEForImageClassification
from mone.export import onnx_session


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import export as script


pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_export_and_int8(tmp_path, capsys):
    torch.manual_seed(0)
    config = MoNEConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    model = MoNEForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    pixel_values = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixel_values, capacity=0.4).logits
    for name, options, tolerance in (("float", [], 1e-5), ("int8", ["--int8"], 0.05)):
        path = tmp_path / "onnx" / f"{name}.onnx"
        script.main([str(tmp_path / "model"), str(path), "--capacity", "0.4", *options])
        assert f"{name}.onnx: 0." in capsys.readouterr().out
        session = onnx_session(path)
        logits = torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])
        assert (logits - expected).abs().max() <= tolerance * expected.abs().max()
        metadata = session.get_modelmeta().custom_metadata_map
        assert json.loads(metadata["id2label"]) == {"0": "cat", "1": "dog"} and "image_mean" in metadata
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"float.onnx", "int8.onnx"}


def test_a_bad_capacity_writes_nothing(tmp_path):
    config = MoNEConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=16)
    MoNEForImageClassification(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"capacity=0\.01"):
        script.main([str(tmp_path / "model"), str(tmp_path / "out" / "m.onnx"), "--capacity", "0.01"])
    assert not (tmp_path / "out").exists()


def test_a_folder_is_no_file_to_write(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main(["not/read", str(tmp_path)])
    assert f"{tmp_path} is a folder: name the file to write." in capsys.readouterr().err
