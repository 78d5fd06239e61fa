"""bridge bench: how fast the trainings are, on the GPUs of this machine. Each case of configs/bench.yaml is started through the
door in WORK_DIR/bench and ended after some steps. bench.json there has the results after each, bench.md their
tables (configs/pages/bench.md)."""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from bridge import hardware, model_folder
from bridge import settings as settings_module
from bridge.errors import UsageError, nearest, read_json, refuse, say
from bridge.pages import page
from bridge.runs import failure, metrics, record
from bridge.settings import CONFIGS, Settings
from bridge.stages.train import ON_CPU
from bridge.tools import trial

DEFAULT_MODEL = "random:llama-3.2-1b"
CASES: dict[str, Any] = yaml.safe_load((CONFIGS / "bench.yaml").read_text(encoding="utf-8"))
# Nothing is saved or validated: neither is the training's speed.
ALWAYS = ["trainer.save_freq=-1", "trainer.test_freq=-1"]


@dataclass(frozen=True)
class Case:
    """One measurement; see configs/bench.yaml."""

    name: str
    profile: str
    steps: int
    overrides: list[str] = field(default_factory=list)
    against: str | None = None

    @property
    def stage(self) -> str:
        return self.name.split("-")[0]


def run(settings: Settings, env: Mapping[str, str], arguments: list[str]) -> int:
    """Measure the cases; returns 1 if one of them failed."""
    if arguments:
        raise UsageError(f"bench takes no arguments; got {' '.join(arguments)}. CASES=, MODEL= and GPUS= apply.")
    cases = read_cases(env.get("CASES", ""))
    gpus = hardware.visible_gpus(env)
    if not gpus and any(case.profile not in ON_CPU for case in cases):
        raise UsageError("no GPU visible. With Apptainer pass --nv; on Slurm ask for --gpus-per-node.")
    ranks = settings.gpus or len(gpus) or 2
    settings = settings_module.read({**env, "MODEL": env.get("MODEL") or DEFAULT_MODEL})
    bench, bench_env = trial.inside(settings.work_dir / "bench", env, MODEL=settings.model, GPUS=str(ranks),
                                    PROFILE=cases[0].profile)
    has_model = any((found.model_dir / "run.json").is_file() for found in (bench, settings))
    # Of an earlier benchmark; the data stage refuses to replace data of another source.
    removed = [*(bench.work_dir / "runs" / case.name for case in cases), bench.work_dir / "cache",
               *([bench.data_dir] if env.get("DATA_SOURCE") else [])]
    with trial.own_folder(bench, env, removed, new_model=not has_model):
        return (trial.inputs(settings, bench, bench_env, borrow_data=not env.get("DATA_SOURCE"))
                or measure_all(cases, bench, bench_env, gpus[:ranks]))


def measure_all(cases: list[Case], settings: Settings, env: Mapping[str, str], gpus: list[hardware.Gpu]) -> int:
    """Measure case after case; bench.json is whole after each."""
    results = earlier(settings.work_dir / "bench.json", header(settings, env, gpus))
    for case in cases:
        say(f"--- {case.name}")
        found = measure(case, settings, env, gpus)
        if found.get("exit_status", 0) in trial.INTERRUPTED:
            say(f"ended at {case.name}: what was measured of it before, and of the others, stays in bench.json")
            return found["exit_status"]
        results[case.stage][case.name.partition("-")[2]] = found
        results["ratios"] = ratios(results)
        record.write_json(settings.work_dir / "bench.json", results, record.secret_values(env))
    tables = page("bench.md", **results, cases=by_name(results))
    (settings.work_dir / "bench.md").write_text(tables + "\n")
    print(tables)
    return 1 if any(by_name(results)[case.name]["status"] == "failed" for case in cases) else 0


def read_cases(wanted: str) -> list[Case]:
    """All cases, or those whose names are given (by comma). A UsageError for a name that none has."""
    cases = {row["name"]: Case(**{"steps": CASES["steps"][row["name"].split("-")[0]], **row}) for row in CASES["cases"]}
    names = [name.strip() for name in wanted.split(",") if name.strip()] or list(cases)
    refuse(f"CASES: there is no case {name!r}.{nearest(name, cases)} There are: {', '.join(cases)}."
           for name in names if name not in cases)
    return [cases[name] for name in names]


def measure(case: Case, settings: Settings, env: Mapping[str, str], gpus: list[hardware.Gpu]) -> dict[str, Any]:
    """Run one case and read its figures; one that does not make its steps is "failed", with the end of its output."""
    folder = settings.work_dir
    stage_dir, log = folder / "runs" / case.name / case.stage, folder / f"{case.name}.log"
    log.unlink(missing_ok=True)
    started, result = time.time(), {**vars(case), "started": record.now()}
    used: list[int] = []

    def enough() -> bool:
        # Asked 5 times a second, and so is the driver.
        used.extend(gpu.memory_used for gpu in hardware.visible_gpus(env)[:len(gpus)])
        return len(metrics.read(stage_dir / "metrics.jsonl")) >= case.steps

    status = trial.stage(case.stage, {**env, "RUN": case.name, "PROFILE": case.profile}, [*ALWAYS, *case.overrides], log, enough)
    rows = metrics.read(stage_dir / "metrics.jsonl")
    if status or len(rows) < case.steps:
        return {**result, "status": "failed", "exit_status": status, "steps_made": len(rows), "log": failure.last_lines(log, 40)}
    rows, config = rows[:case.steps], record.read(stage_dir)["config"]
    peak = CASES["peak"].get(gpus[0].name) if gpus else None
    figures = ppo_figures(rows, config, settings.gpus) if case.stage == "ppo" else sft_figures(
        rows, config, settings.gpus, model_folder.parameter_count(settings.model_dir), peak)
    figures["start_seconds"] = round(rows[0]["time"] - started - figures["first_step_seconds"], 2)
    return {**result, "status": "measured", **figures, "peak_memory_gib": round(max(used) / 2**30, 2) if used else None}


