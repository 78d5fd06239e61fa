"""Imports from the archive: the same modules as from their files, and none where a file may have changed since."""

import json
import os
import py_compile
import subprocess
import sys
import types

import pytest

from bridge import import_archive

SIF = "139 43 0:41 / / rw,nodev - overlay overlay ro,lowerdir=/session/overlay-lowerdir:/session/rootfs,redirect_dir=on"
SQUASHFS = "139 43 0:41 / / ro - squashfs /dev/loop0 ro"
FILE = "/opt/venv/import_archive.bin"

IMPORT = """
import gc, importlib.resources, inspect, json, pkgutil, sys
sys.path.insert(0, sys.argv[1])
from bridge import import_archive
import_archive.install(sys.argv[2], sys.argv[3])
said = {"enabled": gc.isenabled()}
try:
    import package.fails
except ZeroDivisionError:
    said["enabled after a failure"] = gc.isenabled()
import package.inner, package.late
for name, module in (("package", package), ("inner", package.inner), ("late", package.late)):
    spec = module.__spec__
    said[name] = [module.COLLECTS, module.__file__, module.__cached__, spec.name, spec.parent, spec.submodule_search_locations]
said["source"] = inspect.getsource(package.inner)
said["resource"] = importlib.resources.files(package).joinpath("data.txt").read_text()
said["listed"] = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
said["archived"] = sorted(name for name, module in sys.modules.items()
                          if name.startswith("package") and type(module.__loader__) is import_archive.Loader)
said["enabled at the end"] = gc.isenabled()
print(json.dumps(said))
"""


@pytest.fixture
def package(tmp_path):
    """A package with byte code, packed but for one module; then nothing but the archive holds the code of the others."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "data.txt").write_text("data")
    modules = []
    for name in ("__init__", "inner", "fails", "late"):
        source = folder / f"{name}.py"
        source.write_text("import gc\nCOLLECTS = gc.isenabled()\n" + "1 / 0\n" * (name == "fails"))
        if name == "late":
            continue
        cached = py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        fullname = "package" if name == "__init__" else f"package.{name}"
        module = types.ModuleType(fullname)
        module.__spec__ = import_archive.spec_from_file_location(fullname, source)
        modules.append(module)
        assert module.__spec__.cached == cached
    packed = import_archive.pack([*modules, sys, types.ModuleType("made here")], (str(tmp_path),), str(tmp_path / "archive"))
    assert packed == {module.__spec__.cached for module in modules}
    return folder


def imported(package, mounts) -> dict:
    """What a Python says that imports the package and has the archive, with these mounts."""
    mountinfo = package.parent / "mountinfo"
    mountinfo.write_text("".join(line + "\n" for line in mounts))
    result = subprocess.run([sys.executable, "-c", IMPORT, str(package.parent), str(package.parent / "archive"), str(mountinfo)],
                            capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_modules_of_the_archive_are_those_of_the_files(package):
    from_files = imported(package, [])
    assert from_files["archived"] == [] and from_files["package"][0] is True
    for name in ("__init__", "inner", "fails"):
        os.remove(import_archive.spec_from_file_location("any", package / f"{name}.py").cached)
        # What is read as source must be source still; what is run is the archive's.
        (package / f"{name}.py").write_text("COLLECTS = 'from the file'\n")
    from_archive = imported(package, [SQUASHFS])
    assert from_archive["archived"] == ["package", "package.inner"]
    assert from_archive["source"] == "COLLECTS = 'from the file'\n"
    for name in ("package", "inner", "late"):
        assert from_archive[name][1:] == from_files[name][1:]
    assert from_archive["resource"] == "data" and from_archive["listed"] == from_files["listed"] == ["fails", "inner", "late"]


def test_garbage_is_collected_but_while_modules_of_the_archive_are_imported(package):
    said = imported(package, [SQUASHFS])
    assert (said["package"][0], said["inner"][0], said["late"][0]) == (False, False, True)
    assert said["enabled"] and said["enabled after a failure"] and said["enabled at the end"]


def test_what_is_bound_over_a_package_is_not_taken_from_the_archive(package):
    for bound in (package, package / "inner.py", package / "inner"):
        assert imported(package, [SQUASHFS, f"150 139 0:42 / {bound} rw - ext4 /dev/sda rw"])["archived"] == [], bound
    elsewhere = package.parent / "packages"
    assert imported(package, [SQUASHFS, f"150 139 0:42 / {elsewhere} rw - ext4 /dev/sda rw"])["archived"] == ["package.inner"]


@pytest.mark.parametrize(("mounts", "unchanged"), [
    ([SIF], True),
    ([SQUASHFS], True),
    ([SIF, "140 139 0:42 / /home/user rw - nfs server:/home rw", "141 139 0:42 / /opt/data rw - ext4 /dev/sda rw"], True),
    # Without overlay, Apptainer binds the folders of the root one by one.
    (["139 43 0:41 / / rw - tmpfs tmpfs rw", "140 139 0:42 /opt /opt ro - fuse.squashfuse_ll squashfuse_ll ro,user_id=0"], True),
    (["139 43 0:41 / / rw - tmpfs tmpfs rw", "140 139 0:42 /opt /opt rw - ext4 /dev/sda rw"], False),
    # A third layer, read-only; one that can be written; an engine's that says nothing of its layers; an unpacked image.
    ([SIF.replace("/session/rootfs", "/session/overlay-images/0/upper:/session/rootfs")], False),
    ([SIF.replace("ro,lowerdir", "rw,upperdir=/session/upper,workdir=/session/work,lowerdir")], False),
    (["139 43 0:41 / / rw - fuse.fuse-overlayfs fuse-overlayfs rw,user_id=0"], False),
    (["139 43 0:41 / / rw - ext4 /dev/sda rw"], False),
    # What was bound over the packages, or over all of /opt; and what was bound over that again.
    ([SIF, "140 139 0:42 / /opt/venv/lib rw - ext4 /dev/sda rw"], False),
    ([SIF, "140 139 0:42 / /opt/venv/lib/python3.11/site-packages/torch/nn rw - ext4 /dev/sda rw"], False),
    ([SIF, "140 139 0:42 / /opt rw - ext4 /dev/sda rw"], False),
    ([SIF, "140 139 0:42 / /opt ro - squashfs /dev/loop1 ro", "141 140 0:43 / /opt rw - ext4 /dev/sda rw"], False),
    ([], False),
])
def test_only_where_no_file_can_have_changed_is_the_archive_in_force(mounts, unchanged):
    assert import_archive.unchanged_folders(mounts, FILE)("/opt/venv/lib/python3.11/site-packages/torch") is unchanged


def test_without_an_archive_of_this_python_nothing_changes(package, monkeypatch):
    archive = package.parent / "archive"
    archive.write_bytes(archive.read_bytes().replace(import_archive.MAGIC_NUMBER, b"old\n", 1))
    assert imported(package, [SQUASHFS])["archived"] == []
    archive.unlink()
    assert imported(package, [SQUASHFS])["archived"] == []
