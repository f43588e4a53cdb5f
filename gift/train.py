"""Stage 2: a LoRA adapter on the base model, its loss weighted token by token.

    L = Σ_t w_t · (−log p_base,adapter(y_t | x, y_<t)) / normalizer      over one global batch

The weights w are formed in `weighting.py`, without gradient. Gradients of the plain sums are
accumulated over micro-batches and ranks (`gradients.py`) and divided once, by the tokens or the
weights of the whole global batch: any split of it gives the same update.

Under torchrun each rank takes a share of every global batch; the adapter's gradients are summed.
With `--shard` the frozen model is divided among the ranks too (`sharding.py`).
"""

import json
import math
import time
import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import get_scheduler

from gift import figures
from gift.confidence_store import CONFIDENCE_FILE, ConfidenceStore, load_store, require_same_rows
from gift.config import TrainConfig
from gift.console import console, print_summary, progress
from gift.data.encoding import EncodedData, data_summary, encode_file, read_rows, require_vocabulary
from gift.data.lines import line_starts
from gift.data.packing import enable_packing
from gift.data.token_ids import other_tokens, require_same_tokens
from gift.distributed import ranks
from gift.errors import InputError
from gift.models.head import check_head
from gift.models.loading import (
    folder_context,
    load_causal_lm,
    model_structure,
    pick_device,
    pick_dtype,
    resolve_model,
    versions,
)
from gift.models.tokenizer import load_tokenizer, template_hash, tokenizer_hash
from gift.speed import SPEED_FILE, Clock, load_and_hash, print_times, speed
from gift.storage.files import hash_file, hash_json, naming_file, replacing, write_json
from gift.storage.publish import WORK_FOLDER
from gift.training.checkpoint import TrainingState
from gift.training.gradients import SUMS, accumulate_gradients, flat_gradients
from gift.training.lora_targets import find_targets, lora_config
from gift.training.memory import forgotten_if_short, settle_memory
from gift.training.micro_batches import BAND_NAMES, Split, global_batches, idle_rows, token_limit
from gift.training.sharding import load_sharded, require_processes, whole_head
from gift.weighting.targets import GuidedRow
from gift.weighting.weights import check_weighting, guided_rows, refuse_all_zero

MANIFEST_FILE = "gift_train.json"
METRICS_FILE = "metrics.jsonl"
RATES = ("tokens_per_second", "useful_tflops", "share_of_peak")
DIVISORS = {"tokens": "tokens", "weights": "weight"}
# Options that divide a step's work without changing its update; a resumed run may change them.
SPLIT = ("micro_batch_tokens", "micro_batch_size", "gradient_checkpointing")


def train(config: TrainConfig, key: str = "") -> dict[str, Any]:
    """Trains and writes the PEFT adapter; returns the summary.

    `key` is stored in the folder's `gift_files.json`, see `publish.output_folder`.
    """
    with (
        ranks.process_group() as group,
        ranks.shared_folder(group, config.output, overwrite=config.overwrite, key=key) as output,
    ):
        clock = Clock()
        if config.shard:
            require_processes()
        folder = resolve_model(config.model)
        targets = find_targets(config, model_structure(folder))
        store, tokenizer = _store_and_tokenizer(config)
        data, rows = _read_rows(config, folder, store, tokenizer)
        other = other_tokens(folder, tokenizer)
        require_same_tokens("--model", folder, other, data.kept, "the data's tokenizer")
        device = _device(config, group)
        dtype = pick_dtype(config.dtype, device)
        (model, packed), weights = load_and_hash(
            folder, clock, lambda: _adapted_model(config, data, dtype, device)
        )
        made_from = {
            **_made_from(config, weights, tokenizer, store),
            "device": device.type,
            "dtype": str(dtype),
        }
        group.require_equal(config.model_dump(include=set(SPLIT)))
        partial = ranks.begin_shared(group, output, made_from)
        split = Split(token_limit(config, device), packed)
        with clock("trial"):
            split = settle_memory(config, model, rows, split, group, partial / WORK_FOLDER)
        with forgotten_if_short(partial / WORK_FOLDER):
            history, loss_by_band = _fit(config, model, rows, split, group, partial, clock)
        summary = {
            **data_summary(data),
            **_run_summary(history),
            "micro_batch_tokens": split.tokens,
            "recomputed_layers": split.recomputed,
        }
        if store is not None:
            summary |= {
                f"loss share at {name}": share
                for name, share in zip(BAND_NAMES, _shares(loss_by_band), strict=True)
            }
        if group.is_main:
            manifest = _manifest(config, tokenizer, summary, made_from, store)
            with clock("save"):
                _write_adapter(model, tokenizer, partial, history, manifest)
            write_json(partial / SPEED_FILE, {"seconds": clock.seconds})
    if group.is_main:
        _print_result(config, targets.not_adapted, summary, clock)
    return summary


