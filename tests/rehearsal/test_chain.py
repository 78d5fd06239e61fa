"""The whole chain on CPU with verl's real trainers: run once, then looked at from all sides."""

import json
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest
from huggingface_hub import ModelCard

from bridge.runs import checkpoints, metrics, record
from bridge.stages import merge
from bridge.tools.rehearse import REPOSITORY, STEPS
from door import SHELL, bridge, left_running, newest_checkpoint
from listeners import listeners_by_stage, rows_of_the_page
from standin_hub import StandInHub

TOKEN = "token-of-the-stand-in-hub"

# In 64 steps the random model's loss has to fall to less than half (seen: 6.4 -> 2.3).
LOSS_FALLS_BY = 2.0


class Rehearsal:
    """What a rehearsal left behind."""

    def __init__(self, work_dir: Path):
        secrets = {"WANDB_API_KEY": "a-wandb-key-that-must-not-appear", "HF_TOKEN": "hf_the_users_own_token_must_not_appear"}
        self.secrets = [*secrets.values(), TOKEN]
        # Without an image `make rehearse` hides what GPUs there are, since .venv has no flash-attn.
        env = {**SHELL, **secrets, "WORK_DIR": str(work_dir), "CUDA_VISIBLE_DEVICES": ""}
        self.listeners: dict[str, set[tuple[str, str]]] = {"sft": set(), "ppo": set()}
        said = work_dir.with_name("said.txt")
        with open(said, "wb") as output:
            door = subprocess.Popen([sys.executable, "-m", "bridge", "rehearse"], env=env, stdout=output,
                                    stderr=subprocess.STDOUT)
            while door.poll() is None:
                for stage, found in listeners_by_stage(psutil.Process(door.pid)).items():
                    self.listeners[stage] |= found
                time.sleep(0.25)
        self.output = said.read_text()
        assert door.returncode == 0, self.output[-6000:]
        self.folder = work_dir / "rehearsal"
        # The rehearsal only shows the upload; to a stand-in for the hub it is done.
        with StandInHub(work_dir / "hub", TOKEN) as hub:
            env = {**secrets, "WORK_DIR": str(self.folder), "HF_REPO": REPOSITORY, "STAGE": "ppo", **hub.env(TOKEN)}
            uploaded = bridge("upload", **env)
        self.hub, self.uploaded = work_dir / "hub", uploaded.stdout + uploaded.stderr
        assert uploaded.returncode == 0, self.uploaded
        self.left_running = left_running(work_dir)

    def stage(self, name: str) -> Path:
        return self.folder / "runs" / "default" / name


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Rehearsal:
    return Rehearsal(tmp_path_factory.mktemp("作業 folder"))


def test_the_closing_table_has_a_row_for_every_step(rehearsal):
    table = rehearsal.output[rehearsal.output.index("\nstage  "):]
    rows = re.findall(r"^(.+?) +(\d+\.\d)", table, re.MULTILINE)
    assert [name for name, _ in rows] == [*STEPS, "all"]
    assert float(rows[-1][1]) == pytest.approx(sum(float(seconds) for _, seconds in rows[:-1]), abs=1)


def test_sft_learns(rehearsal):
    rows = metrics.read(rehearsal.stage("sft") / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 65))
    losses = [row["train/loss"] for row in rows]
    assert losses[0] > LOSS_FALLS_BY * losses[-1]
    assert losses[0] > LOSS_FALLS_BY * rows[-1]["val/loss"]
    # What verl's SFT does not tell: each rank has half of the tokens.
    assert all(row["perf/throughput"] == pytest.approx(row["perf/total_num_tokens"] / row["perf/time_per_step"] / 2)
               for row in rows)


