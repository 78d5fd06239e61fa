"""What the pages say is what the files have: tables of figures, links, paths, commands, settings. The README stays short."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev

import pytest
from test_configs import TUTORIAL

from bridge import pages
from bridge.runs import progress
from bridge.tools import bench
from bridge.trainers import stoppable
from door import ROOT

DOCS = ROOT / "docs"
RESULTS = DOCS / "benchmarks"
READMES = [ROOT / "README.md", ROOT / "README.ja.md"]
PAGES = [*READMES, ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")]
every_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
both_readmes = pytest.mark.parametrize("page", READMES, ids=[page.name for page in READMES])


def load(name: str) -> dict:
    """A file of results."""
    return json.loads((RESULTS / name).read_text())


def cells(text: str, head: str) -> list[list[str]]:
    """The rows of the one Markdown table whose first line begins with `head`, without that line and the rule below it."""
    (table,) = re.findall(rf"^{re.escape(head)}.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[1:]]


def eighth_rows() -> list[list[str]]:
    """GPU, seconds a step with both profiles and their ratio, as the tables have them: first the H100's, then the H200's."""
    def row(gpu: str, tutorial: float, tuned: float) -> list[str]:
        return [gpu, f"{tutorial:.2f}", f"{tuned:.2f}", f"{tutorial / tuned:.1f} x"]

    h100, h200 = load("eighth_h100.json"), load("eighth.json")
    return [*(row("H100", *(h100[stage][f"{profile}-eighth"]["seconds_per_step"] for profile in ("tutorial", "tuned")))
              for stage in ("ppo", "sft")),
            *(row("H200", *(h200[stage][share]["seconds_per_step"][profile] for profile in ("tutorial", "tuned")))
              for stage, share in (("ppo", "eighth"), ("sft", "eighth"), ("ppo", "whole")))]


def turn_rows() -> list[list[str]]:
    """Phases of a PPO step without and with the tokens of a scheduler's turn taken together."""
    results = load("turns.json")
    names = ("gen", "old_log_prob", "values", "update_critic", "update_actor", "step")
    return [[f"{case['phases'][name]:.2f}" for name in names] for case in [*results["without"], *results["with"]]]


def curve_rows() -> list[list[str]]:
    """Means of PPO's curves with both profiles, and the mean of what they differ by in a step with its standard error."""
    curves, rows = load("ppo_curves.json"), []
    for key, digits in (("critic/score/mean", 3), ("response_length/mean", 1), ("critic/vf_loss", 3), ("actor/entropy", 2)):
        for seed in "12":
            tutorial, tuned = ([row[key] for row in curves[f"{profile}-{seed}"]] for profile in ("tutorial", "tuned"))
            apart = [ours - theirs for ours, theirs in zip(tuned, tutorial, strict=True)]
            error = stdev(apart) / len(apart) ** 0.5
            rows.append([f"`{key}`", seed, f"{mean(tutorial):.{digits}f}", f"{mean(tuned):.{digits}f}",
                         f"{mean(apart):.{digits}f} +- {error:.{digits}f}"])
    return rows


def eval_rows() -> list[list[str]]:
    """Accuracies with their intervals, in percent."""

    def share(figures: dict, name: str) -> str:
        low, high = figures[f"{name}_interval"]
        return f"{100 * figures[name]:.2f} % [{100 * low:.2f}, {100 * high:.2f}]"

    return [[name, share(figures, "accuracy"), share(figures, "last_number_accuracy"), f"{figures['mean_response_tokens']:.1f}",
             f"{100 * figures['cut_off']:.1f} %"] for name, figures in load("eval.json")["models"].items()]


def learned_rows() -> list[list[str]]:
    """What PPO's sampled answers were like at its begin and at its end."""
    steps = load("learned.json")["ppo"]
    rows = []
    for some in (steps[:10], steps[-10:]):
        right = [100 * step["critic/score/mean"] for step in some]
        rows.append([f"{some[0]['step']} to {some[-1]['step']}", f"{mean(right):.1f} % +- {stdev(right) / len(right) ** 0.5:.1f}",
                     f"{mean(step['response_length/mean'] for step in some):.0f}"])
    return rows


@pytest.mark.parametrize(("head", "rows"), [
    ("| means of 16 steps |", curve_rows), ("| model | accuracy", eval_rows), ("| PPO's steps |", learned_rows)])
def test_the_tables_of_learning_are_what_their_files_say(head, rows):
    assert cells((DOCS / "benchmarks.md").read_text(), head) == rows()


def test_the_speed_of_an_eighth_is_what_its_files_say():
    assert [row[1:] for row in cells((DOCS / "benchmarks.md").read_text(), "| case | GPU |")] == eighth_rows()
    ppo, sft, ppo_h200, sft_h200, whole = eighth_rows()
    for page, head in (READMES[0], "| seconds a step |"), (READMES[1], "| 1 ステップの秒数 |"):
        assert [row[1:] for row in cells(page.read_text(), head)] == [ppo, sft, whole]
        assert f"PPO {ppo_h200[-1]}" in page.read_text() and f"SFT {sft_h200[-1]}" in page.read_text()


