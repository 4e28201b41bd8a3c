"""`pipeline("video-classification")` with a MoNE model, and with any other."""

import functools
import http.server
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import VivitConfig, VivitForVideoClassification, VivitImageProcessor, pipeline
from transformers.pipelines.video_classification import VideoClassificationPipeline

from mone import MoNEViViTConfig, MoNEViViTForVideoClassification, MoNEViViTVideoProcessor
from mone.pipelines import MoNEVideoClassificationPipeline
from mone.video_decoding import VideoDecodeError


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
    assert scores(pipe(videos[0], top_k=6)) == pytest.approx(expected(pipe, videos[0], 0.4), abs=1e-5)
    assert scores(pipe(videos[0], top_k=6, capacity=0.2)) == pytest.approx(expected(pipe, videos[0], 0.2), abs=1e-5)
    assert expected(pipe, videos[0], 0.2) != pytest.approx(expected(pipe, videos[0], 0.4), abs=1e-3)


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
