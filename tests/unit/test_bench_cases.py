"""The benchmark: its cases, and figures out of what verl really printed (captured/, from a rehearsal on CPU)."""

import json
import shutil
from pathlib import Path

import pytest

from bridge import settings
from bridge.compose import compose_checked
from bridge.errors import UsageError
from bridge.hardware import Gpu
from bridge.pages import page
from bridge.runs import metrics, record
from bridge.stages import data
from bridge.stages.train import NAMES, OWNED
from bridge.tools import bench
from door import bridge, recorded

CAPTURED = Path(__file__).with_name("captured")
PPO = {"data": {"train_batch_size": 8, "max_prompt_length": 384, "max_response_length": 48},
       "actor_rollout_ref": {"rollout": {"n": 1}}}
SFT = {"data": {"train_batch_size": 16, "max_length": 256}}


def captured(stage: str, times: list[float]) -> list[dict]:
    """The rows that the door would have kept."""
    text = (CAPTURED / f"{stage}.log").read_text()
    found = [row for row in map(metrics.parse, text.splitlines()) if row]
    return [{"step": step, "time": time, **values} for (step, values), time in zip(found, times, strict=True)]


def test_ppos_figures_are_verls_own_without_the_warm_up():
    first, second = captured("ppo", [100.0, 121.0])
    figures = bench.ppo_figures([first, {**second, "timing_s/step": 99.0, "timing_s/gen": 99.0}, second], PPO, 2)
    assert figures["seconds_of_each_step"] == [20.194] and figures["first_step_seconds"] == 23.195
    # The two ranks share the tokens; verl's perf/throughput of that step.
    assert figures["tokens_per_second"] == pytest.approx(20.15467780473874, abs=0.06)
    assert figures["padded_tokens_per_second"] == pytest.approx(8 * (384 + 48) / 20.193823 / 2, abs=0.06)
    assert figures["phases"]["gen"] == 5.913 and figures["phases"]["update_actor"] == 6.662
    assert figures["answer_tokens"] == 48.0 and figures["prompt_tokens"] == 53.75
    # The most of all steps, the first among them.
    assert figures["allocated_gib"] == 0.7677497863769531


def test_sfts_figures_come_from_the_times_of_the_lines_and_their_tokens():
    rows = [{**row, "perf/total_num_tokens": tokens, "perf/time_per_step": 2.2404}
            for row, tokens in zip(captured("sft", [50.0, 52.0, 53.0, 54.5]), (9999, 9999, 1270, 1290), strict=True)]
    figures = bench.sft_figures(rows, SFT, 2, 135552, 1e9)
    assert figures["seconds_of_each_step"] == [1.0, 1.5] and figures["seconds_per_step"] == 1.25
    assert figures["first_step_seconds"] == 2.24 and figures["row_tokens"] == 80
    assert figures["tokens_per_second"] == pytest.approx(16 * 80 / 1.25 / 2, abs=0.06)
    assert figures["padded_tokens_per_second"] == pytest.approx(16 * 256 / 1.25 / 2, abs=0.06)
    assert figures["mfu"] == pytest.approx(6 * 135552 * 16 * 80 / 1.25 / 2 / 1e9, rel=1e-3)
    # A GPU that the table of peaks does not know.
    assert bench.sft_figures(rows, SFT, 2, 135552, None)["mfu"] is None


def test_the_cases_that_come_with_it_are_whole_and_each_tuned_one_is_compared_with_the_tutorial():
    cases = {case.name: case for case in bench.read_cases("")}
    assert {case.profile for case in cases.values()} == {"tutorial", "tuned"}
    for case in cases.values():
        if case.profile == "tuned":
            assert cases[case.against].profile == "tutorial"
            # The same work.
            assert cases[case.against].overrides == case.overrides
    assert [case.name for case in bench.read_cases("ppo-tuned, sft-tuned")] == ["ppo-tuned", "sft-tuned"]


