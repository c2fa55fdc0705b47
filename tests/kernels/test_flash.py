"""Packed documents as one ragged batch: the same as attention with first_keys. flash-attn's own function is stood in for."""

import torch
import torch.nn.functional as F
from retro_kernels import flash
from retro_kernels.attention import attention
from torch import Tensor


def varlen(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, ends: Tensor, most: int, _: int, **options: object
) -> Tensor:
    """flash_attn_varlen_func's definition, one document at a time."""
    assert options["causal"] is True and begins.dtype == torch.int32 and begins is ends
    out = torch.empty_like(q)
    for start, stop in zip(begins.tolist(), ends.tolist()[1:]):
        assert 0 < stop - start <= most
        part = [x[start:stop].transpose(0, 1)[None] for x in (q, k, v)]
        scale = options["softmax_scale"]
        found = F.scaled_dot_product_attention(*part, is_causal=True, scale=scale, enable_gqa=True)  # type: ignore[arg-type]
        out[start:stop] = found[0].transpose(0, 1)
    return out


def test_packed_documents() -> None:
    q, k, v = torch.randn(2, 40, 4, 16), torch.randn(2, 40, 2, 16), torch.randn(2, 40, 2, 16)
    place = torch.arange(40)
    first_keys = torch.stack((place // 13 * 13, torch.zeros_like(place)))
    found = flash.packed(varlen, q, k, v, first_keys, 0.3)
    torch.testing.assert_close(found, attention(q, k, v, is_causal=True, first_keys=first_keys, scale=0.3))


def test_a_document_never_goes_on_in_the_next_sequence() -> None:
    x, everything = torch.randn(2, 10, 2, 8), torch.full((2, 10), -1)
    expected = attention(x, x, x, is_causal=True, scale=0.3)
    torch.testing.assert_close(flash.packed(varlen, x, x, x, everything, 0.3), expected)


def test_nothing_changes_on_a_cpu() -> None:
    assert not flash.takes(torch.zeros(1), None, False)
    x = torch.randn(1, 12, 2, 8)
    torch.testing.assert_close(
        flash.causal_attention(x, x, x, None, 0.5), attention(x, x, x, is_causal=True, scale=0.5)
    )
