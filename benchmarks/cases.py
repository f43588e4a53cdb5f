"""The cases to measure: operation × head shape × tokens × dtype × direction × weighting.

Letters: N tokens, D hidden, V vocabulary, R LoRA rank, K in, M out. A unit is 2·N·V·D flops, one
product of the hidden states with the head.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

Direction = Literal["forward", "backward", "both"]
Weighting = Literal["uniform", "offline", "guide", "self"]
DataKind = Literal["peaked", "flat"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class HeadShape:
    """`hidden_size`, `vocab_size` and `final_logit_softcapping` of a model's public config."""

    hidden: int
    vocab: int
    softcap: float | None = None


HEADS = {
    "llama-3.1-8b": HeadShape(4096, 128256),
    "llama-3.2-3b": HeadShape(3072, 128256),
    "qwen2.5-0.5b": HeadShape(896, 151936),
    "qwen2.5-7b": HeadShape(3584, 152064),
    "gemma-2-9b": HeadShape(3584, 256000, softcap=30.0),
    "deepseek-math-7b": HeadShape(4096, 102400),
    # Not models: sizes that a CPU measures in seconds, and that a test runs in milliseconds.
    "cpu-small": HeadShape(256, 16384),
    "cpu-large": HeadShape(512, 32768),
    "toy": HeadShape(48, 320),
    "toy-softcap": HeadShape(48, 320, softcap=10.0),
}
# [M, K] of linear layers: intermediate_size × hidden_size and hidden_size × hidden_size.
MATRICES = {
    "llama-3.1-8b up": (14336, 4096),
    "llama-3.1-8b q": (4096, 4096),
    "qwen2.5-7b up": (18944, 3584),
    "gemma-2-9b up": (14336, 3584),
    "cpu-small": (2048, 1024),
    "toy": (96, 64),
}


@dataclass(frozen=True)
class CECase:
    """`token_confidence` or `weighted_ce` on one head.

    Directions: `forward` without gradients, as in evaluation; `backward` alone, its forward not
    timed (a provider that makes gradients in the forward has little left to do there); `both`,
    a training step.
    """

    head: str
    tokens: int
    dtype: str = "bfloat16"
    data: DataKind = "peaked"
    weighting: Weighting = "offline"
    trainable: bool = False
    direction: Direction = "both"
    op: Literal["token_confidence", "weighted_ce"] = "weighted_ce"

    def __post_init__(self) -> None:
        if self.op == "token_confidence" and self.direction != "forward":
            raise ValueError(f"token_confidence has no gradient: direction {self.direction!r}")

    @property
    def shape(self) -> HeadShape:
        return HEADS[self.head]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def unit(self) -> float:
        """Flops of one product of the hidden states with the head."""
        return 2.0 * self.tokens * self.shape.vocab * self.shape.hidden

    @property
    def units(self) -> int:
        """The fewest matrix products with which the operation can be computed."""
        gradients = 1 + self.trainable
        if self.direction == "backward":
            return gradients
        forward = 1 + (self.weighting == "guide")
        return forward + (gradients if self.direction == "both" else 0)

    @property
    def flops(self) -> float:
        return self.units * self.unit

    @property
    def bytes(self) -> float:
        """Fewest bytes through device memory: inputs read once, gradients written once."""
        states = self.tokens * self.shape.hidden
        head = self.shape.vocab * self.shape.hidden
        read = (states + head) * (1 + (self.weighting == "guide" and self.direction != "backward"))
        written = 0 if self.direction == "forward" else states + head * self.trainable
        return float(self.torch_dtype.itemsize * (read + written))

    @property
    def label(self) -> str:
        head = "trainable head" if self.trainable else "frozen head"
        return (
            f"{self.op}, {self.head}, {self.tokens} tokens, {self.dtype}, {self.data}, "
            f"{self.weighting} weights, {head}, {self.direction}"
        )

    def describe(self) -> dict[str, Any]:
        """The columns of a result row that say what was measured."""
        shape = {"vocab": self.shape.vocab, "hidden": self.shape.hidden}
        return {**asdict(self), **shape, "rank": 0, "factor_dtype": ""}


@dataclass(frozen=True)
class MergeCase:
    """`W + scale · B @ A` on one linear layer's weight [M, K]."""

    head: str
    rank: int = 64
    dtype: str = "bfloat16"
    factor_dtype: str = "float32"
    op: Literal["lora_merge"] = "lora_merge"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def flops(self) -> float:
        rows, columns = MATRICES[self.head]
        return 2.0 * rows * columns * self.rank

    @property
    def bytes(self) -> float:
        """W read and written once, the factors read once."""
        rows, columns = MATRICES[self.head]
        factors = self.rank * (rows + columns) * DTYPES[self.factor_dtype].itemsize
        return float(2 * rows * columns * self.torch_dtype.itemsize + factors)

    @property
    def label(self) -> str:
        rows, columns = MATRICES[self.head]
        return (
            f"{self.op}, {self.head} [{rows}, {columns}], rank {self.rank}, {self.dtype} weight, "
            f"{self.factor_dtype} factors"
        )

    def describe(self) -> dict[str, Any]:
        """The columns of a result row that say what was measured."""
        rows, columns = MATRICES[self.head]
        unused = {"tokens": 0, "data": "", "weighting": "", "trainable": False, "direction": ""}
        return {**asdict(self), **unused, "vocab": rows, "hidden": columns}


