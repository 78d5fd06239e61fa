"""What rehearse, bench and accept do to the folders they work in: theirs alone are emptied, and only once all is right."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from bridge import settings
from bridge.errors import UsageError, exit_status
from bridge.hardware import Gpu
from bridge.tools import accept, bench, rehearse, trial
from door import SHELL

# Where a person's own file may lie in a folder that a tool works in.
MINE = ("mine/notes.txt", "runs/mine/checkpoint", "data/mine/train.jsonl", "models/mine/model.safetensors", "notes.txt")
CASES = {"steps": {"sft": 2, "ppo": 2}, "cases": [{"name": "sft-a", "profile": "tiny"}]}


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """Names of the stages that were started; none of them runs, each says that it failed."""
    names = []
    monkeypatch.setattr(trial, "stage", lambda name, *_arguments, **_named: names.append(name) or 7)
    monkeypatch.setattr(accept.hardware, "visible_gpus", lambda env: [])
    return names


def start(tool: str, work_dir: Path, **env: str) -> int:
    """Start a tool in this process, on a machine without a GPU, with the smallest it can do."""
    env = {"WORK_DIR": str(work_dir), "MODEL": "tiny", "PROFILE": "tiny", **({"DATA_SOURCE": "builtin"} | env)}
    with mock.patch.object(bench, "CASES", CASES):
        return {"rehearse": rehearse, "bench": bench, "accept": accept}[tool].run(settings.read(env), env, [])


TOOLS = {"rehearse": "rehearsal", "bench": "bench", "accept": "accept"}
each_tool = pytest.mark.parametrize(("tool", "name"), TOOLS.items())


def write(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("mine")


def refused(tool: str, work_dir: Path, **env: str) -> str:
    """What a tool says that does not start."""
    with pytest.raises(UsageError) as error:
        start(tool, work_dir, **env)
    return str(error.value)


@each_tool
def test_a_folder_that_the_tool_did_not_make_is_refused_and_stays_as_it_is(started, tmp_path, tool, name):
    write(tmp_path / name, *MINE)
    before = sorted((tmp_path / name).rglob("*"))
    said = refused(tool, tmp_path)
    assert f"{tmp_path / name} was not made by this tool" in said and "Move it away" in said
    assert sorted((tmp_path / name).rglob("*")) == before and not started


@each_tool
def test_a_link_in_place_of_the_folder_is_refused_and_nothing_behind_it_is_touched(started, tmp_path, tool, name):
    other = tmp_path / "other"
    # Behind the link may even be a folder that another WORK_DIR's tool made.
    write(other, *MINE, "runs/default/sft/checkpoint", trial.MARK)
    (tmp_path / name).symlink_to(other)
    before = sorted(other.rglob("*"))
    said = refused(tool, tmp_path)
    assert f"{tmp_path / name} is a link" in said and "Remove the link" in said
    assert sorted(other.rglob("*")) == before and not started


@each_tool
@pytest.mark.parametrize("part", ["data", "models", "runs", "cache"])
def test_a_link_within_the_folder_is_refused_and_nothing_behind_it_is_touched(started, tmp_path, tool, name, part):
    assert start(tool, tmp_path) == 7
    other = tmp_path / "other"
    write(other, *MINE, "default/sft/checkpoint", "sft-a/sft/checkpoint", "gsm8k/train.jsonl", "tiny/model.safetensors")
    (tmp_path / name / part).symlink_to(other)
    before = sorted(other.rglob("*"))
    started.clear()
    assert f"{tmp_path / name / part} is a link" in refused(tool, tmp_path)
    assert sorted(other.rglob("*")) == before and not started


@each_tool
def test_what_the_tool_made_before_is_removed_and_what_a_person_put_beside_it_stays(started, tmp_path, tool, name):
    assert start(tool, tmp_path) == 7
    folder, elsewhere = tmp_path / name, tmp_path / "elsewhere"
    write(folder, *MINE, "cache/old", "runs/default/sft/old", "runs/sft-a/sft/old", "runs/tp2/ppo/old")
    write(elsewhere, "checkpoint")
    for link in ("runs/default/ppo", "data/gsm8k", "models/tiny"):
        (folder / link).symlink_to(elsewhere)
    assert start(tool, tmp_path) == 7
    left = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert left >= set(MINE) and (elsewhere / "checkpoint").is_file()
    removed = {"rehearse": {"cache/old", "runs/default/sft/old"}, "bench": {"cache/old", "runs/sft-a/sft/old"},
               "accept": {"cache/old", "runs/default/sft/old", "runs/tp2/ppo/old"}}[tool]
    assert not left & removed


@pytest.mark.parametrize(("tool", "env", "words"), [
    *((tool, env, words) for tool in TOOLS for seven in ["does not divide by 7 GPUs"]
      for env, words in (
        ({"GPUS": "7"}, [seven]),
        ({"MODEL": "smolm2"}, ["Did you mean smollm2?"]),
        ({"MODEL": "/no/such/folder", "GPUS": "7"}, ["/no/such/folder does not exist", seven]))),
    ("rehearse", {"DATA_SOURCE": "builtn", "MODEL": "smolm2"}, ["DATA_SOURCE='builtn'", "Did you mean smollm2?"]),
])
def test_settings_are_looked_at_before_anything_is_removed(started, tmp_path, tool, env, words):
    assert start(tool, tmp_path) == 7
    folder = tmp_path / TOOLS[tool]
    write(folder, "runs/default/sft/old", "cache/old")
    started.clear()
    said = refused(tool, tmp_path, **env)
    assert all(word in said for word in words)
    assert (folder / "runs/default/sft/old").is_file() and (folder / "cache/old").is_file() and not started


@each_tool
def test_more_gpus_than_are_visible_are_refused_before_anything_is_removed(started, monkeypatch, tmp_path, tool, name):
    monkeypatch.setattr(accept.hardware, "visible_gpus", lambda env: [Gpu("0", "H100", 80 << 30, 0)])
    assert "GPUS=2, but 1 visible" in refused(tool, tmp_path, GPUS="2")
    assert not (tmp_path / name).exists() and not started


@each_tool
def test_a_model_within_what_would_be_removed_is_refused(started, tmp_path, prepared, tool, name):
    assert start(tool, tmp_path) == 7
    run = tmp_path / name / "runs" / ("sft-a" if tool == "bench" else "default")
    shutil.copytree(prepared / "models/tiny", run / "ppo/merged")
    said = refused(tool, tmp_path, MODEL=str(run / "ppo/merged"))
    assert f"MODEL={run / 'ppo/merged'} lies in {run}" in said
    assert (run / "ppo/merged/model.safetensors").is_file()


@pytest.mark.parametrize("tool", ["rehearse", "bench"])
def test_data_within_what_would_be_removed_are_refused(started, monkeypatch, tmp_path, tool):
    assert start(tool, tmp_path) == 7
    source = tmp_path / TOOLS[tool] / "cache" / "mine"
    write(source, "train.jsonl", "test.jsonl")
    monkeypatch.setenv("HOME", str(source.parent))
    assert f"DATA_SOURCE={source} lies in {source.parent}" in refused(tool, tmp_path, DATA_SOURCE="~/mine")
    assert (source / "train.jsonl").is_file()
    # The words are no folders, wherever a person stands.
    monkeypatch.chdir(tmp_path / TOOLS[tool])
    assert start(tool, tmp_path, DATA_SOURCE="hub") == 7


@each_tool
def test_a_second_one_at_the_same_time_is_refused_and_removes_nothing(started, tmp_path, tool, name):
    assert start(tool, tmp_path) == 7
    write(tmp_path / name, "runs/default/sft/old")
    with held(tmp_path / name):
        said = refused(tool, tmp_path)
    assert "another run works in" in said and "RUN=" not in said and "another WORK_DIR" in said
    assert (tmp_path / name / "runs/default/sft/old").is_file()


@pytest.mark.parametrize(("tool", "name", "stage"), [
    ("rehearse", "rehearsal", "default/sft"), ("accept", "accept", "default/ppo")])
def test_a_stage_that_someone_runs_in_the_folder_is_not_removed_under_it(started, tmp_path, tool, name, stage):
    assert start(tool, tmp_path) == 7
    write(tmp_path / name, f"runs/{stage}/checkpoint")
    with held(tmp_path / name / "runs" / stage):
        assert "another run works in" in refused(tool, tmp_path)
    assert (tmp_path / name / "runs" / stage / "checkpoint").is_file()
    # A lock that a killed run left behind is no lock.
    assert start(tool, tmp_path) == 7
    assert not (tmp_path / name / "runs" / stage).exists()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Another process holds the folder's lock."""
    script = ("import sys\nfrom pathlib import Path\nfrom bridge.runs import record\n"
              "with record.locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], env=SHELL, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield
        process.stdin.close()


def test_what_cannot_be_removed_is_said_without_a_traceback(started, monkeypatch, tmp_path, capsys):
    assert start("rehearse", tmp_path) == 7
    write(tmp_path / "rehearsal", "runs/default/sft/.nfs0001")

    def busy(path):
        raise OSError(16, "Device or resource busy", f"{path}/sft/.nfs0001")

    monkeypatch.setattr(trial.shutil, "rmtree", busy)
    assert exit_status(lambda: start("rehearse", tmp_path)) == 2
    said = capsys.readouterr().err
    assert ".nfs0001" in said and "Device or resource busy" in said


def test_an_interrupted_rehearsal_promises_nothing_and_its_stages_neither(started, monkeypatch, tmp_path, capsys):
    seen = {}
    monkeypatch.setattr(trial, "stage", lambda name, env, more: seen.update(env) or 130)
    assert start("rehearse", tmp_path) == 130
    said = capsys.readouterr().err
    assert "the rehearsal stopped at data" in said and "begins anew" in said
    assert seen["BRIDGE_TRIAL"]


def test_a_machine_that_is_told_to_stay_offline_is_shown_the_upload_too(started, monkeypatch, tmp_path):
    seen, shown = {}, {}

    def stage(name, env, arguments):
        seen[name], shown[name] = env, arguments
        return 0

    monkeypatch.setattr(trial, "stage", stage)
    monkeypatch.setattr(rehearse, "outcome", lambda *_arguments: "well")
    assert start("rehearse", tmp_path, HF_HUB_OFFLINE="1") == 0
    assert seen["model"]["HF_HUB_OFFLINE"] == "1" and seen["upload"]["HF_HUB_OFFLINE"] == "0"
    # Nothing leaves the machine.
    assert shown.pop("upload") == ["--dry-run"] and not any(shown.values())
