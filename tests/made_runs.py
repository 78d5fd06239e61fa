"""Folders of runs as the stages leave them, of any size: what the tests of the report look at.

Their records and their lines of metrics are real ones (tests/unit/captured), with numbers that go on from step to step.
"""

import copy
import json
import random
from datetime import UTC, datetime
from pathlib import Path

from bridge.runs import metrics, record
from door import ROOT

CAPTURED = ROOT / "tests/unit/captured"
BEGIN = 1764500000
QUESTIONS = ("Anna has {n} apples and gets {m} more. How many apples does Anna have now?",
             "Ken reads {m} pages a day of a book of {n} pages. How many pages are left after 2 days?")


def captured(stage: str) -> tuple[dict, dict]:
    """A record of a stage, and the metrics of one of its steps."""
    row = next(found for line in (CAPTURED / f"{stage}.log").read_text().splitlines() if (found := metrics.parse(line)))
    return json.loads((CAPTURED / f"begun_{stage}.json").read_text()), row[1]


def training(folder: Path, stage: str, steps: int, seed: int | None = None, slower: float = 0, config: dict | None = None,
             **changes) -> None:
    """What a training leaves. slower: seconds that generating takes longer; config: settings by their dotted names."""
    recorded, first = captured(stage)
    chance, name = random.Random(f"{seed} {stage}"), folder.name
    recorded = json.loads(json.dumps(recorded).replace("/runs/default/", f"/runs/{name}/"))
    seeds = {} if seed is None else {"data.seed" if stage == "ppo" else "trainer.seed": seed}
    for key, value in {**(config or {}), **seeds}.items():
        *above, last = key.split(".")
        inner = recorded["config"]
        for part in above:
            inner = inner[part]
        inner[last] = value
    if seed is not None:
        recorded["inputs"]["seed"] = seed
    rows, time = [], BEGIN + 60
    for step in range(1, steps + 1):
        row = {key: value * chance.uniform(0.8, 1.2) for key, value in first.items()}
        if stage == "ppo":
            row |= {"timing_s/gen": row["timing_s/gen"] + slower, "timing_s/step": row["timing_s/step"] + slower,
                    "critic/score/mean": min(1, 0.1 + 0.5 * step / steps + chance.uniform(-0.1, 0.1))}
            row |= {"val-core/openai/gsm8k/reward/mean@1": 0.3 * step / steps, "timing_s/testing": 9.0} if step % 5 == 0 else {}
        time += row.get("timing_s/step", chance.uniform(1, 2))
        rows.append({"step": step, "time": round(time, 3), **row})
    attempt = recorded["attempts"][0]
    attempt |= {"started": stamp(BEGIN), "ended": stamp(time + 5), "exit_status": 0, "image": "/sif/bridge.sif",
                "gpus": ["NVIDIA H200"] * 2}
    recorded |= {"status": "finished", "last_step": steps, **changes}
    recorded["config"]["trainer"]["device"] = "cuda"
    write(folder / stage, recorded, rows)


def write(folder: Path, recorded: dict, rows: list[dict]) -> None:
    """A record and metrics."""
    folder.mkdir(parents=True)
    record.write_json(folder / "run.json", recorded, [])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def stamp(time: float) -> str:
    """A time as run.json has it."""
    return datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds")


