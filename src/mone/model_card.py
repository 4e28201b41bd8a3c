# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Model cards, written from a file of measured results: a card states what that file holds, and nothing else.

`results.json` lies beside the card, in `model_cards/<name>/`. Its fields; those marked * have to be there:

| field | value |
|---|---|
| `task`* | `"image-classification"` or `"video-classification"` |
| `license`* | the Hub's identifier, such as `"apache-2.0"` |
| `dataset`* | measured on: `{"name": ..., "type": Hub id or a word}`, if known with `"split"` and `"size"` |
| `rows`* | measurements, as `plot_accuracy_against_compute` takes them |
| `model` | of the rows' models the one that the card is about, not for comparison; default: the first |
| `summary` | first paragraph |
| `sections` | `{title: text}`, in this order, after the table |
| `limits` | what the model cannot do, or what was not measured |
| `gmacs` | what the compute is of; default: one image, or one clip |
| `accuracy` | what counts as right; default: a prediction that equals the label |
| `chance` | accuracy of guessing, in [0, 1] |
| `confusion` | `{"capacity": ..., "counts": {true class: {predicted class: examples}}}` |
| `commands` | list of shell commands by which the results were made |
| `machine`, `date` | where and when |
| `parameters`, `epochs`, `train_minutes` | a number, or `{model: number}` |
| `datasets`, `base_model`, `tags` | Hub ids of training data and source model; more tags. Lists |
| `hub_id` | where the weights are published |
| `pictures` | list of `{"file": ..., "caption": ...}`, files in the card's folder |
| `other` | measurements that the card does not show |
"""

import difflib
import json
import math
import numbers
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers import AutoConfig

from .capacity import SUM_TOLERANCE, as_number
from .flops import count_macs
from .plots import plot_accuracy_against_compute


REQUIRED = ("task", "license", "dataset", "rows")
TASKS = {"image-classification": "image", "video-classification": "clip"}
PLOT = "accuracy_against_compute.png"


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_number(value) -> bool:
    """Whether `value` is a number of at least 0, which infinity, NaN and `True` are not."""
    number = as_number(value)
    return number is not None and number >= 0


def _is_list(value, of: Callable) -> bool:
    return isinstance(value, (list, tuple)) and all(map(of, value))


def _is_dict(value, of: Callable = lambda _: True) -> bool:
    return isinstance(value, dict) and all(map(of, value.values()))


def _is_capacity(value) -> bool:
    if _is_list(value, _is_number):
        return abs(sum(value) - 1) <= SUM_TOLERANCE
    return value is None or (_is_number(value) and 0 < value <= 1)


# What a field may hold, in words and as a function.
TEXT = ("a string", _is_text)
TEXTS = ("a list of strings", lambda value: _is_list(value, _is_text))
SHARE = ("a number in [0, 1], not in percent", lambda value: _is_number(value) and value <= 1)
CAPACITY = ("null, a number above 0 and up to 1, or shares that sum to 1", _is_capacity)
POSITIVE = ("a number above 0", lambda value: _is_number(value) and value > 0)
NUMBERS = ("a number >= 0, or {model: number}", lambda value: _is_number(value) or _is_dict(value, _is_number))
FIELDS = {
    "task": (f"one of {list(TASKS)}", list(TASKS).__contains__),
    "license": TEXT,
    "dataset": ("an object", _is_dict),
    "rows": ("a list of at least one object", lambda value: value and _is_list(value, _is_dict)),
    **dict.fromkeys(("model", "summary", "limits", "gmacs", "accuracy", "machine", "date", "hub_id"), TEXT),
    **dict.fromkeys(("commands", "datasets", "base_model", "tags"), TEXTS),
    **dict.fromkeys(("parameters", "epochs", "train_minutes"), NUMBERS),
    "sections": ("{title: text}", lambda value: _is_dict(value, _is_text)),
    "chance": SHARE,
    "confusion": ("an object", _is_dict),
    "pictures": ("a list of objects", lambda value: _is_list(value, _is_dict)),
    "other": ("anything", lambda value: True),
}
DATASET = {"name": TEXT, "type": TEXT, "split": TEXT, "size": POSITIVE}
ROW = {"model": TEXT, "capacity": CAPACITY, "gmacs": POSITIVE, "accuracy": SHARE}
COUNTS = (
    "{true class: {predicted class: number}}",
    lambda value: _is_dict(value, lambda row: _is_dict(row, _is_number)),
)
CONFUSION = {"capacity": CAPACITY, "counts": COUNTS}
PICTURE = {"file": TEXT, "caption": TEXT}
# The field `accuracy` where examples have any number of labels.
PRECISION_AT_1 = "a prediction that is among the labels (precision at 1)"
# Fields that results_of_training gives; where it does not, one of an earlier training would be wrong.
OF_TRAINING = ("task", "model", "rows", "parameters", "epochs", "train_minutes", "gmacs", "accuracy")


def write_model_card(folder: str | os.PathLike) -> ModelCard:
    """Write `README.md` and the plot of accuracy against compute into a folder that has a `results.json`.

    Args:
        folder: of the card; its name is the model's.

    Raises:
        FileNotFoundError: there is no `results.json`, or a picture that it names does not exist.
        ValueError: what `results.json` holds is not allowed; the message names the field.
        ImportError: without matplotlib.
    """
    folder = Path(folder).resolve()
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    card = make_model_card(folder.name, results)
    check_pictures(folder, results.get("pictures", []))
    plot_accuracy_against_compute(results["rows"], path=folder / PLOT)
    card.save(folder / "README.md")
    return card


def make_model_card(name: str, results: dict) -> ModelCard:
    """The card of a model of this name; `results` as described above.

    Raises:
        ValueError: a field is missing, unknown or not allowed.
    """
    check_results(results)
    subject = results.get("model", results["rows"][0]["model"])
    dataset = results["dataset"]
    data = ModelCardData(
        license=results["license"],
        library_name="transformers",
        pipeline_tag=results["task"],
        base_model=results.get("base_model"),
        datasets=results.get("datasets"),
        metrics=["accuracy"],
        tags=["mone", "vision", results["task"], *results.get("tags", [])],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type=results["task"],
                dataset_type=dataset["type"],
                dataset_name=dataset["name"],
                dataset_split=dataset.get("split"),
                metric_type="accuracy",
                metric_value=row["accuracy"],
                metric_name="Accuracy" if row["capacity"] is None else f"Accuracy at capacity {row['capacity']}",
                metric_args=None if row["capacity"] is None else {"capacity": row["capacity"]},
            )
            for row in results["rows"]
            if row["model"] == subject
        ],
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        "<!-- Written by scripts/make_model_card.py from results.json; change that, and run it again. -->",
        f"# {name}",
        results.get("summary"),
        *_use(results),
        "## Accuracy and compute",
        _table(results["rows"]),
        _caption(results),
        *(part for title, text in results.get("sections", {}).items() for part in (f"## {title}", text)),
        *_confusion(results),
        *(["## Limits", results["limits"]] if "limits" in results else []),
        *_training(results, subject),
        "## Pictures",
        *(_picture(picture["file"], picture["caption"]) for picture in results.get("pictures", [])),
        _picture(PLOT, f"Accuracy against compute, of {_input(results)}."),
        f"Licence: {results['license']}.",
    ]
    return ModelCard("\n\n".join(part for part in parts if part) + "\n")


def check_results(results: dict) -> None:
    """Raise ValueError unless `results` has the fields that a card needs, no others, and in them what is allowed."""
    for field in results:
        if field not in FIELDS:
            close = difflib.get_close_matches(field, FIELDS, 1)
            hint = f" Did you mean {close[0]!r}?" if close else f" Allowed are {list(FIELDS)}."
            raise ValueError(f"results.json has an unknown field {field!r}.{hint}")
    _check("results.json", results, FIELDS, REQUIRED)
    _check(f"The dataset {results['dataset']!r}", results["dataset"], DATASET, ("name", "type"))
    for row in results["rows"]:
        _check(f"The row {row!r}", row, ROW, ROW)
    if "confusion" in results:
        _check("confusion", results["confusion"], CONFUSION, CONFUSION)
    for picture in results.get("pictures", []):
        _check(f"The picture {picture!r}", picture, PICTURE, PICTURE)
    models = {row["model"] for row in results["rows"]}
    if results.get("model", min(models)) not in models:
        raise ValueError(f"model={results['model']!r} is none of the rows' models {sorted(models)}.")


def _check(name: str, values: dict, allowed: dict[str, tuple[str, Callable]], required: Iterable[str]) -> None:
    lacking = [field for field in required if field not in values]
    if lacking:
        raise ValueError(f"{name} lacks {lacking}.")
    for field, (what, is_allowed) in allowed.items():
        if field in values and not is_allowed(values[field]):
            raise ValueError(f"{name}: {field}={values[field]!r} must be {what}.")


def check_pictures(folder: Path, pictures: list[dict]) -> None:
    """Raise FileNotFoundError unless the files of all `pictures`, as in `results.json`, are in `folder`."""
    for picture in pictures:
        if not (folder / picture["file"]).exists():
            raise FileNotFoundError(f"results.json names the picture {picture['file']!r}, which is not in {folder}.")


def results_of_training(folder: str | os.PathLike, model: str = "MoNE") -> dict:
    """The fields that a training script's output folder holds, of [`OF_TRAINING`].

    Minutes are those of the last run, which is not the whole training where it was resumed.

    Args:
        folder: `--output_dir` of a run with `--do_eval`.
        model: name of the rows.

    Raises:
        FileNotFoundError: there is no `eval_results.json` or no model.
        ValueError: it holds no accuracy.
    """
    folder = Path(folder)
    config = AutoConfig.from_pretrained(folder)
    measured = json.loads((folder / "eval_results.json").read_text(encoding="utf-8"))
    metric = "precision_at_1" if "eval_precision_at_1" in measured else "accuracy"  # with several labels per example
    prefix, suffix = "eval_capacity_", f"_{metric}"
    accuracies = [
        (float(key.removeprefix(prefix).removesuffix(suffix)), value)
        for key, value in measured.items()
        if key.startswith(prefix) and key.endswith(suffix)
    ]
    if not accuracies and {"eval_capacity", f"eval_{metric}"} <= set(measured):
        accuracies = [(measured["eval_capacity"], measured[f"eval_{metric}"])]
    if not accuracies:
        raise ValueError(f"{folder / 'eval_results.json'} holds no accuracy at a known capacity: {sorted(measured)}.")
    num_clips = measured.get("eval_num_clips", 1)
    results = {
        "task": "video-classification" if config.model_type == "mone_vivit" else "image-classification",
        "model": model,
        "rows": [
            {"model": model, "capacity": c, "gmacs": num_clips * count_macs(config, c) / 1e9, "accuracy": accuracy}
            for c, accuracy in accuracies
        ],
        "parameters": _count_parameters(folder),
    }
    if num_clips > 1:
        results["gmacs"] = compute_of_clips(num_clips)
    if metric == "precision_at_1":
        results["accuracy"] = PRECISION_AT_1
    training = folder / "train_results.json"
    if training.exists():
        trained = json.loads(training.read_text(encoding="utf-8"))
        if measured.get("epoch") and measured["epoch"] != trained["epoch"]:  # an evaluation alone has none
            raise ValueError(
                f"{folder / 'eval_results.json'} is of epoch {measured['epoch']:g}, and the model of epoch "
                f"{trained['epoch']:g}: evaluate it again."
            )
        results["epochs"] = trained["epoch"]
        results["train_minutes"] = round(trained["train_runtime"] / 60, 1)
    return results


def compute_of_clips(num_clips: int) -> str:
    """What the compute is of where the logits of several clips are averaged, as the field `gmacs` says it."""
    return f"one video, {num_clips} clips of it"


def _count_parameters(folder: Path) -> int:
    # Not "*": beside the weights or their shards may lie the same ones in another precision (`variant`).
    files = sorted(folder.glob("model.safetensors")) or sorted(folder.glob("model-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"There are no weights in {folder}.")
    total = 0
    for path in files:
        with safe_open(path, "pt") as weights:
            total += sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())  # noqa: SIM118
    return total


# --- parts of the text -----------------------------------------------------------------------------------------------


def _input(results: dict) -> str:
    return results.get("gmacs", f"one {TASKS[results['task']]}")


def _use(results: dict) -> list[str]:
    if "hub_id" not in results:
        return []
    capacity = next((row["capacity"] for row in results["rows"] if row["capacity"] is not None), 1.0)
    return [
        "## Use",
        "```python\nimport mone  # for the argument `capacity`\nfrom transformers import pipeline\n\n"
        f'classify = pipeline("{results["task"]}", model="{results["hub_id"]}", capacity={capacity})\n```',
        "Without the package, `trust_remote_code=True` takes the code from this repository; pipelines then run at "
        "`config.capacity`.",
    ]


def _table(rows: Sequence[dict]) -> str:
    """Markdown. Less compute is against a dense model where there is one, else against the same model at 1.0."""
    several = len({row["model"] for row in rows}) > 1
    unit, scale, digits = ("GMACs", 1, 2) if max(row["gmacs"] for row in rows) >= 1 else ("MMACs", 1000, 1)
    head = [*(["model"] if several else []), "capacity", unit, "less compute", "accuracy"]
    lines = [head, ["---"] * len(head)]
    dense = next((row for row in rows if row["capacity"] is None), None)
    for row in rows:
        full = dense or next((r for r in rows if r["model"] == row["model"] and r["capacity"] == 1), None)
        lines.append(
            [
                *([row["model"]] if several else []),
                _capacity(row["capacity"]),
                f"{row['gmacs'] * scale:.{digits}f}",
                "" if full is None else f"{full['gmacs'] / row['gmacs']:.2f}x",
                f"{row['accuracy']:.1%}",
            ]
        )
    return _markdown(lines)


def _capacity(capacity: float | Sequence[float] | None) -> str:
    if capacity is None:
        return "dense"
    return f"{capacity:g}" if isinstance(capacity, numbers.Real) else "/".join(f"{share:g}" for share in capacity)


def _markdown(lines: list[list[str]]) -> str:
    # A "|" or a line break in a name would end its cell.
    rows = [[" ".join(cell.split()).replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _caption(results: dict) -> str:
    dataset = results["dataset"]
    what = f"{dataset['size']:,} examples of {dataset['name']}" if "size" in dataset else dataset["name"]
    split = f", {dataset['split']}" if "split" in dataset else ""
    chance = f" Chance is {results['chance']:.1%}." if "chance" in results else ""
    right = f" What counts as right: {results['accuracy']}." if "accuracy" in results else ""
    return (
        f"Accuracy on {what}{split}.{right}{chance} Compute is that of {_input(results)}, in multiply-accumulates by "
        "`mone.count_macs`."
    )


def _confusion(results: dict) -> list[str]:
    if "confusion" not in results:
        return []
    counts = results["confusion"]["counts"]
    predicted = list(dict.fromkeys([*counts, *(name for row in counts.values() for name in row)]))
    lines = [["", *predicted], ["---"] * (len(predicted) + 1)]
    lines += [[name, *(str(row.get(other) or "") for other in predicted)] for name, row in counts.items()]
    capacity = _capacity(results["confusion"]["capacity"])
    return [f"Confusion at capacity {capacity} (rows: true class, columns: predicted):", _markdown(lines)]


def _training(results: dict, subject: str) -> list[str]:
    facts = []
    for field, text in (
        ("parameters", "{:,} parameters"),
        ("epochs", "{:g} epochs"),
        ("train_minutes", "{:g} minutes of training"),
    ):
        values = results.get(field)
        if values is not None:
            named = values if isinstance(values, dict) else {subject: values}
            listed = ", ".join(
                text.format(value) + (f" ({name})" if len(named) > 1 else "") for name, value in named.items()
            )
            facts.append(listed[0].upper() + listed[1:] + ".")
    where = [results[field] for field in ("date", "machine") if field in results]
    if where:
        facts.append(f"Measured on {', '.join(where)}.")
    commands = [f"```bash\n{command.strip()}\n```" for command in results.get("commands", [])]
    return ["## Training", " ".join(facts), *commands] if facts or commands else []


def _picture(file: str, caption: str) -> str:
    return f"![{caption}]({file})\n\n*{caption}*"
