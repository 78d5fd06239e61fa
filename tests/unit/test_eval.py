"""The eval stage: what it asks, how it scores, what it refuses. The chain of all three models is in tests/rehearsal/."""

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet
import pytest
from hub_fixture import run_module

from bridge import hardware
from bridge import settings as settings_module
from bridge.compose import compose
from bridge.errors import UsageError
from bridge.pages import page
from bridge.runs import record
from bridge.stages import eval as evaluation
from bridge.stages.train import NAMES
from door import asked, recorded

LIMITS = {"max_prompt_length": 384, "max_response_length": 12, "truncation": "error"}


def planned(env: dict[str, str], **settings: str):
    env = {**env, **settings}
    return evaluation.plan(settings_module.read(env), env)


def first_rows(prepared: Path, count: int) -> list[dict]:
    return pyarrow.parquet.read_table(prepared / "data" / "gsm8k" / "test.parquet").to_pylist()[:count]


# ---- scores

@pytest.mark.parametrize(("text", "truth", "expected"), [
    ("2 + 3 = 5\n#### 5", "5", ("5", 1, "5", 1)),
    ("#### 1,234", "1234", ("1234", 1, "1234", 1)),
    ("The answer is 18.", "18", (None, 0, "18", 1)),
    ("It costs $18.00", "18", (None, 0, "18", 1)),
    ("#### 18 (of 20)", "18", ("18", 1, "20", 0)),
    ("It is -5", "5", (None, 0, "-5", 0)),
    ("no idea", "18", (None, 0, None, 0)),
])
def test_the_score_wants_the_mark_and_the_last_number_does_not(text, truth, expected):
    found = evaluation.score(text, "openai/gsm8k", truth)
    assert tuple(found.values()) == expected


@pytest.mark.parametrize(("correct", "count"), [(0, 40), (1, 3), (8, 10), (10, 10), (660, 1319)])
def test_the_ends_of_the_interval_lie_as_far_away_as_chance_goes_from_there(correct, count):
    answers = [{"score": place < correct, "last_number_score": 0, "response_tokens": 1, "cut_off": 0} for place in range(count)]
    low, high = evaluation.summary(answers)["accuracy_interval"]
    assert 0 <= low <= correct / count <= high <= 1
    for end in (low, high):
        if end not in (0, 1):
            assert abs(end - correct / count) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / count), rel=1e-4)


# ---- what is asked

def test_each_problem_is_asked_in_the_models_chat_template_and_scored(prepared):
    from transformers import AutoTokenizer

    folder, data = prepared / "models" / "tiny", prepared / "data" / "gsm8k" / "test.parquet"
    tokenizer, asked = AutoTokenizer.from_pretrained(folder), []
    rows = first_rows(prepared, 3)

    def right_wrong_and_cut_off(model, prompts, max_tokens):
        assert (model, max_tokens) == (folder, 12)
        asked.extend(prompts)
        texts = [f"#### {rows[0]['reward_model']['ground_truth']}<|im_end|>", "#### 0<|im_end|>",
                 f"so {rows[2]['reward_model']['ground_truth']}"]
        return [evaluation.Answer(tokenizer.encode(text), place == 2) for place, text in enumerate(texts)]

    answers = evaluation.evaluate("sft", folder, data, 3, LIMITS, right_wrong_and_cut_off)
    assert asked == [tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True) for row in rows]
    assert [answer["index"] for answer in answers] == [row["extra_info"]["index"] for row in rows]
    assert [answer["ground_truth"] for answer in answers] == [row["reward_model"]["ground_truth"] for row in rows]
    assert [answer["score"] for answer in answers] == [1, 0, 0]
    assert [answer["last_number_score"] for answer in answers] == [1, 0, 1]
    # The mark of the end counts as a token and is no part of the text.
    assert answers[1]["response"] == "#### 0" and answers[1]["response_tokens"] == len(tokenizer.encode("#### 0")) + 1
    found = evaluation.summary(answers)
    shares = [found[key] for key in ("accuracy", "last_number_accuracy", "cut_off")]
    assert found["rows"] == 3 and shares == pytest.approx([1/3, 2/3, 1/3])
    assert "sft         3   33.33 % [6.15, 79.23]" in page("eval.txt", models={"sft": found})


def test_a_prompt_that_is_too_long_is_treated_as_ppo_treats_it(prepared):
    folder, data = prepared / "models" / "tiny", prepared / "data" / "gsm8k" / "test.parquet"
    lengths = []

    def note_lengths(model, prompts, max_tokens):
        lengths.extend(len(prompt) for prompt in prompts)
        return [evaluation.Answer([], False) for _ in prompts]

    evaluation.evaluate("base", folder, data, 2, {**LIMITS, "max_prompt_length": 7, "truncation": "right"}, note_lengths)
    assert lengths == [7, 7]
    with pytest.raises(NotImplementedError, match="7"):
        evaluation.evaluate("base", folder, data, 2, {**LIMITS, "max_prompt_length": 7}, note_lengths)


