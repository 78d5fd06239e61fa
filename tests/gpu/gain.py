"""[image] Does PPO add to the SFT that it starts from? SmolLM2-135M on GSM8K, three seeds, one GPU, one command.

    DATA_SOURCE=/folder WORK_DIR=/folder MINUTES=20 tests/gpu/learning.sh gain

It chooses by itself, on training problems that are held out of all training, and asks the test problems once:

1. SFT, merged. The held-out problems are a thousand of the training set's.
2. The SFT model tries each training problem a few times. Those that it solved at least once can teach it something: they
   are what most settings of PPO train on. The critic's new head starts at zero. With verl's random one its error was ten
   times the reward's variance for a dozen steps, and the advantages were made of it.
3. CANDIDATES, side by side, seed 1. The best on the held-out problems goes on, the others end.
4. Seeds 2 and 3 of the best, then GRPO on the same problems with the same learning rate and temperature, as time allows.
5. Each algorithm's step is the one with the best mean of its seeds on the held-out problems. These models and the SFT's
   answer all test problems greedily, by the code of `bridge eval`. A sign-flip permutation test over the problems compares
   the mean of the seeds with the SFT.

WORK_DIR/gain/gain.json has all of it, and is written anew with each thing that happens; beside it lie metrics, answers and
the ends of the logs, a few MB. MINUTES is when all of it has to be over: trainings are ended so that what they have saved
is still merged and asked. A seed that fails is replaced by another one.

Without a GPU (PROFILE=tiny MODEL=tiny) it goes the same way in small: a random model learns nothing there.
"""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pyarrow import parquet

from bridge import compose, hardware, settings
from bridge.environment import clean_environment
from bridge.errors import UsageError, exit_status, say, write_whole
from bridge.runs import checkpoints, metrics
from bridge.stages import eval as evaluation
from bridge.stages import train

ACCURACY = "val-core/openai/gsm8k/reward/mean@1"
# Kept of each step's metrics.
KEPT = ("step", "time", ACCURACY, "critic/score/mean", "response_length/mean", "response_length/clip_ratio", "actor/entropy",
        "actor/ppo_kl", "actor/pg_clipfrac", "actor/grad_norm", "actor/kl_loss", "critic/vf_loss", "critic/vf_explained_var",
        "critic/grad_norm", "critic/values/mean", "timing_s/step", "timing_s/gen", "timing_s/testing",
        "perf/max_memory_reserved_gb")
SEEDS = (1, 2, 3)
DRAWS = 100_000
# Seconds that are kept: to merge and ask the models after the last training; for GRPO, once PPO has come halfway.
AFTER, GRPO = 120, 300
# Seconds of training (and of its start) below which none is begun.
LEAST = 130
# Bytes of a log that are kept.
LOG_END = 60_000
# Share of the GPU's memory for each vLLM that asks a model (its cache has shared_gpu's size).
SHARE = 0.1


class Setting(NamedTuple):
    """What the candidates differ in."""

    problems: str
    temperature: float
    rate: float

    def __str__(self) -> str:
        return f"{self.problems}-t{self.temperature:g}-{self.rate:.0e}"


# The first is the one that is believed in.
CANDIDATES = (Setting("solved", 1.0, 3e-5), Setting("all", 1.0, 3e-5), Setting("solved", 0.7, 3e-5), Setting("solved", 1.0, 1e-5))


class Size(NamedTuple):
    """Numbers for a GPU, and for trying it on CPU."""

    held_out: int
    # Of SFT.
    sft: tuple[str, ...]
    # How many of CANDIDATES.
    candidates: int
    # Times that the SFT model tries each training problem, by so many processes.
    tries: int
    askers: int
    # Answers a step, answers of a mini batch, GRPO's answers to a prompt.
    batch: int
    mini: int
    answers: int
    # Steps between validations (and saves), of the decision between the candidates, in all.
    every: int
    decide: int
    steps: int
    # Trainings side by side after the decision.
    side_by_side: int
    overrides: tuple[str, ...]


