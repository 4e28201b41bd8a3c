# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Pictures are read back from the figures and compared with routing decisions fetched from the model itself."""

import importlib
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTImageProcessor, ViTImageProcessorPil, ViTModel

from mone import (
    MoNEConfig,
    MoNEForImageClassification,
    MoNEModel,
    MoNEViViTConfig,
    MoNEViViTForVideoClassification,
    MoNEViViTVideoProcessor,
    count_macs,
)
from mone.capacity import resolve_capacity, tokens_per_expert
from mone.video_decoding import VideoReader
from mone.video_encoding import write_video
from mone.visualization import (
    FADED,
    VIDEO_GAP,
    draw_routed_tokens,
    draw_routed_video,
    fade_patches,
    patch_contrast,
    write_routed_video,
)


pytest.importorskip("matplotlib")

MEAN, STD = [0.48, 0.45, 0.40], [0.22, 0.23, 0.24]


def make_model(cls=MoNEForImageClassification, **kwargs):
    torch.manual_seed(0)
    defaults = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": (32, 48),
        "patch_size": (8, 4),
        "num_labels": 3,
        "initializer_range": 0.5,  # so that tokens of different pixels get different router logits
    }
    return cls(MoNEConfig(**(defaults | kwargs))).eval()


def make_processor(cls=ViTImageProcessor, channels=3, size=(32, 48), **kwargs):
    size = {"height": size[0], "width": size[1]}
    return cls(size=size, image_mean=MEAN[:channels], image_std=STD[:channels], **kwargs)


def make_images(number=2, size=(32, 48), channels=3, seed=0):
    """Random dark pictures without middle grey (127.5), so that a faded pixel differs from its original."""
    shape = (*size, channels) if channels > 1 else size
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 128, shape, dtype=np.uint8)) for _ in range(number)]


def panels(figure, columns):
    """The pictures in a figure, one list of (height, width, 3) arrays per row."""
    shown = [np.asarray(ax.images[0].get_array()) for ax in figure.axes]
    assert len(shown) % columns == 0
    return [shown[i : i + columns] for i in range(0, len(shown), columns)]


