# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Fields, labels and sizes of the model that is built from a source."""

import json

import pytest
import torch
from transformers import SiglipImageProcessor
from vits import SIZES, logits, make_vit, randomise

from mone import MoNEConfig, MoNEForImageClassification
from mone.configuration_mone import as_pair
from mone.conversion import (
    load_image_model,
    load_image_model_and_processor,
    load_video_model,
    mone_from_vit,
    mone_vivit_from_mone,
)


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


def test_a_new_classifier_of_a_vit_starts_at_zero():
    model = mone_from_vit(make_vit("dinov2 model"), num_labels=3)
    assert not any(parameter.any() for parameter in model.classifier.parameters())
