"""Packing: which rows go into which forward, and what becomes of them."""

import random
from types import ModuleType

import pytest
import torch

from bridge.errors import UsageError
from bridge.trainers.packing import group_weights


@pytest.fixture(scope="module")
def packed_sft() -> ModuleType:
    """Imported by who runs these tests, and not by each process that collects them: verl takes seconds."""
    from bridge.trainers import packed_sft

    return packed_sft


def batch_of(rows: list[tuple[int, int]], width: int):
    """Rows of (prompt, response) tokens as verl's SFTDataset makes them; row r holds the tokens 100 r + 1, 100 r + 2, ..."""
    from tensordict import TensorDict

    batch = {name: torch.zeros(len(rows), width, dtype=torch.long)
             for name in ("input_ids", "attention_mask", "position_ids", "loss_mask")}
    for row, (prompt, response) in enumerate(rows):
        length = prompt + response
        batch["input_ids"][row, :length] = 100 * row + torch.arange(1, length + 1)
        batch["attention_mask"][row, :length] = 1
        batch["position_ids"][row] = torch.arange(width).clamp(max=length - 1)
        batch["loss_mask"][row, prompt - 1:length - 1] = 1
    return TensorDict(batch, batch_size=len(rows))


def test_rows_lie_end_to_end_and_each_response_token_is_predicted_from_the_one_before(packed_sft):
    batch = batch_of([(2, 3), (3, 1), (1, 2)], width=5)
    packed = packed_sft.pack_rows(batch, torch.tensor([0.5, 0.25, 0.125]), [2, 0])
    assert packed["input_ids"].tolist() == [201, 202, 203, 1, 2, 3, 4, 5]
    assert packed["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert packed["max_seqlen"] == 5 and packed["cu_seqlens"].tolist() == [0, 3, 8] and packed["cu_seqlens"].dtype == torch.int32
    assert packed["input_ids"][packed["logits_to_keep"]].tolist() == [201, 202, 2, 3, 4]
    assert packed["labels"].tolist() == [202, 203, 3, 4, 5]
    assert packed["weights"].tolist() == [0.125, 0.125, 0.5, 0.5, 0.5]


def test_a_row_without_padding_does_not_see_the_next_row(packed_sft):
    batch = batch_of([(2, 2), (2, 2)], width=4)
    # As where a custom data set marks the last token, too: verl never looks at the last column.
    batch["loss_mask"][:, -1] = 1
    packed = packed_sft.pack_rows(batch, torch.ones(2), [0, 1])
    assert packed["labels"].tolist() == [3, 4, 103, 104]
    assert packed_sft.row_weights(batch["loss_mask"], 2).tolist() == [0.25, 0.25]


def test_prompts_alone_still_make_a_forward_that_counts_for_nothing(packed_sft):
    batch = batch_of([(3, 0)], width=4)
    batch["loss_mask"][:] = 0
    packed = packed_sft.pack_rows(batch, packed_sft.row_weights(batch["loss_mask"], 1), [0])
    assert len(packed["logits_to_keep"]) == len(packed["labels"]) == 1 and packed["weights"].tolist() == [0.0]


def test_a_token_weighs_one_by_the_response_tokens_of_its_group(packed_sft):
    batch = batch_of([(2, 3), (3, 1), (1, 2), (4, 2)], width=6)
    assert packed_sft.row_weights(batch["loss_mask"], 2).tolist() == [0.25] * 4
    assert packed_sft.row_weights(batch["loss_mask"], 1).tolist() == pytest.approx([1 / 3, 1, 1 / 2, 1 / 2])


@pytest.mark.parametrize("seed", range(20))
def test_every_row_is_in_one_forward_and_no_forward_is_over_the_budget(packed_sft, seed):
    chance = random.Random(seed)
    lengths = [chance.randint(1, 500) for _ in range(chance.randint(1, 60))]
    needed = packed_sft.forwards_needed(lengths, 512)
    # A rank may have to run more forwards than it needs: each still has a row, and none gets fuller.
    for count in range(needed, len(lengths) + 1):
        forwards = packed_sft.spread(lengths, count)
        assert sorted(row for rows in forwards for row in rows) == list(range(len(lengths)))
        assert all(0 < sum(lengths[row] for row in rows) <= 512 for rows in forwards)


def test_a_row_longer_than_the_budget_is_refused(packed_sft):
    with pytest.raises(UsageError, match="a row has 513 tokens, more than bridge.packed_tokens_per_gpu=512. Use at least 513"):
        packed_sft.forwards_needed([513, 2], 512)


def test_a_groups_tokens_share_its_weight_and_the_last_group_may_be_short():
    weights = group_weights(torch.tensor([3, 1, 0, 0, 5]), 2)
    assert weights[[0, 1, 4]].tolist() == pytest.approx([1 / 4, 1 / 4, 1 / 5])
    # A group without tokens weighs nothing: its mask is 0.
    assert torch.isfinite(weights).all()
