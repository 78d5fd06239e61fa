"""[image] PPO's forwards without waste: logits of the answers' tokens only, and attention told where rows begin.

verl 0.5.0 removes the padding, but computes the logits of the prompts too, and lets transformers look for the bounds of the
rows in every layer. Part of bridge.speedups; what is computed is verl's.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from bridge.packing import bounds_of, logits_looked_at, pack


def predicting(micro_batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Whether a token of the answer stands after this one: [rows, answer tokens], of the tokens one before the answer's."""
    answers = micro_batch["responses"].size(1)
    there = micro_batch["attention_mask"].bool()
    return there[:, -answers - 1:-1] & there[:, -answers:]


def pack_answers(micro_batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """A micro batch of PPO end to end; looked at are the tokens before the answers' tokens."""
    predicts = predicting(micro_batch)
    return pack(micro_batch, F.pad(predicts, (micro_batch["attention_mask"].size(1) - predicts.size(1) - 1, 1)))


def in_rows(values: torch.Tensor, micro_batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Values of the tokens looked at, [rows, answer tokens]; 0 at padding, which verl's losses mask."""
    predicts = predicting(micro_batch)
    return values.new_zeros(predicts.shape).masked_scatter(predicts, values)


def forward_answers(actor, micro_batch: Mapping[str, torch.Tensor], temperature: float,
                    calculate_entropy: bool = False) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What verl's DataParallelPPOActor._forward_micro_batch computes, with logits of the answers' tokens only.

    verl computes those of the prompts too, and throws away what it makes of them.

    Returns:
        entropy (None unless asked for) and log_probs, [rows, answer tokens].
    """
    from verl.utils.torch_functional import logprobs_from_logits

    packed = pack_answers(micro_batch)
    with torch.autocast(device_type=actor.device_name, dtype=torch.bfloat16):
        logits = logits_looked_at(actor.actor_module, packed)
        if temperature != 1:
            logits.div_(temperature)
        # In place: the gradient is written over the logits, which entropy still needs.
        log_probs = logprobs_from_logits(logits, packed["labels"], inplace_backward=not calculate_entropy)
        entropy = actor.compute_entropy_from_logits(logits) if calculate_entropy else None
    return None if entropy is None else in_rows(entropy, micro_batch), in_rows(log_probs, micro_batch)


def forward_values(critic, micro_batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What verl's DataParallelPPOCritic._forward_micro_batch computes, without waiting for the GPU in every layer.

    Returns:
        values [rows, answer tokens].
    """
    packed = pack_answers(micro_batch)

    def told(_model, args: tuple, options: dict) -> tuple[tuple, dict]:
        return args, {**options, **bounds_of(packed)}

    # transformers' models with a head for tokens do not hand on what is for the attention alone.
    hook = critic.critic_module.base_model.register_forward_pre_hook(told, with_kwargs=True)
    try:
        with torch.autocast(device_type=critic.device_name, dtype=torch.bfloat16):
            values = critic.critic_module(input_ids=packed["input_ids"].unsqueeze(0),
                                          position_ids=packed["position_ids"].unsqueeze(0), use_cache=False).logits
    finally:
        hook.remove()
    return in_rows(values.flatten()[packed["looked_at"]], micro_batch)


def apply() -> None:
    """Let verl's actor and critic compute by the two above, where model and settings are the usual ones."""
    from verl.workers.actor.dp_actor import DataParallelPPOActor
    from verl.workers.critic.dp_critic import DataParallelPPOCritic

    verls_actor, verls_critic = DataParallelPPOActor._forward_micro_batch, DataParallelPPOCritic._forward_micro_batch

    def usual(worker, model: torch.nn.Module, micro_batch: Mapping) -> bool:
        # Models that hand no bounds of rows to their attention compute as verl has it.
        return (worker.use_remove_padding and worker.ulysses_sequence_parallel_size == 1 and
                getattr(model, "_supports_attention_backend", False) and "multi_modal_inputs" not in micro_batch)

    def actor_forward(actor, micro_batch, temperature, calculate_entropy=False):
        ours = usual(actor, actor.actor_module, micro_batch) and not (
            actor.use_fused_kernels or actor.config.entropy_checkpointing)
        return (forward_answers if ours else verls_actor)(actor, micro_batch, temperature, calculate_entropy)

    def critic_forward(critic, micro_batch):
        # LoRA's model and TRL's have other bodies.
        ours = usual(critic, critic.critic_module, micro_batch) and not (
            hasattr(critic.critic_module, "peft_config") or hasattr(critic.critic_module, "v_head"))
        return (forward_values if ours else verls_critic)(critic, micro_batch)

    DataParallelPPOActor._forward_micro_batch = actor_forward
    DataParallelPPOCritic._forward_micro_batch = critic_forward
