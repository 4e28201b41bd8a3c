"""Ctrl-C and SIGTERM: noted, obeyed at once, and outlived by data-loader workers."""

import os
import signal
import subprocess
import threading
import time

import pytest
import torch

from mone.training.signals import Interruption, protect_workers


def test_a_first_signal_is_noted_and_a_second_one_stops():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert interruption.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    with Interruption(at_once=True), pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the sender of a signal is unknown here")
def test_workers_outlive_signals_of_others_and_end_with_their_loader():
    loader = torch.utils.data.DataLoader(
        torch.arange(40), num_workers=2, multiprocessing_context="fork", worker_init_fn=time.sleep
    )
    batches = iter(protect_workers(protect_workers(loader)))
    seen = [next(batches), next(batches)]  # one of each worker
    workers = batches._workers
    for worker in workers:
        subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    seen += batches
    assert torch.cat(seen).tolist() == list(range(40))
    assert [worker.exitcode for worker in workers] == [0, 0]

    batches = iter(loader)
    next(batches)
    first, _ = batches._workers
    first.terminate()
    first.join(60)
    assert first.exitcode == 0


def test_signals_outside_of_the_main_thread_are_left_alone():
    seen = []

    def work():
        with Interruption() as interruption:
            seen.append(interruption)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen and seen[0].signal is None
