"""The video processor against torchvision's transforms; how it samples is tested in test_video_decoding.py."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import AutoVideoProcessor, PreTrainedConfig
from videos import REAL, needs_real_videos

from mone.video_decoding import VideoDecodeError, VideoReader, clip_indices, uniform_indices
from mone.video_processing_mone import MoNEViViTVideoProcessor


SMALL = {"num_frames": 4, "frame_sampling_rate": 3, "size": {"shortest_edge": 32}, "crop_size": 24}


def make_frames(number=40, height=48, width=80, seed=0) -> np.ndarray:
    """(frames, height, width, 3) uint8: smooth images that move."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 256, (6, 10, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(small).resize((width + number, height), Image.Resampling.BICUBIC))
    return np.stack([image[:, shift : shift + width] for shift in range(number)])


def encode(frames, container="matroska", codec="ffv1", pixels="bgr0", **options) -> bytes:
    """Without loss by default."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        for frame in frames:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode())
    return file.getvalue()


@pytest.fixture(scope="module")
def frames():
    return make_frames()


@pytest.fixture(scope="module")
def file(frames):
    data = encode(frames)
    with VideoReader(data) as video:
        np.testing.assert_array_equal(video.read(np.arange(len(video))), frames)
    return data


@pytest.fixture
def processor():
    return MoNEViViTVideoProcessor(**SMALL)


def reference(frames, size, crop, mean=0.5, std=0.5) -> torch.Tensor:
    """(frames, height, width, 3) uint8 -> pixel_values, by torchvision's own transforms."""
    values = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    values = v2.Resize(size, interpolation=v2.InterpolationMode.BILINEAR, antialias=True)(values)
    height, width = v2.CenterCrop(crop).size
    # An odd margin: transformers and TensorFlow, and so Scenic, leave the smaller half in front; torchvision rounds
    # to even.
    top, left = max(0, values.shape[-2] - height) // 2, max(0, values.shape[-1] - width) // 2
    values = v2.CenterCrop(crop)(values[..., top : top + height, left : left + width])
    values = v2.ToDtype(torch.float32, scale=True)(values)
    return v2.Normalize([mean] * 3, [std] * 3)(values)


# ---- what comes out ----


def test_defaults_are_those_of_vivit_on_kinetics():
    processor = MoNEViViTVideoProcessor()
    frames = make_frames(100, 64, 120)
    out = processor(frames, return_tensors="pt")
    assert list(out) == ["pixel_values"] == processor.model_input_names
    assert out["pixel_values"].shape == (1, 32, 3, 224, 224) and out["pixel_values"].dtype == torch.float32
    wanted = frames[np.arange(18, 82, 2)]
    torch.testing.assert_close(out["pixel_values"][0], reference(wanted, 256, 224), atol=1e-5, rtol=0)


@pytest.mark.parametrize("height, width", [(48, 80), (80, 48), (33, 57), (32, 32), (20, 100)])
@pytest.mark.parametrize("size, crop", [(32, 24), (40, (36, 28)), (24, 24), (16, 32)])
def test_parity_with_torchvision(height, width, size, crop):
    frames = make_frames(6, height, width)
    options = {
        "size": size,
        "crop_size": {"height": v2.CenterCrop(crop).size[0], "width": v2.CenterCrop(crop).size[1]},
    }
    processor = MoNEViViTVideoProcessor(num_frames=6, **options)
    for video in (frames, encode(frames)):
        out = processor(video, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(out, reference(frames, size, crop), atol=1e-5, rtol=0)


def test_range_is_minus_one_to_one(processor):
    frames = np.zeros((4, 32, 32, 3), np.uint8)
    frames[:, 16:] = 255
    values = processor(frames, return_tensors="pt").pixel_values
    assert values.min() == -1 and values.max() == 1


def test_flags_switch_steps_off(frames):
    processor = MoNEViViTVideoProcessor(num_frames=40)
    off = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
    raw = torch.from_numpy(frames).permute(0, 3, 1, 2)
    assert torch.equal(processor(frames, return_tensors="pt", **off).pixel_values[0], raw)
    rescaled = processor(frames, return_tensors="pt", **{**off, "do_rescale": True}).pixel_values[0]
    torch.testing.assert_close(rescaled, raw / 255)
    cropped = processor(frames, return_tensors="pt", **{**off, "do_center_crop": True}, crop_size=20).pixel_values[0]
    assert torch.equal(cropped, raw[..., 14:34, 30:50])
    resized = processor(frames, return_tensors="pt", **{**off, "do_resize": True}, size={"height": 9, "width": 7})
    assert resized.pixel_values.shape == (1, 40, 3, 9, 7) and resized.pixel_values.dtype == torch.uint8
    mean = processor(frames, return_tensors="pt", image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 2.0, 4.0]).pixel_values
    base = processor(frames, return_tensors="pt", image_mean=[0.0] * 3, image_std=[1.0] * 3).pixel_values
    shift, scale = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1)
    torch.testing.assert_close(mean, (base - shift) / scale)


