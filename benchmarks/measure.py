"""Measures a case: first correctness, then time and memory.

1. Gate. Every provider runs on inputs of the case's shape (at most GATE_TOKENS rows) and is
   compared with the specification in float64 on the same inputs: the loss or confidences, and the
   gradients under a random upstream factor. The budget is twice the error of full logits in the
   same dtype, and at least the dtype's rounding error. A provider that exceeds it is reported as
   wrong and not timed.
2. Time (`benchmarks/turns.py`). All providers live in one process and take turns in an order that
   rotates and reverses, so that drift of the machine affects all. Inputs rotate, and CUDA's
   caches are emptied, so that no cache keeps them. Median, 20th and 80th percentile.
3. Memory. Largest allocation beyond the inputs in one more call: the allocator's on CUDA, resident
   memory that the kernel counted on Linux.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, CECase, MergeCase
from benchmarks.data import CEInputs, MergeInputs, describe_inputs, make_inputs
from benchmarks.provider import Provider, eager_nll, from_nll
from benchmarks.providers import providers_of
from benchmarks.report import Results
from benchmarks.turns import (
    CACHE_BYTES,
    Call,
    Contender,
    DeviceLost,
    Settings,
    device_works,
    failure,
    free,
    once,
    peak_megabytes,
    percentile,
    recover,
    take_turns,
)
from gift_kernels import reference

GATE_TOKENS = 1024
GATE_ROWS_AT_ONCE = 256
UPSTREAM = 0.7
# Relative errors that rounding alone explains.
ROUNDING = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
MERGE_ROUNDING = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 1e-6}
MOST_INPUT_SETS = 8


def measure_case(
    case: Case, settings: Settings, providers: Sequence[Provider] | None = None
) -> list[dict[str, Any]]:
    """One result row for each provider, whether it succeeded or not.

    If a provider made the device unusable, only its row is returned: the others would fail because
    of it.
    """
    providers = providers if providers is not None else providers_of(case)
    rows = {provider.name: empty_row(case, provider) for provider in providers}
    torch.compiler.reset()  # else torch.compile reaches the process's recompilation limit
    try:
        _fill_rows(rows, case, settings, providers)
    except DeviceLost as lost:
        return [{**rows[lost.provider], "status": lost.status}]
    finally:
        settings.running = None
    add_ratios(list(rows.values()))
    return list(rows.values())


def _fill_rows(
    rows: dict[str, dict[str, Any]], case: Case, settings: Settings, providers: Sequence[Provider]
) -> None:
    gate_inputs, truth, baseline_errors = gate_truth(case, settings)
    passed: list[Provider] = []
    for provider in providers:
        row = rows[provider.name]
        reason = provider.missing() or provider.skip(case, settings.device)
        if reason:
            row["status"] = reason if reason == "not installed" else f"not run: {reason}"
            continue
        if provider.kind != "floor":
            settings.running = provider
            status, errors = check(provider, case, gate_inputs, truth, baseline_errors)
            row["status"] = status
            row |= {f"error_{name}": error for name, error in errors.items()}
            if status.startswith("failed"):
                recover(provider.name, status, settings.device)
            if status != "ok":
                continue
        passed.append(provider)
    del gate_inputs, truth
    settings.running = None
    free(settings.device)
    contenders = _contenders(case, passed, settings, rows)
    take_turns(contenders, settings)
    for contender in contenders:
        row = rows[contender.provider.name]
        settings.running = contender.provider
        if not contender.failed:
            row["peak_mb"] = peak_megabytes(contender, settings.device)
        if contender.failed:
            row["status"] = contender.failed
            continue
        row |= time_columns(case, contender.samples)


def add_case(
    results: Results, case: Case, settings: Settings, providers: Sequence[Provider] | None = None
) -> bool:
    """Measures a case and writes all results; whether the device still works afterwards."""
    try:
        rows = measure_case(case, settings, providers)
        results.rows += [{"case": case.label, **row} for row in rows]
        if device_works(settings.device):
            results.data[case.label] = describe_data(case, settings)
    except Exception as error:  # a failing case must not stop the others
        reason = {"part": case.label, "reason": failure(error)}
        results.tables.setdefault("not run", []).append(reason)
        print(f"  not run: {reason['reason']}")
    free(settings.device)
    results.save()
    return device_works(settings.device)


def describe_data(case: Case, settings: Settings) -> dict[str, float]:
    """Entropy and confidences of a case's inputs; nothing for merges."""
    if not isinstance(case, CECase):
        return {}
    return describe_inputs(case, make_inputs(case, settings.device, settings.seed))