def ppo_figures(rows: list[dict], config: Mapping[str, Any], gpus: int) -> dict[str, Any]:
    """Figures of a PPO run from its lines of metrics, the warm-up left out."""
    measured = rows[CASES["warm_up"]:]
    means = {key: fmean(row[key] for row in measured) for key in measured[0] if all(key in row for row in measured)}
    given, answers = config["data"], config["actor_rollout_ref"]["rollout"]["n"]
    positions = given["train_batch_size"] * answers * (given["max_prompt_length"] + given["max_response_length"])
    return {
        **speed([row["timing_s/step"] for row in measured], means["perf/total_num_tokens"], positions, gpus),
        "first_step_seconds": round(rows[0]["timing_s/step"], 3),
        "phases": {key.removeprefix("timing_s/"): round(value, 3) for key, value in means.items() if key.startswith("timing_s/")},
        "mfu_actor": means["perf/mfu/actor"], "mfu_critic": means["perf/mfu/critic"],
        "prompt_tokens": means["prompt_length/mean"], "answer_tokens": means["response_length/mean"],
        "allocated_gib": max(row["perf/max_memory_allocated_gb"] for row in rows),
        "reserved_gib": max(row["perf/max_memory_reserved_gb"] for row in rows),
    }


def sft_figures(rows: list[dict], config: Mapping[str, Any], gpus: int, parameters: int, peak: float | None) -> dict[str, Any]:
    """Figures of an SFT run from its lines of metrics, the warm-up left out."""
    data, tokens = config["data"], fmean(row["perf/total_num_tokens"] for row in rows[CASES["warm_up"]:])
    figures = speed([row["time"] - before["time"] for before, row in pairwise(rows[CASES["warm_up"] - 1:])], tokens,
                    data["train_batch_size"] * data["max_length"], gpus)
    return {**figures, "first_step_seconds": round(rows[0]["perf/time_per_step"], 3),
            "row_tokens": round(tokens / data["train_batch_size"], 1),
            "mfu": peak and 6 * parameters * figures["tokens_per_second"] / peak}


def speed(seconds: list[float], tokens: float, positions: int, gpus: int) -> dict[str, Any]:
    """What both stages have: steps of so many tokens, and positions with padding."""
    mean = fmean(seconds)
    return {"seconds_per_step": round(mean, 3), "seconds_of_each_step": [round(value, 3) for value in seconds],
            "tokens_per_step": round(tokens, 1), "tokens_per_second": round(tokens / mean / gpus, 1),
            "padded_tokens_per_second": round(positions / mean / gpus, 1)}


def header(settings: Settings, env: Mapping[str, str], gpus: list[hardware.Gpu]) -> dict[str, Any]:
    """Where and with what is measured; no names of hosts or people."""
    machine = record.machine(env)
    return {
        "gpu": gpus[0].name if gpus else None, "gpus": settings.gpus,
        "machine": {"gpu_memory_gib": round(gpus[0].memory / 2**30, 1) if gpus else None,
                    **{fact: machine[fact] for fact in ("driver", "cpus", "memory_gib", "kernel")}},
        "image": machine["image"] and Path(machine["image"]).name,
        **{fact: machine[fact] for fact in ("git_commit", "lock_sha256")},
        "model": {"name": settings.model_dir.name, "parameters": model_folder.parameter_count(settings.model_dir)},
        "data": {part: record.sha256(settings.data_dir / f"{part}.parquet") for part in ("train", "test")},
        "method": CASES["method"],
    }


def earlier(file: Path, head: dict[str, Any]) -> dict[str, Any]:
    """The results of bench.json if machine, code, model and data were the same; others are kept beside it."""
    if file.is_file():
        with suppress(ValueError, AttributeError):
            if (before := read_json(file)) and before.items() >= head.items():
                return before
        aside = file.rename(file.with_suffix(f".till-{datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d-%H%M%S.%f}.json"))
        say(f"{file} is of another machine, commit, model or data: moved to {aside.name}")
    return {**head, "sft": {}, "ppo": {}, "ratios": {}}


def ratios(results: Mapping[str, Any]) -> dict[str, float]:
    """Tokens a second of each case over those of the case that it is compared with."""
    found = by_name(results)
    rates = {name: case["tokens_per_second"] for name, case in found.items() if case["status"] == "measured"}
    return {name: round(rates[name] / rates[found[name]["against"]], 2) for name in rates if found[name]["against"] in rates}


def by_name(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{stage}-{label}": case for stage in ("sft", "ppo") for label, case in results[stage].items()}
