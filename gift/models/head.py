"""A causal language model's head, and the hidden states that reach it."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gift.errors import InputError
from gift_kernels import weighted_ce

CHECKED_TOKENS = 256
HEAD_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class LMHead:
    """The last layer of a causal language model: weight [V, D], bias [V] and logit options."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None

    def options(self, prefix: str = "") -> dict[str, Any]:
        """Keyword arguments of `weighted_ce` and `token_confidence`."""
        return {
            f"{prefix}bias": self.bias,
            f"{prefix}logit_scale": self.logit_scale,
            f"{prefix}logit_softcap": self.logit_softcap,
        }


def lm_head(model: Any) -> LMHead:
    """Reads the head and its options from a Transformers model and its config."""
    layer = model.get_output_embeddings()
    if layer is None:
        raise InputError(f"{type(model).__name__} has no language-model head")
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return LMHead(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        logit_scale=scale / scaling,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def last_hidden_state(model: Any, **inputs: Any) -> Tensor:
    """Hidden states [B, T, D] after the final norm, as the head receives them."""
    return model.get_decoder()(**inputs, use_cache=False).last_hidden_state


@torch.no_grad()
def check_head(model: Any, input_ids: Tensor) -> None:
    """Raises InputError unless our head gives the loss of the model's own forward on ids [T].

    Catches every option of a head that `lm_head` does not know of. The model's own forward has all
    logits of the row, so that a long one is cut.
    """
    input_ids = input_ids[:CHECKED_TOKENS]
    batch = input_ids.unsqueeze(0)
    mask = torch.ones_like(batch)
    head = lm_head(model)
    hidden = last_hidden_state(model, input_ids=batch, attention_mask=mask)[0, :-1]
    hidden = hidden.to(head.weight.dtype)
    ours = float(weighted_ce(hidden, head.weight, input_ids[1:], **head.options()))
    logits = model(input_ids=batch, attention_mask=mask, use_cache=False).logits[0, :-1].float()
    own = float(torch.nn.functional.cross_entropy(logits, input_ids[1:]))
    if not math.isfinite(own):
        raise InputError(
            f"{model.config.name_or_path or type(model).__name__}: the model's loss is {own}: its "
            f"weights are damaged, or overflow in {head.weight.dtype}"
        )
    if not abs(ours - own) <= HEAD_TOLERANCE[head.weight.dtype] * max(1.0, abs(own)):
        raise InputError(
            f"{type(model).__name__}: the loss of the model's own forward ({own:.6f}) differs from "
            f"that of its hidden states under its head ({ours:.6f}); its head does something that "
            "is not a bias, a logit scale or a soft-cap, and is not supported"
        )
