"""Fused kernels for guided fine-tuning: weighted linear cross-entropy, confidence, LoRA merge.

Imports without a GPU and without Triton; needs torch alone. See each function's docstring.
"""

from gift_kernels.linear_ce.api import weighted_ce
from gift_kernels.linear_ce.token_confidence import token_confidence
from gift_kernels.lora_merge.api import lora_merge, lora_merge_
from gift_kernels.reference import TokenStats

__all__ = ["TokenStats", "lora_merge", "lora_merge_", "token_confidence", "weighted_ce"]
