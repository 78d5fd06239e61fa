"""bridge report: what is on the page of runs, what it leaves out to stay small, and what is wrong with runs that it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bridge import environment
from bridge.errors import UsageError
from bridge.settings import CONFIGS, read
from bridge.tools import report
from door import SHELL, bridge
from made_runs import NASTY, evaluation, full, nasty, odd, samples, training


def page_of(work_dir: Path, *names: str) -> str:
    """The page of these runs."""
    env = {"WORK_DIR": str(work_dir), "RUN": ",".join(names)}
    assert report.run(read(env, several_runs=True), env, []) == 0
    return (work_dir / "reports" / f"{','.join(names)}.html").read_text()


def data_of(page: str) -> dict:
    """What the page's script is given, found as a browser finds it: up to the first end of the element."""
    return json.loads(page.partition('<script type="application/json" id="data">')[2].partition("</script")[0])


def refused(work_dir: Path, run: str, *arguments: str) -> str:
    env = {"WORK_DIR": str(work_dir), "RUN": run}
    with pytest.raises(UsageError) as error:
        report.run(read(env, several_runs=True), env, [*arguments])
    return str(error.value)


def test_what_a_person_calls_writes_one_page_and_prints_its_path(tmp_path):
    full(tmp_path, {"a": 1, "b": 2}, steps=6, problems=8)
    result = bridge("report", WORK_DIR=str(tmp_path), RUN="a,b")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{tmp_path}/reports/a,b.html\n"
    page = (tmp_path / "reports/a,b.html").read_text()
    assert page.startswith("<!doctype html>") and page.endswith("</html>")
    assert not re.search(r"""(?:src|href)=["'](?!#)|url\(|@import""", page.partition("<script")[0])


def test_the_curves_and_the_times_are_those_of_the_metrics(tmp_path):
    full(tmp_path, {"a": 1}, steps=10, problems=4)
    data = data_of(page_of(tmp_path, "a"))
    rows = [json.loads(line) for line in (tmp_path / "runs/a/ppo/metrics.jsonl").read_text().splitlines()]
    curves = dict(data["curves"]["ppo"])
    assert curves["step"] == [*range(1, 11)] and set(curves) == {key for row in rows for key in row}
    assert curves["critic/score/mean"]["a"] == pytest.approx([row["critic/score/mean"] for row in rows], rel=1e-4)
    assert curves["time"]["a"] == [row["time"] for row in rows]
    # Only some steps validate: no accuracy in the others, and no time taken by it.
    accuracy, testing = (curves[key]["a"] for key in ("val-core/openai/gsm8k/reward/mean@1", "timing_s/testing"))
    assert [value is None for value in accuracy] == [step % 5 != 0 for step in range(1, 11)]
    assert testing == [9.0 if step % 5 == 0 else 0 for step in range(1, 11)]
    [[_, _, sft], [_, _, ppo], [_, _, its]] = data["records"]
    assert sft["status"] == ppo["status"] == "finished" and ppo["course"].startswith("10 steps, reward ")
    assert ppo["facts"]["gpus"] == ["NVIDIA H200"] * 2 and ppo["attempts"] == [
        [ppo["facts"]["started"], ppo["facts"]["ended"]]]
    assert its["models"]["ppo"]["accuracy_interval"] == [0.1, 0.4]


def test_a_curve_of_many_steps_is_made_of_means(tmp_path):
    training(tmp_path / "runs/a", "sft", 1200)
    data = data_of(page_of(tmp_path, "a"))
    curves = dict(data["curves"]["sft"])
    rows = [json.loads(line) for line in (tmp_path / "runs/a/sft/metrics.jsonl").read_text().splitlines()]
    assert len(curves["step"]) == 400 and curves["step"][:3] == [2, 5, 8]
    assert curves["train/loss"]["a"][1] == pytest.approx(sum(row["train/loss"] for row in rows[3:6]) / 3, rel=1e-4)


