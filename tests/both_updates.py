"""PPO's actor and critic by verl's workers on FSDP: with the profile tutorial, and with tuned, on the same model and rows.

    python tests/both_updates.py --ranks N OUT.pt

Makes a small random Llama, starts N ranks over gloo, and writes OUT.pt: {variant: {"actor" and "critic": {"outputs": what is
computed before the update, {name: [rows, answer tokens]}, "losses": of each mini batch, the mean over the ranks, "gradients"
(before clipping) of each mini batch: {name: tensor}, "parameters" after the update: {name: tensor}, "forwards": of each mini
batch on each rank, "needed": the same if a rank had to ask no other}}}.
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ranks import in_ranks, prepare, whole

PROMPT, ANSWER = 24, 40
# Of one rank: rows of a group, of a mini batch, of a batch. A group has long answers and short ones.
GROUP_ROWS, MINI_ROWS, ROWS = 2, 4, 8
LONG = [40, 3, 38, 31, 39, 36, 2, 34]
SHORT = [1, 9, 2, 12, 3, 1, 8, 2]
# As few tokens as verl allows: the ranks with long rows need more forwards than those with short ones.
BUDGET = PROMPT + ANSWER
TUTORIAL, TUNED, TOKEN_MEAN = "tutorial", "tuned", "tuned, but verl's token mean"


def compose_config(work_dir: Path, profile: list[str], ranks: int) -> Any:
    """A profile in small, on CPU."""
    from omegaconf import OmegaConf

    from bridge.compose import compose

    names = {"WORK_DIR": str(work_dir), "BRIDGE_MODEL_DIR": str(work_dir / "models" / "tiny"),
             "BRIDGE_STAGE_DIR": str(work_dir / "ppo"), "BRIDGE_RUN_NAME": "r", "WANDB_PROJECT": "p"}
    small = {"data.train_batch_size": ROWS * ranks}
    for part in ("actor_rollout_ref.actor", "critic"):
        small |= {f"{part}.ppo_mini_batch_size": MINI_ROWS * ranks, f"{part}.ppo_micro_batch_size_per_gpu": GROUP_ROWS,
                  f"{part}.ppo_max_token_len_per_gpu": BUDGET, f"{part}.optim.lr": 1e-4}
    small |= {"actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": BUDGET, "critic.forward_max_token_len_per_gpu": BUDGET,
              # All three terms of the loss, which the tutorial has the first of.
              "actor_rollout_ref.actor.entropy_coeff": 0.1, "actor_rollout_ref.actor.use_kl_loss": True,
              # As in the tutorial. On CPU in float32 FSDP2 cannot do without: backward finds its weights gathered anew.
              "actor_rollout_ref.model.enable_gradient_checkpointing": True, "critic.model.enable_gradient_checkpointing": True}
    return OmegaConf.create(compose("ppo", [*profile, "device/ppo=cpu", *(f"{key}={value}" for key, value in small.items())],
                                    names))


def rows_of(rank: int, ranks: int, vocabulary: int) -> Any:
    """This rank's rows of a batch, divided as verl divides it. Ranks with long answers and with short ones by turns."""
    from verl import DataProto

    generator = torch.Generator().manual_seed(0)
    answers = torch.tensor([LONG, SHORT] * ranks)[:ranks].flatten()
    prompts = torch.where(answers > 12, 18, 6) + torch.randint(6, answers.shape, generator=generator)
    positions = torch.arange(PROMPT + ANSWER)
    mask = ((positions >= PROMPT - prompts.unsqueeze(1)) & (positions < PROMPT + answers.unsqueeze(1))).long()
    ids = torch.randint(vocabulary, mask.shape, generator=generator)
    noise = {name: torch.randn(len(mask), ANSWER, generator=generator) for name in ("advantages", "returns", "old", "reference")}
    batch = DataProto.from_dict({
        "input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "responses": ids[:, PROMPT:],
        "response_mask": mask[:, PROMPT:], **noise}, meta_info={
            "temperature": 1.0, "global_token_num": mask.sum(1).tolist()})
    return batch.chunk(ranks)[rank]


