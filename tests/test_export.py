"""Exported models compute what the model computes; what is in the files; what is refused. Reference: the model."""

import importlib.util
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from reference import randomise_
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

import mone.export as export
from mone import (
    MoNEConfig,
    MoNEForImageClassification,
    MoNEViViTConfig,
    MoNEViViTForVideoClassification,
    MoNEViViTVideoProcessor,
)
from mone.baselines import DenseModel
from mone.export import ExportForm, export_onnx, export_program, onnx_session, quantize_onnx, write_onnx


PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "images"
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 16,
    "num_labels": 5,
    "layer_norm_eps": 1e-6,
}
ONE_HOT, SHARES = (0.0, 0.0, 1.0, 0.0), [0.4, 0.0, 0.3, 0.3]


def image_model(**config) -> MoNEForImageClassification:
    torch.manual_seed(0)
    return randomise_(MoNEForImageClassification(MoNEConfig(**{**TINY, "patch_size": 4, **config}))).eval()


def video_model(**config) -> MoNEViViTForVideoClassification:
    torch.manual_seed(0)
    config = MoNEViViTConfig(**TINY, tubelet_size=(2, 4, 4), num_frames=4, num_temporal_layers=1, **config)
    return randomise_(MoNEViViTForVideoClassification(config)).eval()


def pixels(model, batch: int) -> torch.Tensor:
    frames = (4,) if model.config.model_type == "mone_vivit" else ()
    size = model.config.image_size
    return torch.randn(batch, *frames, 3, size, size, generator=torch.Generator().manual_seed(batch))


def assert_same(outputs: dict, model, pixel_values: torch.Tensor, capacity, tolerance: float = 1e-5) -> None:
    """Logits, decisions and labels are the model's."""
    with torch.no_grad():
        expected = model(pixel_values, capacity=capacity, output_router_logits=True)
    outputs = {name: torch.as_tensor(value) for name, value in outputs.items()}
    torch.testing.assert_close(outputs["logits"], expected.logits, atol=tolerance, rtol=tolerance)
    assert torch.equal(outputs["logits"].argmax(-1), expected.logits.argmax(-1))
    if len(outputs) > 1:
        assert len(outputs) == 1 + 2 * len(model.config.router_layers)
        for number, (logits, experts) in enumerate(zip(expected.router_logits, expected.expert_indices, strict=True)):
            torch.testing.assert_close(outputs[f"router_logits_{number}"], logits, atol=tolerance, rtol=tolerance)
            assert torch.equal(outputs[f"expert_indices_{number}"], experts)


# --- the layout for export ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0.125, 0.4, 1.0, ONE_HOT, SHARES], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pooling": "cls", "router_layers": (0, 1)},
        {"pooling": "cls_mean", "num_register_tokens": 2, "router_layers": (1,), "final_norm": "pooled"},
        {"qkv_bias": False, "hidden_act": "relu"},
    ],
    ids=["mean", "cls, two routers", "registers", "no bias"],
)
def test_the_layout_changes_nothing(config, capacity):
    model = image_model(**config)
    with torch.no_grad():
        outputs = ExportForm(model, capacity, router_outputs=True)(pixels(model, 3))
    assert_same(outputs, model, pixels(model, 3), capacity)


@pytest.mark.parametrize("capacity", [0.4, 1.0, ONE_HOT], ids=str)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_layout_changes_nothing_for_video(pooling, capacity):
    model = video_model(pooling=pooling)
    with torch.no_grad():
        outputs = ExportForm(model, capacity, router_outputs=True)(pixels(model, 3))
    assert_same(outputs, model, pixels(model, 3), capacity)


def test_another_number_of_experts_and_prepared_weights():
    model = image_model(num_experts=2).optimize_for_inference()
    with torch.no_grad():
        outputs = ExportForm(model, 0.7)(pixels(model, 3))
    assert_same(outputs, model, pixels(model, 3), 0.7)


def test_the_model_is_as_before_also_after_an_error():
    model = image_model()
    with pytest.raises(ValueError, match="Image size 8x8"):
        ExportForm(model, 0.4)(torch.zeros(1, 3, 8, 8))
    with torch.no_grad():
        assert len(model(pixels(model, 1), output_hidden_states=True).hidden_states) == 3


