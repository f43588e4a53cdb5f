"""Argument checks of the public functions.

Every check raises TypeError (wrong type or dtype) or ValueError (anything else); the message begins
with the argument's name, or with both names if two do not fit together.
"""

import numbers
import operator
import os
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup

from gift_kernels.implementation import Impl, constant_under_compile
from gift_kernels.linear_ce.types import (
    Guide,
    LinearInputs,
    Reduction,
    Statistic,
    VocabParallel,
    WeightTransform,
)

CHECK_TARGETS_VARIABLE = "GIFT_KERNELS_CHECK_TARGETS"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_LARGEST_INT64 = (1 << 63) - 1


def tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...] = _DTYPES) -> Tensor:
    """Returns a plain tensor of one of `dtypes` that is not inside a `torch.func` transform."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_kind(value)}")
    subclass = type(value) not in (Tensor, torch.nn.Parameter)
    if subclass and any(base.__name__ == "DTensor" for base in type(value).__mro__):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor, as parameters of FSDP2 are outside "
            f"their module's forward: call inside that forward, or pass {name}.full_tensor(), or "
            f"for a head that is sharded over its rows {name}.to_local() with vocab_parallel"
        )
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got the layout {value.layout}")
    if value.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected one of {known}, got {value.dtype}")
    if not torch.compiler.is_compiling():
        functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
        functional = functorch.is_functorch_wrapped_tensor(value)
        if functional or forward_ad.unpack_dual(value).tangent is not None:
            raise TypeError(
                f"{name}: torch.func (grad, vjp, jvp, jacrev, vmap) and forward-mode derivatives "
                "are not supported; use backward() or torch.autograd.grad on plain tensors"
            )
    return value


def number(name: str, value: object, wanted: str = "number") -> float:
    """A finite float of a Python or NumPy number or a 0-d tensor.

    `wanted` is "number", "number >= 0" or "positive number".
    """
    if isinstance(value, Tensor):
        value = _scalar_of(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a {wanted}, got {_kind(value)}")
    found = float(value)
    lowest = {"number": -float("inf"), "number >= 0": 0.0, "positive number": 0.0}[wanted]
    excluded = found == 0 and wanted == "positive number"
    if not lowest <= found < float("inf") or excluded or found == -float("inf"):
        raise ValueError(f"{name}: expected a {wanted}, got {found}")
    return found


def integer(name: str, value: object, least: int, most: int = _LARGEST_INT64) -> int:
    """An int of a Python or NumPy integer or a 0-d integer tensor."""
    if isinstance(value, Tensor):
        value = _scalar_of(name, value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an integer, got {_kind(value)}")
    found = operator.index(value)
    if not least <= found <= most:
        raise ValueError(f"{name}: expected {least} to {most}, got {found}")
    return found


def flag(name: str, value: object) -> bool:
    """True or False, of Python, NumPy or a 0-d tensor."""
    if isinstance(value, Tensor):
        value = _scalar_of(name, value)
    if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
        raise TypeError(f"{name}: expected True or False, got {_kind(value)}")
    return bool(value)


def choice(name: str, value: object, known: Sequence[str]) -> Any:
    """One of the known words."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected {_words(known)}, got {_kind(value)}")
    if value not in known:
        raise ValueError(f"{name}: expected {_words(known)}, got {value!r}")
    return value


def _scalar_of(name: str, value: Tensor) -> object:
    # Any dtype is accepted here; the caller checks the Python value.
    tensor(name, value, (value.dtype,))
    if value.ndim != 0 or value.is_meta:
        raise ValueError(f"{name}: expected a single number, got {_kind(value)}")
    if value.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires grad, and it would get none")
    return value.item()


