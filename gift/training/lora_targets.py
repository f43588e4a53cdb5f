"""Which weights get a LoRA pair: `--lora-targets` looked up in the model, as PEFT would do it.

A target matches modules and parameters whose dotted name ends with it. The output layer and the
embedding are refused: the loss reads the output layer's weight directly, so a LoRA pair on it would
not be trained, and with tied weights a change to one side cannot be merged.
"""

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from gift.config import TrainOptions
from gift.errors import InputError

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraTargets:
    """Names for PEFT's `target_modules` and `target_parameters`, and what all-linear leaves out.

    `parameters` are stacks [E, M, K] of expert weights, which are not modules. `not_adapted` names
    matrices of the blocks, such as routers, that get no LoRA pair.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    not_adapted: tuple[str, ...] = ()


def find_targets(config: TrainOptions, model: Any) -> LoraTargets:
    """Looks the targets up in a model, which may be on the meta device.

    InputError: a target that is, or holds, the output layer or the embedding, that is not in the
    model or that PEFT cannot adapt; dropout where experts are adapted.
    """
    if config.lora_targets.strip().lower() == ALL_LINEAR:
        targets = _all_linear(model)
    else:
        names = [name.strip() for name in config.lora_targets.split(",") if name.strip()]
        targets = _named(names, model)
    if targets.parameters and config.lora_dropout > 0:
        raise InputError(
            f"--lora-dropout: {config.lora_dropout} is not possible on expert weights "
            f"({', '.join(targets.parameters)}); pass --lora-dropout 0, or name --lora-targets "
            "without them"
        )
    return targets


def lora_config(config: TrainOptions, targets: LoraTargets) -> LoraConfig:
    """PEFT's settings of the adapter."""
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.lora_dropout,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        use_rslora=config.rslora,
        task_type="CAUSAL_LM",
    )


def _all_linear(model: Any) -> LoraTargets:
    """Every linear layer and stack of expert weights of the blocks."""
    body = model.get_decoder()
    linear = {name for name, module in body.named_modules() if _is_linear(module)}
    stacks = {name for name, parameter in body.named_parameters() if parameter.ndim == 3}
    embeddings = {
        f"{name}.weight" for name, module in body.named_modules() if _is_embedding(module)
    }
    weights = {f"{name}.weight" for name in linear}
    not_adapted = {
        _without_numbers(name)
        for name, parameter in body.named_parameters()
        if parameter.ndim > 1 and name not in stacks | embeddings | weights
    }
    modules = {name.rpartition(".")[2] for name in linear}
    parameters = {".".join(name.split(".")[-2:]) for name in stacks}
    return LoraTargets(
        tuple(sorted(modules)), tuple(sorted(parameters)), tuple(sorted(not_adapted))
    )


def _named(names: list[str], model: Any) -> LoraTargets:
    modules, parameters = [], []
    all_modules = dict(model.named_modules())
    stacks = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    for target in names:
        _refuse_ends(target, model)
        found = [module for name, module in all_modules.items() if _ends(name, target)]
        # The name of a module that holds expert stacks selects all of them.
        stacked = {name for name in stacks if _ends(name, target)}
        stacked |= {name for name in stacks if _ends(name.rpartition(".")[0], target)}
        if found and all(map(_is_linear, found)):
            modules.append(target)
        elif stacked:
            parameters += [".".join(name.split(".")[-2:]) for name in stacked]
        else:
            what = f"is a {type(found[0]).__name__}" if found else "is not in the model"
            known = _all_linear(model)
            raise InputError(
                f"--lora-targets: {target} {what}; adapt linear layers "
                f"({', '.join((*known.modules, *known.parameters))}) or {ALL_LINEAR}"
            )
    if not names:
        raise InputError(f"--lora-targets: names nothing; give module names or {ALL_LINEAR}")
    return LoraTargets(tuple(modules), tuple(sorted(set(parameters))))


def _refuse_ends(target: str, model: Any) -> None:
    ends = {
        "output layer": model.get_output_embeddings(),
        "embedding": model.get_input_embeddings(),
    }
    for kind, layer in ends.items():
        for name, module in model.named_modules():
            if module is layer and _ends(name, target):
                raise InputError(
                    f"--lora-targets: {target} is the model's {kind} ({name}), which gets no LoRA "
                    f"pair: adapt layers of the blocks, as {ALL_LINEAR} does"
                )


def _ends(name: str, target: str) -> bool:
    """PEFT's rule for a list of targets."""
    return name == target or name.endswith(f".{target}")


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
