"""Deliberately broken implementations: a check that lets one of them pass proves nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest

from gift_kernels.linear_ce.types import LinearCE, Problem

# `gift_kernels.weighted_ce` is a function, so modules are found by their names.
operator: Any = importlib.import_module("gift_kernels.linear_ce.op")


class _Mutant:
    """Answers as `backend` would a changed problem, and changes the answer."""

    def __init__(
        self,
        backend: Any,
        change_problem: Callable[[Problem], Problem],
        change_result: Callable[[LinearCE], LinearCE],
        head_gradient: float,
    ) -> None:
        self._backend = backend
        self._change_problem = change_problem
        self._change_result = change_result
        self._head_gradient = head_gradient

    def solve(self, problem: Problem) -> LinearCE:
        return self._change_result(self._backend.solve(self._change_problem(problem)))

    def solve_head_gradient(self, *arguments: Any, **options: Any) -> Any:
        gradients = self._backend.solve_head_gradient(*arguments, **options)
        return tuple(self._head_gradient * gradient for gradient in gradients)

    def solve_deferred(self, *arguments: Any, **options: Any) -> Any:
        gradients = self._backend.solve_deferred(*arguments, **options)
        return tuple(g if g is None else self._head_gradient * g for g in gradients)


def _same(value: Any) -> Any:
    return value


def _without_weights(problem: Problem) -> Problem:
    return problem._replace(row_weight=None, guide=None, self_weight=False)


def _without_second_row(problem: Problem) -> Problem:
    target = problem.target.clone()
    target[1] = problem.ignore_index
    return problem._replace(target=target)


def _multiplied(factor: float, *names: str) -> Callable[[LinearCE], LinearCE]:
    def change(result: LinearCE) -> LinearCE:
        made = {name: getattr(result, name) for name in names}
        return result._replace(**{n: factor * v for n, v in made.items() if v is not None})

    return change


def _sixteen_bit_confidence(result: LinearCE) -> LinearCE:
    return result._replace(weight=result.weight.bfloat16().to(result.weight.dtype))


_Changes = tuple[Callable[[Problem], Problem], Callable[[LinearCE], LinearCE], float]
MUTATIONS: dict[str, _Changes] = {
    "weights-ignored": (_without_weights, _same, 1.0),
    "row-skipped": (_without_second_row, _same, 1.0),
    "hidden-gradient-zeroed": (_same, _multiplied(0, "dh"), 1.0),
    "head-gradient-zeroed": (_same, _multiplied(0, "dw", "db"), 0.0),
    "head-gradient-doubled": (_same, _multiplied(2, "dw", "db"), 2.0),
}
CONFIDENCE_MUTATIONS: dict[str, _Changes] = {
    "row-skipped": (_without_second_row, _same, 1.0),
    "temperature-ignored": (lambda p: p._replace(temperature=1.0), _same, 1.0),
    "confidence-rounded": (_same, _sixteen_bit_confidence, 1.0),
}


def install(monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    """Breaks every implementation until the end of the test."""
    changes = (MUTATIONS | CONFIDENCE_MUTATIONS)[mutation]
    choose = operator._backend
    monkeypatch.setattr(operator, "_backend", lambda impl: _Mutant(choose(impl), *changes))
