"""Run one of verl's trainers where there is no GPU:  python -m bridge.trainers.on_cpu verl.trainer.main_ppo OVERRIDES...
verl 0.5.0 takes `trainer.device=cpu`, but assumes CUDA (or NPU) in a few places, which are filled here, in Ray's workers too.
For rehearsals only: slow, and the numbers differ slightly (float32 instead of bf16, other attention kernels).
"""

import contextlib
import os
import runpy
import sys
from functools import partial
from operator import attrgetter

from bridge.trainers import loopback


def fill_torch_cpu() -> None:
    """Give torch.cpu the calls that verl makes on torch.cuda. Memory figures are this process's."""
    import psutil
    import torch

    calls = {
        **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"),
                        lambda *_: psutil.Process().memory_info().rss),
        "mem_get_info": lambda *_: attrgetter("available", "total")(psutil.virtual_memory()),
        "empty_cache": lambda: None,
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "get_device_name": lambda *_: "cpu",
    }
    for name, call in calls.items():
        setattr(torch.cpu, name, call)
    # CPU work is done when its call returns: nothing to wait for.
    torch.cpu.Stream.record_event = lambda self, event=None: event or torch.cpu.Event()
    torch.cpu.Stream.wait_event = lambda self, _event: None


def use_gloo() -> None:
    """Let torch.distributed run over gloo: verl asks for "cpu:gloo,cpu:gloo", and gloo has no ReduceOp.AVG."""
    import torch.distributed as dist
    import verl.utils.device
    import verl.utils.distributed

    verl.utils.device.get_nccl_backend = verl.utils.distributed.get_nccl_backend = lambda: "gloo"
    init_process_group, all_reduce = dist.init_process_group, dist.all_reduce

    def init(backend=None, **options):
        return init_process_group("gloo" if backend and "gloo" in backend else backend, **options)

    def reduce(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        if op != dist.ReduceOp.AVG:
            return all_reduce(tensor, op=op, group=group, async_op=async_op)
        work = all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
        tensor /= dist.get_world_size(group)
        return work

    dist.init_process_group, dist.all_reduce = init, reduce


def use_sdpa() -> None:
    """Load models with PyTorch's attention: verl asks for flash_attention_2, which needs a GPU."""
    import verl.utils.torch_functional
    from transformers import PreTrainedModel

    # Where transformers looks whether a model can have it.
    instead = classmethod(lambda model, config, **_options: model._check_and_enable_sdpa(config))
    PreTrainedModel._check_and_enable_flash_attn_2 = instead
    # Where flash-attn is installed (the image), verl would take its Triton cross entropy. verl's own spelling.
    verl.utils.torch_functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE = False


def use_varlen_sdpa() -> None:
    """Let PyTorch's attention know where packed rows begin and end, which transformers tells flash attention only."""
    import torch
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def varlen_sdpa(module, query, key, value, attention_mask, cu_seq_lens_q=None, **options):
        if cu_seq_lens_q is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        bounds = cu_seq_lens_q.tolist()
        rows = [sdpa_attention_forward(module, *(states[:, :, start:end] for states in (query, key, value)), None, **options)[0]
                for start, end in zip(bounds, bounds[1:], strict=False)]
        return torch.cat(rows, dim=1), None

    AttentionInterface.register("sdpa", varlen_sdpa)


def use_plain_float32() -> None:
    """Compute in float32: verl asks FSDP2 and autocast for bf16, ten times as slow on a CPU that has no instructions for it.

    Without gradient checkpointing FSDP2 cannot: it gathers float32 weights into the memory that backward has remembered.
    """
    import torch
    from torch.distributed import fsdp

    precision, offload = fsdp.MixedPrecisionPolicy, fsdp.CPUOffloadPolicy
    fsdp.MixedPrecisionPolicy = lambda **options: precision(**{**options, "param_dtype": torch.float32})
    # Of offloaded weights, as those of the reference model: pinned memory is for copies to a GPU.
    fsdp.CPUOffloadPolicy = lambda **_options: offload(pin_memory=False)
    torch.autocast = lambda *_args, **_options: contextlib.nullcontext()


def answer_once() -> None:
    """Let the rollout with transformers answer each row once: the trainer has repeated the prompts, and verl would again."""
    from omegaconf import OmegaConf
    from verl.workers.rollout import HFRollout

    init = HFRollout.__init__

    def of_one(self, module, config) -> None:
        init(self, module, OmegaConf.merge(config, {"n": 1}))

    HFRollout.__init__ = of_one


def setup() -> None:
    """Everything of the above; called in the trainer's process and, by Ray, in every worker."""
    for fill in (fill_torch_cpu, use_gloo, use_sdpa, use_varlen_sdpa, use_plain_float32, answer_once, loopback.close):
        fill()


def main() -> None:
    """Set up, then become verl's module (sys.argv[1]) with the rest of the arguments."""
    sys.argv = sys.argv[1:]
    setup()
    if ranks := int(os.environ.get("BRIDGE_CPU_RANKS", "0")):
        import ray

        # As many as are pretended, or Ray refuses; and CUDA sees none of that number, should there be a GPU that was hidden.
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(["-1"] * ranks)
        # A worker for each of them. (That setup() is called there, loopback.close_ray sees to.)
        ray.init = partial(ray.init, num_gpus=ranks, resources={"cpu": ranks})
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
