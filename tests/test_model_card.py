# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what they say, what they refuse, and that the Hub's own tools read back what was written."""

import copy
import json
import re
from pathlib import Path

import pytest
from hub_server import HubServer, card_problems
from huggingface_hub import ModelCard, metadata_load
from PIL import Image

from mone import MoNEConfig, MoNEForImageClassification, MoNEViViTConfig, MoNEViViTForVideoClassification, count_macs
from mone.model_card import check_results, make_model_card, results_of_training, write_model_card
from mone.training.command_line import parse_overrides


CARDS = sorted(path.parent for path in (Path(__file__).parents[1] / "model_cards").glob("*/results.json"))
RESULTS = {
    "task": "image-classification",
    "license": "mit",
    "dataset": {"name": "Digits", "type": "ylecun/mnist", "split": "test", "size": 1234},
    "rows": [
        {"model": "MoNE", "capacity": 0.25, "gmacs": 0.5, "accuracy": 0.8125},
        {"model": "MoNE", "capacity": [0.1, 0.2, 0.3, 0.4], "gmacs": 0.75, "accuracy": 0.875},
        {"model": "MoNE", "capacity": 1.0, "gmacs": 2.0, "accuracy": 0.9},
        {"model": "ViT", "capacity": None, "gmacs": 3.0, "accuracy": 0.93},
    ],
}
EVERYTHING = {
    **RESULTS,
    "model": "MoNE",
    "summary": "A model of a test.",
    "sections": {"First section": "Its text.", "Second section": "More text."},
    "limits": "It is made up.",
    "gmacs": "one digit of 32x32 pixels",
    "chance": 0.1,
    "confusion": {"capacity": 0.25, "counts": {"a": {"a": 41, "b": 0}, "b": {"a": 7, "b": 43}}},
    "commands": ["python train.py \\\n    --fast\n", "python evaluate.py"],
    "machine": "one abacus",
    "date": "2026-11-22",
    "parameters": {"MoNE": 1234567, "ViT": 1234000},
    "epochs": 12.0,
    "train_minutes": 17.7,
    "datasets": ["ylecun/mnist"],
    "base_model": ["google/vit-base-patch16-224"],
    "tags": ["digits"],
    "hub_id": "org/digits",
    "pictures": [{"file": "routed_tokens.png", "caption": "Where the tokens went."}],
    "other": {"secret": 98765},
}


def test_minimal_card_says_nothing_that_the_results_do_not():
    text = make_model_card("tiny", RESULTS).text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# tiny",
        "## Accuracy and compute",
        "## Pictures",
    ]
    assert "Chance" not in text and "Measured" not in text and "minutes" not in text
    numbers = set(re.findall(r"\d[\d.,]*\d|\d", text.split("## Accuracy and compute")[1].split("Accuracy on")[0]))
    ratios = {"6.00", "4.00", "1.50", "1.00"}  # against the dense model
    assert numbers == {"0.25", "0.1", "0.2", "0.3", "0.4", "1", "0.50", "0.75", "2.00", "3.00"} | ratios | {
        *("81.2", "87.5", "90.0", "93.0"),
    }


def test_everything_is_said():
    text = make_model_card("tiny", EVERYTHING).text
    for part in (
        "A model of a test.",
        "## First section\n\nIts text.\n\n## Second section\n\nMore text.",
        "## Limits\n\nIt is made up.",
        "Accuracy on 1,234 examples of Digits, test. Chance is 10.0%. Compute is that of one digit of 32x32 pixels",
        "Confusion at capacity 0.25",
        "| a | 41 |  |\n| b | 7 | 43 |",
        "```bash\npython train.py \\\n    --fast\n```\n\n```bash\npython evaluate.py\n```",
        "1,234,567 parameters (MoNE), 1,234,000 parameters (ViT). 12 epochs. 17.7 minutes of training.",
        "Measured on 2026-11-22, one abacus.",
        'pipeline("image-classification", model="org/digits", capacity=0.25)',
        "![Where the tokens went.](routed_tokens.png)",
        "Licence: mit.",
    ):
        assert part in text, part
    assert "98765" not in text