# ---- answers

@pytest.fixture(scope="module")
def network(prepared, tmp_path_factory) -> Path:
    """A random model that does not only repeat itself: the tiny one with larger weights."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("network") / "network"
    shutil.copytree(prepared / "models" / "tiny", folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.model.layers.parameters():
        if parameter.dim() > 1:
            parameter.data *= 20
    model.save_pretrained(folder)
    return folder


def one_by_one(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The likeliest next token, again and again, without padding, cache or generation settings."""
    import torch
    from transformers import AutoModelForCausalLM

    model, answers = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32), []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        answers.append(tokens[len(prompt):])
    return answers


def test_transformers_answers_greedily_whatever_is_in_the_batch_and_in_the_models_settings(network, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH", 3)
    prompts = [[5, 6, 7], [300, 8, 9, 10, 11, 12, 400, 14], [100], [15, 500]]
    expected = one_by_one(network, prompts, 12)
    assert len({token for answer in expected for token in answer}) > 10
    folder = shutil.copytree(network, tmp_path / "network")
    # Ends of the model's own count, its penalties do not.
    end = next(token for token in expected[1][3:] if token not in expected[1][:3])
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"eos_token_id": [settings["eos_token_id"], end], "repetition_penalty": 9.0, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    answers = evaluation.generate_with_transformers(folder, prompts, 12)
    for answer, tokens in zip(answers, expected, strict=True):
        ended = [place for place, token in enumerate(tokens, 1) if token in settings["eos_token_id"]]
        assert answer == evaluation.Answer(tokens[:ended[0]] if ended else tokens, not ended)
    assert not answers[1].cut_off and 4 <= len(answers[1].tokens) <= 12 and any(answer.cut_off for answer in answers)


def test_vllm_is_asked_for_the_same_with_arguments_that_it_knows(monkeypatch):
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    made = {}

    class Recorder:
        """Takes what vLLM's own classes take, and answers with its own kind of output."""

        def __init__(self, **arguments):
            made["engine"] = EngineArgs(**arguments)

        def generate(self, prompts, sampling_params):
            made["prompts"], made["sampling"] = prompts, sampling_params
            written = [vllm.CompletionOutput(index=0, text="", token_ids=(place, 2), cumulative_logprob=None, logprobs=None,
                                             finish_reason=reason) for place, reason in enumerate(("stop", "length"))]
            return [vllm.RequestOutput(request_id="0", prompt=None, prompt_token_ids=prompt["prompt_token_ids"],
                                       prompt_logprobs=None, finished=True, outputs=[one])
                    for prompt, one in zip(prompts, written, strict=True)]

    monkeypatch.setattr(vllm, "LLM", Recorder)
    answers = evaluation.answers_of_vllm(Path("/models/x"), [[1, 2, 3], [4]], 7)
    assert answers == [evaluation.Answer([0, 2], False), evaluation.Answer([1, 2], True)]
    assert made["prompts"] == [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [4]}]
    assert (made["engine"].model, made["engine"].dtype, made["engine"].max_model_len) == ("/models/x", "bfloat16", 10)
    assert (made["sampling"].temperature, made["sampling"].max_tokens, made["sampling"].repetition_penalty) == (0, 7, 1.0)


def test_vllm_runs_in_a_process_of_its_own_for_each_model(prepared, tmp_path):
    # A stand-in for vLLM, which needs a GPU: repeats the prompt, and notes the process that it ran in.
    (tmp_path / "vllm.py").write_text(f'''
import os
from types import SimpleNamespace

class LLM:
    def __init__(self, model, **arguments): open({str(tmp_path)!r} + "/processes", "a").write(f"{{os.getpid()}}\\n")
    def generate(self, prompts, sampling):
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=prompt["prompt_token_ids"], finish_reason="stop")])
                for prompt in prompts]

def SamplingParams(**arguments): return arguments
''')
    result = run_module(
        "eval", prepared / "data" / "gsm8k" / "test.parquet", tmp_path, "3", "vllm",
        json.dumps({"max_prompt_length": 384, "max_response_length": 48, "truncation": "error"}),
        *(f"{name}={prepared / 'models' / 'tiny'}" for name in ("base", "sft")),
        env={"PYTHONPATH": str(tmp_path)}, preloaded=None)
    assert result.returncode == 0, result.stderr
    processes = (tmp_path / "processes").read_text().split()
    assert len(processes) == len(set(processes)) == 2
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["model"] for answer in answers] == 3 * ["base"] + 3 * ["sft"]
    assert [answer["index"] for answer in answers] == [0, 1, 2, 0, 1, 2]
    assert all(answer["response"] in answer["prompt"].replace("<|im_start|>", "").replace("<|im_end|>", "") for answer in answers)
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["engine"].startswith("vllm 0.8.5") and list(found["models"]) == ["base", "sft"]


# ---- what is run, what is refused

