"""Whole stages on real architectures with random weights, compared with common alternatives.

    python -m benchmarks.end_to_end --size cpu --output results

Annotation: ours; the authors' way (one sample at a time, full logits, float32 softmax); the same in
our batches. Training step, optimizer included: ours; full logits and a weighted sum of
cross-entropies, as a Trainer subclass computes it; Transformers, PEFT and Liger (its layers, and
its fused loss with `reduction="none"` times the weights). Merge: `benchmarks/merge_8b.py`.

All ways of a stage share one model, one batch and one process and take turns. A way that differs
from full logits by more than rounding is reported as wrong and not timed; if full logits run out of
memory, the others are timed and reported as unjudged. Token counts include prompts but not padding.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.architectures import (
    SIZES,
    Spec,
    growth,
    make_adapted,
    make_examples,
    make_model,
)
from benchmarks.provider import Provider
from benchmarks.turns import (
    Call,
    Contender,
    Settings,
    failure,
    free,
    peak_megabytes,
    recover,
    take_turns,
)
from gift.annotate import annotate_batch
from gift.batches import make_batch, plan_batches
from gift.config import TrainConfig
from gift.data import Example
from gift.gradients import accumulate_gradients
from gift.micro_batches import Split, token_limit
from gift.models import last_hidden_state
from gift.packing import enable_packing
from gift.weighting import GuidedRow, gather_targets, guided_rows

OURS = "gift"
FULL = "full logits, in our batches"
FULL_LOSS = "full logits, as a Trainer's loss"
TRUTHS = (FULL, FULL_LOSS)  # what all other ways are judged by
AGREE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of confidences, losses and gradients


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


def annotation(spec: Spec, dtype: torch.dtype, settings: Settings) -> Iterator[report.Row]:
    """Tokens per second and memory of confidences for every target."""
    model = make_model(spec, dtype, settings.device)
    examples = make_examples(spec, 4 * spec.rows)
    lengths = [len(example.input_ids) for example in examples]
    usual = model.config._attn_implementation
    packed = enable_packing(model, examples)
    ours_attention = model.config._attn_implementation

    def batches(packed: bool) -> list[list[Example]]:
        plan = plan_batches(lengths, spec.annotate_tokens, packed=packed)
        return [[examples[number] for number in numbers] for numbers in plan]

    def ours() -> list[Tensor]:
        model.set_attn_implementation(ours_attention)
        found = []
        for group in batches(packed):
            batch = make_batch(group, packed=packed).to(settings.device)
            found.append(annotate_batch(model, batch)[0])
        return [_in_order(batches(packed), torch.cat(found).cpu())]

    def full(groups: Sequence[Sequence[Example]]) -> list[Tensor]:
        model.set_attn_implementation(usual)
        found = [_full_logit_confidence(model, group) for group in groups]
        return [_in_order(groups, torch.cat(found).cpu())]

    ways = {
        OURS: ours,
        "authors' way: one sample at a time, full logits": lambda: full(
            [[example] for example in examples]
        ),
        FULL: lambda: full(batches(packed=False)),
    }
    yield from _compare("annotate", spec.name, ways, _tokens(examples), dtype, settings)


def _in_order(groups: Sequence[Sequence[Example]], confidence: Tensor) -> Tensor:
    """Confidences of the groups' targets in the order of the rows."""
    rows = [example for group in groups for example in group]
    parts = confidence.split([example.targets for example in rows])
    numbers = [example.row for example in rows]
    return torch.cat([parts[numbers.index(row)] for row in range(len(rows))])


@torch.no_grad()
def _full_logit_confidence(model: Any, rows: Sequence[Example]) -> Tensor:
    device = model.get_input_embeddings().weight.device
    batch = make_batch(rows, packed=False).to(device)
    logits = model(**batch.inputs, use_cache=False).logits.float()
    probability = torch.log_softmax(logits, -1).flatten(0, 1)
    return probability[batch.predicts].gather(1, batch.targets[:, None]).squeeze(1).exp()


