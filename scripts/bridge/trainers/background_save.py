"""Let a training wait for a checkpoint only until it is copied into the host's memory: it is written to disk meanwhile.
+model.external_lib=bridge.trainers.background_save (trainers.speedups has it). Files are as verl's FSDPCheckpointManager makes
them, and end in .partial until whole. The next save, and the training's end, wait for it. A failure is raised at the next step.
"""

import copy
import mmap
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from verl.utils.checkpoint import fsdp_checkpoint_manager
from verl.utils.checkpoint.fsdp_checkpoint_manager import FSDPCheckpointManager

from bridge.errors import say
from bridge.hardware import free_memory

ALIGNMENT = 64  # bytes
torch_save, verls_save = torch.save, FSDPCheckpointManager.save_checkpoint


def mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same tree of dictionaries and lists with each tensor changed: of a DTensor the part that this rank has."""
    if isinstance(value, DTensor):
        return DTensor(change(value.to_local()), value._spec, requires_grad=False)
    if isinstance(value, torch.Tensor):
        return change(value.detach())
    if isinstance(value, dict):
        # Not built anew: PyTorch keeps versions of modules beside the entries.
        changed = copy.copy(value)
        changed.update({key: mapped(part, change) for key, part in value.items()})
        return changed
    if isinstance(value, list | tuple):
        return type(value)(mapped(part, change) for part in value)
    return value


def key(tensor: torch.Tensor) -> tuple:
    """What is the same of the same tensor, and so of weights that are tied."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class HostCopy:
    """Memory for the tensors of one file, taken at the first copy and used for all that follow."""

    taken = 0  # bytes, by all of this process

    def __init__(self) -> None:
        self.size, self.memory = 0, None

    def of(self, tree: Any, ranks: int) -> Any | None:
        """The tree with all tensors in this memory. None where copies of so many ranks would take over half of what is free."""
        found: dict[tuple, torch.Tensor] = {}
        mapped(tree, lambda tensor: found.setdefault(key(tensor), tensor))
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in found.values()]
        if sum(sizes) > self.size and ranks * (HostCopy.taken + 2 * sum(sizes)) <= free_memory(os.environ):
            # A limit that is not seen (ulimit -v) ends here.
            with suppress(OSError):
                self.take(sum(sizes))
        if sum(sizes) > self.size:
            return None
        copies = {place: self.copy(tensor, end - size)
                  for (place, tensor), size, end in zip(found.items(), sizes, accumulate(sizes), strict=True)}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return mapped(tree, lambda tensor: copies[key(tensor)])

    def copy(self, tensor: torch.Tensor, offset: int) -> torch.Tensor:
        """The tensor at this place, with a storage of its own: torch.save writes storages whole."""
        if not tensor.numel():
            return torch.empty_like(tensor, device="cpu")
        flat = torch.frombuffer(self.memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return flat.view(tensor.shape).copy_(tensor, non_blocking=True)

    def take(self, size: int) -> None:
        """Take so many bytes; where there is a GPU, such that it writes into them by itself."""
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.size, HostCopy.taken = size, HostCopy.taken + size
        # Taken and pinned in seconds instead of tens of them. (PyTorch's own pinned memory is rounded up to a power of two.)
        with suppress(OSError):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        # Processes that load data are forks: what the GPU writes to must not become theirs.
        self.memory.madvise(mmap.MADV_DONTFORK)
        if torch.cuda.is_available():
            whole = torch.frombuffer(self.memory, dtype=torch.uint8)
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(whole.data_ptr(), size, 0))


class Writer:
    """Writes the files of one model's checkpoints, one checkpoint at a time."""

    def __init__(self, ranks: int):
        self.ranks, self.copies, self.writing = ranks, {}, []
        self.pool = ThreadPoolExecutor(3, "checkpoint")

    def save(self, tree: Any, file: str) -> None:
        """torch.save, later; at once where the memory does not suffice for a copy."""
        copied = self.copies.setdefault(os.path.basename(file), HostCopy()).of(tree, self.ranks)
        if copied is None:
            say(f"{file}: too little memory is free for a copy, so that the training waits until it is written")
            self.write(tree, file)
        else:
            self.writing.append(self.pool.submit(self.write, copied, file))

    @staticmethod
    def write(tree: Any, file: str) -> None:
        """Write one file, which gets its name once its end is on the disk, too: of that torch.save says nothing."""
        torch_save(tree, partial := f"{file}.partial")
        with open(partial, "rb") as stream, zipfile.ZipFile(stream):
            os.fsync(stream.fileno())
        os.replace(partial, file)

    def check(self, done: Callable[[Future], bool] = Future.done) -> None:
        """Raise what kept a file from being written, if that is known by now."""
        for future in self.writing:
            if done(future):
                future.result()

    def wait(self) -> None:
        """Wait until all is written; raises what kept a file from being written."""
        self.check(lambda _: True)
        self.writing = []


def save_checkpoint(manager: FSDPCheckpointManager, local_path: str | None, *arguments, **options) -> None:
    """verl's method with torch.save exchanged for a Writer's. Without a path it is only waited."""
    if not hasattr(manager, "writer"):
        local = os.environ.get("RAY_LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or manager.world_size
        manager.writer = Writer(int(local))
        manager.optimizer.register_step_pre_hook(lambda *_: manager.writer.check())
    manager.writer.wait()
    on_gpu = fsdp_checkpoint_manager.is_cuda_available
    torch.save = manager.writer.save
    # verl would let FSDP copy the weights into ordinary memory first.
    fsdp_checkpoint_manager.is_cuda_available = False
    try:
        verls_save(manager, local_path, *arguments, **options)
    finally:
        torch.save, fsdp_checkpoint_manager.is_cuda_available = torch_save, on_gpu


FSDPCheckpointManager.save_checkpoint = save_checkpoint