# ---- sampling and clips ----


def test_sampling(frames, processor):
    def taken(**options):
        out = processor(frames, return_tensors="pt", **options).pixel_values
        return out, lambda indices: reference(frames, 32, 24)[torch.from_numpy(np.asarray(indices))]

    out, expected = taken()
    torch.testing.assert_close(out[0], expected([14, 17, 20, 23]))
    out, expected = taken(sampling="uniform", num_frames=5)
    torch.testing.assert_close(out[0], expected(uniform_indices(40, 5)))
    out, expected = taken(num_clips=3)
    assert out.shape == (1, 3, 4, 3, 24, 24)
    torch.testing.assert_close(out[0], expected(clip_indices(40, 3, 4, 3)))
    out, expected = taken(do_sample_frames=False)
    torch.testing.assert_close(out[0], expected(np.arange(40)))


@pytest.mark.parametrize("options", [{}, {"sampling": "uniform"}, {"num_clips": 4}, {"do_sample_frames": False}])
def test_files_and_frames_agree_exactly(frames, file, processor, options):
    from_file = processor(file, return_tensors="pt", **options).pixel_values
    assert torch.equal(from_file, processor(frames, return_tensors="pt", **options).pixel_values)


def test_frames_that_are_sampled_already_stay_as_they_are(frames):
    processor = MoNEViViTVideoProcessor(num_frames=32, frame_sampling_rate=2, size=32, crop_size=24)
    out = processor(list(frames[:32]), return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(out, reference(frames[:32], 32, 24))


@pytest.mark.parametrize("as_file", [False, True])
def test_a_video_of_three_frames_repeats_the_last(frames, processor, as_file):
    video = encode(frames[:3]) if as_file else frames[:3]
    out = processor(video, return_tensors="pt", num_frames=6).pixel_values[0]
    torch.testing.assert_close(out, reference(frames[[0, 1, 2, 2, 2, 2]], 32, 24))
    assert processor(video, return_tensors="pt", num_frames=6, num_clips=8).pixel_values.shape[:3] == (1, 8, 6)


def test_logits_average_over_clips(frames, processor):
    """The convention of the class's example: clips are a second batch axis."""
    values = processor([frames, frames[::-1]], num_clips=5, return_tensors="pt").pixel_values
    assert values.shape == (2, 5, 4, 3, 24, 24)
    logits = values.flatten(0, 1).mean((1, 3, 4)).unflatten(0, values.shape[:2]).mean(1)
    assert logits.shape == (2, 3)
    torch.testing.assert_close(logits[0], processor(frames, num_clips=5)["pixel_values"][0].mean((0, 1, 3, 4)))


# ---- what goes in ----


def kinds_of(frames, file, folder) -> dict:
    path = folder / "clip.mkv"
    path.write_bytes(file)
    tensor = torch.from_numpy(frames)
    return {
        "path": path,
        "str": str(path),
        "bytes": file,
        "bytearray": bytearray(file),
        "file object": io.BytesIO(file),
        "array, channels last": frames,
        "array, channels first": frames.transpose(0, 3, 1, 2),
        "tensor, channels last": tensor,
        "tensor, channels first": tensor.permute(0, 3, 1, 2),
        "read-only array": np.frombuffer(frames.tobytes(), np.uint8).reshape(frames.shape),
        "array of int64": frames.astype(np.int64),
        "array of uint16": frames.astype(np.uint16),
        "list of arrays": list(frames),
        "list of channels-first arrays": list(frames.transpose(0, 3, 1, 2)),
        "tuple of tensors": tuple(tensor),
        "list of images": [Image.fromarray(frame) for frame in frames],
        "list of RGBA images": [Image.fromarray(frame).convert("RGBA") for frame in frames],
    }


def test_all_kinds_of_input_agree(frames, file, processor, tmp_path):
    expected = processor(frames, return_tensors="pt").pixel_values
    for name, video in kinds_of(frames, file, tmp_path).items():
        assert torch.equal(processor(video, return_tensors="pt").pixel_values, expected), name


def test_floats_up_to_1_are_asked_about(frames, processor, caplog):
    processor(frames.astype(np.float32), return_tensors="pt")
    processor(frames.astype(np.float32) / 255, return_tensors="pt", do_rescale=False)
    assert "floats of at most 1" not in caplog.text
    processor(frames.astype(np.float32) / 255, return_tensors="pt")
    assert "multiply them by 255, or pass do_rescale=False" in caplog.text


def test_floating_pixels(frames, processor):
    expected = processor(frames, return_tensors="pt").pixel_values
    for dtype in (np.float32, np.float64, np.float16):
        given = frames.astype(dtype)
        before = given.copy()
        out = processor(given, return_tensors="pt").pixel_values
        assert out.dtype == torch.float32
        torch.testing.assert_close(out, expected, atol=1 / 127, rtol=0)  # rounded after resizing or not
        np.testing.assert_array_equal(given, before)
    out = processor(frames.astype(np.float32) / 255, return_tensors="pt", do_rescale=False).pixel_values
    torch.testing.assert_close(out, expected, atol=1 / 127, rtol=0)


def test_input_is_left_alone(frames, processor):
    for given in (torch.rand(4, 3, 24, 24), torch.randint(256, (4, 3, 24, 24), dtype=torch.uint8)):
        before = given.clone()
        processor(given, do_resize=False, do_center_crop=False)
        assert torch.equal(given, before)


def test_grey(frames, processor):
    grey = frames[..., :1]
    expected = processor(grey.repeat(3, -1), return_tensors="pt").pixel_values
    assert torch.equal(processor(grey, return_tensors="pt").pixel_values, expected)
    images = [Image.fromarray(frame[..., 0]) for frame in grey]
    assert torch.equal(processor(images, return_tensors="pt").pixel_values, expected)
    options = {"do_convert_rgb": False, "do_normalize": False, "return_tensors": "pt"}
    for video in (grey, images):
        assert processor(video, **options).pixel_values.shape == (1, 4, 1, 24, 24)


def test_batches(frames, file, processor, tmp_path):
    others = make_frames(seed=1), make_frames(60, 40, 44, seed=2)
    videos = [frames, *others]
    expected = torch.cat([processor(video, return_tensors="pt").pixel_values for video in videos])
    assert expected.shape[0] == 3
    assert torch.equal(processor(videos, return_tensors="pt").pixel_values, expected)
    mixed = [file, [Image.fromarray(frame) for frame in others[0]], torch.from_numpy(others[1])]
    assert torch.equal(processor(mixed, return_tensors="pt").pixel_values, expected)
    five_axes = np.stack([frames, others[0]])
    for batch in (five_axes, torch.from_numpy(five_axes), tuple(five_axes)):
        assert torch.equal(processor(batch, return_tensors="pt").pixel_values, expected[:2])
    assert torch.equal(processor([file], return_tensors="pt").pixel_values, expected[:1])


def test_layouts_are_told_for_each_video(frames, processor):
    out = processor([frames, frames.transpose(0, 3, 1, 2)], return_tensors="pt").pixel_values
    assert torch.equal(out[0], out[1])


def test_given_layout(processor):
    narrow = np.random.default_rng(0).integers(0, 256, (4, 3, 50, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="pass input_data_format='channels_first' or 'channels_last'"):
        processor(narrow)
    last = processor(narrow, input_data_format="channels_last", return_tensors="pt").pixel_values
    first = processor(narrow, input_data_format="channels_first", return_tensors="pt").pixel_values
    assert not torch.equal(last, first)
    expected = processor(narrow.transpose(0, 2, 1, 3), input_data_format="channels_last", size=(32, 32))
    assert expected["pixel_values"][0].shape == (4, 3, 24, 24)


def test_return_types(frames, processor):
    as_list = processor([frames, frames])["pixel_values"]
    assert isinstance(as_list, list) and as_list[0].shape == (4, 3, 24, 24)
    as_numpy = processor([frames, frames], return_tensors="np")["pixel_values"]
    assert isinstance(as_numpy, np.ndarray) and as_numpy.shape == (2, 4, 3, 24, 24)
    assert torch.equal(torch.stack(as_list), torch.from_numpy(as_numpy))
    assert torch.equal(processor(frames, device="cpu")["pixel_values"][0], as_list[0])


def test_videos_of_different_lengths_unsampled(frames, processor):
    videos, options = [frames, frames[:7]], {"do_sample_frames": False}
    assert [len(video) for video in processor(videos, **options)["pixel_values"]] == [40, 7]
    with pytest.raises(ValueError, match="different shapes"):
        processor(videos, return_tensors="pt", **options)


# ---- files ----


class Handler(BaseHTTPRequestHandler):
    content = {}

    def do_GET(self):
        if self.path == "/moved.mkv":
            self.send_response(302)
            self.send_header("Location", "/clip.mkv")
        elif self.path in self.content:
            self.send_response(200)
        else:
            self.send_response(404)
        body = self.content.get(self.path, b"")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(file):
    Handler.content = {"/clip.mkv": file, "/text.mp4": b"no video " * 100}
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_url(frames, processor, server):
    expected = processor(frames, return_tensors="pt").pixel_values
    for name in ("clip.mkv", "moved.mkv"):
        assert torch.equal(processor(f"{server}/{name}", return_tensors="pt").pixel_values, expected)
    with pytest.raises(VideoDecodeError, match=rf"{server}/missing\.mkv: could not be downloaded .*404"):
        processor(f"{server}/missing.mkv")
    with pytest.raises(VideoDecodeError, match=rf"{server}/text\.mp4: not a video"):
        processor(f"{server}/text.mp4")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/clip.mp4", "http:///clip.mp4", "https://"])
def test_url_without_a_server(processor, url):
    with pytest.raises(VideoDecodeError, match=rf"{url}: could not be downloaded"):
        processor(url)


def test_bad_files_are_named(processor, tmp_path, file):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(file[:100])
    for name in (str(bad), str(tmp_path / "missing.mp4")):
        with pytest.raises(VideoDecodeError, match=name):
            processor([file, name])


def test_frames_are_made_small_as_they_are_decoded(processor, monkeypatch):
    """Of a large video, no more than one frame is held at full size."""
    data = encode(make_frames(12, 480, 640))
    shapes = []
    read = VideoReader.read

    def spy(self, indices, transform):
        images = read(self, indices, transform)
        shapes.append(images.shape)
        return images

    monkeypatch.setattr(VideoReader, "read", spy)
    processor(data, num_clips=2)
    assert shapes == [(2, 4, 3, 24, 24)]


# ---- errors ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_frames": 0}, "num_frames=0 must be an integer of at least 1"),
        ({"num_frames": -3}, "num_frames=-3"),
        ({"num_frames": 2.5}, "2.5"),
        ({"num_frames": True}, "True"),
        ({"frame_sampling_rate": 0}, "frame_sampling_rate=0"),
        ({"num_clips": 0}, "num_clips=0"),
        ({"num_clips": 2, "sampling": "uniform"}, "num_clips=2 must be 1 unless"),
        ({"num_clips": 2, "do_sample_frames": False}, "num_clips=2 must be 1 unless"),
        ({"sampling": "random"}, "sampling='random' must be one of"),
        ({"size": {"shortest_edge": 0}}, "size=.* must hold lengths of at least 1"),
        ({"size": {"shortest": 4}}, "size"),
        ({"crop_size": -4}, "crop_size=.* must hold lengths of at least 1"),
        ({"do_resize": "yes"}, "yes"),
        ({"image_mean": "half"}, "half"),
        ({"return_tensors": "tf"}, "tf is not a valid TensorType"),
    ],
)
def test_options_that_are_not_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        MoNEViViTVideoProcessor(**options)
    with pytest.raises(ValueError, match=message):
        MoNEViViTVideoProcessor()("a file that is not looked at.mp4", **options)


