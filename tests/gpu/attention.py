"""Whether flash-attn computes attention: its bf16 kernels, forward and backward, against a reference in fp32.

The shapes are small and the values random: a kernel that was built for another GPU or another torch does not start, and one
that is wrong is wrong by far more than bf16 rounds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# Of the norm. bf16 keeps 8 bits, so an output is off by 0.2 % where nothing else is rounded; the kernels also round the
# probabilities, and in the backward pass the gradients of the scores.
MOST_FORWARD, MOST_BACKWARD = 0.01, 0.02
HEAD_SIZES = (64, 80, 128)
# Query heads and key heads: as many, and grouped (GQA).
HEADS = ((4, 4), (8, 2))
# No length is a multiple of a kernel's tile.
LENGTH, PACKED = 257, (1, 130, 257, 64)


@dataclass(frozen=True)
class Comparison:
    """One case: the relative error (norm of the difference by norm) of the output, and the worst of the three gradients."""

    case: str
    forward: float
    backward: float

    @property
    def passed(self) -> bool:
        """Whether both errors are what bf16 allows; NaN is not."""
        return self.forward <= MOST_FORWARD and self.backward <= MOST_BACKWARD


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Softmax attention as the formula says. q: (length, heads, size); k, v: (length, key heads, size); returns q's shape."""
    # Of torch's ways the one that is no kernel of its own.
    with sdpa_kernel(SDPBackend.MATH):
        rows = (tensor[None].transpose(1, 2) for tensor in (q, k, v))
        return scaled_dot_product_attention(*rows, is_causal=causal, enable_gqa=True).transpose(1, 2)[0]


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference by the norm of what is wanted."""
    return ((found.float() - wanted).norm() / wanted.norm()).item()


def comparisons(flash_attn_func: Callable, flash_attn_varlen_func: Callable, device: str = "cuda") -> Iterator[Comparison]:
    """All cases: head sizes, grouped heads, causal or not, two rows of a batch, and sequences packed into one row.

    Each in bf16 on sequences laid end to end, (all lengths, heads, size), and the reference on each sequence.
    """
    ends = torch.tensor((0, *PACKED), device=device).cumsum(0).to(torch.int32)
    for size, heads, causal, lengths in product(HEAD_SIZES, HEADS, (False, True), ((LENGTH, LENGTH), PACKED)):
        generator = torch.Generator(device).manual_seed(0)
        *inputs, output_gradient = (
            torch.randn(sum(lengths), count, size, device=device, generator=generator).bfloat16()
            for count in (heads[0], heads[1], heads[1], heads[0]))
        found_inputs = [tensor.clone().requires_grad_() for tensor in inputs]
        wanted_inputs = [tensor.float().requires_grad_() for tensor in inputs]
        if lengths == PACKED:
            found = flash_attn_varlen_func(*found_inputs, ends, ends, max(PACKED), max(PACKED), causal=causal)
        else:
            rows = [tensor.unflatten(0, (2, LENGTH)) for tensor in found_inputs]
            found = flash_attn_func(*rows, causal=causal).flatten(0, 1)
        wanted = torch.cat([reference(*pieces, causal) for pieces in
                            zip(*(tensor.split(lengths) for tensor in wanted_inputs), strict=True)])
        found.backward(output_gradient)
        wanted.backward(output_gradient.float())
        gradients = [relative_error(a.grad, b.grad) for a, b in zip(found_inputs, wanted_inputs, strict=True)]
        case = (f"{'packed' if lengths == PACKED else 'batch'}, head size {size}, {heads[0]} heads on {heads[1]}"
                f"{', causal' if causal else ''}")
        # max() would pass over a NaN that is not first.
        yield Comparison(case, relative_error(found, wanted), torch.tensor(gradients).max().item())
