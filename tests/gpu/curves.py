"""Draw the curves of runs over each other, one panel for each metric, coloured by profile. Needs .venv (matplotlib).

    WORK_DIR=/folder STAGE=ppo .venv/bin/python tests/gpu/curves.py RUN... --keys=critic/score/mean
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas

from bridge import settings as settings_module
from bridge.errors import UsageError, exit_status, nearest, refuse, say
from bridge.runs import metrics, record
from bridge.settings import is_local

# Drawn unless --keys names others.
KEYS = {"sft": "train/loss", "ppo": "critic/score/mean,response_length/mean,actor/entropy,critic/vf_loss"}
# Runs of one profile have its colour and differ in these.
STYLES = ("-", "--", ":", "-.")
# Fewer points than this are marked, because a line between them says little.
FEW = 30


def main() -> int:
    """Draw what the command line says. A UsageError names all that keeps it from being drawn."""
    settings = settings_module.read(os.environ)
    stage = settings.stage or "ppo"
    if stage not in KEYS:
        raise UsageError(f"STAGE={stage} has no curves. Use STAGE=sft or STAGE=ppo.")
    parser = argparse.ArgumentParser(prog="curves.py")
    parser.add_argument("runs", nargs="*", default=[settings.run], help="names, or folders (/..., ./...) like WORK_DIR/runs/RUN")
    parser.add_argument("--keys", default=KEYS[stage], help="metrics, with commas between")
    parser.add_argument("--mean", type=int, default=1, help="the mean over so many steps, with the values faintly behind")
    parser.add_argument("--output", type=Path, default=settings.work_dir / f"{stage}.svg", help="an .svg or a .png")
    given = parser.parse_args()
    problems = [f"--mean={given.mean}: use a whole number of at least 1."] if given.mean < 1 else []
    if given.output.suffix not in (".svg", ".png"):
        problems.append(f"--output={given.output}: the name has to end in .svg or .png.")
    if not given.output.parent.is_dir():
        problems.append(f"--output={given.output}: there is no folder {given.output.parent}. Make it, or write elsewhere.")
    curves, key = {}, f"profile/{stage}="
    for name in dict.fromkeys(given.runs):
        folder = (Path(name).expanduser() if is_local(name) else settings.work_dir / "runs" / name) / stage
        rows = metrics.read(folder / "metrics.jsonl")
        if not rows:
            problems.append(f"run {name!r} has no metrics in {folder / 'metrics.jsonl'}. STAGE=sft or STAGE=ppo says whose.")
        recorded = record.read(folder)
        words = recorded["attempts"][-1]["command"] if recorded else []
        label = f"{Path(name).name} ({next((word.split('=')[1] for word in words if word.startswith(key)), 'profile unknown')})"
        if label in curves:
            problems.append(f"two runs are called {label}. Draw one of them from a folder of another name.")
        curves[label] = pandas.DataFrame(rows, columns=None if rows else ["step"]).set_index("step")
    known = sorted(set().union(*curves.values()))
    keys = given.keys.split(",")
    problems += [f"no run has the metric {key!r}.{nearest(key, known)} There are: {', '.join(known)}."
                 for key in keys if known and key not in known]
    refuse(problems)
    for message in (f"warning: {name} has no {key}: its panel lacks a line"
                    for name, rows in curves.items() for key in keys if key not in rows):
        say(message)
    draw(curves, keys, given.mean, given.output)
    print(given.output)
    return 0


def moving_mean(values: Sequence[float], count: int) -> pandas.Series:
    """The mean of `count` values around each; of fewer at both ends."""
    return pandas.Series(values).rolling(count, center=True, min_periods=1).mean()


def draw(curves: Mapping[str, pandas.DataFrame], keys: list[str], mean: int, output: Path) -> None:
    """Write the figure: curves are {"run (profile)": metrics by step}, mean is the number of steps in a mean."""
    import matplotlib
    from matplotlib.figure import Figure

    profiles = [name.rpartition(" (")[2] for name in curves]
    looks = [{"color": f"C{[*dict.fromkeys(profiles)].index(profile)}", "linewidth": 1.2,
              "linestyle": STYLES[profiles[:place].count(profile) % len(STYLES)]} for place, profile in enumerate(profiles)]
    # Text as text (also with a $ in it), and the same file from the same numbers.
    with matplotlib.rc_context({"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "bridge", "font.size": 9}):
        columns, lines = min(2, len(keys)), (len(keys) + 1) // 2
        figure = Figure(figsize=(5.5 * columns, 3.2 * lines), layout="constrained")
        for place, key in enumerate(keys, 1):
            panel = figure.add_subplot(lines, columns, place)
            for (name, rows), look in zip(curves.items(), looks, strict=True):
                values = rows.get(key, pandas.Series(dtype=float)).dropna()
                marker = "." if len(values) < FEW else None
                if mean > 1:
                    panel.plot(values, marker=marker, alpha=0.25, **look)
                panel.plot(moving_mean(values, mean), marker=marker, label=name, **look)
            panel.set(title=key + (f" (mean of {mean} steps)" if mean > 1 else ""), xlabel="step")
            panel.grid(alpha=0.3)
        figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(curves), 3 * columns))
        figure.savefig(output, metadata={"Date": None} if output.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    sys.exit(exit_status(main))