def test_clips_of_evaluations_are_not_those_of_a_call(frames):
    processor = MoNEViViTVideoProcessor(evaluation_clips=3, num_frames=4)
    assert processor.clips_to_average == 3
    assert processor(frames, return_tensors="pt").pixel_values.dim() == 5, "what a model takes"
    for options in ({"sampling": "uniform"}, {"do_sample_frames": False}):
        assert MoNEViViTVideoProcessor(**options).clips_to_average == 1
    with pytest.raises(TypeError, match="evaluation_clips is for pipelines and evaluations; a call takes num_clips"):
        processor(frames, evaluation_clips=2)
    with pytest.raises(ValueError, match="evaluation_clips=0 must be an integer of at least 1"):
        MoNEViViTVideoProcessor(evaluation_clips=0)


@pytest.mark.parametrize("name", ["num_frame", "fps", "capasity", "do_pad", "video_metadata", "data_format"])
def test_unknown_options(frames, processor, name):
    with pytest.raises(TypeError, match=f"unknown option {name}. Allowed are do_sample_frames"):
        MoNEViViTVideoProcessor(**{name: 1})
    with pytest.raises(TypeError, match=f"unknown option {name}. Allowed are do_sample_frames"):
        processor(frames, **{name: 1})


@pytest.mark.parametrize(
    "video, error, message",
    [
        (np.zeros((8, 8, 3), np.uint8), ValueError, r"must have 4 axes .* or 5 .*, got shape \(8, 8, 3\)"),
        (np.zeros((1, 1, 4, 8, 8, 3), np.uint8), ValueError, "must have 4 axes"),
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, r"videos\[0\] must have at least one frame"),
        (np.zeros((0, 4, 8, 8, 3), np.uint8), ValueError, "at least one video or frame"),
        (np.zeros((4, 0, 8, 3), np.uint8), ValueError, r"got shapes \[\(0, 8, 3\)\]"),
        (np.zeros((4, 8, 8, 4), np.uint8), ValueError, "1 or 3 channels"),
        (np.zeros((4, 8, 8, 2), np.uint8), ValueError, "1 or 3 channels"),
        (np.zeros((4, 8, 8, 3), bool), ValueError, "integer or floating pixels, got bool"),
        (np.zeros((4, 8, 8, 3), complex), ValueError, "integer or floating pixels, got complex128"),
        (np.full((4, 8, 8, 3), 256), ValueError, r"whole pixels must lie in \[0, 255\], got 256 to 256"),
        (np.full((4, 8, 8, 3), -1), ValueError, r"whole pixels must lie in \[0, 255\]"),
        ([], ValueError, "at least one video or frame"),
        ([[]], ValueError, r"videos\[0\] must have at least one frame"),
        (Image.new("RGB", (8, 8)), ValueError, r"\[image\] is a video of one frame"),
        ([np.zeros((8, 8, 3)), np.zeros((8, 9, 3))], ValueError, "frames of one size"),
        ([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], ValueError, "frames of one size"),
        ([np.zeros((8, 8))] * 2, ValueError, "each with three axes"),
        (
            [Image.fromarray(np.full((8, 8), 999, np.uint16))],
            ValueError,
            "mode 'I;16', grey levels of more than 8 bits",
        ),
        ([Image.new("I", (8, 8))] * 2, ValueError, "mode 'I', grey levels of more than 8 bits"),
        ([Image.new("F", (8, 8))] * 2, ValueError, "mode 'F', grey levels of more than 8 bits"),
        ([Image.new("RGB", (8, 8)), np.zeros((8, 8, 3))], TypeError, "must hold PIL images or arrays"),
        ([["frame1.jpg", "frame2.jpg"]], TypeError, r"videos\[0\] must hold PIL images .* got str"),
        ([np.zeros((4, 8, 8, 3)), 3], TypeError, r"videos\[1\] must be a file, an array or a list of frames"),
        (None, TypeError, "videos must be a file"),
        (3, TypeError, "videos must be a file"),
        ({"videos": 3}, TypeError, "videos must be a file"),
    ],
)
def test_input_that_is_no_video(processor, video, error, message):
    with pytest.raises(error, match=message):
        processor(video)