def test_other_models_run_as_always_meanwhile():
    """Served by another thread, say: only the exported one has its layers run otherwise."""
    model, other = image_model(), image_model()
    seen = []

    def run(*args):
        seen.append(other(pixels(other, 1), capacity=0.4, output_hidden_states=True).hidden_states)

    model.register_forward_pre_hook(run)
    with torch.no_grad():
        ExportForm(model, 0.4)(pixels(model, 1))
    assert len(seen[0]) == 3


# --- torch.export ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [image_model(), video_model()], ids=["image", "video"])
def test_program(model):
    program = export_program(model, 0.4, router_outputs=True).module()
    for batch in (1, 2, 5):
        assert_same(program(pixels(model, batch)), model, pixels(model, batch), 0.4)


def test_the_default_capacity_is_the_configs():
    model = image_model(capacity=0.3)
    assert_same(export_program(model).module()(pixels(model, 3)), model, pixels(model, 3), 0.3)


def test_outputs_that_the_config_asks_for_are_left_out():
    model = image_model(output_hidden_states=True)
    assert_same(export_program(model, 0.4).module()(pixels(model, 3)), image_model(), pixels(model, 3), 0.4)


def test_a_capacity_of_numpy(tmp_path):
    pytest.importorskip("onnxruntime")
    model = image_model()
    for name, capacity in (("number", np.float32(0.4)), ("shares", np.array([0.0, 0.5, 0.5, 0.0]))):
        export_onnx(model, tmp_path / name, capacity)
        metadata = onnx_session(tmp_path / name).get_modelmeta().custom_metadata_map
        assert json.loads(metadata["capacity"]) == pytest.approx(capacity.tolist())


# --- ONNX -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Image model at 0.4 with 196 tokens, as in ViT, and a processor."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("onnx")
    model = image_model(image_size=112, patch_size=8, id2label={0: "a", 1: "b", 2: "c", 3: "d", 4: "e"})
    processor = ViTImageProcessor(size={"height": 112, "width": 112}, image_mean=[0.1, 0.2, 0.3])
    export_onnx(model, folder / "new" / "model.onnx", 0.4, processor=processor, router_outputs=True)
    return SimpleNamespace(model=model, processor=processor, path=folder / "new" / "model.onnx")


def run(session, pixel_values: torch.Tensor) -> dict[str, np.ndarray]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"pixel_values": pixel_values.numpy()}), strict=True))


def test_what_is_no_processor_is_said(tmp_path):
    with pytest.raises(TypeError, match="processor='folder' must be an image or video processor"):
        export_onnx(image_model(), tmp_path / "model.onnx", 0.4, processor="folder")
    assert not list(tmp_path.iterdir())


