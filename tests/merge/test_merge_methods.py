"""Every merge method against a dense computation written from its paper, and against PEFT's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from merge_models import (
    factors,
    llama,
    merge_two,
    run_merge,
    save_adapter,
    save_model,
    save_three,
    tensors,
)
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from torch import Tensor

from gift.config import MergeOptions, StatisticsConfig
from gift.data.batches import make_batch
from gift.data.encoding import encode, read_rows
from gift.errors import InputError
from gift.merge.method import Rows
from gift.merge.methods import METHODS, dare, fisher, lore_adapt, regmean, ties
from gift.merge.statistics import merge_statistics
from gift.models.loading import load_causal_lm
from gift.models.tokenizer import load_tokenizer
from gift.storage.publish import LIST_FILE

FLOAT64 = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def top_share(vector: Tensor, share: float) -> Tensor:
    """The vector with all but its ⌊share · n⌋ largest magnitudes set to 0."""
    kept = vector.abs().flatten().sort(descending=True).indices[: int(share * vector.numel())]
    mask = torch.zeros(vector.numel(), dtype=torch.bool)
    mask[kept] = True
    return torch.where(mask.view(vector.shape), vector, 0)


def elect(vectors: list[Tensor]) -> Tensor:
    """TIES' election and disjoint mean, element by element as the paper writes it."""
    result = torch.zeros(vectors[0].numel(), dtype=FLOAT64)
    for place, entries in enumerate(zip(*(v.flatten().tolist() for v in vectors), strict=True)):
        positive = sum(entry for entry in entries if entry > 0)
        negative = -sum(entry for entry in entries if entry < 0)
        sign = 1 if positive > negative else -1
        agreeing = [entry for entry in entries if entry * sign > 0]
        result[place] = sum(agreeing) / len(agreeing) if agreeing else 0
    return result.view(vectors[0].shape)


@pytest.mark.parametrize("share", [0.2, 0.013, 0.5, 1.0])
def test_threshold_is_the_kth_largest_magnitude_over_all_blocks(share: float) -> None:
    values = (draw(1000) * torch.logspace(-6, 3, 1000, dtype=FLOAT64)).float()
    values[:100] = 0
    expected = values.abs().sort(descending=True).values[int(share * 1000) - 1]
    blocks = [part.view(5, -1) for part in values.split(200)]
    assert ties.magnitude_threshold(blocks, share) == expected.item()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_ties_is_the_papers_and_pefts(count: int) -> None:
    origin, vectors = draw(9, 14), [draw(9, 14, seed=seed + 1) for seed in range(count)]
    limits = [ties.magnitude_threshold([vector], 0.3) for vector in vectors]
    rows = Rows(origin, None, vectors, known=limits)
    found = ties.merge(rows, MergeOptions(task_weight=0.7))
    trimmed = [top_share(vector, 0.3) for vector in vectors]
    torch.testing.assert_close(found, origin + 0.7 * elect(trimmed))
    theirs = merge_utils.ties(vectors, torch.full((count,), 0.7, dtype=FLOAT64), 0.3)
    torch.testing.assert_close(found, origin + theirs)


def test_task_arithmetic_is_pefts() -> None:
    origin, vectors = draw(6, 5), [draw(6, 5, seed=seed) for seed in (1, 2, 3)]
    theirs = merge_utils.task_arithmetic(vectors, torch.full((3,), 0.4, dtype=FLOAT64))
    rows = Rows(origin, None, vectors)
    found = METHODS["task-arithmetic"].merge(rows, MergeOptions(task_weight=0.4))
    torch.testing.assert_close(found, origin + theirs)


def test_dare_keeps_the_mean_drops_its_share_and_depends_on_seed_and_key_only() -> None:
    vector = draw(400, 500)
    found = dare.drop(vector, 0.9, 3, "a tensor")
    kept = found != 0
    assert abs(kept.double().mean() - 0.1) < 0.003
    torch.testing.assert_close(found[kept], vector[kept] / 0.1)
    assert torch.equal(found, dare.drop(vector, 0.9, 3, "a tensor"))
    for seed, key in ((4, "a tensor"), (3, "another")):
        assert not torch.equal(found, dare.drop(vector, 0.9, seed, key))
    assert torch.equal(dare.drop(vector, 0.0, 3, "x"), vector)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20)])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_low_rank_part_is_the_truncated_svd(shape: tuple[int, int], share: float) -> None:
    matrix = draw(*shape) @ torch.diag(torch.logspace(0, -2, shape[1], dtype=FLOAT64))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    energy = (s**2).cumsum(0) / (s**2).sum()
    rank = int((energy < share - 1e-12).sum()) + 1
    part = lore_adapt.low_rank_part(matrix, share)
    assert part.left.shape[1] == part.right.shape[0] == rank
    expected = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    torch.testing.assert_close(part.left @ part.right, expected, rtol=1e-7, atol=1e-9)


