"""Whole stages on real architectures with random weights, compared with common alternatives.

    python -m benchmarks.end_to_end --size cpu --output results

Annotation: ours; ours with padded batches; the authors' way (one sample at a time, full logits,
float32 softmax); the same in our batches; in a step of its own, ours with compiled blocks and with
Liger's layers. Training step, optimizer included: ours, as `gift train` sets it up; ours with all
activations recomputed, with padded batches, with compiled blocks, with Liger's layers; full logits
and a weighted sum of cross-entropies, as a Trainer subclass has it; Transformers, PEFT and Liger
(its layers, and its fused loss with `reduction="none"` times the weights). TRL's trainer:
`benchmarks/trl_sft.py`. Merge: `benchmarks/merge_8b.py`.

All alternatives of a stage share the rows, the model and one process and are timed in turn; in
training they have the same rows per step and per forward pass. A way whose results are wrong
(`stage_compare.py`) is not timed. Token counts include prompts but not padding. On a GPU the time
of one call is given by kind of kernel.
"""

import argparse
import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import report, stage_ways
from benchmarks.architectures import (
    SIZES,
    Spec,
    growth,
    make_adapted,
    make_examples,
    make_model,
)
from benchmarks.stage_compare import compare
from benchmarks.stage_ways import Way
from benchmarks.trl_sft import TRL, trl_row
from benchmarks.turns import Settings, free
from gift.config import TrainConfig
from gift.data.encoding import Example
from gift.data.packing import enable_packing
from gift.distributed.ranks import Group
from gift.speed import speed
from gift.training.memory import layers_of, recompute, settle_memory
from gift.training.micro_batches import Split
from gift.weighting.weights import guided_rows

OURS = "gift"
PADDED = "gift, padded"
COMPILED = "gift, compiled blocks"
OURS_LIGER = "gift, Liger's layers"
AUTHORS = "authors' way: one sample at a time, full logits"
FULL = "full logits, in our batches"
FULL_LOSS = "full logits, as a Trainer's loss"
LIGER = "Transformers, PEFT, Liger (but its rotary embedding)"
JUDGES = (FULL, FULL_LOSS)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--size", choices=sorted(SIZES), help="default: gpu on CUDA, else cpu")
    parser.add_argument("--seconds", type=float, default=120.0, help="start no step after this")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = arguments.size or ("gpu" if device.type == "cuda" else "cpu")
    results = report.Results(arguments.output, report.environment(device))
    table = results.tables.setdefault("end to end", [])
    for row in measure_all(size, device, arguments.seconds):
        table.append(row)
        results.save()
    print("\n".join(report.plain_table(table)))


def measure_all(size: str, device: torch.device, seconds: float) -> Iterator[report.Row]:
    """Rows of all stages, the most important first; no step starts after `seconds`."""
    started = time.monotonic()
    settings = Settings(device, seconds=0.0 if size == "toy" else 5.0, rounds=(1, 3))
    if size != "toy":
        settings = replace(settings, rounds=(3, 20))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    steps: list[Callable[[], Iterator[report.Row]]] = []

    def add(spec: Spec) -> None:
        steps.append(lambda: annotation(spec, dtype, settings))
        steps.append(lambda: training(spec, dtype, settings, spec.name))

    add(SIZES[size][0])
    if device.type == "cuda":
        steps.append(lambda: annotation(SIZES[size][0], dtype, settings, layers=True))
    steps.append(lambda: trl(SIZES[size][0], dtype, device))
    for label, spec in growth(size):
        label = f"{spec.name}, 4 layers, {label}"
        steps.append(lambda label=label, spec=spec: training(spec, dtype, settings, label))
    for spec in SIZES[size][1:]:
        add(spec)
    # On a GPU the merge comes last: most of its time goes into writing random weights on the CPU.
    steps.insert(len(steps) if size == "gpu" else 2, lambda: merging(size))
    for number, step in enumerate(steps):
        if time.monotonic() - started > seconds:
            reason = f"not run: the time ended, {len(steps) - number} of {len(steps)} steps left"
            yield {"stage": "", "model": "", "way": "", "status": reason}
            return
        yield from step()
        free(device)


