"""The eval stage: accuracy on GSM8K's test problems of the base, the SFT and the PPO model, with greedy answers.   bridge eval
verl's own code makes prompts and scores, as in PPO's validation. vLLM answers on a GPU, transformers on a CPU.
Beside the score (the answer must stand behind "####") the last number of an answer is looked at."""

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from bridge import compose, hardware, model_folder
from bridge.errors import UsageError, exit_status, refuse, say, write_whole
from bridge.pages import page
from bridge.plan import Plan
from bridge.runs import record
from bridge.settings import Settings
from bridge.stages import merge, ppo, reward, train
from bridge.trainers import loopback

# Rows that transformers answers at once; more only pads more.
BATCH = 32
# Rows that vLLM answers at once: GSM8K's 1319 in two waves.
SEQUENCES = 1024
# Share of the GPU's memory that vLLM takes: nothing else runs there.
GPU_MEMORY = 0.85
CONFIDENCE = 0.95
RESULT_FILE, ANSWERS_FILE = "eval.json", "answers.jsonl"


class Answer(NamedTuple):
    """The tokens of one answer, its end-of-text token included, and whether it was cut off at the limit."""

    tokens: list[int]
    cut_off: bool


# ---- in the door

def plan(settings: Settings, env: Mapping[str, str]) -> Plan:
    """Find the models and the data and say what to run. A UsageError names everything that is missing or not whole."""
    problems: list[str] = []
    models, notes = chosen_models(settings, problems)
    # What PPO's configuration says of the data: as this run's PPO had it, if there was one, else as the profile has it.
    whole = (record.read(settings.stage_dir("ppo")) or {}).get("config") or compose.compose(
        "ppo", [f"profile/ppo={settings.profile}"], train.NAMES)
    judge = whole.get("custom_reward_function", {"path": None})
    if settings.reward:
        judge = {"path": str(settings.reward[0]), "name": settings.reward[1]}
    if judge["path"] and not Path(judge["path"]).is_file():
        problems.append(f"REWARD: there is no file {judge['path']}, by which PPO judged the answers.")
    config = {**whole["data"], "train_files": [], "val_files": [str(settings.data_dir / "test.parquet")]}
    rows = train.data_problems({"data": config}, ppo.columns({"data": config}), problems)
    if rows and not rows[1]:
        problems.append(f"{config['val_files'][0]} has no rows. Run `make data` again.")
    gpus = hardware.visible_gpus(env)
    own_env = {"WORK_DIR": str(settings.work_dir), "HF_HUB_OFFLINE": "1"}
    if gpus:
        problems += train.busy_problems(settings, gpus[:1]) + hardware.vllm_problems(gpus[:1])
        train.limit_gpus(1, env, own_env, notes)
        # In the process that asks, so that the GPU's memory is free when that has ended.
        own_env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    refuse(problems)
    count = min(settings.limit or rows[1], rows[1])
    notes.insert(0, page("eval_of.txt", models=models, count=count, rows=rows[1], limits=config))
    if not gpus:
        notes.append(f"no GPU visible: on {hardware.cpu_count()} CPU cores, with transformers; LIMIT= takes fewer rows")
    kept = {key: config[key] for key in ("max_prompt_length", "max_response_length", "truncation")}
    if judge["path"]:
        kept["reward"] = [judge["path"], judge["name"], judge.get("reward_kwargs") or {}]
        notes.append(f"answers are judged by {judge['path']}:{judge['name']}")
    output = settings.stage_dir("eval")
    return Plan(
        command=[sys.executable, "-u", "-m", "bridge.stages.eval", config["val_files"][0], str(output), str(count),
                 "vllm" if gpus else "transformers", json.dumps(kept), *(f"{name}={folder}" for name, folder in models.items())],
        env=own_env, record_dir=output, notes=notes, config={"data": kept, "rows": count},
        inputs={"data": record.sha256(settings.data_dir / "test.parquet"),
                "code": {"reward": record.sha256(Path(judge["path"]))} if judge["path"] else {},
                "models": {name: {**train.model_fingerprint(folder), "merged_from": merged_from(settings, name)}
                           for name, folder in models.items()}},
    )