def _kind(value: object) -> str:
    """Describes a value for an error message: its type, and its content if that is short."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
    text = repr(value) if isinstance(value, bool | int | float | complex | str) else ""
    return f"{text[:40]} ({type(value).__name__})" if text else type(value).__name__


def _words(known: Sequence[str]) -> str:
    return ", ".join(f'"{word}"' for word in known[:-1]) + f' or "{known[-1]}"'


def linear_inputs(
    prefix: str,
    hidden: object,
    lm_head_weight: object,
    bias: object,
    logit_scale: object,
    logit_softcap: object,
    *,
    sliced: bool,
) -> LinearInputs:
    """One model's inputs: hidden [*B, D], head [V, D], bias [V], cast as torch.autocast would.

    A head without rows is an error here, unless it is a slice of a sharded head: for slices
    `agreement.agree` raises on all ranks together.
    """
    names = [f"{prefix}{name}" for name in ("hidden", "lm_head_weight", "bias")]
    h, w = tensor(names[0], hidden), tensor(names[1], lm_head_weight)
    b = tensor(names[2], bias) if bias is not None else None
    if h.ndim == 0:
        raise ValueError(f"{names[0]}: expected shape [*B, D], got []")
    if w.ndim != 2 or (w.shape[0] == 0 and not sliced):
        raise ValueError(f"{names[1]}: expected shape [V, D] with V >= 1, got {list(w.shape)}")
    if b is not None:
        _shape(names[2], b, (w.shape[0],), "a number for each row of the head")
    h, w, b = _autocast(h, w, b)
    if h.shape[-1] != w.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]}: expected one last dimension D, got shapes "
            f"{list(h.shape)} and {list(w.shape)}"
        )
    if h.dtype != w.dtype:
        raise TypeError(
            f"{names[0]} and {names[1]}: expected one dtype, got {h.dtype} and {w.dtype}; cast one"
        )
    scale = number(f"{prefix}logit_scale", logit_scale, "positive number")
    cap = f"{prefix}logit_softcap"
    softcap = number(cap, logit_softcap, "positive number") if logit_softcap is not None else None
    return LinearInputs(h, w, b, scale, softcap)


def target(value: object, hidden: Tensor) -> Tensor:
    """Token ids int64 or int32 of the shape of hidden states without their last dimension."""
    found = tensor("target", value, (torch.int64, torch.int32))
    _shape("target", found, tuple(hidden.shape[:-1]), "hidden's without the last")
    return found


def guide_inputs(guide: object, hidden: Tensor, *, sliced: bool) -> tuple[LinearInputs, float]:
    """The guide's inputs, detached, and its temperature."""
    if not isinstance(guide, Guide):
        raise TypeError(f"guide: expected a Guide, got {_kind(guide)}")
    head = linear_inputs(
        "guide.",
        guide.hidden,
        guide.lm_head_weight,
        guide.bias,
        guide.logit_scale,
        guide.logit_softcap,
        sliced=sliced,
    )
    _shape(
        "guide.hidden", head.hidden, (*hidden.shape[:-1], head.weight.shape[1]), "rows of hidden"
    )
    bias = head.bias.detach() if head.bias is not None else None
    head = head._replace(hidden=head.hidden.detach(), weight=head.weight.detach(), bias=bias)
    return head, number("guide.temperature", guide.temperature, "positive number")


def token_weight(value: object, guide: object, target: Tensor) -> Tensor | None:
    """The tensor of weights; None if `value` is "self" or None."""
    if value is None:
        return None
    if guide is not None:
        raise ValueError(
            "token_weight and guide: both set the weights; pass one of them (to multiply "
            "them, compute the guide's confidence with token_confidence)"
        )
    if isinstance(value, str):
        if value != "self":
            raise ValueError(f'token_weight: expected a tensor, "self" or None, got {value!r}')
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f'token_weight: expected a tensor, "self" or None, got {_kind(value)}')
    tensor("token_weight", value)
    _shape("token_weight", value, tuple(target.shape), "target's")
    return value


def weight_transform(value: object) -> WeightTransform | None:
    """The transform with its numbers as floats."""
    if value is None:
        return None
    if not isinstance(value, WeightTransform):
        raise TypeError(f"transform: expected a WeightTransform or None, got {_kind(value)}")
    return WeightTransform(
        number("transform.power", value.power, "number >= 0"),
        number("transform.floor", value.floor, "number >= 0"),
        number("transform.threshold", value.threshold, "number >= 0"),
    )


