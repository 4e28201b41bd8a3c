"""Run a training script in one of several CPU processes: `accelerate launch ... launched.py SCRIPT ARGUMENTS`.

Torch can do FSDP2 on CPU, over gloo, but accelerate takes it for accelerators only: this tells it otherwise. At the
end each process writes the parameters that it has to parameters_RANK.pt in the output folder.
"""

import os
import runpy
import sys

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from mone.training import MoNETrainer


original_init, original_save = AcceleratorState.__init__, MoNETrainer.save_state


def init(self, *args, fsdp_plugin=None, **kwargs):
    original_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def save_state(self):
    original_save(self)
    own = {name: getattr(p, "full_tensor", lambda p=p: p)().detach() for name, p in self.model.named_parameters()}
    sharded = any(hasattr(p, "full_tensor") for p in self.model.parameters())
    path = os.path.join(self.args.output_dir, f"parameters_{self.args.process_index}.pt")
    torch.save({"parameters": own, "sharded": sharded, "processes": self.args.world_size}, path)


AcceleratorState.__init__, MoNETrainer.save_state = init, save_state
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