def chosen_models(settings: Settings, problems: list[str]) -> tuple[dict[str, Path], list[str]]:
    """The models to evaluate by name, and what to say about those that are not there.
    STAGE= or CKPT= picks one, which then has to be there; else it is those there are of base, sft and ppo."""
    if settings.ckpt and settings.stage not in (None, "ckpt"):
        raise UsageError("CKPT= names a checkpoint by its folder, STAGE= a result of this run. Give one or the other.")
    stage = "ckpt" if settings.ckpt else settings.stage
    folders = {"base": settings.model_dir, **{name: settings.merged_dir(name) for name in ("sft", "ppo", "ckpt")}}
    cures = {name: f"Run `make merge STAGE={name}` first." for name in folders}
    cures |= {"base": "Run `make model` first.", "ckpt": "Run `make merge CKPT=...` first."}
    if not (names := [stage] if stage else [name for name in ("base", "sft", "ppo") if folders[name].exists()]):
        problems.append(f"nothing to evaluate: there is neither the base model {folders['base']} nor a merged model in "
                        f"{settings.run_dir}. Run `make model` first, or `make merge` after a training.")
    for name in names:
        problems += model_folder.check_model_folder(folders[name], cures[name])
    if settings.ckpt and merged_from(settings, "ckpt") != str(merge.shards_of(settings.ckpt)):
        problems.append(f"{folders['ckpt']} was not made from CKPT={settings.ckpt}. Run `make merge` with this CKPT= first.")
    missing = [name for name in ("base", "sft", "ppo") if not stage and name not in names]
    return {name: folders[name] for name in names}, [f"not there, so left out: {name} ({cures[name]})" for name in missing]


def merged_from(settings: Settings, stage: str) -> str | None:
    """The folder of shards that a merged model was made from, as merge recorded it; None if not known (or the base model)."""
    recorded = record.read(settings.stage_dir(stage) / "merge")
    return recorded["attempts"][-1]["command"][-2] if recorded and recorded["status"] == "finished" else None


# ---- answers