def test_base_is_evaluated_and_what_is_not_there_is_said(env):
    plan = planned(env, LIMIT="5")
    assert plan.command[-1] == f"base={Path(env['WORK_DIR']) / 'models' / 'tiny'}" and plan.command[6:8] == ["5", "transformers"]
    assert plan.notes[0].startswith("eval: base; the first 5 of 64 rows")
    assert ["left out: sft" in plan.notes[1], "left out: ppo" in plan.notes[2]] == [True, True]
    assert "all 64 rows" in planned(env, LIMIT="500").notes[0] == planned(env).notes[0]


def merged(env: dict[str, str], stage: str, made_from: str = "/somewhere/global_step_1") -> Path:
    """Give the run a merged model and merge's record of it."""
    folder = Path(env["WORK_DIR"]) / "runs" / "default" / stage
    shutil.copytree(Path(env["WORK_DIR"]) / "models" / "tiny", folder / "merged")
    (folder / "merge").mkdir()
    command = ["python", "-m", "bridge.stages.merge", made_from, str(folder / "merged")]
    record.write_json(folder / "merge" / "run.json", recorded(attempts=[{"command": command}]), [])
    return folder / "merged"


def test_every_model_that_is_there_is_evaluated_or_the_one_that_is_asked_for(env):
    sft, ppo = merged(env, "sft"), merged(env, "ppo", "/there/global_step_435/actor")
    plan = planned(env)
    assert [argument.split("=")[0] for argument in plan.command[-3:]] == ["base", "sft", "ppo"]
    assert plan.inputs["models"]["ppo"]["merged_from"] == "/there/global_step_435/actor"
    for stage, folder in (("sft", sft), ("ppo", ppo)):
        plan = planned(env, STAGE=stage)
        assert plan.command[-1] == f"{stage}={folder}" and not any("base=" in word for word in plan.command)


def test_the_lengths_are_those_of_the_profile_or_of_the_ppo_run_that_is_there(env):
    def limits(**settings: str) -> dict[str, int | str]:
        return json.loads(planned(env, **settings).command[8])

    assert limits() == {"max_prompt_length": 384, "max_response_length": 48, "truncation": "right"}
    assert limits(PROFILE="tutorial") == {"max_prompt_length": 512, "max_response_length": 256, "truncation": "error"}
    folder = Path(env["WORK_DIR"]) / "runs" / "default" / "ppo"
    folder.mkdir(parents=True)
    config = {**compose("ppo", ["profile/ppo=tiny"], NAMES)["data"], "max_response_length": 99}
    record.write_json(folder / "run.json", recorded(config={"data": config}), [])
    assert limits(PROFILE="tutorial")["max_response_length"] == 99


def test_one_gpu_is_used_through_vllm(env, monkeypatch):
    gpus = [hardware.Gpu(name, "H100", 80 << 30, 1 << 30) for name in ("4", "5")]
    monkeypatch.setattr(hardware, "visible_gpus", lambda env: gpus)
    plan = planned(env)
    assert "vllm" in plan.command and plan.env["CUDA_VISIBLE_DEVICES"] == "4"
    gpus[0] = hardware.Gpu("4", "H100", 80 << 30, 70 << 30)
    with pytest.raises(UsageError, match="GPU 4 is in use"):
        planned(env)


@pytest.mark.parametrize(("settings", "message"), [
    ({"STAGE": "ppo"}, "make merge STAGE=ppo"),
    ({"STAGE": "ckpt"}, "make merge CKPT="),
    ({"MODEL": "smollm2"}, "nothing to evaluate"),
    ({"LIMIT": "0"}, "LIMIT='0'"),
    ({"CKPT": "/nowhere", "STAGE": "sft"}, "one or the other"),
])
def test_what_is_missing_is_named(env, settings, message):
    result = asked("eval", "--dry-run", **{**env, **settings})
    assert result.returncode == 2 and message in result.stderr and "Traceback" not in result.stderr


def test_a_merged_checkpoint_is_evaluated_only_if_it_is_the_one_named(env, monkeypatch):
    monkeypatch.setattr(evaluation.merge, "shards_of", lambda folder: folder / "actor")
    merged(env, "ckpt", "/mine/global_step_7/actor")
    assert planned(env, CKPT="/mine/global_step_7").command[-1].startswith("ckpt=")
    with pytest.raises(UsageError, match="was not made from CKPT=/mine/global_step_8"):
        planned(env, CKPT="/mine/global_step_8")


@pytest.mark.parametrize("stage", ["merge", "upload"])
def test_the_base_model_is_only_for_eval(env, stage):
    result = asked(stage, **{**env, "STAGE": "base", "HF_REPO": "a/b", "HF_TOKEN": "hf_xxxxx"})
    assert result.returncode == 2 and "only eval takes it" in result.stderr


def test_no_data_and_no_model_are_named_at_once(tmp_path):
    result = asked("eval", WORK_DIR=str(tmp_path), MODEL="tiny", PROFILE="tiny")
    assert result.returncode == 2
    assert "nothing to evaluate" in result.stderr and "make data" in result.stderr
    assert not list(tmp_path.iterdir())
