"""Imports from the archive: the same modules as from their files, and none where a file may have changed since."""

import json
import os
import py_compile
import shutil
import subprocess
import sys
import types
from importlib.util import cache_from_source, spec_from_file_location

import pytest

from bridge.image import import_archive

IMPORT = """
import gc, importlib.resources, inspect, json, os, pkgutil, sys
sys.path.insert(0, sys.argv[1])
from bridge.image import import_archive
import_archive.install(sys.argv[2])
said = {"before": gc.isenabled()}
try:
    import package.fails
except ZeroDivisionError:
    said["after a failure"] = gc.isenabled()
import single, package.inner, package.late, package.below.deep
said["at the end"] = gc.isenabled()
for name in ("single", "package", "package.inner", "package.late", "package.below", "package.below.deep"):
    module = sys.modules[name]
    spec = module.__spec__
    said[name] = [module.COLLECTS, module.__file__, module.__cached__, spec.name, spec.parent, spec.submodule_search_locations]
said["source"] = inspect.getsource(package.inner)
said["resource"] = importlib.resources.files(package).joinpath("data.txt").read_text()
said["listed"] = sorted(found.name for found in pkgutil.iter_modules(package.__path__))
said["archived"] = sorted(name for name, module in sys.modules.items()
                          if name.startswith(("single", "package")) and type(module.__loader__) is import_archive.Loader)
print(json.dumps(said))
"""
PACKED = ["package", "package.below", "package.below.deep", "package.inner", "single"]


@pytest.fixture
def place(tmp_path):
    """A folder with a module and a package and their byte code, packed but for one module."""
    below = tmp_path / "site/package/below"
    below.mkdir(parents=True)
    (tmp_path / "site/package/data.txt").write_text("data")
    modules = []
    for fullname, path in (("single", "single.py"), ("package", "package/__init__.py"), ("package.inner", "package/inner.py"),
                           ("package.fails", "package/fails.py"), ("package.below", "package/below/__init__.py"),
                           ("package.below.deep", "package/below/deep.py"), ("package.late", "package/late.py")):
        source = tmp_path / "site" / path
        source.write_text("import gc\nCOLLECTS = gc.isenabled()\n" + "1 / 0\n" * (fullname == "package.fails"))
        py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        module = types.ModuleType(fullname)
        module.__spec__ = spec_from_file_location(fullname, source)
        modules.append(module)
    # As it lies elsewhere, whoever changes it leaves no trace here.
    (tmp_path / "site/linked.py").symlink_to(tmp_path / "site/package/late.py")
    linked = types.ModuleType("linked")
    linked.__spec__ = spec_from_file_location("linked", tmp_path / "site/linked.py")
    not_packed = [sys, types.ModuleType("made here"), linked]
    packed = import_archive.pack(modules[:-1] + not_packed, (str(tmp_path),), str(tmp_path / "archive"))
    assert packed == {module.__spec__.cached for module in modules[:-1]}
    return tmp_path


def imported(place, *options: str) -> dict:
    """What a Python says that imports all and has the archive."""
    result = subprocess.run([sys.executable, *options, "-c", IMPORT, str(place / "site"), str(place / "archive")],
                            capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_modules_of_the_archive_are_those_of_the_files(place):
    (place / "archive").rename(place / "away")
    from_files = imported(place)
    (place / "away").rename(place / "archive")
    assert from_files["archived"] == [] and from_files["package"][0] is True
    # What is read as source is the file; what is run is the archive's, though the byte code beside the file be spoilt.
    (place / "site/package/inner.py").write_text("COLLECTS = 'from the file'\n")
    with open(cache_from_source(str(place / "site/package/inner.py")), "r+b") as file:
        file.write(b"spoilt")
    from_archive = imported(place)
    assert from_archive["archived"] == PACKED
    assert from_archive["source"] == "COLLECTS = 'from the file'\n"
    for name in (*PACKED, "package.late"):
        assert from_archive[name][1:] == from_files[name][1:]
    assert from_archive["resource"] == "data"
    assert from_archive["listed"] == from_files["listed"] == ["below", "fails", "inner", "late"]


def test_garbage_is_collected_but_while_modules_of_the_archive_are_imported(place):
    said = imported(place)
    assert {said[name][0] for name in PACKED} == {False} and said["package.late"][0] is True
    assert said["before"] and said["after a failure"] and said["at the end"]


def test_a_child_that_is_forked_while_a_thread_imports_collects_garbage(place):
    source = place / "site/package/slow.py"
    source.write_text("import os\nchild = os.fork()\nif child == 0:\n    import gc\n    os._exit(gc.isenabled())\n"
                      "STATUS = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n")
    py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    module = types.ModuleType("package.slow")
    module.__spec__ = spec_from_file_location("package.slow", source)
    import_archive.pack([module], (str(place),), str(place / "archive"))
    code = IMPORT.partition("said =")[0] + "import package.slow as slow; print(type(slow.__loader__).__name__, slow.STATUS)"
    result = subprocess.run([sys.executable, "-c", code, str(place / "site"), str(place / "archive")], capture_output=True,
                            text=True, check=True, timeout=60)
    assert result.stdout.split() == ["Loader", "1"]


def bind_over(site):
    """As if another folder were bound over a package's: its date is its own, that of the folder above stays."""
    shutil.rmtree(site / "package/below")
    shutil.copytree(site / "package", site / "package/below", ignore=shutil.ignore_patterns("below", "__pycache__"))
    (site / "package/below/deep.py").write_text("COLLECTS = None\n")
    os.utime(site / "package", (import_archive.MARK, import_archive.MARK))


@pytest.mark.parametrize(("change", "archived"), [
    (lambda site: (site / "other.py").touch(), ["package.below", "package.below.deep", "package.inner"]),
    (lambda site: (site / "package/other.py").touch(), ["package.below.deep", "single"]),
    (lambda site: os.replace(shutil.copy(site / "single.py", site.parent), site / "package/below/deep.py"),
     ["package", "package.inner", "single"]),
    (lambda site: py_compile.compile(str(site / "package/inner.py")), ["package.below.deep", "single"]),
    (lambda site: shutil.rmtree(site / "__pycache__"), ["package.below", "package.below.deep", "package.inner"]),
    (bind_over, ["package", "package.inner", "single"]),
], ids=["a module is added", "a module is added to a package", "a source is replaced", "byte code is replaced",
        "byte code is removed", "a folder is bound over a package"])
def test_where_a_file_was_changed_since_modules_come_from_files(place, change, archived):
    change(place / "site")
    assert imported(place)["archived"] == archived


def test_without_an_archive_of_this_python_nothing_changes(place):
    # Without assertions the byte code is another.
    assert imported(place, "-O")["archived"] == []
    archive = place / "archive"
    archive.write_bytes(archive.read_bytes().replace(import_archive.MAGIC_NUMBER, b"old\n", 1))
    assert imported(place)["archived"] == []
