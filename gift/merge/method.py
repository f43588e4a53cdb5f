"""The type of a merge method: its name, formula, and a function on rows of a tensor.

Letters: M out, K in, n task vectors. θ_I is the instruct model's tensor, θ_B the base model's, θ₀
the origin that task vectors τ are added to: θ_B where a base is given, else θ_I. All tensors of a
call have one shape and one floating-point dtype (float32, or float64 for float64 models); the
caller rounds the result to the model's dtype once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # `gift --help` reads every method and must not wait for torch
    from torch import Tensor

    from gift.config.merge import MergeOptions


@dataclass(frozen=True)
class Rows:
    """Some rows [rows, K] of one tensor in the models that are merged.

    `tasks` holds one τ per adapter, zero if it does not change the tensor. `fishers` are the
    models' Fisher diagonals, for methods that request them. `known` is what the method's `prepare`
    returned for the whole tensor, `matrix` the index of these rows' matrix in a stack of experts.
    `key` names tensor and rows and is the same in every run.
    """

    instruct: Tensor
    base: Tensor | None
    tasks: Sequence[Tensor]
    fishers: Sequence[Tensor] = ()
    known: Any = None
    matrix: int = 0
    begin: int = 0
    key: str = ""

    @property
    def origin(self) -> Tensor:
        """θ₀."""
        return self.instruct if self.base is None else self.base

    @property
    def vectors(self) -> list[Tensor]:
        """The task vectors; with a base, θ_I − θ_B is the first of them."""
        first = [] if self.base is None else [self.instruct - self.base]
        return [*first, *self.tasks]

    @property
    def models(self) -> list[Tensor]:
        """The instruct model and one task model per adapter."""
        return [self.instruct, *(self.origin + task for task in self.tasks)]


class WholeTensor(Protocol):
    """A whole tensor, for a method's `prepare`, which runs before the first rows are merged."""

    @property
    def is_vector(self) -> bool:
        """Whether its matrices are single rows or columns."""
        ...

    def vectors(self) -> Sequence[Iterable[Tensor]]:
        """Every task vector as blocks of rows, which can be iterated repeatedly."""
        ...

    def instruct_part(self, matrix: int) -> Tensor:
        """θ_I − θ_B of one matrix [M, K]."""
        ...

    def grams(self) -> list[Tensor]:
        """The models' Gram matrices [K, K] in float32; none where this tensor has none."""
        ...


def _nothing(tensor: WholeTensor, options: MergeOptions) -> Any:
    return None


def _not_a_sum(options: MergeOptions, adapters: int, has_base: bool) -> float | None:
    return None


@dataclass(frozen=True)
class Method:
    """A merge method; a file in `gift/merge/methods` defines one as `METHOD`.

    about: one sentence for a study's report.
    merge: the merged rows.
    settings: the fields of MergeOptions it reads; manifest and card list these only.
    statistics: what `gift merge-statistics` collects for every model: the diagonal of the Fisher
    information, or the Gram matrix of each linear layer's inputs.
    prepare: computes what depends on the whole tensor; its result becomes `Rows.known`.
    sum_weight: the factor w where the result is θ_I + w Σ τ, else None, from the number of adapters
    and whether there is a base. Tensors without an adapter then stay unchanged, and the merge can
    be undone by subtraction.
    note: a note for the user, given the number of task vectors; empty for none.
    """

    name: str
    about: str
    formula: str
    source: str
    merge: Callable[[Rows, MergeOptions], Tensor]
    settings: tuple[str, ...] = ()
    needs_base: bool = False
    takes_dora: bool = False
    statistics: Literal["diagonal", "gram"] | None = None
    prepare: Callable[[WholeTensor, MergeOptions], Any] = _nothing
    sum_weight: Callable[[MergeOptions, int, bool], float | None] = _not_a_sum
    note: Callable[[MergeOptions, int], str] = lambda options, vectors: ""
