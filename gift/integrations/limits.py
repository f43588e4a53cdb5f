"""Checks before training: refuses what the weighted loss does not support."""

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from gift.errors import InputError
from gift.models.head import check_head, lm_head

# Tokens for which the loss is compared with the model's own.
TRIED_TOKENS = 16


def base_of(model: Any) -> Any:
    """The model that PEFT has wrapped, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def refuse_options(trainer: Any) -> None:
    """InputError for arguments of a trainer that the weighted loss would ignore."""
    args = trainer.args
    liger = args.liger_kernel_config or {}
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    sizes = [getattr(parallel, f"{kind}_size", 1) or 1 for kind in ("tp", "cp", "sp")]
    refused = {
        "model_init: the loss is put into the model that is passed; pass a model": (
            trainer.model_init is not None
        ),
        "compute_loss_func: the weighted loss takes its place; leave it out": callable(
            trainer.compute_loss_func
        ),
        "label_smoothing_factor: the weighted loss has no smoothing; set it to 0": (
            args.label_smoothing_factor != 0
        ),
        "use_liger_kernel: Liger's loss would replace the weighted one; pass "
        "liger_kernel_config={'fused_linear_cross_entropy': False}": (
            args.use_liger_kernel and liger.get("fused_linear_cross_entropy", True)
        ),
        "several GPUs in one process (nn.DataParallel): start the script with torchrun or "
        "accelerate launch, or make one GPU visible with CUDA_VISIBLE_DEVICES": args.n_gpu > 1,
        "DeepSpeed: it gives the head's weight only to the head's own forward; use FSDP": (
            trainer.is_deepspeed_enabled
        ),
        "tensor, context or sequence parallelism: the loss needs whole rows and a whole head; use "
        "data parallelism (DDP or FSDP)": max(sizes) > 1,
    }
    for message, is_asked in refused.items():
        if is_asked:
            raise InputError(message)


def check_model(trainer: Any) -> None:
    """InputError where the loss from hidden states and head would differ from the model's own."""
    model = trainer.model
    _refuse_adapters(model)
    base = base_of(model)
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        raise InputError(
            "the model adds an auxiliary loss of its routers, which the weighted loss has not; set "
            "model.config.output_router_logits = False (TRL: SFTConfig(router_aux_loss_coef=0.0))"
        )
    # On other ranks FSDP may load the weights later.
    if trainer.accelerator.is_main_process:
        _compare_losses(base)
    guide = trainer.weights
    if guide is base:
        raise InputError("weights: the guide is the model that is trained; pass weights='self'")
    if isinstance(guide, PreTrainedModel):
        ours, theirs = (len(lm_head(some).weight) for some in (base, guide))
        if theirs < ours:
            raise InputError(
                f"weights: the guide's head has {theirs} tokens, the model's {ours}; a guide must "
                "have the model's token ids"
            )
        _compare_losses(guide)


def _refuse_adapters(model: Any) -> None:
    if not isinstance(model, PeftModel):
        return
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise InputError(
            "peft_config: prompt learning puts tokens before those that have weights; use LoRA"
        )
    head: Any = base_of(model).get_output_embeddings()
    is_copy = isinstance(head, ModulesToSaveWrapper)
    if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper) and not is_copy:
        raise InputError(
            f"peft_config: the head has a {type(head).__name__} of PEFT, which the loss would not "
            "train, because it multiplies by the head's weight itself; leave the head out of "
            "target_modules and trainable_token_indices, or train all of it with "
            "modules_to_save=['lm_head']"
        )


def _compare_losses(model: Any) -> None:
    """`check_head` on a few tokens, in evaluation mode; not for parameters that are sharded."""
    weights = lm_head(model).weight
    if isinstance(weights, DTensor) or weights.is_meta:
        return
    if not weights.is_floating_point():
        raise InputError("the model's head is quantised; load it without quantising the head")
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        check_head(model, torch.arange(min(TRIED_TOKENS, len(weights)), device=weights.device))
    model.train(was_training)
