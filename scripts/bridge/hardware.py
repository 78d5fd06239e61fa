"""What this process may use: GPUs and CPU cores. Never imports torch (7 s)."""

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml

# The oldest driver for programs of CUDA 12 (docs.nvidia.com/deploy/cuda-compatibility, minor version compatibility).
LEAST_DRIVER = "525.60.13"


@dataclass(frozen=True)
class Gpu:
    """One visible GPU; memory in bytes. `device` is what CUDA_VISIBLE_DEVICES calls it: its index, or MIG-... a part of one."""

    device: str
    name: str
    memory: int
    memory_used: int


def visible_gpus(env: Mapping[str, str]) -> list[Gpu]:
    """GPUs that CUDA would see, in the order of the PCI bus: those of the driver that CUDA_VISIBLE_DEVICES names.
    Like CUDA, reads the list up to its first name that is no GPU, and takes the first part of a GPU that is divided (MIG)."""
    if not driver_answers():
        return []
    found = {}
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        parts = mig_devices(handle)
        for device in [handle] if parts is None else parts:
            memory, uuid = pynvml.nvmlDeviceGetMemoryInfo(device), pynvml.nvmlDeviceGetUUID(device)
            # By index where there is one: vLLM takes no other names.
            found[uuid] = Gpu(str(index) if parts is None else uuid, pynvml.nvmlDeviceGetName(device), memory.total,
                              memory.used)
            for name in (str(index), pynvml.nvmlDeviceGetUUID(handle)):
                found.setdefault(name, found[uuid])
    return select_gpus(found, env.get("CUDA_VISIBLE_DEVICES"))


def driver_answers() -> bool:
    """Whether there is a driver and a device, without which no GPU can be used. NVML stays open: the next look is cheap."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


def mig_devices(handle) -> list | None:
    """NVML's handles of the parts of a GPU that is divided (MIG); None for one that is whole."""
    try:
        if pynvml.nvmlDeviceGetMigMode(handle)[0] != pynvml.NVML_DEVICE_MIG_ENABLE:
            return None
    except (pynvml.NVMLError_NotSupported, pynvml.NVMLError_FunctionNotFound):
        return None
    parts = []
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        # There may be fewer parts than there could be.
        with suppress(pynvml.NVMLError_NotFound):
            parts.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
    return parts


def select_gpus(found: Mapping[str, Gpu], visible: str | None) -> list[Gpu]:
    """Apply CUDA_VISIBLE_DEVICES (None: not set) to the GPUs found, keyed by index and by UUID."""
    names = [name for name in found if name.isdecimal()] if visible is None else [name.strip() for name in visible.split(",")]
    gpus = []
    for name in names:
        match = [key for key in found if key == name or (name.startswith(("GPU-", "MIG-")) and key.startswith(name))]
        if not match:
            break
        gpus.append(found[match[0]])
    # A process sees one part of one GPU, and then no other GPU beside it.
    return [gpu for gpu in gpus if gpu.device.startswith("MIG-")][:1] or gpus


def driver_version() -> str | None:
    return pynvml.nvmlSystemGetDriverVersion() if driver_answers() else None


def driver_problems(version: str | None) -> list[str]:
    """Why this driver does not go with CUDA 12.4; nothing of one that is not there."""
    found, least = ([int(part) for part in re.findall(r"\d+", text)] for text in (version or LEAST_DRIVER, LEAST_DRIVER))
    return [f"driver {version} is too old for CUDA 12.4, which needs {LEAST_DRIVER} or newer. Ask the administrator for one, "
            "or for nodes that have one."] if found < least else []


def infiniband(root: Path = Path("/")) -> tuple[list[str], list[str]]:
    """Cards of InfiniBand or RoCE with an active port, and why NCCL would take TCP all the same, in silence (nccl#451)."""
    states = root.glob("sys/class/infiniband/*/ports/*/state")
    active = sorted({state.parents[2] for state in states if "ACTIVE" in state.read_text()})
    # A container shows the host's /sys, and of /dev what it was given.
    wanted = [root / "dev/infiniband" / file.name for card in active
              for file in list(card.glob("device/infiniband_verbs/uverbs*")) or [Path("uverbs*")]]
    missing = [str(device) for device in wanted if not os.access(device, os.R_OK | os.W_OK)]
    return [card.name for card in active], [
        f"{', '.join(missing)} cannot be opened here, so NCCL would use TCP between nodes. With Apptainer: export APPTAINER_BIND="
        "/dev/infiniband; else ask the administrator."] if missing else []


def cpu_count(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """CPU cores this process may use: its affinity (as Slurm sets it) and the cgroup's quota, whichever is less."""
    cores, quota_file = len(os.sched_getaffinity(0)), cgroup / "cpu.max"
    quota, period = quota_file.read_text().split() if quota_file.is_file() else ("max", "1")
    return cores if quota == "max" else min(cores, max(1, int(quota) // int(period)))


def free_memory(env: Mapping[str, str]) -> int:
    """Bytes of the host's memory that this process may still take: what is free, and at most half of a Slurm job's limit."""
    node, core, cores = (int(env.get(f"SLURM_{name}") or 0) for name in ("MEM_PER_NODE", "MEM_PER_CPU", "CPUS_ON_NODE"))
    # In MiB. What the job has taken of it is not seen in every container.
    limit = node or core * cores
    return min(psutil.virtual_memory().available, limit << 19 or sys.maxsize)


def vllm_problems(gpus: list[Gpu]) -> list[str]:
    """Parts of a divided GPU, by whose names vLLM 0.8.5 ends (platforms/cuda.py takes numbers only)."""
    return [f"{gpu.device} is a part of a divided GPU (MIG), which vLLM does not take. Use a whole GPU; SFT goes with a part."
            for gpu in gpus if gpu.device.startswith("MIG-")]


def core_problem(cores: int, gpus: int) -> str | None:
    """Why so few CPU cores slow a training on so many GPUs down; None if there are enough."""
    wanted = gpus + 2
    if cores >= wanted:
        return None
    return (f"{cores} CPU {'core' if cores == 1 else 'cores'} for {gpus} {'GPU' if gpus == 1 else 'GPUs'}: each GPU's process "
            f"keeps one busy, so the GPUs will wait. Use at least {wanted}; on Slurm --cpus-per-task, which `srun` inside a job "
            f"takes from SRUN_CPUS_PER_TASK={wanted} only.")
