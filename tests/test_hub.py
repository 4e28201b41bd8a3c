# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Models, processors and pipelines through a Hub on loopback (`hub_server.py`), between fresh processes.

One process with the package pushes. One that cannot import it pulls with `trust_remote_code=True`, and pushes again
what it pulled. One with the package pulls that. The last has no Hub any more, only a cache. Each does all it has to do
in one go, since importing takes seconds; the tests look at what they left.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from hub_server import HubServer, front_matter
from PIL import Image
from sklearn.datasets import load_sample_images
from videos import make

from mone import MoNEForImageClassification


ROOT = Path(__file__).parents[1]

# What every process starts with. `results` is what the tests see of it.
HEAD = """
import hashlib, shutil, sys, time, types
from pathlib import Path

if "without" in sys.argv[2]:
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "mone":
                raise ImportError("mone is not installed")
    sys.meta_path.insert(0, Block())
else:
    import mone

import torch
from huggingface_hub import HfApi
from transformers import (
    AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForVideoClassification,
    AutoVideoProcessor, pipeline,
)

folder, results = Path(sys.argv[1]), {}
images = [str(folder / f"{i}.png") for i in range(2)]
video = str(folder / "clip.webm")

def digest(model):
    model = model.base_model
    parts = [(name, str(value.dtype), value.view(torch.uint8).numpy().tobytes() if value.dim() else value.item())
             for name, value in sorted(model.state_dict().items())]
    return hashlib.sha256(repr(parts).encode()).hexdigest()

def logits(model, pixel_values):
    with torch.no_grad():
        return [model(pixel_values.to(model.dtype), capacity=c).logits.float() for c in (None, 0.3, 1.0)]

def error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as exception:
        return f"{type(exception).__name__}: {exception}"

def finish():
    results["mone"] = [name for name in sys.modules if name.partition(".")[0] == "mone"]
    torch.save(results, folder / f"{sys.argv[2]}.pt")
"""

PUSH = """
import huggingface_hub.utils._http as hub_http
from transformers import ViTImageProcessor

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
             capacity=0.6, initializer_range=0.3, id2label={i: f"class {i}" for i in range(7)})
api = HfApi()
results["commits"] = {}

def make(cls, config, seed):
    torch.manual_seed(seed)
    model = cls(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("alpha"):
            parameter.data.fill_(0.7)
    return model

def image_model(seed):
    return make(mone.MoNEForImageClassification, mone.MoNEConfig(**SIZES, patch_size=4, router_layers=(0, 1)), seed)

processor = ViTImageProcessor(size={"height": 32, "width": 32})
pixel_values = processor([__import__("PIL").Image.open(path) for path in images], return_tensors="pt").pixel_values

first, second = image_model(1), image_model(2)
first.push_to_hub("image", commit_message="first")  # into the user's own namespace
processor.push_to_hub("alice/image")
api.create_tag("alice/image", tag="v1")
results["first"] = digest(first), logits(first, pixel_values)
results["commits"]["second"] = second.push_to_hub("alice/image", tags=["nested"]).oid
results["second"] = digest(second), logits(second, pixel_values)
results["pixel_values"] = pixel_values

video_config = mone.MoNEViViTConfig(**SIZES, num_temporal_layers=1, tubelet_size=(2, 4, 4), num_frames=4)
video_model = make(mone.MoNEViViTForVideoClassification, video_config, 3)
video_processor = mone.MoNEViViTVideoProcessor(
    num_frames=4, frame_sampling_rate=3, size={"shortest_edge": 36}, crop_size=32, image_mean=[0.4, 0.5, 0.6]
)
clip = video_processor(video, return_tensors="pt").pixel_values
video_model.push_to_hub("alice/video")
video_processor.push_to_hub("alice/video")
results["video"] = digest(video_model), logits(video_model, clip)
results["clip"] = clip

pipe = pipeline("image-classification", model=second, image_processor=processor, device="cpu")
pipe.push_to_hub("alice/pipeline")
pipe = pipeline("video-classification", model=video_model, video_processor=video_processor, device="cpu")
pipe.push_to_hub("alice/video-pipeline")

first.push_to_hub("alice/sharded")  # one file, which the shards replace
second.push_to_hub("alice/sharded", max_shard_size="20KB")
for name, dtype in (("half", torch.float16), ("bfloat16", torch.bfloat16)):
    model = image_model(2).to(dtype)
    model.push_to_hub(f"alice/{name}", max_shard_size="20KB" if name == "half" else "1GB")
    results[name] = digest(model), logits(model, pixel_values)
second.push_to_hub("alice/private", private=True)
processor.push_to_hub("alice/private")

# Uploads that the server cuts off. No waiting between the client's attempts.
hub_http.time = types.SimpleNamespace(sleep=lambda seconds: None, time=time.time)
for name in ("cut-lfs", "cut-commit"):
    first.push_to_hub(f"alice/{name}")
    api.create_tag(f"alice/{name}", tag="armed")
    results[name] = error(image_model(len(name)).push_to_hub, f"alice/{name}")
results["not allowed"] = error(first.push_to_hub, "bob/theirs")

# A card of one's own goes along, and stays.
card = (folder / "card" / "README.md").read_text()
second.save_pretrained(folder / "carded")
shutil.copytree(folder / "card", folder / "carded", dirs_exist_ok=True)
carded = mone.MoNEForImageClassification.from_pretrained(folder / "carded")
results["commits"]["carded"] = carded.push_to_hub("alice/carded").oid
second.push_to_hub("alice/carded", tags=["again"])
first.save_pretrained(folder / "carded", push_to_hub=True, repo_id="alice/saved", commit_message="saved", private=True)

sys.path.insert(0, sys.argv[3])
import train_image_classification
arguments = [
    "--config_overrides", "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,"
    "image_size=16,patch_size=8", "--train_file", str(folder / "train.parquet"), "--validation_split", "0.5",
    "--do_train", "--do_eval", "--max_steps", "1", "--use_cpu", "--report_to", "none", "--disable_tqdm", "true",
    "--cache_dir", str(folder / "datasets"), "--push_to_hub", "--hub_strategy", "every_save", "--save_steps", "1",
    "--eval_capacities", "0.3", "1.0", "--output_dir",
]
for output, name in (("trained", "trained"), ("again", "carded")):
    train_image_classification.main([*arguments, str(folder / output), "--hub_model_id", f"alice/{name}"])
finish()
"""

