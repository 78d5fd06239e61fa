"""bridge check: the self-test of environment and site, also for the image's %test and for the first line of a job.
Prints one line a check: ok, warn or FAIL, with the value seen. Exit status 1 if any failed. `--json` prints it as JSON."""

import ctypes
import importlib
import json
import os
import re
import shutil
import socket
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bridge import hardware
from bridge.environment import LEAST_FREE, clean_environment, lock_problems, work_dir_problems
from bridge.errors import UsageError, sha256
from bridge.image import manifest
from bridge.pages import page
from bridge.runs import tracking
from bridge.settings import ROOT, Settings
from bridge.stages import model, ppo, train

IMPORTS = ("torch", "vllm", "verl", "ray", "transformers", "datasets", "wandb", "huggingface_hub")
# NCCL and vLLM's workers share memory through /dev/shm; a container's default of 64 MiB is too small.
LEAST_SHM = 1 << 30
# NCCL opens the first; the second finds peers; both need the driver of the card (here Mellanox's, as H100 nodes have them).
INFINIBAND = ("libibverbs.so.1", "librdmacm.so.1", "libmlx5.so.1")
# By which bf16's outputs and gradients may be off; 8 bits are 0.2 % where nothing else is rounded.
MOST_ERROR = 0.02


@dataclass(frozen=True)
class Result:
    check: str
    status: str
    seen: str


def run(settings: Settings, env: Mapping[str, str], arguments: list[str]) -> int:
    if unknown := [argument for argument in arguments if argument != "--json"]:
        raise UsageError(f"check takes only --json; got {' '.join(unknown)}.")
    # Importing vLLM and others makes cache folders: below WORK_DIR, as in a stage.
    env = clean_environment(settings, env)
    os.environ.update(env)
    # vLLM logs to stdout, where the report goes.
    os.environ["VLLM_CONFIGURE_LOGGING"] = "0"
    results = [result for check in CHECKS for result in check(settings, env)]
    count = Counter(result.status for result in results)
    report = {"passed": not count["FAIL"], "ok": count["ok"], "warnings": count["warn"], "failed": count["FAIL"],
              "results": [asdict(result) for result in results]}
    print(json.dumps(report, indent=1) if "--json" in arguments else page("check.txt", **report))
    return 0 if report["passed"] else 1


def judged(check: str, problems: list[str], seen: str, status: str = "FAIL") -> Result:
    """What is wrong, with this status, or what was seen."""
    return Result(check, status if problems else "ok", "; ".join(problems) or seen)


def python_environment(settings: Settings, env: Mapping[str, str]) -> Iterator[Result]:
    """Python, and whether every package has the version of requirements.lock."""
    yield Result("python", "ok" if sys.version_info[:2] == (3, 11) else "FAIL", sys.version.split()[0])
    locked, installed = locked_versions(), manifest.packages()
    wrong = [f"{name} {installed.get(name, 'missing')} instead of {version}" for name, version in locked.items()
             if installed.get(name) != version]
    yield judged("requirements.lock", wrong, f"{len(locked)} packages as locked")


def image(settings: Settings, env: Mapping[str, str]) -> Iterator[Result]:
    """What the image was made of, and whether that is still what is in it."""
    made = manifest.read()
    if made is None:
        yield Result("image", "warn", "not in an image: this is a virtual environment")
    elif made["requirements_lock_sha256"] != sha256(ROOT / "requirements.lock"):
        yield Result("image", "FAIL", f"{ROOT / 'requirements.lock'} is not the one that the image was built from")
    else:
        yield Result("image", "ok", f"recipe {made['recipe_commit']}, {len(made['debian'])} Debian packages")


