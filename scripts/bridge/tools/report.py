"""bridge report: how runs went, on one page that needs nothing but itself: make report RUN=a,b
WORK_DIR/reports/a,b.html is configs/pages/report.html with its style, its script (which compares the runs), uPlot, and what the
runs left as JSON. It stays below LIMIT: every part has its room, what matters most comes first, what is left out is told."""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import accumulate
from math import ceil, isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from bridge.environment import work_dir_problems
from bridge.errors import UsageError, nearest, read_json, refuse, write_whole
from bridge.pages import page
from bridge.runs import metrics, record
from bridge.settings import Settings
from bridge.stages.eval import ANSWERS_FILE, RESULT_FILE

# Bytes of the page and of its parts, SFT's and PPO's each; the answers have what is left.
LIMIT, CURVES, RECORDS, SAMPLES = 2_000_000, 400_000, 400_000, 200_000
# No chart shows more runs, and no file has a longer name.
MOST_RUNS, LONGEST_NAME = 12, 240
SAMPLE = {"input", "output", "score", "step"}
# What each run left, of one stage.
Runs = Mapping[str, dict[str, Any]]


def run(settings: Settings, env: Mapping[str, str], arguments: list[str]) -> int:
    """Write the page of the runs that RUN= names, and print its path. A UsageError names all that is wrong with them."""
    names, output = [*dict.fromkeys(settings.run.split(","))], settings.work_dir / "reports"
    problems = work_dir_problems(settings.work_dir) or work_dir_problems(output)
    if arguments:
        problems.append(f"report takes no arguments; got {' '.join(arguments)}. RUN=a,b names the runs.")
    if len(names) > MOST_RUNS or len(settings.run) > LONGEST_NAME:
        problems.append(f"RUN= has {len(names)} runs in {len(settings.run)} letters. Name at most {MOST_RUNS} in {LONGEST_NAME}.")
    stages: dict[str, Runs] = {"sft": {}, "ppo": {}, "eval": {}}
    for name in names:
        look(settings.work_dir / "runs" / name, stages, problems)
    refuse(problems)
    output.mkdir(exist_ok=True)
    write_whole(output / f"{','.join(names)}.html", whole(names, stages))
    print(output / f"{','.join(names)}.html")
    return 0


def look(folder: Path, stages: Mapping[str, Runs], problems: list[str]) -> None:
    """Add what a run left to the stages; what is wrong with it is appended to problems."""
    wrong, others = len(problems), sorted(path.name for path in folder.parent.glob("*/"))
    for stage, runs in stages.items():
        own, result = folder / stage, folder / stage / RESULT_FILE
        try:
            recorded, rows = record.read(own) or {}, metrics.read(own / "metrics.jsonl")
            if recorded or rows:
                runs[folder.name] = {
                    "recorded": recorded, "rows": rows, "models": read_json(result)["models"] if result.is_file() else {},
                    "samples": [row for row in objects(own.glob("samples/*.jsonl")) if row.keys() >= SAMPLE],
                    "answers": objects(own.glob(ANSWERS_FILE))}
        except (UsageError, ValueError, KeyError, TypeError) as error:
            problems += getattr(error, "problems", [f"{result} is damaged ({error!r}): `make eval RUN={folder.name}` once more."])
    if len(problems) == wrong and not any(folder.name in runs for runs in stages.values()):
        problems.append(f"RUN={folder.name}: nothing to show in {folder}: no run.json, no metrics.jsonl of sft, ppo or eval."
                        f"{nearest(folder.name, others)} Runs there: {', '.join(others) or 'none'}.")


def objects(files: Iterable[Path]) -> list[dict[str, Any]]:
    """The objects of files of JSON lines; of a file up to a line that is damaged, or still being written."""
    rows = []
    for file in files:
        with suppress(ValueError, TypeError):
            # Not splitlines(), which splits at characters that JSON may hold.
            rows += ({**json.loads(line)} for line in file.read_text("utf-8", "replace").split("\n") if line)
    return rows