def test_table_of_one_model_compares_with_its_full_capacity():
    results = {**RESULTS, "rows": RESULTS["rows"][:3]}
    text = make_model_card("tiny", results).text
    assert "| capacity | GMACs | less compute | accuracy |" in text
    assert "| 0.25 | 0.50 | 4.00x | 81.2% |" in text
    assert "| 0.1/0.2/0.3/0.4 | 0.75 | 2.67x | 87.5% |" in text
    without = {**RESULTS, "rows": RESULTS["rows"][:1]}
    assert "| 0.25 | 500.0 |  | 81.2% |" in make_model_card("tiny", without).text, "nothing to compare with"


def test_names_with_a_bar_or_a_line_break_stay_in_their_cell():
    confusion = {"capacity": 0.25, "counts": {"cat|dog": {"cat|dog": 3}, "red\nfox": {"cat|dog": 7}}}
    card = str(make_model_card("tiny", {**EVERYTHING, "confusion": confusion}))
    assert "|  | cat\\|dog | red fox |" in card and "| red fox | 7 |  |" in card


def test_predictions_of_classes_that_are_never_true_are_shown():
    confusion = {"capacity": 0.25, "counts": {"cat": {"cat": 3, "fox": 7}, "dog": {"dog": 1}}}
    card = str(make_model_card("tiny", {**EVERYTHING, "confusion": confusion}))
    assert "|  | cat | dog | fox |" in card and "| cat | 3 |  | 7 |\n| dog |  | 1 |  |" in card


class TestMetadata:
    def test_the_hub_s_tools_read_back_every_result(self, tmp_path):
        card = make_model_card("tiny", EVERYTHING)
        card.save(tmp_path / "README.md")
        loaded = ModelCard.load(tmp_path / "README.md")
        assert loaded.data.eval_results == card.data.eval_results
        assert loaded.data.model_name == "tiny"
        measured = [(r.metric_args, r.metric_value) for r in loaded.data.eval_results]
        assert measured == [({"capacity": row["capacity"]}, row["accuracy"]) for row in RESULTS["rows"][:3]]
        for result in loaded.data.eval_results:
            assert (result.task_type, result.metric_type) == ("image-classification", "accuracy")
            assert (result.dataset_type, result.dataset_name, result.dataset_split) == (
                *("ylecun/mnist", "Digits", "test"),
            )
        data = metadata_load(tmp_path / "README.md")
        assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
            *("mit", "transformers", "image-classification"),
        )
        assert data["tags"] == ["mone", "vision", "image-classification", "digits"]
        assert data["datasets"] == ["ylecun/mnist"] and data["base_model"] == ["google/vit-base-patch16-224"]

    def test_validation_over_http(self, monkeypatch):
        with HubServer({}) as hub:
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
            make_model_card("tiny", EVERYTHING).validate()
            assert [path for _, path, _ in hub.requests] == ["/api/validate-yaml"]
            broken = make_model_card("tiny", {**EVERYTHING, "license": "my own"})
            with pytest.raises(ValueError, match="license"):
                broken.validate()

    @pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
    def test_published_cards(self, folder):
        text = (folder / "README.md").read_text()
        assert card_problems(text) == []
        assert ModelCard.load(folder / "README.md").data.eval_results


class TestPublishedCards:
    def test_there_are_some(self):
        assert {folder.name for folder in CARDS} >= {"mone-tiny-cifar10", "mone-vivit-tiny-motion"}

    @pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
    def test_they_are_what_their_results_give(self, folder):
        results = json.loads((folder / "results.json").read_text())
        assert (folder / "README.md").read_text() == str(make_model_card(folder.name, results))
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", (folder / "README.md").read_text()):
            assert (folder / link).exists(), link

    @pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
    def test_gmacs_are_those_of_the_command(self, folder):
        """`--config_overrides` of the model's own training, or of its conversions, gives the cost in every row."""
        dinov2_small = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "patch_size": 14}
        results = json.loads((folder / "results.json").read_text())
        config_class = MoNEViViTConfig if results["task"] == "video-classification" else MoNEConfig
        commands = [command for command in results["commands"] if "--config_overrides" in command]
        commands = [command for command in commands if "scripts/convert.py" in command] or commands[:1]
        overrides = dinov2_small if any("vit_s_focus.onnx" in command for command in commands) else {}
        for command in commands:
            overrides |= parse_overrides(re.search(r'--config_overrides "?([^"\s]+)', command)[1], config_class)
        config = config_class(**overrides, num_labels=8 if "video" in results["task"] else 10)
        subject = results.get("model", results["rows"][0]["model"])
        for row in results["rows"]:
            if row["model"] == subject:
                assert row["gmacs"] == count_macs(config, row["capacity"]) / 1e9


