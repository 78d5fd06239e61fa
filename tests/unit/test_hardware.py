"""Which GPUs and cores a run gets. The GPUs are made up: what the driver would say is handed in."""

from types import SimpleNamespace

import pynvml
import pytest

from bridge import hardware, settings
from bridge.errors import UsageError
from bridge.hardware import Gpu
from bridge.stages import train
from bridge.stages.table import STAGES

EIGHT = {key: Gpu(str(i), "NVIDIA H100 80GB HBM3", 85 * 10**9, 0) for i in range(8) for key in (str(i), f"GPU-{i}{i}{i}{i}")}


def devices(visible: str | None) -> list[str]:
    return [gpu.device for gpu in hardware.select_gpus(EIGHT, visible)]


@pytest.mark.parametrize(("visible", "seen"), [
    (None, list("01234567")), ("4,5", ["4", "5"]), ("", []), ("-1", []), ("5, 4", ["5", "4"]), ("GPU-33", ["3"]),
    # Like CUDA: the list ends at its first name that is no GPU.
    ("1,9,2", ["1"]),
])
def test_cuda_visible_devices_is_read_as_cuda_reads_it(visible, seen):
    assert devices(visible) == seen


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", None), ("150000 100000", 1), ("50000 100000", 1)])
def test_the_cgroups_share_of_cores_counts(tmp_path, quota, cores):
    (tmp_path / "cpu.max").write_text(quota)
    unlimited = hardware.cpu_count(tmp_path / "none")
    assert hardware.cpu_count(tmp_path) == (unlimited if cores is None else min(cores, unlimited))


@pytest.mark.parametrize(("cores", "gpus", "enough"), [(1, 8, False), (9, 8, False), (10, 8, True), (2, 1, False), (3, 1, True)])
def test_fewer_cores_than_the_gpus_processes_keep_busy_are_a_problem(cores, gpus, enough):
    said = hardware.core_problem(cores, gpus)
    assert said is None if enough else f"SRUN_CPUS_PER_TASK={gpus + 2}" in said


class FakeNvml:
    """Not the driver: GPU 0 is whole, GPU 1 divided into two parts of four, GPU 2 with no part made. Handles are UUIDs."""

    whole, parts = ["GPU-00", "GPU-11", "GPU-22"], {"GPU-11": ["MIG-aa", "MIG-bb", None, None], "GPU-22": [None] * 4}
    NVML_DEVICE_MIG_ENABLE = 1
    NVMLError = pynvml.NVMLError
    NVMLError_NotSupported = pynvml.NVMLError_NotSupported
    NVMLError_FunctionNotFound = pynvml.NVMLError_FunctionNotFound
    NVMLError_NotFound = pynvml.NVMLError_NotFound

    def nvmlInit(self): ...

    def nvmlDeviceGetCount(self):
        return len(self.whole)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.whole[index]

    def nvmlDeviceGetUUID(self, handle):
        return handle

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA H100 MIG 3g.40gb" if handle.startswith("MIG") else "NVIDIA H100"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=40 if handle.startswith("MIG") else 80, used=0)

    def nvmlDeviceGetMigMode(self, handle):
        if handle == "GPU-00":
            raise pynvml.NVMLError_NotSupported
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        return 4

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, index):
        if self.parts[handle][index] is None:
            raise pynvml.NVMLError_NotFound
        return self.parts[handle][index]


