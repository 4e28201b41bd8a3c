"""Settings that every test module shares."""

from hypothesis import settings


# Same examples on every run: a failure that a change causes must not look like luck. No deadline: shared machines.
settings.register_profile("mone", deadline=None, derandomize=True)
settings.load_profile("mone")
