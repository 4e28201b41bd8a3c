# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Flax parameter trees of Scenic -> MoNE, against their forward pass written out in NumPy.

Names and layouts are those that Flax gives the modules of scenic/projects/vivit/model.py (SpaceTimeViViT) and
scenic/projects/matvit/matvit.py. No checkpoint of theirs could be had here.
"""

import numpy as np
import pytest
import torch

from mone import MoNEForImageClassification, MoNEModel, MoNEViViTForVideoClassification
from mone.configuration_mone import as_pair
from mone.conversion import mone_from_vit
from mone.conversion.video import resize_video_model


D, HEADS, HIDDEN, CLASSES = 32, 4, 48, 5


class Random:
    """Random arrays, of a size that keeps activations near 1."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __call__(self, *shape, around=0.0):
        return (around + 0.2 * self.generator.standard_normal(shape)).astype(np.float32)


def block(random, names):
    attention, first, second, mlp = names
    head = (HEADS, D // HEADS)
    return {
        first: {"scale": random(D, around=1.0), "bias": random(D)},
        attention: {
            **{n: {"kernel": random(D, *head), "bias": random(*head)} for n in ("query", "key", "value")},
            "out": {"kernel": random(*head, D), "bias": random(D)},
        },
        second: {"scale": random(D, around=1.0), "bias": random(D)},
        mlp: {
            "Dense_0": {"kernel": random(D, HIDDEN), "bias": random(HIDDEN)},
            "Dense_1": {"kernel": random(HIDDEN, D), "bias": random(D)},
        },
    }


SCENIC = ("MultiHeadDotProductAttention_0", "LayerNorm_0", "LayerNorm_1", "MlpBlock_0")
AUGREG = ("MultiHeadDotProductAttention_1", "LayerNorm_0", "LayerNorm_2", "MlpBlock_3")


def encoder(random, layers, positions, names=SCENIC):
    return {
        "posembed_input": {"pos_embedding": random(1, positions, D)},
        **{f"encoderblock_{index}": block(random, names) for index in range(layers)},
        "encoder_norm": {"scale": random(D, around=1.0), "bias": random(D)},
    }


def norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def gelu(x):  # flax.linen.gelu's default
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def run_block(x, p, names):
    attention, first, second, mlp = names
    h, a = norm(x, p[first]), p[attention]
    q, k, v = (np.einsum("nd,dhf->nhf", h, a[n]["kernel"]) + a[n]["bias"] for n in ("query", "key", "value"))
    scores = np.einsum("nhf,mhf->hnm", q, k) / np.sqrt(D // HEADS)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    x = x + np.einsum("hnm,mhf,hfd->nd", weights, v, a["out"]["kernel"]) + a["out"]["bias"]
    h = norm(x, p[second])
    h = gelu(h @ p[mlp]["Dense_0"]["kernel"] + p[mlp]["Dense_0"]["bias"])
    return x + h @ p[mlp]["Dense_1"]["kernel"] + p[mlp]["Dense_1"]["bias"]


def run_encoder(x, p, cls=None, names=SCENIC):
    x = x if cls is None else np.concatenate([cls[0], x])
    x = x + p["posembed_input"]["pos_embedding"][0]
    for index in range(sum(name.startswith("encoderblock") for name in p)):
        x = run_block(x, p[f"encoderblock_{index}"], names)
    x = norm(x, p["encoder_norm"])
    return x.mean(0) if cls is None else x[0]


def run_image(image, params, names=SCENIC):
    """(height, width, C) -> pooled features."""
    kernel = params["embedding"]["kernel"]
    size, side = kernel.shape[0], image.shape[0] // kernel.shape[0]
    patches = image.reshape(side, size, side, size, 3).transpose(0, 2, 1, 3, 4)
    tokens = np.einsum("abhwc,hwcd->abd", patches, kernel) + params["embedding"]["bias"]
    return run_encoder(tokens.reshape(-1, D), params["Transformer"], params.get("cls"), names)


def run_video(clip, params):
    """(F, height, width, C) -> logits."""
    kernel = params["embedding"]["kernel"]
    time, size = kernel.shape[:2]
    side = clip.shape[1] // size
    tubelets = clip.reshape(-1, time, side, size, side, size, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    tokens = np.einsum("tabnhwc,nhwcd->tabd", tubelets, kernel) + params["embedding"]["bias"]
    frames = [
        run_encoder(frame.reshape(-1, D), params["SpatialTransformer"], params.get("cls_SpatialTransformer"))
        for frame in tokens
    ]
    pooled = run_encoder(np.stack(frames), params["TemporalTransformer"], params.get("cls_TemporalTransformer"))
    return pooled @ params["output_projection"]["kernel"] + params["output_projection"]["bias"]


def image_params(token, names=SCENIC, head="output_projection"):
    random = Random()
    params = {
        "embedding": {"kernel": random(8, 8, 3, D), "bias": random(D)},
        "Transformer": encoder(random, 2, 16 + token, names),
        head: {"kernel": random(D, CLASSES), "bias": random(CLASSES)},
    }
    return {**params, "cls": random(1, 1, D)} if token else params


def video_params(token):
    random = Random()
    params = {
        "embedding": {"kernel": random(2, 8, 8, 3, D), "bias": random(D)},
        "SpatialTransformer": encoder(random, 2, 16 + token),
        "TemporalTransformer": encoder(random, 3, 4 + token),
        "output_projection": {"kernel": random(D, CLASSES), "bias": random(CLASSES)},
    }
    if token:
        params |= {f"cls_{name}Transformer": random(1, 1, D) for name in ("Spatial", "Temporal")}
    return params


def flat(tree, prefix=""):
    result = {}
    for name, value in tree.items():
        result |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return result


@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize(("names", "head"), [(SCENIC, "output_projection"), (AUGREG, "head")])
@pytest.mark.parametrize("wrapped", [False, True])
def test_vit_and_matvit(token, names, head, wrapped):
    params = image_params(token, names, head)
    source = {"optimizer": {"target": params}, "global_step": np.int64(7)} if wrapped else params
    model = mone_from_vit(source)
    assert isinstance(model, MoNEForImageClassification) and model.config.pooling == ("cls" if token else "mean")
    image = np.random.default_rng(1).standard_normal((32, 32, 3)).astype(np.float32)
    expected = run_image(image, params, names) @ params[head]["kernel"] + params[head]["bias"]
    with torch.no_grad():
        logits = model(torch.from_numpy(image).permute(2, 0, 1)[None]).logits[0]
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5)


def classifier(source) -> torch.Tensor:
    return mone_from_vit(source).classifier.weight


def test_the_models_parameters_in_the_state_of_a_training(tmp_path):
    """Beside numbers, None, tuples, and other parameters of the same names."""
    params = image_params(True)
    other = {name: {"kernel": np.full((D, CLASSES), 9.0, np.float32)} for name in ("output_projection",)}
    expected = classifier(params)
    for source in (
        {"params": params, "ema": {"params": other}, "opt_state": (1, None), "metadata": None, "global_step": 4},
        {"optimizer": {"target": params, "state": {"step": 3}}, "teacher": {"target": other}},
        {"params": {"params": params}},
    ):
        assert torch.equal(classifier(source), expected)
    np.savez(tmp_path / "two.npz", **flat({"ema": {"params": other}, "params": params}))
    assert torch.equal(classifier(tmp_path / "two.npz"), expected)
    np.savez(tmp_path / "two.npz", **flat({"ema": {"params": params}, "teacher": {"params": params}}))
    with pytest.raises(ValueError, match=r"several models, \['ema/params/', 'teacher/params/'\]: give the parameters"):
        mone_from_vit(tmp_path / "two.npz")


def test_arrays_of_other_kinds(tmp_path):
    params = image_params(False)
    kernel = params["output_projection"]["kernel"]

    class Array:  # as JAX's are
        def __array__(self, dtype=None, copy=None):
            return kernel

    params["output_projection"]["kernel"] = Array()
    assert torch.equal(classifier(params), torch.from_numpy(kernel.T))
    ml_dtypes = pytest.importorskip("ml_dtypes")
    params["output_projection"]["kernel"] = kernel.astype(ml_dtypes.bfloat16)
    assert torch.equal(classifier(params), torch.from_numpy(kernel.T).bfloat16().float())
    np.savez(tmp_path / "half.npz", **flat(params))  # where the type loses its name
    with pytest.raises(ValueError, match=r"output_projection/kernel is an array of \|V2: save it as float32"):
        mone_from_vit(tmp_path / "half.npz")


def test_files_that_are_cut_short_or_hold_objects(tmp_path):
    np.savez(tmp_path / "vit.npz", **flat(image_params(True)))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "vit.npz").read_bytes()[:1000])
    np.savez(tmp_path / "objects.npz", params=np.array([{}, None], dtype=object))
    (tmp_path / "text.npz").write_text("no arrays")
    for name in ("cut", "objects", "text"):
        with pytest.raises(ValueError, match=rf"{name}\.npz cannot be read as weights; it "):
            mone_from_vit(tmp_path / f"{name}.npz")


