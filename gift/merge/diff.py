"""What changed between two models, layer by layer, and how much of it rounding to bf16 loses.

For every tensor that both models have, Δ = B − A:
- relative change ‖Δ‖ / ‖A‖ (Frobenius norms) and the share of elements that differ;
- effective rank of Δ, exp(H(σ / Σσ)) with H the entropy (Roy and Vetterli 2007, "The effective
  rank"), and the number of singular values that hold 99 % of Σσ². A matrix whose shorter side is
  longer than the sketch is first multiplied by a random sketch, which keeps the spectrum of a
  change of low rank and caps the rank at the sketch's size;
- rounding loss ‖Δ − (bf16(A + Δ) − A)‖ / ‖Δ‖ for A in bf16: the share of a change that is lost when
  it is stored in a bf16 model. If both models are bf16, their difference is already
  rounded; pass the adapter, and its exact change is used as Δ for this column.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gift import figures
from gift.config import DiffConfig
from gift.console import console, print_table, progress
from gift.errors import InputError
from gift.merge.adapter import read_adapter
from gift.merge.command import adapter_folder
from gift.merge.match import LoraDelta, Names, match_adapters
from gift.merge.output import CONFIG_FILE
from gift.merge.plan import check_whole, refuse_quantised
from gift.merge.transforms import BLOCK_BYTES, FactorReader
from gift.models.loading import pick_device, resolve_model
from gift.storage.files import read_json, write_json
from gift.storage.publish import output_folder
from gift.storage.shards import Checkpoint, Span, TensorEntry, open_checkpoint, read_span, spans

REPORT_FILE = "diff.json"
FIGURE_FILE = "diff.png"


@dataclass(frozen=True)
class TensorDiff:
    """The measures of one tensor; ranks and the loss are None where undefined."""

    name: str
    relative_change: float
    changed_share: float
    effective_rank: float | None
    rank_99: int | None
    sketched: bool
    rounding_loss: float | None


def diff(config: DiffConfig, key: str = "") -> dict[str, Any]:
    """Compares two models tensor by tensor; returns the report it prints and writes.

    `key` is stored in the folder's `gift_files.json`, see `publish.output_folder`.

    InputError: models that are quantised or incomplete, or whose tensors differ in names or shapes.
    """
    if config.output is None:
        return _report(config)[0]
    with output_folder(config.output, overwrite=config.overwrite, key=key) as output:
        report, tensors = _report(config)
        partial = output.begin()
        write_json(partial / REPORT_FILE, report)
        plot(tensors, partial / FIGURE_FILE)
    return report


def _report(config: DiffConfig) -> tuple[dict[str, Any], list[TensorDiff]]:
    """Compares and prints."""
    model_a = open_checkpoint(resolve_model(config.model_a))
    model_b = open_checkpoint(resolve_model(config.model_b))
    pairs, notes = _pairs(config, model_a, model_b)
    changes: dict[str, list[LoraDelta]] = {}
    if config.adapter:
        matched = match_adapters(model_a, [read_adapter(adapter_folder(config.adapter))], [1.0])
        if matched.problems:
            raise InputError("--adapter: " + "\n- ".join(matched.problems))
        changes = matched.changes
    device = pick_device(config.device)
    reader = FactorReader(device)
    tensors = []
    with progress("compare", len(pairs)) as bar:
        for entry, other in pairs:
            bar.note(entry.name)
            blocks = _Blocks(entry, other, changes.get(entry.name, ()), reader, device)
            tensors.append(_compare(blocks, config.sketch, config.seed))
            bar.advance()
    report = {
        "model_a": config.model_a,
        "model_b": config.model_b,
        "adapter": config.adapter,
        "tensors": [asdict(tensor) for tensor in tensors],
        "changed_tensors": sum(tensor.relative_change > 0 for tensor in tensors),
        "notes": [*notes, *_notes(config, pairs, tensors)],
    }
    _print(report, tensors)
    return report, tensors


def _pairs(
    config: DiffConfig, model_a: Checkpoint, model_b: Checkpoint
) -> tuple[list[tuple[TensorEntry, TensorEntry]], list[str]]:
    """The tensors to compare, and notes."""
    problems, notes, pairs = [], [], []
    for model in (model_a, model_b):
        refuse_quantised(model.folder, read_json(model.folder / CONFIG_FILE))
        lacking, unsure = check_whole(model)
        problems += lacking
        notes += unsure
    names = Names(model_b)
    for name, entry in model_a.tensors.items():
        other = names.find(name)
        if other is None:
            problems.append(f"{name} is in {config.model_a} only")
        elif other.shape != entry.shape:
            problems.append(f"{name}: {list(entry.shape)} and {list(other.shape)}")
        elif entry.is_float and other.is_float:
            pairs.append((entry, other))
    if problems or not pairs:
        listed = "\n- ".join(problems or ["no floating-point tensor"])
        raise InputError(f"the models cannot be compared:\n- {listed}")
    return pairs, notes


def _notes(
    config: DiffConfig,
    pairs: Sequence[tuple[TensorEntry, TensorEntry]],
    tensors: Sequence[TensorDiff],
) -> list[str]:
    notes = []
    dtypes = {entry.dtype for pair in pairs for entry in pair}
    if config.adapter is None and dtypes == {"BF16"}:
        notes.append(
            "both models are bf16, so their difference is already rounded to bf16; pass --adapter "
            "to see the rounding loss"
        )
    if any(tensor.sketched for tensor in tensors):
        notes.append(f"ranks marked * come from a random sketch of {config.sketch} rows")
    return notes


class _Blocks:
    """The blocks of one pair of tensors as float32 rows: A, Δ and the adapter's Δ (or None)."""

    def __init__(
        self,
        before: TensorEntry,
        after: TensorEntry,
        changes: Sequence[LoraDelta],
        reader: FactorReader,
        device: torch.device,
    ) -> None:
        self.before, self.after = before, after
        self._factors = [reader.factors(change) for change in changes]
        self._device = device
        self.holds_all = {before.dtype, after.dtype} == {"BF16"} and not changes

    def of_matrix(self, matrix: int) -> Iterator[tuple[Span, Tensor]]:
        """Δ of one matrix of a stack."""
        for span in spans(self.before, BLOCK_BYTES):
            if span.matrix == matrix:
                before, after = (
                    read_span(entry, span).to(self._device, torch.float32)
                    for entry in (self.before, self.after)
                )
                yield span, after - before

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for span in spans(self.before, BLOCK_BYTES):
            before, after = (
                read_span(entry, span).to(self._device, torch.float32)
                for entry in (self.before, self.after)
            )
            intended = None
            if self._factors:
                intended = torch.zeros_like(before)
                for factors in self._factors:
                    left = factors.left[span.matrix, span.begin : span.end].float()
                    right = factors.right[span.matrix].float()
                    intended.addmm_(left, right, alpha=factors.scale)
            yield before, after - before, intended