def test_low_rank_part_of_nothing_is_nothing() -> None:
    part = lore_adapt.low_rank_part(torch.zeros(4, 6), 0.5)
    assert torch.equal(part.left @ part.right, torch.zeros(4, 6))


def fisher_mean(models: list[Tensor], fishers: list[Tensor]) -> Tensor:
    tasks = [model - models[0] for model in models[1:]]
    return fisher.merge(Rows(models[0], None, tasks, fishers), MergeOptions())


def regmean_solution(models: list[Tensor], system: regmean.System) -> Tensor:
    tasks = [model - models[0] for model in models[1:]]
    return regmean.merge(Rows(models[0], None, tasks, known=system), MergeOptions())


def test_fisher_is_the_weighted_mean_also_for_tiny_fisher_values() -> None:
    models = [draw(4, 7, seed=seed) for seed in (1, 2, 3)]
    fishers = [draw(4, 7, seed=seed).square() for seed in (4, 5, 6)]
    for tensor in fishers:
        tensor[0, 0] = 0
    weights = torch.stack(fishers)
    expected = (weights * torch.stack(models)).sum(0) / weights.sum(0)
    expected[0, 0] = (models[0][0, 0] + models[1][0, 0] + models[2][0, 0]) / 3
    torch.testing.assert_close(fisher_mean(models, fishers), expected)
    tiny_values = [(values * 1e-30).float() for values in fishers]
    found = fisher_mean([model.float() for model in models], tiny_values)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_regmean_with_full_grams_solves_the_joint_least_squares_problem() -> None:
    """min over W of Σ_i ‖X_i W − X_i W_i‖², solved directly by least squares."""
    inputs = [draw(40, 6, seed=seed) for seed in (1, 2)]
    models = [draw(5, 6, seed=seed) for seed in (3, 4)]
    target = torch.cat([x @ w.T for x, w in zip(inputs, models, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(inputs), target).solution.T
    system = regmean.make_system([x.T @ x for x in inputs], 1.0)
    found = regmean_solution(models, system)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_regmean_scales_the_off_diagonal_and_averages_dead_inputs() -> None:
    grams = [(x := draw(40, 6, seed=seed)).T @ x for seed in (1, 2)]
    for gram in grams:
        gram[2] = gram[:, 2] = 0
    models = [draw(5, 6, seed=seed) for seed in (3, 4)]
    found = regmean_solution(models, regmean.make_system(grams, 0.9))
    scaled = [0.9 * gram + 0.1 * torch.diag(gram.diagonal()) for gram in grams]
    alive = [0, 1, 3, 4, 5]
    total = (scaled[0] + scaled[1])[alive][:, alive]
    right = sum(g[alive][:, alive] @ m[:, alive].T for g, m in zip(scaled, models, strict=True))
    expected = torch.linalg.solve(total, right).T  # pyright: ignore
    torch.testing.assert_close(found[:, alive], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[:, 2], (models[0][:, 2] + models[1][:, 2]) / 2)


def adapter_delta(folder: Path, name: str, like: Tensor) -> Tensor:
    if not name.endswith(("q_proj.weight", "down_proj.weight")):
        return torch.zeros_like(like)
    a, b = factors(folder, name.removesuffix(".weight"))
    return 1.5 * (b @ a)


def low_rank(part: Tensor) -> Tensor:
    """The part of lowest rank that holds half of the squared singular values."""
    if part.ndim != 2:
        return part
    u, s, v = torch.linalg.svd(part, full_matrices=False)
    rank = int(((s**2).cumsum(0) < 0.5 * (s**2).sum()).sum()) + 1
    return u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]


# Every method's equation with SETTINGS, on a whole tensor: instruct model, base model, origin,
# the adapters' task vectors, all task vectors.
DENSE: dict[str, Callable[[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]], Any]] = {
    "lora": lambda i, b, origin, tasks, vectors: i + sum(tasks),
    "task-arithmetic": lambda i, b, origin, tasks, vectors: origin + 0.8 * sum(vectors),
    "re-adapt": lambda i, b, origin, tasks, vectors: b + 0.8 * sum(tasks) + 0.6 * (i - b),
    "lore-adapt": lambda i, b, origin, tasks, vectors: b + 0.8 * sum(tasks) + 0.6 * low_rank(i - b),
    "ties": lambda i, b, origin, tasks, vectors: (
        origin + 0.8 * elect([top_share(vector, 0.3) for vector in vectors])
    ),
}
# Random, or of statistics: tests of their own.
NOT_DENSE = {"dare", "dare-ties", "fisher", "regmean"}


