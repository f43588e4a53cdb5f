"""Packed rows: no padding, and attention that keeps the rows apart.

A packed batch is one sequence [1, T] of rows one after the other, with positions that restart in
every row. Every layer but attention treats tokens one by one; attention is replaced by a function
that takes each row alone: one of flash-attn where it is installed, else `packed_attention`. A model
is given packed rows only after it has shown that it reads them as it reads the rows alone.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from gift.console import error_console
from gift.data.batches import make_batch
from gift.data.encoding import Example
from gift.models.head import last_hidden_state

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch 2.9
    varlen_attn = None

NAME = "gift_packed"
# Layers of these types are attention that `packed_attention` can express.
LAYER_TYPES = {"full_attention", "sliding_attention"}
_VARLEN_OPTIONS = set(inspect.signature(varlen_attn).parameters) if varlen_attn else set()


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: tuple[int, ...],
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row, in the form of `transformers.AttentionInterface`.

    Args:
        query: [1, H, T, d]; key and value [1, H_kv, T, d], each head for H / H_kv of the query's.
        row_lengths: tokens of each row, T in all, `max_length_q` at most; `cu_seq_lens_q` int32
            [rows + 1] are their borders. The kernel reads the latter two alone, so that a compiled
            block takes any number of rows.
        sliding_window: a token sees itself and the `sliding_window - 1` before it.

    Returns:
        [1, T, H, d], and None for the attention's weights.

    Raises:
        ValueError: the model soft-caps its scores.
    """
    if softcap is not None:
        raise ValueError("its attention soft-caps scores")
    is_16_bit = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and is_16_bit and dropout == 0 and "window_size" in _VARLEN_OPTIONS:
        tensors = query, key, value, cu_seq_lens_q
        return _fused(*tensors, max_length_q, scaling, sliding_window), None
    rows = []
    for q, k, v in zip(*(x.split(row_lengths, 2) for x in (query, key, value)), strict=True):
        length = q.shape[2]
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = torch.ones(length, length, dtype=torch.bool, device=q.device)
            mask = mask.tril().triu(1 - sliding_window)
        rows.append(
            nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(rows, 2).transpose(1, 2), None


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    longest: int,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """`packed_attention` in one kernel of PyTorch's."""
    assert varlen_attn is not None
    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in _VARLEN_OPTIONS:
        options["enable_gqa"] = True
    else:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, H, d]
    attended: Any = varlen_attn(
        q, k, v, borders, borders, longest, longest, scale=scaling, **options
    )
    return attended[None]


# No mask is registered under the name, so that Transformers makes none.
AttentionInterface.register(NAME, packed_attention)


def enable_packing(model: Any, examples: Sequence[Example]) -> bool:
    """Makes a model in evaluation mode read packed rows; False, and a note why, where it cannot.

    It is tried on the two shortest of the examples, and on the longest where the model's attention
    has a window that is shorter.
    """
    original = model.config._attn_implementation
    reason = _refuse_layers(model)
    for name in () if reason else _attentions():
        reason = _difference(model, _tried_rows(model, examples), name, original)
        if not reason:
            return True
    model.set_attn_implementation(original)
    error_console.print(
        f"note: {type(model).__name__}: rows are padded, not packed: {reason}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return False


def _attentions() -> list[str]:
    """Names of attention functions that take packed rows, the fastest first."""
    installed = {
        "flash_attention_3": is_flash_attn_3_available(),
        "flash_attention_2": is_flash_attn_2_available(),
    }
    return [*(name for name, is_there in installed.items() if is_there), NAME]


def _refuse_layers(model: Any) -> str:
    """Why no attention function can make packed rows right; empty if nothing is known."""
    others = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - LAYER_TYPES
    return f"it has layers of type {', '.join(sorted(others))}" if others else ""


def _tried_rows(model: Any, examples: Sequence[Example]) -> list[Example]:
    by_length = sorted(examples, key=lambda example: len(example.input_ids))
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    rows = [by_length[0], by_length[min(1, len(by_length) - 1)]]
    if window is not None and len(by_length[-1].input_ids) > window:
        rows.append(by_length[-1])
    return rows


@torch.no_grad()
def _difference(model: Any, rows: Sequence[Example], name: str, original: str) -> str:
    """How the hidden states of packed rows differ from those of the rows alone; empty if not.

    Half of the dtype's digits must agree: kernels round differently, but a row that sees another,
    or has other positions, differs by far more.
    """
    device = model.get_input_embeddings().weight.device
    try:
        model.set_attn_implementation(name)
        if model.config.get_text_config()._attn_implementation != name:
            return "its attention cannot be replaced"
        batch = make_batch(rows, packed=True).to(device)
        packed = last_hidden_state(model, **batch.inputs)[0].float()
    except Exception as error:  # a model's own code may raise anything
        return (str(error).splitlines() or [repr(error)])[0]
    model.set_attn_implementation(original)
    lengths = [len(row.input_ids) for row in rows]
    errors = []
    for row, hidden in zip(rows, packed.split(lengths), strict=True):
        inputs = make_batch([row], packed=False).to(device).inputs
        alone = last_hidden_state(model, **inputs)[0].float()
        errors.append((hidden - alone).norm() / alone.norm())
    model.set_attn_implementation(name)
    worst = float(torch.stack(errors).max())
    if worst <= torch.finfo(model.dtype).eps ** 0.5:
        return ""
    return f"the hidden states of two rows change by {worst:.1g} of their size when packed"
