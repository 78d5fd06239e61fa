"""One optimizer step and one validation by verl's padding SFT trainer and by the packed one, on the same model and rows.

    python tests/both_trainers.py --device cpu|cuda --ranks N --out OUT.pt [--variants VARIANT...]

Makes a small random Llama, starts N ranks, and writes OUT.pt: {variant: {"train/loss", "val/loss", "forwards",
"gradients" (before clipping) and "parameters" (after the step): {name: tensor}}}.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from door import TRAINER
from ranks import in_a_process, in_ranks, prepare, whole

# Cut off by the longest rows; some are cut off, so that one has no padding at all.
MAX_LENGTH = 112
GROUP_ROWS, GROUPS = 4, 4
# name: (precision, bridge.packed_tokens_per_gpu, whether the tokens' weights are those of a plain mean over all tokens)
VARIANTS = {
    "padded float32": ("float32", None, False),
    "packed float32, one forward": ("float32", 1 << 20, False),
    "packed float32, many forwards": ("float32", 2 * MAX_LENGTH, False),
    "token mean float32": ("float32", 1 << 20, True),
    "padded bfloat16": ("bfloat16", None, False),
    "packed bfloat16": ("bfloat16", 6 * MAX_LENGTH, False),
    "token mean bfloat16": ("bfloat16", 6 * MAX_LENGTH, True),
}


def compose_config(work_dir: Path, device: str, ranks: int, budget: int | None) -> Any:
    """The tuned profile in small."""
    from omegaconf import OmegaConf

    from bridge.compose import compose

    names = {"WORK_DIR": str(work_dir), "BRIDGE_MODEL_DIR": str(work_dir / "models" / "tiny"),
             "BRIDGE_STAGE_DIR": str(work_dir / "sft"), "BRIDGE_RUN_NAME": "r", "WANDB_PROJECT": "p"}
    return OmegaConf.create(compose("sft", [
        "profile/sft=tuned", f"trainer.device={device}", f"data.train_batch_size={GROUPS * GROUP_ROWS * ranks}",
        f"data.micro_batch_size_per_gpu={GROUP_ROWS}", f"data.max_length={MAX_LENGTH}", "data.truncation=right",
        f"bridge.packed_tokens_per_gpu={'null' if budget is None else budget}",
        # It changes transformers for the whole process, and so for the padded variants too.
        "model.external_lib=null", "optim.lr=1e-3", "optim.warmup_steps_ratio=0",
        # Clips, as in a real run.
        "optim.clip_grad=0.1", "trainer.total_training_steps=1", "trainer.logger=[console]", "trainer.resume_mode=disable",
        # As in the two profiles. On CPU in float32 FSDP2 cannot do without: backward finds its weights gathered anew.
        f"model.enable_gradient_checkpointing={budget is None or device == 'cpu'}"], names))


def in_float32(stack: ExitStack) -> None:
    """Turn off the bfloat16 that is hard-coded in verl's trainer (FSDP's policy, autocast), and flash attention with it."""
    from verl.trainer import fsdp_sft_trainer

    policy, load = fsdp_sft_trainer.MixedPrecisionPolicy, fsdp_sft_trainer.AutoModelForCausalLM.from_pretrained
    stack.enter_context(patch.object(fsdp_sft_trainer.AutoModelForCausalLM, "from_pretrained",
                                     lambda *args, **options: load(*args, **{**options, "attn_implementation": "sdpa"})))
    stack.enter_context(patch.object(fsdp_sft_trainer, "MixedPrecisionPolicy",
                                     lambda **options: policy(**{**options, "param_dtype": torch.float32})))
    stack.enter_context(patch("torch.autocast", lambda *_args, **_options: nullcontext()))


@contextmanager
def variant(name: str, on_gradients: Callable[[], None], on_metrics: Callable[[dict], None],
            on_forward: Callable[[], None]) -> Iterator[type]:
    """The trainer's class, with everything patched that the variant asks for and that has to be seen."""
    from verl.trainer import fsdp_sft_trainer

    from bridge.trainers import packed_sft

    precision, budget, token_mean = VARIANTS[name]
    clip, pack_rows, loader = fsdp_sft_trainer.fsdp2_clip_grad_norm_, packed_sft.pack_rows, fsdp_sft_trainer.StatefulDataLoader

    def look_and_clip(*args, **options):
        on_gradients()
        return clip(*args, **options)

    class Tracking:
        def __init__(self, **_options): ...

        def log(self, data, step):
            on_metrics(data)

    def seen_pack(*args):
        on_forward()
        return pack_rows(*args)

    with ExitStack() as stack:
        if precision == "float32":
            in_float32(stack)
        if token_mean:
            stack.enter_context(patch.object(packed_sft, "row_weights", lambda mask, rows: torch.full(
                [len(mask)], len(mask) / rows / mask[:, :-1].sum())))
        stack.enter_context(patch.object(packed_sft, "pack_rows", seen_pack))
        stack.enter_context(patch.object(fsdp_sft_trainer, "fsdp2_clip_grad_norm_", look_and_clip))
        stack.enter_context(patch.object(fsdp_sft_trainer, "Tracking", Tracking))
        # Eight processes for each loader are not worth starting here.
        stack.enter_context(patch.object(fsdp_sft_trainer, "StatefulDataLoader", lambda **options: loader(
            **{**options, "num_workers": 0})))
        trainer_class = fsdp_sft_trainer.FSDPSFTTrainer if budget is None else packed_sft.PackedSFTTrainer
        stack.enter_context(patch.object(trainer_class, "save_checkpoint", lambda self, step: None))
        yield trainer_class


