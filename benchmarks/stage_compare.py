"""Compares the ways of a stage: what each finds, then time, memory and kernels.

A way is wrong, and not timed, if its results are further from float32 than ROUNDINGS times what a
judge's, full logits in the model's dtype, are: two ways that round alike differ by at most twice
that. Where float32 or the judge does not fit into the memory, the others are unjudged.
"""

from collections.abc import Callable, Iterator, Sequence
from statistics import median

from torch import Tensor

from benchmarks import report
from benchmarks.kernel_kinds import time_by_kind
from benchmarks.provider import Provider
from benchmarks.stage_ways import Way
from benchmarks.turns import Call, Contender, Settings, failure, peak_megabytes, recover, take_turns

AGREE = 1e-3  # of confidences, losses and gradients in float32
ROUNDINGS = 3  # times the error of full logits against float32


def compare(
    stage: str,
    model: str,
    ways: dict[str, Way],
    truth: list[Tensor] | None,
    rated: Callable[[float], dict[str, float]],
    settings: Settings,
    judges: Sequence[str],
) -> Iterator[report.Row]:
    """One row per way.

    Args:
        truth: the results in float32, empty where they are not known; None where the model is
            float32, so that those of the judge are the truth.
        rated: turns seconds into rates.
        judges: ways by which all others are judged, one of which is among the ways.
    """
    rows: dict[str, report.Row] = {
        name: {"stage": stage, "model": model, "way": name, "status": "ok"} for name in ways
    }
    contenders = []
    bound = None
    for name in sorted(ways, key=lambda name: name not in judges):
        way, row = ways[name], rows[name]
        found: list[Tensor] = []
        try:
            way.ready()
            found = [values.double() for values in way.run()]
        except Exception as error:  # other people's code may raise anything
            row["status"] = failure(error)
        if row["status"] != "ok":
            recover(name, row["status"], settings.device)
            continue
        if name in judges:
            truth = found if truth is None else truth
            bound = max(AGREE, ROUNDINGS * disagreement(found, truth)) if truth else None
        if truth:
            row["disagrees by"] = disagreement(found, truth)
        if bound is None:
            row["status"] = "unjudged"
        elif not row["disagrees by"] <= bound:
            row["status"] = "wrong"
            continue
        provider = Provider(name, "", (), lambda *_, way=way: way)
        call = Call(way.ready, lambda _, way=way: way.run(), _nothing)
        contenders.append(Contender(provider, [call]))
    take_turns(contenders, settings)
    for contender in contenders:
        name = contender.provider.name
        if contender.failed:
            rows[name]["status"] = contender.failed
            continue
        seconds = median(contender.samples)
        rows[name] |= {"ms": 1e3 * seconds, **rated(seconds)}
        rows[name]["peak extra MB"] = peak_megabytes(contender, settings.device)
        if contender.failed:
            rows[name]["status"] = contender.failed
            continue
        ways[name].ready()
        rows[name] |= time_by_kind(ways[name].run, settings.device)
    yield from rows.values()


def disagreement(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest relative error of any result, so that a correct loss cannot hide a gradient."""
    pairs = zip(found, truth, strict=True)
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def _nothing() -> None:
    return None