def check(
    provider: Provider,
    case: Case,
    inputs: Any,
    truth: dict[str, Tensor],
    baseline_errors: dict[str, float],
) -> tuple[str, dict[str, float]]:
    """`ok`, `wrong: ...` or `failed: ...`, and the relative errors of what was computed."""
    try:
        found = outputs_of(provider, case, inputs)
        # The values are read here first, so an asynchronous CUDA error is raised here.
        errors = {name: relative_error(found.get(name), value) for name, value in truth.items()}
    except Exception as error:  # other people's code may raise anything
        return failure(error), {}
    rounding = MERGE_ROUNDING if isinstance(case, MergeCase) else ROUNDING
    for name, error in errors.items():
        budget = max(2 * baseline_errors[name], rounding[case.torch_dtype])
        if provider.budget is not None and name.startswith("d_"):
            budget = max(budget, provider.budget)
        if not error <= budget:
            return f"wrong: {name} off by {error:.1e}, budget {budget:.1e}", errors
    return "ok", errors


def outputs_of(provider: Provider, case: Case, inputs: Any) -> dict[str, Tensor]:
    """What a provider computes: q, or loss and gradients, or the merged weight."""
    if isinstance(case, MergeCase):
        fresh = MergeInputs(*(t.clone() for t in inputs.tensors()), scale=inputs.scale)
        return {"merged": provider.prepare(case, fresh)().detach()}
    for leaf in (inputs.hidden, inputs.weight):
        leaf.grad = None
    if case.direction == "forward":
        with torch.no_grad():
            result = provider.prepare(case, inputs)()
        return {"q" if case.op == "token_confidence" else "loss": result}
    loss = provider.prepare(case, inputs)()
    loss.backward(torch.full_like(loss, UPSTREAM))
    found = {"loss": loss.detach()}
    for name, leaf in (("d_hidden", inputs.hidden), ("d_weight", inputs.weight)):
        if leaf.grad is not None:
            found[name] = leaf.grad
            leaf.grad = None
    return found


def relative_error(found: Tensor | None, truth: Tensor) -> float:
    """‖found − truth‖ / ‖truth‖ in float64; infinity where nothing was found."""
    if found is None or found.shape != truth.shape:
        return math.inf
    distance = float((found.detach().double() - truth).norm() / truth.norm())
    return distance if math.isfinite(distance) else math.inf


def true_outputs(case: Case, inputs: Any) -> dict[str, Tensor]:
    """The specification in float64, some rows at a time."""
    if isinstance(case, MergeCase):
        a, b = inputs.lora_a.double(), inputs.lora_b.double()
        return {"merged": reference.lora_merge(inputs.weight.double(), a, b, inputs.scale)}
    total = torch.zeros((), dtype=torch.float64, device=inputs.hidden.device)
    q, d_hidden = [], []
    learns = case.direction != "forward"
    weight = inputs.weight.detach().double().requires_grad_(learns and case.trainable)
    for start in range(0, len(inputs.target), GATE_ROWS_AT_ONCE):
        rows = slice(start, start + GATE_ROWS_AT_ONCE)
        hidden = inputs.hidden[rows].detach().double().requires_grad_(learns)
        softcap = case.shape.softcap
        if case.op == "token_confidence":
            stats = reference.token_confidence(
                hidden, weight, inputs.target[rows], logit_softcap=softcap
            )
            q.append(stats.confidence)
            continue
        loss, _ = reference.weighted_ce(
            hidden,
            weight,
            inputs.target[rows],
            _true_weight(case, inputs, rows),
            logit_softcap=softcap,
            reduction="sum",
        )
        loss = loss / len(inputs.target)
        total += loss.detach()
        if learns:
            (UPSTREAM * loss).backward()
            d_hidden.append(hidden.grad)
    if q:
        return {"q": torch.cat(q)}
    truth = {"loss": total}
    if learns:
        truth["d_hidden"] = torch.cat(d_hidden)
        if case.trainable:
            assert weight.grad is not None
            truth["d_weight"] = weight.grad
    return truth


def _true_weight(case: CECase, inputs: CEInputs, rows: slice) -> Any:
    if case.weighting == "guide":
        assert inputs.guide_hidden is not None and inputs.guide_weight is not None
        return reference.token_confidence(
            inputs.guide_hidden[rows].double(),
            inputs.guide_weight.double(),
            inputs.target[rows],
            logit_softcap=case.shape.softcap,
        ).confidence
    if case.weighting == "offline":
        return inputs.token_weight[rows].double()
    return "self" if case.weighting == "self" else None