def locked_versions() -> dict[str, str]:
    """Package -> version, from requirements.lock; lines with a marker for another platform are left out."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;\\]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))


def host(settings: Settings, env: Mapping[str, str]) -> Iterator[Result]:
    """What scripts/host/site.sh saw before the container started."""
    lines = env.get("BRIDGE_HOST_CHECKS") or "ok\thost\tnot looked at (Apptainer, the home): `make check` does"
    for status, check, seen in (line.split("\t") for line in lines.splitlines()):
        yield Result(check, status, seen)


def site(settings: Settings, env: Mapping[str, str]) -> Iterator[Result]:
    """What lets a training fail late, or be slow, on this node. Within seconds, without torch."""
    driver, gpus, (cards, unseen) = hardware.driver_version(), hardware.visible_gpus(env), hardware.infiniband()
    if unwanted := bool(cards) and (env.get("NCCL_IB_DISABLE") or "0") != "0":
        unseen = ["NCCL_IB_DISABLE is set, so NCCL uses TCP between nodes. Unset it, in .env too."]
    work_dir, ray = settings.work_dir, ppo.environment(env)["RAY_TMPDIR"]
    unfit, no_ray = work_dir_problems(work_dir), ppo.folder_problems(ray)
    locks = [] if unfit else lock_problems(work_dir if work_dir.is_dir() else work_dir.parent)
    yield judged("NVIDIA driver", hardware.driver_problems(driver), driver or "none, as on a login node: not looked at")
    yield judged("GPUs", train.busy_problems(settings, gpus[:settings.gpus]), "free, or shared" if gpus else "not looked at")
    yield judged("network card", train.interface_problems(env), env.get("NCCL_SOCKET_IFNAME") or "lo, as none is named")
    yield judged("InfiniBand", unseen, ", ".join(cards) or "no active port here", "warn" if unwanted else "FAIL")
    yield judged("locks in WORK_DIR", locks, "WORK_DIR is wrong: not looked at" if unfit else "given")
    yield judged("RAY_TMPDIR", no_ray, ray)
    for folder in sorted({tempfile.gettempdir(), *([] if no_ray else [ray])}):
        disk = shutil.disk_usage(folder)
        full, free = disk.free < LEAST_FREE, f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB free"
        cure = f"{free}: full, for Ray. Make room there, or name a local disk that has room: RAY_TMPDIR=, and export TMPDIR="
        # Ray makes no object that it would have to spill to a disk that is fuller than 95 % (ray#25370).
        yield judged(f"room in {folder}", [cure] * (full or disk.free < 0.05 * disk.total), free, "FAIL" if full else "warn")
    for check, server, off, otherwise in (
            ("hub", env.get("HF_ENDPOINT") or "https://huggingface.co", model.is_offline(env) and "HF_HUB_OFFLINE",
             "run `make data model` and `make upload` where it answers."),
            ("W&B", tracking.wandb_server(env), env.get("WANDB_MODE") in tracking.NOT_SENT and "WANDB_MODE",
             "runs are offline then; `wandb sync` sends them from where it answers.")):
        reason = None if off else tracking.connection_problem(server, 2)
        said = f"does not answer ({reason}). No failure on a node without internet: {otherwise}"
        yield judged(check, [said] * bool(reason), f"not asked: {off} is set" if off else "answers", "warn")


def imports(settings: Settings, env: Mapping[str, str]) -> Iterator[Result]:
    """Whether the packages import, and all modules from inside the environment."""
    for name in IMPORTS:
        try:
            yield Result(f"import {name}", "ok", getattr(importlib.import_module(name), "__version__", ""))
        except ImportError as error:
            yield Result(f"import {name}", "FAIL", str(error))
    folders = [sys.prefix, ROOT / "scripts", sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"),
               tempfile.gettempdir(), f"/etc/python{sys.version_info[0]}.{sys.version_info[1]}"]
    # torch writes a module of its own into a new folder for temporary files, and imports it; in the last is Debian's own hook.
    homes = {Path(folder).resolve() for folder in folders}
    # Some of torch's are no files, and have a relative name.
    files = {name: Path(module.__file__).resolve() for name, module in list(sys.modules.items())
             if os.path.isabs(getattr(module, "__file__", None) or "")}
    strangers = [f"{name} ({file})" for name, file in sorted(files.items()) if homes.isdisjoint(file.parents)]
    yield judged("modules from outside", strangers, f"none of {len(files)}")


def nccl(settings: Settings, env: Mapping[str, str]) -> Iterator[Result]:
    """The NCCL that torch and vLLM really load; torch.cuda.nccl.version() is a compile-time constant and not asked."""
    import torch
    from vllm.utils import find_nccl_library

    # The lock's CUDA runtime says which one torch has to be built for.
    wanted, cuda = (locked_versions()[name] for name in ("nvidia-nccl-cu12", "nvidia-cuda-runtime-cu12"))
    yield Result("cuda of torch", "ok" if torch.version.cuda == cuda.rpartition(".")[0] else "FAIL", str(torch.version.cuda))

    # torch has loaded its library by now: it is the one in this process's memory map.
    mapped = sorted(set(re.findall(r"\S*/libnccl\.so\S*", Path("/proc/self/maps").read_text())))
    for owner, path in [("torch", path) for path in mapped] + [("vllm", find_nccl_library())]:
        number = ctypes.c_int()
        ctypes.CDLL(path).ncclGetVersion(ctypes.byref(number))
        found = f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}"
        yield Result(f"nccl of {owner}", "ok" if found == wanted else "FAIL", f"{found} ({path})")
    if not mapped:
        yield Result("nccl of torch", "FAIL", "torch has loaded no libnccl")


def flash_attention(settings: Settings, env: Mapping[str, str]) -> Iterator[Result]:
    """flash-attn is needed on a GPU; the image has it, a virtual environment does not."""
    version, gpus = manifest.packages().get("flash-attn"), hardware.visible_gpus(env)
    if version is None:
        yield Result("flash-attn", "FAIL" if gpus else "warn", "not installed: training on a GPU needs the image")
        return
    try:
        importlib.import_module("flash_attn")
    except ImportError as error:
        yield Result("flash-attn", "FAIL", f"{version} does not import: {str(error).splitlines()[0]}. It was built for another "
                     "torch or Python: build the image anew, without FLASH_ATTN_WHEEL= or with the right one")
        return
    yield Result("flash-attn", "ok", version)
    if gpus:
        yield flash_attention_kernels()


def flash_attention_kernels(device: str = "cuda") -> Result:
    """Whether flash-attn's kernels run here and compute attention, forward and backward; tests/gpu/ tries more shapes."""
    import torch
    from flash_attn import flash_attn_func, flash_attn_varlen_func
    from torch.nn.functional import scaled_dot_product_attention

    # (rows, length, heads, size) of queries, keys and values: grouped heads, and a length that is no multiple of a tile.
    q, k, v = (torch.randn(2, 257, heads, 64, device=device).bfloat16().requires_grad_() for heads in (8, 2, 2))
    ends = torch.arange(3, device=device, dtype=torch.int32) * 257
    wide = (tensor.float().transpose(1, 2) for tensor in (q, k, v))
    outputs = [scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True).transpose(1, 2)]
    try:
        outputs.append(flash_attn_func(q, k, v, causal=True))
        packed = (tensor.flatten(0, 1) for tensor in (q, k, v))
        outputs.append(flash_attn_varlen_func(*packed, ends, ends, 257, 257, causal=True).unflatten(0, (2, 257)))
        wanted, *found = ([output, *torch.autograd.grad(output.float().square().sum(), (q, k, v))] for output in outputs)
        # Relative to the norm. NaN is not less than what bf16 allows.
        errors = [((a.float() - b.float()).norm() / b.float().norm()).item() for part in found
                  for a, b in zip(part, wanted, strict=True)]
    except RuntimeError as error:
        # What torch says of a kernel that was not built for this GPU, and of a GPU that it cannot use.
        return Result("flash-attn kernels", "FAIL", f"do not run: {str(error).splitlines()[0]} Was it built for this GPU?")
    right = all(error <= MOST_ERROR for error in errors)
    return Result("flash-attn kernels", "ok" if right else "FAIL",
                  f"off from fp32 by {', '.join(f'{error:.2g}' for error in errors)} of the norm (allowed: {MOST_ERROR})")


