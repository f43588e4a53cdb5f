"""Every argument of the public kernels with values of every wrong kind: the right result, or an
error that begins with the argument's name."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

from gift_kernels import (
    Guide,
    VocabParallel,
    WeightTransform,
    lora_merge,
    lora_merge_,
    token_confidence,
    weighted_ce,
)

N, D, V, R = 5, 6, 9, 2


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def of_loss() -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    return {
        "hidden": random(N, D),
        "lm_head_weight": random(V, D),
        "target": torch.tensor([3, 0, 8, -1, 1]),
        "token_weight": random(N),
        "guide": None,
        "transform": WeightTransform(0.5, 0.1, 0.2),
        "vocab_parallel": VocabParallel(group, 0),
        "bias": random(V),
        "logit_scale": 2.0,
        "logit_softcap": 4.0,
        "reduction": "mean",
        "normalizer": 3.0,
        "ignore_index": -1,
        "stats": None,
        "impl": "eager",
        "chunk_size": 2,
    }


def with_guide() -> dict[str, Any]:
    guide = Guide(random(N, 4), random(V, 4), random(V), 2.0, 3.0, 1.5)
    return of_loss() | {"guide": guide, "token_weight": None}


def of_confidence() -> dict[str, Any]:
    names = inspect.signature(token_confidence).parameters
    return {name: v for name, v in of_loss().items() if name in names} | {"temperature": 1.5}


def of_merge() -> dict[str, Any]:
    return {
        "weight": random(4, 4).bfloat16(),
        "lora_a": random(R, 4),
        "lora_b": random(4, R),
        "scale": 0.5,
        "fan_in_fan_out": False,
        "stochastic_rounding_seed": 3,
        "impl": "eager",
    }


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "weighted_ce": (weighted_ce, of_loss),
    "weighted_ce with a guide": (weighted_ce, with_guide),
    "token_confidence": (token_confidence, of_confidence),
    "lora_merge": (lora_merge, of_merge),
    "lora_merge_": (lora_merge_, of_merge),
}
# Fields of a dataclass are arguments too: "guide.hidden".
PLACES = [
    *((call, name) for call, (op, _) in CALLS.items() for name in inspect.signature(op).parameters),
    *(("weighted_ce with a guide", f"guide.{field.name}") for field in fields(Guide)),
    *(("weighted_ce", f"transform.{field.name}") for field in fields(WeightTransform)),
    *(("weighted_ce", f"vocab_parallel.{field.name}") for field in fields(VocabParallel)),
]


def dtensor(value: Tensor) -> DTensor:
    mesh = init_device_mesh("cpu", (1,))
    return DTensor.from_local(value.clone(), mesh, [Replicate()], run_check=False)


def odd_values(proper: Any) -> dict[str, Any]:
    """A value of every kind; those made of the proper one where it is a tensor."""
    number = 1 if isinstance(proper, Tensor | str) or proper is None else proper
    number = number if isinstance(number, int | float) else 1
    tensor = proper if isinstance(proper, Tensor) else torch.tensor(float(number))
    return {
        "None": None,
        "list": [[0.5]],
        "empty list": [],
        "ndarray": np.ones(3, np.float32),
        "NumPy scalar": np.asarray(number)[()],
        "0-d tensor": torch.tensor(number),
        "bool": True,
        "string": "0.5",
        "complex": 1 + 2j,
        "NaN": float("nan"),
        "negative": -1,
        "dtype": tensor.to(torch.complex64),
        "shape": tensor.unsqueeze(-1),
        "device": tensor.to("meta"),
        "DTensor": dtensor(tensor),
        "sparse": tensor.reshape(-1).to_sparse(),
        "object": object(),
    }


def put(arguments: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    if "." not in name:
        return arguments | {name: value}
    outer, inner = name.split(".")
    return arguments | {outer: replace(arguments[outer], **{inner: value})}


def get(arguments: dict[str, Any], name: str) -> Any:
    outer, *inner = name.split(".")
    return getattr(arguments[outer], inner[0]) if inner else arguments[outer]


def plain(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(("call", "name"), PLACES, ids=lambda value: value.replace(" ", "-"))
def test_every_argument_works_as_documented_or_is_named(call: str, name: str) -> None:
    op, make = CALLS[call]
    proper = get(make(), name)
    expected = plain(op(**make()))
    for kind, value in odd_values(proper).items():
        try:
            result = plain(op(**put(make(), name, value)))
        except (TypeError, ValueError) as error:
            # What does not fit with another argument names both.
            names = str(error).split(":")[0].split(" and ")
            assert any(found.split("[")[0] == name for found in names), f"{kind}: {error}"
        else:
            assert type(result) is Tensor, kind
            same_number = kind in ("NumPy scalar", "0-d tensor") and isinstance(proper, int | float)
            if same_number and not isinstance(proper, bool):
                torch.testing.assert_close(result, expected, rtol=0, atol=0)
            assert kind not in ("ndarray", "DTensor", "device", "object", "complex", "sparse"), kind


@pytest.mark.parametrize("transform", ["jvp", "grad", "vjp", "jacrev", "vmap", "forward mode"])
def test_transforms_of_functions_are_refused_by_name(transform: str) -> None:
    given = of_loss() | {"vocab_parallel": None}
    hidden = given.pop("hidden")
    ways: dict[str, Callable[[Any], Any]] = {
        "jvp": lambda f: torch.func.jvp(f, (hidden,), (hidden,)),
        "grad": lambda f: torch.func.grad(f)(hidden),
        "vjp": lambda f: torch.func.vjp(f, hidden),
        "jacrev": lambda f: torch.func.jacrev(f)(hidden),
        "vmap": lambda f: torch.func.vmap(f)(hidden[None]),
        "forward mode": lambda f: f(torch.autograd.forward_ad.make_dual(hidden, hidden)),
    }
    forward = transform == "forward mode"
    with (
        torch.autograd.forward_ad.dual_level() if forward else contextlib.nullcontext(),
        pytest.raises(TypeError, match="hidden: torch.func .* not supported"),
    ):
        ways[transform](lambda value: weighted_ce(value, **given))


def test_a_transform_of_no_given_weights_has_the_documented_meaning() -> None:
    given = of_loss() | {"token_weight": None, "vocab_parallel": None}
    for transform, factor in ((WeightTransform(floor=3.0), 3), (WeightTransform(threshold=2.0), 0)):
        loss = weighted_ce(**given | {"transform": transform})
        expected = factor * weighted_ce(**given | {"transform": None})
        torch.testing.assert_close(loss, expected)


TRANSFORMS = [
    WeightTransform(),
    WeightTransform(power=0.5),
    WeightTransform(power=0.0),
    WeightTransform(power=0.3, floor=0.2),
    WeightTransform(power=0.5, threshold=0.25),
    WeightTransform(power=2.0, floor=0.1, threshold=0.25),
]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_weights_of_rows_that_do_not_count_get_no_gradient(
    transform: WeightTransform, reduction: Any
) -> None:
    weight = torch.tensor([0.0, -0.5, 0.19, 0.9, float("nan")], requires_grad=True)
    target = torch.tensor([3, 0, 8, 1, -100])
    loss = weighted_ce(
        random(5, D), random(V, D), target, weight, transform=transform, reduction=reduction
    )
    loss.sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all(), weight.grad
    assert not weight.grad[[0, 1, 4]].any(), weight.grad
    counts = transform.floor < 0.19 and transform.threshold <= 0.19 and transform.power > 0
    assert bool(weight.grad[2] > 0) == counts
    assert bool(weight.grad[3] > 0) == (transform.power > 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_guide_may_have_another_dtype(dtype: torch.dtype) -> None:
    given = with_guide() | {"vocab_parallel": None}

    def in_dtype(guide: Guide, dtype: torch.dtype) -> Guide:
        tensors = ("hidden", "lm_head_weight", "bias")
        return replace(guide, **{name: getattr(guide, name).to(dtype) for name in tensors})

    other = in_dtype(given["guide"], dtype)
    loss = weighted_ce(**given | {"guide": other, "impl": "auto"})
    expected = weighted_ce(**given | {"guide": in_dtype(other, torch.float32)})
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert not torch.isclose(loss, weighted_ce(**given | {"guide": None}), rtol=1e-2)
    if dtype == torch.float64:
        with pytest.raises(ValueError, match=r"impl: .*float64, and guide.hidden is"):
            weighted_ce(**given | {"guide": other, "impl": "triton"})


def test_a_head_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lm_head_weight: expected shape \[V, D\] with V >= 1"):
        token_confidence(random(N, D), random(0, D), torch.zeros(N, dtype=torch.long))


@pytest.mark.parametrize("strides", [(1, 1), (0, 1), (2, 1), (3, 2)], ids=str)
def test_a_weight_whose_entries_share_memory_is_not_overwritten(strides: tuple[int, int]) -> None:
    weight = torch.zeros(30).as_strided((4, 4), strides)
    with pytest.raises(ValueError, match="weight: its entries share memory"):
        lora_merge_(weight, random(R, 4), random(4, R), 1.0)


def test_interleaved_entries_that_share_no_memory_are_merged() -> None:
    weight = torch.zeros(20).as_strided((2, 3), (3, 2))  # 0 2 4, 3 5 7
    a, b = random(R, 3), random(2, R)
    torch.testing.assert_close(lora_merge_(weight, a, b, 1.0), b @ a)