SIZES = {
    "gpu": Size(
        held_out=1000, candidates=4, sft=("trainer.total_epochs=5", "optim.lr=3e-4"), tries=4, askers=4, batch=512, mini=128,
        answers=8, every=8, decide=16, steps=64, side_by_side=3, overrides=(
            # Four trainings have to fit beside each other.
            "memory/ppo=80gb",
            *(f"{key}=16384" for key in ("actor_rollout_ref.actor.ppo_max_token_len_per_gpu",
                                         "critic.ppo_max_token_len_per_gpu")),
            *(f"{key}=24576" for key in ("actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu",
                                         "critic.forward_max_token_len_per_gpu")),
            # Larger batches than the profile's get CUDA graphs, too.
            "actor_rollout_ref.rollout.engine_kwargs.vllm.compilation_config.cudagraph_capture_sizes="
            "[8,32,64,128,192,256,384,512]",
            "actor_rollout_ref.rollout.max_num_seqs=512",
            # Ray starts a process for each before it is asked.
            "ray_init.num_cpus=4")),
    "cpu": Size(
        held_out=24, candidates=2, sft=("trainer.save_freq=-1", "trainer.total_training_steps=4"), tries=1, askers=1, batch=8,
        mini=4, answers=2, every=1, decide=1, steps=2, side_by_side=1, overrides=("ray_init.num_cpus=4",)),
}


# ---- the test

def permutation_test(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], draws: int = DRAWS,
                     seed: int = 0) -> dict[str, Any]:
    """Whether the models `after` are right more often than those `before`: each is a row of scores (0 or 1) by problem.

    Of each problem the difference of the two means. If training had changed nothing, it could as well have the other sign:
    p is the share of random signs whose sum is at least as far from 0, in either direction.
    """
    first, last = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if first.shape[1:] != last.shape[1:]:
        raise ValueError(f"answers to {first.shape[1]} and to {last.shape[1]} problems cannot be compared")
    # Whole numbers: sums that are equal are equal.
    differences = np.rint(last.sum(0) * len(first) - first.sum(0) * len(last)).astype(np.int64)
    scale, moved = len(first) * len(last), differences[differences != 0]
    rng, as_far, done = np.random.default_rng(seed), 0, 0
    while done < draws:
        count = min(2000, draws - done)
        signs = 2 * rng.integers(0, 2, (count, len(moved)), dtype=np.int8) - 1
        as_far += int((np.abs(signs @ moved) >= abs(differences.sum())).sum())
        done += count
    return {"before": first.mean(1).tolist(), "after": last.mean(1).tolist(),
            "gain": float(differences.sum() / scale / differences.size), "problems": int(differences.size),
            "problems_that_differ": int(moved.size), "p": (as_far + 1) / (draws + 1), "draws": draws, "sides": 2}


# ---- asking a model (a process of its own, several on one GPU)

def generator(temperature: float) -> Callable:
    """What answers as evaluation.GENERATORS do, sharing the GPU. Without a GPU it is greedy always."""
    if not hardware.visible_gpus(os.environ):
        return evaluation.generate_with_transformers
    import shared_gpu  # noqa: F401 - importing it applies it

    evaluation.GPU_MEMORY = SHARE
    if not temperature:
        return evaluation.answers_of_vllm

    def sampled(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[evaluation.Answer]:
        from vllm import LLM, SamplingParams

        evaluation.loopback.close()
        llm = LLM(model=str(folder), dtype="bfloat16", max_model_len=max(map(len, prompts)) + max_tokens, enforce_eager=True,
                  gpu_memory_utilization=SHARE, max_num_seqs=evaluation.SEQUENCES, seed=0)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts],
                               SamplingParams(temperature=temperature, max_tokens=max_tokens, detokenize=False))
        return [evaluation.Answer(list(output.outputs[0].token_ids), output.outputs[0].finish_reason == "length")
                for output in outputs]

    return sampled


