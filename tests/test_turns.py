"""Interleaved timing of providers: their order, their inputs, and the resulting times."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from benchmarks import turns
from benchmarks.cases import CECase
from benchmarks.measure import time_columns
from benchmarks.providers import own_providers
from benchmarks.turns import Call, Contender, Settings

CPU = Settings(torch.device("cpu"), seconds=0.0, rounds=(1, 1))


def test_times_are_medians_with_percentiles_between_samples() -> None:
    assert turns.percentile([1.0, 2.0, 4.0], 0.25) == 1.5
    assert turns.percentile([1.0, 2.0, 4.0], 1.0) == 4.0
    found = time_columns(CECase("toy", 40), [0.005, 0.001, 0.002, 0.003, 0.104, 0.004])
    assert found["samples"] == 6
    wanted = {"time_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0}
    assert {name: pytest.approx(found[name]) for name in wanted} == wanted


def test_turns_rotate_and_reverse() -> None:
    orders = ["".join(turns.turn_order("abc", number)) for number in range(6)]
    assert orders == ["abc", "cba", "bca", "acb", "cab", "bac"]
    assert turns.turn_order([], 3) == []


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_no_turn_finds_the_inputs_of_the_one_before(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    contenders = recorded([f"provider {number}" for number in range(count)], seen, sets=2)
    monkeypatch.setattr(turns, "SLOW", math.inf)  # times of nothing are noise
    turns.take_turns(contenders, replace(CPU, rounds=(8, 8)))
    assert len(seen) == 8 * count
    assert all(one[1] != other[1] for one, other in pairwise(seen))
    assert len(set(seen)) == 2 * count  # nobody is left with one set


def recorded(names: list[str], seen: list[tuple[str, int]], sets: int) -> list[Contender]:
    def nothing() -> None:
        return None

    def call(name: str, number: int) -> Call:
        return Call(nothing, lambda _: seen.append((name, number)), nothing)

    own = own_providers()[0]
    return [
        Contender(replace(own, name=name), [call(name, number) for number in range(sets)])
        for name in names
    ]


def test_slow_ones_sit_out_three_rounds_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    contenders = recorded(["slow", "a", "b"], [], sets=1)
    seconds = {id(one.calls[0]): 5.0 if one.provider.name == "slow" else 1.0 for one in contenders}
    monkeypatch.setattr(turns, "once", lambda call, device: seconds[id(call)])
    turns.take_turns(contenders, replace(CPU, rounds=(12, 12)))
    # Its rounds: 0, 4 and 8.
    assert [len(one.samples) for one in contenders] == [3, 12, 12]


def test_what_cannot_be_imported_is_not_installed() -> None:
    assert turns.failure(ModuleNotFoundError("no cutlass")) == "not installed: no cutlass"
    assert turns.failure(ValueError("a|b")) == "failed: ValueError: a/b"
    assert turns.failure(torch.OutOfMemoryError()) == "failed: out of memory"