PULL = """
trust = {"trust_remote_code": True} if "without" in sys.argv[2] else {}
owner, target = sys.argv[3], sys.argv[4]
source = torch.load(folder / "push.pt")
pixel_values, clip = source["pixel_values"], source["clip"]
results["modules"], results["untrusted"] = [], []

def pull(auto, name, inputs=pixel_values, **kwargs):
    model = auto.from_pretrained(name, **trust, **kwargs)
    results["modules"].append(type(model).__module__)
    return digest(model), logits(model, inputs), model

for name, auto, inputs in (("image", AutoModelForImageClassification, pixel_values),
                           ("video", AutoModelForVideoClassification, clip)):
    *results[name], model = pull(auto, f"{owner}/{name}", inputs)
    if trust:
        results["untrusted"].append(error(auto.from_pretrained, f"{owner}/{name}"))
    results[f"{name} backbone"] = digest(AutoModel.from_pretrained(f"{owner}/{name}", **trust))
    if target:
        model.push_to_hub(f"{target}/{name}")

processor = AutoImageProcessor.from_pretrained(f"{owner}/image", **trust)
results["pixel_values"] = processor([__import__("PIL").Image.open(path) for path in images],
                                    return_tensors="pt").pixel_values
video_processor = AutoVideoProcessor.from_pretrained(f"{owner}/video", **trust)
results["modules"].append(type(video_processor).__module__)
results["clip"] = video_processor(video, return_tensors="pt").pixel_values
if target:
    processor.push_to_hub(f"{target}/image")
    video_processor.push_to_hub(f"{target}/video")

options = {"device": "cpu", "top_k": 7, **trust} | ({} if trust else {"capacity": 0.3})
pipe = pipeline("image-classification", model=f"{owner}/pipeline", **options)
results["pipeline"] = pipe(images)
if target:
    pipe.push_to_hub(f"{target}/pipeline")
"""

WITHOUT = """
results["v1"] = pull(AutoModelForImageClassification, "alice/image", revision="v1")[:2]
results["commit"] = pull(AutoModelForImageClassification, "alice/image", revision=source["commits"]["second"])[:2]
results["unknown revision"] = error(AutoModel.from_pretrained, "alice/image", revision="v7", **trust)
for name in ("sharded", "half", "bfloat16"):
    results[name] = pull(AutoModelForImageClassification, f"alice/{name}")[:2]
for name, token in (("no token", False), ("wrong token", "hf_wrong"), ("other user", "hf_bob")):
    results[name] = [error(auto.from_pretrained, "alice/private", token=token, **trust)
                     for auto in (AutoModelForImageClassification, AutoImageProcessor)]
    results[name].append(error(pipeline, "image-classification", model="alice/private", token=token, **trust))
results["own token"] = pull(AutoModelForImageClassification, "alice/private", token="hf_alice")[:2]
finish()
"""

