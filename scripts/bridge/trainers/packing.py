"""[image] Rows of a padded batch laid end to end, for a forward without padding and with no more logits than are needed."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F


def pack(batch: Mapping[str, torch.Tensor], looked_at: torch.Tensor) -> dict[str, Any]:
    """Lay all rows of a batch end to end.

    Args:
        batch: input_ids, attention_mask and position_ids, [rows, length] each.
        looked_at: [rows, length], bool: the tokens whose logits are wanted, each for the prediction of the next one.

    Returns:
        input_ids, position_ids [tokens] (the positions start anew in each row); bounds [rows + 1], int32: where rows begin
        and end; longest: the longest row's tokens; looked_at [predictions]: by number; labels [predictions]: the next token
        of the same row.
    """
    there = batch["attention_mask"].bool()
    lengths = there.sum(1)
    return {
        "input_ids": batch["input_ids"][there],
        "position_ids": batch["position_ids"][there],
        "bounds": F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        "longest": int(lengths.max()),
        "looked_at": looked_at[there].nonzero().squeeze(1),
        "labels": batch["input_ids"].roll(-1, dims=1)[looked_at],
    }


def group_weights(tokens: torch.Tensor, group_rows: int) -> torch.Tensor:
    """What a token weighs where a loss is the mean over the tokens of each group of so many rows: 1 / (tokens of its group).

    Args:
        tokens: that count in each row, [rows]; the last group may have fewer rows.

    Returns:
        the weight of a token of each row, [rows], float32.
    """
    groups = F.pad(tokens, (0, -len(tokens) % group_rows)).view(-1, group_rows).sum(1)
    # The same guard against a group without any as verl's.
    return (1 / (groups + 1e-8)).repeat_interleave(group_rows)[:len(tokens)]


def bounds_of(packed: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' models hand on to flash attention: attention within each row only.

    With positions alone transformers would look for the bounds in every layer, waiting for the GPU each time.
    """
    bounds, longest = packed["bounds"], packed["longest"]
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def logits_looked_at(model: torch.nn.Module, packed: Mapping[str, Any]) -> torch.Tensor:
    """One forward of what pack returned. [predictions, vocabulary]."""
    return model(input_ids=packed["input_ids"].unsqueeze(0), position_ids=packed["position_ids"].unsqueeze(0), use_cache=False,
                 logits_to_keep=packed["looked_at"], **bounds_of(packed)).logits.squeeze(0)
