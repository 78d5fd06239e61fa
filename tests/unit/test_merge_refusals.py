"""What the merge stage refuses: settings that contradict each other, and a merged model that is not whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from shards import started

from bridge import settings
from bridge.errors import UsageError
from bridge.stages import merge


def refused(env: dict[str, str], **changes: str) -> str:
    with pytest.raises(UsageError) as error:
        merge.plan(settings.read({**env, **changes}), {})
    return str(error.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"CKPT": "/x", "STAGE": "sft"}, "Give one or the other"),
    ({"CKPT": "/x", "STEP": "3"}, "Give one or the other"),
    ({"STAGE": "base"}, "the base model needs no merging"),
    ({"STAGE": "ckpt"}, "STAGE=ckpt goes with CKPT="),
    ({"CKPT": "/no/such"}, "CKPT=/no/such is no folder"),
    ({"STAGE": "ppo"}, "Run `make ppo` first (RUN=default)"),
])
def test_settings_that_name_no_checkpoint_are_refused(env, changes, message):
    assert message in refused(env, **changes)


def test_a_step_that_is_not_there_is_refused_with_those_that_are(env):
    folder = started(env, "sft", steps=(5, 9))
    (folder / "global_step_9" / "model_world_size_2_rank_1.pt").unlink()
    assert f"STEP=7: no such checkpoint in {folder}. There are: 5, 9 (incomplete)." in refused(env, STAGE="sft", STEP="7")
    assert f"{folder}/global_step_9 is incomplete: " in refused(env, STAGE="sft", STEP="9")
    assert "model_world_size_2_rank_1.pt is missing" in refused(env, STAGE="sft", STEP="9")


def test_a_critic_is_refused_by_its_folder(env):
    folder = started(env, "ppo", steps=(1,))
    critic = folder / "global_step_1" / "critic"
    torch.save({"score.weight": torch.zeros(2)}, critic / "model_world_size_2_rank_0.pt")
    assert "holds a value function, which writes no text" in refused({"WORK_DIR": env["WORK_DIR"]}, CKPT=str(critic))


def test_shards_that_are_not_what_was_saved_are_refused(env):
    path = started(env, "sft", steps=(5,)) / "global_step_5"
    merge.refuse_damaged(path)
    shard = path / "model_world_size_2_rank_0.pt"
    torch.save({"x": torch.ones(64)}, shard)
    with pytest.raises(UsageError, match=f"{path} is damaged: {shard.name} .*Merge another step"):
        merge.refuse_damaged(path)


# ---- what verl's merger left


@pytest.fixture
def raw(prepared, tmp_path) -> Path:
    """The tiny model, as verl's merger could have left it."""
    return shutil.copytree(prepared / "models" / "tiny", tmp_path / "raw")


def change_weights(folder: Path, change) -> None:
    """Write the weights again after `change` was called with {name: tensor}."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


NORM, EMBEDDINGS, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"


def diverged(folder: Path) -> None:
    change_weights(folder, lambda weights: weights[NORM].fill_(torch.nan))


def without_a_weight(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop(NORM))


def with_a_strange_weight(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update(strange=torch.zeros(2)))


def with_two_embeddings(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.update({HEAD: weights[EMBEDDINGS] + 1}))


def without_a_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    change_json(folder / "tokenizer_config.json", chat_template=None)


def with_fewer_embeddings_than_tokens(folder: Path) -> None:
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"] - 8
    change_json(folder / "config.json", vocab_size=vocabulary)
    change_weights(folder, lambda weights: weights.update({EMBEDDINGS: weights[EMBEDDINGS][:vocabulary].clone()}))


@pytest.mark.parametrize(("damage", "message"), [
    (diverged, f"weights that are not finite: {NORM} (training diverged; try a lower rate)"),
    (without_a_weight, "does not load cleanly: {'missing_keys': ['model.norm.weight']}"),
    (with_a_strange_weight, "does not load cleanly: {'unexpected_keys': ['strange']}"),
    (with_two_embeddings, "the embeddings are tied, but the checkpoint holds two different ones"),
    (without_a_chat_template, "the tokenizer has no chat template"),
    (with_fewer_embeddings_than_tokens, "the tokenizer has "),
], ids=lambda value: value.__name__ if callable(value) else "")
def test_a_merged_model_that_is_not_whole_is_refused(raw, tmp_path, damage, message):
    damage(raw)
    with pytest.raises(UsageError) as error:
        merge.complete_and_verify(raw, tmp_path / "merged")
    assert message in str(error.value)
    assert not (tmp_path / "merged").exists()
