"""The image's Python takes the byte code of what it imports from one file instead of thousands.

In a SIF each file is looked up, opened and read through FUSE, which was a third of the time of `import torch, vllm, verl`
(docs/image.md). So the image's build packs the byte code of what the trainers import into import_archive.bin (pack(), which
bridge.image.read_ahead calls) and lays this file into site-packages as bridge_import_archive.py, with a .pth beside it that calls
install() in every Python that starts. Modules are otherwise what they were: same files in __file__ and __cached__, same
source, same resources. While they are imported no garbage is collected: what an import makes stays, and looking through it
again and again was a fifth of the time.

Whatever lays other files over the image's (binds, overlays, a writable or derived image) must win. So pack() dates the folders
it packs, and their __pycache__, with MARK: who adds, removes or replaces a file in a folder gives it another date, and a folder
that is bound over it has its own. Without the mark a folder's modules come from its files. (A source that is edited in place
has no effect either way: the image's byte code does not ask for it.)

The file: 8 bytes with the length of the head (little-endian); the head, which is marshal's
(importlib's MAGIC_NUMBER, {folder: {module's last name: (is a package, offset, length)}}); the byte code, without its headers.
"""

import gc
import marshal
import mmap
import os
import sys
from collections.abc import Iterable
from importlib.machinery import (
    BYTECODE_SUFFIXES,
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
    SourcelessFileLoader,
)
from importlib.util import MAGIC_NUMBER, spec_from_file_location
from types import ModuleType

FILE = os.path.join(sys.prefix, "import_archive.bin")
HEADER_OF_BYTE_CODE = 16
# Seconds since 1970, in 2001: before there was any of this to write.
MARK = 981_173_106
# As importlib has them for a folder.
LOADERS = ((ExtensionFileLoader, EXTENSION_SUFFIXES), (SourceFileLoader, SOURCE_SUFFIXES),
           (SourcelessFileLoader, BYTECODE_SUFFIXES))


class Loader(SourceFileLoader):
    """A module of which the byte code is in the archive."""

    stopped_collection = False

    def __init__(self, fullname: str, path: str, byte_code: memoryview):
        super().__init__(fullname, path)
        self._byte_code = byte_code

    def get_code(self, fullname: str):
        return marshal.loads(self._byte_code)

    def exec_module(self, module: ModuleType) -> None:
        # What is imported within finds it stopped, and leaves it so.
        if not gc.isenabled():
            super().exec_module(module)
            return
        Loader.stopped_collection = True
        gc.disable()
        try:
            super().exec_module(module)
        finally:
            gc.enable()
            Loader.stopped_collection = False


def collect_again() -> None:
    """In a forked child: it would never collect garbage if another thread imported just then."""
    if Loader.stopped_collection:
        gc.enable()


class Finder(FileFinder):
    """One folder's modules: those in the archive, and whatever else is there.

    modules: {last name: (is a package, its byte code)}.
    """

    def __init__(self, folder: str, modules: dict[str, tuple[bool, memoryview]]):
        super().__init__(folder, *LOADERS)
        self._modules = modules

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        name = fullname.rpartition(".")[2]
        is_package, byte_code = self._modules.get(name, (False, None))
        folder = f"{self.path}/{name}"
        if byte_code is None or is_package and not is_marked(folder):
            return super().find_spec(fullname, target)
        path = f"{folder}/__init__.py" if is_package else f"{folder}.py"
        return spec_from_file_location(fullname, path, loader=Loader(fullname, path, byte_code),
                                       submodule_search_locations=[folder] if is_package else None)


def is_marked(folder: str) -> bool:
    """Whether a folder's files are those of the time when it was packed."""
    try:
        return int(os.stat(folder).st_mtime) == int(os.stat(f"{folder}/__pycache__").st_mtime) == MARK
    except OSError:
        return False


def install(file: str = FILE) -> None:
    """Let this process import from the archive, if there is one, of this Python."""
    # Byte code without assertions is in other files.
    if sys.flags.optimize or not os.path.exists(file):
        return
    with open(file, "rb") as opened:
        # A map outlives the closing of all files, with which daemons begin.
        archive = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    code = 8 + int.from_bytes(archive[:8], "little")
    magic_number, index = marshal.loads(archive[8:code])
    if magic_number != MAGIC_NUMBER:
        return

    def hook(folder: str) -> Finder:
        if folder not in index or not is_marked(folder):
            # So importlib asks the next hook.
            raise ImportError
        return Finder(folder, {name: (is_package, archive[code + offset:code + offset + length])
                               for name, (is_package, offset, length) in index[folder].items()})

    sys.path_hooks.insert(0, hook)
    for folder in index:
        sys.path_importer_cache.pop(folder, None)
    os.register_at_fork(after_in_child=collect_again)


def pack(modules: Iterable[ModuleType], below: tuple[str, ...], file: str = FILE) -> set[str]:
    """Write the archive of the modules' byte code, as far as it is below these folders, and mark its folders.

    Returns the files that the byte code came from.
    """
    packed = {}
    for module in modules:
        spec = getattr(module, "__spec__", None)
        if not spec or not isinstance(spec.loader, SourceFileLoader) or not spec.origin.startswith(below):
            continue
        folder, is_package = os.path.dirname(spec.origin), spec.submodule_search_locations is not None
        name = os.path.basename(folder) if is_package else os.path.basename(spec.origin).removesuffix(".py")
        # Of what is imported under another name than its file's, has no byte code or lies elsewhere, the archive knows nothing.
        if (name == spec.name.rpartition(".")[2] and spec.cached and os.path.exists(spec.cached)
                and os.path.realpath(spec.origin) == spec.origin):
            packed[os.path.dirname(folder) if is_package else folder, name] = (is_package, spec.cached)
    index: dict[str, dict[str, tuple[bool, int, int]]] = {}
    code = bytearray()
    # Sorted, so that two builds write the same.
    for (folder, name), (is_package, cached) in sorted(packed.items()):
        with open(cached, "rb") as opened:
            byte_code = opened.read()[HEADER_OF_BYTE_CODE:]
        index.setdefault(folder, {})[name] = (is_package, len(code), len(byte_code))
        code += byte_code
    head = marshal.dumps((MAGIC_NUMBER, index))
    with open(file, "wb") as opened:
        opened.write(len(head).to_bytes(8, "little") + head + code)
    for folder in {os.path.dirname(cached) for _, cached in packed.values()}:
        os.utime(folder, (MARK, MARK))
        os.utime(os.path.dirname(folder), (MARK, MARK))
    return {cached for _, cached in packed.values()}