@pytest.mark.parametrize(("visible", "seen"), [
    ("MIG-bb", [("MIG-bb", 40)]), ("0", [("0", 80)]), ("1", [("MIG-aa", 40)]), ("GPU-11", [("MIG-aa", 40)]), ("2", []),
    # CUDA shows a process one part, and beside it no whole GPU.
    ("MIG-bb,MIG-aa", [("MIG-bb", 40)]), (None, [("MIG-aa", 40)]), ("MIG-cc", []),
])
def test_the_parts_of_a_divided_gpu_are_found_as_cuda_finds_them(monkeypatch, visible, seen):
    monkeypatch.setattr(hardware, "pynvml", FakeNvml())
    found = hardware.visible_gpus({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    assert [(gpu.device, gpu.memory) for gpu in found] == seen


@pytest.mark.parametrize(("stage", "refused"), [("sft", False), ("ppo", True)])
def test_a_part_of_a_gpu_is_for_sft_alone_since_vllm_takes_none(env, monkeypatch, stage, refused):
    monkeypatch.setattr(hardware, "visible_gpus", lambda env: [Gpu("MIG-aa", "NVIDIA H100 MIG 3g.40gb", 40 * 10**9, 0)])
    try:
        STAGES[stage].plan(settings.read({**env, "GPUS": "1"}), env, [], dry_run=False)
        assert not refused
    except UsageError as error:
        assert refused and "MIG-aa is a part of a divided GPU (MIG), which vLLM does not take" in str(error)


def choose(monkeypatch, gpus: list[Gpu], **env: str) -> tuple[int | None, list[str]]:
    """What the door decides on a machine with these GPUs: how many it uses, and what is wrong."""
    monkeypatch.setattr(hardware, "visible_gpus", lambda env: gpus)
    problems: list[str] = []
    env = {"PROFILE": "tutorial", **env}
    count, on_cpu = train.choose_hardware(settings.read(env), env, [], problems, dry_run=False)
    assert not on_cpu
    return count, problems


def gpus(count: int, used: int = 0) -> list[Gpu]:
    return [Gpu(str(i), "NVIDIA H100 80GB HBM3", 85 * 10**9, used if i == 0 else 0) for i in range(count)]


def test_all_visible_gpus_are_used_unless_told_otherwise(monkeypatch):
    assert choose(monkeypatch, gpus(4)) == (4, [])
    assert choose(monkeypatch, gpus(4), GPUS="2") == (2, [])


def test_more_gpus_than_are_visible_are_refused_with_the_number_there_is(monkeypatch):
    _, problems = choose(monkeypatch, gpus(4), GPUS="8", CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert problems == ["GPUS=8, but 4 visible (CUDA_VISIBLE_DEVICES=0,1,2,3). Use GPUS=4 or less."]


def test_a_gpu_in_use_is_refused_unless_it_may_be_shared(monkeypatch):
    _, problems = choose(monkeypatch, gpus(2, used=40 * 10**9))
    assert "GPU 0 is in use (37 of 79 GiB)" in problems[0] and "SHARE_GPU=1" in problems[0]
    assert choose(monkeypatch, gpus(2, used=40 * 10**9), SHARE_GPU="1") == (2, [])


@pytest.mark.parametrize(("stage", "memory", "refused"), [("ppo", 10**6, True), ("ppo", 10**9, False), ("sft", 10**6, False)])
def test_ppo_is_refused_where_vllm_cannot_hold_the_weights(env, monkeypatch, stage, memory, refused):
    monkeypatch.setattr(hardware, "visible_gpus", lambda env: [Gpu("0", "a GPU", memory, 0)])
    # The tiny model's weights, a quarter of a MB, do not fit into the tenth of 1 MB.
    env = {**env, "PROFILE": "tuned", "GPUS": "1"}
    arguments = ["actor_rollout_ref.rollout.gpu_memory_utilization=0.1"] if stage == "ppo" else []
    problems = []
    try:
        train.plan(stage, settings.read(env), env, arguments, dry_run=True)
    except UsageError as error:
        problems = error.problems
    said = [problem for problem in problems if "does not hold the model's weights, 0.0002" in problem]
    assert (len(said) == len(problems) == 1) if refused else problems == []


def test_the_trainer_sees_the_first_of_the_visible_gpus_only(monkeypatch):
    monkeypatch.setattr(hardware, "visible_gpus", lambda env: hardware.select_gpus(EIGHT, env["CUDA_VISIBLE_DEVICES"]))
    own_env, notes = {}, []
    train.limit_gpus(2, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, own_env, notes)
    assert own_env == {"CUDA_VISIBLE_DEVICES": "4,5"} and notes == ["CUDA_VISIBLE_DEVICES=4,5 (the first 2 of 4)"]


def test_of_the_hosts_memory_half_of_the_jobs_limit_may_be_taken(monkeypatch):
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 << 30))
    assert hardware.free_memory({}) == 100 << 30
    assert hardware.free_memory({"SLURM_MEM_PER_NODE": str(64 << 10)}) == 32 << 30
    assert hardware.free_memory({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "16"}) == 16 << 30
    assert hardware.free_memory({"SLURM_MEM_PER_NODE": str(900 << 10)}) == 100 << 30
    assert hardware.free_memory({"SLURM_MEM_PER_NODE": "0"}) == 100 << 30