def _compare(blocks: _Blocks, sketch: int, seed: int) -> TensorDiff:
    """All measures of one tensor, which is read twice."""
    size, change, changed, lost, wanted = 0.0, 0.0, 0, 0.0, 0.0
    for before, delta, intended in blocks:
        size += float(before.double().square().sum())
        change += float(delta.double().square().sum())
        changed += int((delta != 0).sum())
        held, aim = before.bfloat16().float(), delta if intended is None else intended
        stored = (held + aim).bfloat16().float() - held
        lost += float((aim - stored).double().square().sum())
        wanted += float(aim.double().square().sum())
    matrices, rows, width = blocks.before.matrices
    count = max(1, matrices * rows * width)
    effective, rank_99, sketched = None, None, min(rows, width) > sketch
    if min(rows, width) > 1 and change > 0:
        spectra = [_squared_singular_values(blocks, one, sketch, seed) for one in range(matrices)]
        effective = sum(map(effective_rank, spectra)) / matrices
        rank_99 = max(energy_rank(spectrum, 0.99) for spectrum in spectra)
    return TensorDiff(
        name=blocks.before.name,
        relative_change=math.sqrt(change / size) if size else math.inf if change else 0.0,
        changed_share=changed / count,
        effective_rank=effective,
        rank_99=rank_99,
        sketched=sketched and effective is not None,
        rounding_loss=math.sqrt(lost / wanted) if wanted and not blocks.holds_all else None,
    )


