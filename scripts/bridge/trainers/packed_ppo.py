"""[image] PPO without waste: logits of the answers' tokens only, attention told where rows begin, the loss by groups of rows.
verl 0.5.0 computes the prompts' logits too, looks for the rows' bounds in every layer, and has another loss where micro batches
are counted in tokens than where in rows. Part of bridge.trainers.speedups; what is computed is verl's.
"""

from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F

from bridge.trainers.packed_settings import averages_groups
from bridge.trainers.packing import flash_attention_kwargs, group_weights, pack, packed_logits


def prediction_mask(micro_batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Whether a token of the answer stands after this one: [rows, answer tokens], of the tokens one before the answer's."""
    answers = micro_batch["responses"].size(1)
    attention_mask = micro_batch["attention_mask"].bool()
    return attention_mask[:, -answers - 1:-1] & attention_mask[:, -answers:]


def pack_responses(micro_batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A micro batch of PPO end to end, with the logits of the tokens before the answers' tokens."""
    predicts = prediction_mask(micro_batch)
    return pack(micro_batch, F.pad(predicts, (micro_batch["attention_mask"].size(1) - predicts.size(1) - 1, 1)))


def unpack(values: torch.Tensor, micro_batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Values of the packed predictions as [rows, answer tokens]; 0 at padding, which verl's losses mask."""
    predicts = prediction_mask(micro_batch)
    return values.new_zeros(predicts.shape).masked_scatter(predicts, values)


def forward_log_probs(actor, micro_batch: Mapping[str, torch.Tensor], temperature: float,
                      calculate_entropy: bool = False) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What verl's DataParallelPPOActor._forward_micro_batch computes, with logits of the answers' tokens only.

    Returns entropy (None unless asked for) and log_probs, [rows, answer tokens].
    """
    from verl.utils.torch_functional import logprobs_from_logits

    packed = pack_responses(micro_batch)
    with torch.autocast(device_type=actor.device_name, dtype=torch.bfloat16):
        logits = packed_logits(actor.actor_module, packed)
        if temperature != 1:
            logits.div_(temperature)
        # In place: the gradient is written over the logits, which entropy still needs.
        log_probs = logprobs_from_logits(logits, packed["labels"], inplace_backward=not calculate_entropy)
        entropy = actor.compute_entropy_from_logits(logits) if calculate_entropy else None
    return None if entropy is None else unpack(entropy, micro_batch), unpack(log_probs, micro_batch)


def forward_values(critic, micro_batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """verl's DataParallelPPOCritic._forward_micro_batch without a wait for the GPU in each layer. [rows, answer tokens]."""
    packed = pack_responses(micro_batch)

    def with_cu_seqlens(_model, args: tuple, options: dict) -> tuple[tuple, dict]:
        return args, {**options, **flash_attention_kwargs(packed)}

    # transformers' models with a head for tokens do not hand on what is for the attention alone.
    hook = critic.critic_module.base_model.register_forward_pre_hook(with_cu_seqlens, with_kwargs=True)
    try:
        with torch.autocast(device_type=critic.device_name, dtype=torch.bfloat16):
            values = critic.critic_module(input_ids=packed["input_ids"].unsqueeze(0),
                                          position_ids=packed["position_ids"].unsqueeze(0), use_cache=False).logits
    finally:
        hook.remove()
    return unpack(values.flatten()[packed["logits_to_keep"]], micro_batch)


def by_groups(update: Callable) -> Callable:
    """verl's update of actor or critic with the loss of micro batches of rows where they are counted in tokens.

    In a micro batch of `ppo_micro_batch_size_per_gpu` rows a token weighs 1 / (tokens of its group of rows). Counted in tokens,
    verl weighs tokens of groups with longer answers more. Here a token keeps its group's weight whichever rows are computed
    together. Does nothing where the loss is another than verl's default.
    """
    def grouped_update(worker, data) -> dict[str, Any]:
        config, rows, mask = worker.config, worker.config.ppo_micro_batch_size_per_gpu, data.batch["response_mask"]
        if not averages_groups(config):
            return update(worker, data)
        # verl's losses and metrics multiply with the mask. It weighs a micro batch by its share of the mini batch's rows: of
        # a mean over rows of sums over tokens this makes the same sum, however the rows are divided.
        data.batch["response_mask"] = mask * (rows * group_weights(mask.sum(1), rows)).unsqueeze(1)
        worker.config = copy(config)
        worker.config.loss_agg_mode = "seq-mean-token-sum"
        try:
            return update(worker, data)
        finally:
            worker.config, data.batch["response_mask"] = config, mask

    return grouped_update


def apply() -> None:
    """Let verl's actor and critic compute by the above, where model and settings allow it."""
    from verl.workers.actor.dp_actor import DataParallelPPOActor
    from verl.workers.critic.dp_critic import DataParallelPPOCritic

    verls_actor, verls_critic = DataParallelPPOActor._forward_micro_batch, DataParallelPPOCritic._forward_micro_batch

    def can_pack(worker, model: torch.nn.Module, micro_batch: Mapping) -> bool:
        # Models that hand no bounds of rows to their attention compute as verl has it.
        return (worker.use_remove_padding and worker.ulysses_sequence_parallel_size == 1 and
                getattr(model, "_supports_attention_backend", False) and "multi_modal_inputs" not in micro_batch)

    def actor_forward(actor, micro_batch, temperature, calculate_entropy=False):
        ours = can_pack(actor, actor.actor_module, micro_batch) and not (
            actor.use_fused_kernels or actor.config.entropy_checkpointing)
        return (forward_log_probs if ours else verls_actor)(actor, micro_batch, temperature, calculate_entropy)

    def critic_forward(critic, micro_batch):
        # LoRA's model and TRL's have other bodies.
        ours = can_pack(critic, critic.critic_module, micro_batch) and not (
            hasattr(critic.critic_module, "peft_config") or hasattr(critic.critic_module, "v_head"))
        return (forward_values if ours else verls_critic)(critic, micro_batch)

    DataParallelPPOActor._forward_micro_batch = actor_forward
    DataParallelPPOCritic._forward_micro_batch = critic_forward
    DataParallelPPOActor.update_policy = by_groups(DataParallelPPOActor.update_policy)
    DataParallelPPOCritic.update_critic = by_groups(DataParallelPPOCritic.update_critic)
