"""Stage 2: a LoRA adapter on the base model, its loss weighted token by token.

    L = Σ_t w_t · (−log p_base,adapter(y_t | x, y_<t)) / normalizer      over one global batch

The weights w are formed in `weighting.py`, without gradient. Gradients of the plain sums are
accumulated over micro-batches and ranks and divided once, by the tokens or the weights of the whole
global batch: any split of it gives the same update.

Under torchrun each rank takes a share of every global batch; the adapter's gradients are summed.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import get_scheduler

from gift import figures, ranks
from gift.batches import pad_batch, target_ids
from gift.checkpoint import TrainingState
from gift.confidence_store import CONFIDENCE_FILE, ConfidenceStore, load_store, require_same_rows
from gift.config import TrainConfig
from gift.console import console, print_summary, progress
from gift.data import EncodedData, data_summary, encode_file, read_rows, require_vocabulary
from gift.errors import InputError
from gift.files import hash_file, hash_json, naming, replacing, write_json
from gift.lines import line_starts
from gift.lora_targets import find_targets, lora_config
from gift.models import (
    check_head,
    folder_context,
    last_hidden_state,
    lm_head,
    load_causal_lm,
    load_tokenizer,
    model_hash,
    model_structure,
    pick_device,
    pick_dtype,
    resolve_model,
    template_hash,
    tokenizer_hash,
    versions,
)
from gift.publish import WORK_FOLDER, output_folder, partial_path
from gift.weighting import (
    STATISTICS,
    GuidedRow,
    check_weighting,
    gather_targets,
    guided_rows,
    known_zeros,
    token_weights,
)
from gift_kernels import weighted_ce

MANIFEST_FILE = "gift_train.json"
METRICS_FILE = "metrics.jsonl"
BAND_EDGES = (0.1, 0.5, 0.9)
BAND_NAMES = ("q < 0.1", "0.1 ≤ q < 0.5", "0.5 ≤ q < 0.9", "q ≥ 0.9")
# Sums over micro-batches; in the tensor the loss of each confidence band follows them. Tokens whose
# weight is known to be 0 have no nll, are not `counted` and cannot be correct.
SUMS = ("loss", "nll", "weight", "tokens", "counted", "correct")
IGNORE_INDEX = -100


def train(config: TrainConfig, key: str = "") -> dict[str, Any]:
    """Trains and writes the PEFT adapter; returns the summary.

    `key` is stored in the folder's `gift_files.json`, see `publish.output_folder`.
    """
    with ranks.process_group() as group, _work_folder(config, group, key) as begin:
        targets = find_targets(config, model_structure(resolve_model(config.model)))
        store, tokenizer = _store_and_tokenizer(config)
        context = folder_context(resolve_model(config.model))
        if store is not None:
            context = store.shorter_context(context)
        data = encode_file(config.data, tokenizer, config, context)
        if store is not None:
            require_same_rows(store, data, tokenizer)
        annotated = [torch.from_numpy(store.row(e.row)) for e in data.kept] if store else None
        lines = line_starts(data.kept, tokenizer) if config.confidence_level == "step" else None
        rows = guided_rows(config, data.kept, annotated, lines)
        device = group.device or pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        made_from = {
            **_made_from(config, tokenizer, store),
            "ranks": group.size,
            "device": device.type,
            "dtype": str(dtype),
        }
        model = _adapted_model(config, data, dtype, device)
        partial = begin(made_from)
        group.barrier()
        history, loss_by_band = _fit(config, model, rows, group, partial)
        summary = {**data_summary(data), **_run_summary(history)}
        if store is not None:
            summary |= {
                f"loss share at {name}": share
                for name, share in zip(BAND_NAMES, _shares(loss_by_band), strict=True)
            }
        if group.is_main:
            manifest = _manifest(config, tokenizer, summary, hash_json(made_from), store)
            _write_adapter(model, tokenizer, partial, history, manifest)
    if group.is_main:
        if targets.left:
            note = f"Note: no LoRA pair for {', '.join(targets.left)}"
            console.print(note, markup=False, highlight=False, soft_wrap=True)
        print_summary(f"Trained {config.weighting} adapter: {config.output}", summary)
    return summary


@contextmanager
def _work_folder(
    config: TrainConfig, group: ranks.Group, key: str
) -> Iterator[Callable[[dict[str, Any]], Path]]:
    """Yields a function that makes the partial folder; only the main rank publishes it."""
    if not group.is_main:
        yield lambda _: partial_path(config.output)
        return
    with output_folder(config.output, overwrite=config.overwrite, key=key) as output:
        yield output.begin


def _made_from(
    config: TrainConfig, tokenizer: Any, store: ConfidenceStore | None
) -> dict[str, Any]:
    """Everything that determines the adapter: settings, model, tokenizer, data and confidences."""
    inputs = {"model", "data", "confidence", "tokenizer"}
    return {
        **config.model_dump(
            mode="json", exclude={"output", "overwrite", "checkpoint_steps"} | inputs
        ),
        "model": model_hash(resolve_model(config.model)),
        "tokenizer": tokenizer_hash(tokenizer),
        "template": template_hash(tokenizer),
        "data": hash_json(read_rows(config.data, config)),
        "confidence": hash_file(store.folder / CONFIDENCE_FILE) if store else None,
    }


def _fit(
    config: TrainConfig,
    model: Any,
    rows: Sequence[GuidedRow],
    group: ranks.Group,
    partial: Path,
) -> tuple[list[dict[str, float]], Tensor]:
    """The training loop; returns the metrics of every step and the weighted loss per band."""
    steps_per_epoch = -(-len(rows) // config.global_batch_size)
    steps = steps_per_epoch * config.epochs
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay
    )
    scheduler = get_scheduler(config.schedule, optimizer, round(config.warmup_ratio * steps), steps)
    state = TrainingState(model, optimizer, scheduler, group)
    first_step, history, loss_by_band = state.load(partial / WORK_FOLDER)
    if first_step == 0:
        # Every rank draws its own dropout masks.
        torch.manual_seed(config.seed + 1 + group.rank)
        loss_by_band = torch.zeros(len(BAND_NAMES), dtype=torch.float64)
    model.train()
    with progress("train", steps, first_step, shown=group.is_main) as bar:
        for step in range(first_step, steps):
            started = time.perf_counter()
            batch = _global_batch(config, rows, step, steps_per_epoch)
            sums = accumulate_gradients(config, model, group.share(batch))
            group.all_reduce_(sums)
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                group.all_reduce_(parameter.grad)
            totals = dict(zip(SUMS, sums.tolist(), strict=False))
            counted = totals["counted"] or 1.0
            divisor = totals["tokens" if config.normalization == "tokens" else "weight"]
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.div_(divisor or 1.0)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            rate = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            loss_by_band += sums[len(SUMS) :].cpu()
            history.append(
                {
                    "step": step + 1,
                    "epoch": (step + 1) / steps_per_epoch,
                    "loss": totals["loss"] / (divisor or 1.0),
                    "nll": totals["nll"] / counted,
                    "mean_weight": totals["weight"] / totals["tokens"],
                    "token_accuracy": totals["correct"] / counted,
                    "learning_rate": rate,
                    "gradient_norm": float(norm),
                    "tokens": totals["tokens"],
                    "tokens_per_second": totals["tokens"] / (time.perf_counter() - started),
                    "peak_memory_gb": group.peak_memory_gb(),
                }
            )
            bar.advance()
            bar.note(f"loss {history[-1]['loss']:.4f}")
            if (step + 1) % config.checkpoint_steps == 0 or step + 1 == steps:
                state.save(partial / WORK_FOLDER, step + 1, history, loss_by_band)
                if group.is_main:
                    _write_metrics(partial, history)
    return history, loss_by_band


def accumulate_gradients(config: TrainConfig, model: Any, rows: Sequence[GuidedRow]) -> Tensor:
    """Adds the gradients of Σ w·nll over a rank's rows, one micro-batch after the other.

    Returns SUMS and the weighted loss Σ w·nll of each confidence band, float64.
    """
    base = model.get_base_model()
    head = lm_head(base)
    device = head.weight.device
    sums = torch.zeros(len(SUMS) + len(BAND_NAMES), dtype=torch.float64, device=device)
    # Rows of similar length together need less padding; order does not change the sum.
    ordered = sorted(rows, key=lambda row: (-len(row.example.input_ids), row.example.row))
    bad_rows = []
    for start in range(0, len(ordered), config.micro_batch_size):
        micro = ordered[start : start + config.micro_batch_size]
        examples = [row.example for row in micro]
        ids, attention, predicts = pad_batch(examples, device)
        hidden = last_hidden_state(base, ids, attention)[predicts].to(head.weight.dtype)
        targets = gather_targets(micro).to(device)
        left_out = known_zeros(config, targets)
        nll, stats = weighted_ce(
            hidden,
            head.weight,
            target_ids(examples, device).masked_fill(left_out, IGNORE_INDEX),
            reduction="none",
            ignore_index=IGNORE_INDEX,
            stats=("top1", *STATISTICS[config.weighting]),
            **head.options(),
        )
        weight = token_weights(config, stats, targets)
        # Not 0 · nll: a weight of 0 shuts out an nll that is infinite.
        row_loss = torch.where(weight == 0, 0, weight * nll)
        loss = row_loss.sum()
        if not bool(torch.isfinite(loss)):
            bad_rows += [example.row for example in examples]
            continue
        loss.backward()
        assert stats.top1 is not None
        totals = (loss, nll, weight, torch.ones_like(nll), ~left_out, stats.top1)
        sums[: len(SUMS)] += torch.stack([value.detach().double().sum() for value in totals])
        if targets.guide is not None:
            band = torch.bucketize(
                targets.guide, torch.tensor(BAND_EDGES, device=device), right=True
            )
            sums[len(SUMS) :].index_add_(0, band, row_loss.detach().double())
    _refuse_not_finite(bad_rows)
    return sums


def _refuse_not_finite(bad_rows: list[int]) -> None:
    rows = ranks.gather_lists(bad_rows)
    if rows:
        raise InputError(
            f"the loss is not finite in a micro-batch with rows {sorted(rows)}; look at these "
            "rows, lower --learning-rate, or use --dtype float32"
        )


def _global_batch(
    config: TrainConfig, rows: Sequence[GuidedRow], step: int, steps_per_epoch: int
) -> list[GuidedRow]:
    """The rows of one optimizer step, from the epoch's own seeded permutation."""
    epoch, position = divmod(step, steps_per_epoch)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
    order = torch.randperm(len(rows), generator=generator).tolist()
    first = position * config.global_batch_size
    return [rows[number] for number in order[first : first + config.global_batch_size]]


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
) -> Any:
    model = load_causal_lm(resolve_model(config.model), dtype, device)
    require_vocabulary(model, data, config.model)
    shortest = min(data.kept, key=lambda example: len(example.input_ids))
    check_head(model, torch.from_numpy(shortest.input_ids).long().to(device))
    torch.manual_seed(config.seed)
    try:
        with warnings.catch_warnings():
            # PEFT asks the model by a name that Transformers is about to give up.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            adapted = get_peft_model(model, lora_config(config, find_targets(config, model)))
    except ValueError as error:
        raise InputError(f"--lora-targets: {error}") from error
    lora: Any = adapted.peft_config["default"]
    lora.base_model_name_or_path = config.model
    # PEFT puts the names through sets, and would write them in an order that differs by run.
    lora.target_modules = sorted(lora.target_modules)
    lora.target_parameters = sorted(lora.target_parameters or []) or None
    checkpointing = config.gradient_checkpointing
    if checkpointing if checkpointing is not None else device.type == "cuda":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return adapted


