"""SEED= where verl 0.5.0 draws without a setting: the critic's new head, and the tokens of answers.

The order of PPO's rows and vLLM's own seed have settings (stages.train), and SFT's order is trainers.stoppable's.
"""

import os


def apply() -> None:
    """Seed this process of a trainer, before it builds a model. Without SEED= nothing changes."""
    if "BRIDGE_SEED" not in os.environ:
        return
    import torch

    # Far apart, so that no rank draws what a rank of the next seed does.
    seed = int(os.environ["BRIDGE_SEED"]) << 20
    # Ranks differ, or they would draw alike. FSDP hands rank 0's head to the others.
    torch.manual_seed(seed + int(os.environ.get("RANK", "0")))
    plain = torch.cuda.manual_seed
    # verl lets vLLM sample from 1000 and the rank on, whatever rollout.seed is, and calls this for nothing else.
    torch.cuda.manual_seed = lambda number: plain(number + seed)
