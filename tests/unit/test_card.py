"""The card of a published model, and the terms of a Llama, from records as the stages write them."""

import json
import shutil
from pathlib import Path

import pytest
from hub_fixture import model_files, write_files
from huggingface_hub import ModelCard

from bridge import settings as settings_module
from bridge.errors import UsageError
from bridge.runs import record
from bridge.stages import card, upload
from door import recorded

CAPTURED = Path(__file__).with_name("captured")
LLAMA_README = b"---\nlicense: llama3.2\nextra_gated_fields:\n  Name: text\n---\n# Llama 3.2\n"
OF_DATA = ["python", "-m", "bridge.stages.data"]
SFT = ["python", "-m", "torch.distributed.run", "--nnodes=1", "--config-dir", "/home/alice/bridge/configs",
       "--config-name", "sft", "profile/sft=tuned", "++trainer.seed=7", "memory/sft=80gb", "trainer.n_gpus_per_node=8",
       "trainer.resume_mode=resume_path",
       "trainer.resume_from_path='/home/alice/work/runs/default/sft/checkpoints/global_step_5'", "optim.lr=2e-5",
       "+data.custom_cls.path=/home/alice/secret project/rows.py"]
PPO = ["python", "-m", "verl.trainer.main_ppo", "--config-name", "ppo", "profile/ppo=tuned", "algo=grpo",
       "custom_reward_function.path='/home/alice/rewards/mine.py'", "custom_reward_function.name='judge'",
       "trainer.n_gpus_per_node=8", "trainer.resume_mode=disable", "ray_init.num_cpus=96"]


