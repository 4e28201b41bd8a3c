"""Run a training script in one of several CPU processes: `accelerate launch ... launched.py SCRIPT ARGUMENTS`.

Torch can do FSDP2 on CPU, over gloo, but accelerate takes it for accelerators only: this tells it otherwise. ZeRO-3
would leave parameters as small as those of a test whole: this lets it shard all. At the end each process writes the
parameters that it has, and checksums of the examples that it read of a stream, to parameters_RANK.pt in the output
folder.
"""

import contextlib
import os
import runpy
import sys
import zlib

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType

from mone.data import LabelledStream
from mone.training import MoNETrainer


original_init, original_save = AcceleratorState.__init__, MoNETrainer.save_state
original_post_init, original_read = DeepSpeedPlugin.__post_init__, LabelledStream._read
checksums = []


def init(self, *args, fsdp_plugin=None, **kwargs):
    original_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def post_init(self):
    original_post_init(self)
    self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0


def read(self, row):
    checksums.append(zlib.crc32(row["image"]["bytes"]))
    return original_read(self, row)


def save_state(self):
    original_save(self)
    parameters = dict(self.model.named_parameters())
    sharded = any(hasattr(p, "full_tensor") or not p.numel() for p in parameters.values())
    gathered = contextlib.nullcontext()
    if self.is_deepspeed_enabled:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with gathered:
        own = {name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for name, p in parameters.items()}
    path = os.path.join(self.args.output_dir, f"parameters_{self.args.process_index}.pt")
    processes = self.args.world_size
    torch.save({"parameters": own, "sharded": sharded, "processes": processes, "read": checksums}, path)


AcceleratorState.__init__, MoNETrainer.save_state = init, save_state
DeepSpeedPlugin.__post_init__, LabelledStream._read = post_init, read
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
