"""Plots are read back from the figures and compared with their rows. Those of speed and growth: test_benchmark.py."""

import importlib
import sys

import pytest
from PIL import Image

from mone.plots import plot_accuracy_against_compute


pytest.importorskip("matplotlib")


def make_rows():
    rows = [
        {"model": "MoNE", "capacity": capacity, "gmacs": 10 * capacity, "accuracy": 0.6 + 0.2 * capacity}
        for capacity in (1.0, 0.25, 0.5)  # not in order
    ]
    rows += [{"model": "MatViT", "capacity": (0, 0, 1, 0), "gmacs": 5.0, "accuracy": 0.65}]
    return [*rows, {"model": "ViT", "capacity": None, "gmacs": 10.5, "accuracy": 0.82}]


def curves(figure):
    """Lines of the plot by their label, as (x, y) lists."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines}


def test_curve_has_every_point(tmp_path):
    path = tmp_path / "curve.png"
    figure = plot_accuracy_against_compute(make_rows(), path)
    (ax,) = figure.axes
    lines = curves(figure)
    assert lines["MoNE"][0] == [2.5, 5.0, 10.0]
    assert lines["MoNE"][1] == pytest.approx([65, 70, 80])
    assert lines["MatViT"] == ([5.0], [65.0])
    assert lines["ViT"] == ([10.5], [82.0])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["MoNE", "MatViT", "ViT"]
    texts = {tuple(text.xy): text.get_text() for text in ax.texts}
    assert texts == {(2.5, 65.0): "0.25", (5.0, 70.0): "0.5", (10.0, 80.0): "1", (5.0, 65.0): "0.5"}
    assert "GMACs" in ax.get_xlabel()
    assert "%" in ax.get_ylabel()

    star = next(line for line in ax.lines if line.get_label() == "ViT")
    assert star.get_marker() == "*"
    assert star.get_linestyle() == "None"
    (dashed,) = [line for line in ax.lines if line.get_linestyle() == "--"]
    assert set(dashed.get_ydata()) == {82.0}

    with Image.open(path) as written:
        assert written.format == "PNG"
        assert written.size == (960, 630)


def test_one_name_for_dense_and_nested():
    rows = make_rows()
    rows[-1]["model"] = "MoNE"
    lines = curves(plot_accuracy_against_compute(rows))
    assert lines["MoNE"][0] == [2.5, 5.0, 10.0]
    assert lines["MoNE (dense)"] == ([10.5], [82.0])


def test_curve_of_dense_models_only():
    lines = curves(plot_accuracy_against_compute(make_rows()[-1:]))
    assert lines["ViT"] == ([10.5], [82.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": 82.0}, "not in percent"),
        ({"accuracy": float("nan")}, "must be in"),
        ({"gmacs": 0.0}, "positive"),
        ({"gmacs": float("inf")}, "positive"),
    ],
)
def test_plot_refuses_wrong_rows(change, message):
    with pytest.raises(ValueError, match=message):
        plot_accuracy_against_compute([make_rows()[0] | change])


def test_plot_refuses_missing_rows_and_keys():
    with pytest.raises(ValueError, match="`rows` is empty"):
        plot_accuracy_against_compute([])
    with pytest.raises(ValueError, match=r"lacks \['capacity', 'gmacs'\]"):
        plot_accuracy_against_compute([{"model": "ViT", "accuracy": 0.5}])


# --- matplotlib -----------------------------------------------------------------------------------------------------


def test_pyplot_is_not_used(without_pyplot, tmp_path):
    plot_accuracy_against_compute(make_rows(), tmp_path / "curve.png")


def test_missing_matplotlib_is_explained(without_matplotlib):
    importlib.reload(sys.modules["mone.plots"])  # still imports
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_accuracy_against_compute(make_rows())
