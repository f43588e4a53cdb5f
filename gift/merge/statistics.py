"""Statistics of a model on data, which Fisher merging and RegMean need.

fisher: F = mean over rows of (∂ log p(y | x) / ∂θ)², y the row's target tokens: the empirical
diagonal Fisher, with the data's own labels (Fisher merging, arXiv 2111.09832, section 3, takes
labels drawn from the model).
regmean: G = X^T X of every linear layer's inputs, all tokens of the data (arXiv 2212.09849).

Run it on each model that is merged: the instruct model, and each task model (the base model with
its adapter, which `gift merge --model BASE --adapter ADAPTER` writes). It holds the model and one
float32 number a parameter (fisher) or a K x K matrix a layer (regmean) in memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gift.config import StatisticsConfig
from gift.console import print_summary, progress
from gift.data.batches import make_batch
from gift.data.encoding import Example, data_summary, encode_file, require_vocabulary
from gift.data.token_ids import require_same_tokens, tokenizer_for
from gift.merge.build import STATISTICS_FILE, STATISTICS_MANIFEST
from gift.merge.methods import METHODS
from gift.models.loading import (
    folder_context,
    load_causal_lm,
    model_hash,
    pick_device,
    pick_dtype,
    resolve_model,
    versions,
)
from gift.storage.files import hash_file, naming_file, write_json
from gift.storage.publish import output_folder


def merge_statistics(config: StatisticsConfig, key: str = "") -> dict[str, Any]:
    """Writes a model's statistics for `gift merge --statistics`; returns the summary."""
    with output_folder(config.output, overwrite=config.overwrite, key=key) as output:
        folder = resolve_model(config.model)
        tokenizer, other = tokenizer_for(folder, config.tokenizer)
        data = encode_file(config.data, tokenizer, config, folder_context(folder))
        require_same_tokens("--tokenizer", folder, other, data.kept, config.tokenizer)
        weights = model_hash(folder)
        device = pick_device(config.device)
        model = load_causal_lm(folder, pick_dtype(config.dtype, device), device)
        require_vocabulary(model, data, config.model)
        diagonal = METHODS[config.kind].statistics == "diagonal"
        collect = fisher_diagonals if diagonal else gram_matrices
        statistics = collect(model, data.kept)
        partial = output.begin()
        with naming_file(partial / STATISTICS_FILE):
            save_file(statistics, partial / STATISTICS_FILE)
        summary = {**data_summary(data), "tensors": len(statistics)}
        write_json(
            partial / STATISTICS_MANIFEST,
            {
                "kind": f"gift {config.kind} statistics",
                "model": config.model,
                "model_hash": weights,
                "data_hash": hash_file(config.data),
                "summary": summary,
                "versions": versions(),
            },
        )
    print_summary(f"{config.kind} statistics: {config.output}", summary)
    return summary


def fisher_diagonals(model: nn.Module, examples: Sequence[Example]) -> dict[str, Tensor]:
    """The empirical diagonal Fisher of every parameter, float32 in the parameter's shape."""
    parameters = dict(model.named_parameters())
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    device = next(iter(parameters.values())).device
    with progress("Fisher diagonals", len(examples)) as bar:
        for example in examples:
            model.zero_grad(set_to_none=True)
            batch = make_batch([example], packed=False).to(device)
            logits = model(**batch.inputs, use_cache=False).logits[0, batch.predicts]
            nn.functional.cross_entropy(logits.float(), batch.targets, reduction="sum").backward()
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad.float().square()
            bar.advance()
    model.zero_grad(set_to_none=True)
    return {name: (total / len(examples)).cpu() for name, total in sums.items()}


@torch.no_grad()
def gram_matrices(model: nn.Module, examples: Sequence[Example]) -> dict[str, Tensor]:
    """X^T X float32 [K, K] of the inputs of every linear layer, by the weight's name."""
    device = next(model.parameters()).device
    with _gathered_grams(model) as grams, progress("Gram matrices", len(examples)) as bar:
        for example in examples:
            batch = make_batch([example], packed=False).to(device)
            model(**batch.inputs, use_cache=False)
            bar.advance()
    return {name: gram.cpu() for name, gram in grams.items()}


@contextmanager
def _gathered_grams(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    grams: dict[str, Tensor] = {}

    def watch(name: str, layer: nn.Linear) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].reshape(-1, layer.in_features).float()
            grams[name] = grams.get(name, 0) + rows.T @ rows

        return layer.register_forward_pre_hook(add)

    hooks = [
        watch(f"{name}.weight", layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        yield grams
    finally:
        for hook in hooks:
            hook.remove()
