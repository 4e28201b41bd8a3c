# Copyright 2026 The mone authors. Licensed under the Apache License, Version 2.0.
"""What is logged of training beside Trainer's own: gathered on the device, read only when it is logged."""

import time
from collections.abc import Iterator, Sequence

import torch


class StepStatistics:
    """Sums over the forward passes since the last log. Nothing here waits for the device but `read`.

    Args:
        num_experts: E.
        learned: whether the routers learn; a random router's entropy says nothing.
        device: of the model.
    """

    def __init__(self, num_experts: int, learned: bool, device: torch.device):
        self.num_experts = num_experts
        self.learned = learned
        self.device = device
        self.first_bad_step = torch.full((), -1.0, device=device)
        self._start()

    def _start(self):
        self.forwards, self.capacities, self.images = 0, 0.0, 0
        self.sums = torch.zeros(1 + self.num_experts, device=self.device)
        self.start, self.waiting = time.perf_counter(), 0.0

    @torch.no_grad()
    def add_forward(
        self, capacity: float, router_logits: Sequence[torch.Tensor], expert_indices: Sequence[torch.Tensor]
    ) -> None:
        """One forward pass: its effective capacity, and `router_logits` and `expert_indices` of its outputs."""
        self.forwards += 1
        self.capacities += capacity
        entropies, loads = [], []
        for logits, experts in zip(router_logits, expert_indices, strict=True):
            log_p = logits.float().log_softmax(-1)
            entropies.append(-(log_p.exp() * log_p).sum(-1).mean())
            # Not one_hot, which waits for the device to check its input.
            numbers = torch.arange(self.num_experts, device=experts.device)
            loads.append((experts.unsqueeze(-1) == numbers).flatten(0, -2).float().mean(0))
        entropy, load = torch.stack(entropies).mean(0, keepdim=True), torch.stack(loads).mean(0)
        self.sums += torch.cat([entropy, load]).to(self.device)

    @torch.no_grad()
    def add_loss(self, loss: torch.Tensor, step: int, images: int) -> None:
        """One micro-batch: its loss, at optimiser step `step`, on so many images."""
        self.images += images
        bad = ~loss.isfinite() & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, torch.full_like(self.first_bad_step, step), self.first_bad_step)

    def timed(self, batches: Iterator) -> Iterator:
        """The same batches; the time that each takes to come counts as waiting for data."""
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waiting += time.perf_counter() - start
            yield batch

    def read(self, accelerator) -> dict[str, float]:
        """The values to log, means over all processes; starts anew. Every process must call it."""
        logs = {}
        if self.forwards:
            means = accelerator.reduce(self.sums / self.forwards, "mean").tolist()
            logs["capacity"] = self.capacities / self.forwards
            if self.learned:
                logs["router_entropy"] = means[0]
            logs |= {f"router_load_{expert}": share for expert, share in enumerate(means[1:])}
            seconds = time.perf_counter() - self.start
            logs["images_per_second"] = accelerator.num_processes * self.images / seconds
            logs["data_waiting"] = self.waiting / seconds  # of this process
        self._start()
        return logs