def generate_with_vllm(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """Answers on one GPU, in a process of its own: vLLM gives the memory back only when its process ends."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(answers_of_vllm, folder, prompts, max_tokens).result()


def answers_of_vllm(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """See generate_with_vllm."""
    from vllm import LLM, SamplingParams

    loopback.close()
    # Eager: compiling for each model would take longer than these few hundred steps.
    llm = LLM(model=str(folder), dtype="bfloat16", max_model_len=max(map(len, prompts)) + max_tokens, enforce_eager=True,
              gpu_memory_utilization=GPU_MEMORY, max_num_seqs=SEQUENCES, seed=0)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts],
                           SamplingParams(temperature=0, max_tokens=max_tokens, detokenize=False))
    return [Answer(list(output.outputs[0].token_ids), output.outputs[0].finish_reason == "length") for output in outputs]


def generate_with_transformers(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    """Answers on the CPU, in float32: the weights are bf16, but few CPUs compute with it."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from verl.utils import hf_tokenizer

    tokenizer = hf_tokenizer(str(folder))
    network = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    ends = network.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    # Of the model's own generation settings only its ends count, as with vLLM: no penalty, no sampling.
    greedy = GenerationConfig(do_sample=False, max_new_tokens=max_tokens, eos_token_id=sorted(ends),
                              pad_token_id=tokenizer.pad_token_id)
    answers = []
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer.pad({"input_ids": prompts[start:start + BATCH]}, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            written = network.generate(**batch, generation_config=greedy, use_model_defaults=False)
        for row in written[:, batch["input_ids"].shape[1]:].tolist():
            end = next((place for place, token in enumerate(row, 1) if token in ends), None)
            answers.append(Answer(row[:end], end is None))
        say(f"{len(answers)} of {len(prompts)}")
    return answers


# (Model folder, prompts as token ids, most tokens of an answer) -> one answer a prompt.
GENERATORS = {"vllm": generate_with_vllm, "transformers": generate_with_transformers}


# ---- scores

def score(text: str, data_source: str, ground_truth: str) -> dict[str, Any]:
    """Score an answer as PPO does, and by its last number."""
    from verl.utils.reward_score import default_compute_score
    from verl.utils.reward_score.gsm8k import extract_solution

    # verl's own flexible method would compare "18." and "18" as text; a number ends in neither a dot nor .00.
    last = extract_solution(text, method="flexible")
    last = last and re.sub(r"\.0*$", "", last.replace(",", ""))
    return {"extracted": extract_solution(text, method="strict"),
            "score": float(default_compute_score(data_source, text, ground_truth)),
            "last_number": last, "last_number_score": float(last == ground_truth)}


def summary(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the rows of one model come to."""
    count = len(answers)
    found = {"rows": count}
    for key, name in (("score", "accuracy"), ("last_number_score", "last_number_accuracy")):
        if key in answers[0]:
            scores = [answer[key] for answer in answers]
            found |= {name: sum(scores) / count, f"{name}_interval": interval(scores)}
    return {**found, "mean_response_tokens": sum(answer["response_tokens"] for answer in answers) / count,
            "cut_off": sum(answer["cut_off"] for answer in answers) / count}


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """Confidence interval of a mean: Wilson's, which is right near 0 and 1, too; Student's of scores other than 0 and 1."""
    from scipy import stats

    if set(scores) <= {0, 1}:
        return tuple(map(float, stats.binomtest(int(sum(scores)), len(scores)).proportion_ci(CONFIDENCE, method="wilson")))
    spread = stats.sem(scores) if len(scores) > 1 else float("inf")
    return tuple(map(float, stats.t.interval(CONFIDENCE, max(1, len(scores) - 1), sum(scores) / len(scores), spread)))


def evaluate(name: str, folder: Path, data: Path, rows: int, limits: Mapping[str, Any], generate: Callable) -> list[dict]:
    """A row for each answer of a model to the first so many problems. generate: of GENERATORS. limits: max_prompt_length,
    max_response_length (tokens) and truncation, in verl's words; reward: file, function, arguments."""
    from omegaconf import OmegaConf
    from verl.utils import hf_tokenizer
    from verl.utils.dataset.rl_dataset import RLHFDataset

    tokenizer = hf_tokenizer(str(folder))
    file, function, options = limits.get("reward") or (None, None, {})
    judge = file and reward.load(Path(file), function)
    dataset = RLHFDataset(str(data), tokenizer, OmegaConf.create({**limits, "filter_overlong_prompts": False}))
    problems = [dataset[place] for place in range(rows)]
    prompts = [problem["raw_prompt_ids"] for problem in problems]
    answers, written = [], generate(folder, prompts, limits["max_response_length"])
    for problem, prompt, answer in zip(problems, prompts, written, strict=True):
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        truth = problem["reward_model"]["ground_truth"]
        scores = {"score": reward.score(judge, problem, text, **options)} if judge else score(text, problem["data_source"], truth)
        answers.append({"model": name, "index": problem["index"], "prompt": tokenizer.decode(prompt), "response": text, **scores,
                        "ground_truth": truth, "response_tokens": len(answer.tokens), "cut_off": answer.cut_off})
    return answers


def main() -> None:
    """What the stage runs: test.parquet, output folder, number of rows, engine, limits as in evaluate (JSON), NAME=FOLDER..."""
    data, output, rows, engine, limits, *models = sys.argv[1:]
    rows, limits, output = int(rows), json.loads(limits), Path(output)
    results, lines = {}, []
    for name, _, folder in (model.partition("=") for model in models):
        say(f"--- {name}: {folder}")
        started = time.monotonic()
        answers = evaluate(name, Path(folder), Path(data), rows, limits, GENERATORS[engine])
        results[name] = {**summary(answers), "seconds": round(time.monotonic() - started, 1), "folder": folder}
        lines += [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        write_whole(output / ANSWERS_FILE, "".join(lines))
    result = {"data": data, "rows": rows, **limits, "confidence": CONFIDENCE,
              "engine": f"{engine} {version(engine)}", "models": results}
    record.write_json(output / RESULT_FILE, result, [])
    print(page("eval.txt", models=results))
    print(f"answers: {output / ANSWERS_FILE}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
