"""README's code blocks run, in its order, on a folder like the one that `make demo` leaves."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from mone.conversion import mone_from_vit


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import demo  # noqa: E402
import train_image_classification  # noqa: E402


TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """What `make demo` writes, with models that have learnt nothing."""
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
    return folder


def test_python_blocks(demo_folder, monkeypatch, capsys):
    monkeypatch.chdir(demo_folder)
    assert len(blocks("python")) >= 4
    namespace = {}
    for block in blocks("python"):
        # A line that ends without a name is an expression: run it, whatever it returns.
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["capacity_for_macs"] and (demo_folder / "outputs" / "routed_tokens.png").exists()


def test_shell_blocks(demo_folder, monkeypatch):
    monkeypatch.chdir(demo_folder)
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    trainings = [shlex.split(line) for line in commands if line.startswith("python scripts/")]
    assert trainings
    for _python, path, *arguments in trainings:
        assert path == "scripts/train_image_classification.py"
        shutil.rmtree("outputs/digits", ignore_errors=True)
        quick = ["--max_steps", "2", "--max_eval_samples", "8", "--report_to", "none", "--use_cpu"]
        metrics = train_image_classification.main([*arguments, *quick, "--cache_dir", str(demo_folder / "cache")])
        assert 0 <= metrics["eval_accuracy"] <= 1


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"make ([a-z-]+)", TEXT))
    assert {"demo", "test", "lint", "format", "test-slow"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_linked_files_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / link).exists(), link


def test_no_placeholder_is_left():
    assert not re.findall(r"@[A-Z_]+@", TEXT)
