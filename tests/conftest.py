"""Settings that every test module shares."""

import sys

import pytest
from hypothesis import settings


# Same examples on every run: a failure that a change causes must not look like luck. No deadline: shared machines.
settings.register_profile("mone", deadline=None, derandomize=True)
settings.load_profile("mone")


@pytest.fixture
def without_matplotlib(monkeypatch):
    """As where it is not installed: importing it fails."""
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def without_pyplot(monkeypatch):
    """Importing it fails. It keeps every figure until closed, and picks a backend, which may want a display."""
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
