"""The image's Python takes the byte code of what it imports from one file instead of thousands.

In a SIF each file is looked up, opened and read through FUSE, which was a third of the time of `import torch, vllm, verl`
(docs/image.md). So the image's build packs the byte code of what the trainers import into import_archive.bin (pack(), which
bridge.read_ahead calls) and lays this file into site-packages as bridge_import_archive.py, with a .pth beside it that calls
install() in every Python that starts. Modules are otherwise what they were: same files in __file__ and __cached__, same
source, same resources. While they are imported no garbage is collected: what an import makes stays, and looking through it
again and again was a fifth of the time.

The file: 8 bytes with the length of the head (little-endian); the head, which is marshal's
(importlib's MAGIC_NUMBER, {folder: {module's last name: (is a package, offset, length)}}); the byte code, without its headers.
"""

import gc
import marshal
import mmap
import os
import re
import sys
from collections.abc import Callable, Iterable
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
# As importlib has them for a folder.
LOADERS = ((ExtensionFileLoader, EXTENSION_SUFFIXES), (SourceFileLoader, SOURCE_SUFFIXES),
           (SourcelessFileLoader, BYTECODE_SUFFIXES))


class Loader(SourceFileLoader):
    """A module of which the byte code is in the archive."""

    def __init__(self, fullname: str, path: str, byte_code: memoryview):
        super().__init__(fullname, path)
        self._byte_code = byte_code

    def get_code(self, fullname: str):
        return marshal.loads(self._byte_code)

    def exec_module(self, module: ModuleType) -> None:
        # What is imported within finds it disabled, and leaves it so.
        enabled = gc.isenabled()
        gc.disable()
        try:
            super().exec_module(module)
        finally:
            if enabled:
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
        if name not in self._modules:
            return super().find_spec(fullname, target)
        is_package, byte_code = self._modules[name]
        path = f"{self.path}/{name}/__init__.py" if is_package else f"{self.path}/{name}.py"
        return spec_from_file_location(fullname, path, loader=Loader(fullname, path, byte_code),
                                       submodule_search_locations=[f"{self.path}/{name}"] if is_package else None)


def install(file: str = FILE, mountinfo: str = "/proc/self/mountinfo") -> None:
    """Let this process import from the archive, if there is one and nothing can have changed since it was written."""
    try:
        with open(mountinfo) as opened:
            unchanged = unchanged_folders(opened, file)
        with open(file, "rb") as opened:
            # A map outlives the closing of all files, with which daemons begin.
            archive = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError:
        # No archive (outside an image), or no /proc to tell by.
        return
    code = 8 + int.from_bytes(archive[:8], "little")
    magic_number, index = marshal.loads(archive[8:code])
    if magic_number != MAGIC_NUMBER:
        return

    def hook(folder: str) -> Finder:
        if folder not in index or not unchanged(folder):
            # So importlib asks the next hook.
            raise ImportError
        return Finder(folder, {name: (is_package, archive[code + offset:code + offset + length])
                               for name, (is_package, offset, length) in index[folder].items()})

    sys.path_hooks.insert(0, hook)
    for folder in index:
        sys.path_importer_cache.pop(folder, None)


def unchanged_folders(mountinfo: Iterable[str], file: str) -> Callable[[str], bool]:
    """Return what tells whether a folder is as it was when `file`, of the same image, was written.

    It is, in a SIF's read-only file system (alone, or as the lowest layer of an overlay in which nothing but Apptainer's mount
    points can lie above it), where nothing is bound over the folder or into it. mountinfo: lines, as in proc(5).
    """
    mounts: dict[str, bool] = {}
    for line in mountinfo:
        point, (kind, _, options) = line.split()[4], line.partition(" - ")[2].split(maxsplit=2)
        layers = re.search(r"\blowerdir=([^,\s]*)", options)
        # A later mount hides an earlier one.
        mounts[point] = (kind == "squashfs" or kind.startswith("fuse.squashfuse")
                         or kind == "overlay" and "upperdir=" not in options and bool(layers) and layers[1].count(":") == 1)

    def below(path: str, point: str) -> bool:
        return point == "/" or path == point or path.startswith(point + "/")

    def mount_of(path: str) -> str:
        return max((point for point in mounts if below(path, point)), key=len, default="")

    image = mount_of(file)
    if not mounts.get(image):
        return lambda folder: False
    return lambda folder: mount_of(folder) == image and not any(below(point, folder) for point in mounts)


def pack(modules: Iterable[ModuleType], below: tuple[str, ...], file: str = FILE) -> set[str]:
    """Write the archive of the modules' byte code, as far as it is below these folders; return the files that it came from."""
    packed = {}
    for module in modules:
        spec = getattr(module, "__spec__", None)
        if not spec or not isinstance(spec.loader, SourceFileLoader) or not spec.origin.startswith(below):
            continue
        folder, is_package = os.path.dirname(spec.origin), spec.submodule_search_locations is not None
        name = os.path.basename(folder) if is_package else os.path.basename(spec.origin).removesuffix(".py")
        # Of what is imported under another name than its file's, or has no byte code, the archive knows nothing.
        if name == spec.name.rpartition(".")[2] and spec.cached and os.path.exists(spec.cached):
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
    return {cached for _, cached in packed.values()}