def vocab_parallel(value: object) -> VocabParallel | None:
    """The group and the first row of this rank's slice."""
    if value is None:
        return None
    if not isinstance(value, VocabParallel):
        raise TypeError(f"vocab_parallel: expected a VocabParallel or None, got {_kind(value)}")
    if not isinstance(value.group, ProcessGroup):
        raise TypeError(f"vocab_parallel.group: expected a ProcessGroup, got {_kind(value.group)}")
    return VocabParallel(value.group, integer("vocab_parallel.start", value.start, 0))


def normalizer(value: object, reduction: str, device: torch.device) -> Tensor | float | None:
    """A number or a one-element tensor, for the reductions that divide."""
    if value is None:
        return None
    if reduction not in ("mean", "weighted_mean"):
        raise ValueError(
            f"normalizer: only divides the reductions mean and weighted_mean, not {reduction}"
        )
    if not isinstance(value, Tensor):
        return number("normalizer", value)
    tensor("normalizer", value, (*_DTYPES, torch.int64, torch.int32))
    if value.numel() != 1 or value.device not in (device, torch.device("cpu")):
        raise ValueError(f"normalizer: expected one number on {device}, got {_kind(value)}")
    return value


def statistics(value: object) -> frozenset[str] | None:
    """Names of the requested statistics; None: no statistics."""
    if value is None:
        return None
    known = get_args(Statistic)
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f'stats: expected names such as ("nll", "top1"), got {_kind(value)}')
    return frozenset(choice("stats", name, known) for name in value)


def options(
    reduction: object, ignore_index: object, chunk_size: object
) -> tuple[Reduction, int, int | None]:
    """The validated `reduction`, `ignore_index` and `chunk_size`."""
    return (
        choice("reduction", reduction, get_args(Reduction)),
        integer("ignore_index", ignore_index, -_LARGEST_INT64 - 1),
        integer("chunk_size", chunk_size, 1) if chunk_size is not None else None,
    )


def one_device(
    head: LinearInputs,
    target: Tensor,
    guide: LinearInputs | None = None,
    token_weight: Tensor | None = None,
) -> None:
    """Raises ValueError naming the tensor that is on another device than most of the others."""
    named: dict[str, Tensor | None] = {
        "hidden": head.hidden,
        "lm_head_weight": head.weight,
        "target": target,
        "bias": head.bias,
        "token_weight": token_weight,
    }
    if guide is not None:
        names = ("guide.hidden", "guide.lm_head_weight", "guide.bias")
        named |= dict(zip(names, guide[:3], strict=True))  # pyright: ignore[reportArgumentType]
    given = {name: value.device for name, value in named.items() if value is not None}
    agreed = (given["lm_head_weight"], given["target"])
    expected = given["hidden"] if given["hidden"] in agreed else agreed[0]
    for name, device in given.items():
        if device != expected:
            raise ValueError(f"{name}: expected device {expected}, got {device}")


def _shape(name: str, value: Tensor, shape: tuple[int, ...], like: str) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {list(shape)} ({like}), got {list(value.shape)}")


