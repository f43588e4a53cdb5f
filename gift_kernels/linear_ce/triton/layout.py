"""Sizes and launches that all chunks of one kind share; tensors are passed at the launch.

Built once per kind, because building it would take too long in a call of few tokens.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gift_kernels.linear_ce.triton.chunk_size import MARGIN, LogitFactors, Plan, cdiv
from gift_kernels.linear_ce.triton.kernels import logits as triton_logits
from gift_kernels.linear_ce.triton.kernels import matmul as triton_products
from gift_kernels.linear_ce.triton.kernels import rows as triton_rows
from gift_kernels.linear_ce.triton.launch import Launch
from gift_kernels.linear_ce.triton.tiles import LogitTiles, ProductTiles

DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Kind(NamedTuple):
    """What determines the launches of a chunk, besides the alignment of its tensors."""

    plan: Plan
    device: torch.device
    dtype: torch.dtype
    head: tuple[int, ...]  # V and D
    head_strides: tuple[int, ...]
    hidden_strides: tuple[int, ...]
    has_bias: bool
    has_cap: bool
    factors: LogitFactors
    rows: int
    columns: int
    with_entropy: bool
    exponentials: bool
    final: bool
    tma: bool


class Layout:
    """Sizes and launches of the chunks of one kind; `Chunk` documents each launch."""

    def __init__(self, kind: Kind) -> None:
        plan, (self.vocab_size, self.hidden_size) = kind.plan, kind.head
        self.kind = kind
        self.slices = kind.columns // plan.logit_tiles.BLOCK_V
        self.margin, self.below = MARGIN[kind.dtype] if kind.exponentials else (0.0, 0.0)
        self.factors = triton_logits.Factors(*kind.factors[:3])
        self.logit_programs = self._programs(plan.logit_tiles)
        self.product_programs = self._programs(plan.product_tiles)
        self.dw_programs = self._programs(plan.dw_tiles)
        self.row_block = plan.row_block
        self.merge_programs = (cdiv(kind.rows, 2 * plan.row_block[0]), 1, 1)
        self.gather_programs = (cdiv(kind.rows, plan.row_block[0]), 1, 1)
        self.flags = triton_logits.Flags(
            HAS_BIAS=kind.has_bias,
            HAS_CAP=kind.has_cap,
            ENTROPY=kind.with_entropy,
            EXPONENTIALS=kind.exponentials,
            FINAL=kind.final,
            MARGIN=self.margin,
            TMA=kind.tma,
            DTYPE=DTYPES[kind.dtype],
        )
        self.sizes = triton_logits.Sizes(self.hidden_size, *kind.head_strides, kind.rows)
        self.gather = self._gather()
        self.logits = Launch(
            *(self.sizes, self.factors),
            TILES=plan.logit_tiles,
            FLAGS=self.flags,
            warps_and_stages=_warps_and_stages(plan.logit_tiles),
        )
        # Whether there is a dH to rescale, and whether a product accumulates, is compiled in.
        self.merge = [self._merge(splits) for splits in (1, plan.splits)]
        self.dh = [self._dh(accumulate) for accumulate in (False, True)]
        self.dw = [self._dw(accumulate) for accumulate in (False, True)]
        self.db = [self._db(accumulate) for accumulate in (False, True)]

    def _gather(self) -> Launch:
        kind = self.kind
        return Launch(
            triton_rows.GatherSizes(
                self.vocab_size,
                self.hidden_size,
                kind.rows,
                kind.plan.pad,
                *kind.hidden_strides,
                *kind.head_strides,
            ),
            self.factors,
            GUESS=kind.exponentials and not kind.final,
            BELOW=self.below,
            HAS_CAP=kind.has_cap,
            BLOCK_N=self.row_block[0],
            BLOCK_D=self.row_block[1],
        )

    def _merge(self, splits: int) -> Launch:
        kind = self.kind
        return Launch(
            *(self.slices, kind.rows, self.hidden_size, kind.factors.bits),
            BLOCK_T=min(kind.plan.slice_block, triton.next_power_of_2(self.slices)),
            WIDTH=kind.plan.logit_tiles.BLOCK_V,
            ENTROPY=kind.with_entropy,
            EXPONENTIALS=kind.exponentials,
            MARGIN=self.margin,
            SPLITS=splits,
            BLOCK_N=2 * self.row_block[0],
        )

    def _dh(self, accumulate: bool) -> Launch:
        tiles = self.kind.plan.product_tiles
        return Launch(
            self._product_sizes(self.kind.head_strides),
            TILES=tiles,
            FLAGS=triton_products.ProductFlags(accumulate, self.kind.tma),
            SPLITS=self.kind.plan.splits,
            warps_and_stages=_warps_and_stages(tiles),
        )

    def _dw(self, accumulate: bool) -> Launch:
        tiles = self.kind.plan.dw_tiles
        return Launch(
            self._product_sizes((self.hidden_size, 1)),
            TILES=tiles,
            FLAGS=triton_products.ProductFlags(accumulate, self.kind.tma),
            warps_and_stages=_warps_and_stages(tiles),
        )

    def _db(self, accumulate: bool) -> Launch:
        sizes = (self.kind.rows, self.kind.columns)
        return Launch(*sizes, ACCUMULATE=accumulate, BLOCK_N=32, BLOCK_C=64)

    def _product_sizes(self, strides: tuple[int, ...]) -> triton_products.ProductSizes:
        kind = self.kind
        return triton_products.ProductSizes(self.hidden_size, *strides, kind.rows, kind.columns)

    def _programs(self, tiles: LogitTiles | ProductTiles) -> tuple[int, int, int]:
        return self.kind.plan.machine.sms * tiles.per_sm, 1, 1


@functools.lru_cache(maxsize=1024)
def layout_of(kind: Kind) -> Layout:
    """The layout of this kind, cached."""
    return Layout(kind)


@functools.lru_cache(maxsize=1024)
def logits_with_guide(layout: Layout, guide: Layout) -> Launch:
    """Logits of a head and of a guide in one launch."""
    tiles = layout.kind.plan.logit_tiles
    return Launch(
        *(layout.sizes, layout.factors, guide.sizes, guide.factors),
        TILES=tiles,
        FLAGS=layout.flags,
        GUIDE_FLAGS=guide.flags,
        warps_and_stages=_warps_and_stages(tiles),
    )


def _warps_and_stages(tiles: LogitTiles | ProductTiles) -> tuple[int, int]:
    return tiles.num_warps, tiles.num_stages