class TestRefused:
    @pytest.mark.parametrize("field", ["task", "license", "dataset", "rows"])
    def test_missing(self, field):
        with pytest.raises(ValueError, match=rf"lacks \['{field}'\]"):
            check_results({key: value for key, value in RESULTS.items() if key != field})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"limit": "none"}, "unknown field 'limit'. Did you mean 'limits'"),
            ({"task": "text-generation"}, "task='text-generation' must be one of"),
            ({"rows": []}, r"rows=\[\] must be a list of at least one object"),
            ({"rows": [{"model": "MoNE", "capacity": 1.0, "gmacs": 1.0}]}, r"lacks \['accuracy'\]"),
            ({"rows": [{"model": "MoNE", "capacity": 1.0, "gmacs": 1.0, "accuracy": 93.1}]}, "not in percent"),
            ({"model": "ResNet"}, r"model='ResNet' is none of the rows' models \['MoNE', 'ViT'\]"),
            ({"dataset": {"name": "Digits"}}, r"The dataset \{'name': 'Digits'\} lacks \['type'\]"),
            ({"dataset": "CIFAR-10"}, "dataset='CIFAR-10' must be an object"),
            ({"dataset": {"name": "Digits", "type": "digits", "size": "10"}}, "size='10' must be a number above 0"),
            ({"rows": {}}, r"rows=\{\} must be a list"),
            ({"tags": "vision"}, "tags='vision' must be a list of strings"),
            ({"commands": "python train.py"}, "commands='python train.py' must be a list of strings"),
            ({"limits": ["a", "b"]}, r"limits=\['a', 'b'\] must be a string"),
            ({"sections": {"Title": 1}}, r"sections=.* must be \{title: text\}"),
            ({"epochs": "12"}, "epochs='12' must be a number >= 0, or {model: number}"),
            ({"parameters": {"MoNE": True}}, "parameters={'MoNE': True} must be a number >= 0, or"),
            ({"chance": 10}, r"chance=10 must be a number in \[0, 1\]"),
            ({"confusion": {"a": 1}}, r"confusion lacks \['capacity', 'counts'\]"),
            ({"confusion": {"capacity": 0.4, "counts": {"a": 1}}}, r"counts=\{'a': 1\} must be \{true class"),
            ({"pictures": [{"file": "x.png"}]}, r"The picture \{'file': 'x.png'\} lacks \['caption'\]"),
            ({"pictures": "x.png"}, "pictures='x.png' must be a list of objects"),
        ],
    )
    def test_not_allowed(self, change, message):
        with pytest.raises(ValueError, match=message):
            check_results({**RESULTS, **change})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"accuracy": "90%"}, r"accuracy='90%' must be a number in \[0, 1\]"),
            ({"accuracy": float("nan")}, "accuracy=nan must be"),
            ({"gmacs": 0}, "gmacs=0 must be a number above 0"),
            ({"capacity": 7}, "capacity=7 must be null, a number above 0 and up to 1, or shares that sum to 1"),
            ({"capacity": 0}, "capacity=0 must be"),
            ({"capacity": True}, "capacity=True must be"),
            ({"capacity": [0.5, 0.4]}, r"capacity=\[0\.5, 0\.4\] must be"),
            ({"model": None}, "model=None must be a string"),
        ],
    )
    def test_not_allowed_in_a_row(self, change, message):
        with pytest.raises(ValueError, match=rf"The row .*: {message}"):
            check_results({**RESULTS, "rows": [RESULTS["rows"][0], RESULTS["rows"][1] | change]})

    def test_a_picture_that_is_not_there_leaves_the_card_as_it_was(self, tmp_path):
        (tmp_path / "README.md").write_text("before")
        (tmp_path / "results.json").write_text(json.dumps(EVERYTHING))
        with pytest.raises(FileNotFoundError, match=r"routed_tokens\.png"):
            write_model_card(tmp_path)
        assert (tmp_path / "README.md").read_text() == "before"