def test_every_method_is_tested_here() -> None:
    assert DENSE.keys() | NOT_DENSE == METHODS.keys()


@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize("has_base", [False, True], ids=["", "base"])
def test_a_merged_model_is_the_dense_computation(
    method: str, has_base: bool, tmp_path: Path
) -> None:
    save_three(tmp_path)
    if METHODS[method].needs_base and not has_base:
        with pytest.raises(InputError, match="needs the base model"):
            merge_two(tmp_path, method, has_base)
        return
    merge_two(tmp_path, method, has_base)
    base, instruct, found = (tensors(tmp_path / name) for name in ("base", "model", "merged"))
    for name, tensor in instruct.items():
        tasks = [
            coefficient * adapter_delta(tmp_path / f"adapter{number}", name, tensor)
            for number, coefficient in ((1, 1.0), (2, 0.5))
        ]
        origin = base[name] if has_base else tensor
        vectors = [tensor - base[name], *tasks] if has_base else tasks
        expected = DENSE[method](tensor, base[name], origin, tasks, vectors)
        torch.testing.assert_close(found[name], expected, rtol=1e-7, atol=1e-9, msg=name)


def test_re_adapt_with_its_default_weights_is_the_plain_merge_and_keeps_untouched_bits(
    tmp_path: Path,
) -> None:
    save_three(tmp_path)
    options: dict[str, Any] = {"adapter": [str(tmp_path / "adapter1")]}
    base = str(tmp_path / "base")
    plain = tensors(run_merge(tmp_path, **options))
    found = tensors(
        run_merge(tmp_path, method="re-adapt", base=base, output=tmp_path / "re", **options)
    )
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("method", ["dare", "dare-ties"])
def test_dare_adds_rescaled_random_entries_and_repeats_itself(method: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", llama(hidden_size=64), dtype=FLOAT64)
    save_adapter(tmp_path / "adapter", tmp_path / "model", target_modules=["q_proj"])
    instruct = tensors(tmp_path / "model")
    once = tensors(run_merge(tmp_path, method=method, drop_rate=0.75))
    again = tensors(run_merge(tmp_path, method=method, drop_rate=0.75, output=tmp_path / "again"))
    other = tensors(run_merge(tmp_path, method=method, dare_seed=1, output=tmp_path / "other"))
    name = "model.layers.1.self_attn.q_proj.weight"
    delta = adapter_delta(tmp_path / "adapter", name, instruct[name])
    change = once[name] - instruct[name]
    kept = change.abs() > 1e-12
    assert 0.2 < kept.double().mean() < 0.3
    torch.testing.assert_close(change[kept], delta[kept] / 0.25, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(again[key], tensor) for key, tensor in once.items())
    assert not torch.equal(other[name], once[name])
    first = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal((once[first] - instruct[first]).abs() > 1e-12, kept)


def test_ties_with_one_vector_says_that_it_is_trimming_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_three(tmp_path)
    options: dict[str, Any] = {"method": "ties", "adapter": [str(tmp_path / "adapter1")]}
    merged = run_merge(tmp_path, **options)
    assert "magnitude trimming only" in capsys.readouterr().out
    assert "magnitude trimming only" in (merged / "README.md").read_text()
    run_merge(tmp_path, base=str(tmp_path / "base"), overwrite=True, **options)
    assert "magnitude trimming only" not in capsys.readouterr().out


@pytest.fixture
def task_models(tmp_path: Path) -> Path:
    """Base, instruct model, adapter and the task model base + adapter, with data, in float32."""
    for name, seed in (("base", 0), ("model", 1)):
        tiny.make_model(tmp_path / name, "qwen2", seed)
    save_adapter(tmp_path / "adapter", tmp_path / "base", target_modules=["q_proj", "down_proj"])
    run_merge(tmp_path, model=str(tmp_path / "base"), output=tmp_path / "task")
    tiny.write_rows(tmp_path / "rows.jsonl", 6)
    return tmp_path


def collect(folder: Path, model: str, kind: str) -> str:
    output = folder / f"{kind}-{model}"
    merge_statistics(
        StatisticsConfig.model_validate(
            {
                "model": str(folder / model),
                "data": folder / "rows.jsonl",
                "tokenizer": str(folder / "model"),
                "kind": kind,
                "output": output,
            }
        )
    )
    return str(output)


def statistics_of(folder: Path, model: str, kind: str) -> dict[str, Tensor]:
    return load_file(folder / f"{kind}-{model}" / "statistics.safetensors")


def merge_with_statistics(
    folder: Path, method: str
) -> tuple[Path, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """The merged folder; tensors and statistics of the instruct and the task model."""
    names = ("model", "task")
    collected = [collect(folder, name, method) for name in names]
    merged = run_merge(folder, method=method, base=str(folder / "base"), statistics=collected)
    statistics = [statistics_of(folder, name, method) for name in names]
    return merged, [tensors(folder / name) for name in names], statistics


def test_fisher_merge_weighs_the_models_by_their_squared_gradients(task_models: Path) -> None:
    merged, models, fishers = merge_with_statistics(task_models, "fisher")
    found = tensors(merged)
    for name in models[0]:
        weights = [fisher[name].double() for fisher in fishers]
        numerator = sum(w * m[name].double() for w, m in zip(weights, models, strict=True))
        total: Any = sum(weights)
        mean = (models[0][name].double() + models[1][name].double()) / 2
        expected = torch.where(total > 0, numerator / total.clamp(min=1e-300), mean)
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-5, msg=name)


def test_fisher_diagonals_are_the_mean_squared_gradients_of_the_rows(task_models: Path) -> None:
    collect(task_models, "model", "fisher")
    found = statistics_of(task_models, "model", "fisher")
    model = load_causal_lm(task_models / "model", torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(task_models / "model")
    rows = encode(read_rows(task_models / "rows.jsonl"), tokenizer, max_length=512).kept
    name = "model.layers.0.mlp.up_proj.weight"
    parameter = model.get_parameter(name)
    expected = torch.zeros_like(parameter)
    for row in rows:
        labels = torch.where(torch.from_numpy(row.is_target), torch.from_numpy(row.input_ids), -100)
        ids = torch.from_numpy(row.input_ids).long()[None]
        loss = model(input_ids=ids, labels=labels.long()[None]).loss * row.targets
        (gradient,) = torch.autograd.grad(loss, parameter)
        expected += gradient.square() / len(rows)
    torch.testing.assert_close(found[name], expected.detach(), rtol=1e-3, atol=1e-8)
    assert found.keys() == tensors(task_models / "model").keys()


def test_regmean_merge_solves_each_linear_layer_and_averages_the_rest(task_models: Path) -> None:
    merged, models, grams = merge_with_statistics(task_models, "regmean")
    found = tensors(merged)
    for name in models[0]:
        pair = [model[name].double() for model in models]
        if name in grams[0]:
            both = [gram[name].double() for gram in grams]
            expected = regmean_solution(pair, regmean.make_system(both, 0.9))
        else:
            expected = (pair[0] + pair[1]) / 2
        torch.testing.assert_close(found[name].double(), expected, rtol=2e-3, atol=2e-4, msg=name)
    notes = json.loads((merged / "gift_merge.json").read_text())["notes"]
    averaged = len(models[0]) - len(grams[0].keys() & models[0].keys())
    assert f"{averaged} tensors without a Gram matrix are averaged" in notes


def test_gram_matrices_are_those_of_the_layers_inputs(task_models: Path) -> None:
    collect(task_models, "model", "regmean")
    found = statistics_of(task_models, "model", "regmean")
    model = load_causal_lm(task_models / "model", torch.float32, torch.device("cpu"))
    tokenizer = load_tokenizer(task_models / "model")
    rows = encode(read_rows(task_models / "rows.jsonl"), tokenizer, max_length=512).kept
    expected = torch.zeros(32, 32)
    for row in rows:
        body = model.model(**make_batch([row], packed=False).inputs)
        hidden = body.last_hidden_state[0].detach()
        expected += hidden.T @ hidden
    torch.testing.assert_close(found["lm_head.weight"], expected, rtol=1e-4, atol=1e-3)


def test_statistics_of_another_kind_or_another_model_are_refused(task_models: Path) -> None:
    wrong = [collect(task_models, name, "regmean") for name in ("model", "task")]
    options: dict[str, Any] = {"method": "fisher", "base": str(task_models / "base")}
    with pytest.raises(InputError, match="needs 'gift fisher statistics'"):
        run_merge(task_models, statistics=wrong, **options)
    right = [collect(task_models, name, "fisher") for name in ("model", "task")]
    path = Path(right[1]) / "statistics.safetensors"
    stored = load_file(path)
    stored.pop("model.norm.weight")
    save_file(stored, path)
    (path.parent / LIST_FILE).unlink()  # the change is meant
    with pytest.raises(InputError, match=r"no fitting Fisher diagonal for model.norm.weight"):
        run_merge(task_models, statistics=right, **options)
