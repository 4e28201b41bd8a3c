"""What the frames of the motion classes show."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_images


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from motion import CLASSES, PAIRS, render_clip


@pytest.fixture(scope="module")
def photographs():
    """Two parts of one of scikit-learn's photographs."""
    photograph = load_sample_images().images[0]
    return [Image.fromarray(photograph[:134, left : left + 160]) for left in (0, 160)]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(("frames", "size"), [(16, 32), (5, 64), (2, 16)])
def test_the_classes_of_a_pair_are_each_others_time_reversal(photographs, pair, frames, size):
    first, second = (render_clip(*photographs, name, rng(3), frames=frames, size=size).astype(int) for name in pair)
    assert first.shape == (frames, size, size, 3)
    np.testing.assert_array_equal(first[::-1], second)
    assert not np.array_equal(first, second)


def test_the_draw_decides_all(photographs):
    clips = [render_clip(*photographs, "left", rng(seed)) for seed in (0, 0, 1)]
    assert clips[0].dtype == np.uint8
    np.testing.assert_array_equal(clips[0], clips[1])
    assert not np.array_equal(clips[0], clips[2])


def test_many_frames_are_rendered_in_parts_without_a_seam(photographs):
    size, frames = 512, 6  # four frames at a time
    clip = render_clip(*photographs, "rotate_clockwise", rng(), frames=frames, size=size).astype(int)
    changes = np.abs(np.diff(clip, axis=0)).mean(axis=(1, 2, 3))
    assert clip.shape == (frames, size, size, 3)
    assert changes.max() < 1.5 * changes.min()


def test_a_frame_does_not_tell_the_pair(photographs):
    """The frame where a clip starts is the same in all pairs, and the later ones are as that one in distribution."""
    starts = [render_clip(*photographs, pair[0], rng(5))[0] for pair in PAIRS]
    for start in starts[1:]:
        np.testing.assert_array_equal(starts[0], start)

    white, black = Image.new("RGB", (9, 9), "white"), Image.new("RGB", (9, 9))
    for name, _ in PAIRS:
        clips = np.stack([render_clip(white, black, name, rng(seed), frames=9, size=16) for seed in range(1000)])
        for values in np.moveaxis(track(clips[..., 0]), -1, 0):  # x, y and area
            for later in (4, 8):
                assert ks_2samp(values[:, 0], values[:, later], method="asymp").pvalue > 0.01, (name, later)


def track(frames):
    """(..., H, W) -> (..., 3): circular means of x and y, as the frame is a torus, and the area."""
    frames = frames.astype(float)
    size = frames.shape[-1]
    wave = np.exp(2j * np.pi * (np.arange(size) + 0.5) / size)
    x, y = ((frames.sum(axis) @ wave) for axis in (-2, -1))
    x, y = (np.angle(position) / (2 * np.pi) % 1 for position in (x, y))
    return np.stack([x, y, frames.sum((-2, -1)) / 255], -1)


def circular_steps(values):
    return (np.diff(values) + 0.5) % 1 - 0.5


@pytest.mark.parametrize("name", CLASSES)
def test_the_motion_is_what_the_class_says(name):
    """A bright square over black, of which one half is red and the other half is blue."""
    halves = np.zeros((40, 40, 3), np.uint8)
    halves[:, :20, 0] = halves[:, 20:, 2] = 255
    black = Image.new("RGB", (40, 40))
    sign = 1 if name in ("right", "down", "approach", "rotate_clockwise") else -1
    for seed in range(20):
        clip = render_clip(Image.fromarray(halves), black, name, rng(seed), size=96)
        x, y, area = track(clip.sum(-1)).T
        red, blue = track(clip[..., 0]), track(clip[..., 2])
        # From the red half to the blue half, with y downwards as on a screen: a growing angle is clockwise.
        to_blue = (blue - red + 0.5) % 1 - 0.5
        angle = np.arctan2(to_blue[:, 1], to_blue[:, 0]) / (2 * np.pi)
        steps = {
            "x": circular_steps(x),
            "y": circular_steps(y),
            "size": np.diff(np.sqrt(area)) / 96,
            "angle": circular_steps(angle),
        }
        moving = ("x", "y", "size", "angle")[CLASSES.index(name) // 2]
        for kind, step in steps.items():
            if kind != moving:
                tolerance = 0.1 if kind == "size" or moving == "size" else 0.03
                assert np.abs(step).max() < tolerance, (seed, kind)
        step = sign * steps[moving]
        if moving == "size":  # once at most it comes again from afar
            assert (step < 0).sum() <= 1, seed
            step = np.delete(step, step.argmin())
        assert (step > 0).all(), (seed, moving)


def test_an_unknown_class_is_refused(photographs):
    with pytest.raises(ValueError, match="The class is 'sideways'; allowed are right, left"):
        render_clip(*photographs, "sideways", rng())
