"""Interleaved timing: the order of the calls and what is kept, never how long they took."""

import time

from mone.benchmark import interleaved_seconds


def test_variants_run_in_turn_and_warmup_is_dropped():
    calls = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


def test_times_are_of_the_calls():
    seconds = interleaved_seconds({"slow": lambda: time.sleep(0.05)}, rounds=2, warmup=0)
    assert min(seconds["slow"]) >= 0.05