def _manifest(
    config: TrainConfig,
    tokenizer: Any,
    summary: dict[str, Any],
    fingerprint: str,
    store: ConfidenceStore | None,
) -> dict[str, Any]:
    return {
        "kind": "gift adapter",
        "fingerprint": fingerprint,
        "base_model": config.model,
        "base_model_hash": model_hash(resolve_model(config.model)),
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
    with naming(partial / "adapter_model.safetensors"):
        model.save_pretrained(partial, save_embedding_layers=False)
    with naming(partial / "tokenizer.json"):
        tokenizer.save_pretrained(partial)
    write_json(partial / MANIFEST_FILE, manifest)
    _write_metrics(partial, history)
    figures.plot_training(partial / METRICS_FILE, partial / "loss.png")


def _write_metrics(partial: Path, history: Sequence[dict[str, float]]) -> None:
    """Writes the metrics of all steps; during training, a copy of the checkpoint's to look at."""
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
        "tokens_per_second": sum(entry["tokens"] for entry in history)
        / sum(entry["tokens"] / entry["tokens_per_second"] for entry in history),
        "peak_memory_gb": max(entry["peak_memory_gb"] for entry in history),
    }


def _shares(loss_by_band: Tensor) -> list[float]:
    return (loss_by_band / loss_by_band.sum().clamp(min=1e-300)).tolist()
