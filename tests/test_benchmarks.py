"""The benchmarks at toy sizes: every provider that runs here is right, and results are whole."""

import csv
import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    end_to_end,
    figures,
    goals,
    gpu_summary,
    kernel_kinds,
    measure,
    peers,
    providers,
    readme,
    report,
    sparse_backward,
    stage_compare,
    stage_ways,
    trl_sft,
    turns,
)
from benchmarks.architectures import SIZES, growth
from benchmarks.cases import CECase, toy_cases
from benchmarks.data import make_inputs
from benchmarks.measure import add_ratios, check, gate_truth, measure_case
from benchmarks.provider import needs_triton
from benchmarks.providers import own_providers, providers_of
from benchmarks.turns import Settings

KERNEL_MODULES = ("logits", "matmul", "rows", "row_gradients")
CPU = Settings(torch.device("cpu"), seconds=0.0, rounds=(1, 1))


@pytest.mark.parametrize("case", toy_cases(), ids=lambda case: case.label)
def test_whoever_runs_here_is_right(case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "GATE_TOKENS", 16)  # less than a case has, as for real heads
    quick = [one for one in providers_of(case) if one.package in (None, "peft")]
    rows = measure_case(case, CPU, quick)
    by_name = {row["provider"]: row for row in rows}
    assert any(row["kind"] == "ours" and row["status"] == "ok" for row in rows)
    for name, row in by_name.items():
        assert row["status"] in ("ok", "not installed") or row["status"].startswith("not run: "), (
            name,
            row["status"],
        )
        assert ("time_ms" in row) == (row["status"] == "ok")
    assert {name for name in by_name if "time_ms" in by_name[name]} == expected_to_run(case)


def expected_to_run(case) -> set[str]:
    """The providers without a package, and PEFT, that a CPU can run."""
    triton = not needs_triton(case, CPU.device)
    if case.op == "lora_merge":
        names = {"gift eager, in place", "plain PyTorch, in place", "floor: copy"}
        names |= {"PEFT, in place", "PEFT, safe_merge"}
        return names | ({"gift triton", "gift triton, in place"} if triton else set())
    names = {"gift eager", "full logits", "full logits, checkpointed chunks", "floor: products"}
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and case.shape.softcap is None:
        names |= {"torch linear_cross_entropy"}
    return names | ({"gift triton"} if triton else set())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("weighting", ["offline", "guide", "uniform", "self"])
