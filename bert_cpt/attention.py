"""Attention over a packed stream: every token attends within its own sequence.

One function, registered with transformers under a name of its own, so that BERT itself stays as it
is. On CUDA in half precision it is `varlen_attn` (FlashAttention), which has no dropout; everywhere
else one SDPA call for each run of sequences of equal length, the fastest way on CPUs.
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "bert_cpt_packed"


@dataclass(frozen=True)
class Packing:
    """Where the sequences of a packed stream lie.

    Attributes:
        cu_seqlens: int32[n + 1] on the device of the stream.
        lengths: the same, as Python ints.
        max_length: an upper bound of the lengths, constant over a run.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    max_length: int


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed stream.

    Args:
        query, key, value: [1, heads, T, head_size].
        attention_mask: None; isolation comes from `packing`.

    Returns:
        [1, T, heads, head_size], and None for the attention weights.
    """
    assert attention_mask is None, "a packed stream has no attention mask"
    if query.is_cuda and query.dtype != torch.float32 and dropout == 0.0:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        limit = packing.max_length
        output = varlen_attn(
            q, k, v, packing.cu_seqlens, packing.cu_seqlens, limit, limit, scale=scaling
        )
        assert isinstance(output, Tensor)
        return output.unsqueeze(0), None
    return _attention_by_runs(query, key, value, packing.lengths, dropout, scaling), None


@torch.compiler.disable  # the lengths differ with every batch
def _attention_by_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """One SDPA call for each run of sequences of equal length: [1, T, heads, head_size]."""
    runs = [(length, len(list(group))) for length, group in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *tensors in zip(
        runs, *(tensor.split(sizes, dim=2) for tensor in (query, key, value)), strict=True
    ):
        # [1, heads, count * length, size] -> [count, heads, length, size], without a copy
        q, k, v = (t[0].unflatten(1, (count, length)).transpose(0, 1) for t in tensors)
        output = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)


AttentionInterface.register(NAME, packed_attention)
