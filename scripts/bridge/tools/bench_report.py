"""A bench.json as people read it: Markdown tables, and a chart (SVG) of what a PPO step is spent on."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

# Phases of a PPO step in their order -> colour. What is left of the step is "other".
PHASES = {"gen": "#4e79a7", "old_log_prob": "#59a14f", "values": "#76b7b2", "update_critic": "#f28e2b", "update_actor": "#e15759",
          "other": "#bab0ac"}
WIDTH, LABEL, BAR, GAP = 900, 190, 26, 12


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


def chart(results: Mapping[str, Any]) -> str:
    """An SVG: one bar a PPO case, as long as its step, in phases."""
    bars = [(name, phases(case)) for name, case in cases(results, "ppo")]
    longest = max((sum(parts.values()) for _, parts in bars), default=1.0)
    scale = (WIDTH - LABEL - 90) / longest
    height = 60 + len(bars) * (BAR + GAP)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">',
             f'<rect width="{WIDTH}" height="{height}" fill="white"/>']
    for index, (name, colour) in enumerate(PHASES.items()):
        x = LABEL + index * 112
        lines.append(f'<rect x="{x}" y="14" width="12" height="12" fill="{colour}"/><text x="{x + 17}" y="25">{name}</text>')
    for index, (name, parts) in enumerate(bars):
        y, x = 46 + index * (BAR + GAP), float(LABEL)
        lines.append(f'<text x="{LABEL - 10}" y="{y + 18}" text-anchor="end">{escape(name)}</text>')
        for phase, seconds in parts.items():
            width = seconds * scale
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{BAR}" fill="{PHASES[phase]}">'
                         f"<title>{escape(name)}: {phase} {seconds:.2f} s</title></rect>")
            x += width
        lines.append(f'<text x="{x + 8:.1f}" y="{y + 18}">{sum(parts.values()):.2f} s</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"