def _print_result(
    config: TrainConfig, not_adapted: Sequence[str], summary: dict[str, Any], clock: Clock
) -> None:
    if not_adapted:
        note = f"Note: no LoRA pair for {', '.join(not_adapted)}"
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    print_summary(f"Trained {config.weighting} adapter: {config.output}", summary)
    print_times(clock)


def _read_rows(
    config: TrainConfig, folder: Path, store: ConfidenceStore | None, tokenizer: Any
) -> tuple[EncodedData, list[GuidedRow]]:
    """The data as tokens, and its kept rows with the guide's confidences."""
    context = folder_context(folder)
    if store is not None:
        context = store.shorter_context(context)
    data = encode_file(config.data, tokenizer, config, context)
    if store is not None:
        require_same_rows(store, data, tokenizer)
    annotated = [torch.from_numpy(store.row(e.row)) for e in data.kept] if store else None
    lines = line_starts(data.kept, tokenizer) if config.confidence_level == "step" else None
    rows = guided_rows(config, data.kept, annotated, lines)
    refuse_all_zero(config, rows)
    return data, rows


def _made_from(
    config: TrainConfig, weights: str, tokenizer: Any, store: ConfidenceStore | None
) -> dict[str, Any]:
    """Everything that determines the adapter: settings, model, tokenizer, data and confidences."""
    inputs = {"model", "data", "confidence", "tokenizer"}
    without_effect = {"output", "overwrite", "checkpoint_steps", "shard", *SPLIT}
    return {
        **config.model_dump(mode="json", exclude=without_effect | inputs),
        "model": weights,
        "tokenizer": tokenizer_hash(tokenizer),
        "template": template_hash(tokenizer),
        "data": hash_json(read_rows(config.data, config)),
        "confidence": hash_file(store.folder / CONFIDENCE_FILE) if store else None,
    }


def _fit(
    config: TrainConfig,
    model: Any,
    rows: Sequence[GuidedRow],
    split: Split,
    group: ranks.Group,
    partial: Path,
    clock: Clock,
) -> tuple[list[dict[str, float]], Tensor]:
    """The training loop; returns the metrics of every step and the weighted loss per band."""
    steps_per_epoch = -(-len(rows) // config.global_batch_size)
    steps = steps_per_epoch * config.epochs
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Fused on a GPU: otherwise a step makes copies of all parameters, for which no memory is kept.
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        fused=parameters[0].is_cuda,
    )
    scheduler = get_scheduler(config.schedule, optimizer, round(config.warmup_ratio * steps), steps)
    torch.manual_seed(_dropout_seed(config.seed, group.rank))
    state = TrainingState(model, optimizer, scheduler, group)
    first_step, history, loss_by_band = state.load(partial / WORK_FOLDER)
    gradients = flat_gradients(parameters)
    model.train()
    with progress("train", steps, first_step, shown=group.is_main) as bar:
        for step, batch in islice(enumerate(global_batches(config, rows)), first_step, None):
            started = time.perf_counter()
            idle = idle_rows(config, batch, split, group) if config.shard else ()
            with clock("compute"):
                sums, losses = accumulate_gradients(config, model, group.share(batch), split, idle)
                norm = _reduce(config, sums, gradients, parameters, group)
                rate = optimizer.param_groups[0]["lr"]
                optimizer.step()
                scheduler.step()
                gradients.zero_()
            with clock("wait"):  # the step's only one
                *totals, gradient_norm = torch.cat([sums, norm.double()[None]]).tolist()
            named: dict[str, float] = dict(zip(SUMS, totals, strict=False))
            _require_finite(step + 1, named, gradient_norm, losses)
            loss_by_band += torch.tensor(totals[len(SUMS) :], dtype=torch.float64)
            history.append(
                {
                    "step": step + 1,
                    "epoch": (step + 1) / steps_per_epoch,
                    **_step_metrics(config, named),
                    "learning_rate": rate,
                    "gradient_norm": gradient_norm,
                    **_step_speed(model, batch, time.perf_counter() - started, group),
                    "peak_memory_gb": group.peak_memory_gb(),
                }
            )
            bar.advance()
            bar.note(f"loss {history[-1]['loss']:.4f}")
            if (step + 1) % config.checkpoint_steps == 0 or step + 1 == steps:
                with clock("save"):
                    state.save(partial / WORK_FOLDER, step + 1, history, loss_by_band)
                    if group.is_main:
                        _write_metrics(partial, history)
    _require_weights(config, history)
    return history, loss_by_band


