"""How one output tensor is computed, block of rows by block of rows.

A transform lists the tensors to read besides the model's own, prepares what depends on the whole
tensor, and computes merged blocks from blocks [rows, K]. Arithmetic is float32 (float64 for float64
models), the result is rounded once to the output's dtype.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from gift.config import MergeOptions
from gift.merge.match import LoraDelta
from gift.merge.method import Method, Rows
from gift.merge.methods import METHODS
from gift.merge.plan import TensorPlan
from gift.merge.rounding import merge_to_one_ulp
from gift.storage.shards import Span, TensorEntry, read_span, read_tensor, spans

BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class MergeSettings:
    """The method with its settings, and its other inputs except tensors.

    `adapters` is their number, `dtype` the safetensors name of a common output dtype or None.
    """

    options: MergeOptions
    adapters: int
    device: torch.device
    dtype: str | None = None

    @property
    def method(self) -> Method:
        return METHODS[self.options.method]


@dataclass(frozen=True)
class Factors:
    """A change's factors for a stack of matrices: left [E, M, R], right [E, R, K]."""

    left: Tensor
    right: Tensor
    scale: float
    magnitude: Tensor | None = None


class FactorReader:
    """Reads adapter factors; keeps the last ones, which the pieces of an expert stack share."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[TensorEntry, Tensor] = {}

    def factors(self, change: LoraDelta) -> Factors:
        """The factors of one change, oriented like the stored weight."""
        a = self._read(change.a)
        if change.b is None:
            left = torch.ones(1, 1, 1, dtype=a.dtype, device=a.device)
            return Factors(left, a.view(1, 1, -1), change.scale)
        b = self._read(change.b)
        right = rearrange(a, "(e r) k -> e r k", e=change.experts)
        left = rearrange(b, "m (r e) -> e m r", e=change.experts)  # PEFT has B's experts innermost
        if change.transposed:
            left, right = right.mT, left.mT
        if change.expert is not None:
            begin, end = change.rows or (0, left.shape[1])
            left = left[change.expert, begin:end].unsqueeze(0)
            right = right[change.expert].unsqueeze(0)
        magnitude = None if change.magnitude is None else self._read(change.magnitude).view(-1)
        return Factors(left.contiguous(), right.contiguous(), change.scale, magnitude)

    def _read(self, entry: TensorEntry) -> Tensor:
        if entry not in self._kept:
            while len(self._kept) > 3:
                self._kept.pop(next(iter(self._kept)))
            self._kept[entry] = read_tensor(entry).to(self._device)
        return self._kept[entry]


class Transform:
    """Converts a tensor's dtype; the base of all other transforms.

    `sources` are read block by block, the first one decides the blocks.
    """

    def __init__(self, sources: Sequence[TensorEntry], out_dtype: torch.dtype) -> None:
        self.sources = tuple(sources)
        self.out_dtype = out_dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 where some source is float64, else float32."""
        wide = any(entry.dtype == "F64" for entry in self.sources)
        return torch.float64 if wide else torch.float32

    def prepare(self) -> None:
        """Reads and computes what depends on the whole tensor."""

    def block(self, span: Span, tensors: list[Tensor]) -> Tensor:
        """The output's rows of `span` from the sources' rows [rows, K]."""
        return tensors[0].to(self.out_dtype)

    def release(self) -> None:
        """Frees the tensors that `prepare` read."""


class ReplaceTransform(Transform):
    """The second source in place of the first: a tensor that the adapter holds in full."""

    def block(self, span: Span, tensors: list[Tensor]) -> Tensor:
        return tensors[1].to(self.out_dtype)


class LoraTransform(Transform):
    """W + Σ scale_i · B_i A_i in one pass, one rounding; or DoRA's rescaling of one such sum."""

    def __init__(
        self,
        tensor: TensorPlan,
        reader: FactorReader,
        weight: float,
        device: torch.device,
        out_dtype: torch.dtype,
    ) -> None:
        super().__init__([tensor.source], out_dtype)
        self._tensor = tensor
        self._reader = reader
        self._weight = weight
        self._device = device
        self._factors: list[Factors] = []

    def prepare(self) -> None:
        self._factors = [self._reader.factors(change) for change in self._tensor.changes]

    def release(self) -> None:
        self._factors = []

    def block(self, span: Span, tensors: list[Tensor]) -> Tensor:
        weight = tensors[0].to(self._device)
        lefts = [factors.left[span.matrix, span.begin : span.end] for factors in self._factors]
        rights = [factors.right[span.matrix] for factors in self._factors]
        scales = [factors.scale * self._weight for factors in self._factors]
        magnitude = self._factors[0].magnitude
        if magnitude is not None:
            merged = dora_rows(
                weight.to(self.compute_dtype),
                rights[0].to(self.compute_dtype),
                lefts[0].to(self.compute_dtype),
                scales[0],
                magnitude[span.begin : span.end].to(self.compute_dtype),
            )
            return merged.to(self.out_dtype)
        return merge_to_one_ulp(weight, rights, lefts, scales, self.out_dtype)


