"""Fixtures that the conversion tests share."""

import pytest
from vits import make_vit


@pytest.fixture
def folder(tmp_path):
    make_vit("deit").save_pretrained(tmp_path / "deit")
    return tmp_path / "deit"
