"""How one output tensor is computed, block of rows by block of rows.

A transform names the tensors that are read beside the model's own, prepares what has to be known of
the whole tensor, and turns blocks [rows, K] into the merged block. Arithmetic is float32 (float64
for float64 models), the result is rounded once to the output's dtype.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gift.merge import methods
from gift.merge.match import Change
from gift.merge.plan import TensorPlan
from gift.merge.rounding import merge_to_one_ulp
from gift.shards import Span, TensorEntry, read_span, read_tensor, spans

BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Recipe:
    """The method and what it needs beside tensors; see MergeOptions for the meaning.

    `keep` is a share, `adapters` their number, `dtype` the safetensors name of a common output
    dtype or None.
    """

    method: str
    adapters: int
    device: torch.device
    dtype: str | None = None
    task_weight: float = 1.0
    instruct_weight: float = 1.0
    keep: float = 0.2
    drop_rate: float = 0.9
    seed: int = 0
    energy_share: float = 0.5
    off_diagonal: float = 0.9


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

    def factors(self, change: Change) -> Factors:
        """The factors of one change, oriented like the stored weight."""
        a = self._read(change.a)
        if change.b is None:
            left = torch.ones(1, 1, 1, dtype=a.dtype, device=a.device)
            return Factors(left, a.view(1, 1, -1), change.scale)
        b = self._read(change.b)
        right = a.view(change.experts, change.rank, -1)
        # PEFT lays the experts of B out innermost: [M, R * E] is [M, R, E].
        left = b.view(b.shape[0], change.rank, change.experts).permute(2, 0, 1)
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
        """Reads what has to be known of the whole tensor."""

    def block(self, span: Span, tensors: list[Tensor]) -> Tensor:
        """The output's rows of `span` from the sources' rows [rows, K]."""
        return tensors[0].to(self.out_dtype)

    def release(self) -> None:
        """Forgets what `prepare` read."""


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
            merged = methods.dora_block(
                weight.to(self.compute_dtype),
                rights[0].to(self.compute_dtype),
                lefts[0].to(self.compute_dtype),
                scales[0],
                magnitude[span.begin : span.end].to(self.compute_dtype),
            )
            return merged.to(self.out_dtype)
        return merge_to_one_ulp(weight, rights, lefts, scales, self.out_dtype)


class MethodTransform(Transform):
    """Any method on full task vectors: origin, instruct vector and one vector an adapter.

    Sources: the model's tensor, the base's where given, the adapters' saved tensors, and one Fisher
    diagonal a model for `fisher`. `grams` are RegMean's matrices, one a model.
    """

    def __init__(
        self,
        tensor: TensorPlan,
        reader: FactorReader,
        recipe: Recipe,
        out_dtype: torch.dtype,
        fishers: Sequence[TensorEntry] = (),
        grams: Sequence[TensorEntry] = (),
    ) -> None:
        base = [tensor.base] if tensor.base is not None else []
        saved = [saved.entry for saved in tensor.saved]
        super().__init__([tensor.source, *base, *saved, *fishers], out_dtype)
        self._tensor = tensor
        self._reader = reader
        self._recipe = recipe
        self._fishers = len(fishers)
        self._gram_entries = tuple(grams)
        self._factors: list[tuple[int, Factors]] = []
        self._thresholds: list[float] = []
        self._parts: dict[int, methods.LowRankPart] = {}
        self._system: methods.RegMeanSystem | None = None

    def prepare(self) -> None:
        self._factors = [
            (change.adapter, self._reader.factors(change)) for change in self._tensor.changes
        ]
        if self._recipe.method == "ties":
            count = self._recipe.adapters + (self._tensor.base is not None)
            self._thresholds = [
                methods.magnitude_threshold(_VectorBlocks(self, number), self._recipe.keep)
                for number in range(count)
            ]
        if self._gram_entries:
            device = self._recipe.device
            grams = [read_tensor(entry).to(device).float() for entry in self._gram_entries]
            self._system = methods.regmean_system(grams, self._recipe.off_diagonal)

    def release(self) -> None:
        self._factors, self._parts, self._system = [], {}, None

    def block(self, span: Span, tensors: list[Tensor]) -> Tensor:
        rows = [tensor.to(self._recipe.device, self.compute_dtype) for tensor in tensors]
        return self._merge(span, rows).to(self.out_dtype)

    def _merge(self, span: Span, rows: list[Tensor]) -> Tensor:
        recipe, method = self._recipe, self._recipe.method
        instruct = rows[0]
        base = rows[1] if self._tensor.base is not None else None
        origin = instruct if base is None else base
        tasks = self.task_vectors(span, rows)
        vectors = tasks if base is None else [instruct - base, *tasks]
        if method == "lora":
            return methods.task_arithmetic_block(instruct, tasks, 1.0)
        if method == "task-arithmetic":
            return methods.task_arithmetic_block(origin, vectors, recipe.task_weight)
        if method in ("re-adapt", "lore-adapt"):
            assert base is not None
            part = instruct - base if method == "re-adapt" else self._low_rank(span, rows)
            task = torch.stack(tasks).sum(0)
            return methods.re_adapt_block(
                base, part, task, recipe.task_weight, recipe.instruct_weight
            )
        if method == "ties":
            return methods.ties_block(origin, vectors, self._thresholds, recipe.task_weight)
        if method in ("dare", "dare-ties"):
            place = f"{self._tensor.name}\n{span.matrix}\n{span.begin}"
            vectors = [
                methods.dare_block(vector, recipe.drop_rate, recipe.seed, f"{place}\n{number}")
                for number, vector in enumerate(vectors)
            ]
            if method == "dare":
                return methods.task_arithmetic_block(origin, vectors, recipe.task_weight)
            none = [0.0] * len(vectors)
            return methods.ties_block(origin, vectors, none, recipe.task_weight)
        models = [instruct, *(origin + task for task in tasks)]
        if method == "fisher":
            return methods.fisher_block(models, rows[len(rows) - self._fishers :])
        assert method == "regmean", method
        if self._system is None:
            return methods.mean_block(models)
        return methods.regmean_block(models, self._system)

    def task_vectors(self, span: Span, rows: list[Tensor]) -> list[Tensor]:
        """τ of every adapter for these rows; zero where an adapter has nothing for the tensor."""
        tasks = [torch.zeros_like(rows[0]) for _ in range(self._recipe.adapters)]
        for adapter, factors in self._factors:
            left = factors.left[span.matrix, span.begin : span.end].to(rows[0].dtype)
            right = factors.right[span.matrix].to(rows[0].dtype)
            tasks[adapter].addmm_(left, right, alpha=factors.scale)
        first_saved = 1 + (self._tensor.base is not None)
        origin = rows[first_saved - 1]
        for number, saved in enumerate(self._tensor.saved):
            tasks[saved.adapter] += saved.scale * (rows[first_saved + number] - origin)
        return tasks

    def vector(self, number: int, span: Span) -> Tensor:
        """One task vector's rows, the instruct vector first where there is a base; read anew."""
        rows = [
            read_span(entry, span).to(self._recipe.device, self.compute_dtype)
            for entry in self.sources
        ]
        if self._tensor.base is None:
            return self.task_vectors(span, rows)[number]
        return rows[0] - rows[1] if number == 0 else self.task_vectors(span, rows)[number - 1]

    def _low_rank(self, span: Span, rows: list[Tensor]) -> Tensor:
        """The rows of the low-rank part of θ_I − θ_B; vectors keep the whole difference."""
        _, height, width = self._tensor.source.matrices
        if min(height, width) == 1:
            return rows[0] - rows[1]
        if span.matrix not in self._parts:
            whole = Span(span.matrix, 0, height)
            matrix = self.vector(0, whole)
            self._parts = {span.matrix: methods.low_rank_part(matrix, self._recipe.energy_share)}
        part = self._parts[span.matrix]
        return part.left[span.begin : span.end] @ part.right


class _VectorBlocks:
    """The blocks of one task vector, which can be gone through again and again."""

    def __init__(self, transform: MethodTransform, number: int) -> None:
        self._transform = transform
        self._number = number

    def __iter__(self) -> Iterator[Tensor]:
        for span in spans(self._transform.sources[0], BLOCK_BYTES):
            yield self._transform.vector(self._number, span)
