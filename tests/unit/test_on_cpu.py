"""What verl's trainers need where there is no GPU, one patch at a time; that the whole trains is in tests/rehearsal."""

import subprocess
import sys

OFFLOADED = """
import torch
from torch.distributed import device_mesh, fsdp, init_process_group
from bridge.trainers import on_cpu

on_cpu.fill_torch_cpu()
on_cpu.offload_without_pinning()
init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
model = torch.nn.Linear(4, 4)
# As verl shards the reference model of a KL loss.
fsdp.fully_shard(model, mesh=device_mesh.init_device_mesh("cpu", (1,)), offload_policy=fsdp.CPUOffloadPolicy(pin_memory=True))
with torch.no_grad():
    print(tuple(model(torch.ones(2, 4)).shape))
"""


def test_a_model_whose_weights_are_offloaded_computes_without_a_gpu():
    # A process of its own, since it changes torch.
    result = subprocess.run([sys.executable, "-c", OFFLOADED], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "(2, 4)\n"), result.stderr