Case = CECase | MergeCase


def cpu_cases(quick: bool) -> list[Case]:
    """A few minutes on two cores; `quick` some seconds."""
    if quick:
        return toy_cases()
    cases: list[Case] = [CECase("cpu-small", tokens, "float32") for tokens in (512, 1024, 2048)]
    cases += [
        CECase("cpu-small", 1024, "float32", weighting="uniform", trainable=True),
        CECase("cpu-small", 1024, "float32", weighting="guide"),
        CECase("cpu-small", 1024, "float32", data="flat"),
        CECase("cpu-small", 1024, "float32", direction="forward"),
        CECase("cpu-large", 512, "float32"),
        CECase(
            "cpu-small",
            2048,
            "float32",
            weighting="uniform",
            direction="forward",
            op="token_confidence",
        ),
        MergeCase("cpu-small"),
        MergeCase("cpu-small", factor_dtype="bfloat16"),
    ]
    return cases


def toy_cases() -> list[Case]:
    """One case of every kind, in milliseconds: for dry runs and tests."""
    cases: list[Case] = [
        CECase("toy", 40, "float32", weighting=weighting, trainable=trainable)
        for weighting in ("offline", "guide", "uniform", "self")
        for trainable in (False, True)
    ]
    cases += [
        CECase("toy", 40, "float32", direction="backward"),
        CECase("toy", 40, "float32", data="flat"),
        CECase("toy-softcap", 24, "float32"),
        CECase("toy-softcap", 24, "bfloat16", direction="forward"),
        CECase("toy", 40, "float32", direction="forward", op="token_confidence"),
        MergeCase("toy", rank=8),
        MergeCase("toy", rank=8, factor_dtype="bfloat16"),
    ]
    return cases


def accuracy_cases(dry_run: bool) -> list[CECase]:
    """Every head, confidences and gradients, on peaked and flat data."""
    heads = ("toy-softcap",) if dry_run else list(HEADS)[:6]
    dtypes = ("bfloat16",) if dry_run else ("bfloat16", "float16")
    cases = []
    for head in heads:
        for data in ("peaked", "flat"):
            confidence = CECase(
                head, 64 if dry_run else 1024, data=data, weighting="uniform",
                direction="forward", op="token_confidence",
            )  # fmt: skip
            cases += [confidence, CECase(head, confidence.tokens, data=data, trainable=True)]
    more = [CECase(heads[0], 64 if dry_run else 1024, dtype) for dtype in dtypes[1:]]
    return cases + more


def gpu_cases(quick: bool = False) -> list[Case]:
    """All cases for a GPU, the most important first; `quick`: only the first few."""
    confidence = {"weighting": "uniform", "direction": "forward", "op": "token_confidence"}
    cases: list[Case] = [
        CECase("llama-3.1-8b", 8192),
        CECase("llama-3.1-8b", 8192, weighting="uniform", trainable=True),
        CECase("llama-3.1-8b", 512),
        CECase("llama-3.1-8b", 8192, **confidence),
        MergeCase("llama-3.1-8b up"),
        MergeCase("llama-3.1-8b up", factor_dtype="bfloat16"),
        CECase("llama-3.1-8b", 8192, weighting="guide"),
        CECase("llama-3.1-8b", 1024),
        CECase("llama-3.1-8b", 256),
        CECase("gemma-2-9b", 8192),
        CECase("qwen2.5-7b", 8192),
        MergeCase("llama-3.1-8b up", rank=128),
    ]
    if quick:
        return cases
    cases += [CECase("llama-3.1-8b", tokens) for tokens in (2048, 32768)]
    cases += [CECase(head, 8192) for head in list(HEADS)[:6] if head not in _SHOWN]
    cases += [CECase("llama-3.1-8b", 8192, data="flat")]
    cases += [CECase("llama-3.1-8b", tokens) for tokens in (4096, 16384, 65536)]
    cases += [CECase("llama-3.1-8b", 8192, trainable=True)]
    cases += [
        CECase("llama-3.1-8b", 8192, trainable=trainable, direction=direction)
        for trainable in (False, True)
        for direction in ("forward", "backward")
        if trainable is False or direction == "backward"
    ]
    cases += [CECase("llama-3.1-8b", 8192, weighting="self")]
    cases += [CECase("llama-3.1-8b", 8192, weighting="guide", trainable=True)]
    cases += [CECase(head, 8192, **confidence) for head in list(HEADS)[1:6]]
    cases += [MergeCase("llama-3.1-8b up", rank=rank) for rank in (8, 256, 500)]
    cases += [MergeCase(name) for name in list(MATRICES)[1:4]]
    cases += [
        CECase(head, 8192, weighting=weighting, trainable=weighting == "uniform")
        for head in ("gemma-2-9b", "qwen2.5-7b")
        for weighting in ("uniform", "guide")
    ]
    cases += [CECase(head, 8192, trainable=True) for head in list(HEADS)[1:6]]
    cases += [CECase(head, tokens) for head in list(HEADS)[1:6] for tokens in (2048, 32768)]
    cases += [CECase("llama-3.1-8b", 8192, "float16"), CECase("llama-3.1-8b", 2048, "float32")]
    return cases


_SHOWN = ("llama-3.1-8b", "gemma-2-9b", "qwen2.5-7b")