def as_array(image):
    """(height, width, 3) in [0, 1] of a picture that needs no resizing."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def route(model, processor, images, capacity, router=0):
    """(batch, N) experts, straight from the model."""
    with torch.no_grad():
        pixel_values = processor(images, return_tensors="pt")["pixel_values"]
        outputs = model(pixel_values, capacity=capacity, output_router_logits=True)
    return outputs.expert_indices[router].numpy()


def check_panel(panel, image, experts, patch, num_experts=4):
    """Walk over the patches one by one: those of the full model keep their pixels, others are faded towards grey."""
    rows, columns = image.shape[0] // patch[0], image.shape[1] // patch[1]
    bright = 0
    for token in range(rows * columns):
        top, left = token // columns * patch[0], token % columns * patch[1]
        shown = panel[top : top + patch[0], left : left + patch[1]]
        original = image[top : top + patch[0], left : left + patch[1]]
        if experts[token] == num_experts - 1:
            bright += 1
            np.testing.assert_allclose(shown, original, atol=1e-6)
        else:
            np.testing.assert_allclose(shown, 0.5 + FADED * (original - 0.5), atol=1e-6)
            assert (shown != original).all()
    return bright


# --- helpers --------------------------------------------------------------------------------------------------------


def test_patch_contrast_fills_the_grid_row_by_row():
    experts = torch.tensor([[0, 1, 2, 2, 2, 0], [2, 0, 0, 1, 1, 2]])
    contrast = patch_contrast(experts, (2, 3), num_experts=3)
    assert contrast.tolist() == pytest.approx(
        np.array([[[FADED, FADED, 1], [1, 1, FADED]], [[1, FADED, FADED], [FADED, FADED, 1]]])
    )
    middle = (1 + FADED) / 2
    every = patch_contrast(experts[0], (2, 3), num_experts=3, all_experts=True)
    assert every.flatten().tolist() == pytest.approx([FADED, middle, 1, 1, 1, FADED])


def test_patch_contrast_of_one_expert_is_one():
    for all_experts in (False, True):
        assert patch_contrast(torch.zeros(4, dtype=torch.long), (2, 2), 1, all_experts).tolist() == [[1, 1], [1, 1]]


def test_patch_contrast_refuses_another_grid():
    with pytest.raises(ValueError, match="6 tokens do not fill a grid of 2x2"):
        patch_contrast(torch.zeros(1, 6, dtype=torch.long), (2, 2), 4)


def test_fade_patches_of_a_video_frame_by_frame():
    pixels = torch.rand(2, 5, 3, 4, 9)  # batch, frames, channels, height, width
    contrast = torch.rand(2, 5, 2, 3)
    shown = fade_patches(pixels, contrast)
    torch.testing.assert_close(
        shown[1, 4, :, 2:4, 3:6], 0.5 + (pixels[1, 4, :, 2:4, 3:6] - 0.5) * contrast[1, 4, 1, 1]
    )
    torch.testing.assert_close(
        shown[0, 2, :, 0:2, 6:9], 0.5 + (pixels[0, 2, :, 0:2, 6:9] - 0.5) * contrast[0, 2, 0, 2]
    )


# --- routed tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("processor_class", [ViTImageProcessor, ViTImageProcessorPil])
def test_full_model_tokens_keep_their_pixels(pooling, processor_class):
    model, processor, images = make_model(pooling=pooling), make_processor(processor_class), make_images()
    capacities = [0.3, 0.7, (0.25, 0.25, 0.25, 0.25)]
    figure = draw_routed_tokens(model, processor, images, capacities)
    shown = panels(figure, columns=4)
    assert len(shown) == 2
    for row, image in zip(shown, images, strict=True):
        np.testing.assert_allclose(row[0], as_array(image), atol=1e-6)
    for column, capacity in enumerate(capacities, start=1):
        experts = route(model, processor, images, capacity)
        expected = tokens_per_expert(resolve_capacity(capacity), 4 * 12)[-1]
        assert 0 < expected < 48
        assert not (experts[0] == experts[1]).all()  # else swapped rows would pass
        for row, image, tokens in zip(shown, images, experts, strict=True):
            assert check_panel(row[column], as_array(image), tokens, (8, 4)) == expected


def test_whole_image_is_clear_at_capacity_one():
    images = make_images(1)
    (row,) = panels(draw_routed_tokens(make_model(), make_processor(), images, [1.0]), columns=2)
    np.testing.assert_array_equal(row[1], row[0])


def test_no_token_is_clear_at_the_smallest_capacity():
    images = make_images(1)
    figure = draw_routed_tokens(make_model(), make_processor(), images, [0.125])
    (row,) = panels(figure, columns=2)
    np.testing.assert_allclose(row[1], 0.5 + FADED * (as_array(images[0]) - 0.5), atol=1e-6)
    assert figure.axes[1].get_title().endswith("\n0% in full model")


def test_all_experts_have_levels_between():
    model, processor, images = make_model(), make_processor(), make_images(1)
    (row,) = panels(draw_routed_tokens(model, processor, images, [0.4], all_experts=True), columns=2)
    experts = route(model, processor, images, 0.4)[0].reshape(4, 12)
    levels = np.array([FADED, FADED + (1 - FADED) / 3, FADED + (1 - FADED) * 2 / 3, 1])
    factor = np.kron(levels[experts], np.ones((8, 4)))[..., None]
    np.testing.assert_allclose(row[1], 0.5 + (as_array(images[0]) - 0.5) * factor, atol=1e-6)


def test_grey_model_takes_any_picture_and_keeps_its_contrast():
    model, processor = make_model(num_channels=1), make_processor(channels=1)
    grey = make_images(1, channels=1)[0]
    colour = make_images(1)[0]
    shown = panels(draw_routed_tokens(model, processor, [grey, colour], [0.5]), columns=2)
    pictures = [grey, colour.convert("L")]
    experts = route(model, processor, pictures, 0.5)
    for row, image, tokens in zip(shown, pictures, experts, strict=True):
        assert row[0].shape == (32, 48, 3)
        np.testing.assert_allclose(row[0], as_array(image), atol=1e-6)
        assert check_panel(row[1], as_array(image), tokens, (8, 4)) > 0


def test_rgb_model_takes_grey_and_transparent_pictures():
    grey = make_images(1, channels=1)[0]
    shown = panels(draw_routed_tokens(make_model(), make_processor(), [grey, grey.convert("RGBA")], [0.5]), columns=2)
    for row in shown:
        np.testing.assert_allclose(row[0], as_array(grey), atol=1e-6)


def test_picture_is_what_the_processor_makes_of_it():
    """A resized image is shown as the model sees it, whatever the processor's scaling."""
    images = make_images(1, size=(70, 50))
    reference = None
    for kwargs in ({}, {"do_normalize": False}, {"rescale_factor": 1 / 127.5}):
        figure = draw_routed_tokens(make_model(), make_processor(**kwargs), images, [0.5])
        picture = panels(figure, columns=2)[0][0]
        assert picture.shape == (32, 48, 3)
        reference = picture if reference is None else reference
        np.testing.assert_allclose(picture, reference, atol=1e-5)
    expected = as_array(images[0].resize((48, 32), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(reference, expected, atol=1.5 / 255)


def test_one_image_and_arrays():
    image = make_images(1)[0]
    for given in (image, np.array(image), [np.array(image)], torch.tensor(np.array(image)).permute(2, 0, 1)):
        (row,) = panels(draw_routed_tokens(make_model(), make_processor(), given, np.array([0.5])), columns=2)
        np.testing.assert_allclose(row[0], as_array(image), atol=1e-6)
    batch = np.stack([np.asarray(image)] * 3)
    assert len(panels(draw_routed_tokens(make_model(), make_processor(), batch, [0.5]), columns=2)) == 3


def test_another_router():
    model, processor, images = make_model(router_layers=(0, 1)), make_processor(), make_images(1)
    decisions = [route(model, processor, images, 0.5, router)[0] for router in (0, 1)]
    assert not (decisions[0] == decisions[1]).all()
    for router in (0, 1, -1):
        (row,) = panels(draw_routed_tokens(model, processor, images, [0.5], router=router), columns=2)
        check_panel(row[1], as_array(images[0]), decisions[router], (8, 4))


def test_another_image_size():
    model, processor, images = make_model(), make_processor(size=(64, 40)), make_images(1, size=(64, 40))
    with pytest.raises(ValueError, match="interpolate_pos_encoding"):
        draw_routed_tokens(model, processor, images, [0.5])
    figure = draw_routed_tokens(model, processor, images, [0.5], interpolate_pos_encoding=True)
    expected = tokens_per_expert(resolve_capacity(0.5), 8 * 10)[-1]
    bright = np.isclose(panels(figure, columns=2)[0][1], as_array(images[0])).all(axis=-1).sum()
    assert bright == expected * 8 * 4
    gmacs = count_macs(model.config, 0.5, (64, 40)) / 1e9
    assert float(figure.axes[1].get_title().split("\n")[1].split()[0]) == pytest.approx(gmacs, rel=5e-3)


def test_titles_give_capacity_cost_and_share():
    model = make_model()
    figure = draw_routed_tokens(model, make_processor(), make_images(), [0.4, (0.5, 0, 0, 0.5)])
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0] == "model input"
    assert not any(titles[3:])
    capacity, gmacs, share = titles[1].split("\n")
    assert capacity == "capacity 0.4"
    assert gmacs.endswith(" GMACs")
    assert float(gmacs.split()[0]) == pytest.approx(count_macs(model.config, 0.4) / 1e9, rel=5e-3)
    assert "e" not in gmacs.split()[0]
    tokens = tokens_per_expert(resolve_capacity(0.4), 48)[-1]
    assert share.endswith("% in full model")
    assert float(share.split("%")[0]) == pytest.approx(100 * tokens / 48, rel=5e-3)
    assert titles[2].startswith("shares 0.5/0/0/0.5\n")
    assert titles[2].endswith("\n50% in full model")


def test_random_and_argmax_routers():
    images = make_images(1)
    (row,) = panels(draw_routed_tokens(make_model(router_type="random"), make_processor(), images, [0.5]), columns=2)
    bright = np.isclose(row[1], as_array(images[0])).all(axis=-1).sum()
    assert bright == tokens_per_expert(resolve_capacity(0.5), 48)[-1] * 8 * 4

    model, processor = make_model(router_type="argmax"), make_processor()
    images = make_images(2)
    figure = draw_routed_tokens(model, processor, images, [0.5])
    experts = route(model, processor, images, 0.5)
    bright = [
        check_panel(row[1], as_array(image), tokens, (8, 4))
        for row, image, tokens in zip(panels(figure, columns=2), images, experts, strict=True)
    ]
    share = float(figure.axes[1].get_title().split("\n")[2].split("%")[0])
    assert share == pytest.approx(100 * sum(bright) / (2 * 48), rel=5e-3, abs=1e-6)


def test_predictions_are_the_models():
    names = {0: "plain", 1: "tabby, tabby cat", 2: "a $name$ of more than twenty-six letters"}
    model, processor, images = make_model(id2label=names), make_processor(), make_images(6)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
        inputs = processor(images, return_tensors="pt")["pixel_values"]
        expected = [model(inputs, capacity=c).logits.argmax(-1).tolist() for c in (0.2, 1.0)]
    figure = draw_routed_tokens(model, processor, images, [0.2, 1.0], predictions=True)
    short = {0: "plain", 1: "tabby", 2: "a $name$ of more than twe…"}
    labels = np.array([ax.get_xlabel() for ax in figure.axes]).reshape(6, 3)
    assert (labels[:, 0] == "").all()
    assert labels[:, 1].tolist() == [short[i] for i in expected[0]]
    assert labels[:, 2].tolist() == [short[i] for i in expected[1]]
    assert len(set(labels[:, 1:].flatten())) > 1
    figure.canvas.draw()

    plain = draw_routed_tokens(model, processor, images[:1], [0.2])
    assert not any(ax.get_xlabel() for ax in plain.axes)


def test_base_model_draws_the_same_tokens():
    images, processor = make_images(1), make_processor()
    model = make_model()
    drawn = [panels(draw_routed_tokens(m, processor, images, [0.5]), columns=2)[0][1] for m in (model, model.mone)]
    np.testing.assert_array_equal(*drawn)
    with pytest.raises(ValueError, match="MoNEModel"):
        draw_routed_tokens(make_model(MoNEModel), processor, images, [0.5], predictions=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, processor, images = make_model().to(dtype), make_processor(), make_images(1)
    (row,) = panels(draw_routed_tokens(model, processor, images, [0.5]), columns=2)
    np.testing.assert_allclose(row[0], as_array(images[0]), atol=1e-6)
    check_panel(row[1], as_array(images[0]), route(model, processor, images, 0.5)[0], (8, 4))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu():
    model, processor, images = make_model(), make_processor(), make_images(1)
    (row,) = panels(draw_routed_tokens(model, processor, images, [0.5]), columns=2)
    (moved,) = panels(draw_routed_tokens(model.cuda(), processor, images, [0.5]), columns=2)
    np.testing.assert_array_equal(moved[0], row[0])
    assert check_panel(moved[1], as_array(images[0]), route(model.cpu(), processor, images, 0.5)[0], (8, 4)) > 0


def test_model_is_left_as_it_was():
    model, processor, images = make_model(hidden_dropout_prob=0.9), make_processor(), make_images(1)
    in_eval = draw_routed_tokens(model, processor, images, [0.5])
    model.train()
    model.mone.layers[0].eval()  # frozen
    before = [module.training for module in model.modules()]
    seen = []
    handle = model.mone.layers[1].register_forward_hook(
        lambda module, args, output: seen.append((module.training, output.requires_grad))
    )
    in_train = draw_routed_tokens(model, processor, images, [0.5])
    handle.remove()
    assert seen == [(False, False)]
    assert [module.training for module in model.modules()] == before
    for ours, reference in zip(in_train.axes, in_eval.axes, strict=True):
        np.testing.assert_array_equal(ours.images[0].get_array(), reference.images[0].get_array())

    # Also where the model fails, here for images of another size.
    with pytest.raises(ValueError, match="Image size"):
        draw_routed_tokens(model, make_processor(size=(64, 40)), images, [0.5])
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_written_file_shows_the_panels(tmp_path):
    """The PNG itself: its size, and the colour in the middle of every patch of the last panel."""
    rng = np.random.default_rng(0)
    colours = rng.integers(60, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(colours.repeat(8, axis=0).repeat(8, axis=1))
    model, processor = make_model(patch_size=8), make_processor()
    path = tmp_path / "new" / "folder" / "tokens.png"
    figure = draw_routed_tokens(model, processor, [image], [0.3, 0.5], path)
    with Image.open(path) as written:
        assert written.format == "PNG"
        assert written.size == pytest.approx(tuple(figure.get_size_inches() * 150), abs=1)  # whole pixels
        written = np.asarray(written.convert("RGB")).astype(int)
    experts = route(model, processor, [image], 0.5)[0].reshape(4, 6)
    box = figure.axes[-1].get_window_extent()
    assert box.width == pytest.approx(300)
    assert box.height == pytest.approx(200)
    for row in range(4):
        for column in range(6):
            x = int(box.x0 + (column + 0.5) * box.width / 6)
            y = int(written.shape[0] - box.y1 + (row + 0.5) * box.height / 4)
            expected = 127.5 + (colours[row, column] - 127.5) * (1 if experts[row, column] == 3 else FADED)
            assert abs(written[y, x] - expected).max() <= 1


def test_text_stays_inside_the_figure_and_apart():
    """Long titles and labels, pictures of any shape."""
    names = dict.fromkeys(range(3), "American white-crowned sparrow of the north")
    for image_size in ((16, 48), (64, 16)):
        model, processor = make_model(image_size=image_size, id2label=names), make_processor(size=image_size)
        figure = draw_routed_tokens(model, processor, make_images(2), [0.2, (0.25,) * 4, 1.0], predictions=True)
        figure.canvas.draw()
        texts = [text for ax in figure.axes for text in (ax.title, ax.xaxis.label) if text.get_text()]
        boxes = [text.get_window_extent() for text in texts] + [ax.get_window_extent() for ax in figure.axes]
        for box in boxes:
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width
            assert 0 <= box.y0 < box.y1 <= figure.bbox.height
        overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        assert not overlaps


def test_drawing_refuses_wrong_arguments():
    model, processor, images = make_model(), make_processor(), make_images(1)
    with pytest.raises(ValueError, match="`images` is empty"):
        draw_routed_tokens(model, processor, [], [0.5])
    for capacities in ([], 0.5, "0.5"):
        with pytest.raises(ValueError, match="at least one capacity"):
            draw_routed_tokens(model, processor, images, capacities)
    for capacity in (0.1, 1.5, float("nan"), True, (0.5, 0.5), "0.5"):
        with pytest.raises(ValueError, match="Allowed are"):
            draw_routed_tokens(model, processor, images, [0.5, capacity])
    for router in (1, -2):
        with pytest.raises(ValueError, match="the model has 1"):
            draw_routed_tokens(model, processor, images, [0.5], router=router)
    four = make_model(num_channels=4)
    with pytest.raises(ValueError, match="Images of 4 channels"):
        processor = make_processor(do_normalize=False)
        draw_routed_tokens(four, processor, [np.zeros((32, 48, 4), np.uint8)], [0.5])
    vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(TypeError, match="The tokens of a MoNE are drawn, not of a 'vit' model"):
        draw_routed_tokens(vit, processor, images, [0.5])
    with pytest.raises(TypeError, match="MoNEViViTForVideoClassification: use draw_routed_video"):
        draw_routed_tokens(make_video_model(), processor, images, [0.5])


# --- routed video ---------------------------------------------------------------------------------------------------


def make_video_model(**kwargs):
    """3 temporal indices of 2 frames, each a grid of 4x6 patches."""
    torch.manual_seed(0)
    defaults = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_temporal_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": (16, 24),
        "tubelet_size": (2, 4, 4),
        "num_frames": 6,
        "num_labels": 3,
        "initializer_range": 0.5,
    }
    return MoNEViViTForVideoClassification(MoNEViViTConfig(**(defaults | kwargs))).eval()


def make_video_processor(size=(16, 24), num_frames=6, **kwargs):
    defaults = {
        "num_frames": num_frames,
        "size": {"height": size[0], "width": size[1]},
        "do_center_crop": False,
        "image_mean": MEAN,
        "image_std": STD,
    }
    return MoNEViViTVideoProcessor(**(defaults | kwargs))


def make_video(number=6, size=(16, 24)):
    """(frames, height, width, 3) uint8."""
    return np.stack([np.asarray(image) for image in make_images(number, size)])


def route_video(model, processor, video, capacity, router=0):
    """(T, N) experts, straight from the model."""
    with torch.no_grad():
        pixel_values = processor(video, return_tensors="pt")["pixel_values"]
        outputs = model(pixel_values, capacity=capacity, output_router_logits=True)
    return outputs.expert_indices[router][0].numpy()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_full_model_tubelets_keep_their_pixels(pooling):
    model, processor, video = make_video_model(pooling=pooling), make_video_processor(), make_video()
    capacities = [0.3, 0.7, (0.25, 0.25, 0.25, 0.25)]
    figure = draw_routed_video(model, processor, video, capacities)
    rows = panels(figure, columns=3)
    assert len(rows) == 4
    assert [ax.get_title() for ax in figure.axes] == ["frame 0", "frame 2", "frame 4"] + [""] * 9
    for time in range(3):
        np.testing.assert_allclose(rows[0][time], video[2 * time] / 255, atol=1e-6)
    for row, capacity in zip(rows[1:], capacities, strict=True):
        experts = route_video(model, processor, video, capacity)
        expected = tokens_per_expert(resolve_capacity(capacity), 24)[-1]
        assert 0 < expected < 24
        assert len({tuple(tokens) for tokens in experts}) == 3  # else exchanged columns would pass
        for time in range(3):
            assert check_panel(row[time], video[2 * time] / 255, experts[time], (4, 4)) == expected


@pytest.mark.parametrize(("columns", "frames"), [(1, [6]), (2, [2, 8]), (3, [2, 6, 10]), (8, [0, 2, 4, 6, 8, 10])])
def test_columns_are_spread_over_the_clip(columns, frames):
    model, processor, video = make_video_model(num_frames=12), make_video_processor(num_frames=12), make_video(12)
    figure = draw_routed_video(model, processor, video, [0.5], max_columns=columns)
    assert [ax.get_title() for ax in figure.axes[: len(frames)]] == [f"frame {frame}" for frame in frames]
    inputs, shown = panels(figure, columns=len(frames))
    experts = route_video(model, processor, video, 0.5)
    for column, frame in enumerate(frames):
        np.testing.assert_allclose(inputs[column], video[frame] / 255, atol=1e-6)
        assert check_panel(shown[column], video[frame] / 255, experts[frame // 2], (4, 4)) > 0


def test_row_titles_give_capacity_cost_of_the_clip_and_share():
    model, processor, video = make_video_model(), make_video_processor(), make_video()
    figure = draw_routed_video(model, processor, video, [0.4, (0.5, 0, 0, 0.5)])
    titles = [ax.get_ylabel() for ax in figure.axes]
    assert titles[0] == "model input"
    assert not any(title for number, title in enumerate(titles) if number % 3)
    capacity, gmacs, share = titles[3].split("\n")
    assert capacity == "capacity 0.4"
    assert float(gmacs.removesuffix(" GMACs")) == pytest.approx(count_macs(model.config, 0.4) / 1e9, rel=5e-3)
    tokens = tokens_per_expert(resolve_capacity(0.4), 24)[-1]
    assert float(share.removesuffix("% in full model")) == pytest.approx(100 * tokens / 24, rel=5e-3)
    assert titles[6].startswith("shares 0.5/0/0/0.5\n")
    assert titles[6].endswith("\n50% in full model")


def test_share_is_of_all_temporal_indices():
    """An arg-max router sends other numbers of tokens to the full model at each; not all of them are drawn."""
    model, processor = make_video_model(router_type="argmax"), make_video_processor()
    video = np.random.default_rng(0).integers(0, 256, (6, 16, 24, 3), dtype=np.uint8)
    experts = route_video(model, processor, video, 1.0)
    counts = (experts == 3).sum(-1)
    assert len(set(counts.tolist())) > 1
    figure = draw_routed_video(model, processor, video, [1.0], max_columns=1)
    share = float(figure.axes[1].get_ylabel().split("\n")[2].removesuffix("% in full model"))
    assert share == pytest.approx(100 * counts.sum() / 72, rel=5e-3)


def test_all_experts_of_a_video_have_levels_between():
    model, processor, video = make_video_model(), make_video_processor(), make_video()
    shown = panels(draw_routed_video(model, processor, video, [0.4], all_experts=True), columns=3)[1]
    experts = route_video(model, processor, video, 0.4).reshape(3, 4, 6)
    assert set(experts.flatten().tolist()) == {0, 1, 2, 3}
    levels = np.array([FADED, FADED + (1 - FADED) / 3, FADED + (1 - FADED) * 2 / 3, 1])
    for time in range(3):
        factor = np.kron(levels[experts[time]], np.ones((4, 4)))[..., None]
        np.testing.assert_allclose(shown[time], 0.5 + (video[2 * time] / 255 - 0.5) * factor, atol=1e-6)


def test_another_router_of_a_video():
    model, processor, video = make_video_model(router_layers=(0, 1)), make_video_processor(), make_video()
    decisions = [route_video(model, processor, video, 0.5, router) for router in (0, 1)]
    assert not (decisions[0] == decisions[1]).all()
    for router in (0, 1, -1):
        shown = panels(draw_routed_video(model, processor, video, [0.5], router=router), columns=3)[1]
        for time in range(3):
            check_panel(shown[time], video[2 * time] / 255, decisions[router][time], (4, 4))


def test_every_kind_of_video(tmp_path):
    model, path = make_video_model(), tmp_path / "video.mp4"
    write_video(path, make_video(), fps=8)
    with VideoReader(path) as reader:
        video = reader.read(range(6))
    reference = panels(draw_routed_video(model, make_video_processor(), video, [0.5]), columns=3)
    several = make_video_processor(num_clips=3)  # of which one is drawn
    images = [Image.fromarray(frame) for frame in video]
    for given in (path, str(path), path.read_bytes(), torch.tensor(video).permute(0, 3, 1, 2), list(video), images):
        shown = panels(draw_routed_video(model, several, given, [0.5]), columns=3)
        np.testing.assert_array_equal(shown, reference)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False, "image_mean": 127.5, "image_std": 127.5},
    ],
)
def test_video_is_shown_as_it_is_whatever_the_scaling(kwargs):
    video = make_video()
    shown = panels(draw_routed_video(make_video_model(), make_video_processor(**kwargs), video, [0.5]), columns=3)[0]
    np.testing.assert_allclose(shown, video[::2] / 255, atol=1e-5)


def test_grey_video(tmp_path):
    model = make_video_model(num_channels=1)
    processor = make_video_processor(do_convert_rgb=False, image_mean=0.5, image_std=0.5)
    video = make_video()[..., :1]
    inputs, shown = panels(draw_routed_video(model, processor, video, [0.5]), columns=3)
    experts = route_video(model, processor, video, 0.5)
    for time in range(3):
        original = np.repeat(video[2 * time] / 255, 3, axis=-1)
        np.testing.assert_allclose(inputs[time], original, atol=1e-6)
        assert check_panel(shown[time], original, experts[time], (4, 4)) > 0
    write_routed_video(model, processor, video, [0.5], tmp_path / "a.mp4")
    with VideoReader(tmp_path / "a.mp4") as reader:
        frame = reader.read([0])[0, -155::10, 5:240:10] / 255
    np.testing.assert_allclose(frame, np.repeat(video[0] / 255, 3, axis=-1), atol=0.1)


def test_another_frame_size(tmp_path):
    model, processor, video = make_video_model(), make_video_processor(size=(8, 32)), make_video(size=(8, 32))
    with pytest.raises(ValueError, match="interpolate_pos_encoding"):
        draw_routed_video(model, processor, video, [0.5])
    figure = draw_routed_video(model, processor, video, [0.5], interpolate_pos_encoding=True)
    bright = np.isclose(panels(figure, columns=3)[1][0], video[0] / 255).all(axis=-1).sum()
    assert bright == tokens_per_expert(resolve_capacity(0.5), 2 * 8)[-1] * 4 * 4
    write_routed_video(model, processor, video, [0.5], tmp_path / "a.mp4", interpolate_pos_encoding=True)
    assert (tmp_path / "a.mp4").exists()


def test_video_model_is_left_as_it_was(tmp_path):
    model, processor, video = make_video_model(hidden_dropout_prob=0.9), make_video_processor(), make_video()
    in_eval = panels(draw_routed_video(model, processor, video, [0.5]), columns=3)
    model.train()
    model.mone_vivit.spatial.layers[0].eval()  # frozen
    before = [module.training for module in model.modules()]
    in_train = panels(draw_routed_video(model, processor, video, [0.5]), columns=3)
    np.testing.assert_array_equal(in_train, in_eval)
    assert [module.training for module in model.modules()] == before
    write_routed_video(model, processor, video, [0.5], tmp_path / "a.mp4")
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("size", [(4, 48), (64, 16)])
def test_titles_of_a_video_stay_inside_the_figure_and_apart(size):
    model, processor = make_video_model(image_size=size), make_video_processor(size)
    for capacities in ([0.5, 1.0, (0.25,) * 4], [1.0]):
        figure = draw_routed_video(model, processor, make_video(size=size), capacities)
        figure.canvas.draw()
        texts = [text for ax in figure.axes for text in (ax.title, ax.yaxis.label) if text.get_text()]
        assert len(texts) == 3 + 1 + len(capacities)
        boxes = [item.get_window_extent() for item in (*texts, *figure.axes)]
        for box in boxes:
            assert 0 <= box.x0 < box.x1 <= figure.bbox.width
            assert 0 <= box.y0 < box.y1 <= figure.bbox.height
        assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        for ax in figure.axes:
            assert ax.get_window_extent().width / ax.get_window_extent().height == pytest.approx(size[1] / size[0])


def test_written_picture_of_a_video(tmp_path):
    path = tmp_path / "tokens.png"
    figure = draw_routed_video(make_video_model(), make_video_processor(), make_video(), [0.5], path)
    with Image.open(path) as written:
        assert written.format == "PNG"
        assert written.size == pytest.approx(tuple(figure.get_size_inches() * 150), abs=1)  # whole pixels


@pytest.mark.parametrize(
    ("size", "scale"),
    [((16, 24), 10), ((20, 36), 7), ((5, 33), 7), ((7, 225), 1)],  # the last two: odd heights and widths
)
def test_written_video_shows_every_frame(tmp_path, size, scale):
    patch = (size[0] // 4, size[1] // 3) if size[0] % 4 == 0 else (size[0], size[1] // 3)
    model = make_video_model(image_size=size, tubelet_size=(2, *patch))
    processor, path = make_video_processor(size), tmp_path / "tokens.mp4"
    # One colour for each patch and frame, which the encoder keeps nearly as it is.
    grid = (size[0] // patch[0], size[1] // patch[1])
    colours = np.random.default_rng(0).choice([0, 255], (6, *grid, 3)).astype(np.uint8)
    video = colours.repeat(patch[0], axis=1).repeat(patch[1], axis=2)
    capacities = [(0.5, 0, 0, 0.5), 1.0]
    write_routed_video(model, processor, video, capacities, path, fps=5)
    with VideoReader(path) as reader:
        assert len(reader) == 6
        frames = reader.read(range(6)).astype(int)
    with av.open(path) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 5
    height, width = size[0] * scale, size[1] * scale
    full_width = 3 * width + 2 * VIDEO_GAP
    assert frames.shape[2] == full_width + full_width % 2
    top = frames.shape[1] - height
    assert (frames[:, 0] > 250).all()  # above the titles
    assert (frames[:, :top, :width] < 100).any()

    experts = route_video(model, processor, video, capacities[0]).reshape(3, *grid)
    assert {0, 3} == set(experts.flatten().tolist())
    for frame in range(6):
        for row in range(grid[0]):
            for column in range(grid[1]):
                y = top + int((row + 0.5) * patch[0] * scale)
                x = int((column + 0.5) * patch[1] * scale)
                original = colours[frame, row, column]
                faded = original if experts[frame // 2, row, column] == 3 else 127.5 + FADED * (original - 127.5)
                for panel, expected in enumerate((original, faded, original)):
                    shown = frames[frame, y, x + panel * (width + VIDEO_GAP)]
                    assert abs(shown - expected).max() < 25, (frame, row, column, panel)


def test_router_and_experts_of_a_written_video(tmp_path):
    """The options of the picture reach the video too."""
    model, processor, video = make_video_model(router_layers=(0, 1)), make_video_processor(), make_video()
    written = []
    for number, kwargs in enumerate(({}, {"router": 1}, {"all_experts": True})):
        path = tmp_path / f"{number}.mp4"
        write_routed_video(model, processor, video, [0.4], path, **kwargs)
        with VideoReader(path) as reader:
            frame = reader.read([0])[0, -160::10, -240::10] / 255
        expected = panels(draw_routed_video(model, processor, video, [0.4], **kwargs), columns=3)[1][0]
        written.append((frame, expected))
    # Which of the pictures a frame shows.
    for number, (frame, _) in enumerate(written):
        distances = [abs(frame - expected).mean() for _, expected in written]
        assert np.argmin(distances) == number


def test_video_functions_refuse_wrong_arguments(tmp_path):
    model, processor, video = make_video_model(), make_video_processor(), make_video()

    def write(*args, **kwargs):
        write_routed_video(*args, tmp_path / "a.mp4", **kwargs)

    for draw in (draw_routed_video, write):
        for capacities in ([], 0.5, "0.5"):
            with pytest.raises(ValueError, match="at least one capacity"):
                draw(model, processor, video, capacities)
        with pytest.raises(ValueError, match="Allowed are"):
            draw(model, processor, video, [0.5, 1.5])
        for router in (1, -2):
            with pytest.raises(ValueError, match="the model has 1"):
                draw(model, processor, video, [0.5], router=router)
        with pytest.raises(TypeError, match="MoNEForImageClassification: use draw_routed_tokens"):
            draw(make_model(), processor, video, [0.5])
        with pytest.raises(ValueError, match="4 axes"):
            draw(model, processor, np.stack([video, video]), [0.5])
        with pytest.raises(TypeError, match="got str"):
            draw(model, processor, ["a.mp4", "b.mp4"], [0.5])
        with pytest.raises(ValueError, match="pixel_values"):
            draw(model, make_video_processor(num_frames=4), video, [0.5])
    for columns in (0, 2.5, True):
        with pytest.raises(ValueError, match=r"max_columns=.* must be an integer of at least 1"):
            draw_routed_video(model, processor, video, [0.5], max_columns=columns)
    assert not list(tmp_path.iterdir())


def test_destination_is_checked_before_the_video_is_read(tmp_path):
    model, processor = make_video_model(), make_video_processor()
    with pytest.raises(ValueError, match=r"must end in \.mp4"):
        write_routed_video(model, processor, "missing", [0.5], tmp_path / "a.gif")
    with pytest.raises(ValueError, match="fps=0"):
        write_routed_video(model, processor, "missing", [0.5], tmp_path / "a.mp4", fps=0)
    with pytest.raises(FileNotFoundError, match="no folder"):
        write_routed_video(model, processor, "missing", [0.5], tmp_path / "b" / "a.mp4")


# --- matplotlib -----------------------------------------------------------------------------------------------------


def test_pyplot_is_not_used(without_pyplot, tmp_path):
    draw_routed_tokens(make_model(), make_processor(), make_images(1), [0.5], tmp_path / "tokens.png")
    draw_routed_video(make_video_model(), make_video_processor(), make_video(), [0.5], tmp_path / "video.png")
    write_routed_video(make_video_model(), make_video_processor(), make_video(), [0.5], tmp_path / "video.mp4")


def test_missing_matplotlib_is_explained(without_matplotlib):
    importlib.reload(sys.modules["mone.visualization"])  # still imports
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_routed_tokens(make_model(), make_processor(), make_images(1), [0.5])
