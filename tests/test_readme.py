"""README's code blocks run, in its order, on folders like those that `make demo` and README's own commands leave."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from mone import MoNEViViTVideoProcessor
from mone.conversion import mone_from_vit, mone_vivit_from_mone


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import convert  # noqa: E402
import demo  # noqa: E402
import make_motion_clips  # noqa: E402
import motion  # noqa: E402
import train_image_classification  # noqa: E402
import train_video_classification  # noqa: E402


CLIPS = ["--clips_per_class", "2", "--validation_clips_per_class", "1"]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """What `make demo` and the commands for videos write, with models that have learnt nothing."""
    folder = tmp_path_factory.mktemp("readme")
    demo.write_digits(folder / "outputs" / "demo" / "digits")
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=4,
        num_labels=10,
    )
    vit = ViTForImageClassification(config)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    for name, model in (("vit", vit), ("mone", mone_from_vit(vit))):
        model.save_pretrained(folder / "outputs" / "demo" / name)
        processor.save_pretrained(folder / "outputs" / "demo" / name)

    images, clips = folder / "outputs" / "demo" / "digits" / "train", folder / "outputs" / "clips"
    make_motion_clips.main(["--images", str(images), "--output_dir", str(clips), *CLIPS])
    labels = {"id2label": dict(enumerate(motion.CLASSES))}
    video_model = mone_vivit_from_mone(mone_from_vit(vit), num_frames=4, num_temporal_layers=1, **labels)
    video_model.save_pretrained(folder / "outputs" / "video")
    MoNEViViTVideoProcessor(
        num_frames=4, frame_sampling_rate=1, size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder / "outputs" / "video")
    return folder


def test_python_blocks(demo_folder, monkeypatch, capsys):
    monkeypatch.chdir(demo_folder)
    assert len(blocks("python")) >= 5
    namespace = {}
    for block in blocks("python"):
        # A line that ends without a name is an expression: run it, whatever it returns.
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["capacity_for_macs"]
    for name in ("routed_tokens.png", "routed_video.png", "routed_video.mp4", "mone-0.4.onnx"):
        assert (demo_folder / "outputs" / name).exists(), name


def test_shell_blocks(demo_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(demo_folder)
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("python scripts/")]
    trainings = {
        "scripts/train_image_classification.py": train_image_classification,
        "scripts/train_video_classification.py": train_video_classification,
    }
    assert {path for path, *_ in commands} == {*trainings, "scripts/make_motion_clips.py", "scripts/convert.py"}
    for path, *arguments in commands:
        if path == "scripts/convert.py":
            convert.main(arguments)
            assert (demo_folder / arguments[1] / "model.safetensors").exists()
            continue
        if path not in trainings:
            make_motion_clips.main([*arguments, *CLIPS])  # in the folder where the fixture made as many
            continue
        quick = ["--max_steps", "2", "--max_eval_samples", "8", "--report_to", "none", "--use_cpu"]
        folders = ["--cache_dir", str(demo_folder / "cache"), "--output_dir", str(tmp_path / Path(path).stem)]
        metrics = trainings[path].main([*arguments, *quick, *folders])
        assert 0 <= metrics["eval_accuracy"] <= 1


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z-]+)", TEXT))
    assert {"demo", "test", "lint", "format", "test-slow"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("page", ["README.md", "scripts/results/README.md"])
def test_linked_files_exist(page):
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text())
    assert links
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_no_placeholder_is_left():
    assert not re.findall(r"@[A-Z_]+@", TEXT)