def test_ppo_measures_rewards_and_updates_actor_and_critic(rehearsal):
    rows = metrics.read(rehearsal.stage("ppo") / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        # A random model earns nothing, so this says no more than that answers are scored: test_resume.py has a reward that moves.
        assert 0 <= row["critic/score/mean"] <= 1
        assert row["actor/grad_norm"] > 0 and row["critic/grad_norm"] > 0
        assert row["actor/lr"] == pytest.approx(1e-6) and row["critic/lr"] == pytest.approx(1e-5)


def test_ppo_starts_from_the_merged_sft_model(rehearsal):
    config = record.read(rehearsal.stage("ppo"))["config"]
    assert config["actor_rollout_ref"]["model"]["path"] == config["critic"]["model"]["path"]
    assert config["actor_rollout_ref"]["model"]["path"] == str(rehearsal.stage("sft") / "merged")


def test_two_ranks_took_part(rehearsal):
    for stage in ("sft", "ppo"):
        newest = newest_checkpoint(rehearsal.stage(stage), stage)
        shards = newest.path / next(iter(checkpoints.mergeable(stage))) / "fsdp_config.json"
        assert json.loads(shards.read_text())["world_size"] == 2


def test_a_training_that_has_made_its_steps_says_so_with_its_checkpoint(rehearsal):
    for stage in ("sft", "ppo"):
        newest = newest_checkpoint(rehearsal.stage(stage), stage)
        # What would come next is said to who started the stage, and here that is the rehearsal.
        assert f"bridge: {stage} has made all its steps. Its newest checkpoint is {newest.path}.\n" in rehearsal.output


def test_every_run_leaves_a_record_and_a_log(rehearsal):
    for stage in ("sft", "ppo", "sft/merge", "ppo/merge", "eval", "ppo/upload"):
        recorded = record.read(rehearsal.stage(stage))
        assert recorded["status"] == "finished" and recorded["attempts"][-1]["exit_status"] == 0
        assert (rehearsal.stage(stage) / "log.txt").stat().st_size > 0


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_records_tell_how_long_the_start_took_and_how_long_a_step(rehearsal, stage):
    attempt = record.read(rehearsal.stage(stage))["attempts"][-1]
    started, ended = (datetime.fromisoformat(attempt[name]).timestamp() for name in ("started", "ended"))
    times = [row["time"] for row in metrics.read(rehearsal.stage(stage) / "metrics.jsonl")]
    # Importing verl alone takes seconds. Written to the second, hence the 1.
    assert started + 2 < times[0] < times[-1] <= ended + 1
    assert times == sorted(set(times))


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_what_listens_during_a_training_is_what_the_page_says(rehearsal, stage):
    seen = rehearsal.listeners[stage]
    assert rows_of_the_page(stage, "always") <= seen <= rows_of_the_page(stage, "always", "if free")
    assert {address for _, address in seen} == {"127.0.0.1"}


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_merged_model_loads_answers_and_holds_its_tied_embeddings_once(rehearsal, stage):
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = rehearsal.stage(stage) / "merged"
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "2+2?"}], add_generation_prompt=True, return_tensors="pt")
    assert model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4).shape[1] > prompt.shape[1]
    assert str(rehearsal.folder) not in (folder / "config.json").read_text()


def test_the_merged_weights_are_those_of_the_checkpoint(rehearsal):
    # Joined here by hand: each rank holds its rows of a tensor, in order.
    import torch
    from safetensors.torch import load_file

    shards = newest_checkpoint(rehearsal.stage("sft"), "sft").path
    ranks = [torch.load(shards / f"model_world_size_2_rank_{rank}.pt", weights_only=False) for rank in range(2)]
    merged = load_file(rehearsal.stage("sft") / "merged" / "model.safetensors")
    for name, tensor in merged.items():
        whole = torch.cat([rank[name].to_local() for rank in ranks]).to(torch.bfloat16)
        assert torch.equal(tensor, whole), name


def test_training_changed_the_weights_from_base_to_sft_to_ppo(rehearsal):
    import torch
    from safetensors.torch import load_file

    name = "model.layers.0.mlp.up_proj.weight"
    base, sft, ppo = (load_file(folder / "model.safetensors")[name].float() for folder in (
        rehearsal.folder / "models" / "tiny", rehearsal.stage("sft") / "merged", rehearsal.stage("ppo") / "merged"))
    assert not torch.equal(base, sft)
    # Two steps at 1e-6 are below bf16's resolution for most weights, but not for all.
    actor = rehearsal.stage("ppo") / "checkpoints" / "global_step_2" / "actor" / "model_world_size_2_rank_0.pt"
    trained = torch.load(actor, weights_only=False)[name].to_local().float()
    assert ppo.shape == sft.shape and not torch.equal(trained, sft[:trained.shape[0]])