def _autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts as `torch.nn.functional.linear` would under torch.autocast; else returns the inputs."""
    device = hidden.device.type
    enabled = _knows_autocast(device) and torch.is_autocast_enabled(device)
    if not enabled or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype) if bias is not None else None


def merge_arguments(
    weight: object,
    lora_a: object,
    lora_b: object,
    scale: object,
    fan_in_fan_out: object,
    stochastic_rounding_seed: object,
    impl: object,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[float], bool, int | None, str]:
    """The operator's arguments: W, lists of A, B and scales, flags; tensors detached."""
    w = tensor("weight", weight)
    if w.ndim not in (2, 3):
        raise ValueError(f"weight: expected shape [M, K] or [E, M, K], got {list(w.shape)}")
    a, b = _tensors("lora_a", lora_a), _tensors("lora_b", lora_b)
    one_scale = not isinstance(scale, list | tuple)
    scales = [number("scale", s) for s in ([scale] * len(a) if one_scale else scale)]  # pyright: ignore
    for name, count in (("lora_b", len(b)), ("scale", len(scales))):
        if count != len(a):
            raise ValueError(f"{name}: expected {len(a)} values, as many as lora_a, got {count}")
    transposed = flag("fan_in_fan_out", fan_in_fan_out)
    rows, columns = (w.shape[-1], w.shape[-2]) if transposed else (w.shape[-2], w.shape[-1])
    for number_of, (a_i, b_i) in enumerate(zip(a, b, strict=True)):
        which = f"[{number_of}]" * (len(a) > 1)
        _factor(f"lora_a{which}", a_i, w, "R", columns, transposed)
        _factor(f"lora_b{which}", b_i, w, rows, a_i.shape[-2], transposed)
    seed = None
    if stochastic_rounding_seed is not None:
        seed = integer("stochastic_rounding_seed", stochastic_rounding_seed, 0)
        if w.dtype != torch.bfloat16:
            raise ValueError(
                f"stochastic_rounding_seed: the weight is {w.dtype}; only bfloat16 can be rounded "
                "stochastically: leave the seed out"
            )
    # The operator is not differentiable: a graph that passes through it would be wrong.
    detached = ([t.detach() for t in a], [t.detach() for t in b])
    return w.detach(), *detached, scales, transposed, seed, choice("impl", impl, get_args(Impl))


def no_shared_memory(weight: Tensor) -> None:
    """Raises ValueError if elements of a weight that will be overwritten share memory."""
    steps = sorted((t, n) for t, n in zip(weight.stride(), weight.shape, strict=True) if n > 1)
    reach, nested = 0, weight.numel() > 0
    for stride, size in steps:
        nested = nested and stride > reach
        reach += stride * (size - 1)
    if nested or weight.numel() == 0:
        return
    # Rare: interleaved dimensions may not overlap.
    offsets = torch.zeros((), dtype=torch.int64)
    for stride, size in steps:
        offsets = offsets.unsqueeze(-1) + stride * torch.arange(size)
    if offsets.unique().numel() < offsets.numel():
        raise ValueError("weight: its entries share memory: pass a .clone() of it")


def _tensors(name: str, value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name}: expected a tensor or a list of tensors, got {_kind(value)}")
    if not value:
        raise ValueError(f"{name}: got an empty list, expected at least one adapter")
    return list(value)


def _factor(
    name: str, value: object, weight: Tensor, rows: int | str, columns: int, transposed: bool
) -> None:
    factor = tensor(name, value)
    if factor.device != weight.device:
        raise ValueError(f"{name} and weight: got {factor.device} and {weight.device}: move one")
    found, experts = factor.shape, weight.shape[:-2]
    fits = len(found) == weight.ndim and found[:-2] == experts and found[-1] == columns
    if not fits or rows not in ("R", found[-2]):
        expected = ", ".join(map(str, (*experts, rows, columns)))
        hint = " (one pair of factors for each expert)" if weight.ndim == 3 else ""
        raise ValueError(
            f"{name} and weight: expected shape [{expected}]{hint} for "
            f"{list(weight.shape)} with fan_in_fan_out={transposed}, got {list(found)}"
        )


def target_values(target: Tensor, vocab_size: int, ignore_index: int, head: str) -> None:
    """Raises ValueError on the first value [N] that is neither a row of `head` nor ignore_index."""
    wrong = (target != ignore_index) & ((target < 0) | (target >= vocab_size))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"target: value {int(target[row])} at row {row} is outside [0, {vocab_size}), the rows "
            f"of {head}, and is not ignore_index ({ignore_index})"
        )


def reads_targets(target: Tensor) -> bool:
    """Whether target values are checked: on CPU, or anywhere if GIFT_KERNELS_CHECK_TARGETS is 1.

    On other devices reading the values would synchronize; there a row with an invalid target
    becomes NaN.
    """
    return target.device.type == "cpu" or os.environ.get(CHECK_TARGETS_VARIABLE) == "1"


@constant_under_compile
def _knows_autocast(device: str) -> bool:
    """Whether a device supports autocast; meta does not. Dynamo before torch 2.13 cannot ask."""
    return torch.amp.is_autocast_available(device)
