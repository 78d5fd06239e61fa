"""[image, GPU] What bounds a PPO step: seconds, kernels, allocations and garbage collection of each phase of a real run.

    cd tests/gpu; ../../scripts/host/container.sh ppo actor_rollout_ref.model.external_lib=profiled \\
        critic.model.external_lib=bridge.trainers.speedups trainer.total_training_steps=3

Called in this folder, since Ray's workers find modules where the trainer was started. It writes profile/PHASE.txt in the
stage's folder.
Seconds are of the phase's second call; the kernels of its third, which the profiler slows down.
"""

import functools
import gc
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

TIMED, TRACED = 2, 3
COUNTERS = ("num_device_alloc", "num_device_free", "num_alloc_retries")


def watch(owner: type, method: str, file: Path) -> None:
    """Let a method report on its second and third call into the file.

    Args:
        owner: the class whose method it is.
        method: its name.
        file: where the report goes; its folder is made.
    """
    plain, calls = getattr(owner, method), itertools.count(1)

    @functools.wraps(plain)
    def watched(*args, **options):
        call = next(calls)
        if call not in (TIMED, TRACED):
            return plain(*args, **options)
        file.parent.mkdir(parents=True, exist_ok=True)
        with (timed if call == TIMED else traced)(file):
            return plain(*args, **options)

    setattr(owner, method, watched)


@contextmanager
def timed(file: Path) -> Iterator[None]:
    """Write what is in the block took: seconds, those of them in the garbage collector, and the GPU's memory."""
    collected, began = 0.0, 0.0

    def collection(phase: str, _info: dict) -> None:
        nonlocal collected, began
        if phase == "start":
            began = time.perf_counter()
        else:
            collected += time.perf_counter() - began

    before, started = memory(), seconds()
    gc.callbacks.append(collection)
    try:
        yield
    finally:
        gc.callbacks.remove(collection)
    took, after = seconds() - started, memory()
    lines = [f"{took:10.3f} s", f"{collected:10.3f} s of them in Python's garbage collector"]
    lines += [f"{after[name] - before[name]:10} {name}" for name in COUNTERS if name in after]
    file.write_text("\n".join(lines) + "\n")


@contextmanager
def traced(file: Path) -> Iterator[None]:
    """Add the kernels of the block to the file, longest first."""
    on_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as trace:
        yield
        seconds()
    # Among the GPU's events are the CPU's calls that launch kernels and wait for them: those are no kernels.
    spent_on = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = sorted(((getattr(event, spent_on) / 1e6, event.count, event.key) for event in trace.key_averages()
                      if getattr(event, spent_on)), reverse=True)
    lines = [f"{sum(spent for spent, _, _ in kernels):10.3f} s of kernels"]
    lines += [f"{spent:10.3f} s {count:>7} x {name[:150]}" for spent, count, name in kernels[:40]]
    with file.open("a") as report:
        report.write("\n".join(lines) + "\n")


def seconds() -> float:
    """The time, once the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory() -> dict[str, int]:
    """PyTorch's counters of the GPU's memory; none without a GPU."""
    return torch.cuda.memory_stats() if torch.cuda.is_available() else {}


def watch_all(folder: Path) -> None:
    """Watch the phases of verl's PPO."""
    from verl.workers.actor import DataParallelPPOActor
    from verl.workers.critic import DataParallelPPOCritic
    from verl.workers.rollout.vllm_rollout import vLLMRollout
    from verl.workers.sharding_manager.fsdp_vllm import FSDPVLLMShardingManager

    for phase, owner, method in (("weights_to_vllm", FSDPVLLMShardingManager, "__enter__"),
                                 ("generation", vLLMRollout, "generate_sequences"),
                                 ("vllm_to_sleep", FSDPVLLMShardingManager, "__exit__"),
                                 ("log_probs", DataParallelPPOActor, "compute_log_prob"),
                                 ("values", DataParallelPPOCritic, "compute_values"),
                                 ("critic_update", DataParallelPPOCritic, "update_critic"),
                                 ("actor_update", DataParallelPPOActor, "update_policy")):
        watch(owner, method, folder / f"{phase}.txt")


# One process of several speaks for all.
if torch.cuda.is_available() and os.environ.get("RANK", "0") == "0":
    watch_all(Path(os.environ["BRIDGE_STAGE_DIR"]) / "profile")
