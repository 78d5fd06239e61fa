"""What docs/troubleshooting.md quotes is what the programs say: ours by their sources, the others' by what is installed."""

import ast
import mmap
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from signal import SIGKILL

import pytest

from bridge.door import STOPPED
from bridge.runs import hang
from door import ROOT

PAGE, JAPANESE = (ROOT / "docs" / name for name in ("troubleshooting.md", "troubleshooting.ja.md"))
# What stands in a message for a value.
HOLE = "\0"
# Of the programs in the environment: where their words are. Slurm's, Apptainer's and the system's are not in it.
THEIRS = {
    "CUDA out of memory. Tried to allocate ...": "torch/lib/libc10_cuda.so",
    "The NVIDIA driver on your system is too old": "torch/lib/libc10_cuda.so",
    "insufficient shared memory (shm)": "torch/lib/libtorch_python.so",
    "Watchdog caught collective operation timeout": "torch/lib/libtorch_cuda.so",
    "Bootstrap : no socket interface found": "nvidia/nccl/lib/libnccl.so.2",
    "Error while ... shared memory segment": "nvidia/nccl/lib/libnccl.so.2",
    "No available memory for the cache blocks.": "vllm/worker/worker.py",
    "is larger than the maximum number of tokens that can be stored in KV cache": "vllm/worker/worker.py",
    "sequence_length=... is larger than ...max_length=...": "verl/utils/torch_functional.py",
    "Task was killed due to the node running low on memory.": "ray/core/src/ray/raylet/raylet",
    "The object store is using ... instead of /dev/shm because /dev/shm has only ...": "ray/_private/services.py",
    "You can sync this run to the cloud by running:": "wandb/sdk/wandb_run.py",
}
ELSEWHERE = {
    "Slurm": ("DUE TO TIME LIMIT", "Invalid account or account/partition combination specified", "JobLaunchFailure",
              "Job violates accounting/QOS policy", "Requested node configuration is not available",
              "Requested time limit is invalid (missing or exceeds some limit)", "oom-kill event(s)", "(Priority)", "(Resources)",
              "(PartitionTimeLimit)"),
    "Apptainer": ("Something went wrong trying to read the squashfs image",),
    "the system": ("Bus error", "no space left on device", "No space left on device", "Disk quota exceeded"),
}


def quoted(page: Path) -> list[str]:
    """The messages of a page: what is quoted in the first column of its tables, and `bridge: ...` anywhere else."""
    text = page.read_text()
    first = [quote for line in re.findall(r"^\| (`.*?) \| ", text, re.MULTILINE) for quote in re.findall(r"`([^`]+)`", line)]
    return [*first, *(quote for quote in re.findall(r"`([^`]+)`", text) if quote.startswith("bridge: ") and quote not in first)]


def said(node: ast.AST) -> str:
    """The text that an expression comes to, with a hole for each value in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(said, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return said(node.left) + said(node.right)
    return HOLE


def of_python(text: str) -> list[str]:
    """All texts of a program."""
    return [said(node) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)]


def of_bash(text: str) -> list[str]:
    """The lines of a script, with a hole for each of its variables."""
    return re.sub(r"\$\{[^}]*\}|\$\(\([^)]*\)\)|\$\([^)]*\)|\$\w+|\\\n", HOLE, text).splitlines()


def of_page(text: str) -> list[str]:
    """The lines of a template, with a hole for each of its values."""
    return re.sub(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", HOLE, text).splitlines()


@cache
def ours() -> list[str]:
    """All that this program can say, and more."""
    program = [text for file in (ROOT / "scripts" / "bridge").rglob("*.py") for text in of_python(file.read_text())]
    program += [line for file in (ROOT / "configs" / "pages").glob("*.txt") for line in of_page(file.read_text())]
    return program + [line for file in (ROOT / "scripts" / "host").glob("*.sh") for line in of_bash(file.read_text())]


def is_said(message: str, texts: list[str]) -> bool:
    """Whether one of the texts has the words of a message in this order, none of them in a hole."""
    words = r".*?".join(re.escape(part.strip()) for part in message.removeprefix("bridge: ").split("...") if part.strip(" .,:;"))
    # A problem may be a warning elsewhere.
    pattern = re.compile(words.removeprefix("warning:\\ "), re.DOTALL)
    return any(pattern.search(text) for text in texts)


OURS = [message for message in quoted(PAGE) if message.startswith("bridge: ")]


@pytest.mark.parametrize("message", OURS)
def test_a_message_of_ours_is_in_the_sources(message):
    assert is_said(message, ours())
    # And would be missed if a word of it were another one.
    longest = max(re.findall(r"\w+", message), key=len)
    assert not is_said(message.replace(longest, longest[::-1]), ours())


def test_a_value_in_place_of_a_hole_and_words_of_two_messages_are_no_message():
    assert len(OURS) > 40
    assert not is_said("bridge: GPUS=8, but 4 visible", ours())
    assert not is_said("bridge: ... is no name on the hub: ... Nothing to do", ours())


@pytest.mark.parametrize("message", THEIRS)
def test_a_message_of_what_is_installed_is_in_it(message):
    file = Path(find_spec("torch").origin).parents[1] / THEIRS[message]
    if file.suffix == ".py":
        assert is_said(message, of_python(file.read_text()))
        return
    with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as binary:
        # A hole is printf's.
        assert all(binary.find(part.strip().encode()) >= 0 for part in message.split("...") if part)


def test_the_exit_statuses_are_the_programs():
    # 1, 2 and 137 are not its own: a failure, a mistake of usage, and SIGKILL.
    found = re.findall(r"^\| (\d+) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert [int(status) for status, _ in found] == [1, 2, STOPPED, hang.HUNG, 128 + SIGKILL]
    assert "asked to" in found[2][1] and "hung" in found[3][1]


def test_a_message_is_ours_or_somebody_elses():
    others = [message for message in quoted(PAGE) if not message.startswith("bridge: ")]
    known = {*THEIRS, *(message for messages in ELSEWHERE.values() for message in messages)}
    inside = set(re.findall(r"`([^`]+)`", PAGE.read_text()))
    assert set(others) <= known and known <= inside
