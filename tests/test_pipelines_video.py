"""`pipeline("video-classification")` with a MoNE model, and with any other."""

import functools
import http.server
import io
import random
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import VivitConfig, VivitForVideoClassification, VivitImageProcessor, pipeline
from transformers.pipelines.video_classification import VideoClassificationPipeline
from videos import REAL_FOLDER, audio_only, make_ten_minutes, plain, remux, run_and_read_peaks, transcode

from mone import MoNEViViTConfig, MoNEViViTForVideoClassification, MoNEViViTVideoProcessor
from mone.pipelines import MoNEVideoClassificationPipeline
from mone.video_decoding import VideoDecodeError, VideoReader


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from make_motion_clips import encode_clip


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = MoNEViViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_temporal_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        tubelet_size=(2, 8, 8),
        num_frames=4,
        num_labels=6,
        initializer_range=0.3,
    )
    MoNEViViTForVideoClassification(config).save_pretrained(folder)
    MoNEViViTVideoProcessor(num_frames=4, size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three files of 20 different frames, in two containers."""
    folder = tmp_path_factory.mktemp("videos")
    paths = []
    for number, suffix in enumerate(("mp4", "webm", "mp4")):
        frames = np.random.default_rng(number).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        paths.append(str(folder / f"{number}.{suffix}"))
        encode_clip(Path(paths[-1]), frames, fps=8)
    return paths


def scores(result):
    return {row["label"]: row["score"] for row in result}


def expected(pipe, video, capacity, **options):
    """Softmax of the logits, averaged over clips, straight from the model."""
    pixels = pipe.video_processor(video, return_tensors="pt", **options).pixel_values
    with torch.no_grad():
        logits = pipe.model(pixels.flatten(0, -5), capacity=capacity).logits.mean(0)
    return {f"LABEL_{i}": p for i, p in enumerate(logits.softmax(-1).tolist())}


def test_capacity_at_construction_and_per_call(model_folder, videos):
    pipe = pipeline("video-classification", model=model_folder, capacity=0.4)
    assert isinstance(pipe, MoNEVideoClassificationPipeline)
    assert scores(pipe(videos[0], top_k=6)) == pytest.approx(expected(pipe, videos[0], 0.4, num_clips=8), abs=1e-5)
    at_less = scores(pipe(videos[0], top_k=6, capacity=0.2))
    assert at_less == pytest.approx(expected(pipe, videos[0], 0.2, num_clips=8), abs=1e-5)
    assert expected(pipe, videos[0], 0.2) != pytest.approx(expected(pipe, videos[0], 0.4), abs=1e-3)


def test_the_papers_clips_unless_the_processor_has_others(model_folder, videos):
    results = []
    for settings, num_clips in (({}, 8), ({"evaluation_clips": 2}, 2), ({"sampling": "uniform"}, 1)):
        pipe = pipeline("video-classification", model=model_folder, capacity=0.4, top_k=6, frame_sampling_rate=1)
        for name, value in settings.items():
            setattr(pipe.video_processor, name, value)
        options = {"num_clips": num_clips, "frame_sampling_rate": 1}
        results.append(scores(pipe(videos[0])))
        assert results[-1] == pytest.approx(expected(pipe, videos[0], 0.4, **options), abs=1e-5)
    assert results[0] != pytest.approx(results[1], abs=1e-4)


@pytest.mark.parametrize("num_clips", [1, 3])
def test_clips_are_averaged_and_batches_change_nothing(model_folder, videos, num_clips):
    pipe = pipeline("video-classification", model=model_folder)
    options = {"num_clips": num_clips, "frame_sampling_rate": 2, "capacity": 0.5, "top_k": 6}
    one_by_one = [scores(pipe(video, **options)) for video in videos]
    for batch_size in (1, 2):
        together = pipe(videos, batch_size=batch_size, **options)
        for video, alone, result in zip(videos, one_by_one, together, strict=True):
            assert scores(result) == pytest.approx(alone, abs=1e-5)
            wanted = expected(pipe, video, 0.5, num_clips=num_clips, frame_sampling_rate=2)
            assert alone == pytest.approx(wanted, abs=1e-5)


def test_every_kind_of_input(model_folder, videos):
    pipe = pipeline("video-classification", model=model_folder)
    folder = Path(videos[1]).parent
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/{Path(videos[1]).name}"
        from_url = scores(pipe(url, top_k=6))
        server.shutdown()
    from_path = scores(pipe(videos[1], top_k=6))
    assert from_url == pytest.approx(from_path, abs=1e-6)
    assert scores(pipe(Path(videos[1]).read_bytes(), top_k=6)) == pytest.approx(from_path, abs=1e-6)
    array = np.zeros((6, 32, 32, 3), dtype=np.uint8)
    assert scores(pipe(array, top_k=6)) == pytest.approx(expected(pipe, array, None), abs=1e-5)
    batch = np.random.default_rng(0).integers(0, 256, (3, 6, 32, 32, 3), dtype=np.uint8)
    one_by_one = [scores(result) for result in pipe(list(batch), top_k=6)]
    for together in (pipe(batch, top_k=6), pipe(torch.from_numpy(batch), top_k=6, batch_size=2)):
        assert [scores(result) for result in together] == [pytest.approx(alone, abs=1e-5) for alone in one_by_one]
    for frames in (list(batch[0]), [Image.fromarray(frame) for frame in batch[0]]):  # one video, and one result
        assert scores(pipe(frames, top_k=6)) == pytest.approx(one_by_one[0], abs=1e-5)
        (in_a_list,) = pipe([frames], top_k=6)
        assert scores(in_a_list) == pytest.approx(one_by_one[0], abs=1e-5)


def test_a_saved_pipeline_keeps_its_processor(model_folder, videos, tmp_path):
    pipe = pipeline("video-classification", model=model_folder)
    pipe.save_pretrained(tmp_path)
    again = pipeline("video-classification", model=str(tmp_path))
    assert again.video_processor.num_frames == 4
    assert scores(again(videos[0])) == pytest.approx(scores(pipe(videos[0])), abs=1e-6)


def test_errors_name_what_was_wrong(model_folder, videos, tmp_path):
    pipe = pipeline("video-classification", model=model_folder)
    with pytest.raises(ValueError, match=r"capacity=1\.2 .*\[0\.125, 1\]"):
        pipe("there is no such file.mp4", capacity=1.2)
    with pytest.raises(TypeError, match="num_clip"):
        pipe(videos[0], num_clip=3)
    with pytest.raises(ValueError, match="num_clips=0"):
        pipe(videos[0], num_clips=0)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(videos[0]).read_bytes()[:200])
    with pytest.raises(VideoDecodeError, match=r"broken\.mp4"):
        pipe(str(broken))


def test_other_models_get_the_stock_pipeline(videos, tmp_path):
    config = VivitConfig(
        image_size=32,
        num_frames=4,
        tubelet_size=[2, 16, 16],
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    VivitForVideoClassification(config).save_pretrained(tmp_path)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    VivitImageProcessor(**size).save_pretrained(tmp_path)
    assert isinstance(pipeline("video-classification", model=str(tmp_path)), MoNEVideoClassificationPipeline)
    # With an image processor alone; given a video processor the stock pipeline needs torchcodec.
    parts = {"model": VivitForVideoClassification(config).eval(), "image_processor": VivitImageProcessor(**size)}
    ours, stock = MoNEVideoClassificationPipeline(**parts), VideoClassificationPipeline(**parts)
    options = {"top_k": 2, "frame_sampling_rate": 2}
    assert ours(videos[0], **options) == stock(videos[0], **options)
    for option in ("capacity", "num_clips"):
        with pytest.raises(TypeError, match=f"{option}=1 is for MoNE models only.* VivitForVideoClassification"):
            ours(videos[0], **{option: 1})


# ---- real files ----

FRAMES = 40
KINDS = ["mp4", "mp4, header first", "mkv", "webm", "avi"]


@pytest.fixture(scope="module")
def pipe(model_folder):
    return pipeline("video-classification", model=model_folder, num_clips=2, top_k=6)


@pytest.fixture(scope="module", params=["bikes", "bigbuckbunny"])
def real(request):
    path = REAL_FOLDER / f"{request.param}.mp4"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    return path


@pytest.fixture(scope="module")
def variants(real, tmp_path_factory):
    """The first frames of a real file as intact files: the same packets in three layouts, and two codecs' own."""
    data, file = real.read_bytes(), tmp_path_factory.mktemp("variants") / "header first.mp4"
    return {
        "mp4": remux(data, "mp4", first=FRAMES),
        "mp4, header first": remux(data, "mp4", first=FRAMES, file=str(file), options={"movflags": "faststart"}),
        "mkv": remux(data, "matroska", first=FRAMES),
        "webm": transcode(real, FRAMES),
        "avi": transcode(real, FRAMES, "mpeg4", "avi"),
    }


def check(result):
    """What every result is: the scores of all labels, best first, that sum to 1."""
    values = [row["score"] for row in result]
    assert sorted(scores(result)) == [f"LABEL_{i}" for i in range(6)] and len(result) == 6
    assert np.isfinite(values).all() and values == sorted(values, reverse=True) and min(values) >= 0
    assert sum(values) == pytest.approx(1, abs=1e-5)
    return scores(result)


def classify(pipe, path, content):
    """The scores of a file, or the error that names it. Any other exception fails the test."""
    path.write_bytes(content)
    try:
        return check(pipe(str(path)))
    except VideoDecodeError as error:
        assert str(error).startswith(f"{path}: ")
        return error


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_file_gives_the_scores_of_its_frames(pipe, variants, tmp_path, kind):
    frames = np.stack(plain(variants[kind]))
    assert len(frames) == FRAMES
    result = classify(pipe, tmp_path / "video", variants[kind])
    assert result == pytest.approx(check(pipe(frames)), abs=1e-5)
    # Not any frames.
    assert result != pytest.approx(check(pipe(frames[::-1])), abs=1e-3)


def test_containers_do_not_matter(pipe, real, tmp_path):
    """Of the whole file, at every number of clips."""
    (tmp_path / "same.mkv").write_bytes(remux(real.read_bytes()))
    for num_clips in (1, 8):
        mp4, mkv = (check(pipe(str(path), num_clips=num_clips)) for path in (real, tmp_path / "same.mkv"))
        assert mkv == pytest.approx(mp4, abs=1e-5)


@pytest.mark.parametrize("angle", [90, 180, -90])
def test_a_rotated_file_is_classified_upright(pipe, variants, tmp_path, angle):
    frames = np.stack(plain(variants["mp4"]))
    rotated = classify(pipe, tmp_path / "rotated.mp4", remux(variants["mp4"], "mp4", rotation=angle))
    assert rotated == pytest.approx(check(pipe(np.rot90(frames, angle // 90, axes=(1, 2)))), abs=1e-5)
    assert rotated != pytest.approx(check(pipe(frames)), abs=1e-3)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("codec, container", [("libvpx-vp9", "webm"), ("libx264", "mp4")])
def test_a_real_file_of_few_frames_repeats_its_last(pipe, real, tmp_path, codec, container, number):
    data = transcode(real, number, codec, container)
    (tmp_path / "short").write_bytes(data)
    frames = plain(data)
    assert len(frames) == number
    repeated = np.stack([*frames, *[frames[-1]] * (4 - number)])
    for num_clips in (1, 2):
        result = check(pipe(str(tmp_path / "short"), num_clips=num_clips))
        assert result == pytest.approx(check(pipe(repeated, num_clips=1)), abs=1e-5)


def frames_within(data, length) -> list[np.ndarray]:
    """The frames, decoded by PyAV, of the packets that lie in the first `length` bytes."""
    with av.open(io.BytesIO(data)) as container:
        packets = [p for p in container.demux(video=0) if not p.size or p.pos + p.size <= length]
        return [frame.to_ndarray(format="rgb24") for packet in packets for frame in packet.decode()]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_truncated_file_is_the_video_up_to_there_or_an_error(pipe, variants, tmp_path, kind, share):
    data, length = variants[kind], int(len(variants[kind]) * share)
    result = classify(pipe, tmp_path / "cut.video", data[:length])
    frames = frames_within(data, length)
    # An mp4 file has its header at the end, or in front with the promise of all frames.
    if kind == "mp4" or not frames or (kind == "mp4, header first" and len(frames) < FRAMES / 2):
        assert isinstance(result, VideoDecodeError)
    else:
        assert len(frames) < FRAMES
        assert result == pytest.approx(check(pipe(np.stack(frames))), abs=1e-5)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("place", [0, 0.45, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_garbage_gives_scores_or_an_error(pipe, variants, tmp_path, kind, place, seed):
    data = variants[kind]
    start, size = int(len(data) * place), len(data) // 10
    garbage = random.Random(seed).randbytes(size)
    result = classify(pipe, tmp_path / "damaged.video", data[:start] + garbage + data[start + size :])
    if place == 0.45:  # more than half of the frames are left, or all before the damage
        assert not isinstance(result, VideoDecodeError)
    elif kind == "mp4" or (place == 0 and kind != "avi"):  # the header; MPEG-4 video is known without one
        assert isinstance(result, VideoDecodeError)


def test_a_file_that_is_no_longer_whole_is_named_among_others(pipe, real, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(real.read_bytes()[:100_000])
    for batch_size in (1, 2):
        with pytest.raises(VideoDecodeError, match=r"cut\.mp4: not a video, or its header is damaged or cut off"):
            pipe([str(real), str(cut)], batch_size=batch_size)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("sound.mp4", None, "has no video stream, only audio"),
        ("empty.mp4", b"", "not a video"),
        ("empty.webm", b"", "not a video"),
        ("text.mp4", b"This is no video.\n" * 100, "not a video"),
    ],
)
def test_a_file_that_is_no_video(pipe, tmp_path, name, content, message):
    error = classify(pipe, tmp_path / name, audio_only() if content is None else content)
    assert isinstance(error, VideoDecodeError) and f"{name}: {message}" in str(error)


# ---- memory ----

MEMORY = """
import resource, sys
import torch
from transformers import pipeline
from mone import MoNEViViTConfig, MoNEViViTForVideoClassification, MoNEViViTVideoProcessor
config = MoNEViViTConfig(hidden_size=16, num_hidden_layers=1, num_temporal_layers=1, num_attention_heads=2,
    intermediate_size=16, num_experts=2)
pipe = pipeline("video-classification", model=MoNEViViTForVideoClassification(config).eval(),
    video_processor=MoNEViViTVideoProcessor())
for name in sys.argv[1:]:
    assert len(pipe(name, num_clips=8)) == 2
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def test_memory_does_not_grow_with_the_length(tmp_path):
    """8 clips of 32 frames at 224 x 224 of a video of 10 seconds, and then of one of 10 minutes."""
    make_ten_minutes(tmp_path, ["mp4", "matroska"])
    with VideoReader(tmp_path / "long.mkv") as video:
        assert len(video) == 15_000
    # In one process: what the short one leaves behind counts against the long ones.
    names = [tmp_path / name for name in ("short.mp4", "long.mp4", "long.mkv")]
    peaks = run_and_read_peaks(MEMORY, *names)
    assert len(peaks) == 3 and peaks[-1] - peaks[0] < 300, peaks
