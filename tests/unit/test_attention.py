"""The comparison of attention kernels with a reference: the reference is right, and a wrong kernel is found."""

import attention
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So small a matrix gains nothing by more, and loses much where other work runs beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sdpa(q, k, v, causal):
    """torch's own attention, (batch, length, heads, size), with grouped heads; what comes out has q's type."""
    # In fp32 between: bf16 takes seconds a case on a CPU.
    wide = (tensor.float().transpose(1, 2) for tensor in (q, k, v))
    return scaled_dot_product_attention(*wide, is_causal=causal, enable_gqa=True).transpose(1, 2).to(q.dtype)


def sdpa_packed(q, k, v, starts, _starts, _longest, _longest_key, causal):
    lengths = starts.diff().tolist()
    rows = zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True)
    return torch.cat([sdpa(*(tensor[None] for tensor in row), causal)[0] for row in rows])


@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_is_attention_as_the_formula_says(causal):
    q, k, v = torch.randn(50, 6, 16), torch.randn(50, 3, 16), torch.randn(50, 3, 16)
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, dim=1)) * 16 ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(50, 50, dtype=torch.bool).triu(1), float("-inf"))
    wanted = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.repeat_interleave(2, dim=1))
    torch.testing.assert_close(attention.reference(q, k, v, causal), wanted)


def test_a_kernel_that_rounds_as_bf16_does_passes_in_every_case():
    cases = list(attention.comparisons(sdpa, sdpa_packed, device="cpu"))
    assert [case for case in cases if not case.passed] == []
    assert len({case.case for case in cases}) == len(cases) == 24
    # It is seen to round, so it was compared.
    assert all(case.forward > 1e-4 and case.backward > 1e-4 for case in cases)


@pytest.fixture
def wrong(monkeypatch):
    """Call it with a packed kernel: returns the cases that do not pass, of the 8 of one head size."""
    monkeypatch.setattr(attention, "HEAD_SIZES", (64,))
    return lambda packed: [case.case for case in attention.comparisons(sdpa, packed, device="cpu") if not case.passed]


def test_a_kernel_that_forgets_the_mask_is_found_where_there_is_one(wrong):
    found = wrong(lambda *arguments, causal: sdpa_packed(*arguments, causal=False))
    assert len(found) == 2 and all("packed" in case and "causal" in case for case in found)


def test_a_kernel_that_looks_into_the_neighbouring_sequence_is_found(wrong):
    found = wrong(lambda q, k, v, starts, *rest, causal: sdpa(q[None], k[None], v[None], causal)[0])
    assert len(found) == 4 and all("packed" in case for case in found)


def test_a_wrong_gradient_is_found_though_the_output_is_right(wrong):
    def no_gradient_of_keys(q, k, v, starts, *rest, causal):
        return sdpa_packed(q, k.detach() + 0 * k, v, starts, *rest, causal=causal)
    assert len(wrong(no_gradient_of_keys)) == 4


def test_not_a_number_is_found(wrong):
    found = wrong(lambda *arguments, causal: sdpa_packed(*arguments, causal=causal) * float("nan"))
    assert len(found) == 4