def run(name: str, work_dir: Path, device: str, ranks: int, meshes: list) -> dict[str, Any]:
    """One step of one variant."""
    from verl.trainer.fsdp_sft_trainer import create_sft_dataset
    from verl.utils import hf_tokenizer

    started = time.monotonic()
    config = compose_config(work_dir, device, ranks, VARIANTS[name][1])
    result: dict[str, Any] = {"forwards": 0, "gradients": {}}
    tokenizer = hf_tokenizer(config.model.partial_pretrain)
    datasets = [create_sft_dataset(files, config.data, tokenizer) for files in (config.data.train_files, config.data.val_files)]

    def look() -> None:
        result["gradients"] = {key: whole(value.grad) for key, value in trainer.fsdp_model.named_parameters()}
        result["training forwards"] = result["forwards"]

    def count() -> None:
        result["forwards"] += 1

    with variant(name, look, result.update, count) as trainer_class:
        trainer = trainer_class(config, *meshes, tokenizer, *datasets)
        trainer.fit()
    # The validation left the root's weights gathered.
    trainer.fsdp_model.reshard()
    result["parameters"] = {key: whole(value) for key, value in trainer.fsdp_model.named_parameters()}
    print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
    return result


def work(device: str, work_dir: Path, variants: list[str], out: Path) -> None:
    """What each rank does."""
    from torch.distributed.device_mesh import init_device_mesh

    from bridge.trainers import on_cpu

    if device == "cuda":
        on_cpu.use_varlen_sdpa()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    meshes = [init_device_mesh(device, (ranks,), mesh_dim_names=("fsdp",)),
              init_device_mesh(device, (ranks, 1), mesh_dim_names=("dp", "sp"))]
    results = {name: run(name, work_dir, device, ranks, meshes) for name in variants}
    if rank == 0:
        torch.save(results, out)


def both_trainers(device: str, ranks: int, variants: list[str]) -> dict[str, dict[str, Any]]:
    """Run the variants in processes of their own; returns what OUT.pt holds."""
    return in_a_process(Path(__file__), "--device", device, "--ranks", str(ranks), "--variants", *variants, "--out",
                        preloaded=TRAINER if device == "cpu" else None)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="all if none is named")
    parser.add_argument("--device", choices=["cpu", "cuda"], required=True)
    parser.add_argument("--ranks", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        from bridge.trainers import on_cpu

        on_cpu.setup()
        from bridge.trainers import packed_sft  # noqa: F401 - once for all ranks
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        in_ranks(arguments.ranks, arguments.device, work, Path(folder), arguments.variants, arguments.out)


if __name__ == "__main__":
    main()
