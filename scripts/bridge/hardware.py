"""What this process may use: GPUs and CPU cores. Never imports torch (7 s)."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pynvml


@dataclass(frozen=True)
class Gpu:
    """One visible GPU; memory in bytes. `device` is what CUDA_VISIBLE_DEVICES calls it."""

    device: str
    name: str
    memory: int
    memory_used: int


def visible_gpus(env: Mapping[str, str]) -> list[Gpu]:
    """GPUs that CUDA would see, in its order: those of the driver that CUDA_VISIBLE_DEVICES names.

    Like CUDA, reads the list up to its first name that is no GPU.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        # No driver library or no device: both mean that there is no GPU to use.
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        found = {}
        for index, handle in enumerate(handles):
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
            found[uuid] = found[str(index)] = (name, memory.total, memory.used)
        return select_gpus(found, len(handles), env.get("CUDA_VISIBLE_DEVICES"))
    finally:
        pynvml.nvmlShutdown()


def select_gpus(found: Mapping[str, tuple[str, int, int]], count: int, visible: str | None) -> list[Gpu]:
    """Apply CUDA_VISIBLE_DEVICES (None: not set) to the GPUs found, keyed by index and by UUID."""
    names = [str(i) for i in range(count)] if visible is None else [name.strip() for name in visible.split(",")]
    gpus = []
    for name in names:
        match = [key for key in found if key == name or (name.startswith("GPU-") and key.startswith(name))]
        if not match:
            break
        gpus.append(Gpu(name, *found[match[0]]))
    return gpus


def driver_version() -> str | None:
    """Version of the NVIDIA driver, None without one."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()


def cpu_count(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPU cores this process may use: its affinity (as Slurm sets it) and the cgroup's quota, whichever is less."""
    cores = len(os.sched_getaffinity(0))
    quota_file = cgroup / "cpu.max"
    if quota_file.is_file():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    return cores