def evaluation(folder: Path, scores: dict[str, list[float]], length: int = 0, text: str = "") -> None:
    """What an evaluation leaves: each model's scores, a number a problem; answers have about `length` characters, and `text`."""
    answers, chance = [], random.Random(0)
    # Each answer has its own piece of it.
    words = " ".join(chance.choices(("so", "then", "apples", "計算", "we add", "is", "12"), k=length))
    for model, its in scores.items():
        for index, score in enumerate(its):
            number, more = index + 3, index % 7 + 2
            truth, prompt = str(number + more), QUESTIONS[0].format(n=number, m=more)
            said = truth if score else str(number - more)
            begin = chance.randrange(2 * length + 1)
            filler = words[begin:begin + length]
            answers.append({
                "model": model, "index": index, "prompt": f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
                "response": f"{number}+{more}={said}. {filler}{text}\n#### {said}", "score": float(score), "extracted": said,
                "last_number": said, "last_number_score": float(score), "ground_truth": truth, "response_tokens": 20,
                "cut_off": False})
    recorded = copy.deepcopy(captured("sft")[0])
    recorded["attempts"][0] |= {"started": stamp(BEGIN), "ended": stamp(BEGIN + 60)}
    write(folder / "eval", {**recorded, "status": "finished", "config": {"rows": len(its)}, "inputs": {}}, [])
    (folder / "eval" / "metrics.jsonl").unlink()
    models = {model: {"rows": len(its), "accuracy": sum(its) / len(its), "accuracy_interval": [0.1, 0.4]}
              for model, its in scores.items()}
    (folder / "eval" / "eval.json").write_text(json.dumps({"models": models}))
    (folder / "eval" / "answers.jsonl").write_text("".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))


def samples(folder: Path, steps: list[int], problems: int = 3, length: int = 20) -> None:
    """What PPO's validations keep: the same problems at each of these steps."""
    (folder / "ppo" / "samples").mkdir()
    for step in steps:
        rows = [{"input": f"user\n{QUESTIONS[1].format(n=100 + number, m=number)}\nassistant\n", "output": f"{step} " * length,
                 "score": float(step > number), "step": step} for number in range(problems)]
        (folder / "ppo" / "samples" / f"{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores(chance: random.Random, count: int, share: float) -> list[float]:
    """So many scores, of which about that share is right."""
    return [float(chance.random() < share) for _ in range(count)]


def full(work_dir: Path, names: dict[str, int], steps: int, problems: int, length: int = 0) -> None:
    """Runs with all there is to a run: {name: seed}; the last one is of another learning rate and slower."""
    for place, (name, seed) in enumerate(names.items()):
        folder, chance = work_dir / "runs" / name, random.Random(seed)
        odd = place == len(names) - 1
        training(folder, "sft", steps, seed)
        training(folder, "ppo", steps, seed, slower=2.5 * odd, config={"actor_rollout_ref.actor.optim.lr": 2e-6} if odd else None)
        samples(folder, [*range(0, steps + 1, max(1, steps // 8))], length=max(20, length // 4))
        shares = {"base": 0.1, "sft": 0.3, "ppo": 0.5}
        evaluation(folder, {model: scores(chance, problems, share) for model, share in shares.items()}, length)


# What no text of a run may do to a page, and what is no text in UTF-8.
NASTY = "</script><script>document.title='out'</script><!--<script><b>bold</b> \u2028 \ud800 & \x00 {{ 7*7 }} {% if %} 計算"


def nasty(folder: Path) -> None:
    """An evaluation whose answers are such texts, also as another program may have written them."""
    evaluation(folder, {"base": [0, 1], "ppo": [1, 1]}, text=NASTY.replace("\ud800", ""))
    answers = folder / "eval" / "answers.jsonl"
    rows = [{**json.loads(line), "extracted": NASTY} for line in answers.read_text().split("\n") if line]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))


def odd(work_dir: Path) -> None:
    """Runs that lack parts: killed and never evaluated; evaluated alone; of an older version before its first step; no record."""
    runs = work_dir / "runs"
    training(runs / "killed", "ppo", 3, status="running")
    killed = runs / "killed/ppo/run.json"
    recorded = json.loads(killed.read_text())
    del recorded["attempts"][0]["ended"]
    killed.write_text(json.dumps(recorded))
    evaluation(runs / "asked", {"base": [0, 1]})
    (runs / "old/sft").mkdir(parents=True)
    (runs / "old/sft/run.json").write_text(json.dumps(captured("sft")[0]))
    (runs / "bare/sft").mkdir(parents=True)
    (runs / "bare/sft/metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2, "trai')