def test_vivit_with_one_encoder():
    params = image_params(False)
    params["embedding"]["kernel"] = np.zeros((2, 8, 8, 3, D), np.float32)
    with pytest.raises(ValueError, match="has tubelets and one encoder: of ViViT's models, only ViViT-FE"):
        mone_from_vit(params)


def test_without_a_head_from_an_npz_file(tmp_path):
    params = image_params(True)
    del params["output_projection"]
    np.savez(tmp_path / "vit.npz", **flat(params))
    model = mone_from_vit(tmp_path / "vit.npz")
    assert isinstance(model, MoNEModel)
    image = np.random.default_rng(1).standard_normal((32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        features = model(torch.from_numpy(image).permute(2, 0, 1)[None]).pooler_output[0]
    np.testing.assert_allclose(features.numpy(), run_image(image, params), atol=1e-5)


@pytest.mark.parametrize("token", [False, True])
def test_vivit_with_a_factorised_encoder(token):
    params = video_params(token)
    model = mone_from_vit({"params": params}, num_experts=3)
    assert isinstance(model, MoNEViViTForVideoClassification) and not model.training
    config = model.config
    assert (config.num_frames, config.tubelet_size, config.num_temporal_layers) == (8, (2, 8, 8), 3)
    clip = np.random.default_rng(1).standard_normal((8, 32, 32, 3)).astype(np.float32)
    pixel_values = torch.from_numpy(clip).permute(0, 3, 1, 2)[None]
    with torch.no_grad():
        logits = model(pixel_values).logits[0]
        assert not torch.allclose(model(pixel_values, capacity=0.4).logits[0], logits, atol=1e-3)
    np.testing.assert_allclose(logits.numpy(), run_video(clip, params), atol=1e-5)


@pytest.mark.parametrize("sizes", [{"image_size": 48}, {"num_frames": 16}, {"image_size": (24, 40), "num_frames": 4}])
def test_vivit_for_other_clips(sizes):
    params = video_params(True)
    model, expected = mone_from_vit(params, **sizes), mone_from_vit(params)
    resize_video_model(expected, **sizes)
    height, width = as_pair(model.config.image_size)
    pixel_values = torch.randn(1, model.config.num_frames, 3, height, width)
    assert {name: getattr(model.config, name) for name in sizes} == sizes
    with torch.no_grad():
        torch.testing.assert_close(model(pixel_values).logits, expected(pixel_values).logits)
    with pytest.raises(ValueError, match="image_size=36 must be a positive multiple"):
        mone_from_vit(params, image_size=36)


def test_vivit_for_other_labels():
    params = video_params(True)
    for labels, count in (({"num_labels": 9}, 9), ({"id2label": {0: "walk", 1: "run"}}, 2)):
        model = mone_from_vit(params, **labels)
        assert model.config.num_labels == count and not any(p.any() for p in model.classifier.parameters())
        assert model.classifier.weight.shape == (count, D)
    assert model.config.id2label == {0: "walk", 1: "run"} and model.config.label2id == {"walk": 0, "run": 1}
    with pytest.raises(ValueError, match="num_labels=0 must be at least 1"):
        mone_from_vit(params, num_labels=0)
    # As many as it has are its own.
    model = mone_from_vit(params, id2label=dict(enumerate("abcde")))
    np.testing.assert_array_equal(model.classifier.weight.detach(), params["output_projection"]["kernel"].T)
    assert model.config.id2label[4] == "e"
    del params["output_projection"]
    model = mone_from_vit(params, num_labels=3)
    assert model.classifier.weight.shape == (3, D) and not model.classifier.weight.any()


def test_pre_logits_are_left_out_with_the_head():
    """As AugReg's files for ImageNet-21k have it."""
    params = image_params(True, AUGREG, "head")
    params["pre_logits"] = {"kernel": np.zeros((D, D), np.float32), "bias": np.zeros(D, np.float32)}
    model = mone_from_vit(params, num_labels=3)
    assert model.classifier.weight.shape == (3, D)
    with pytest.raises(ValueError, match=r"without counterpart: \['classifier\.pre_logits\.weight'"):
        mone_from_vit(params)


def test_keys_that_do_not_fit_are_listed():
    params = image_params(True)
    del params["Transformer"]["encoderblock_1"]["MlpBlock_0"]["Dense_1"]["bias"]
    params["pre_logits"] = {"kernel": np.zeros((D, D), np.float32)}
    with pytest.raises(ValueError, match=r"Missing: .*layers\.1\.mlp\.fc2\.bias.*counterpart: .*pre_logits\.weight"):
        mone_from_vit(params)
    params = video_params(False)
    params["TemporalTransformer"]["encoderblock_0"]["MlpBlock_0"]["Dense_0"]["bias"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"temporal\.layers\.0\.mlp\.fc1\.bias \(3,\) instead of \(48,\)"):
        mone_from_vit(params)
    with pytest.raises(ValueError, match="no temporal encoder"):
        mone_from_vit({key: value for key, value in params.items() if key != "TemporalTransformer"})
    with pytest.raises(TypeError, match="num_frame"):
        mone_from_vit(video_params(False), num_frame=4)
    with pytest.raises(ValueError, match="step is a str"):
        mone_from_vit({"params": {}, "step": "7"})