WITH = """
results["v1"] = pull(AutoModelForImageClassification, "alice/image", revision="v1")[:2]
results["float32"] = pull(AutoModelForImageClassification, "alice/half", dtype=torch.float32)[:2]
for name in ("cut-lfs", "cut-commit", "sharded"):
    results[name] = pull(AutoModelForImageClassification, f"alice/{name}")[:2]
results["trained"] = pull(AutoModelForImageClassification, "alice/trained", pixel_values[..., :16, :16])[1]
results["processors"] = [type(AutoImageProcessor.from_pretrained("alice/trained")).__name__]
for name in ("alice/video", "alice/video-pipeline", "bob/video"):
    results[f"pipeline of {name}"] = pipeline("video-classification", model=name, **options)(video, num_clips=1)
results["pipeline at v1"] = pipeline("image-classification", model="alice/image", revision="v1", **options)(images)
finish()
"""

OFFLINE = """
results["unknown"] = error(AutoModel.from_pretrained, "alice/never", **trust)
results["v1"] = pull(AutoModelForImageClassification, "alice/image", revision="v1")[:2]
results["sharded"] = pull(AutoModelForImageClassification, "alice/sharded")[:2]
finish()
"""


def run(name, code, folder, environment, *args):
    """Run `code` in a fresh process with a cache of its own, or that of a process before it; its results."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {"HF_HOME": str(folder / f"home of {name}"), "CUDA_VISIBLE_DEVICES": "", **environment}
    process = subprocess.run(
        [sys.executable, "-c", HEAD + code, str(folder), name, *args],
        cwd=folder,
        env={**inherited, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return torch.load(folder / f"{name}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs of the processes."""
    root = tmp_path_factory.mktemp("hub")
    for i, image in enumerate(load_sample_images().images):
        Image.fromarray(image).save(root / f"{i}.png")
    (root / "clip.webm").write_bytes(make(40, "libvpx-vp9", "webm", first=1000))
    (root / "card").mkdir()
    (root / "card" / "README.md").write_text(
        "---\nlicense: mit\ntags: [mine]\n---\n\n# My own words\n![One](picture.png 'title') (not unnamed.png)\n"
        '<img src="./second%20one.png">\n![](private/3.png)\n'
    )
    (root / "card" / "private").mkdir()
    for name in ("picture.png", "second one.png", "unnamed.png", "3.png", "private/picture.png", "private/3.png"):
        Image.new("RGB", (2, 2)).save(root / "card" / name)
    (root / "README.md").write_text("Of the folder in which the processes run, and of no model.")
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(16)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": pictures, "label": [i % 2 for i in range(16)]}
    Dataset.from_dict(rows, features=features).to_parquet(str(root / "train.parquet"))
    return root


@pytest.fixture(scope="module")
def hub():
    with HubServer({"hf_alice": "alice", "hf_bob": "bob"}) as server:
        server.cut = {"alice/cut-lfs": "lfs", "alice/cut-commit": "commit"}
        yield server


