"""Fixtures that the tests of data sets share."""

import pytest


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")