def each(runs: Runs, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of this kind with their runs' names."""
    return ((name, row) for name, its in runs.items() for row in its[kind])


def shortened(items: list, most: int) -> list:
    """The same with texts of at most so many characters."""
    return record.masked(items, {rf"(?s)\A(.{{{most}}}).+": r"\1 [... cut]"})


def embedded(content: Any) -> str:
    """JSON that cannot end its <script>: it holds no <. A number that JSON does not have is null."""
    text = json.dumps(json.loads(json.dumps(content), parse_constant=lambda _: None), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").encode("utf-8", "replace").decode()


def fitting(room: int, sizes: Iterable[Any], make: Callable[[Any], list], least: int | None = None) -> list:
    """The items, made with the first of the sizes at which all (or the `least` first) have room; else as many as have."""
    for size in sizes:
        items = make(size)
        ends = accumulate(len(embedded(item).encode()) + 1 for item in items)
        taken = [item for item, end in zip(items, ends, strict=True) if end <= room]
        if len(taken) >= (len(items) if least is None else least):
            break
    return taken


def curves(runs: Runs, points: int) -> list[list]:
    """["step", the steps] and [metric, {run: values at these}]: of so many points, each the mean of the steps about it."""
    width = max(1, ceil(max((row["step"] for _, row in each(runs, "rows")), default=0) / points))
    # A phase that a step does not have took no time in it.
    phases = dict.fromkeys((key for _, row in each(runs, "rows") for key in row if key.startswith("timing_s/")), 0)
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for name, row in each(runs, "rows"):
        for key, value in {**(phases if "timing_s/step" in row else {}), **row}.items():
            if isfinite(value):
                found[key][name][(row["step"] - 1) // width * width + (width + 1) // 2].append(value)
    steps = sorted({step for its in found.pop("step", {}).values() for step in its})
    # Times need all their digits.
    return [["step", steps], *([key, {
        name: [float(f"{fmean(at[step]):.{13 if key == 'time' else 5}g}") if step in at else None for step in steps]
        for name, at in its.items()}] for key, its in sorted(found.items()))]


def samples_of(runs: Runs, size: tuple[int, int]) -> list[list]:
    """[run, problem, how many answers, those shown as [step, text, score]] for each problem that PPO's validations kept."""
    (most, chars), kept = size, defaultdict(list)
    for name, row in each(runs, "samples"):
        kept[name, row["input"]].append([row["step"], row["output"], row["score"]])
    return shortened([[*problem, len(its), sorted(its)[::-ceil(len(its) / most)][::-1]] for problem, its in kept.items()], chars)


def records_of(stages: Mapping[str, Runs], most: int) -> list[list]:
    """[stage, run, run.json with what came out]: all of its last attempt, of so many the times; long texts are cut."""
    made = []
    for stage, name, its in ((stage, name, its) for stage, runs in stages.items() for name, its in runs.items()):
        attempts = its["recorded"].get("attempts", [])
        made.append([stage, name, {
            **its["recorded"], "attempts": [[one.get("started"), one.get("ended")] for one in attempts[-most:]],
            "facts": {key: value for one in attempts[-1:] for key, value in one.items() if key != "configs_sha256"},
            "models": its["models"], "course": metrics.course(stage, its["rows"])}])
    return shortened(made, 1000)


def whole(names: list[str], stages: Mapping[str, Runs]) -> str:
    asked: dict = defaultdict(lambda: defaultdict(dict))
    for name, row in each(stages["eval"], "answers"):
        asked[row.pop("index"), row.pop("prompt"), row.pop("ground_truth")][name][row["model"]] = row
    # Those at which a run's models have different scores come first.
    problems = [[all(len({row["score"] for row in its.values()}) < 2 for its in found.values()), *problem, found]
                for problem, found in asked.items()]
    problems.sort(key=lambda problem: problem[0])
    data = {"made": record.now(), "runs": names, "housekeeping": record.MAY_DIFFER,
            "curves": {}, "scores": {}, "records": fitting(RECORDS, (1000, 20, 3), partial(records_of, stages)),
            "samples": fitting(SAMPLES, ((50, 1500), (50, 500), (12, 500), (12, 150)), partial(samples_of, stages["ppo"]))}
    data["sampled"] = len({(name, row["input"]) for name, row in each(stages["ppo"], "samples")})
    for stage in ("sft", "ppo"):
        data["curves"][stage] = fitting(CURVES, (500, 300, 200, 150, 100, 50, 10), partial(curves, stages[stage]))
    for name, model in {(name, row["model"]): None for name, row in each(stages["eval"], "answers")}:
        data["scores"].setdefault(name, {})[model] = [found.get(name, {}).get(model, {}).get("score") for *_, found in problems]
    render = partial(page, "report.html", title=", ".join(names))
    room = LIMIT - len(render(data=embedded({**data, "problems": []})).encode())
    listed = fitting(room, (3000, 1000, 400), partial(shortened, problems), sum(not alike for alike, *_ in problems))
    return render(data=embedded({**data, "problems": listed}))