def test_every_case_is_one_that_the_door_takes_and_has_a_folder_of_its_own():
    for case in bench.read_cases(""):
        # The folder is removed before the case is measured.
        assert case.stage in ("sft", "ppo") and settings.NAME.fullmatch(case.name)
        assert case.steps > bench.CASES["warm_up"]
        own = [f"profile/{case.stage}={case.profile}"]
        assert compose_checked(case.stage, own, [*bench.ALWAYS, *case.overrides], NAMES, OWNED)


def test_names_that_no_case_has_are_refused_all_at_once():
    with pytest.raises(UsageError) as error:
        bench.read_cases("ppo-tuned-, x")
    assert len(error.value.problems) == 2 and "there is no case 'ppo-tuned-'. Did you mean ppo-tuned?" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"sft": {}}'])
def test_a_file_that_is_no_benchmarks_result_is_put_aside(tmp_path, text):
    file = tmp_path / "bench.json"
    file.write_text(text)
    assert bench.earlier(file, {"gpu": None}) == {"gpu": None, "sft": {}, "ppo": {}, "ratios": {}}
    [aside] = tmp_path.iterdir()
    assert aside.read_text() == text and aside != file


def test_a_case_that_a_person_ends_does_not_take_the_place_of_what_was_measured(monkeypatch, tmp_path):
    env = {"WORK_DIR": str(tmp_path), "GPUS": "2"}
    before = {"gpu": None, **{part: results()[part] for part in ("machine", "model", "sft", "ppo", "ratios")}}
    monkeypatch.setattr(bench, "header", lambda *_arguments: {part: before[part] for part in ("gpu", "machine", "model")})
    monkeypatch.setattr(bench, "measure", lambda *_arguments: {"status": "failed", "exit_status": 130})
    (tmp_path / "bench.json").write_text(json.dumps(before))
    assert bench.measure_all([bench.Case("sft-tuned", "tuned", 2)], settings.read(env), env, []) == 130
    assert json.loads((tmp_path / "bench.json").read_text()) == before


def test_without_a_gpu_the_real_cases_are_refused_before_anything_is_made(tmp_path):
    result = bridge("bench", WORK_DIR=str(tmp_path / "work"))
    assert result.returncode == 2 and "no GPU visible" in result.stderr
    assert not (tmp_path / "work").exists()
    assert "Did you mean ppo-tuned?" in bridge("bench", WORK_DIR=str(tmp_path / "work"), CASES="ppo-tuned-").stderr


def test_peak_memory_is_the_most_of_any_of_the_gpus_used(monkeypatch, tmp_path):
    # (GPU 0, GPU 1, one that is not used), as seen one after another, and so on at the end.
    seen = iter([(gib << 30 for gib in gibs) for gibs in [(10, 20, 90), (30, 5, 90)] + [(0, 0, 90)] * 100])
    monkeypatch.setattr(bench.hardware, "visible_gpus", lambda env: [Gpu("0", "H200", 100, used) for used in next(seen)])
    settings = bench.settings_module.read({"WORK_DIR": str(tmp_path)})
    case = bench.Case("ppo-tuned", "tuned", steps=2)

    def stage(name, env, arguments, log, until):
        while not until():
            with open(tmp_path / "runs" / "ppo-tuned" / "ppo" / "metrics.jsonl", "a") as file:
                file.write('{"step": 1, "time": 1}\n')
        return 0

    def measured(gpus: int) -> float | None:
        (tmp_path / "runs" / "ppo-tuned" / "ppo").mkdir(parents=True)
        return bench.measure(case, settings, {}, [Gpu("0", "H200", 100, 0)] * gpus)["peak_memory_gib"]

    monkeypatch.setattr(bench.trial, "stage", stage)
    monkeypatch.setattr(bench.record, "read", lambda _folder: {"config": {}})
    monkeypatch.setattr(bench, "ppo_figures", lambda *_: {"first_step_seconds": 1.0})
    assert measured(2) == 30
    shutil.rmtree(tmp_path / "runs")
    assert measured(0) is None


def case(rate: float, against: str | None = None, **more) -> dict:
    return {"status": "measured", "against": against, "seconds_per_step": 10.0, "tokens_per_second": rate,
            "padded_tokens_per_second": 2 * rate, "peak_memory_gib": 60.1, "start_seconds": 50.2,
            "first_step_seconds": 12.0, **more}


