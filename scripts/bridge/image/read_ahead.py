"""Read the files of the imports to come while other things are done: opened for the first time, those of an image cost seconds.

    python -m bridge.image.read_ahead   writes read_ahead.txt, at the end of an image's build; without that nothing is read ahead
It writes import_archive.bin too, since it makes the imports.
A line is a file (whole), or a file, a tab and an offset (a block of a shared library), in the order in which they are needed.
"""

import os
import re
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import import_module

from bridge import hardware
from bridge.image import import_archive
from bridge.settings import ROOT

FILE = ROOT / "read_ahead.txt"
BLOCK = 1 << 20
# Threads for the small files; as many again read the libraries.
MOST_THREADS = 4
PAGE = os.sysconf("SC_PAGE_SIZE")
# What the trainers import: SFT's first, then PPO's, then its workers'.
MODULES = ("torch", "verl.trainer.fsdp_sft_trainer", "ray", "verl.trainer.main_ppo", "vllm", "verl.workers.fsdp_workers",
           "verl.workers.rollout.vllm_rollout", "transformers.models.llama.modeling_llama", "wandb")


def start() -> None:
    """Read in the background, in threads that take no lock and end by themselves or with the process."""
    # A run goes on without it, slower: no file, no memory or no process left for a thread.
    with suppress(OSError, RuntimeError):
        lines = FILE.read_text().splitlines()
        # FUSE unpacks in parallel, beside the imports themselves.
        threads = max(1, min(MOST_THREADS, hardware.cpu_count() // 4))
        # Libraries' blocks beside the small files: imports need both from the beginning.
        for part in ([line for line in lines if "\t" not in line], [line for line in lines if "\t" in line]):
            for first in range(threads):
                threading.Thread(target=read, args=(part[first::threads],), daemon=True).start()


def read(lines: Iterable[str]) -> None:
    """Read what the lines name, in order."""
    for line in lines:
        path, _, offset = line.partition("\t")
        # What cannot be read (the run may bind its own over the image's) is passed over: whoever needs it will say so.
        with suppress(OSError), open(path, "rb", buffering=0) as file:
            if offset:
                os.pread(file.fileno(), BLOCK, int(offset))
            else:
                while file.read(BLOCK):
                    pass


def opened_by(modules: Iterable[str], below: tuple[str, ...], imported: Callable[[], None] = lambda: None) -> list[str]:
    """Import modules; the files below these folders that Python opened for them, in order.

    `imported` is called after each.
    """
    opened: dict[str, None] = {}

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[0].startswith(below):
            opened[arguments[0]] = None

    sys.addaudithook(hook)
    for module in modules:
        import_module(module)
        imported()
    return [path for path in opened if os.path.isfile(path)]


def touched_blocks(below: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """The blocks of shared libraries below these folders that this process has in its memory: (file, offset)."""
    seen = set()
    with open("/proc/self/maps") as maps, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for line in maps:
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ +(/.*\.so\b.*)", line)
            if not found or not found[4].startswith(below):
                continue
            start, end, offset = (int(number, 16) for number in found.groups()[:3])
            pagemap.seek(start // PAGE * 8)
            entries = pagemap.read((end - start) // PAGE * 8)
            for number, (entry,) in enumerate(struct.iter_unpack("<Q", entries)):
                # Bit 63 of a page's entry: it is there.
                if entry >> 63:
                    seen.add((found[4].rstrip("\n"), (offset + number * PAGE) // BLOCK * BLOCK))
    yield from sorted(seen)


def main() -> None:
    """Write both files. What the imports say goes where they say it."""
    below = (sys.prefix + "/", "/usr/lib/")
    # As a dictionary: what an earlier import touched keeps its place.
    blocks: dict[tuple[str, int], None] = {}
    opened = opened_by(MODULES, below, lambda: blocks.update(dict.fromkeys(touched_blocks(below))))
    packed = import_archive.pack(list(sys.modules.values()), below)
    lines = [import_archive.FILE, *(path for path in opened if path not in packed)]
    lines += [f"{path}\t{offset}" for path, offset in blocks]
    FILE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