def test_peers_mean_what_the_specification_means(
    weighting: str, trainable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Liger in the interpreter and CCE without a compiler; other peers need a GPU."""
    monkeypatch.setattr(measure, "GATE_TOKENS", 16)
    case = CECase("toy", 24, "float32", weighting=weighting, trainable=trainable)  # pyright: ignore
    wanted = {"Liger FLCE, chunk 1", "Liger scaled CE", "CCE, torch.compile"}
    wanted |= {"Liger FLCE, token scaling"} if weighting == "self" else set()
    chosen = [peer for peer in peers.PROVIDERS if peer.name in wanted and not peer.missing()]
    assert len(chosen) == len(wanted), "install the extra 'bench'"
    running = {
        peer.name
        for peer in peers.PROVIDERS
        if peer.package and not peer.missing() and not peer.skip(case, CPU.device)
    }
    assert running == {"Liger FLCE, chunk 16", *wanted} - {"CCE, torch.compile"}
    inputs, truth, baseline_errors = gate_truth(case, CPU)
    with torch.compiler.set_stance("force_eager"):
        for peer in chosen:
            status, errors = check(peer, case, inputs, truth, baseline_errors)
            assert status == "ok", (peer.name, status)
            assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("wrong", ["zero", "unweighted"])
def test_a_wrong_provider_is_shown_as_wrong_without_a_time(wrong: str) -> None:
    ours = next(provider for provider in own_providers() if provider.name == "gift eager")

    def prepare(case, inputs):
        if wrong == "unweighted":
            return ours.prepare(replace(case, weighting="uniform"), inputs)
        right = ours.prepare(case, inputs)
        return lambda: right() * 0

    (row,) = measure_case(CECase("toy", 40, "float32"), CPU, [replace(ours, prepare=prepare)])
    assert row["status"].startswith("wrong: ")
    assert "time_ms" not in row


def test_results_are_written_and_compared(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--device", "cpu"]
    command += ["--quick", "--seconds", "0.05", "--output", tmp_path / "a"]
    # As on a user's machine: without the interpreter, which conftest.py asks for.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(command, check=True, env=environment)
    written = json.loads((tmp_path / "a" / report.RESULTS_FILE).read_text())
    with (tmp_path / "a" / "results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(written["rows"])
    assert {"torch", "commit", "date", "device"} <= written["environment"].keys()
    for name in ("time", "memory", "cases"):
        assert (tmp_path / "a" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for row in written["rows"]:
        for name in row.keys() & {"time_ms", "p20_ms", "p80_ms"}:
            row[name] *= 20
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / report.RESULTS_FILE).write_text(json.dumps(written))
    table = report.compare(tmp_path / "a", tmp_path / "b")
    assert "| 20.00 |" in table and "do not compare" not in table


def test_a_comparison_shows_all_that_moved_beyond_its_spread(tmp_path: Path) -> None:
    row = {
        "case": "c", "provider": "p", "status": "ok", "note": "", "time_ms": 10.0, "p20_ms": 9.0,
        "p80_ms": 11.0, "peak_mb": 100.0, "error_loss": 1e-6, "samples": 5, "tflops": 1.0,
        "gb_per_s": 1.0,
    }  # fmt: skip
    stage = {"stage": "train step", "model": "m", "way": "gift", "status": "ok", "ms": 5.0}
    environment = {"device": "CPU", "date": "d", "torch": "1"}
    tables = {"end to end": [stage]}
    old = report.Results(tmp_path / "a", environment, [row, {**row, "case": "gone"}], {}, tables)
    within = {**row, "time_ms": 10.9, "p20_ms": 10.5, "p80_ms": 12.0}
    new = {**within, "peak_mb": 200.0, "error_loss": 1e-3}
    tables = {"end to end": [{**stage, "ms": 10.0}]}
    rows = [new, {**row, "case": "came"}]
    report.Results(tmp_path / "b", {**environment, "torch": "2"}, rows, {}, tables).save()
    old.save()
    found = report.compare(tmp_path / "a", tmp_path / "b").splitlines()
    assert found == [
        "- torch: 1, now 2",
        "",
        "| what | figure | before | after | after / before |",
        "|---|---|---|---|---|",
        "| c; p | peak_mb | 100 | 200 | 2.00 |",
        "| c; p | error_loss | 1e-06 | 0.001 | 1000.00 |",
        "| gone; p | row |  | removed |  |",
        "| end to end; train step; m; gift | ms | 5 | 10 | 2.00 |",
        "| came; p | row | absent | added |  |",
    ]


def test_results_say_where_they_are_from(tmp_path: Path) -> None:
    environment = report.environment(CPU.device)
    assert environment["device"].startswith(f"CPU, {torch.get_num_threads()} threads")
    folder = report.new_folder(None, environment)
    assert folder.name == f"cpu-{torch.get_num_threads()}-threads-{environment['date'][:10]}"
    row = {"case": "c", "provider": "p", "status": "not installed", "note": ""}
    report.Results(tmp_path, environment, [row]).save()
    with (tmp_path / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {name: row[name] for name in report.RUN} == {n: environment[n] for n in report.RUN}
    with pytest.raises(SystemExit, match="holds results already"):
        report.new_folder(tmp_path, environment)
    assert report.new_folder(tmp_path, environment, overwrite=True) == tmp_path


def test_figures_need_matplotlib_and_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    figures.plot(tmp_path, [])
    assert capsys.readouterr().out == "figures not made: matplotlib is not installed\n"


def test_a_zero_gradient_disagrees_whatever_the_loss_is() -> None:
    loss, gradient = torch.tensor([3.0]), torch.full((8,), 1e-3)
    assert stage_compare.disagreement([loss, gradient], [loss, gradient]) == 0
    assert stage_compare.disagreement([loss, 0 * gradient], [loss, gradient]) == 1


def test_ours_is_wrong_where_full_logits_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = stage_ways.annotate_batch
    monkeypatch.setattr(stage_ways, "annotate_batch", lambda *given: right(*given) / 2)
    rows = list(end_to_end.annotation(SIZES["toy"][0], torch.float32, CPU))
    assert [row["status"] for row in rows] == ["wrong", "wrong", "ok", "ok"]
    results = report.Results(tmp_path, {}, rows=[{"kind": "ours", "status": "ok"}])
    results.tables["end to end"] = rows
    assert gpu_summary.failures(results) == [rows[0]]


def test_nobody_is_called_wrong_where_full_logits_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stage_ways, "full_logit_confidence", fail)
    ours, padded, *others = end_to_end.annotation(SIZES["toy"][0], torch.float32, CPU)
    for row in (ours, padded):
        assert row["status"] == "unjudged" and "ms" in row
    assert {row["status"] for row in others} == {"failed: out of memory"}


def test_ways_in_bfloat16_are_judged_by_their_distance_from_float32() -> None:
    """Rounding passes; a gradient that is a tenth too large does not."""
    spec = replace(SIZES["toy"][0], rows=4)
    rows = {row["way"]: row for row in end_to_end.training(spec, torch.bfloat16, CPU, spec.name)}
    ours = ("gift", "gift, padded", "gift, all recomputed")
    assert [rows[way]["status"] for way in ours] == ["ok"] * 3
    assert all(1e-4 < rows[way]["disagrees by"] < 0.05 for way in ours)
    assert rows["gift"]["useful TFLOP/s"] > 0
    assert rows[end_to_end.LIGER]["status"].startswith("not ")
    found = [torch.tensor([1.0]), torch.full((8,), 1.1)]
    truth = [torch.tensor([1.0]), torch.ones(8)]
    assert stage_compare.disagreement(found, truth) > 3 * rows[end_to_end.FULL_LOSS]["disagrees by"]


def test_trls_trainer_counts_the_tokens_that_it_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["trl_sft", "toy", "torch.float32"])
    trl_sft.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    spec = SIZES["toy"][0]
    tokens = found["tokens/s"] * found["ms"] / 1e3
    assert spec.rows * spec.lengths[0] < tokens < spec.rows * spec.lengths[1]


def test_goals_of_stages_are_judged_against_the_fastest_of_the_others() -> None:
    common = {"stage": "train step", "model": "llama-3.1-8b"}
    rows = [
        {**common, "way": "gift", "tokens/s": 30.0, "useful TFLOP/s": 300.0},
        {**common, "way": end_to_end.LIGER, "tokens/s": 10.0},
        {**common, "way": f"{end_to_end.LIGER}, activations kept", "tokens/s": 24.0},
        {**common, "way": "gift", "model": "another", "tokens/s": 90.0},
    ]
    judged = {row["goal"]: (row["found"], row["met"]) for row in goals.judge_stages(rows)}
    assert judged == {
        "annotate, tokens/s, × authors' way": (None, "not measured"),
        "annotate, useful TFLOP/s": (None, "not measured"),
        "train step, tokens/s, × Transformers, PEFT, Liger": (1.25, "no"),
        "train step, useful TFLOP/s": (300.0, "no"),
    }


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("_logits_kernel", "ours"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "16-bit product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "16-bit product"),
        ("ampere_sgemm_128x64_tn", "32-bit product"),
        ("cutlass_80_simt_sgemm_256x128_8x4_tn_align1", "32-bit product"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("void at::native::bfloat16_copy_kernel_cuda", "copy"),
        ("void at::native::vectorized_elementwise_kernel<4, SiluFunctor>", "elementwise"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel: str, kind: str) -> None:
    assert kernel_kinds.kind_of(kernel) == kind


def test_all_of_our_kernels_are_known_as_ours() -> None:
    modules = [f"gift_kernels.linear_ce.triton.kernels.{name}" for name in KERNEL_MODULES]
    for module in map(importlib.import_module, [*modules, "gift_kernels.lora_merge.kernels"]):
        names = [name for name in vars(module) if name.endswith("_kernel")]
        assert names and {kernel_kinds.kind_of(name) for name in names} == {"ours"}, names


@pytest.mark.parametrize("size", sorted(SIZES))
def test_growth_measures_nothing_twice(size: str) -> None:
    specs = [spec for _, spec in growth(size)]
    assert all(one not in specs[:place] for place, one in enumerate(specs))


@pytest.mark.parametrize("case", [c for c in toy_cases() if isinstance(c, CECase)], ids=str)
def test_the_floor_does_the_products_that_are_counted(
    case: CECase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(providers, "FLOOR_ROWS", 16)
    floor = next(one for one in providers.floors() if case.op in one.ops)
    run = floor.prepare(case, make_inputs(case, CPU.device))
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == case.flops


def test_ratios_are_over_the_floor_and_the_fastest_exact_peer() -> None:
    times = (("ours", 6.0), ("floor", 4.0), ("peer", 3.0), ("peer", 12.0), ("baseline", 8.0))
    rows = [{"kind": kind, "time_ms": time} for kind, time in times]
    rows[2]["approximate"] = True
    rows.append({"kind": "candidate", "time_ms": 1.0})
    add_ratios([*rows, {"kind": "peer"}])
    assert [row["ratio_floor"] for row in rows] == [1.5, 1.0, 0.75, 3.0, 2.0, 0.25]
    assert [row["ratio_best_peer"] for row in rows] == [0.75, 0.5, 0.375, 1.5, 1.0, 0.125]
    (alone,) = [{"kind": "ours", "time_ms": 6.0}]
    add_ratios([alone])
    assert alone["ratio_floor"] is None and alone["ratio_best_peer"] is None


def test_freeing_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    turns.free(torch.device("cuda"))


def test_made_sections_are_those_of_the_stored_results_and_of_the_registry() -> None:
    sections = readme.sections(readme.newest())
    for path, made in sections:
        assert made in path.read_text(encoding="utf-8"), f"{path}: run python -m benchmarks readme"
    devices = [report.read_results(folder).environment["device"] for folder in readme.newest()]
    measured = any(not device.startswith("CPU") for device in devices)
    assert ("Not measured on a GPU yet" in sections[0][1]) is not measured


def test_the_readme_marks_what_is_slower_than_another_way(tmp_path: Path) -> None:
    case = CECase(readme.SHOWN_HEAD, 512)
    environment = {"device": "A GPU", "torch": "2", "date": "2026-11-27", "commit": "c"}

    def table(ours: float) -> str:
        times = {"gift triton": ours, "gift eager": 50.0, "full logits": 4.0, "Liger": 8.0}
        kinds = ("ours", "ours", "baseline", "peer")
        rows = [
            {"case": case.label, "provider": name, "kind": kind, "peak_mb": 1.0, "time_ms": ms}
            | {**case.describe(), "ratio_best_peer": ms / 4}
            for kind, (name, ms) in zip(kinds, times.items(), strict=True)
        ]
        return readme._short(report.Results(tmp_path, environment, rows))

    assert "| 0.50 |" in table(ours=2.0) and "as in 0 of all 1 cases" in table(ours=2.0)
    assert "| **1.50** |" in table(ours=6.0) and "as in 1 of all 1 cases" in table(ours=6.0)
    assert '`impl="eager"` takes 12 to 12 times as long' in table(ours=2.0)


def test_the_sparse_backward_is_exact_with_all_entries_and_keeps_its_bound() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    hidden, head, target = 2 * random(12, 8), random(90, 8) + 1, torch.arange(12)
    states = sparse_backward.States(hidden, head, target, random(12).abs())
    logits = (hidden.clone().requires_grad_() @ head.T).detach().requires_grad_()
    torch.nn.functional.cross_entropy(logits, target, reduction="sum").backward()
    known = sparse_backward.prepare(states)
    assert logits.grad is not None
    torch.testing.assert_close(known.exact, logits.grad @ head)
    found = [sparse_backward.measure(states, known, states.weight, 2.0**-e) for e in (4, 8, 12, 90)]
    for line in found:
        assert line["tilt"] <= line["bound"] * (1 + 1e-9) and line["kept"] <= line["candidates"]
    assert found[-1]["kept"] == 89
    assert max(found[-1][name] for name in ("none", "mean", "tilt", "bound", "mass")) < 1e-12
    assert found[0]["none"] > 0.01 and found[0]["units"] < found[-1]["units"]
