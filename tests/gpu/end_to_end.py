"""Where the time of whole PPO runs went: start, steps, saves, validations, end. Prints JSON.

    .venv/bin/python tests/gpu/end_to_end.py WORK_DIR/runs/RUN/ppo ... > end_to_end.json

The last attempt of each run, from its run.json and metrics.jsonl: verl's timing_s/* of each step, and the times at which a step
was seen. `start` ends where the first step begins. `end` is what comes after the last step's line: the last save is written, and
what was started is ended.
"""

import json
import statistics
import sys
from datetime import datetime
from pathlib import Path

from bridge.runs import metrics, record


def end_to_end(folder: Path) -> dict:
    """The parts of one run, in seconds; a run that was continued has those since then."""
    recorded = record.read(folder)
    attempt = recorded["attempts"][-1]
    started, ended = (datetime.fromisoformat(attempt[name]).timestamp() for name in ("started", "ended"))
    rows = [row for row in metrics.read(folder / "metrics.jsonl") if row["step"] > attempt["from_step"]]
    saves, validations = ([row[key] for row in rows if key in row] for key in ("timing_s/save_checkpoint", "timing_s/testing"))
    whole = [row["timing_s/step"] for row in rows]
    alone = [row["timing_s/step"] - row.get("timing_s/save_checkpoint", 0) - row.get("timing_s/testing", 0) for row in rows]
    parts = {"start": rows[0]["time"] - whole[0] - started, "steps": sum(alone), "saves": sum(saves),
             "validations": sum(validations), "end": ended - rows[-1]["time"]}
    parts["between"] = ended - started - sum(parts.values())
    return {
        "gpus": attempt["gpus"][:recorded["config"]["trainer"]["n_gpus_per_node"]], "cpus": attempt["cpus"],
        "git_commit": attempt["git_commit"], "steps": len(rows), "saves": len(saves), "validations": len(validations),
        "seconds": {"whole": round(ended - started, 1), **{name: round(value, 1) for name, value in parts.items()}},
        "each": {name: {"median": round(statistics.median(values), 2), "first": round(values[0], 2),
                        "longest": round(max(values), 2)}
                 for name, values in (("step", alone), ("save", saves), ("validation", validations)) if values},
        "overrides": attempt["command"][attempt["command"].index("verl.trainer.main_ppo") + 1:],
    }


if __name__ == "__main__":
    print(json.dumps({Path(name).resolve().parent.name: end_to_end(Path(name)) for name in sys.argv[1:]}, indent=1))