def test_eval_asks_base_sft_and_ppo_the_same_problems_and_keeps_every_answer(rehearsal):
    found = json.loads((rehearsal.stage("eval") / "eval.json").read_text())
    answers = [json.loads(line) for line in (rehearsal.stage("eval") / "answers.jsonl").read_text().splitlines()]
    assert list(found["models"]) == ["base", "sft", "ppo"] and len(answers) == 3 * 8
    assert found["max_response_length"] == record.read(rehearsal.stage("ppo"))["config"]["data"]["max_response_length"] == 48
    for name, result in found["models"].items():
        own = [answer for answer in answers if answer["model"] == name]
        assert [answer["prompt"] for answer in own] == [answer["prompt"] for answer in answers[:8]]
        assert result["accuracy"] == sum(answer["score"] for answer in own) / 8
        low, high = result["accuracy_interval"]
        assert low <= result["accuracy"] <= high
        assert all(1 <= answer["response_tokens"] <= 48 for answer in own)
    # The SFT model's answers are its own: 64 steps taught it the form of an answer.
    base, sft = ([answer["response"] for answer in answers if answer["model"] == name] for name in ("base", "sft"))
    assert base != sft
    # The table is printed, and what it says is what the files say.
    for name, result in found["models"].items():
        assert re.search(rf"^{name} +8 +{100 * result['accuracy']:.2f} % ", rehearsal.output, re.MULTILINE)


def test_the_stand_in_hub_holds_exactly_the_merged_model(rehearsal):
    objects = {file.read_bytes() for file in (rehearsal.hub / "objects").iterdir()}
    merged = {file.read_bytes() for file in (rehearsal.stage("ppo") / "merged").iterdir()}
    assert merged <= objects and (rehearsal.stage("ppo") / "upload" / "README.md").read_bytes() in objects
    assert f"{REPOSITORY} (commit " in rehearsal.uploaded and "private" in rehearsal.uploaded
    assert "would go to the hub" in rehearsal.output and REPOSITORY in rehearsal.output


def test_the_card_tells_of_both_trainings_and_of_the_accuracy(rehearsal):
    card = ModelCard.load(rehearsal.stage("ppo") / "upload" / "README.md")
    assert card.data.tags == ["verl", "sft", "ppo"] and card.data.base_model is None
    found = json.loads((rehearsal.stage("eval") / "eval.json").read_text())["models"]["ppo"]
    [result] = card.data.eval_results
    assert (result.metric_value, result.metric_name) == (round(100 * found["accuracy"], 2), "accuracy (%), 8 problems")
    for stage, first in ("sft", "MODEL=tiny"), ("ppo", "INIT=sft"):
        course = metrics.course(stage, metrics.read(rehearsal.stage(stage) / "metrics.jsonl"))
        assert course in card.text and course in rehearsal.output and f"make {stage} {first} PROFILE=tiny GPUS=2" in card.text
    assert str(rehearsal.folder.parent) not in card.text


def test_wandb_is_kept_offline_in_the_run_folder(rehearsal):
    for stage in ("sft", "ppo"):
        assert list(rehearsal.stage(stage).glob("wandb/offline-run-*/*.wandb"))


def test_no_secret_is_in_any_file_or_in_the_output(rehearsal):
    for secret in rehearsal.secrets:
        assert secret not in rehearsal.output + rehearsal.uploaded
        for file in rehearsal.folder.rglob("*"):
            if file.is_file():
                assert secret.encode() not in file.read_bytes(), file


def test_no_process_is_left(rehearsal):
    assert rehearsal.left_running == []


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_trainers_shards_are_compared_with_the_model_that_they_started_from(rehearsal, stage, tmp_path):
    import torch
    from safetensors.torch import load_file

    shards = newest_checkpoint(rehearsal.stage(stage), stage).path / next(iter(checkpoints.mergeable(stage)))
    base = merge.base_of(shards)
    assert base == (rehearsal.folder / "models" / "tiny" if stage == "sft" else rehearsal.stage("sft") / "merged")
    assert merge.equal_to_base(shards, base) is False
    # As a training that changes nothing would have left them.
    weights = load_file(base / "model.safetensors")
    for rank in range(2):
        name = f"model_world_size_2_rank_{rank}.pt"
        tensors = torch.load(shards / name, weights_only=False)
        for key in tensors.keys() & weights.keys():
            tensors[key].to_local().copy_(weights[key].chunk(2)[rank])
        torch.save(tensors, tmp_path / name)
    assert merge.equal_to_base(tmp_path, base) is True
