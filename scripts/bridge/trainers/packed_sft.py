"""[image] Supervised fine-tuning without padding:  torchrun -m bridge.trainers.packed_sft OVERRIDES...   (docs/packed_sft.md)
Rows are laid end to end, at most bridge.packed_tokens_per_gpu tokens a forward. As with verl, whose step adds up the means of
micro batches, a token weighs 1 / (response tokens of its data.micro_batch_size_per_gpu rows). All else is verl's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from verl.trainer import fsdp_sft_trainer
from verl.utils.seqlen_balancing import greedy_partition

from bridge.errors import UsageError, refuse
from bridge.trainers.packed_settings import packing_problems
from bridge.trainers.packing import group_weights, pack, packed_logits
from bridge.trainers.stoppable import stoppable_sft


def spread(lengths: list[int], count: int) -> list[list[int]]:
    """Row numbers of `count` about equal forwards: longest row first, each to the emptiest. More make the fullest no fuller."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    parts = greedy_partition([lengths[row] for row in order], count, equal_size=False)
    return [[order[place] for place in part] for part in parts]


def forwards_needed(lengths: list[int], budget: int) -> int:
    """The smallest number of forwards such that none has more than `budget` tokens. A UsageError: one row alone is longer."""
    if max(lengths) > budget:
        raise UsageError(f"a row has {max(lengths)} tokens, more than bridge.packed_tokens_per_gpu={budget}. Use at least "
                         f"{max(lengths)}.")
    count = -(-sum(lengths) // budget)
    while max(sum(lengths[row] for row in rows) for rows in spread(lengths, count)) > budget:
        count += 1
    return count


def row_weights(loss_mask: torch.Tensor, group_rows: int) -> torch.Tensor:
    """What one response token of each row weighs: 1 / (response tokens of the row's group). [rows, length] -> [rows]."""
    # verl's loss never looks at the last column.
    return group_weights(loss_mask[:, :-1].sum(1), group_rows)


def pack_rows(batch: TensorDict, weights: torch.Tensor, rows: list[int]) -> dict[str, Any]:
    """Lay rows of a padded batch end to end, on the host.

    batch: verl's input_ids, attention_mask, position_ids and loss_mask, [rows, max_length] each. weights: of a response token of
    each row of the batch. Returns what packing.pack returns, with the logits of the loss's tokens, and their weights [responses].
    """
    loss_mask = batch["loss_mask"][rows].bool()
    loss_mask[:, -1] = False
    packed = pack(batch[rows], loss_mask)
    packed["weights"] = weights[rows].unsqueeze(1).expand_as(loss_mask)[loss_mask]
    if not len(packed["logits_to_keep"]):
        # Prompts alone, cut off before their responses. All ranks run all forwards: one token's logits are computed, for nothing.
        packed.update(logits_to_keep=torch.tensor([0]), labels=torch.tensor([0]), weights=torch.tensor([0.0]))
    return packed


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each token in float32, as CrossEntropyLoss computes it under verl's autocast. [tokens, vocabulary]."""
    if not logits.is_cuda:
        return F.cross_entropy(logits.float(), labels, reduction="none")
    # Reads the bfloat16 logits, computes in float32, and writes the gradient over the logits: without it the logits would
    # be in memory four times over, as float32 twice.
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    return cross_entropy_loss(logits, labels, inplace_backward=True)[0]


class PackedSFTTrainer(fsdp_sft_trainer.FSDPSFTTrainer):
    """verl's trainer with another way from a batch to its loss and gradient."""

    def __init__(self, config, *args, **options):
        refuse(packing_problems(config))
        self.group_rows = config.data.micro_batch_size_per_gpu
        self.budget = config.bridge.packed_tokens_per_gpu
        # Weights that the checkpoint lacks (LoRA's). The order of the rows has a generator of its own.
        torch.manual_seed(config.trainer.seed)
        super().__init__(config, *args, **options)
        # Where verl's fit moves each batch to: it is packed on the host first.
        self.device_name = "cpu"
        self.validation_batches: list[TensorDict] = []

    def _build_dataloader(self, train_dataset, val_dataset):
        super()._build_dataloader(train_dataset, val_dataset)
        # verl leaves it at 0 whatever trainer.seed is.
        self.train_sampler.seed = self.config.trainer.seed

    def _build_model_optimizer(self):
        super()._build_model_optimizer()
        if not self.model._supports_attention_backend:
            raise UsageError(f"{type(self.model).__name__} hands no bounds of rows to its attention: its rows cannot be packed. "
                             "Use bridge.packed_tokens_per_gpu=null.")

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Let verl's steps find the device where its fit finds the host."""
        self.device_name = self.config.trainer.device
        try:
            yield
        finally:
            self.device_name = "cpu"

    def training_step(self, batch: TensorDict) -> dict[str, float]:
        """One optimizer step on a batch that is on the host."""
        with self.on_device():
            # All that verl's step asks of a batch is its micro batches: one here, since the packing divides it.
            return super().training_step(SimpleNamespace(split=lambda _rows: [batch]))

    def validation_step(self, batch: TensorDict) -> torch.Tensor:
        """Collect the groups of a validation; the last one computes them all.

        Returns a tensor that holds the mean over all groups once the last one is in: verl takes the mean of what it was given.
        """
        if not self.validation_batches:
            self.validation_loss = torch.zeros((), device=self.config.trainer.device)
        self.validation_batches.append(batch)
        if len(self.validation_batches) == len(self.val_dataloader):
            with self.on_device():
                self.validation_loss.copy_(super().validation_step(torch.cat(self.validation_batches)))
            self.validation_batches = []
        return self.validation_loss

    def _compute_loss_and_backward(self, batch: TensorDict, do_backward: bool = True) -> torch.Tensor:
        """The mean of the groups' losses; the gradient that is added is that of their sum, as in verl."""
        weights = row_weights(batch["loss_mask"], self.group_rows)
        lengths = batch["attention_mask"].sum(1).tolist()
        total = torch.zeros((), device=self.device_name)
        for rows in spread(lengths, self.forwards_of_all_ranks(lengths)):
            loss = self.forward_loss(pack_rows(batch, weights, rows))
            if do_backward:
                loss.backward()
            total += loss.detach()
        return total / (len(lengths) // self.group_rows)

    def forwards_of_all_ranks(self, lengths: list[int]) -> int:
        """How many forwards the rank that needs most of them needs: FSDP gathers weights in each, on all ranks together."""
        count = torch.tensor(forwards_needed(lengths, self.budget), device=self.device_name)
        torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
        return int(count)

    def forward_loss(self, packed: dict[str, Any]) -> torch.Tensor:
        """One forward: the weighted sum of the response tokens' losses."""
        on_device = {name: self.moved(value) if isinstance(value, torch.Tensor) else value for name, value in packed.items()}
        with torch.autocast(device_type=self.device_name, dtype=torch.bfloat16):
            logits = packed_logits(self.fsdp_model, on_device)
            return (token_losses(logits, on_device["labels"]) * on_device["weights"]).sum()

    def moved(self, value: torch.Tensor) -> torch.Tensor:
        """Copy to the device without waiting for it."""
        return value if self.device_name == "cpu" else value.pin_memory().to(self.device_name, non_blocking=True)


def main() -> Any:
    """verl's own entry, with the trainer exchanged."""
    fsdp_sft_trainer.FSDPSFTTrainer = stoppable_sft(PackedSFTTrainer)
    return fsdp_sft_trainer.main()


if __name__ == "__main__":
    main()
