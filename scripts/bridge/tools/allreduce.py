"""How fast all-reduce is over all ranks, one JSON line a size:   torchrun --nproc_per_node=8 -m bridge.tools.allreduce

On GPUs over NCCL, without a GPU over gloo. algbw is bytes / time; busbw = algbw x 2 (n - 1) / n is what each link carries, as
NVIDIA's nccl-tests count it: comparable between numbers of GPUs, and 0 for one."""

import json
import os

import torch
import torch.distributed as dist
from torch.utils.benchmark import Timer


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    ranks = dist.get_world_size()
    for megabytes in (1, 16, 256, 1024) if on_gpu else (1, 4, 16):
        tensor = torch.zeros(megabytes * 10**6 // 4, device=device)
        # It first warms up with two, and waits for the GPU before and after.
        timer = Timer("dist.all_reduce(tensor)", globals={"dist": dist, "tensor": tensor})
        seconds = timer.timeit(20 if on_gpu else 3).mean
        if dist.get_rank() == 0:
            algbw = megabytes / 1e3 / seconds
            print(json.dumps({"megabytes": megabytes, "seconds": seconds, "algbw_gb_s": round(algbw, 3),
                              "busbw_gb_s": round(algbw * 2 * (ranks - 1) / ranks, 3)}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