def test_what_compiled_layers_gain_is_what_their_file_says():
    measured, rows = load("compiled.json"), []
    for stage, layers in (("ppo", "liger"), ("ppo", "compiled"), ("sft", "compiled")):
        case = measured[stage][layers]
        updates = [f"{case['phases'][name]:.2f}" for name in ("update_critic", "update_actor")] if stage == "ppo" else ["-"]
        rows.append([f"{case['first_step_seconds']:.1f}", ", ".join(f"{step:.2f}" for step in case["seconds_of_each_step"]),
                     ", ".join(updates)])
    page = (DOCS / "benchmarks.md").read_text()
    assert [row[1:] for row in cells(page, "| `tuned`, an eighth, seconds")] == rows
    liger, compiled = measured["mini_batch"].values()
    pairs = list(zip(liger["loss_and_gradient_norm"], compiled["loss_and_gradient_norm"], strict=True))
    apart = [max(abs(one[place] / other[place] - 1) for one, other in pairs) for place in (0, 1)]
    assert apart[0] < 2e-4 and apart[1] < 6e-4 and len(pairs) == 12
    kernels = [round(one["kernels_milliseconds"]) for one in (compiled, liger)]
    assert f"kernels of a mini batch {kernels[0]} instead of {kernels[1]} ms" in page


def test_what_a_save_takes_is_what_its_file_says():
    measured, rows = load("saves.json"), []
    for case in ("verl", "background", "eighth"):
        seconds = [step["timing_s/save_checkpoint"] for step in measured[case].values() if "timing_s/save_checkpoint" in step]
        first, *more = (f"{one:.1f}" for one in seconds)
        rows.append([first, ", ".join(more)])
    page = (DOCS / "benchmarks.md").read_text()
    assert [row[2:] for row in cells(page, "| seconds that a save")] == rows
    slow = load("slow_h200.json")
    for stage, digits in (("ppo", "7.73 and 2.45 s (3.2 x)"), ("sft", "1.09 and 0.29 s (3.7 x)")):
        tutorial, tuned = (slow[stage][f"{profile}-eighth"]["seconds_per_step"] for profile in ("tutorial", "tuned"))
        assert f"{tutorial:.2f} and {tuned:.2f} s ({tutorial / tuned:.1f} x)" == digits and digits in page
    assert f"{slow['ppo']['tuned']['seconds_per_step']:.2f} s" in page


def test_what_taking_turns_together_gains_is_what_its_file_says():
    assert [row[1:] for row in cells((RESULTS / "log.md").read_text(), "| seconds | gen |")] == turn_rows()


def test_the_program_of_today_beside_the_one_of_before_is_what_its_file_says():
    measured = load("program.json")
    shown = [[f"{program['ppo']['phases'][phase]:.2f}" for phase in ("gen", "update_critic", "update_actor", "step")]
             + [f"{program['sft']['seconds_per_step']:.2f}"] for program in measured["program"].values()]
    page = (RESULTS / "log.md").read_text()
    assert [row[1:] for row in cells(page, "| program, seconds |")] == shown
    for starts in measured["starts"].values():
        assert " and ".join(f"{seconds:.1f}" for seconds in starts) + " s" in page


@pytest.mark.parametrize(("page", "name"), [(DOCS / "benchmarks.md", "gpu"), (RESULTS / "log.md", "gpu_h100")])
def test_the_tables_of_the_benchmark_are_those_that_bench_makes(page, name):
    # Without its first line, which tells the machine.
    found = json.loads((RESULTS / f"{name}.json").read_text())
    tables = pages.page("bench.md", **found, cases=bench.by_name(found)).split("\n", 2)[2].strip()
    assert tables.count("|") > 100 and tables in page.read_text()


@pytest.mark.parametrize(("chart", "name", "stage", "mean_of"), [
    ("ppo_curves", "ppo_curves", None, 1), ("learned_sft", "learned", "sft", 1), ("learned_ppo", "learned", "ppo", 5)])
