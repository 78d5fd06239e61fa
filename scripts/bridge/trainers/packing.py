"""[image] Rows of a padded batch laid end to end, for a forward without padding and with no more logits than are needed."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F


def pack(batch: Mapping[str, torch.Tensor], logits_mask: torch.Tensor) -> dict[str, Any]:
    """Lay all rows of a batch (input_ids, attention_mask, position_ids: [rows, length]) end to end.

    logits_mask: [rows, length], bool: the tokens whose logits are wanted, each for the prediction of the next one.
    Returns input_ids, position_ids [tokens] (the positions start anew in each row); cu_seqlens [rows + 1], int32: where rows
    begin and end; max_seqlen: the longest row's tokens; logits_to_keep [predictions]: by number; labels [predictions]: the next
    token of the same row.
    """
    valid = batch["attention_mask"].bool()
    lengths = valid.sum(1)
    return {
        "input_ids": batch["input_ids"][valid],
        "position_ids": batch["position_ids"][valid],
        "cu_seqlens": F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        "max_seqlen": int(lengths.max()),
        "logits_to_keep": logits_mask[valid].nonzero().squeeze(1),
        "labels": batch["input_ids"].roll(-1, dims=1)[logits_mask],
    }


def group_weights(tokens: torch.Tensor, group_rows: int) -> torch.Tensor:
    """What a token weighs where a loss is the mean over the tokens of each group of so many rows: 1 / (tokens of its group).

    tokens: that count in each row, [rows]; the last group may have fewer rows. Returns the weight of a token, [rows], float32.
    """
    groups = F.pad(tokens, (0, -len(tokens) % group_rows)).view(-1, group_rows).sum(1)
    # The same guard against a group without any as verl's.
    return (1 / (groups + 1e-8)).repeat_interleave(group_rows)[:len(tokens)]


def flash_attention_kwargs(packed: Mapping[str, Any]) -> dict[str, Any]:
    """Attention within each row only. With positions alone transformers waits for the GPU in every layer, to find bounds."""
    cu_seqlens, max_seqlen = packed["cu_seqlens"], packed["max_seqlen"]
    return {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": max_seqlen, "max_length_k": max_seqlen}


def packed_logits(model: torch.nn.Module, packed: Mapping[str, Any]) -> torch.Tensor:
    """One forward of what pack returned. [predictions, vocabulary]."""
    return model(input_ids=packed["input_ids"].unsqueeze(0), position_ids=packed["position_ids"].unsqueeze(0), use_cache=False,
                 logits_to_keep=packed["logits_to_keep"], **flash_attention_kwargs(packed)).logits.squeeze(0)