def test_bad_input_is_found_before_any_file_is_decoded(processor, monkeypatch):
    monkeypatch.setattr(VideoReader, "__init__", lambda *arguments, **options: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"videos\[1\] must have 4 axes"):
        processor(["a.mp4", np.zeros((8, 3))])


def test_layout_that_does_not_fit(frames, processor):
    with pytest.raises(ValueError, match="with channels_first"):
        processor(frames, input_data_format="channels_first")
    with pytest.raises(ValueError, match="channels_middle"):
        processor(frames, input_data_format="channels_middle")


# ---- saving and loading ----

OPTIONS = {**SMALL, "sampling": "dense", "num_clips": 2, "image_mean": [0.4, 0.5, 0.6], "do_convert_rgb": False}


def test_options_of_a_call_do_not_stay(frames, processor):
    before = processor.to_dict()
    processor(frames, num_frames=2, size=40, sampling="uniform", num_clips=1)
    assert processor.to_dict() == before
    default = processor(frames)["pixel_values"][0]
    assert torch.equal(processor(frames, num_frames=None, size=None)["pixel_values"][0], default)


def test_save_and_load(frames, tmp_path):
    processor = MoNEViViTVideoProcessor(**OPTIONS)
    processor.save_pretrained(tmp_path)
    loaded = MoNEViViTVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.num_clips == 2 and loaded.sampling == "dense" and loaded.num_frames == 4
    saved, again = (item(frames, return_tensors="pt").pixel_values for item in (processor, loaded))
    assert torch.equal(saved, again)
    assert MoNEViViTVideoProcessor.from_pretrained(tmp_path, num_frames=3).num_frames == 3
    written = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert written["video_processor_type"] == "MoNEViViTVideoProcessor" and written["frame_sampling_rate"] == 3


def test_auto_class_with_the_package(tmp_path):
    class SomeVideoConfig(PreTrainedConfig):
        model_type = "video_processor_test"

    AutoVideoProcessor.register(SomeVideoConfig, MoNEViViTVideoProcessor, exist_ok=True)
    MoNEViViTVideoProcessor(**OPTIONS).save_pretrained(tmp_path)
    loaded = AutoVideoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is MoNEViViTVideoProcessor and loaded.num_clips == 2


@needs_real_videos
def test_real_files():
    values = MoNEViViTVideoProcessor(num_clips=2)(REAL, return_tensors="pt").pixel_values
    assert values.shape == (len(REAL), 2, 32, 3, 224, 224)
    assert values.min() >= -1 and values.max() <= 1 and values.std() > 0.1