class Work:
    """A WORK_DIR with a base model, data, and an SFT and a PPO model whose trainings and merges are recorded."""

    def __init__(self, work_dir, name="Llama-3.2-1B-Instruct", source="meta-llama/Llama-3.2-1B-Instruct", config=None,
                 **files):
        self.work_dir, self.config = work_dir, config or {}
        source_file = {".bridge-source.json": json.dumps({"source": source}).encode()} if source else {}
        self.base = write_files(work_dir / "models" / name, {**model_files(), **source_file, **files})
        self.data = write_files(work_dir / "data" / "gsm8k", {"train.parquet": b"train", "test.parquet": b"test"})
        self.write("data/gsm8k", attempts=[{"command": [*OF_DATA, "hub", str(self.data), "question", "answer", "number", "0"]}])
        self.sft = self.trained("sft", 10, SFT, self.base, "train/loss", [2.5, 1.25, 0.5, 0.25])
        self.ppo = self.trained("ppo", 30, PPO, self.sft, "critic/score/mean", [0.25, 0.5])

    def write(self, folder, **changes):
        (self.work_dir / folder).mkdir(parents=True, exist_ok=True)
        record.write_json(self.work_dir / folder / "run.json", recorded(work_dir=str(self.work_dir), **changes), [])

    def trained(self, stage, step, command, start, key, values):
        run = self.work_dir / "runs" / "default" / stage
        merged = write_files(run / "merged", {**model_files(), "config.json": json.dumps(
            {"model_type": "llama", "num_attention_heads": 4, "tie_word_embeddings": True, **self.config}).encode()})
        model = {"model": {"partial_pretrain": str(start)}, "optim": {"lr": 2e-5}}
        if stage == "ppo":
            model = {"actor_rollout_ref": {"model": {"path": str(start)}, "actor": {"optim": {"lr": 1e-6}}}, "critic": {}}
        self.write(f"runs/default/{stage}", config={
            **model, "data": {"train_files": str(self.data / "train.parquet"), "train_batch_size": 256}}, inputs={
            "seed": 7 if stage == "sft" else None, "data": {"train_files": [record.sha256(self.data / "train.parquet")]}},
            attempts=[{"command": command, "git_commit": "0123abc", "image": "/home/alice/images/bridge.sif",
                       "lock_sha256": "4567", "gpus": ["NVIDIA H100 80GB HBM3"] * 8, "host": "node17.site"}])
        # One step more than the checkpoint that was merged.
        (run / "metrics.jsonl").write_text("".join(
            json.dumps({"step": number * step // (len(values) - 1), key: value}) + "\n" for number, value in enumerate(values)))
        shards = run / "checkpoints" / f"global_step_{step * 2 // 3 if stage == 'sft' else step}"
        shards = shards / "actor" if stage == "ppo" else shards
        self.write(f"runs/default/{stage}/merge", attempts=[{
            "command": ["python", "-m", "bridge.stages.merge", str(start), str(shards), str(merged)],
            "started": "2026-01-02T00:00:00",
            "ended": "2026-01-02T00:01:00"}])
        return merged

    def evaluated(self, started="2026-01-03T00:00:00", **changes):
        self.write("runs/default/eval", inputs={"data": record.sha256(self.data / "test.parquet")},
                   attempts=[{"command": ["python"], "started": started}])
        figures = {"rows": 1319, "accuracy": 0.5, "accuracy_interval": [0.473, 0.527], "last_number_accuracy": 0.6,
                   "last_number_accuracy_interval": [0.57, 0.63], "mean_response_tokens": 90.0, "cut_off": 0.0,
                   "folder": "/x/merged"}
        record.write_json(self.work_dir / "runs/default/eval/eval.json", {
            "rows": 1319, "max_response_length": 256, "engine": "vllm 0.8.5", "models": {
                "base": {**figures, "accuracy": 0.4, "folder": str(self.base)}, "ppo": figures}, **changes}, [])

    def planned(self, repo, **env):
        env = {"WORK_DIR": str(self.work_dir), "HF_TOKEN": "hf_secret", "HF_REPO": repo,
               "HF_TOKEN_PATH": "/nonexistent/token", **env}
        return upload.plan(settings_module.read(env), env)


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path, **{"README.md": LLAMA_README, "LICENSE.txt": b"LLAMA 3.2 COMMUNITY LICENSE", "USE_POLICY.md": b""})


def test_the_front_matter_is_what_the_hub_reads(work):
    work.evaluated()
    made = ModelCard(card.make(work.ppo, "team/Llama-ours"))
    found = made.data.to_dict()
    assert {key: found[key] for key in ("base_model", "license", "datasets", "library_name", "pipeline_tag", "tags")} == {
        "base_model": "meta-llama/Llama-3.2-1B-Instruct", "license": "llama3.2", "datasets": ["openai/gsm8k"],
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["verl", "sft", "ppo"]}
    [result] = made.data.eval_results
    assert (made.data.model_name, result.metric_type, result.metric_value) == ("Llama-ours", "accuracy", 50.0)
    assert (result.dataset_type, result.dataset_split) == ("openai/gsm8k", "test")
    assert result.metric_name == "accuracy (%), 1319 problems"


def test_the_text_tells_how_it_was_made(work):
    work.evaluated()
    text = card.make(work.ppo, "team/Llama-ours")
    for part in ("**Built with Llama**", "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta",
                 "SFT: 6 steps, loss 2.500 -> 0.500. The checkpoint of step 6 was merged.",
                 "PPO: 30 steps, reward 0.250 -> 0.500. The checkpoint of step 30 was merged.",
                 "| `optim.lr` | 2e-05 |", "| `actor_rollout_ref.actor.optim.lr` | 1e-06 |",
                 "| Llama-ours | 50.00 % [47.30, 52.70] | 60.00 % [57.00, 63.00] |", "| base model | 40.00 % [47.30, 52.70] |",
                 'from_pretrained("team/Llama-ours"', "make merge STAGE=sft STEP=6", "make merge STAGE=ppo STEP=30",
                 "make sft MODEL=meta-llama/Llama-3.2-1B-Instruct PROFILE=tuned GPUS=8 SEED=7 'ARGS=optim.lr=2e-5 ",
                 "make ppo INIT=sft PROFILE=tuned ALGO=grpo GPUS=8 REWARD=.../mine.py:judge\n", "make data DATA_SOURCE=hub\n",
                 "Commit 0123abc; image bridge.sif; packages as in the requirements.lock of sha256 4567; NVIDIA H100 80GB HBM3."):
        assert part in text, text


def test_a_card_names_no_place_and_no_person(work, monkeypatch):
    work.evaluated(reward=["/home/alice/rewards/mine.py", "judge", {}])
    text = card.make(work.ppo, "team/Llama-ours")
    assert not any(word in text for word in ("/home", "alice", "secret project", "node17", str(work.work_dir))), text


def test_an_accuracy_of_another_model_is_not_on_the_card(work):
    work.evaluated(started="2026-01-01T00:00:00")
    text = card.make(work.ppo, "team/Llama-ours")
    assert "It was not measured." in text and "model-index" not in text
    assert "It was not measured." in card.make(work.sft, "team/Llama-ours")


def test_scores_of_a_reward_of_ones_own_are_no_accuracy(work):
    work.evaluated(reward=["/home/alice/rewards/mine.py", "judge", {}])
    text = card.make(work.ppo, "team/Llama-ours")
    assert "model-index" not in text and "| Llama-ours | 0.500 [0.473, 0.527] |" in text and "own, judge." in text


def test_data_that_were_replaced_since_are_not_named(work):
    (work.data / "train.parquet").write_bytes(b"others")
    found = ModelCard(card.make(work.sft, "team/Llama-ours"))
    assert found.data.datasets is None and "data of which no record is left" in found.text


def test_a_work_dir_that_was_moved_has_the_same_card(work, tmp_path_factory):
    before = card.make(work.ppo, "team/Llama-ours")
    moved = work.work_dir.rename(tmp_path_factory.mktemp("other") / "work")
    assert card.make(moved / "runs" / "default" / "ppo" / "merged", "team/Llama-ours") == before


def test_a_llama_under_another_name_is_refused_with_the_cure(work):
    with pytest.raises(UsageError) as caught:
        work.planned("team/ours")
    assert "HF_REPO=team/ours: this model was made from Llama 3.2" in str(caught.value)
    assert "Use HF_REPO=team/Llama-ours" in str(caught.value)
    work.planned("team/Llama-ours")


@pytest.mark.parametrize(("name", "source", "config", "files", "llama"), [
    ("Llama-3.2-1B-Instruct", None, {}, {}, "3.2"),
    ("mine", None, {}, {"README.md": LLAMA_README}, "3.2"),
    ("mine", None, {"vocab_size": 128256, "rope_scaling": {"factor": 32.0}}, {}, "3.2"),
    ("mine", None, {"vocab_size": 128256}, {}, "3"),
    ("Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-8B-Instruct", {}, {
        "README.md": b"---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n"}, "3"),
    ("Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-chat-hf", {}, {}, "2"),
    ("TinyLlama-1.1B-Chat-v1.0", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", {"vocab_size": 32000}, {}, None),
    ("Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", {"model_type": "qwen2"}, {}, None),
    ("SmolLM2-135M-Instruct", "smollm2", {}, {}, None),
    ("random-llama-3.2-1b", "random:llama-3.2-1b", {"vocab_size": 128256}, {}, None),
    ("tiny", "tiny", {}, {}, None),
])
def test_which_llama_a_model_was_made_from(tmp_path, name, source, config, files, llama):
    work = Work(tmp_path, name, source, config, **files)
    assert card.origin(work.ppo)[1].llama == card.origin(work.sft)[1].llama == llama
    refused = {"2": [], None: []}.get(llama, ["HF_REPO=team/ours"])
    assert [problem.partition(":")[0] for problem in card.term_problems(work.ppo, "team/ours")] == refused


def test_a_packaged_model_has_its_own_licence(tmp_path):
    found = ModelCard(card.make(Work(tmp_path, "SmolLM2-135M-Instruct", "smollm2").sft, "team/ours")).data
    assert (found.base_model, found.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


def test_ones_own_card_is_taken_if_it_says_what_the_licence_wants(work):
    (work.ppo / "README.md").write_text("# Mine\n")
    with pytest.raises(UsageError, match="does not say 'Built with Llama'"):
        work.planned("team/Llama-ours")
    (work.ppo / "README.md").write_text("# Mine\n\nBuilt with Llama\n")
    work.planned("team/Llama-ours")
    assert upload.published(work.ppo, "team/Llama-ours")["README.md"] == work.ppo / "README.md"


def test_the_licence_of_the_base_model_goes_along(work):
    found = upload.published(work.ppo, "team/Llama-ours")
    assert {found["LICENSE.txt"], found["USE_POLICY.md"]} == {work.base / "LICENSE.txt", work.base / "USE_POLICY.md"}
    assert found["README.md"].read_text() == card.make(work.ppo, "team/Llama-ours")
    assert not (work.ppo / "README.md").exists()


def test_a_card_of_the_base_model_that_cannot_be_read_is_refused(tmp_path):
    work = Work(tmp_path, **{"README.md": b"---\nlicense: [\n---\n"})
    with pytest.raises(UsageError, match="does not tell the base model's licence"):
        work.planned("team/Llama-ours")


def test_a_model_without_any_record_has_a_card(tmp_path):
    folder = write_files(tmp_path / "runs" / "default" / "ppo" / "merged", model_files())
    text = card.make(folder, "team/ours")
    assert ModelCard(text).data.license is None and "No record of it is left." in text


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_run_of_an_older_version_has_a_card_too(tmp_path, stage):
    run = tmp_path / "runs" / "default" / stage
    merged = write_files(run / "merged", model_files())
    shutil.copy(CAPTURED / f"begun_{stage}.json", run / "run.json")
    shards = run / "checkpoints" / "global_step_1"
    (run / "merge").mkdir()
    record.write_json(run / "merge" / "run.json", recorded(attempts=[{
        "command": ["python", "-m", "bridge.stages.merge", str(shards), str(merged)]}]), [])
    text = card.make(merged, "team/ours")
    assert f"make {stage} MODEL=.../tiny PROFILE=tiny GPUS=" in text and "trainer.save_freq=1" in text