def dora_rows(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, magnitude: Tensor
) -> Tensor:
    """m · V / ‖V‖ per output row, V = W + scale · B A (DoRA, arXiv 2402.09353, equation 5)."""
    direction = weight + scale * (lora_b @ lora_a)
    return direction * (magnitude / torch.linalg.vector_norm(direction, dim=1)).unsqueeze(1)


class MethodTransform(Transform):
    """Any method on full task vectors: origin, instruct vector and one vector an adapter.

    Sources: the model's tensor, the base's where given, the adapters' saved tensors, and the
    `fishers`, one diagonal a model. `grams` are the models' Gram matrices, read once.
    """

    def __init__(
        self,
        tensor: TensorPlan,
        reader: FactorReader,
        settings: MergeSettings,
        out_dtype: torch.dtype,
        fishers: Sequence[TensorEntry] = (),
        grams: Sequence[TensorEntry] = (),
    ) -> None:
        base = [tensor.base] if tensor.base is not None else []
        saved = [saved.entry for saved in tensor.saved]
        super().__init__([tensor.source, *base, *saved, *fishers], out_dtype)
        self._tensor = tensor
        self._reader = reader
        self._settings = settings
        self._fishers = len(fishers)
        self._grams = tuple(grams)
        self._factors: list[tuple[int, Factors]] = []
        self._known: Any = None

    def prepare(self) -> None:
        self._factors = [
            (change.adapter, self._reader.factors(change)) for change in self._tensor.changes
        ]
        self._known = self._settings.method.prepare(self, self._settings.options)

    def release(self) -> None:
        self._factors, self._known = [], None

    def block(self, span: Span, tensors: list[Tensor]) -> Tensor:
        rows = [tensor.to(self._settings.device, self.compute_dtype) for tensor in tensors]
        merged = self._settings.method.merge(self._rows(span, rows), self._settings.options)
        return merged.to(self.out_dtype)

    def _rows(self, span: Span, rows: list[Tensor]) -> Rows:
        return Rows(
            instruct=rows[0],
            base=rows[1] if self._tensor.base is not None else None,
            tasks=self._task_vectors(span, rows),
            fishers=rows[len(rows) - self._fishers :],
            known=self._known,
            matrix=span.matrix,
            begin=span.begin,
            key=f"{self._tensor.name}\n{span.matrix}\n{span.begin}",
        )

    def _task_vectors(self, span: Span, rows: list[Tensor]) -> list[Tensor]:
        """τ of every adapter for these rows; zero where an adapter does not change the tensor."""
        tasks = [torch.zeros_like(rows[0]) for _ in range(self._settings.adapters)]
        for adapter, factors in self._factors:
            left = factors.left[span.matrix, span.begin : span.end].to(rows[0].dtype)
            right = factors.right[span.matrix].to(rows[0].dtype)
            tasks[adapter].addmm_(left, right, alpha=factors.scale)
        first_saved = 1 + (self._tensor.base is not None)
        origin = rows[first_saved - 1]
        for number, saved in enumerate(self._tensor.saved):
            tasks[saved.adapter] += saved.scale * (rows[first_saved + number] - origin)
        return tasks

    @property
    def is_vector(self) -> bool:
        return min(self._tensor.source.matrices[1:]) == 1

    def vectors(self) -> list[Iterable[Tensor]]:
        count = self._settings.adapters + (self._tensor.base is not None)
        return [_VectorBlocks(self, number) for number in range(count)]

    def instruct_part(self, matrix: int) -> Tensor:
        return self.read_vector(0, Span(matrix, 0, self._tensor.source.matrices[1]))

    def grams(self) -> list[Tensor]:
        return [read_tensor(entry).to(self._settings.device).float() for entry in self._grams]

    def read_vector(self, number: int, span: Span) -> Tensor:
        """Reads one task vector's rows."""
        rows = [
            read_span(entry, span).to(self._settings.device, self.compute_dtype)
            for entry in self.sources
        ]
        return self._rows(span, rows).vectors[number]


class _VectorBlocks:
    """The blocks of one task vector, which can be iterated repeatedly."""

    def __init__(self, transform: MethodTransform, number: int) -> None:
        self._transform = transform
        self._number = number

    def __iter__(self) -> Iterator[Tensor]:
        for span in spans(self._transform.sources[0], BLOCK_BYTES):
            yield self._transform.read_vector(self._number, span)