def results() -> dict:
    phases = {"gen": 3.0, "old_log_prob": 1.0, "values": 0.5, "update_critic": 2.0, "update_actor": 3.0, "adv": 0.1, "step": 10.0}
    found = {
        "gpu": "NVIDIA H200", "gpus": 1, "machine": {"driver": "570.1", "cpus": 16}, "image": "bridge.sif", "git_commit": "abc",
        "model": {"name": "random-llama-3.2-1b", "parameters": 1235814400},
        "sft": {"tutorial": case(1000.0, mfu=0.06), "tuned": case(7000.0, "sft-tutorial", mfu=None)},
        "ppo": {"tutorial": case(2000.0, mfu_actor=0.07, mfu_critic=0.08, phases=phases, answer_tokens=256.0),
                "tuned": {"status": "failed", "against": "ppo-tutorial", "steps_made": 1, "exit_status": 1,
                          "log": ["", "no <room>"]}},
    }
    return {**found, "ratios": bench.ratios(found)}


def test_ratios_are_those_of_measured_cases():
    assert results()["ratios"] == {"sft-tuned": 7.0}


def test_the_report_has_a_row_for_every_measured_case_and_names_those_that_failed():
    shown = page("bench.md", **results(), cases=bench.by_name(results()))
    assert "| sft-tuned | 10.00 | 7,000 | 14,000 | 7.00 | - | - | 60.1 | 50 | 12.0 |" in shown
    assert "| ppo-tutorial | 3.00 | 1.00 | 0.50 | 2.00 | 3.00 | 0.50 | 10.00 | 256 |" in shown
    assert "ppo-tuned failed after 1 steps (exit status 1): no <room>" in shown
    assert all(line.count("|") in (0, 10, 11) for line in shown.splitlines())


def test_results_of_another_machine_or_commit_are_put_aside_and_not_mixed(tmp_path):
    file = tmp_path / "bench.json"
    head = {"gpu": "NVIDIA H200", "git_commit": "a"}
    fresh = bench.earlier(file, head)
    assert fresh == {**head, "sft": {}, "ppo": {}, "ratios": {}}
    file.write_text(json.dumps({**fresh, "sft": {"tuned": {"status": "measured"}}}))
    assert bench.earlier(file, head)["sft"] == {"tuned": {"status": "measured"}}
    assert bench.earlier(file, {**head, "git_commit": "b"})["sft"] == {}
    # What was put aside before stays too.
    file.write_text(json.dumps({**fresh, "git_commit": "b"}))
    bench.earlier(file, {**head, "git_commit": "c"})
    aside = [json.loads(path.read_text())["git_commit"] for path in sorted(tmp_path.glob("bench.till-*.json"))]
    assert aside == ["a", "b"] and not file.exists()


def test_another_data_source_replaces_the_benchmarks_own_data(tmp_path, monkeypatch):
    made = []

    def stage(name: str, env: dict[str, str]) -> int:
        # As the door does it: first what the stage refuses.
        wanted = settings.read(env)
        assert data.plan(wanted, env).command if name == "data" else True
        made.append((name, wanted.data_source))
        command = ["python", "-m", "bridge.stages.data", wanted.data_source] if name == "data" else ["python"]
        folder = wanted.data_dir if name == "data" else wanted.model_dir
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train.parquet").write_text("")
        record.write_json(folder / "run.json", recorded(attempts=[{"command": [*command, "--output"]}]), [])
        return 0

    monkeypatch.setattr(bench.trial, "stage", stage)
    monkeypatch.setattr(bench, "measure_all", lambda *_: 0)
    monkeypatch.setattr(bench.hardware, "visible_gpus", lambda _: [Gpu("0", "NVIDIA H200", 1, 0)])
    env = {"WORK_DIR": str(tmp_path), "MODEL": "tiny"}
    for source in ("builtin", "hub", None):
        given = {**env, "DATA_SOURCE": source} if source else env
        assert bench.run(settings.read(given), given, []) == 0
    # Without the setting, what is there is taken.
    assert made == [("data", "builtin"), ("model", "builtin"), ("data", "hub")]