def training(
    spec: Spec, dtype: torch.dtype, settings: Settings, label: str
) -> Iterator[report.Row]:
    """Tokens per second and memory of one optimizer step on a LoRA adapter."""
    device = settings.device
    adapted = make_adapted(spec, dtype, device)
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
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
    count = sum(example.targets for example in examples)

    def step(losses: Callable[[], float], trained: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        optimizer = torch.optim.AdamW(trained, lr=0.0, fused=device.type == "cuda")

        def run() -> list[Tensor]:
            loss = losses() / count
            for parameter in trained:
                assert parameter.grad is not None
                parameter.grad.div_(count)
            gradient = torch.cat([p.grad.flatten()[:64].float() for p in trained])  # pyright: ignore
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return [torch.tensor([loss], device=device), gradient]

        return run

    def by_micro_batches(loss_of: Callable[[Any, list[GuidedRow]], Tensor], model: Any) -> float:
        total = 0.0
        ordered = sorted(rows, key=lambda row: (-len(row.example.input_ids), row.example.row))
        for start in range(0, len(ordered), spec.micro_rows):
            loss = loss_of(model, ordered[start : start + spec.micro_rows])
            loss.backward()
            total += float(loss.detach())
        return total

    base = adapted.get_base_model()
    usual = base.config._attn_implementation

    def ours(model: Any) -> float:
        base = model.get_base_model()
        packed = base.config._attn_implementation != usual
        split = Split(token_limit(config, device), packed)
        return float(accumulate_gradients(config, model, rows, split)[0][0])

    def with_attention(name: str, losses: Callable[[], float]) -> float:
        base.set_attn_implementation(name)
        return losses()

    enable_packing(base.eval(), examples)
    adapted.train()
    ours_attention = base.config._attn_implementation
    ways = {
        OURS: step(lambda: with_attention(ours_attention, lambda: ours(adapted)), parameters),
        FULL_LOSS: step(
            lambda: with_attention(usual, lambda: by_micro_batches(_full_logit_loss, adapted)),
            parameters,
        ),
    }
    missing: dict[str, str] = {}
    if importlib.util.find_spec("liger_kernel") is None:
        missing[LIGER] = "not installed"
    elif device.type != "cuda":
        missing[LIGER] = "not run: needs a GPU"
    elif failed := _liger_fails(patched := make_adapted(spec, dtype, device)):
        missing[LIGER] = failed
    else:
        trained = [parameter for parameter in patched.parameters() if parameter.requires_grad]
        ways[LIGER] = step(lambda: by_micro_batches(_liger_loss, patched), trained)
        ways["gift, Liger's layers"] = step(lambda: ours(patched), trained)
    yield from _compare("train step", label, ways, _tokens(examples), dtype, settings)
    for way, status in missing.items():
        yield {"stage": "train step", "model": label, "way": way, "status": status}


LIGER = "Transformers, PEFT, Liger (but its rotary embedding)"


def _full_logit_loss(adapted: Any, micro: list[GuidedRow]) -> Tensor:
    """Σ w·nll from the logits of all positions."""
    device = adapted.get_input_embeddings().weight.device
    batch = make_batch([row.example for row in micro], packed=False).to(device)
    logits = adapted(**batch.inputs, use_cache=False).logits.float().flatten(0, 1)
    following = batch.inputs["input_ids"].roll(-1, 1).flatten()
    nll = torch.nn.functional.cross_entropy(logits, following, reduction="none")
    weight: Any = gather_targets(micro).guide
    return (weight.to(device) * nll[batch.predicts]).sum()


def _liger_loss(adapted: Any, micro: list[GuidedRow]) -> Tensor:
    """Σ w·nll from Liger's fused loss over the target positions."""
    from liger_kernel.transformers.functional import (  # pyright: ignore
        liger_fused_linear_cross_entropy,
    )

    base = adapted.get_base_model()
    head = base.get_output_embeddings().weight
    batch = make_batch([row.example for row in micro], packed=False).to(head.device)
    hidden = last_hidden_state(base, **batch.inputs).flatten(0, 1)[batch.predicts].to(head.dtype)
    nll: Any = liger_fused_linear_cross_entropy(hidden, head, batch.targets, reduction="none")
    weight: Any = gather_targets(micro).guide
    return (weight.to(head.device) * nll).sum()


def _liger_fails(adapted: Any) -> str:
    """Gives a model Liger's layers; returns what failed, empty if nothing did."""
    try:
        _use_liger_layers(adapted.get_base_model())
    except Exception as error:  # as in `_compare`
        return failure(error)
    return ""


def _use_liger_layers(model: Any) -> None:
    """Uses Liger's norms and MLPs in this model only: its patches of the module are undone."""
    from liger_kernel.transformers.monkey_patch import (  # pyright: ignore
        _apply_liger_kernel_to_instance,
    )

    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    _apply_liger_kernel_to_instance(
        model, rope=False, rms_norm=True, swiglu=True, cross_entropy=False,
        fused_linear_cross_entropy=False,
    )  # fmt: skip
    vars(module).update(before)


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


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)


def _compare(
    stage: str,
    model: str,
    ways: dict[str, Callable[[], list[Tensor]]],
    tokens: int,
    dtype: torch.dtype,
    settings: Settings,
) -> Iterator[report.Row]:
    """One row per way, each compared with full logits, which run first."""
    rows: dict[str, report.Row] = {
        name: {"stage": stage, "model": model, "way": name, "status": "ok"} for name in ways
    }
    contenders = []
    truth = None
    for name in sorted(ways, key=lambda name: name not in TRUTHS):
        way, row = ways[name], rows[name]
        found: list[Tensor] = []
        try:
            found = [values.double() for values in way()]
        except Exception as error:  # other people's code may raise anything
            row["status"] = failure(error)
        if row["status"] != "ok":
            recover(name, row["status"], settings.device)
            continue
        if name in TRUTHS:
            truth = found
        if truth is None:
            row["status"] = "unjudged"
        else:
            row["disagrees by"] = disagreement(found, truth)
            if not row["disagrees by"] <= AGREE[dtype]:
                row["status"] = "wrong"
                continue
        provider = Provider(name, "", (), lambda *_, way=way: way)
        contenders.append(Contender(provider, [Call(_nothing, lambda _, way=way: way(), _nothing)]))
    take_turns(contenders, settings)
    for contender in contenders:
        name = contender.provider.name
        if contender.failed:
            rows[name]["status"] = contender.failed
            continue
        seconds = median(contender.samples)
        rows[name] |= {"tokens/s": tokens / seconds, "ms": 1e3 * seconds}
        rows[name]["peak extra MB"] = peak_megabytes(contender, settings.device)
        if contender.failed:
            rows[name]["status"] = contender.failed
    yield from rows.values()


def disagreement(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error of any result, so that a correct loss cannot hide a gradient."""
    pairs = zip(found, truth, strict=True)
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def _nothing() -> None:
    return None


if __name__ == "__main__":
    main()
