"""[image] What the tuned profile changes inside the trainer's processes: the same arithmetic with fewer kernels.

verl imports this module in every process that trains before it builds a model (its own hook, `model.external_lib`); importing
it applies everything. On a machine without a GPU it changes nothing.
"""

import gc
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bridge.packing import logits_looked_at, pack


def fuse_layers(model_type: str) -> None:
    """Let transformers build models of this type from Liger's fused RMSNorm, RoPE and SwiGLU; a type it does not know stays.

    Actor and critic both, which verl's own `use_liger` is not: it reaches the actor only. Liger's loss stays out: verl
    computes log-probabilities from the logits.
    """
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel

    _apply_liger_kernel(model_type, rope=True, rms_norm=True, swiglu=True, cross_entropy=False,
                        fused_linear_cross_entropy=False)


def fuse_adamw() -> None:
    """Let AdamW be one kernel that reads and writes every value once, unless the caller chooses otherwise."""
    plain = torch.optim.AdamW

    class FusedAdamW(plain):
        def __init__(self, params, **options):
            super().__init__(params, **{"fused": True, **options})

    torch.optim.AdamW = FusedAdamW


def forward_answers(actor, micro_batch: Mapping[str, torch.Tensor], temperature: float,
                    calculate_entropy: bool = False) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What verl's DataParallelPPOActor._forward_micro_batch computes, with logits of the answers' tokens only.

    verl computes those of the prompts too, and throws away what it makes of them.

    Returns:
        entropy (None unless asked for) and log_probs, [rows, answer tokens]; 0 at padding, which verl's losses mask.
    """
    from verl.utils.torch_functional import logprobs_from_logits

    answers = micro_batch["responses"].size(1)
    there = micro_batch["attention_mask"].bool()
    # Each token is predicted by the one before it.
    predicts = there[:, -answers - 1:-1] & there[:, -answers:]
    packed = pack(micro_batch, F.pad(predicts, (there.size(1) - answers - 1, 1)))
    with torch.autocast(device_type=actor.device_name, dtype=torch.bfloat16):
        logits = logits_looked_at(actor.actor_module, packed)
        if temperature != 1:
            logits.div_(temperature)
        # In place: the gradient is written over the logits, which entropy still needs.
        log_probs = logprobs_from_logits(logits, packed["labels"], inplace_backward=not calculate_entropy)
        entropy = actor.compute_entropy_from_logits(logits) if calculate_entropy else None

    def in_rows(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(predicts.shape).masked_scatter(predicts, values)

    return None if entropy is None else in_rows(entropy), in_rows(log_probs)


def let_actor_look_at_answers_only() -> None:
    """Let verl's actor compute log-probabilities by forward_answers, where its settings leave the usual way."""
    from verl.workers.actor.dp_actor import DataParallelPPOActor

    plain = DataParallelPPOActor._forward_micro_batch

    def forward(actor, micro_batch, temperature, calculate_entropy=False):
        usual = actor.use_remove_padding and not (actor.use_ulysses_sp or actor.use_fused_kernels or
                                                  actor.config.entropy_checkpointing or "multi_modal_inputs" in micro_batch)
        return (forward_answers if usual else plain)(actor, micro_batch, temperature, calculate_entropy)

    DataParallelPPOActor._forward_micro_batch = forward


def open_multi_step_runner() -> None:
    """Give vLLM's multi-step model runner the attribute through which verl hands over the weights: `model`."""
    from vllm.worker.multi_step_model_runner import MultiStepModelRunner

    MultiStepModelRunner.model = property(lambda runner: runner._base_model_runner.model)


def open_vllm(**options: Any):
    """vLLM's engine with verl's options, for a process that trains too.

    No cache of prompts' keys and values: GSM8K's prompts share a few tokens only, and no answer can come from those of the
    weights before. What is built by now is no garbage: Python need not look through it again after every few answers.
    """
    from vllm import LLM

    engine = LLM(**{**options, "enable_prefix_caching": False})
    gc.collect()
    gc.freeze()
    if not options["enable_sleep_mode"]:
        # vLLM keeps its memory between the steps (free_cache_engine: false): PyTorch has no one to give its own back to, and
        # may grow its blocks instead of breaking memory into pieces, which the allocator of a vLLM that sleeps forbids.
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        torch.cuda.empty_cache = lambda: None
    return engine


def let_verl_open_vllm_so() -> None:
    """Let verl's rollout make its engine by open_vllm."""
    from verl.workers.rollout.vllm_rollout import vllm_rollout_spmd

    vllm_rollout_spmd.LLM = open_vllm


def apply() -> None:
    """All of the above."""
    fuse_layers(json.loads((Path(os.environ["BRIDGE_MODEL_DIR"]) / "config.json").read_text())["model_type"])
    fuse_adamw()
    let_actor_look_at_answers_only()
    open_multi_step_runner()
    let_verl_open_vllm_so()


if torch.cuda.is_available():
    apply()
