"""The teacher's loss against torch's distributions, and the teacher's pixels and cost against transformers'."""

import logging

import pytest
import torch
from torch.distributions import Bernoulli, Categorical, kl_divergence
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    VivitConfig,
    VivitForVideoClassification,
    VivitImageProcessor,
)

from mone import MoNEConfig, MoNEForImageClassification, MoNEViViTConfig, count_macs
from mone.training import Teacher, distillation_loss


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def student_config(**fields):
    return MoNEConfig(**{**SIZES, "image_size": 16, "patch_size": 4, "num_labels": 3, **fields})


def save_vit(folder, processor=None, **fields):
    torch.manual_seed(0)
    config = ViTConfig(**{**SIZES, "image_size": 16, "patch_size": 4, "num_labels": 3, **fields})
    model = ViTForImageClassification(config).eval()
    model.save_pretrained(folder)
    (processor or ViTImageProcessor(size={"height": 16, "width": 16})).save_pretrained(folder)
    return model


def make_logits():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 7, generator=generator), 3 * torch.randn(5, 7, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_is_the_divergence_of_the_softened_predictions(temperature):
    student, teacher = make_logits()
    expected = kl_divergence(Categorical(logits=teacher / temperature), Categorical(logits=student / temperature))
    loss = distillation_loss(student, teacher, temperature)
    torch.testing.assert_close(loss, temperature**2 * expected.mean())
    expected = kl_divergence(Bernoulli(logits=teacher / temperature), Bernoulli(logits=student / temperature))
    loss = distillation_loss(student, teacher, temperature, multi_label=True)
    torch.testing.assert_close(loss, temperature**2 * expected.mean())


def test_loss_is_least_at_the_teacher():
    _, teacher = make_logits()
    for multi_label in (False, True):
        student = teacher.clone().requires_grad_()
        loss = distillation_loss(student, teacher, 2.0, multi_label)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-6)
        assert student.grad.abs().max() < 1e-6


def test_a_teacher_sees_the_same_image_in_its_own_normalisation_and_size(tmp_path):
    theirs = ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.2, 0.4, 0.6], image_std=[0.1, 0.2, 0.3], resample=2
    )
    model = save_vit(tmp_path, theirs, image_size=32)
    ours = ViTImageProcessor(size={"height": 16, "width": 16})
    teacher = Teacher(str(tmp_path), student_config(), ours)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    pixel_values = ours(images=list(image), do_rescale=False, do_resize=False, return_tensors="pt").pixel_values
    resized = torch.nn.functional.interpolate(image, (32, 32), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = model(
            theirs(images=list(resized), do_rescale=False, do_resize=False, return_tensors="pt").pixel_values
        ).logits
    torch.testing.assert_close(teacher(pixel_values), expected, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_timm_classifier_teaches(tmp_path):
    pytest.importorskip("timm")
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 16, "patch_size": 4},
        pretrained_cfg={"input_size": [3, 16, 16], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
        num_labels=3,
    )
    model = TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    teacher = Teacher(str(tmp_path), student_config(), ViTImageProcessor(image_mean=[0.0] * 3, image_std=[1.0] * 3))
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    mean, std = (torch.tensor(config.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = model((image - mean) / std).logits
    torch.testing.assert_close(teacher(image), expected, atol=1e-5, rtol=1e-5)


def test_a_teacher_without_a_processor(tmp_path):
    save_vit(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="has no image processor"):
        Teacher(str(tmp_path), student_config(), ViTImageProcessor())


def test_without_a_processor_the_pixels_are_the_students(tmp_path):
    model = save_vit(tmp_path)
    pixel_values = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(
            Teacher(str(tmp_path), student_config())(pixel_values), model(pixel_values).logits, atol=0, rtol=0
        )


def test_the_teachers_cost_is_counted(tmp_path):
    """ViT has the layers of the dense MoNE with a class token, but no router."""
    save_vit(tmp_path)
    config = student_config(pooling="cls", router_type="random")
    assert Teacher(str(tmp_path), config).macs == count_macs(config, 1.0)


def test_a_mone_teaches_as_the_dense_model(tmp_path):
    torch.manual_seed(0)
    model = MoNEForImageClassification(student_config(capacity=0.2, initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path)
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixel_values, capacity=1.0).logits
        assert not torch.allclose(expected, model(pixel_values).logits)
    teacher = Teacher(str(tmp_path), student_config())
    torch.testing.assert_close(teacher(pixel_values), expected)
    assert teacher.macs == count_macs(model.config, 1.0)


def test_a_video_teacher(tmp_path):
    torch.manual_seed(0)
    sizes = {**SIZES, "image_size": 16, "num_frames": 4, "tubelet_size": [2, 8, 8], "num_labels": 3}
    model = VivitForVideoClassification(VivitConfig(**sizes)).eval()
    model.save_pretrained(tmp_path)
    VivitImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    teacher = Teacher(str(tmp_path), MoNEViViTConfig(**sizes, num_temporal_layers=1))
    pixel_values = torch.randn(2, 4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(teacher(pixel_values), model(pixel_values).logits)
    with pytest.raises(ValueError, match=r"does not take the student's pixel_values of shape \(1, 8, 3, 16, 16\)"):
        Teacher(str(tmp_path), MoNEViViTConfig(**{**sizes, "num_frames": 8}, num_temporal_layers=1))


def test_other_classes_are_found_before_work_starts(tmp_path, caplog):
    save_vit(tmp_path / "five", num_labels=5)
    with pytest.raises(ValueError, match="5 classes, the student 3"):
        Teacher(str(tmp_path / "five"), student_config())
    save_vit(tmp_path / "names", id2label={0: "cat", 1: "dog", 2: "bird"})
    with caplog.at_level(logging.WARNING):
        Teacher(str(tmp_path / "names"), student_config())
    assert "named or ordered otherwise" in caplog.text and "problem_type" not in caplog.text
    save_vit(tmp_path / "sigmoid", num_labels=3, problem_type="multi_label_classification")
    for name, problem_type in (("sigmoid", None), ("names", "multi_label_classification")):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            Teacher(str(tmp_path / name), student_config(problem_type=problem_type))
        assert "one has a probability for each class, the other one over all of them" in caplog.text