def test_one_mean_for_all_channels(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    processor = MoNEViViTVideoProcessor(image_mean=0.4, image_std=[1, 2, 4])
    export_onnx(video_model(), tmp_path / "model.onnx", 0.4, processor=processor)
    metadata = onnx_session(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(metadata["image_mean"]) == [0.4] * 3 and json.loads(metadata["image_std"]) == [1, 2, 4]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_onnx(exported, batch):
    pixel_values = pixels(exported.model, batch)
    outputs = run(onnx_session(exported.path), pixel_values)
    assert len(outputs) == 3
    assert_same(outputs, exported.model, pixel_values, 0.4)


def test_metadata_and_what_is_left_in_the_folder(exported):
    session = onnx_session(exported.path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["model_type"] == "mone"
    assert json.loads(metadata["capacity"]) == 0.4
    assert json.loads(metadata["id2label"]) == {"0": "a", "1": "b", "2": "c", "3": "d", "4": "e"}
    assert json.loads(metadata["image_size"]) == [112, 112]
    assert json.loads(metadata["image_mean"]) == [0.1, 0.2, 0.3] and json.loads(metadata["image_std"]) == [0.5] * 3
    assert json.loads(metadata["processor"])["rescale_factor"] == 1 / 255
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("pixel_values", [3, 112, 112])]
    assert [path.name for path in exported.path.parent.iterdir()] == ["model.onnx"]


def test_the_graph_does_not_gather_in_layers(exported):
    import onnx

    model = onnx.load(exported.path)
    ops = Counter(node.op_type for node in model.graph.node)
    layers, experts = 2, 4
    assert ops["Attention"] == layers
    assert ops["Gemm"] == layers * experts * 6 + 1, "a product with bias for each expert's part, and the classifier"
    assert ops["LayerNormalization"] == layers * experts * 2 + 1 and ops["Gelu"] == layers * experts
    # As much gathering as one router needs, however many layers follow.
    gathers = [op for op in ops.elements() if op.startswith(("Gather", "Scatter"))]
    assert len(gathers) <= 12 and not {"ScatterND", "GatherND"} & set(gathers)


def check_labels(exported, images: list[Image.Image]) -> None:
    pixel_values = exported.processor(images, return_tensors="pt").pixel_values
    session = onnx_session(exported.path)
    for batch in (1, 8):
        for part in pixel_values.split(batch):
            assert_same(run(session, part), exported.model, part, 0.4, tolerance=1e-4)


@pytest.mark.skipif(not PHOTOS.exists(), reason="development data are not there")
def test_labels_of_photographs(exported):
    photos = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.[jJ][pP]*"))]
    assert len(photos) == 24
    check_labels(exported, photos)


def test_labels_of_drawn_images(exported):
    """Flat areas and repeated patterns: many tokens are the same to the router."""
    rows, columns = np.mgrid[:112, :112]
    drawn = [(rows * k + columns) // 16 % 2 * 255 for k in range(8)] + [np.full((112, 112), k * 60) for k in range(4)]
    check_labels(exported, [Image.fromarray(x.astype(np.uint8)).convert("RGB") for x in drawn])


@pytest.mark.parametrize(
    ("make", "capacity"),
    [(image_model, 1.0), (image_model, ONE_HOT), (video_model, SHARES)],
    ids=["full", "one-hot", "video, shares"],
)
def test_onnx_at_other_capacities(tmp_path, make, capacity):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make()
    export_onnx(model, tmp_path / "model.onnx", capacity)
    session = onnx_session(tmp_path / "model.onnx")
    for batch in (1, 8):
        assert_same(run(session, pixels(model, batch)), model, pixels(model, batch), capacity)


def test_among_equal_tokens_the_earlier_goes_first(tmp_path):
    """As in PyTorch: with all probabilities equal, the order alone decides, at both routers."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = image_model(router_layers=(0, 1))
    with torch.no_grad():
        for router in model.mone.routers:
            router.proj.weight.zero_()
    export_onnx(model, tmp_path / "model.onnx", 0.4, router_outputs=True)
    outputs = run(onnx_session(tmp_path / "model.onnx"), pixels(model, 3))
    assert_same(outputs, model, pixels(model, 3), 0.4)
    assert (np.diff(outputs["expert_indices_0"]) <= 0).all(), "largest expert first"


def test_int8(exported, tmp_path):
    import onnx

    quantize_onnx(exported.path, tmp_path / "int8.onnx")
    graph = onnx.load(tmp_path / "int8.onnx").graph
    ops = Counter(node.op_type for node in graph.node)
    assert ops["MatMulInteger"] == 2 * 4 * 6
    assert ops["MatMul"] + ops["Gemm"] == 2 and ops["ConvInteger"] == 0, "router and classifier stay in float32"
    pixel_values = pixels(exported.model, 8)
    session = onnx_session(tmp_path / "int8.onnx")
    actual, expected = run(session, pixel_values), run(onnx_session(exported.path), pixel_values)
    error = np.abs(actual["logits"] - expected["logits"]).max() / np.abs(expected["logits"]).max()
    assert 0 < error < 0.05
    assert (actual["expert_indices_0"] == expected["expert_indices_0"]).all()
    assert json.loads(session.get_modelmeta().custom_metadata_map["capacity"]) == 0.4
    with pytest.raises(FileNotFoundError, match=r"no\.onnx"):
        quantize_onnx(tmp_path / "no.onnx", tmp_path / "int8.onnx")


def test_int8_refuses_a_file_in_which_routers_cannot_be_found(exported, tmp_path):
    import onnx

    model = onnx.load(exported.path)
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(ValueError, match=r"bare\.onnx' do not say .* routers cannot be told"):
        quantize_onnx(tmp_path / "bare.onnx", tmp_path / "int8.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["bare.onnx"]


def test_a_dense_model_goes_the_same_way(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    dense = randomise_(DenseModel(MoNEConfig(**TINY, patch_size=4))).eval()
    example = torch.randn(3, 3, 16, 16)
    write_onnx(dense, example[:2], tmp_path / "dense.onnx")
    quantize_onnx(tmp_path / "dense.onnx", tmp_path / "int8.onnx")
    with torch.no_grad():
        expected = dense(example)
    for name, tolerance in (("dense", 1e-5), ("int8", 0.05)):
        logits = torch.from_numpy(run(onnx_session(tmp_path / f"{name}.onnx"), example)["logits"])
        assert (logits - expected).abs().max() <= tolerance * expected.abs().max()


# --- refusals and failures ------------------------------------------------------------------------------------------


def make_vit():
    return ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).eval()


@pytest.mark.parametrize(
    ("make", "capacity", "error", "message"),
    [
        (
            lambda: image_model(router_type="argmax"),
            0.4,
            ValueError,
            "router_type='argmax' gives the experts",
        ),
        (lambda: image_model(router_type="random"), 0.4, ValueError, "router_type='random' draws"),
        (lambda: image_model().train(), 0.4, ValueError, "training mode"),
        (lambda: image_model().mone, 0.4, TypeError, "MoNEModel is no MoNE with a classifier"),
        (make_vit, None, TypeError, "ViTForImageClassification is no MoNE with a classifier"),
        (image_model, 1.2, ValueError, r"capacity=1\.2 is out of range. Allowed"),
        (image_model, (0.5, 0.6, 0, 0), ValueError, "sums to 1.1"),
        (lambda: hooked(image_model()), 0.4, ValueError, r"layers\.1\.mlp\.fc2 has hooks"),
    ],
    ids=["argmax", "random", "training", "no classifier", "no MoNE", "capacity", "shares", "hooks"],
)
def test_refused_before_any_work(tmp_path, make, capacity, error, message):
    model = make()
    with pytest.raises(error, match=message):
        export_program(model, capacity)
    with pytest.raises(error, match=message):
        export_onnx(model, tmp_path / "model.onnx", capacity)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_file_to_write(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", None)  # before the work
    with pytest.raises(IsADirectoryError, match="is a folder: name the file to write"):
        export_onnx(image_model(), tmp_path, 0.4)
    assert not list(tmp_path.iterdir())


def hooked(model):
    model.mone.layers[1].mlp.fc2.register_forward_hook(lambda *_: None)
    return model


def test_half_precision_goes_to_a_program_only(tmp_path):
    model = image_model().to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch\.bfloat16 .* model\.float\(\)"):
        export_onnx(model, tmp_path / "model.onnx", 0.4)
    assert export_program(model, 0.4).module()(pixels(model, 2).bfloat16())["logits"].dtype == torch.bfloat16


def test_missing_packages_are_named(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name.startswith("onnx") else find_spec(name, *a)
    )
    with pytest.raises(ImportError, match=r'onnx and onnxscript: pip install "mone\[export\]"'):
        export_onnx(image_model(), tmp_path / "model.onnx", 0.4)
    with pytest.raises(ImportError, match="onnxruntime"):
        onnx_session(tmp_path / "model.onnx")


class FakeProgram:
    """What torch.onnx.export returns, with weights in a second file."""

    model = SimpleNamespace(metadata_props={})

    def save(self, path):
        Path(path).write_text("new")
        Path(f"{path}.data").write_text("weights")


@pytest.fixture
def fake_export(monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: FakeProgram())


def test_both_files_arrive(tmp_path, fake_export):
    write_onnx(torch.nn.Identity(), torch.zeros(2, 1), tmp_path / "model.onnx")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "model.onnx": "new",
        "model.onnx.data": "weights",
    }


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch, fake_export, error):
    pytest.importorskip("onnxruntime")
    model, path = image_model(), tmp_path / "model.onnx"
    path.write_text("old")

    class Session:
        def run(self, names, inputs):
            with torch.no_grad():
                return [(model(torch.from_numpy(inputs["pixel_values"]), capacity=0.4).logits * (1 + error)).numpy()]

    monkeypatch.setattr(export, "onnx_session", lambda file: Session())
    with pytest.raises(RuntimeError, match="differ from the model's"):
        export_onnx(model, path, 0.4)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"] and path.read_text() == "old"
