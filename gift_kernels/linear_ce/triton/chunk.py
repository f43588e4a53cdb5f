"""One chunk of logits, [rows, columns]: its buffers and the kernels launched on them.

N rows of the caller, D hidden, V vocabulary. `Plan` bounds a chunk's shape. Token counts
are run-time arguments of every kernel; sizes of the model may specialise it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gift_kernels.linear_ce.triton.chunk_size import COUNT_STEP, Plan, cdiv, logit_factors
from gift_kernels.linear_ce.triton.kernels import logits as triton_logits
from gift_kernels.linear_ce.triton.kernels import matmul as triton_products
from gift_kernels.linear_ce.triton.kernels import row_gradients
from gift_kernels.linear_ce.triton.kernels import rows as triton_rows
from gift_kernels.linear_ce.triton.layout import Kind, layout_of, logits_with_guide
from gift_kernels.linear_ce.triton.row_state import Rows, RowState
from gift_kernels.linear_ce.triton.tiles import can_use_tma, operand
from gift_kernels.linear_ce.types import LinearInputs, VocabShard


class Chunk:
    """Buffers of one head's chunk, reused for all chunks of a call."""

    def __init__(
        self,
        head: LinearInputs,
        plan: Plan,
        count: int,
        most: tuple[int, int],
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        exponentials: bool = True,
        final: bool = False,
        exp: Tensor | None = None,
    ) -> None:
        """`count` is N, `most` the largest number of rows and of columns.

        Without `exponentials` no E is stored. With `final` the references are known and no sums are
        computed. `exp` is a first buffer for E, if there is one already.
        """
        tiles, device = plan.logit_tiles, head.hidden.device
        self.head, self.plan = head, plan
        self.exponentials, self.dtype = exponentials, head.hidden.dtype
        self.vocab_size, self.hidden_size = head.weight.shape
        self.width = tiles.BLOCK_V
        self.columns = min(most[1], cdiv(self.vocab_size, self.width) * self.width)
        # A step over rows in dW = Eᵀ H reads only rows of E that a tile of logits has written.
        step = plan.dw_tiles.BLOCK_K
        assert tiles.BLOCK_N % step == 0, f"BLOCK_N is no multiple of BLOCK_K of dW: {plan}"
        assert tiles.BLOCK_N <= COUNT_STEP, f"BLOCK_N is above {COUNT_STEP}: {plan}"
        self.rows = min(most[0], cdiv(max(count, 1), plan.pad) * plan.pad)
        assert self.rows % plan.pad == 0 and self.columns % self.width == 0, (most, plan)
        self.factors = logit_factors(head, temperature)
        self.hidden = torch.empty(self.rows, self.hidden_size, dtype=self.dtype, device=device)
        self.tma = can_use_tma(plan.machine, self.hidden, head.weight)
        self.layout = layout_of(
            Kind(
                plan,
                device,
                self.dtype,
                (self.vocab_size, self.hidden_size),
                head.weight.stride(),
                head.hidden.stride(),
                head.bias is not None,
                head.logit_softcap is not None,
                self.factors,
                self.rows,
                self.columns,
                with_entropy,
                exponentials,
                final,
                self.tma,
            )
        )
        self.slices = self.layout.slices
        self.partial = torch.empty(
            (2 + with_entropy) * self.slices * self.rows if not final else 0,
            dtype=torch.float32,
            device=device,
        )
        self.operands = (
            operand(self.hidden, (tiles.BLOCK_N, tiles.BLOCK_D), self.tma),
            operand(head.weight, (tiles.BLOCK_V, tiles.BLOCK_D), self.tma),
        )
        self.pointers: triton_logits.Pointers | None = None  # of the rows gathered last
        self._exp = self.exp_stored = None
        if exponentials:
            products = plan.product_tiles
            self.head_operand = operand(head.weight, (products.BLOCK_K, products.BLOCK_D), self.tma)
            if exp is None:
                exp = torch.empty(self.rows, self.columns, dtype=self.dtype, device=device)
            self.exp = exp

    @property
    def exp(self) -> Tensor:
        """E [rows, columns] of a chunk of columns; may be replaced by another such buffer."""
        assert self._exp is not None, "this chunk has no exponentials"
        return self._exp

    @exp.setter
    def exp(self, value: Tensor) -> None:
        tiles, products = self.plan.logit_tiles, self.plan.product_tiles
        self._exp = value
        stored = (tiles.BLOCK_N, tiles.BLOCK_V // tiles.PARTS)
        self.exp_stored = operand(value, stored, self.tma)
        self.exp_loaded = operand(value, (products.BLOCK_M, products.BLOCK_K), self.tma)

    def gather(
        self,
        target: Tensor,
        rows: Rows,
        state: RowState,
        first_row: int,
        shard: VocabShard | None,
    ) -> None:
        """Copies this chunk's rows and targets; starts their state if it has target logits.

        With exponentials references start at target logits.
        """
        hidden = self.head.hidden
        self.layout.gather(
            triton_rows._gather_kernel,
            self.layout.gather_programs,
            hidden,
            self.head.weight,
            self.head.bias,
            target,
            rows.index,
            rows.count,
            self.hidden,
            state.local_target,
            None if state.target_logit is None else state.parts,
            state.target_logit,
            first_row,
            shard.start if shard is not None else 0,
            hidden.shape[0],
        )
        self.pointers = triton_logits.Pointers(
            self.head.bias,
            _from(state.local_target, first_row),
            _from(state.parts, first_row),
            None if state.target_logit is None else _from(state.target_logit, first_row),
            self.partial,
        )

    def logits(
        self,
        rows: Rows,
        state: RowState,
        first_row: int,
        first_v: int,
        guide: "GuideSide | None" = None,
    ) -> None:
        """Fills E and the partial sums for columns first_v to first_v + columns.

        With `guide` the same launch fills the guide's partial sums for all of its columns.
        """
        layout, columns = self.layout, self._columns_from(first_v)
        if guide is None:
            layout.logits(
                triton_logits._logits_kernel,
                layout.logit_programs,
                *self.operands,
                self.exp_stored,
                self.pointers,
                rows.count,
                first_row,
                first_v,
                columns,
                self.slices,
            )
            return
        other = guide.chunk
        assert other.rows == self.rows and other.columns >= other.vocab_size
        logits_with_guide(layout, other.layout)(
            triton_logits._two_heads_kernel,
            layout.logit_programs,
            *self.operands,
            self.exp_stored,
            self.pointers,
            *other.operands,
            other.pointers,
            rows.count,
            first_row,
            first_v,
            columns,
            self.slices,
            other.vocab_size,
        )

    def merge(
        self, rows: Rows, state: RowState, dh: Tensor | None, first_row: int, first_v: int
    ) -> None:
        """Adds the partial sums to the state; rescales E and dH to the new references."""
        added = dh if first_v > 0 else None
        self.layout.merge[added is not None](
            triton_rows._merge_kernel,
            self.layout.merge_programs,
            self.partial,
            state.parts,
            self._exp,
            added,
            rows.index,
            rows.count,
            first_row,
            state.parts.shape[1],
            cdiv(self._columns_from(first_v), self.width),
        )

    def add_to_dh(self, rows: Rows, dh: Tensor, first_row: int, first_v: int) -> None:
        """dH [splits, N, D] (+)= E W for this chunk's rows; the first columns overwrite."""
        self.layout.dh[first_v > 0](
            triton_products._dh_kernel,
            self.layout.product_programs,
            self.exp_loaded,
            self.head_operand,
            dh,
            rows.index,
            rows.count,
            first_row,
            first_v,
            self._columns_from(first_v),
            dh.shape[1],
        )

    def add_to_dw(
        self,
        rows: Rows,
        weights: triton_products.RowWeights,
        dw: Tensor,
        scale: Tensor,
        first_row: int,
        first_v: int,
    ) -> None:
        """dW (+)= (w G)ᵀ H for the columns of this chunk; the first rows overwrite.

        Weights [rows] are those of this chunk's rows, in their order.
        """
        tiles = self.plan.dw_tiles
        self.layout.dw[first_row > 0](
            triton_products._dw_kernel,
            self.layout.dw_programs,
            operand(self.exp, (tiles.BLOCK_K, tiles.BLOCK_M), self.tma),
            operand(self.hidden, (tiles.BLOCK_K, tiles.BLOCK_D), self.tma),
            dw,
            weights,
            rows.count,
            scale,
            first_row,
            first_v,
            self._columns_from(first_v),
        )

    def add_to_db(
        self,
        rows: Rows,
        weights: triton_products.RowWeights,
        db: Tensor,
        scale: Tensor,
        first_row: int,
        first_v: int,
    ) -> None:
        """db (+)= the column sums of w G."""
        columns = self._columns_from(first_v)
        self.layout.db[first_row > 0](
            row_gradients._column_sum_kernel,
            (cdiv(columns, 64), 1, 1),
            self.exp,
            weights,
            db,
            scale,
            rows.count,
            first_row,
            first_v,
            columns,
        )

    def _columns_from(self, first_v: int) -> int:
        return min(self.columns, self.vocab_size - first_v)


def _from(values: Tensor, first_row: int) -> Tensor:
    """The values [..., N] from one row on; no view for row 0, because views take host time."""
    return values if first_row == 0 else values[..., first_row:]


class GuideSide(NamedTuple):
    """The guide's part of a launch for two heads: buffers of one chunk, state of all rows."""

    chunk: Chunk
    state: RowState


class KeptRows(NamedTuple):
    """The first valid tokens, whose exponentials are kept after the pass."""

    chunk: Chunk
    exponentials: list[Tensor]  # [rows, columns] of each chunk of columns
    references: Tensor  # [chunks of columns, rows]
