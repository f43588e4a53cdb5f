"""Weighted losses for the trainers of Transformers and TRL: see docs/trainers.md.

`WeightedTrainer` is Transformers' `Trainer`, `WeightedSFTTrainer` TRL's `SFTTrainer`, and
`WeightedLossMixin` goes before any other subclass of `Trainer`. `gift.datasets.with_confidence`
makes the data set with a guide's weights.
"""

from typing import TYPE_CHECKING, Any

from gift.errors import InputError
from gift.integrations.collator import TOKEN_WEIGHT, WeightedCollator
from gift.integrations.trainer import WeightedLossMixin, WeightedTrainer

if TYPE_CHECKING:
    from gift.integrations.sft import WeightedSFTTrainer

__all__ = [
    "TOKEN_WEIGHT",
    "WeightedCollator",
    "WeightedLossMixin",
    "WeightedSFTTrainer",
    "WeightedTrainer",
]


def __getattr__(name: str) -> Any:
    """`WeightedSFTTrainer`, for which TRL is imported."""
    if name != "WeightedSFTTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from gift.integrations.sft import WeightedSFTTrainer
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise InputError(
            "WeightedSFTTrainer: TRL is not installed; pip install 'gift-tuning[trl]'"
        ) from error
    return WeightedSFTTrainer
