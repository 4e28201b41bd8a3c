# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""Ctrl-C and SIGTERM, for a run that stops in order and for its data-loader workers."""

import functools
import logging
import os
import signal
import threading

import torch


logger = logging.getLogger(__name__)


class Interruption:
    """Ctrl-C and SIGTERM as a wish to stop, noted in `signal` while the context lasts. A second one stops at once.

    Outside of the main thread signals are left as they are.

    Args:
        at_once: stop at the first one, too: several processes would note it at different steps.
    """

    def __init__(self, at_once: bool = False):
        self.at_once = at_once
        self.signal: signal.Signals | None = None
        self._previous = {}

    def __enter__(self):
        self.signal = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number, frame):
        if self.at_once or self.signal is not None:
            raise KeyboardInterrupt(signal.Signals(number).name)
        self.signal = signal.Signals(number)
        logger.warning("%s: training stops after this step. Once more stops at once.", self.signal.name)


def protect_workers(loader: torch.utils.data.DataLoader) -> torch.utils.data.DataLoader:
    """Let the processes that read data for `loader` outlive a signal to all of a job, so that it can stop in order.

    Schedulers and terminals send one to every process, and PyTorch raises an error when one of its workers has died.
    SIGTERM from the loader's own process still ends them. Where they are spawned instead of forked (macOS, Windows, or
    on demand), SIGTERM from others still does, too: threads of libraries take it there.
    """
    own = getattr(loader, "base_dataloader", loader)  # Accelerate's hands reading on
    if getattr(own.worker_init_fn, "func", None) is not _start_worker:  # Trainer keeps loaders with lasting workers
        own.worker_init_fn = functools.partial(_start_worker, own.worker_init_fn)
    return loader


def _start_worker(worker_init_fn, worker_id: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_by_parent, daemon=True).start()
    if worker_init_fn is not None:
        worker_init_fn(worker_id)


def _end_by_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
