"""bridge accept: the acceptance test of a node, meant to take ten minutes on 8 GPUs: make accept GPUS=8
With MODEL, else the tutorial's or a random one. PROFILE=tiny tries the test itself without a GPU. What fails is recorded, and
the rest goes on. Leaves a page (accept.txt) and accept.json in WORK_DIR/accept, to be sent: names of host and user, addresses
and secrets are masked."""

import json
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from bridge import hardware, model_folder
from bridge import settings as settings_module
from bridge.errors import UsageError, say
from bridge.pages import page
from bridge.runs import checkpoints, failure, launch, metrics, record
from bridge.settings import Settings
from bridge.stages import data, sft
from bridge.tools import trial

# Training steps: after two a checkpoint is saved and the run is stopped (one more may pass meanwhile), then it is continued.
STEPS, SAVED = 4, 2
SAVING = [f"trainer.total_training_steps={STEPS}", f"trainer.save_freq={SAVED}", "trainer.test_freq=-1"]
NOT_SAVING = [f"trainer.total_training_steps={SAVED}", "trainer.save_freq=-1", "trainer.test_freq=-1"]


class StepFailed(Exception):
    """A step of the test that did not do what it should; says what was seen instead."""


class Acceptance:
    """The steps of the test on one node, and what came out of each."""

    def __init__(self, settings: Settings, env: Mapping[str, str], keep: Callable[[list[dict[str, Any]]], None]):
        """`keep` is given all results after each step."""
        self.settings, self.env, self.keep = settings, env, keep
        self.folder, self.results, self.interrupted = settings.work_dir, [], 0

    def step(self, name: str, work: Callable[[Path], Any]) -> None:
        """Do one step with a log of its own; `work` returns what came out, or raises StepFailed."""
        if self.interrupted:
            return
        say(f"--- {name}")
        log = self.folder / f"{name.replace(' ', '-')}.log"
        log.unlink(missing_ok=True)
        started = time.monotonic()
        try:
            result = {"status": "ok", "seen": work(log)}
        except StepFailed as error:
            result = {"status": "FAIL", "seen": str(error), "log": failure.last_lines(log, 40)}
        self.results.append({"step": name, **result, "seconds": round(time.monotonic() - started, 1)})
        self.keep(self.results)

    def command(self, status: int) -> None:
        if status in trial.INTERRUPTED:
            self.interrupted = status
        if status:
            raise StepFailed(f"exit status {status}")

    def check(self, log: Path) -> str:
        """bridge check, whose own lines tell what is wrong."""
        status = trial.stage("check", self.env, log=log)
        seen = "; ".join(" ".join(line.split()) for line in failure.last_lines(log, 100) if line.startswith(("warn", "FAIL")))
        if status == 1 and seen:
            raise StepFailed(seen)
        self.command(status)
        return seen or "everything as it should be"

    def all_reduce(self, log: Path) -> list[dict[str, float]] | str:
        """Bandwidth between the ranks, a row for each size; one rank has none."""
        self.command(launch.run(sft.command(self.settings.gpus, ["bridge.tools.allreduce"], []),
                                {**self.env, "OMP_NUM_THREADS": "1"}, log, None, record.secret_values(self.env)))
        if self.settings.gpus == 1:
            return "ran; with one rank nothing is sent, so there is no bandwidth"
        return [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"megabytes"')]

    def train(self, stage: str, log: Path, arguments: list[str], to: int = STEPS, stop: bool = False, **env: str) -> str:
        """Run a training to a step; `stop`: end it before, once a checkpoint is whole. Says how long its steps took."""
        stage_dir = self.folder / "runs" / env.get("RUN", "default") / stage
        started = time.time()

        def saved() -> bool:
            # SFT writes the step's line before it saves, PPO after.
            return bool(any(found.complete for found in record.saved_checkpoints(stage_dir, stage))
                        and metrics.read(stage_dir / "metrics.jsonl"))

        self.command(trial.stage(stage, {**self.env, **env}, arguments, log, saved if stop else lambda: False))
        rows = metrics.read(stage_dir / "metrics.jsonl")
        steps = [row["step"] for row in rows]
        if steps != list(range(1, len(steps) + 1)) or (len(steps) == to) == stop:
            raise StepFailed(f"made the steps {steps} of {to}" + (", though it was to be stopped" if stop else ""))
        if not (new := [row for row in rows if row["time"] > started]):
            raise StepFailed("nothing was left to do")
        last, text = new[-1], f"step {new[0]['step']} after {new[0]['time'] - started:.0f} s"
        if stage == "ppo":
            text += f"; {ppo_step(last, self.settings.gpus)}"
        elif len(new) > 1:
            text += f"; step {last['step']} took {last['time'] - new[-2]['time']:.1f} s"
        return text + ("; saved and stopped" if stop else "")

    def resume(self, stage: str, log: Path) -> str:
        """Run the same command again: it has to go on from the checkpoint."""
        text = self.train(stage, log, SAVING)
        if not (found := re.search(r"continuing from .*\(step (\d+)\)", log.read_text(errors="replace"))):
            raise StepFailed("the run was not continued, but started anew")
        return f"continued from step {found[1]}; {text}"

    def merge(self, stage: str, log: Path) -> str:
        """Merge the newest checkpoint; the stage itself loads the result and lets it write."""
        self.command(trial.stage("merge", {**self.env, "STAGE": stage}, log=log))
        return f"{checkpoints.size(self.settings.merged_dir(stage)) / 1e6:,.3g} MB"

    def run(self) -> None:
        """All steps, in an order that shows the cause before its consequences."""
        self.step("check", self.check)
        self.step("all-reduce", self.all_reduce)
        for stage in ("sft", "ppo"):
            self.step(stage, partial(self.train, stage, arguments=SAVING, stop=True))
            self.step(f"{stage} resumed", partial(self.resume, stage))
            self.step(f"merge {stage}", partial(self.merge, stage))
        tp = widest_tp(self.settings.gpus, model_folder.attention_heads(self.settings.model_dir))
        # Without a GPU there is no vLLM: what generates there has the whole model on each rank, whatever TP= says.
        if tp > 1 and hardware.visible_gpus(self.env):
            self.step(f"ppo TP={tp}", partial(self.train, "ppo", arguments=NOT_SAVING, to=SAVED, RUN=f"tp{tp}", TP=str(tp)))


def ppo_step(row: Mapping[str, float], gpus: int) -> str:
    """How fast a step of PPO was, from its line of metrics; saving, which verl counts as part of the step, by itself."""
    saving = row.get("timing_s/save_checkpoint", 0.0)
    seconds = row["timing_s/step"] - saving
    return (f"step {row['step']} took {seconds:.1f} s (generation {row['timing_s/gen']:.1f}), "
            f"{row['perf/total_num_tokens'] / seconds / gpus:,.0f} tokens/s/GPU, actor's MFU {row['perf/mfu/actor']:.2f}"
            + (f"; saving took {saving:.1f} s" if saving >= 0.1 else ""))


def widest_tp(gpus: int, heads: int | None) -> int:
    """The most GPUs that can share one copy of the model: divides the GPUs and the attention heads (None: not known)."""
    return max(size for size in range(1, gpus + 1) if gpus % size == 0 and (heads or 1) % size == 0)


def run(settings: Settings, env: Mapping[str, str], arguments: list[str]) -> int:
    """Try the node; returns 1 if a step failed."""
    if arguments:
        raise UsageError(f"accept takes no arguments; got {' '.join(arguments)}. GPUS=, MODEL= and PROFILE= apply.")
    gpus = hardware.visible_gpus(env)
    if not gpus and settings.profile != "tiny":
        raise UsageError("no GPU visible, and accept is a test of GPUs. With Apptainer pass --nv; on Slurm ask for "
                         "--gpus-per-node; PROFILE=tiny tries the test itself, on the CPU.")
    fetched = gpus and (settings.model_dir / "run.json").is_file()
    name = settings.model if env.get("MODEL") or fetched else "random:llama-3.2-1b" if gpus else "tiny"
    settings = settings_module.read({**env, "MODEL": name})
    own, own_env = trial.inside(settings.work_dir / "accept", env, MODEL=name, GPUS=str(settings.gpus or len(gpus) or 2),
                                DATA_SOURCE="builtin", REWARD="")
    made = trial.made(own, *own.work_dir.glob("runs/tp[0-9]*"))
    log, file, sent_page = (own.work_dir / name for name in ("check.log", "accept.json", "accept.txt"))
    with trial.own_folder(own, env, made, new_model=not (settings.model_dir / "run.json").is_file()):
        if status := trial.inputs(settings, own, own_env, borrow_data=bool(gpus)):
            return status
        head, hidden = about(own, own_env, gpus), to_hide(settings, env)

        def keep(results: list[dict[str, Any]]) -> None:
            # After each step: a job that runs out of time leaves what it found so far.
            nccl = re.search(r"^\S+ +nccl of torch +([\d.]+)", log.read_text(errors="replace"), re.MULTILINE)
            report = record.masked({**head, "nccl": nccl and nccl[1], "steps": results}, hidden)
            record.write_json(file, report, record.secret_values(env))
            sent_page.write_text(page("accept.txt", report=report) + "\n")

        test = Acceptance(own, own_env, keep)
        test.run()
        print(sent_page.read_text())
        say(f"to send: {sent_page} and {file}")
        return test.interrupted or int(any(result["status"] == "FAIL" for result in test.results))


def about(settings: Settings, env: Mapping[str, str], gpus: list[hardware.Gpu]) -> dict[str, Any]:
    """The node, what runs on it, and with what."""
    machine = record.machine(env)
    return {
        "gpus": [f"{count} x {name}" for name, count in Counter(
            f"{gpu.name} ({gpu.memory / 2**30:.0f} GiB)" for gpu in gpus[:settings.gpus]).items()],
        "ranks": settings.gpus, "model": settings.model_dir.name, "profile": settings.profile,
        **{fact: machine[fact] for fact in ("driver", "kernel", "cpus", "memory_gib", "git_commit", "lock_sha256")},
        "infiniband": sorted(card.name for card in Path("/sys/class/infiniband").glob("*")),
        "image": machine["image"] and Path(machine["image"]).name,
        "made_up_data": data.recorded_source(settings.data_dir) == "builtin",
        # NCCL_VERSION only names what a base image once held: NCCL does not read it.
        "settings": {name: value for name, value in sorted(env.items())
                     if name.startswith(("NCCL_", "CUDA_VISIBLE")) and name != "NCCL_VERSION"},
    }


def to_hide(settings: Settings, env: Mapping[str, str]) -> dict[str, str]:
    """Patterns of what names the host, the person or the place, and of secrets -> the word to put there."""
    texts = {**{secret: "***" for secret in record.secret_values(env)}, f"{settings.work_dir}": "WORK_DIR", f"{Path.home()}": "~"}
    host = socket.gethostname()
    words = {host: "HOST", host.split(".")[0]: "HOST", env.get("USER") or Path.home().name: "USER"}
    # Names are hidden as words, since they may be short. A home folder "/" would hide every path's beginning.
    return {**{re.escape(text): word for text, word in texts.items() if text != "/"},
            **{rf"\b{re.escape(name)}\b": word for name, word in words.items() if name},
            r"\b(?!127\.)\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b": "ADDRESS"}
