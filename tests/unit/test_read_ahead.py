"""Reading ahead: what is recorded of an import, and that it is read."""

import os
import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest

from bridge import door
from bridge.errors import UsageError
from bridge.image import read_ahead

# Reading is seen from outside the process, as the kernel counts it.
READ = """
import sys
from bridge.image import read_ahead
read_ahead.FILE = read_ahead.FILE.__class__(sys.argv[1])
before = int(open("/proc/self/io").read().split()[1])
read_ahead.start()
for thread in read_ahead.threading.enumerate()[1:]:
    thread.join()
print(int(open("/proc/self/io").read().split()[1]) - before)
"""


def bytes_read(file) -> int:
    result = subprocess.run([sys.executable, "-c", READ, str(file)], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    return int(result.stdout)


def test_files_are_read_whole_and_of_libraries_the_blocks_named(tmp_path):
    small, library = tmp_path / "a b.pyc", tmp_path / "library.so"
    small.write_bytes(b"x" * 3_000_000)
    library.write_bytes(b"y" * 5 * read_ahead.BLOCK)
    listed = tmp_path / "read_ahead.txt"
    listed.write_text(f"{small}\n{library}\t{2 * read_ahead.BLOCK}\n")
    blocks = 3_000_000 + read_ahead.BLOCK
    assert blocks <= bytes_read(listed) < blocks + 100_000


def test_more_cores_read_with_more_threads_and_nothing_twice(monkeypatch, tmp_path):
    lines = [f"small-{number}.pyc" for number in range(9)] + [f"library.so\t{number}" for number in range(7)]
    listed = tmp_path / "read_ahead.txt"
    listed.write_text("\n".join(lines))
    monkeypatch.setattr(read_ahead, "FILE", listed)
    for cores, threads in ((1, 2), (2, 2), (16, 8), (128, 8)):
        parts = []
        monkeypatch.setattr(read_ahead, "read", parts.append)
        monkeypatch.setattr(read_ahead.hardware, "cpu_count", lambda cores=cores: cores)
        before = set(threading.enumerate())
        read_ahead.start()
        for thread in set(threading.enumerate()) - before:
            thread.join()
        assert len(parts) == threads and sorted(line for part in parts for line in part) == sorted(lines)


def test_a_file_that_is_not_there_is_passed_over(tmp_path):
    there = tmp_path / "there.pyc"
    there.write_bytes(b"x" * 1_000_000)
    listed = tmp_path / "read_ahead.txt"
    listed.write_text(f"{tmp_path}/gone.pyc\n{there}\n")
    assert bytes_read(listed) >= 1_000_000


def test_without_a_list_nothing_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(read_ahead, "FILE", tmp_path / "read_ahead.txt")
    before = threading.active_count()
    read_ahead.start()
    assert threading.active_count() == before


def test_what_an_import_opens_is_recorded_in_order():
    # In a process of its own: an audit hook stays.
    names = subprocess.run([sys.executable, "-c", """
import sys
from bridge.image import read_ahead
for path in read_ahead.opened_by(["wave", "sndhdr"], (sys.base_prefix + "/", "/usr/lib/")):
    print(path)
"""], capture_output=True, text=True, check=True).stdout.splitlines()
    stems = [os.path.basename(name).split(".")[0] for name in names]
    assert "wave" in stems and "sndhdr" in stems
    assert stems.index("wave") < stems.index("sndhdr")
    assert len(stems) == len(set(names))


def test_of_a_library_the_blocks_in_memory_are_named():
    from torch._C import __file__ as extension

    folder = os.path.realpath(os.path.dirname(os.path.dirname(extension))) + "/torch/lib/"
    blocks = list(read_ahead.touched_blocks((folder,)))
    sizes = {path: os.path.getsize(path) for path, _ in blocks}
    assert any(path.endswith("libtorch_cpu.so") for path in sizes)
    assert all(0 <= offset < sizes[path] and offset % read_ahead.BLOCK == 0 for path, offset in blocks)
    # Not all of it: that is the point.
    assert len(blocks) < sum(sizes.values()) / read_ahead.BLOCK / 2


@pytest.mark.parametrize(("arguments", "expected"), [(["--help"], 0), (["upload"], 0), (["sft", "--dry-run"], 0), (["sft"], 1),
                                                     (["merge"], 1)])
def test_only_a_stage_that_imports_torch_reads_ahead(monkeypatch, tmp_path, arguments, expected):
    started = []
    monkeypatch.setattr(read_ahead, "start", lambda: started.append(True))
    # Refused, all but the help: nothing is there to train with, merge or upload.
    with nullcontext() if arguments == ["--help"] else pytest.raises(UsageError):
        door.run(arguments, {"WORK_DIR": str(tmp_path), "MODEL": "tiny"})
    assert len(started) == expected