def annotation(
    spec: Spec, dtype: torch.dtype, settings: Settings, layers: bool = False
) -> Iterator[report.Row]:
    """Tokens per second and memory of confidences for every target.

    With `layers` ours with compiled blocks and with Liger's layers, in place of the other ways.
    """
    model = make_model(spec, dtype, settings.device)
    examples = make_examples(spec, 4 * spec.rows)
    usual = model.config._attn_implementation
    # One row at a time: the copy in float32 leaves little room for logits.
    truth = _in_float32(model, lambda wide: stage_ways.annotate_full(wide, examples, 0))
    packed = enable_packing(model, examples)
    packing = model.config._attn_implementation

    def ready(attention: str, compiled: bool = False) -> Callable[[], None]:
        def set_up() -> None:
            model.set_attn_implementation(attention)
            stage_ways.compile_blocks(model, compiled)

        return set_up

    def ours(packed: bool) -> list[Tensor]:
        return stage_ways.annotate_ours(model, examples, spec.annotate_tokens, packed)

    def full(tokens: int) -> list[Tensor]:
        return stage_ways.annotate_full(model, examples, tokens)

    label, missing = spec.name, {}
    ways = {OURS: Way(ready(packing), lambda: ours(packed))}
    if layers:
        label = f"{spec.name}, other layers"
        ways[COMPILED] = Way(ready(packing, compiled=True), lambda: ours(packed))
        missing = _add_liger_annotation(ways, spec, dtype, examples)
    else:
        ways[PADDED] = Way(ready(usual), lambda: ours(False))
        ways[AUTHORS] = Way(ready(usual), lambda: full(0))
    ways[FULL] = Way(ready(usual), lambda: full(spec.annotate_tokens))
    yield from compare(
        "annotate", label, ways, truth, partial(_rates, model, examples, False), settings, JUDGES
    )
    for way, status in missing.items():
        yield {"stage": "annotate", "model": label, "way": way, "status": status}


def _add_liger_annotation(
    ways: dict[str, Way], spec: Spec, dtype: torch.dtype, examples: Sequence[Example]
) -> dict[str, str]:
    """Adds annotation with Liger's layers, in a model of their own; else why there is none."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {OURS_LIGER: "not installed"}
    patched = make_model(spec, dtype, torch.device("cuda"))
    if failed := stage_ways.liger_fails(patched):
        return {OURS_LIGER: failed}
    packed = enable_packing(patched, examples)
    ways[OURS_LIGER] = Way(
        lambda: None,
        lambda: stage_ways.annotate_ours(patched, examples, spec.annotate_tokens, packed),
    )
    return {}


def trl(spec: Spec, dtype: torch.dtype, device: torch.device) -> Iterator[report.Row]:
    """TRL's trainer, when no model of ours takes memory."""
    yield {"stage": "train step", "model": spec.name, "way": TRL, **trl_row(spec, dtype, device)}


def training(
    spec: Spec, dtype: torch.dtype, settings: Settings, label: str
) -> Iterator[report.Row]:
    """Tokens per second and memory of one optimizer step on a LoRA adapter."""
    device = settings.device
    adapted = make_adapted(spec, dtype, device)
    examples = make_examples(spec, spec.rows)
    generator = torch.Generator().manual_seed(1)
    confidence = [torch.rand(example.targets, generator=generator) for example in examples]
    config = TrainConfig(
        model="",
        data=Path(),
        output=Path("adapter"),
        micro_batch_size=spec.micro_rows,
        lora_dropout=0.0,
    )
    rows = guided_rows(config, examples, confidence)
    base = adapted.get_base_model()
    usual = base.config._attn_implementation
    packed = enable_packing(base.eval(), examples)
    packing = base.config._attn_implementation
    at_once = spec.micro_rows * max(len(example.input_ids) for example in examples)
    with tempfile.TemporaryDirectory() as work:
        split = Split(at_once, packed)
        split = settle_memory(config, adapted, rows, split, Group(0, 1, None), Path(work))
    adapted.train()
    everything = len(layers_of(adapted))

    def ready(attention: str, recomputed: int, compiled: bool = False) -> Callable[[], None]:
        def set_up() -> None:
            base.set_attn_implementation(attention)
            recompute(adapted, recomputed)
            stage_ways.compile_blocks(adapted, compiled)

        return set_up

    def ours(model: Any, split: Split) -> Callable[[], list[Tensor]]:
        return _step(model, lambda: stage_ways.loss_ours(config, model, rows, split), examples)

    def others(loss_of: Callable[..., Tensor], model: Any) -> Callable[[], list[Tensor]]:
        def loss() -> float:
            return stage_ways.loss_by_micro_batches(loss_of, model, rows, spec.micro_rows)

        return _step(model, loss, examples)

    # The others recompute on a GPU, as is usual; ours does so where the memory asks for it.
    usually = everything if device.type == "cuda" else 0
    full = others(stage_ways.full_logit_loss, adapted)
    ready(usual, usually)()
    truth = _in_float32(adapted, lambda wide: others(stage_ways.full_logit_loss, wide)())
    ways = {
        OURS: Way(ready(packing, split.recomputed), ours(adapted, split)),
        "gift, all recomputed": Way(ready(packing, everything), ours(adapted, split)),
        PADDED: Way(ready(usual, split.recomputed), ours(adapted, replace(split, packed=False))),
        FULL_LOSS: Way(ready(usual, usually), full),
    }
    missing = {}
    if device.type == "cuda":
        ways[COMPILED] = Way(ready(packing, split.recomputed, compiled=True), ours(adapted, split))
        missing = _add_liger(ways, make_adapted(spec, dtype, device), examples, split, others, ours)
    else:
        missing[LIGER] = "not run: needs a GPU"
    yield from compare(
        "train step", label, ways, truth, partial(_rates, base, examples, True), settings, JUDGES
    )
    for way, status in missing.items():
        yield {"stage": "train step", "model": label, "way": way, "status": status}


