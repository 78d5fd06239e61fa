"""The merge stage: verl.model_merger joins a checkpoint's shards into a Hugging Face model, which is completed and tried out.
    python -m bridge.stages.merge [BASE_MODEL_FOLDER] CHECKPOINT_FOLDER OUTPUT_FOLDER
A training that changed no weight is not merged: what verl's merger makes of LoRA's shards is the base model."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bridge.compose import flatten
from bridge.errors import UsageError, exit_status, full_disk_explained, refuse, say
from bridge.pages import page
from bridge.plan import Plan
from bridge.runs import checkpoints, record
from bridge.settings import Settings

# A problem in GSM8K's form, to see that the merged model answers at all.
QUESTION = "Tom has 3 apples and buys 4 more. How many apples does he have?"
ANSWER_TOKENS = 32


def plan(settings: Settings, env: Mapping[str, str]) -> Plan:
    """Find the checkpoint and say what to run. A UsageError: no such stage, step or folder, or nothing whole in it."""
    if settings.ckpt and (settings.step or settings.stage in ("sft", "ppo")):
        raise UsageError("CKPT= names a checkpoint by its folder, STAGE= and STEP= one of this run. Give one or the other.")
    if settings.ckpt:
        stage, shards, notes = "ckpt", shards_of(settings.ckpt), []
    else:
        # The last of the chain that has a checkpoint with whole weights.
        stage = settings.stage or next((stage for stage in ("ppo", "sft") if any(
            found.complete for found in list_mergeable(settings, stage))), "sft")
        if stage == "base":
            raise UsageError("STAGE=base: the base model needs no merging (only eval takes it). Use sft, ppo or ckpt.")
        if stage == "ckpt":
            raise UsageError("STAGE=ckpt goes with CKPT=, the folder of the checkpoint.")
        checkpoint = checkpoint_of(settings, stage)
        notes = [f"warning: {newer.path.name} is newer but incomplete ({newer.faults[0]})" for newer in
                 list_mergeable(settings, stage) if newer.step > checkpoint.step and settings.step is None]
        if working := record.holder(settings.stage_dir(stage)):
            notes.append(f"warning: {stage} still trains ({working}): step {checkpoint.step} may not be its last")
        shards = checkpoint.path / next(iter(checkpoints.mergeable(stage)))
    output, base = settings.merged_dir(stage), base_of(shards)
    if base is None:
        notes.append("warning: no run.json says which model this training started from, so the two are not compared")
    folders = [str(folder) for folder in (base, shards, output) if folder]
    return Plan([sys.executable, "-u", "-m", "bridge.stages.merge", *folders],
                {"WORK_DIR": str(settings.work_dir), "HF_HUB_OFFLINE": "1"},
                settings.stage_dir(stage) / "merge", notes=[f"merge: {shards} -> {output}", *notes])


def list_mergeable(settings: Settings, stage: str) -> list[checkpoints.Checkpoint]:
    """The checkpoints of this run, judged by what merging needs of them."""
    return checkpoints.list_checkpoints(settings.stage_dir(stage) / "checkpoints", checkpoints.mergeable(stage), loader=False)


def checkpoint_of(settings: Settings, stage: str) -> checkpoints.Checkpoint:
    """The checkpoint of STEP=, or the newest one with whole weights."""
    found = list_mergeable(settings, stage)
    wanted = [checkpoint for checkpoint in found if settings.step in (None, checkpoint.step)]
    if not (complete := [checkpoint for checkpoint in wanted if checkpoint.complete]):
        raise UsageError(*page("no_checkpoint.txt", stage=stage, settings=settings, found=found, wanted=wanted).split("\n"))
    return complete[-1]


def shards_of(folder: Path) -> Path:
    """The folder of model shards in any folder that verl wrote: global_step_N, or actor inside it."""
    if not folder.is_dir():
        raise UsageError(f"CKPT={folder} is no folder. Name one that verl wrote, e.g. .../global_step_58.")
    shards = folder / "actor" if (folder / "actor").is_dir() else folder
    if faults := checkpoints.shard_faults(shards, kinds=("model",)):
        raise UsageError(f"CKPT={folder} is no whole checkpoint of verl: {'; '.join(faults)}. Name a folder like "
                         ".../global_step_58 (or .../global_step_435/actor).")
    if checkpoints.is_value_model(shards):
        raise UsageError(f"CKPT={folder} holds a value function, which writes no text. PPO's model is in the folder actor; "
                         "critic is its value function.")
    return shards


def run_of(shards: Path) -> Path:
    """The folder of the training that saved these shards."""
    return (shards.parent if shards.name == "actor" else shards).parent.parent


def base_of(shards: Path) -> Path | None:
    """The folder of the model that a training started from, as the run.json beside its checkpoints says; None if none does."""
    run = run_of(shards)
    recorded = record.read(run)
    if not recorded or not recorded.get("config"):
        return None
    # The run is WORK_DIR/runs/RUN/STAGE, also where WORK_DIR was moved; or the run alone was.
    configs = [flatten(config) for config in (record.moved(recorded, run.parent.parent.parent)[0], recorded["config"])]
    names = [config.get("model.partial_pretrain") or config.get("actor_rollout_ref.model.path") for config in configs]
    found = [Path(name) for name in names if name]
    return next((folder for folder in found if folder.is_dir()), found[0] if found else None)


def main() -> None:
    """Merge, complete, verify; the output folder appears whole or not at all, and one that was there stays until then."""
    *base, shards, output = map(Path, sys.argv[1:])
    temporary, older = (output.with_name(output.name + ending) for ending in (".tmp", ".old"))
    if older.is_dir() and not output.exists():
        # An earlier merge was killed between its two renames.
        os.rename(older, output)
    for left in (temporary, older):
        shutil.rmtree(left, ignore_errors=True)
    refuse_damaged(shards)
    same = equal_to_base(shards, *base) if base else False
    if same is None:
        say(f"warning: {base[0]}, which this training started from, is gone or holds no safetensors with these names: whether "
            "the training changed anything was not compared")
    elif same:
        raise UsageError(f"every weight in {shards} equals that of {base[0]}: this training changed nothing, so there is "
                         "nothing to merge (LoRA's adapters are not; or no learning rate was above 0).")
    # The model twice in bf16, as much as its shards in fp32.
    needed = sum(file.stat().st_size for file in shards.glob("model_world_size_*.pt"))
    if needed > shutil.disk_usage(output.parent).free:
        raise UsageError(f"too little disk: the merge needs {needed / 1e9:.3g} GB. {room_in(output.parent)}")
    raw = temporary / "raw"
    try:
        joined = subprocess.run([sys.executable, "-u", "-m", "verl.model_merger", "merge", "--backend", "fsdp",
                                 "--local_dir", str(shards), "--target_dir", str(raw)], check=False)
        if joined.returncode:
            raise UsageError(f"verl's merger failed (exit status {joined.returncode}); the reason is above. "
                             f"{room_in(output.parent)}")
        with full_disk_explained(lambda: room_in(output.parent)):
            complete_and_verify(raw, temporary)
            shutil.rmtree(raw)
            if output.exists():
                os.rename(output, older)
            os.rename(temporary, output)
            shutil.rmtree(older, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"merged: {output} ({checkpoints.size(output) / 1e6:.1f} MB)")


def refuse_damaged(shards: Path) -> None:
    """Read the shards whole and refuse those that are not what was saved: torch.load takes a flipped bit without a word."""
    path, below = (shards.parent, "actor/model_") if shards.name == "actor" else (shards, "model_")
    if faults := checkpoints.damage(path, below):
        raise UsageError(f"{path} is damaged: {'; '.join(faults)}. Merge another step (STEP=), or move this folder away and "
                         "continue the run, so that it is saved again. Whatever was merged before stays as it was.")


def room_in(folder: Path) -> str:
    """What is free, and that nothing was lost."""
    return f"{shutil.disk_usage(folder).free / 1e9:.3g} GB are free in {folder}. Whatever was merged before stays as it was."


def equal_to_base(shards: Path, base: Path) -> bool | None:
    """Whether every weight of the base model is the same in the shards; None if the base is gone or no name is in both.
    In the precision of the shards: in the merged bf16 a learning rate of 1e-6 changes too little to be seen."""
    import torch
    from safetensors import safe_open
    from torch.distributed.tensor import DTensor

    world_size = len(list(shards.glob("model_world_size_*.pt")))
    ranks = [torch.load(shards / f"model_world_size_{world_size}_rank_{rank}.pt", map_location="cpu", mmap=True,
                        weights_only=False) for rank in range(world_size)]
    # LoRA wraps the modules that it adapts.
    names = {name.replace("base_model.model.", "").replace(".base_layer.", "."): name for name in ranks[0]}
    compared = False
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in names.keys() & set(weights.keys()):
                compared = True
                # Where ranks hold copies (a mesh of two dimensions) the shapes differ, and it is taken for trained.
                parts = (rank[names[name]] for rank in ranks)
                whole = torch.cat([part.to_local() if isinstance(part, DTensor) else part for part in parts])
                if not torch.equal(whole.float(), weights.get_tensor(name).float()):
                    return False
    return True if compared else None


def complete_and_verify(raw: Path, output: Path) -> None:
    """Load what verl's merger wrote (tied embeddings twice), write it properly, load that again and let it answer."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    def load(folder: Path):
        model, info = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.bfloat16, output_loading_info=True)
        if wrong := {kind: names for kind, names in info.items() if names}:
            raise UsageError(f"the merged model in {folder} does not load cleanly: {wrong}. The checkpoint is damaged or "
                             "was written by another version of verl.")
        return model

    model = load(raw)
    tokenizer = AutoTokenizer.from_pretrained(raw)
    problems = []
    if infinite := [name for name, tensor in model.named_parameters() if not torch.isfinite(tensor).all()]:
        problems.append(f"weights that are not finite: {', '.join(infinite[:5])} (training diverged; try a lower rate)")
    saved = [tensor for file in raw.glob("*.safetensors") for name, tensor in load_file(file).items()
             if name in ("lm_head.weight", "model.embed_tokens.weight")]
    if model.config.tie_word_embeddings and len(saved) == 2 and not torch.equal(*saved):
        problems.append("the embeddings are tied, but the checkpoint holds two different ones")
    if not tokenizer.chat_template:
        problems.append("the tokenizer has no chat template (the base model's folder has to have one)")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        problems.append(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    refuse(problems)
    # Where it was trained is nobody's business on the hub.
    model.config._name_or_path = ""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)

    model = load(output)
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cuda" if torch.cuda.is_available() else "cpu")
    [answered] = chat([{"role": "user", "content": QUESTION}], max_new_tokens=ANSWER_TOKENS,
                      do_sample=False, temperature=None, top_p=None, top_k=None)
    tied = "yes" if model.config.tie_word_embeddings else "no"
    say(f"{model.num_parameters() / 1e6:.2f} M parameters; tied embeddings: {tied}")
    say(f"asked:    {QUESTION}")
    say(f"answered: {answered['generated_text'][-1]['content']!r}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