def gathered(value: Any) -> list[Any]:
    """A value of each rank."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def seen_update(module: torch.nn.Module, place: Any, update: Any, batch: Any) -> dict[str, Any]:
    """Update, and see what happens in it. `place`: verl's module with the function that clips."""
    backward, clip = torch.Tensor.backward, place.fsdp2_clip_grad_norm_
    losses, forwards, gradients = [0.0], [0], []

    def add_loss(loss, *arguments, **options):
        losses[-1] += loss.item()
        return backward(loss, *arguments, **options)

    def look_and_clip(*arguments, **options):
        gradients.append({name: whole(value.grad) for name, value in module.named_parameters()})
        losses.append(0.0)
        forwards.append(0)
        return clip(*arguments, **options)

    def count(*_):
        forwards[-1] += 1

    hook = module.register_forward_hook(count)
    with patch.object(torch.Tensor, "backward", add_loss), patch.object(place, "fsdp2_clip_grad_norm_", look_and_clip):
        update(batch)
    hook.remove()
    from verl.utils.seqlen_balancing import rearrange_micro_batches

    needed = [len(rearrange_micro_batches(mini.batch, BUDGET, same_micro_num_in_dp=False)[0]) for mini in batch.split(MINI_ROWS)]
    return {"losses": torch.tensor(gathered(losses[:-1])).mean(0), "gradients": gradients,
            "parameters": {name: whole(value) for name, value in module.named_parameters()},
            "forwards": gathered(forwards[:-1]), "needed": gathered(needed)}


def run(config: Any, batch: Any, first: dict[str, Any]) -> dict[str, Any]:
    """Both workers of verl once through a step. `first`: this rank's outputs of the variant before, filled by the first."""
    from verl.workers.actor import dp_actor
    from verl.workers.critic import dp_critic
    from verl.workers.fsdp_workers import ActorRolloutRefWorker, CriticWorker

    actor, critic = ActorRolloutRefWorker(config.actor_rollout_ref, role="actor"), CriticWorker(config.critic)
    actor.init_model()
    # verl draws the head of the values anew.
    torch.manual_seed(0)
    critic.init_model()
    outputs = [actor.compute_log_prob(batch), critic.compute_values(batch)]
    if not first:
        first.update({**outputs[0].batch, **outputs[1].batch})
    answered, noise = batch.batch["response_mask"], batch.batch
    # Near what the model says, so that some tokens are clipped and others are not.
    batch = batch.union(type(batch).from_dict({
        "old_log_probs": first["old_log_probs"] + 0.2 * noise["old"], "values": first["values"] + 0.5 * noise["old"],
        "ref_log_prob": first["old_log_probs"] + 0.2 * noise["reference"]}))
    found = {}
    for name, module, place, update, output in (
            ("actor", actor.actor_module_fsdp, dp_actor, actor.update_actor, outputs[0]),
            ("critic", critic.critic_module, dp_critic, critic.update_critic, outputs[1])):
        found[name] = {"outputs": {key: torch.cat(gathered(value * answered)) for key, value in output.batch.items()},
                       **seen_update(module, place, update, batch)}
    return found


def work(device: str, work_dir: Path, out: Path) -> None:
    """What each rank does."""
    from transformers import AutoConfig
    from verl.workers.actor.dp_actor import DataParallelPPOActor
    from verl.workers.critic.dp_critic import DataParallelPPOCritic

    from bridge.trainers import packed_ppo

    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    vocabulary = AutoConfig.from_pretrained(work_dir / "models" / "tiny").vocab_size
    verls = [(DataParallelPPOActor, "update_policy", DataParallelPPOActor.update_policy),
             (DataParallelPPOCritic, "update_critic", DataParallelPPOCritic.update_critic)]
    results, first = {}, {}
    for name, profile in ((TUTORIAL, ["profile/ppo=tutorial"]), (TUNED, ["profile/ppo=tuned", "memory/ppo=80gb"]),
                          (TOKEN_MEAN, ["profile/ppo=tuned", "memory/ppo=80gb"])):
        if name == TUNED:
            # What importing bridge.trainers.speedups, the profile's external_lib, does where there is a GPU.
            packed_ppo.apply()
        with ExitStack() as stack:
            for owner, method, update in verls if name == TOKEN_MEAN else ():
                stack.enter_context(patch.object(owner, method, update))
            results[name] = run(compose_config(work_dir, profile, ranks), rows_of(rank, ranks, vocabulary), first)
    if rank == 0:
        torch.save(results, out)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--ranks", type=int, required=True)
    arguments = parser.parse_args()
    from bridge.trainers import on_cpu

    on_cpu.setup()
    import verl.workers.fsdp_workers  # noqa: F401 - once for all ranks

    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), num_hidden_layers=2, hidden_size=64, intermediate_size=128, head_dim=16)
        in_ranks(arguments.ranks, "cpu", work, Path(folder), arguments.out)


if __name__ == "__main__":
    main()
