"""[image] What the tuned profile changes inside the trainer's processes: the same arithmetic with fewer kernels and less waiting.

verl imports it before a model is built (`model.external_lib`): that applies everything. Without a GPU it changes nothing.
"""

import gc
import os
import sys
from importlib import import_module
from typing import Any

import torch
from torch._subclasses import meta_utils
from torch.distributed.fsdp import fully_sharded_data_parallel
from torch.distributed.fsdp._flat_param import FlatParameter
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from bridge.errors import say
from bridge.trainers import packed_ppo


def compile_layers(config: PretrainedConfig) -> None:
    """Let the decoder layers of transformers' models of this kind be compiled: fused kernels, started with far less Python.

    All layers, the actor's and the critic's, share what is compiled: once with and once without gradients, and once more when
    the number of tokens has changed for the first time.
    """
    if (model := AutoModelForCausalLM._model_mapping.get(type(config), None)) is None:
        say(f"{config.model_type}: no language model of transformers' own: its layers are not compiled")
        return
    for name in model._no_split_modules or ():
        # Gemma 3 names layers of its eyes, too, which are another module's.
        if layer := getattr(sys.modules[model.__module__], name, None):
            layer.forward = torch.compile(layer.forward)
    # Each size that changes for the first time is compiled anew. At the limit Dynamo would go back to the plain code.
    torch._dynamo.config.cache_size_limit = 64
    # Dynamo refuses what FSDP marks where use_orig_params is false, as in verl's critic. Without the mark it takes it.
    fully_sharded_data_parallel._annotate_modules_for_dynamo = lambda *_: None
    # Weights are views of FSDP's flat parameter. In a forward that is bfloat16, and the gradient that it has from the micro batch
    # before is float32: Dynamo, which looks at it, would fail. No layer's forward depends on it.
    plain = meta_utils.safe_grad
    meta_utils.safe_grad = lambda tensor: None if isinstance(tensor, FlatParameter) else plain(tensor)


def fuse_adamw() -> None:
    """Let AdamW be one kernel that reads and writes every value once, unless the caller chooses otherwise."""
    plain = torch.optim.AdamW

    class FusedAdamW(plain):
        def __init__(self, params, **options):
            super().__init__(params, **{"fused": True, **options})

    torch.optim.AdamW = FusedAdamW


def inspect_models_in_process() -> None:
    """Let vLLM look at a model's class in this process. Its own way, a second Python (to spare CUDA), imports all anew."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda look: look()


def freeze_gc() -> None:
    """Tell Python's garbage collector that what there is stays: it need not look through it again after every few answers."""
    gc.collect()
    gc.freeze()


def make_engine(**options: Any):
    """vLLM's engine with verl's options, for a process that trains too.

    No cache of prompts' keys and values: GSM8K's prompts share a few tokens only, and no answer can come from those of the
    weights before. Flash attention 2 decodes for heads of 64 elements: it was seen to be faster at it than 3
    (docs/benchmarks.md).
    """
    from vllm import LLM

    inspect_models_in_process()
    # A collection takes half a second in a process with all this imported, and each CUDA graph is recorded after one.
    freeze_gc()
    if options.get("num_scheduler_steps", 1) > 1:
        config = AutoConfig.from_pretrained(os.environ["BRIDGE_MODEL_DIR"])
        if (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads) == 64:
            # vLLM 0.8.5 has no option for it.
            os.environ.setdefault("VLLM_FLASH_ATTN_VERSION", "2")
    engine = LLM(**{**options, "enable_prefix_caching": False})
    freeze_gc()
    if not options["enable_sleep_mode"]:
        # vLLM keeps its memory between the steps (free_cache_engine: false): PyTorch has no one to give its own back to, and
        # may grow its blocks instead of breaking memory into pieces, which the allocator of a vLLM that sleeps forbids.
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        torch.cuda.empty_cache = lambda: None
    return engine


def replace_engine() -> None:
    """Let verl's rollout make its engine by make_engine."""
    from verl.workers.rollout.vllm_rollout import vllm_rollout_spmd
    from vllm.worker.multi_step_model_runner import MultiStepModelRunner

    vllm_rollout_spmd.LLM = make_engine
    # verl hands over the weights through this attribute of a runner, which the multi-step one lacks.
    MultiStepModelRunner.model = property(lambda runner: runner._base_model_runner.model)


def apply() -> None:
    """All of the above."""
    compile_layers(AutoConfig.from_pretrained(os.environ["BRIDGE_MODEL_DIR"]))
    fuse_adamw()
    packed_ppo.apply()
    replace_engine()
    # Importing it does it.
    import_module("bridge.trainers.background_save")


if torch.cuda.is_available():
    apply()
