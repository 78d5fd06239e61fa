"""The acceptance test's own parts; the whole of it runs in tests/rehearsal."""

import socket
from pathlib import Path

import pytest

from bridge import accept, runs, settings
from door import bridge


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
    shown = runs.masked(value, hidden)
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
    page = accept.text(report)
    assert page.startswith("bridge accept: 1 steps passed, 1 failed\n")
    for line in ("NCCL_DEBUG          WARN", "NCCL_SOCKET_IFNAME  ib0", "infiniband          -",
                 "gpus                2 x NVIDIA H100 80GB HBM3 (80 GiB)",
                 "ok    all-reduce       9.0  100.00 GB/s of bus bandwidth at most",
                 "FAIL  sft             20.5  exit status 1", "       1024 MB      80.00     100.00",
                 "--- end of sft", "CUDA out of memory"):
        assert line in page.splitlines()


def test_more_gpus_than_there_are_or_an_argument_is_refused(tmp_path):
    result = bridge("accept", "trainer.total_epochs=1", WORK_DIR=str(tmp_path))
    assert result.returncode == 2 and "accept takes no arguments" in result.stderr
