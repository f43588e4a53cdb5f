"""Fused kernels for guided fine-tuning: weighted linear cross-entropy, confidence, LoRA merge.

Imports without a GPU and without Triton; needs torch alone. See each function's docstring.
"""

from gift_kernels.lora_merge import lora_merge, lora_merge_
from gift_kernels.reference import TokenStats
from gift_kernels.token_confidence import token_confidence
from gift_kernels.weighted_ce import weighted_ce

__all__ = ["TokenStats", "lora_merge", "lora_merge_", "token_confidence", "weighted_ce"]