def test_the_curves_are_those_that_the_file_gives(chart, name, stage, mean_of):
    # learned.json has one run's stages, ppo_curves.json the runs of one.
    runs = [load(f"{name}.json")[stage]] if stage else [*load(f"{name}.json").values()]
    keys = ["train/loss"] if stage == "sft" else ["critic/score/mean", "response_length/mean", "actor/entropy", "critic/vf_loss"]
    told = []
    for rows in (rows for key in keys for rows in ([{"step": row["step"], "value": row[key]} for row in run] for run in runs)):
        values, half = [row["value"] for row in rows], mean_of // 2
        # Where means are drawn, the values are faintly behind.
        told += [values] if mean_of > 1 else []
        told.append([mean(values[max(0, place - half):place + half + 1]) for place in range(len(values))])
    paths = re.findall(r'<path d="([^"]+)"[^>]*style="fill: none; (?:stroke-[^;]*; )*stroke: #(?!b0b0b0)',
                       (RESULTS / f"{chart}.svg").read_text())
    drawn = [[tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", path)] for path in paths]
    drawn = [points for points in drawn if len(points) > 4]
    assert len(drawn) == len(told)
    for values, points in zip(told, drawn, strict=True):
        # Straight lines may have been drawn as one: a point's place tells its step.
        (left, _), (right, _) = points[0], points[-1]
        at = [round((x - left) / (right - left) * (len(values) - 1)) for x, _ in points]
        shown = [values[place] for place in at]
        low, high = shown.index(min(shown)), shown.index(max(shown))
        scale = (points[high][1] - points[low][1]) / (shown[high] - shown[low])
        assert [y for _, y in points] == pytest.approx(
            [points[low][1] + scale * (value - shown[low]) for value in shown], abs=0.02)


def test_no_file_of_results_is_left_that_no_page_names():
    linked = {target for page in PAGES for target in re.findall(r"\]\((?:benchmarks/)?([\w.]+)\)", page.read_text())}
    assert {file.name for file in RESULTS.iterdir()} - {"log.md"} <= linked


@every_page
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        headings = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in headings}, target


@every_page
def test_every_path_command_and_setting_that_a_page_names_is_there(page):
    text = page.read_text()
    for path in re.findall(r"(?<![\w/.])((?:scripts|configs|tests|docs|\.ci|\.github)/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^|['&] ?)make ([a-z]+)", text, re.MULTILINE)) <= targets
    shown = re.findall(r"^#([A-Z_]+)(\*?)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    # Make's own, and buildah's.
    names = {name for name, family in shown if not family} | {"ARGS", "BUILDAH_ISOLATION"}
    families = tuple(name for name, family in shown if family)
    named = {name for call in re.findall(r"`(make [^`]+|[A-Z_]+=[^`]*)`", text)
             for name in re.findall(r"(?:^| )([A-Z][A-Z_]+)=", call)}
    assert {name for name in named - names if not name.startswith(families)} == set()


def is_defined(name: str, text: str) -> bool:
    """Whether a program or script defines this: a function, a class, a value."""
    return re.search(rf"^ *(?:(?:def|class) {name}\b|{name}\(\)|(?:\S+ )?{name}\b[^(\n]*=)", text, re.MULTILINE) is not None


def test_what_the_picture_of_the_program_names_is_there():
    page = (DOCS / "architecture.md").read_text()
    answers = [cell for _, cell in cells(page, "| question |")]
    assert len(answers) >= 20
    for answer in answers:
        for part in answer.split("; "):
            file, *names = re.findall(r"`([^`]+)`", part)
            assert (ROOT / file).exists(), file
            assert all(is_defined(name, (ROOT / file).read_text()) for name in names), part
    assert not is_defined("no_such_name", (ROOT / "scripts/bridge/door.py").read_text())
    assert all((ROOT / path).exists() for room, _ in cells(page, "| room |") for path in re.findall(r"`([^`]+)`", room))
    (verl,) = map(Path, find_spec("verl").submodule_search_locations)
    modules = {name.replace(".", "/") for name in re.findall(r"\bverl\.([a-z_]+(?:\.[a-z_]+)*)", page)}
    assert len(modules) > 2 and all((verl / name).is_dir() or (verl / f"{name}.py").is_file() for name in modules), modules


@both_readmes
def test_the_readme_is_short(page):
    lines = page.read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120


@both_readmes
def test_the_readme_has_a_line_for_every_page(page):
    # A translation is named behind its page.
    line = r"^\* \[[^]]+\]\(docs/(\w+)\.md\)(?: \(\[日本語\]\(docs/(\1\.ja\.md)\)\))?"
    lines = re.findall(line, page.read_text(), re.MULTILINE)
    assert {f"{name}.md" for name, _ in lines} | {name for _, name in lines if name} == {file.name for file in DOCS.glob("*.md")}


@both_readmes
def test_the_table_of_the_tutorial_counts_the_tutorials_settings(page):
    head = "| the tutorial |" if page.name == "README.md" else "| チュートリアル |"
    rows = {ours: theirs for theirs, ours in cells(page.read_text(), head)}
    # Lines beside those of settings: `torchrun ...` and `-m ...`; `python -m ...`.
    for stage, lines in {"sft": 2, "ppo": 1}.items():
        typed = len(TUTORIAL[stage].split())
        (told,) = (text for ours, text in rows.items() if ours.startswith(f"`make {stage} "))
        assert re.findall(r"\d+", told) == [str(typed + lines), str(typed)]


def test_the_limits_of_watching_and_of_a_build_are_the_programs():
    runs, image = ((DOCS / name).read_text() for name in ("runs.md", "image.md"))
    assert f"answers to {stoppable.SAMPLED} problems" in runs and f"has {stoppable.SAMPLES_BYTES // 10**6} MB" in runs
    assert "Five minutes without a step" in runs and progress.SILENCE == 300
    [needed] = re.findall(r"need_space (\d+) \"\$store\"", (ROOT / "scripts" / "host" / "build.sh").read_text())
    assert f"and {needed} GiB in its store" in image