def _dropout_seed(seed: int, rank: int) -> int:
    """A seed of its own for every seed and rank, not the one of the adapter's initialisation."""
    return int(np.random.SeedSequence(seed, spawn_key=(rank,)).generate_state(1, np.uint64)[0])


def _reduce(
    config: TrainConfig,
    sums: Tensor,
    gradients: Tensor,
    parameters: Sequence[Tensor],
    group: ranks.Group,
) -> Tensor:
    """All-reduces sums and gradients; divides and clips the gradients, returns their norm."""
    group.all_reduce_(sums)
    group.all_reduce_(gradients)
    divisor = sums[SUMS.index(DIVISORS[config.normalization])].float()
    gradients.div_(torch.where(divisor == 0, 1, divisor))
    return torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)


def _step_speed(
    model: Any, rows: Sequence[GuidedRow], seconds: float, group: ranks.Group
) -> dict[str, float]:
    base, examples = model.get_base_model(), [row.example for row in rows]
    found = speed(base, examples, seconds, trains=True, devices=group.size)
    return {"seconds": seconds, **found}


def _require_finite(
    step: int,
    totals: dict[str, float],
    gradient_norm: float,
    losses: Sequence[tuple[tuple[int, ...], Tensor]],
) -> None:
    """InputError where a loss or the gradient of a step is NaN or infinite."""
    advice = "lower --learning-rate, or use --dtype float32"
    if totals["not_finite"]:
        bad = [row for rows, loss in losses if not bool(loss.isfinite()) for row in rows]
        raise InputError(
            "the loss is not finite in a micro-batch with rows "
            f"{sorted(ranks.gather_lists(bad))}; look at these rows, {advice}"
        )
    if not math.isfinite(gradient_norm):
        raise InputError(
            f"the gradient of step {step} is not finite, although its loss is; {advice}"
        )


def _require_weights(config: TrainConfig, history: Sequence[dict[str, float]]) -> None:
    """InputError where no token had any weight."""
    if not any(entry["mean_weight"] for entry in history):
        raise InputError(
            f"every weight of every step was 0 (--weighting {config.weighting}, "
            f"--confidence-threshold {config.confidence_threshold:g}), so that nothing was "
            "learned; lower --confidence-threshold"
        )


def _step_metrics(config: TrainConfig, totals: dict[str, float]) -> dict[str, float]:
    """Means of a step over its tokens; the loss over its own divisor."""
    counted = totals["counted"] or 1.0
    return {
        "loss": totals["loss"] / (totals[DIVISORS[config.normalization]] or 1.0),
        "nll": totals["nll"] / counted,
        "mean_weight": totals["weight"] / totals["tokens"],
        "token_accuracy": totals["correct"] / counted,
        "tokens": totals["tokens"],
    }


def _device(config: TrainConfig, group: ranks.Group) -> torch.device:
    """The device: with GPUs the process's own, since NCCL cannot reduce CPU tensors."""
    if group.device and pick_device(config.device).type != group.device.type:
        raise InputError(
            f"--device: {config.device} under torchrun on a machine with GPUs; hide them from the "
            "processes with CUDA_VISIBLE_DEVICES= (empty), or use auto"
        )
    return group.device or pick_device(config.device)