def test_values_that_are_no_number_are_no_points(tmp_path):
    training(tmp_path / "runs/a", "sft", 3)
    file = tmp_path / "runs/a/sft/metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["train/loss"] = float("nan")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert dict(data_of(page_of(tmp_path, "a"))["curves"]["sft"])["train/loss"]["a"][1] is None


def test_changed_answers_come_first_with_what_the_scorer_made_of_them(tmp_path):
    training(tmp_path / "runs/a", "sft", 2)
    evaluation(tmp_path / "runs/a", {"base": [0, 0, 1, 1], "sft": [0, 0, 1, 1], "ppo": [0, 1, 0, 1]})
    data = data_of(page_of(tmp_path, "a"))
    assert [index for _, index, *_ in data["problems"]] == [1, 2, 0, 3]
    assert data["scores"] == {"a": {"base": [0, 1, 0, 1], "sft": [0, 1, 0, 1], "ppo": [1, 0, 0, 1]}}
    _, _, prompt, truth, answers = data["problems"][0]
    assert truth == "7" and "Anna has 4 apples and gets 3 more" in prompt
    assert [answers["a"][model]["extracted"] for model in ("base", "sft", "ppo")] == ["1", "1", "7"]


def test_no_text_breaks_out_of_its_element(tmp_path):
    training(tmp_path / "runs/a", "ppo", 2)
    nasty(tmp_path / "runs/a")
    page = page_of(tmp_path, "a")
    inside = page.partition('id="data">')[2].partition("</script")[0]
    assert "<" not in inside and page.count("</script>") == 2
    said = data_of(page)["problems"][0][-1]["a"]["ppo"]
    assert NASTY.replace("\ud800", "") in said["response"] and said["extracted"] == NASTY.replace("\ud800", "?")


def test_texts_go_in_as_texts():
    script = (CONFIGS / "pages/report.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|srcdoc", script)


def test_the_library_is_the_one_of_its_licence():
    library, style = ((CONFIGS / "pages" / name).read_text() for name in ("uPlot.iife.min.js", "uPlot.min.css"))
    head = "/*! https://github.com/leeoniya/uPlot (v1.6.32)"
    assert library.startswith(head) and style.startswith(head) and "The MIT License" in style
    assert "</script" not in library and "</style" not in style
    # The template takes them in as they are.
    assert not re.search(r"\{[{%#]", "".join((CONFIGS / "pages" / name).read_text() for name in (
        "uPlot.iife.min.js", "uPlot.min.css", "report.js", "report.css")))


@pytest.mark.parametrize(("count", "steps", "problems", "length"), [(6, 435, 1319, 1200), (12, 40, 60, 20_000)])
def test_the_page_of_large_runs_stays_small_and_keeps_what_changed(tmp_path, count, steps, problems, length):
    full(tmp_path, {f"run{number}": number for number in range(count)}, steps, problems, length)
    page = page_of(tmp_path, *(f"run{number}" for number in range(count)))
    assert 1_000_000 < len(page.encode()) < report.LIMIT
    data = data_of(page)
    assert len(data["curves"]["ppo"][0][1]) <= 500 and {"critic/score/mean", "timing_s/gen"} <= dict(data["curves"]["ppo"]).keys()
    # All are counted; of those whose texts are there, all changed if there is room for them.
    of_all = [[its[model][place] for its in data["scores"].values() for model in its] for place in range(problems)]
    changed = [len({*its[:3]}) > 1 or any(len({*its[at:at + 3]}) > 1 for at in range(0, len(its), 3)) for its in of_all]
    assert changed == sorted(changed, reverse=True) and 0 < len(data["problems"]) <= problems
    assert len(data["samples"]) == 3 * count and len(data["records"]) == 3 * count


def test_long_texts_say_what_they_lack(tmp_path):
    assert report.shortened(["ab\ncde", "abcd", {"a": [1, None]}], 4) == ["ab\nc [... cut]", "abcd", {"a": [1, None]}]
    training(tmp_path / "runs/a", "ppo", 2)
    samples(tmp_path / "runs/a", [0, 5, 10], length=2000)
    [[run, _, count, kept], *_] = data_of(page_of(tmp_path, "a"))["samples"]
    assert (run, count, [(step, score) for step, _, score in kept]) == ("a", 3, [(0, 0.0), (5, 1.0), (10, 1.0)])
    assert kept[1][1].endswith(" [... cut]")


