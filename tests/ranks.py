"""Several ranks on this machine, as the tests compare trainers on them: started, and what FSDP has in parts put together."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from door import Preloaded

# Small, with heads and layers enough that all of FSDP's units and the grouped attention take part.
SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64}


def prepare(work_dir: Path, **shape: int) -> Path:
    """Let the stages make data and a tokenizer; put a random Llama beside the tokenizer. Returns the model's folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from bridge.stages import data, model

    gsm8k, folder = work_dir / "data" / "gsm8k", work_dir / "models" / "tiny"
    data.main(["builtin", str(gsm8k)])
    model.make("tiny", folder, gsm8k / "train.parquet")
    torch.manual_seed(0)
    llama = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, **{**SHAPE, **shape}))
    # Logits that spread as a trained model's do: else every token's loss is ln(vocabulary), and any weighting gives that mean.
    llama.get_input_embeddings().weight.data *= 3
    llama.save_pretrained(folder)
    return folder


def one_rank(rank: int, ranks: int, device: str, store: str, work: Callable, *arguments: Any) -> None:
    """Become this rank of so many, and work. A rank that waits for the others in vain is an error after a minute."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="0",
                      DIST_INIT_METHOD=f"file://{store}?rank={rank}&world_size={ranks}")
    from verl.utils.distributed import destroy_global_process_group, initialize_global_process_group

    initialize_global_process_group(timeout_second=60)
    work(device, *arguments)
    destroy_global_process_group()


def in_ranks(ranks: int, device: str, work: Callable, *arguments: Any) -> None:
    """Call work(device, *arguments) in so many processes. On CPU they share what this one has imported: that takes longest."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            one_rank, (ranks, device, f"{folder}/store", work, *arguments), nprocs=ranks,
            start_method="fork" if device == "cpu" else "spawn")


def in_a_process(script: Path, *arguments: str, preloaded: Preloaded | None = None) -> Any:
    """Run a script that writes to its last argument, which is added here; returns what torch.load finds there.

    In a process of its own: what it changes of transformers and verl, it changes for good. preloaded: a fork of a Python that has
    imported them; then it may change nothing that must be changed before they are imported, as bridge.trainers.on_cpu does.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.pt"
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if preloaded:
            result = preloaded.run(str(script), *arguments, str(out), env=env, timeout=1800)
        else:
            result = subprocess.run([sys.executable, script, *arguments, str(out)], capture_output=True, text=True, check=False,
                                    env=env)
        if result.returncode:
            raise RuntimeError((result.stdout + result.stderr)[-6000:])
        return torch.load(out)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host of what FSDP has in parts. All ranks take part."""
    return tensor.detach().full_tensor().float().cpu().clone()


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """How far apart two sets of tensors are, taken as two long vectors: norm of the difference by norm of the second."""
    difference = sum((one[name] - other[name]).square().sum() for name in other)
    return (difference / sum(tensor.square().sum() for tensor in other.values())).sqrt().item()
