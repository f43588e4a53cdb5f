"""Fused kernels for guided fine-tuning: weighted linear cross-entropy, confidence, LoRA merge.

Importing it needs neither a GPU nor Triton, only torch. See each function's docstring.
"""

from gift_kernels.linear_ce.api import token_confidence, weighted_ce
from gift_kernels.linear_ce.types import Guide, TokenStats, VocabParallel, WeightTransform
from gift_kernels.lora_merge.api import lora_merge, lora_merge_

__all__ = [
    "Guide",
    "TokenStats",
    "VocabParallel",
    "WeightTransform",
    "lora_merge",
    "lora_merge_",
    "token_confidence",
    "weighted_ce",
]
