"""The acceptance test's own parts; the whole of it runs in tests/rehearsal."""

import json
import socket
from pathlib import Path

import pytest

from bridge import settings
from bridge.errors import UsageError
from bridge.pages import page
from bridge.runs import record
from bridge.tools import accept
from door import bridge, recorded


@pytest.mark.parametrize(("gpus", "heads", "tp"), [(8, 32, 8), (8, 12, 4), (6, 32, 2), (1, 32, 1), (8, None, 1), (3, 4, 1)])
def test_the_widest_tp_divides_the_gpus_and_the_heads(gpus, heads, tp):
    assert accept.widest_tp(gpus, heads) == tp


@pytest.fixture
def trial(tmp_path) -> accept.Acceptance:
    return accept.Acceptance(settings.read({"WORK_DIR": str(tmp_path), "GPUS": "2"}), {"WORK_DIR": str(tmp_path)},
                             keep=lambda results: (tmp_path / "kept").write_text(str(len(results))))


def test_a_step_that_fails_is_recorded_with_the_end_of_its_log_and_the_next_goes_on(trial, tmp_path):
    def fails(log: Path) -> None:
        log.write_text("one\nprogress 1\rprogress 2\nthe cause\n")
        trial.command(7)

    trial.step("first one", fails)
    assert (tmp_path / "kept").read_text() == "1"
    trial.step("second", lambda log: "well")
    assert [(row["step"], row["status"], row["seen"]) for row in trial.results] == [
        ("first one", "FAIL", "exit status 7"), ("second", "ok", "well")]
    assert trial.results[0]["log"] == ["one", "progress 2", "the cause"]


def test_what_a_person_ends_is_not_followed_by_more(trial):
    trial.step("first", lambda log: trial.command(143))
    trial.step("second", lambda log: "well")
    assert [row["step"] for row in trial.results] == ["first"] and trial.interrupted == 143


@pytest.mark.parametrize(("ranks", "seen"), [(1, "ran; with one rank nothing is sent, so there is no bandwidth"),
                                             (2, [{"megabytes": 1, "busbw_gb_s": 5.0}])])
def test_one_rank_has_no_bandwidth(monkeypatch, tmp_path, ranks, seen):
    def measured(_command, _env, log, *_arguments) -> int:
        log.write_text('a warning\n{"megabytes": 1, "busbw_gb_s": 5.0}\n')
        return 0

    monkeypatch.setattr(accept.launch, "run", measured)
    env = {"WORK_DIR": str(tmp_path), "GPUS": str(ranks)}
    assert accept.Acceptance(settings.read(env), env, keep=print).all_reduce(tmp_path / "log") == seen


def test_a_steps_speed_does_not_count_what_it_takes_to_save():
    row = {"step": 2, "timing_s/step": 35.2, "timing_s/save_checkpoint": 31.2, "timing_s/gen": 1.2,
           "perf/total_num_tokens": 92_000.0, "perf/mfu/actor": 0.51}
    assert accept.ppo_step(row, 2) == ("step 2 took 4.0 s (generation 1.2), 11,500 tokens/s/GPU, actor's MFU 0.51; "
                                       "saving took 31.2 s")
    assert accept.ppo_step({**row, "timing_s/save_checkpoint": 0.0}, 2) == (
        "step 2 took 35.2 s (generation 1.2), 1,307 tokens/s/GPU, actor's MFU 0.51")


def test_the_report_names_neither_host_nor_person_nor_place_nor_secret(tmp_path):
    env = {"WORK_DIR": str(tmp_path), "USER": "alice", "HF_TOKEN": "hf_secret"}
    hidden = accept.to_hide(settings.read(env), env)
    value = {"log": [f"{tmp_path}/x on {socket.gethostname()}", "/scratch/alice/env",
                     "malice of alice at 10.1.22.3:80, 127.0.0.1", {"a": "hf_secret"}], "number": 3}
    shown = record.masked(value, hidden)
    assert shown == {"log": ["WORK_DIR/x on HOST", "/scratch/USER/env", "malice of USER at ADDRESS:80, 127.0.0.1", {"a": "***"}],
                     "number": 3}


