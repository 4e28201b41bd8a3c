"""`make demo`, shortened: that every step works, not that the models are good."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import demo


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--output_dir", str(tmp_path), "--epochs", "1"])
    demo.main()
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row["capacity"] for row in rows] == [None, *demo.CAPACITIES]
    assert rows[0]["gmacs"] == rows[-1]["gmacs"] > rows[1]["gmacs"]
    for name in ("routed_tokens.png", "accuracy_against_compute.png"):
        assert Image.open(tmp_path / name).size[0] > 300
    printed = capsys.readouterr().out
    assert "capacity 0.4, given at construction" in printed
    assert (tmp_path / "mone" / "model.safetensors").exists()