def infiniband(settings: Settings, env: Mapping[str, str]) -> Iterator[Result]:
    """The libraries without which NCCL falls back to TCP in silence. Only the image promises them."""
    missing = []
    for name in INFINIBAND:
        try:
            ctypes.CDLL(name)
        except OSError as error:
            missing.append(str(error))
    # libibverbs looks for the cards' drivers by itself: the files here name them.
    if not Path("/etc/libibverbs.d/mlx5.driver").is_file():
        missing.append("/etc/libibverbs.d/mlx5.driver is not there")
    if missing and not manifest.read():
        missing[-1] += " (NCCL would use TCP: fine without such a network)"
    yield judged("InfiniBand libraries", missing, ", ".join(INFINIBAND), "FAIL" if manifest.read() else "warn")


def caches(settings: Settings, env: Mapping[str, str]) -> Iterator[Result]:
    """Whether every cache that the door sets, and the folder for temporary files, can be written to."""
    if work_dir_problems(settings.work_dir):
        # Looking makes the folders: a mistyped WORK_DIR would be there, and right, the next time.
        yield Result("caches", "FAIL", "not looked at, since WORK_DIR is wrong")
        return
    folders = {value for value in env.values() if value.startswith(str(settings.work_dir / "cache"))}
    problems = []
    for folder in sorted({*folders, tempfile.gettempdir()}):
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
    yield judged("caches", problems, f"{len(folders)} below WORK_DIR, writable")


def machine(settings: Settings, env: Mapping[str, str]) -> Iterator[Result]:
    gpus = hardware.visible_gpus(env)
    # The profiles for the CPU take GPUS= for a number of ranks.
    lacking = (settings.gpus or 0) > len(gpus) and settings.profile not in train.ON_CPU
    yield Result("GPUs visible", "FAIL" if lacking else "ok" if gpus else "warn", (f"GPUS={settings.gpus}, but " * lacking) + (
        ", ".join(f"{gpu.name} ({gpu.memory / 2**30:.0f} GiB)" for gpu in gpus) or "none: PROFILE=rehearsal trains on CPU"))
    cores = hardware.cpu_count()
    few = hardware.core_problem(cores, settings.gpus or len(gpus)) if gpus else None
    yield Result("CPU cores", "warn" if few else "ok", few or str(cores))
    shared = shutil.disk_usage("/dev/shm").total
    yield Result("/dev/shm", "ok" if shared >= LEAST_SHM else "warn", f"{shared / 2**30:.1f} GiB" + (
        shared < LEAST_SHM) * ": too little for NCCL and Ray. Docker: --ipc=host, as `make` does; else ask the administrator")
    try:
        yield Result("localhost", "ok", socket.gethostbyname("localhost"))
    except OSError as error:
        yield Result("localhost", "FAIL", f"does not resolve ({error}): torchrun and Ray need it in /etc/hosts")
    yield judged("WORK_DIR", work_dir_problems(settings.work_dir), str(settings.work_dir))
    if os.getuid() == 0:
        yield Result("user", "warn", "running as root")


CHECKS: list[Callable[[Settings, Mapping[str, str]], Iterator[Result]]] = [
    # The site first: what comes after takes memory of a GPU.
    python_environment, image, host, site, imports, nccl, flash_attention, infiniband, machine, caches]