def test_write_model_card(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    results = copy.deepcopy(EVERYTHING)
    (folder / "results.json").write_text(json.dumps(results))
    Image.new("RGB", (4, 4)).save(folder / "routed_tokens.png")
    card = write_model_card(folder)
    assert (folder / "README.md").read_text() == str(card) == str(make_model_card("my-model", results))
    assert Image.open(folder / "accuracy_against_compute.png").width > 500
    assert json.loads((folder / "results.json").read_text()) == results


class TestResultsOfTraining:
    def test_image(self, tmp_path):
        config = MoNEConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            patch_size=4,
        )
        model = MoNEForImageClassification(config)
        model.save_pretrained(tmp_path, max_shard_size="4KB")
        model.save_pretrained(tmp_path, variant="fp16")
        model.save_pretrained(tmp_path, variant="bf16", max_shard_size="4KB")
        (tmp_path / "eval_results.json").write_text(
            json.dumps(
                {
                    **{"eval_capacity_0.2_accuracy": 0.25, "eval_capacity_0.2_loss": 2.0, "eval_accuracy": 0.5},
                    **{"eval_capacity_1_accuracy": 0.75, "eval_capacity_1_gmacs": 123.0},
                }
            )
        )
        (tmp_path / "train_results.json").write_text(json.dumps({"epoch": 3.0, "train_runtime": 75.0}))
        assert results_of_training(tmp_path) == {
            "task": "image-classification",
            "model": "MoNE",
            "rows": [
                {"model": "MoNE", "capacity": c, "gmacs": count_macs(config, c) / 1e9, "accuracy": accuracy}
                for c, accuracy in ((0.2, 0.25), (1.0, 0.75))
            ],
            "parameters": model.num_parameters(),
            "epochs": 3.0,
            "train_minutes": 1.2,
        }
        measured = {"eval_capacity_0.2_accuracy": 0.25, "epoch": 1.0}  # of the model before it was trained further
        (tmp_path / "eval_results.json").write_text(json.dumps(measured))
        with pytest.raises(
            ValueError, match=r"eval_results\.json is of epoch 1, and the model of epoch 3: evaluate it"
        ):
            results_of_training(tmp_path)
        for epoch in (0, 3.0):  # 0: evaluated alone
            (tmp_path / "eval_results.json").write_text(json.dumps({**measured, "epoch": epoch}))
            assert results_of_training(tmp_path)["epochs"] == 3.0

    def test_video_at_one_capacity_without_training(self, tmp_path):
        config = MoNEViViTConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_temporal_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=8,
            tubelet_size=(2, 4, 4),
            num_frames=4,
            capacity=0.6,
        )
        MoNEViViTForVideoClassification(config).save_pretrained(tmp_path)
        (tmp_path / "eval_results.json").write_text(json.dumps({"eval_accuracy": 0.5, "eval_capacity": 0.4}))
        results = results_of_training(tmp_path, model="small")
        gmacs = count_macs(config, 0.4) / 1e9
        assert results["rows"] == [{"model": "small", "capacity": 0.4, "gmacs": gmacs, "accuracy": 0.5}]
        assert "gmacs" not in results
        assert results["task"] == "video-classification" and "epochs" not in results
        (tmp_path / "eval_results.json").write_text(json.dumps({"eval_accuracy": 0.5}))
        with pytest.raises(ValueError, match=r"holds no accuracy at a known capacity: \['eval_accuracy'\]"):
            results_of_training(tmp_path)

        shares = [0.0, 0.0, 1.0, 0.0]
        measured = {"eval_accuracy": 0.5, "eval_capacity": shares, "eval_num_clips": 8}
        (tmp_path / "eval_results.json").write_text(json.dumps(measured))
        results = results_of_training(tmp_path)
        (row,) = results["rows"]
        assert (row["capacity"], row["gmacs"]) == (shares, 8 * count_macs(config, shares) / 1e9)
        assert results["gmacs"] == "one video, 8 clips of it"

    def test_several_labels_of_an_example(self, tmp_path):
        config = MoNEConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4)
        MoNEForImageClassification(config).save_pretrained(tmp_path)
        measured = {"eval_capacity_0.5_precision_at_1": 0.75, "eval_precision_at_1": 0.75}
        (tmp_path / "eval_results.json").write_text(json.dumps(measured))
        results = {**RESULTS, **results_of_training(tmp_path)}
        assert [row["accuracy"] for row in results["rows"]] == [0.75]
        card = str(make_model_card("tiny", results))
        assert "What counts as right: a prediction that is among the labels (precision at 1)." in card
