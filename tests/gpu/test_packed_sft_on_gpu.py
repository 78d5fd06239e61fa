"""Packed SFT on a GPU against verl's padding trainer, in float32 and with flash attention in bfloat16.

    python -m pytest tests/gpu          or, where there is no pytest:          python tests/gpu/test_packed_sft_on_gpu.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from both_trainers import VARIANTS, both_trainers  # noqa: E402
from ranks import apart  # noqa: E402

# PyTorch's attention, float32 throughout; sums in another order.
FLOAT32_TOLERANCE = 1e-4


def test_packed_equals_padded_in_float32_and_is_as_near_to_it_in_bfloat16():
    results = both_trainers("cuda", 1, list(VARIANTS))
    truth = results["padded float32"]

    def errors(name: str) -> tuple[float, float, float]:
        """Of the training loss, the validation loss and the gradient, relative to padded float32."""
        found = results[name]
        said = (abs(found["train/loss"] / truth["train/loss"] - 1), abs(found["val/loss"] / truth["val/loss"] - 1),
                apart(found["gradients"], truth["gradients"]))
        print(f"{name:32}{found['training forwards']:4} forwards   train/loss {said[0]:.1e}   val/loss {said[1]:.1e}   "
              f"gradient {said[2]:.1e}", flush=True)
        return said

    seen = {name: errors(name) for name in VARIANTS}
    for name in ("packed float32, one forward", "packed float32, many forwards"):
        assert max(seen[name]) < FLOAT32_TOLERANCE, name
    padded, packed, token_mean = (seen[f"{name} bfloat16"] for name in ("padded", "packed", "token mean"))
    # bfloat16 has 8 bits: both gradients are as far from the float32 one, and a plain token mean's several times as far.
    assert packed[2] < 1.5 * padded[2]
    assert token_mean[2] > 3 * padded[2]
    for loss in ("train/loss", "val/loss"):
        assert abs(results["packed bfloat16"][loss] / results["padded bfloat16"][loss] - 1) < 2e-3, loss


if __name__ == "__main__":
    test_packed_equals_padded_in_float32_and_is_as_near_to_it_in_bfloat16()
    print("packed SFT agrees with verl's padding trainer on this GPU")
