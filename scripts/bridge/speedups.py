"""[image] What the tuned profile changes inside the trainer's processes: the same arithmetic with fewer kernels.

verl imports this module in every process that trains before it builds a model (its own hook, `model.external_lib`); importing
it applies everything. On a machine without a GPU it changes nothing.
"""

import json
import os
from pathlib import Path

import torch


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


def open_multi_step_runner() -> None:
    """Give vLLM's multi-step model runner the attribute through which verl hands over the weights: `model`."""
    from vllm.worker.multi_step_model_runner import MultiStepModelRunner

    MultiStepModelRunner.model = property(lambda runner: runner._base_model_runner.model)


def apply() -> None:
    """All of the above."""
    fuse_layers(json.loads((Path(os.environ["BRIDGE_MODEL_DIR"]) / "config.json").read_text())["model_type"])
    fuse_adamw()
    open_multi_step_runner()


if torch.cuda.is_available():
    apply()