def _squared_singular_values(blocks: _Blocks, matrix: int, sketch: int, seed: int) -> Tensor:
    """σ² of one matrix of Δ, from a Gram matrix in float64 of its shorter side or of a sketch."""
    _, rows, width = blocks.before.matrices
    if width <= min(rows, sketch):
        gram = torch.zeros(width, width, dtype=torch.float64)
        for _, delta in blocks.of_matrix(matrix):
            precise = delta.double().cpu()
            gram += precise.T @ precise
        return torch.linalg.eigvalsh(gram).clamp(min=0)
    generator = torch.Generator().manual_seed(seed)
    short = torch.zeros(min(rows, sketch), width)
    for span, delta in blocks.of_matrix(matrix):
        if rows <= sketch:
            short[span.begin : span.end] = delta.cpu()
        else:
            weights = torch.randn(sketch, span.end - span.begin, generator=generator)
            short += (weights.to(delta.device) @ delta).cpu() / math.sqrt(sketch)
    precise = short.double()
    return torch.linalg.eigvalsh(precise @ precise.T).clamp(min=0)


def effective_rank(squared: Tensor) -> float:
    """exp(entropy of σ / Σσ) from squared singular values; 0 for a zero matrix."""
    values = squared.sqrt()
    if values.sum() == 0:
        return 0.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def energy_rank(squared: Tensor, share: float) -> int:
    """The fewest singular values that hold `share` of Σσ²; 0 for a zero matrix."""
    ordered = squared.sort(descending=True).values
    if ordered.sum() == 0:
        return 0
    return int((ordered.cumsum(0) < share * ordered.sum()).sum()) + 1


def _print(report: dict[str, Any], tensors: Iterable[TensorDiff]) -> None:
    def number(value: float | None, style: str) -> str:
        return "" if value is None else format(value, style)

    rows = [
        (
            re.sub(r"^(model\.)+", "", tensor.name).removesuffix(".weight"),
            f"{tensor.relative_change:.3e}",
            f"{100 * tensor.changed_share:.1f}",
            number(tensor.effective_rank, ".1f") + ("*" if tensor.sketched else ""),
            number(tensor.rank_99, "d"),
            number(100 * tensor.rounding_loss if tensor.rounding_loss is not None else None, ".2f"),
        )
        for tensor in tensors
        if tensor.relative_change > 0
    ]
    print_table(
        f"{report['model_a']} → {report['model_b']}: {len(rows)} changed tensors",
        ("tensor", "‖Δ‖/‖A‖", "changed %", "eff. rank", "99 % rank", "bf16 loss %"),
        rows,
    )
    for note in report["notes"]:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)


def plot(tensors: Sequence[TensorDiff], output: Path) -> None:
    """Relative change, effective rank and rounding loss against the layer, one line a module."""
    lines: dict[str, list[tuple[int, TensorDiff]]] = {}
    for tensor in tensors:
        found = re.search(r"\.(\d+)\.(.+)\.weight$", tensor.name)
        if found and tensor.relative_change > 0:
            lines.setdefault(found[2], []).append((int(found[1]), tensor))
    if not figures.can_draw() or not lines:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = (
        ("relative change ‖Δ‖ / ‖A‖", "relative_change"),
        ("effective rank of Δ", "effective_rank"),
        ("share of Δ that bf16 loses", "rounding_loss"),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(13, 3.6))
    for panel, (title, field) in zip(axes, panels, strict=True):
        for module, points in lines.items():
            shown = [(layer, getattr(tensor, field)) for layer, tensor in sorted(points)]
            shown = [(layer, value) for layer, value in shown if value is not None]
            panel.plot(*zip(*shown, strict=True), marker=".", label=module) if shown else None
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("layer")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=7)
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    pyplot.close(figure)