@pytest.fixture(scope="module")
def pushed(hub, folder):
    return run("push", PUSH, folder, hub.environment("hf_alice"), str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def without(hub, folder, pushed):
    return run("without", PULL + WITHOUT, folder, hub.environment("hf_bob"), "alice", "bob")


@pytest.fixture(scope="module")
def with_package(hub, folder, without):
    return run("pull", PULL + WITH, folder, hub.environment(), "bob", "")


@pytest.fixture(scope="module")
def offline(hub, folder, without, with_package):
    """After everything else, for the server has to be gone."""
    hub.shutdown()
    hub.server_close()
    environment = {**hub.environment("hf_bob"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home of without")}
    return run("offline without", PULL + OFFLINE, folder, environment, "alice", "")


def files(hub, name, revision="main"):
    repo = hub.repos[name]
    return repo.commits[repo.resolve(revision)]


def check_same(results, expected, rtol=1e-5):
    """The backbone's weights to the bit, outputs at every capacity."""
    assert results[0] == expected[0]
    for here, there in zip(results[1], expected[1], strict=True):
        torch.testing.assert_close(here, there, rtol=rtol, atol=1e-5)


def test_the_references_differ(pushed):
    digests = {pushed[name][0] for name in ("first", "second", "half", "bfloat16")}
    assert len(digests) == 4
    for name in ("first", "second", "video"):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert (pushed[name][1][i] - pushed[name][1][j]).abs().max() > 1e-2


class TestPush:
    def test_code_and_config_are_beside_the_weights(self, hub, pushed):
        code = {"capacity.py", "checkpoints.py", "configuration_mone.py", "modeling_mone.py", "nested_linear.py"}
        code |= {"packed_linear.py", "routing.py", "triton_linear.py", "config.json", "README.md", "model.safetensors"}
        video = {"modeling_mone_vivit.py", "pixels.py", "video_processing_mone.py", "video_decoding.py"}
        for name in ("image", "pipeline"):
            assert set(files(hub, f"alice/{name}")) == code | {"preprocessor_config.json"}
        for name in ("video", "video-pipeline"):
            assert set(files(hub, f"alice/{name}")) == code | video | {"video_preprocessor_config.json"}
        assert front_matter(files(hub, "alice/image")["README.md"].content.decode())["tags"] == ["nested"]

    def test_weights_go_to_large_file_storage_and_no_token_with_them(self, hub, without):
        assert all(file.lfs == path.endswith((".safetensors", ".bin", ".png")) for path, file in all_files(hub))
        large = [user for _, path, user in hub.requests if path.startswith(("/upload/", "/objects/"))]
        assert large and set(large) == {None}

    def test_several_shards_replace_one_file(self, hub, pushed):
        for name, count in (("sharded", 5), ("half", 3)):
            weights = [path for path in files(hub, f"alice/{name}") if path.endswith(".safetensors")]
            assert sorted(weights) == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    def test_private_repos_are_private(self, hub, pushed):
        assert [name for name, repo in sorted(hub.repos.items()) if repo.private] == ["alice/private", "alice/saved"]

    def test_an_interrupted_upload_is_an_error(self, hub, pushed):
        assert "uploading 'model.safetensors'" in pushed["cut-lfs"]
        assert "disconnected" in pushed["cut-commit"]
        for name in ("cut-lfs", "cut-commit"):
            assert len(hub.repos[f"alice/{name}"].commits) == 2
        cut = [path for method, path, _ in hub.requests if method == "PUT" and "/cut-lfs/" in path]
        assert len(cut) > 1, "the client tries again, and again"

    def test_another_users_namespace(self, pushed):
        assert '403 Forbidden: You don\'t have the rights to create a model under "bob"' in pushed["not allowed"]

    def test_a_card_goes_along_and_stays(self, hub, folder, pushed):
        card = (folder / "card" / "README.md").read_text()
        for name, revision in (("carded", pushed["commits"]["carded"]), ("saved", "main")):
            there = files(hub, f"alice/{name}", revision)
            assert there["README.md"].content.decode() == card
            assert there["picture.png"].content == (folder / "card" / "picture.png").read_bytes()
            assert "model.safetensors" in there
            assert {path for path in there if path.endswith(".png")} == {"picture.png", "second one.png"}
        assert (folder / "carded" / "README.md").read_text() == card
        # After another push of a model, with a tag, and after a training that pushed.
        there = files(hub, "alice/carded")
        assert "training_args.bin" in there
        assert front_matter(there["README.md"].content.decode()) == {"license": "mit", "tags": ["mine", "again"]}
        assert "# My own words" in there["README.md"].content.decode()

    def test_trainer_pushes_all_that_loading_needs(self, hub, pushed):
        repo = hub.repos["alice/trained"]
        assert len(repo.commits) > 2
        for oid in list(repo.commits)[1:]:
            assert {"config.json", "model.safetensors", "preprocessor_config.json"} < set(repo.commits[oid])
            assert {"modeling_mone.py", "checkpoints.py"} < set(repo.commits[oid]), "of a checkpoint, too"
        assert (
            front_matter(files(hub, "alice/trained")["README.md"].content.decode())["library_name"] == "transformers"
        )


def all_files(hub):
    return [entry for repo in hub.repos.values() for commit in repo.commits.values() for entry in commit.items()]


class TestPullWithoutThePackage:
    def test_the_code_comes_from_the_hub(self, without):
        assert without["mone"] == []
        assert all(name.startswith("transformers_modules.alice.") for name in without["modules"])
        for error in without["untrusted"]:
            assert "trust_remote_code=True" in error

    def test_models(self, pushed, without):
        for name, expected in (("image", "second"), ("video", "video")):
            check_same(without[name], pushed[expected])
            assert without[f"{name} backbone"] == pushed[expected][0]

    def test_processors(self, pushed, without):
        assert torch.equal(without["pixel_values"], pushed["pixel_values"])
        assert torch.equal(without["clip"], pushed["clip"])

    def test_pipeline(self, pushed, without):
        check_pipeline(without["pipeline"], pushed["second"][1][0])

    def test_revisions(self, pushed, without):
        check_same(without["v1"], pushed["first"])
        check_same(without["commit"], pushed["second"])
        assert "v7 is not a valid git identifier" in without["unknown revision"]

    def test_shards_and_half_precision(self, pushed, without):
        check_same(without["sharded"], pushed["second"])
        check_same(without["half"], pushed["half"], rtol=1e-2)
        check_same(without["bfloat16"], pushed["bfloat16"], rtol=1e-2)

    def test_private_repo(self, pushed, without):
        for name in ("no token", "other user"):
            for error in without[name]:
                assert error.startswith("OSError: alice/private is not") and "pass a token having permission" in error
        for error in without["wrong token"]:
            assert error.startswith("OSError") and "Invalid credentials in Authorization header" in error
        check_same(without["own token"], pushed["second"])


class TestPullWithThePackage:
    def test_the_code_is_the_packages(self, with_package):
        assert all(name.startswith("mone.") for name in with_package["modules"])

    def test_what_was_pushed_without_it(self, hub, pushed, with_package):
        for name, expected in (("image", "second"), ("video", "video")):
            check_same(with_package[name], pushed[expected])
            assert with_package[f"{name} backbone"] == pushed[expected][0]
        for name in ("image", "video", "pipeline"):
            sources = {path for path in files(hub, f"alice/{name}") if path != "README.md"}
            assert {path for path in files(hub, f"bob/{name}") if path != "README.md"} == sources
            for path in sources - {"model.safetensors"}:
                assert files(hub, f"bob/{name}")[path] == files(hub, f"alice/{name}")[path], path

    def test_processors(self, pushed, with_package):
        assert torch.equal(with_package["pixel_values"], pushed["pixel_values"])
        assert torch.equal(with_package["clip"], pushed["clip"])
        assert with_package["processors"] == ["ViTImageProcessor"]

    def test_pipelines_at_a_capacity(self, pushed, with_package):
        check_pipeline(with_package["pipeline"], pushed["second"][1][1])
        check_pipeline(with_package["pipeline at v1"], pushed["first"][1][1])
        for name in ("alice/video", "alice/video-pipeline", "bob/video"):
            check_pipeline([with_package[f"pipeline of {name}"]], pushed["video"][1][1])

    def test_revision_and_precision(self, pushed, with_package):
        check_same(with_package["v1"], pushed["first"])
        check_same(with_package["sharded"], pushed["second"])
        for here, there in zip(with_package["float32"][1], pushed["half"][1], strict=True):
            torch.testing.assert_close(here, there, rtol=0.05, atol=0.05)

    def test_after_an_interrupted_upload_the_revision_before_it_loads(self, pushed, with_package):
        for name in ("cut-lfs", "cut-commit"):
            check_same(with_package[name], pushed["first"])

    def test_a_trained_model(self, with_package):
        assert all(logits.shape == (2, 2) and logits.isfinite().all() for logits in with_package["trained"])


def check_pipeline(outputs, logits):
    for output, scores in zip(outputs, logits.softmax(-1), strict=True):
        best = scores.topk(7)
        assert [entry["label"] for entry in output] == [f"class {i}" for i in best.indices]
        np.testing.assert_allclose([entry["score"] for entry in output], best.values, rtol=1e-4, atol=1e-6)


def test_offline_from_the_cache(hub, pushed, without, offline):
    check_same(offline["image"], pushed["second"])
    check_same(offline["v1"], pushed["first"])
    check_same(offline["sharded"], pushed["second"])
    check_same(offline["video"], pushed["video"])
    check_pipeline(offline["pipeline"], pushed["second"][1][0])
    assert offline["mone"] == [] and torch.equal(offline["clip"], pushed["clip"])
    assert "couldn't find them in the cached files" in offline["unknown"]


def test_offline_with_the_package(folder, pushed, with_package, offline):
    options = {"cache_dir": folder / "home of pull" / "hub", "local_files_only": True}
    for revision, name in (("main", "second"), ("v1", "first")):
        repo = "bob/image" if revision == "main" else "alice/image"
        model = MoNEForImageClassification.from_pretrained(repo, revision=revision, **options)
        with torch.no_grad():
            logits = model(pushed["pixel_values"], capacity=0.3).logits
        torch.testing.assert_close(logits, pushed[name][1][1])