def ask(folder: str, data: str, output: str, temperature: str) -> None:
    """`gain.py ask MODEL DATA OUTPUT TEMPERATURE`: the scores of a model's answers to all rows of a file, and greedy answers."""
    answers = evaluation.evaluate(Path(output).name, Path(folder), Path(data), parquet.read_metadata(data).num_rows, limits(),
                                  generator(float(temperature)))
    # Of the tries only the scores count.
    if not float(temperature):
        with gzip.open(f"{output}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
    write_whole(Path(f"{output}.json"), json.dumps({**evaluation.summary(answers), "scores": [row["score"] for row in answers]}))


def limits() -> dict[str, Any]:
    """What PPO's configuration says of lengths, as `bridge eval` takes it."""
    data = compose.compose("ppo", [f"profile/ppo={os.environ.get('PROFILE') or 'tuned'}"], train.NAMES)["data"]
    return {key: data[key] for key in ("max_prompt_length", "max_response_length", "truncation")}


# ---- the campaign

class Job:
    """A command of the campaign: its output goes to a log."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str], log: Path):
        self.name, self.log, self.began, self.ended = name, log, time.monotonic(), False
        with open(log, "ab") as output:
            self.process = subprocess.Popen(command, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=output,
                                            stderr=subprocess.STDOUT)

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """Ask it to end. The bridge program takes its children with it."""
        self.ended = True
        if self.running:
            self.process.terminate()

    def kill(self) -> None:
        """Wait a while for one that was asked to end, and kill it then."""
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Campaign:
    """All of it, with what is known so far in gain.json."""

    def __init__(self, minutes: float):
        self.began = time.monotonic()
        self.until = self.began + 60 * minutes
        self.work = Path(os.environ["WORK_DIR"]).absolute()
        self.folder, self.logs, self.large = self.work / "gain", self.work / "gain" / "logs", self.work / "gain-data"
        if (self.folder / "gain.json").exists():
            raise UsageError(f"{self.folder / 'gain.json'} is there already, and the test problems are asked once. Move "
                             "the folder away, or use another WORK_DIR=.")
        for folder in (self.logs, self.large):
            folder.mkdir(parents=True, exist_ok=True)
        gpus = hardware.visible_gpus(os.environ)
        self.size = SIZES["gpu" if gpus else "cpu"]
        self.jobs: list[Job] = []
        self.runs: dict[str, tuple[Job, Setting, str]] = {}
        self.known: dict[str, Any] = {
            "minutes": minutes, "gpu": gpus[0].name if gpus else None, "model": os.environ.get("MODEL"),
            "profile": os.environ.get("PROFILE"), "size": self.size._asdict(), "seconds": {}, "events": [], "runs": {},
            "asked": {},
        }

    def note(self, event: str = "", **known: Any) -> None:
        """Say and keep what happened."""
        seconds = round(time.monotonic() - self.began)
        if event:
            say(f"{seconds} s: {event}")
            self.known["events"].append([seconds, event])
        self.known |= {**known, "gpu_minutes": round(seconds / 60, 1)}
        write_whole(self.folder / "gain.json", json.dumps(self.known, indent=1))

    def left(self) -> float:
        """Seconds till all has to be over."""
        return self.until - time.monotonic()

    # -- jobs

    def start(self, name: str, command: Sequence[str], **env: str) -> Job:
        """Start a command; see Job."""
        job = Job(name, command, env, self.logs / f"{name}.log")
        self.jobs.append(job)
        return job

    def stage(self, run: str, stage: str, *overrides: str, **env: str) -> Job:
        """Start a stage of the bridge program."""
        return self.start(f"{run}-{stage}{env.get('STAGE', '')}", ["bridge", stage, *overrides], RUN=run, **env)

    def wait(self, jobs: Iterable[Job], needed: bool = True, seconds: float | None = None) -> list[Job]:
        """Wait for jobs, at most so long, and return those that went well. needed: a failure ends the campaign."""
        jobs = list(jobs)
        # The last ones may be a little late.
        by = time.monotonic() + (max(60, self.left()) if seconds is None else seconds)
        while any(job.running for job in jobs):
            time.sleep(0.2)
            if time.monotonic() > by:
                for job in jobs:
                    job.end()
                    job.kill()
        for job in jobs:
            seconds = round(time.monotonic() - job.began)
            self.known["seconds"][job.name] = seconds
            self.note(f"{job.name}: exit status {job.process.returncode} after {seconds} s at most")
        failed = [job for job in jobs if job.process.returncode]
        if failed and needed:
            raise UsageError(*(f"{job.name} failed; its log is {job.log}." for job in failed))
        return [job for job in jobs if job not in failed]

    def close(self) -> None:
        """End what still runs, and keep what is small."""
        running = [job for job in self.jobs if job.running]
        for job in running:
            job.end()
        for job in running:
            job.kill()
        for name in self.runs:
            self.keep(name)
        for log in [*self.logs.glob("*.log"), *self.work.glob("runs/gain*/*/log.txt")]:
            end = log.read_bytes()[-LOG_END:]
            kept = self.logs / (log.name if log.parent == self.logs else f"{log.parents[1].name}-{log.parent.name}.txt")
            kept.write_bytes(end)

    # -- files

    def data(self) -> dict[str, Path]:
        """The files of problems: kept ones to train on, held-out ones, the test's."""
        made = self.work / "data" / "gsm8k"
        files = {name: self.large / f"{name}.parquet" for name in ("all", "held_out", "solved")}
        files["test"] = made / "test.parquet"
        if not files["all"].exists():
            rows = parquet.read_table(made / "train.parquet")
            order = np.random.default_rng(0).permutation(len(rows))
            parquet.write_table(rows.take(order[:self.size.held_out]), files["held_out"])
            parquet.write_table(rows.take(np.sort(order[self.size.held_out:])), files["all"])
            self.note(problems={"train": len(rows) - self.size.held_out, "held_out": self.size.held_out})
        return files

    def make_critic(self, weights: Path) -> Path:
        """The SFT model with a value head of zeros."""
        import torch
        from transformers import AutoModelForTokenClassification, AutoTokenizer

        critic = AutoModelForTokenClassification.from_pretrained(weights, num_labels=1)
        with torch.no_grad():
            for parameter in critic.score.parameters():
                parameter.zero_()
        folder = self.large / "critic"
        critic.save_pretrained(folder)
        AutoTokenizer.from_pretrained(weights).save_pretrained(folder)
        return folder

    def ask(self, name: str, folder: Path, data: Path, temperature: float = 0) -> Job:
        """Start to ask a model."""
        env = clean_environment(settings.read(os.environ), os.environ)
        return self.start(f"ask-{name}", [sys.executable, __file__, "ask", str(folder), str(data), str(self.folder / name),
                                          str(temperature)],
                          **{**env, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"})

    def answered(self, name: str) -> dict[str, Any]:
        """What came of it."""
        return json.loads((self.folder / f"{name}.json").read_text())

    def try_problems(self, weights: Path, files: dict[str, Path]) -> list[Job]:
        """Start to let the SFT model try each training problem some times: the parts are interleaved."""
        rows, jobs = parquet.read_table(files["all"]), []
        for part in range(self.size.askers):
            mine = np.arange(part, len(rows), self.size.askers).repeat(self.size.tries)
            parquet.write_table(rows.take(mine), file := self.large / f"tries-{part}.parquet")
            jobs.append(self.ask(f"tries-{part}", weights, file, 0.8))
        return jobs

    def choose_problems(self, files: dict[str, Path], tried: bool) -> None:
        """Write the problems that were solved at least once, filled up with others to four batches."""
        rows = parquet.read_table(files["all"])
        right = np.zeros(len(rows))
        for part in range(self.size.askers if tried else 0):
            scores = np.array(self.answered(f"tries-{part}")["scores"]).reshape(-1, self.size.tries)
            right[part::self.size.askers] = scores.sum(1)
        others = np.random.default_rng(1).permutation(np.flatnonzero(right == 0))
        solved = np.flatnonzero(right)
        chosen = np.sort(np.concatenate([solved, others[:max(0, 4 * self.size.batch - len(solved))]]))
        parquet.write_table(rows.take(chosen), files["solved"])
        self.note(f"{len(solved)} of {len(rows)} training problems were solved in {self.size.tries} tries",
                  tries={"each": self.size.tries, "temperature": 0.8, "right": float(right.sum()) / len(rows) / self.size.tries,
                         "solved": len(solved), "solved_always": int((right == self.size.tries).sum()), "chosen": len(chosen)})

    # -- trainings

    def train(self, name: str, algo: str, seed: int, setting: Setting, critic: Path, files: dict[str, Path]) -> None:
        """Start a training from the SFT model."""
        size, times = self.size, self.size.answers if algo == "grpo" else 1
        overrides = [
            *size.overrides, f"data.train_files={files[setting.problems]}", f"data.val_files={files['held_out']}",
            f"data.train_batch_size={size.batch // times}",
            f"actor_rollout_ref.actor.ppo_mini_batch_size={size.mini // times}",
            f"critic.ppo_mini_batch_size={size.mini // times}",
            f"actor_rollout_ref.actor.optim.lr={setting.rate}", f"actor_rollout_ref.rollout.temperature={setting.temperature}",
            "actor_rollout_ref.actor.checkpoint.save_contents=[model]", "critic.checkpoint.save_contents=[model]",
            "trainer.total_epochs=1000", f"trainer.total_training_steps={size.steps}", f"trainer.save_freq={size.every}",
            f"trainer.test_freq={size.every}", "trainer.val_before_train=True", "trainer.logger=[console]"]
        if algo == "grpo":
            overrides += [f"actor_rollout_ref.rollout.n={size.answers}", "actor_rollout_ref.model.external_lib=shared_tuned"]
        else:
            overrides += [f"critic.model.path={critic}", "critic.optim.lr=2e-5", "trainer.critic_warmup=2",
                          "actor_rollout_ref.model.external_lib=shared_gpu"]
            if self.known["gpu"]:
                # It is loaded first, in the same process.
                overrides.append("critic.model.external_lib=bridge.trainers.speedups")
        weights = self.work / "runs" / "gain" / "sft" / "merged"
        self.runs[name] = (self.stage(name, "ppo", *overrides, MODEL=str(weights), SEED=str(seed), KEEP="all", ALGO=algo),
                           setting, algo)
        self.known["runs"][name] = {"algo": algo, "seed": seed, "setting": str(setting), "curve": {}}
        self.note(f"{name}: started", overrides={**self.known.get("overrides", {}), algo: overrides})

    def curve(self, name: str) -> dict[int, float]:
        """Accuracy on the held-out problems by step; 0 is the SFT model's."""
        rows = metrics.read(self.work / "runs" / name / "ppo" / "metrics.jsonl")
        return {row["step"]: row[ACCURACY] for row in rows if ACCURACY in row}

    def step(self, name: str) -> int:
        """The last step that is over."""
        rows = metrics.read(self.work / "runs" / name / "ppo" / "metrics.jsonl")
        return rows[-1]["step"] if rows else 0

    def keep(self, name: str) -> None:
        """Copy what the run has said so far."""
        rows = metrics.read(self.work / "runs" / name / "ppo" / "metrics.jsonl")
        kept = [{key: round(row[key], 5) for key in KEPT if key in row} for row in rows]
        write_whole(self.folder / f"{name}.metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        self.known["runs"][name] |= {"curve": self.curve(name), "steps": self.step(name)}

    def look(self, names: Iterable[str]) -> None:
        """Wait a moment, and keep what is new."""
        time.sleep(1)
        before = {name: self.known["runs"][name]["curve"] for name in names}
        for name, curve in before.items():
            self.keep(name)
            job = self.runs[name][0]
            if self.known["runs"][name]["curve"] != curve:
                self.note(f"{name}: {', '.join(f'{step}: {value:.4f}' for step, value in self.curve(name).items())}")
            if not job.running and not self.known["runs"][name].get("status"):
                self.known["runs"][name]["status"] = "ended here" if job.ended else f"exit status {job.process.returncode}"
                self.note(f"{name}: {self.known['runs'][name]['status']} after {round(time.monotonic() - job.began)} s, "
                          f"step {self.step(name)}")

    def common_steps(self, names: Sequence[str]) -> list[int]:
        """Steps that all of these runs were validated and saved at, in order."""
        def saved(name: str) -> set[int]:
            folder = self.work / "runs" / name / "ppo" / "checkpoints"
            return {found.step for found in checkpoints.list_checkpoints(folder, checkpoints.mergeable("ppo"), loader=False)
                    if found.complete}

        found = [self.curve(name).keys() & saved(name) for name in names]
        return sorted(set.intersection(*found)) if found else []

    def decide(self, names: list[str]) -> str:
        """Wait till the candidates are far enough, and return the best by the mean of their last two common validations."""
        by = time.monotonic() + max(60, 0.3 * (self.left() - AFTER))
        while time.monotonic() < by:
            self.look(names)
            if all(max(self.curve(name), default=0) >= self.size.decide or not self.runs[name][0].running for name in names):
                break
        going = [name for name in names if not self.runs[name][0].process.poll()]
        judged = [name for name in going if any(self.curve(name))] or going
        if not judged:
            raise UsageError(f"no candidate trains; the logs are in {self.logs}.")
        steps = sorted(set.intersection(*({step for step in self.curve(name) if step} for name in judged)))[-2:]
        means = {name: float(np.mean([self.curve(name)[step] for step in steps])) if steps else 0.0 for name in judged}
        best = max(judged, key=means.__getitem__)
        for name in names:
            if name != best:
                self.runs[name][0].end()
        self.note(f"chosen: {self.known['runs'][best]['setting']}",
                  chosen={"run": best, "setting": self.runs[best][1]._asdict(), "by_steps": steps,
                          "held_out": {self.known["runs"][name]["setting"]: mean for name, mean in means.items()}})
        return best

    def finish(self, algo: str, names: list[str]) -> None:
        """Choose the step of some runs, merge, ask all test problems once, compare with the SFT model."""
        files = self.data()
        names = [name for name in names if self.common_steps([name])]
        steps = self.common_steps(names)
        if not steps:
            return self.note(f"{algo}: no step was validated in all of {names}")
        means = {step: float(np.mean([self.curve(name)[step] for name in names])) for step in steps}
        step = max(steps, key=lambda step: (means[step], -step))
        self.note(f"{algo}: step {step} of {names}", **{f"{algo}_step": {"chosen": step, "held_out": means, "runs": names}})
        jobs = {self.stage(name, "merge", STAGE="ppo", STEP=str(step)): name for name in names}
        merged = [jobs[job] for job in self.wait(jobs, needed=False)]
        jobs = {self.ask(f"test-{name}", self.work / "runs" / name / "ppo" / "merged", files["test"]): name for name in merged}
        if "sft" not in self.known["asked"]:
            jobs[self.ask("test-sft", self.work / "runs" / "gain" / "sft" / "merged", files["test"])] = "sft"
        asked = [jobs[job] for job in self.wait(jobs, needed=False)]
        self.take(asked)
        asked = [name for name in asked if name != "sft"]
        if asked and "sft" in self.known["asked"]:
            tested = permutation_test([self.answered("test-sft")["scores"]],
                                      [self.answered(f"test-{name}")["scores"] for name in asked])
            self.note(f"{algo}: {tested['before']} -> {tested['after']}, p = {tested['p']:.5f}",
                      **{algo: {"runs": asked, **tested}})

    def take(self, names: Iterable[str]) -> None:
        """Keep what models said to the test problems."""
        for name in names:
            self.known["asked"][name] = {key: value for key, value in self.answered(f"test-{name}").items() if key != "scores"}
        self.note()

    def run(self) -> None:
        """From the data to the test."""
        for stage in ("data", "model"):
            self.wait([self.stage("gain", stage)])
        files = self.data()
        self.wait([self.stage("gain", "sft", *self.size.sft, f"data.train_files={files['all']}",
                              f"data.val_files={files['held_out']}", "trainer.logger=[console]", SEED="1")])
        self.wait([self.stage("gain", "merge", STAGE="sft")])
        weights = self.work / "runs" / "gain" / "sft" / "merged"
        tries = self.try_problems(weights, files)
        critic = self.make_critic(weights)
        candidates = {f"gain-candidate-{letter}": setting for letter, setting in
                      zip("abcd", CANDIDATES[:self.size.candidates], strict=False)}
        for name, setting in candidates.items():
            # What needs no tries warms the caches of the others' start meanwhile.
            if setting.problems == "all":
                self.train(name, "ppo", SEEDS[0], setting, critic, files)
        self.choose_problems(files, tried=len(self.wait(tries, needed=False, seconds=0.15 * self.left())) == len(tries))
        for name, setting in candidates.items():
            if name not in self.runs:
                self.train(name, "ppo", SEEDS[0], setting, critic, files)
        asking = self.ask("test-sft", weights, files["test"])
        best = self.decide(list(candidates))
        setting = self.runs[best][1]
        self.take(job.name.removeprefix("ask-test-") for job in self.wait([asking], needed=False, seconds=60))

        of: dict[str, list[str]] = {"ppo": [best], "grpo": []}
        waiting = [("ppo", seed) for seed in SEEDS[1:]] + [("grpo", seed) for seed in SEEDS]
        spare, finished = list(range(len(SEEDS) + 1, len(SEEDS) + 3)), False
        while True:
            running = [name for names in of.values() for name in names if self.runs[name][0].running]
            # GRPO gets a while at the end, if PPO has come halfway.
            late = self.left() < AFTER + (GRPO if self.halfway(of["ppo"]) else 0)
            if not finished and not any(algo == "ppo" for algo, _ in waiting) and (
                    late or not any(name in running for name in of["ppo"])):
                for name in of["ppo"]:
                    self.runs[name][0].end()
                finished = True
                # GRPO starts while PPO's models are asked.
                others = sum(name in running for name in of["grpo"])
                waiting = self.start_waiting(waiting, of, others, setting, critic, files)
                self.finish("ppo", of["ppo"])
                continue
            if self.left() < AFTER or not (running or waiting):
                break
            waiting = self.start_waiting(waiting, of, len(running), setting, critic, files)
            self.look(name for names in of.values() for name in names)
            for name in [name for name in of["ppo"] if self.failed(name)]:
                of["ppo"].remove(name)
                if spare and self.left() > 3 * AFTER:
                    waiting.insert(0, ("ppo", spare.pop(0)))
        for name in of["grpo"]:
            self.runs[name][0].end()
        if not finished:
            self.finish("ppo", of["ppo"])
        if of["grpo"]:
            self.finish("grpo", of["grpo"])

    def start_waiting(self, waiting: list[tuple[str, int]], of: dict[str, list[str]], running: int,
                      *how: Any) -> list[tuple[str, int]]:
        """Start what there is room and time for; returns the rest."""
        while waiting and running < self.size.side_by_side and self.left() > AFTER + LEAST:
            algo, seed = waiting.pop(0)
            of[algo].append(name := f"gain-{algo}-{seed}")
            self.train(name, algo, seed, *how)
            running += 1
        return waiting if self.left() > AFTER + LEAST else []

    def halfway(self, names: list[str]) -> bool:
        """Whether all seeds are there and each was validated in half of its steps."""
        return len(names) == len(SEEDS) and all(max(self.curve(name), default=0) >= self.size.steps / 2 for name in names)

    def failed(self, name: str) -> bool:
        """Whether a run ended by itself before its end, without a validation that is worth something."""
        job = self.runs[name][0]
        return not job.running and not job.ended and bool(job.process.returncode) and not any(self.curve(name))


def campaign(minutes: str) -> None:
    """All of it, whatever ends it."""
    if not minutes.replace(".", "", 1).isdigit():
        raise UsageError(f"MINUTES={minutes!r} is no number of minutes. Use e.g. MINUTES=20.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    whole = Campaign(float(minutes))
    try:
        whole.run()
    finally:
        whole.close()
        whole.note("over")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: ask(*sys.argv[2:]) if sys.argv[1] == "ask" else campaign(*sys.argv[1:])))