def _add_liger(
    ways: dict[str, Way],
    patched: Any,
    examples: Sequence[Example],
    split: Split,
    others: Callable[..., Callable[[], list[Tensor]]],
    ours: Callable[..., Callable[[], list[Tensor]]],
) -> dict[str, str]:
    """Adds the ways with Liger's layers, in a model of their own; else why there are none."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {LIGER: "not installed"}
    if failed := stage_ways.liger_fails(patched.get_base_model()):
        return {LIGER: failed}
    base = patched.get_base_model()
    usual = base.config._attn_implementation
    everything = len(layers_of(patched))
    enable_packing(base.eval(), examples)
    packing = base.config._attn_implementation
    patched.train()

    def ready(attention: str, recomputed: int) -> Callable[[], None]:
        def set_up() -> None:
            base.set_attn_implementation(attention)
            recompute(patched, recomputed)

        return set_up

    theirs = others(stage_ways.liger_loss, patched)
    ways[LIGER] = Way(ready(usual, everything), theirs)
    ways[f"{LIGER}, activations kept"] = Way(ready(usual, 0), theirs)
    ways[OURS_LIGER] = Way(ready(packing, split.recomputed), ours(patched, split))
    return {}


def _step(
    model: Any, losses: Callable[[], float], examples: Sequence[Example]
) -> Callable[[], list[Tensor]]:
    """An optimizer step that changes nothing; finds the loss and a part of every gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(example.targets for example in examples)
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=trained[0].is_cuda)

    def run() -> list[Tensor]:
        loss = losses() / count
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad.div_(count)
        gradient = torch.cat([p.grad.flatten()[:64].float() for p in trained])  # pyright: ignore
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return [torch.tensor([loss]), gradient.cpu()]

    return run


def _rates(
    model: Any, examples: Sequence[Example], trains: bool, seconds: float
) -> dict[str, float]:
    found = speed(model, examples, seconds, trains=trains)
    return {"tokens/s": found["tokens_per_second"], "useful TFLOP/s": found["useful_tflops"]}


def _in_float32(model: Any, run: Callable[[Any], list[Tensor]]) -> list[Tensor] | None:
    """What a way finds with a float32 copy of a 16-bit model; nothing if that does not fit.

    None for a float32 model, where full logits themselves are the truth.
    """
    if model.dtype == torch.float32:
        return None
    try:
        return run(copy.deepcopy(model).float())
    except torch.OutOfMemoryError:
        return []
    finally:
        free(model.device)


def merging(size: str) -> Iterator[report.Row]:
    """Load, merge and save, each in a process of its own."""
    shape = {"gpu": ["--layers", "4"], "cpu": ["--layers", "1", "--vocab", "4096"]}.get(size)
    if shape is None:
        yield {"stage": "merge", "model": "", "way": "", "status": "not run: toy size"}
        return
    script = Path(__file__).with_name("merge_8b.py")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(script), "--folder", f"{folder}/merge", "--peft", "--json"]
        finished = subprocess.run([*command, *shape], capture_output=True, text=True, check=False)
    if finished.returncode:
        reason = " ".join(finished.stderr.split())[-200:]
        yield {"stage": "merge", "model": "", "way": "", "status": f"failed: {reason}"}
        return
    for way, found in json.loads(finished.stdout.splitlines()[-1]).items():
        yield {
            "stage": "merge",
            "model": f"llama-3-8b, {' '.join(shape)}",
            "way": way,
            "status": "ok",
            "ms": 1e3 * found["seconds"],
            "peak extra MB": found["extra"],
            "off, of 10,000": found["wrong"],
        }


if __name__ == "__main__":
    main()
