"""flash-attn's kernels on the GPU, in every shape of attention.py."""

import attention


def test_every_kernel_computes_attention():
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    cases = list(attention.comparisons(flash_attn_func, flash_attn_varlen_func))
    assert len(cases) == 24 and [case for case in cases if not case.passed] == []
