"""[image, GPU] What PPO's workers compute, and which functions of the tuned profile they call. For test_ppo_on_gpu.py.

verl imports it in the worker as `actor_rollout_ref.model.external_lib`, after the critic's, which applies the tuned profile
there. Writes into BRIDGE_STAGE_DIR: called.txt, each name once, and of each step `log_probs-N.pt` and `values-N.pt`:
{"input_ids" [rows, prompt and answer tokens], "mask" and the values of that name, [rows, answer tokens]}.
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import torch

FOLDER = Path(os.environ["BRIDGE_STAGE_DIR"])
called: set[str] = set()


def counted(owner: Any, name: str, label: str | None = None) -> None:
    """Write down when this function is called for the first time."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*arguments, **options):
        if (said := label or name) not in called:
            called.add(said)
            with open(FOLDER / "called.txt", "a") as file:
                file.write(said + "\n")
        return function(*arguments, **options)

    setattr(owner, name, call)


def kept(owner: type, name: str, file: str, values: Callable[[Any], torch.Tensor]) -> None:
    """Write down what this method of verl's returns, each time."""
    method, count = getattr(owner, name), iter(range(1, 100))

    def compute(worker, data, *arguments, **options):
        result = method(worker, data, *arguments, **options)
        answers = data.batch["responses"].size(1)
        torch.save({"input_ids": data.batch["input_ids"].cpu(), "mask": data.batch["attention_mask"][:, -answers:].bool().cpu(),
                    file: values(result).float().cpu()}, FOLDER / f"{file}-{next(count)}.pt")
        return result

    setattr(owner, name, compute)


def apply() -> None:
    """See all of it."""
    from verl.workers.actor.dp_actor import DataParallelPPOActor
    from verl.workers.critic.dp_critic import DataParallelPPOCritic

    kept(DataParallelPPOActor, "compute_log_prob", "log_probs", lambda result: result[0])
    kept(DataParallelPPOCritic, "compute_values", "values", lambda result: result)
    speedups = sys.modules.get("bridge.trainers.speedups")
    if speedups is None:
        return
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    from verl.workers.rollout.vllm_rollout import vllm_rollout_spmd
    from vllm.worker.multi_step_model_runner import MultiStepModelRunner

    for name, function in list(vars(speedups.packed_ppo).items()):
        if isinstance(function, FunctionType) and function.__module__.startswith("bridge.trainers"):
            counted(speedups.packed_ppo, name)
    counted(speedups, "inspect_models_in_process")
    counted(speedups, "freeze_gc")
    counted(vllm_rollout_spmd, "LLM", "make_engine")
    counted(torch.optim.AdamW, "__init__", torch.optim.AdamW.__name__)
    # What torch.compile has made of the layer's forward.
    assert hasattr(LlamaDecoderLayer.forward, "_torchdynamo_orig_callable")
    counted(LlamaDecoderLayer, "forward", "compiled_layer")
    exposed = SimpleNamespace(model=MultiStepModelRunner.model.fget)
    counted(exposed, "model", "multi_step_model")
    MultiStepModelRunner.model = property(exposed.model)


if "SHARE_GPU" in os.environ:
    import shared_gpu  # noqa: F401 - importing it does it

apply()
