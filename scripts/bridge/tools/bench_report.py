"""A bench.json as people read it: Markdown tables."""

from collections.abc import Iterator, Mapping
from typing import Any

# Phases of a PPO step in their order. What is left of the step is "other".
PHASES = ("gen", "old_log_prob", "values", "update_critic", "update_actor", "other")


def cases(results: Mapping[str, Any], stage: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The measured cases of a stage."""
    return ((f"{stage}-{label}", case) for label, case in results[stage].items() if case["status"] == "measured")


def phases(case: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each phase of PHASES in one step."""
    found = {name: case["phases"][name] for name in PHASES if name != "other"}
    return {**found, "other": max(0.0, case["phases"]["step"] - sum(found.values()))}


def number(value: float | None, digits: int = 0) -> str:
    """A number as the tables have it; a dash for what was not measured."""
    return "-" if value is None else f"{value:,.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table: the first column is text, the others are numbers."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def markdown(results: Mapping[str, Any]) -> str:
    """The results as tables."""
    machine, ratios, trained = results["machine"], results["ratios"], results["model"]
    lines = [f"{results['gpus']} x {results['gpu'] or 'CPU rank'}, driver {machine['driver'] or '-'}, {machine['cpus']} cores, "
             f"{trained['name']} ({trained['parameters'] / 1e9:.4g} B parameters), image {results['image'] or '-'}, "
             f"commit {results['git_commit'] or '-'}.", ""]
    rows = [[name, number(case["seconds_per_step"], 2), number(case["tokens_per_second"]),
             number(case["padded_tokens_per_second"]), number(ratios.get(name), 2),
             number(case["mfu"] if stage == "sft" else case["mfu_actor"], 2), number(case.get("mfu_critic"), 2),
             number(case["peak_memory_gib"], 1), number(case["start_seconds"]), number(case["first_step_seconds"], 1)]
            for stage in ("sft", "ppo") for name, case in cases(results, stage)]
    lines += table(["case", "s a step", "tokens/s/GPU", "with padding", "ratio", "MFU (actor)", "MFU critic", "peak GiB",
                    "start s", "first step s"], rows)
    rows = [[name, *(number(seconds, 2) for seconds in phases(case).values()), number(case["phases"]["step"], 2),
             number(case["answer_tokens"])] for name, case in cases(results, "ppo")]
    if rows:
        lines += ["", *table(["PPO, seconds", *PHASES, "step", "answer tokens"], rows)]
    failed = [f"{stage}-{label} failed after {case['steps_made']} steps (exit status {case['exit_status']}): {case['log'][-1]}"
              for stage in ("sft", "ppo") for label, case in results[stage].items() if case["status"] == "failed"]
    return "\n".join([*lines, *([""] + failed if failed else [])]) + "\n"