def test_the_page_shows_every_step_the_bandwidths_and_why_something_failed():
    bandwidths = [{"megabytes": 1, "algbw_gb_s": 10.0, "busbw_gb_s": 12.5},
                  {"megabytes": 1024, "algbw_gb_s": 80.0, "busbw_gb_s": 100.0}]
    report = {
        "gpus": ["2 x NVIDIA H100 80GB HBM3 (80 GiB)"], "driver": "570.1", "infiniband": [],
        "settings": {"NCCL_DEBUG": "WARN", "NCCL_SOCKET_IFNAME": "ib0"},
        "steps": [{"step": "all-reduce", "status": "ok", "seconds": 9.0, "seen": bandwidths},
                  {"step": "sft", "status": "FAIL", "seconds": 20.5, "seen": "exit status 1",
                   "log": ["a line", "CUDA out of memory"]}]}
    shown = page("accept.txt", report=report)
    assert shown.startswith("bridge accept: 1 steps passed, 1 failed\n")
    for line in ("NCCL_DEBUG          WARN", "NCCL_SOCKET_IFNAME  ib0", "infiniband          -",
                 "gpus                2 x NVIDIA H100 80GB HBM3 (80 GiB)",
                 "ok    all-reduce       9.0  100.00 GB/s of bus bandwidth at most",
                 "FAIL  sft             20.5  exit status 1", "       1024 MB      80.00     100.00",
                 "--- end of sft", "CUDA out of memory"):
        assert line in shown.splitlines()


def test_an_argument_is_refused(tmp_path):
    result = bridge("accept", "trainer.total_epochs=1", WORK_DIR=str(tmp_path))
    assert result.returncode == 2 and "accept takes no arguments" in result.stderr


@pytest.mark.parametrize("env", [{}, {"GPUS": "8"}, {"GPUS": "2", "PROFILE": "rehearsal"}])
def test_without_a_gpu_nothing_is_accepted_but_the_test_itself_as_the_tiny_profile(monkeypatch, tmp_path, env):
    started = []
    monkeypatch.setattr(accept.hardware, "visible_gpus", lambda env: [])
    monkeypatch.setattr(accept.trial, "stage", lambda name, *_arguments, **_named: started.append(name) or 7)
    env = {"WORK_DIR": str(tmp_path / "work"), **env}
    with pytest.raises(UsageError) as error:
        accept.run(settings.read(env), env, [])
    assert "no GPU visible" in str(error.value) and "PROFILE=tiny" in str(error.value)
    assert not (tmp_path / "work").exists() and not started
    env.update(PROFILE="tiny", GPUS="2")
    assert accept.run(settings.read(env), env, []) == 7 and started == ["data"]


def test_the_page_shows_the_nccl_that_is_loaded_and_not_a_variable_of_that_name(monkeypatch, tmp_path):
    check_log = ("ok    cuda of torch          12.4\nok    nccl of torch          2.22.3 (/env/libnccl.so.2)\n"
                 "ok    nccl of vllm           2.1 (libnccl.so.2)\n")

    def stage(name, env, *arguments, log=None, **_named) -> int:
        folder = Path(env["WORK_DIR"])
        if name in ("data", "model"):
            made_with = recorded(attempts=[{"command": ["builtin"]}])
            made = settings.read(env).data_dir if name == "data" else settings.read(env).model_dir
            made.mkdir(parents=True)
            (made / "run.json").write_text(json.dumps(made_with))
            (made / "config.json").write_text("{}")
            return 0
        (log or folder / "log").write_text(check_log if name == "check" else "")
        return 0

    monkeypatch.setattr(accept.hardware, "visible_gpus", lambda env: [])
    monkeypatch.setattr(accept.trial, "stage", stage)
    monkeypatch.setattr(accept.launch, "run", lambda *_arguments: 1)
    env = {"WORK_DIR": str(tmp_path), "PROFILE": "tiny", "NCCL_VERSION": "2.99.9-1", "NCCL_DEBUG": "WARN"}
    accept.run(settings.read(env), env, [])
    shown, report = (tmp_path / "accept/accept.txt").read_text(), json.loads((tmp_path / "accept/accept.json").read_text())
    assert report["nccl"] == "2.22.3" and report["settings"] == {"NCCL_DEBUG": "WARN"}
    assert "2.99.9" not in shown and any(line.split() == ["nccl", "2.22.3"] for line in shown.splitlines())