def _store_and_tokenizer(config: TrainConfig) -> tuple[ConfidenceStore | None, Any]:
    check_weighting(config)
    store = load_store(config.confidence) if config.confidence else None
    if config.guided and store is None:
        raise InputError(
            f"--confidence: --weighting {config.weighting} needs the folder that gift annotate "
            "made; or choose --weighting uniform, self or entropy"
        )
    if config.tokenizer is not None:
        return store, load_tokenizer(resolve_model(config.tokenizer))
    if store is None:
        raise InputError(
            "--tokenizer: without --confidence, name the instruct model whose chat template to use"
        )
    return store, store.tokenizer()


def _adapted_model(
    config: TrainConfig, data: EncodedData, dtype: torch.dtype, device: torch.device
) -> tuple[Any, bool]:
    """The base model with a new adapter, and whether it reads packed rows."""
    load = load_sharded if config.shard else load_causal_lm
    model = load(resolve_model(config.model), dtype, device)
    require_vocabulary(model, data, config.model)
    shortest = min(data.kept, key=lambda example: len(example.input_ids))
    with whole_head(model):
        check_head(model, torch.from_numpy(shortest.input_ids).long().to(device))
    packed = enable_packing(model, data.kept)
    torch.manual_seed(config.seed)
    try:
        with warnings.catch_warnings():
            # PEFT uses an attribute that Transformers deprecates.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted = get_peft_model(model, lora_config(config, find_targets(config, model)))
    except ValueError as error:
        raise InputError(f"--lora-targets: {error}") from error
    lora: Any = adapted.peft_config["default"]
    lora.base_model_name_or_path = config.model
    # PEFT collects the names in sets, whose order would differ between runs.
    lora.target_modules = sorted(lora.target_modules)
    lora.target_parameters = sorted(lora.target_parameters or []) or None
    return adapted, packed


def _manifest(
    config: TrainConfig,
    tokenizer: Any,
    summary: dict[str, Any],
    made_from: dict[str, Any],
    store: ConfidenceStore | None,
) -> dict[str, Any]:
    return {
        "kind": "gift adapter",
        "fingerprint": hash_json(made_from),
        "base_model": config.model,
        "base_model_hash": made_from["model"],
        "guide_model": store.manifest["model"] if store else None,
        "guide_model_hash": store.manifest.get("model_hash") if store else None,
        "data_hash": hash_file(config.data),
        "confidence_hash": hash_file(store.folder / CONFIDENCE_FILE) if store else None,
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "template_hash": template_hash(tokenizer),
        "settings": config.model_dump(mode="json", exclude={"output", "overwrite"}),
        "summary": summary,
        "versions": versions(),
    }


def _write_adapter(
    model: Any,
    tokenizer: Any,
    partial: Path,
    history: Sequence[dict[str, float]],
    manifest: dict[str, Any],
) -> None:
    with naming_file(partial / "adapter_model.safetensors"):
        model.save_pretrained(partial, save_embedding_layers=False)
    with naming_file(partial / "tokenizer.json"):
        tokenizer.save_pretrained(partial)
    write_json(partial / MANIFEST_FILE, manifest)
    _write_metrics(partial, history)
    figures.plot_training(partial / METRICS_FILE, partial / "loss.png")


def _write_metrics(partial: Path, history: Sequence[dict[str, float]]) -> None:
    """Writes the metrics of all steps; during training a readable copy of the checkpoint's."""
    with replacing(partial / METRICS_FILE) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in history))


def _run_summary(history: Sequence[dict[str, float]]) -> dict[str, float]:
    first, last = history[0], history[-1]
    return {
        "steps": len(history),
        "first_loss": first["loss"],
        "last_loss": last["loss"],
        "last_nll": last["nll"],
        "last_token_accuracy": last["token_accuracy"],
        **{name: _over_time(history, name) for name in RATES if name in last},
        "peak_memory_gb": max(entry["peak_memory_gb"] for entry in history),
    }


def _over_time(history: Sequence[dict[str, float]], rate: str) -> float:
    """The mean of a rate, weighted by the seconds of each step."""
    seconds = sum(entry["seconds"] for entry in history)
    return sum(entry["seconds"] * entry[rate] for entry in history) / seconds


def _shares(loss_by_band: Tensor) -> list[float]:
    return (loss_by_band / loss_by_band.sum().clamp(min=1e-300)).tolist()