def gate_truth(case: Case, settings: Settings) -> tuple[Any, dict[str, Tensor], dict[str, float]]:
    """Inputs of the gate, the truth in float64, and the errors of full logits in the same dtype."""
    gate_case = case
    if isinstance(case, CECase) and case.tokens > GATE_TOKENS:
        gate_case = CECase(**{**vars(case), "tokens": GATE_TOKENS})
    inputs = make_inputs(gate_case, settings.device, settings.seed + 1000)
    truth = true_outputs(gate_case, inputs)
    if isinstance(case, MergeCase):
        return inputs, truth, dict.fromkeys(truth, 0.0)
    baseline = Provider("full logits", "baseline", (case.op,), from_nll(eager_nll))
    found = outputs_of(baseline, case, inputs)
    return inputs, truth, {name: relative_error(found[name], truth[name]) for name in truth}


def _contenders(
    case: Case, providers: Sequence[Provider], settings: Settings, rows: dict[str, dict[str, Any]]
) -> list[Contender]:
    """Prepares and warms up; a provider that fails here (out of memory) is recorded and skipped."""
    first = make_inputs(case, settings.device, settings.seed)
    size = sum(value.numel() * value.element_size() for value in first.tensors())
    count = min(MOST_INPUT_SETS, max(1, math.ceil(CACHE_BYTES / max(size, 1))))
    if settings.device.type != "cuda":
        count = min(count, 2)
    sets = [first] + [
        make_inputs(case, settings.device, settings.seed + number) for number in range(1, count)
    ]
    contenders = []
    for provider in providers:
        status, settings.running = "ok", provider
        try:
            calls = [make_call(provider, case, inputs) for inputs in sets]
            for call in (*calls, calls[0]):
                once(call, settings.device)
            contenders.append(Contender(provider, calls))
        except Exception as error:  # as in `check`
            status = failure(error)
        rows[provider.name]["status"] = status
        if status != "ok":
            recover(provider.name, status, settings.device)
    return contenders


def make_call(provider: Provider, case: Case, inputs: Any) -> Call:
    """One call of a provider, split into untimed and timed parts."""
    run = provider.prepare(case, inputs)

    def nothing() -> None:
        return None

    if not isinstance(case, CECase) or provider.kind == "floor" or case.direction == "forward":

        def without_gradients(_: Any) -> Tensor:
            with torch.no_grad():
                return run()

        return Call(nothing, without_gradients, nothing)

    def clear() -> None:
        inputs.hidden.grad = inputs.weight.grad = None

    if case.direction == "backward":
        return Call(run, lambda loss: loss.backward(), clear)
    return Call(nothing, lambda _: run().backward(), clear)


def time_columns(case: Case, samples: Sequence[float]) -> dict[str, Any]:
    """Median, spread and rates of the samples in seconds."""
    ordered = sorted(samples)
    median = statistics.median(ordered)
    return {
        "time_ms": 1e3 * median,
        "p20_ms": 1e3 * percentile(ordered, 0.2),
        "p80_ms": 1e3 * percentile(ordered, 0.8),
        "samples": len(ordered),
        "tflops": case.flops / median / 1e12,
        "gb_per_s": case.bytes / median / 1e9,
    }


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Time over the lower bound's and over the best other exact provider's, where measured."""
    timed = [row for row in rows if row.get("time_ms")]
    floors = [row["time_ms"] for row in timed if row["kind"] == "floor"]
    others = [
        row["time_ms"]
        for row in timed
        if row["kind"] in ("peer", "baseline") and not row.get("approximate")
    ]
    for row in timed:
        row["ratio_floor"] = row["time_ms"] / floors[0] if floors else None
        row["ratio_best_peer"] = row["time_ms"] / min(others) if others else None


def empty_row(case: Case, provider: Provider) -> dict[str, Any]:
    """A provider's result row before anything has run."""
    # A provider's own error budget applies to gradients only.
    approximate = provider.budget is not None and case.describe()["direction"] != "forward"
    notes = ["approximate" if approximate else "", provider.note(case)]
    return {
        **case.describe(),
        "provider": provider.name,
        "kind": provider.kind,
        "status": "ok",
        "note": "; ".join(filter(None, notes)),
        "approximate": approximate,
    }