def test_runs_that_lack_parts_are_shown_with_what_they_have(tmp_path):
    odd(tmp_path)
    data = data_of(page_of(tmp_path, "killed", "asked", "old", "bare"))
    assert [(stage, run, its.get("status")) for stage, run, its in data["records"]] == [
        ("sft", "old", "failed"), ("sft", "bare", None), ("ppo", "killed", "running"), ("eval", "asked", "finished")]
    assert dict(data["curves"]["sft"])["train/loss"] == {"bare": [2.5]}


def test_what_a_run_was_told_is_there_and_long_texts_of_it_are_cut(tmp_path):
    training(tmp_path / "runs/a", "ppo", 2, seed=7, config={"data.chat_template": "x" * 2000})
    [[*_, told]] = data_of(page_of(tmp_path, "a"))["records"]
    assert told["config"]["data"]["seed"] == told["inputs"]["seed"] == 7 and told["config"]["algorithm"]["adv_estimator"] == "gae"
    assert told["config"]["data"]["chat_template"] == "x" * 1000 + " [... cut]"


def test_a_folder_that_was_moved_is_read_where_it_lies(tmp_path):
    full(tmp_path / "before", {"a": 1}, 3, 4)
    shutil.move(tmp_path / "before", tmp_path / "now")
    assert data_of(page_of(tmp_path / "now", "a"))["runs"] == ["a"]


def test_mistakes_are_named_all_at_once(tmp_path):
    full(tmp_path, {"seed1": 1}, 2, 2)
    (tmp_path / "runs/empty/ppo").mkdir(parents=True)
    (tmp_path / "runs/seed1/eval/eval.json").write_text("{")
    training(tmp_path / "runs/broken", "ppo", 2)
    (tmp_path / "runs/broken/ppo/run.json").write_text('{"status": 1}')
    (tmp_path / "reports").write_text("")
    said = refused(tmp_path, "seed1,seed2,empty,broken", "a=b")
    for part in ("takes no arguments; got a=b", "RUN=seed2: nothing to show", "Did you mean seed1?", "RUN=empty: nothing to show",
                 "eval.json is damaged", "broken/ppo/run.json is damaged", "reports is a file"):
        assert part in said, part
    assert (tmp_path / "reports").read_text() == ""


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch):
    full(tmp_path, {"a": 1}, 2, 2)
    (tmp_path / "reports").mkdir()
    monkeypatch.setattr(environment.os, "access", lambda path, _: Path(path).name != "reports")
    assert refused(tmp_path, "a") == (f"WORK_DIR={tmp_path}/reports cannot be written to (read-only or not yours). "
                                      "Set WORK_DIR in .env to a folder on a disk with room.")


def test_too_many_runs_are_refused(tmp_path):
    assert "RUN= has 13 runs" in refused(tmp_path, ",".join(f"r{number}" for number in range(13)))
    assert "Name at most 12 in 240" in refused(tmp_path, ",".join(f"{number}{'r' * 90}" for number in range(3)))


def test_a_list_is_for_the_report_alone(tmp_path):
    for stage in ("eval", "check", "bench"):
        result = bridge(stage, WORK_DIR=str(tmp_path), RUN="a,b")
        assert result.returncode == 2 and "RUN='a,b' is not a run's name" in result.stderr
    result = bridge("report", WORK_DIR=str(tmp_path), RUN="a,,b/c")
    assert result.returncode == 2 and "RUN='' is not" in result.stderr and "RUN='b/c' is not" in result.stderr


def test_it_starts_quickly():
    heavy = "{'torch', 'vllm', 'transformers', 'pandas', 'scipy', 'wandb'}"
    # In a Python that has imported nothing yet.
    found = subprocess.run([sys.executable, "-c", f"import sys, bridge.tools.report; print({heavy} & {{*sys.modules}})"],
                           env=SHELL, capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