# ---- what a training may do wrong


def row(step: int, time: float) -> dict:
    return {"step": step, "time": time}


@pytest.mark.parametrize(("rows", "options", "message"), [
    ([1, 3], {}, r"made the steps \[1, 3\] of 3"),
    ([1, 2], {}, r"made the steps \[1, 2\] of 3$"),
    ([], {}, r"made the steps \[\] of 3"),
    ([1, 2, 3], {"stop": True}, r"made the steps \[1, 2, 3\] of 3, though it was to be stopped"),
])
def test_a_training_that_makes_other_steps_than_it_should_fails(trial, tmp_path, monkeypatch, rows, options, message):
    monkeypatch.setattr(accept.trial, "stage", lambda *_arguments: 0)
    monkeypatch.setattr(accept.metrics, "read", lambda _file: [row(step, 2e9) for step in rows])
    with pytest.raises(accept.StepFailed, match=message):
        trial.train("sft", tmp_path / "log", [], to=3, **options)


def test_a_training_that_had_nothing_left_to_do_fails(trial, tmp_path, monkeypatch):
    monkeypatch.setattr(accept.trial, "stage", lambda *_arguments: 0)
    # Of an earlier run.
    monkeypatch.setattr(accept.metrics, "read", lambda _file: [row(step, 1.0) for step in (1, 2, 3)])
    with pytest.raises(accept.StepFailed, match="nothing was left to do"):
        trial.train("sft", tmp_path / "log", [], to=3)


def test_a_run_that_starts_anew_instead_of_being_continued_fails(trial, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "train", lambda stage, log, arguments: "step 1 after 9 s")
    (tmp_path / "log").write_text("bridge: nothing of before\n")
    with pytest.raises(accept.StepFailed, match="was not continued, but started anew"):
        trial.resume("sft", tmp_path / "log")
    (tmp_path / "log").write_text("bridge: continuing from /x/global_step_2 (step 2)\n")
    assert trial.resume("sft", tmp_path / "log") == "continued from step 2; step 1 after 9 s"


@pytest.mark.parametrize(("status", "lines", "said"), [
    (1, "ok    python  3.11\nwarn  user  running as root\nFAIL  GPUs visible  none\n",
     "warn user running as root; FAIL GPUs visible none"),
    # It ended before it could report.
    (1, "Traceback\n", "exit status 1"),
])
def test_a_failed_check_says_what_failed(trial, tmp_path, monkeypatch, status, lines, said):
    def checked(_stage, _env, log: Path) -> int:
        log.write_text(lines)
        return status

    monkeypatch.setattr(accept.trial, "stage", checked)
    with pytest.raises(accept.StepFailed) as error:
        trial.check(tmp_path / "log")
    assert str(error.value) == said


@pytest.mark.parametrize(("visible", "last"), [(2, "ppo TP=2"), (0, "merge ppo")])
def test_vllm_over_several_gpus_is_tried_where_there_is_a_vllm(trial, monkeypatch, visible, last):
    monkeypatch.setattr(accept.hardware, "visible_gpus", lambda _env: [accept.hardware.Gpu("0", "a GPU", 1, 0)] * visible)
    monkeypatch.setattr(accept.model_folder, "attention_heads", lambda _folder: 4)
    asked = {}
    monkeypatch.setattr(trial, "step", asked.__setitem__)
    trial.run()
    assert list(asked) == ["check", "all-reduce", "sft", "sft resumed", "merge sft", "ppo", "ppo resumed", "merge ppo",
                           "ppo TP=2"][:8 + (visible > 0)] and list(asked)[-1] == last
    if visible:
        assert asked[last].args == ("ppo",) and asked[last].keywords["TP"] == "2"
