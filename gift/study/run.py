"""`gift study`: runs the table of runs, as many stages at a time as there are workers."""

import os
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from gift.annotate import annotate
from gift.calibration.command import calibration
from gift.config import StudyConfig
from gift.config.study import INSTRUCT
from gift.console import console, progress
from gift.errors import InputError, is_out_of_memory
from gift.evaluate import evaluate
from gift.merge.command import merge
from gift.merge.diff import diff
from gift.merge.statistics import merge_statistics
from gift.models.loading import versions
from gift.run import is_finished
from gift.storage.files import read_json, write_json
from gift.storage.lock import locked
from gift.storage.publish import remove_published
from gift.study.plan import STAGES_FOLDER, TUNING, Rates, Run, Stage, plan, plan_tuning
from gift.study.report import write_report
from gift.study.results import STUDY_FILE, print_results, read_study
from gift.train import train

FUNCTIONS = {
    "annotate": annotate,
    "calibrate": calibration,
    "train": train,
    "statistics": merge_statistics,
    "merge": merge,
    "evaluate": evaluate,
    "diff": diff,
}
# With these a stage would wait for other processes; every worker is a single process.
OF_TORCHRUN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def study(config: StudyConfig) -> dict[str, Any]:
    """Runs unfinished stages, then writes and prints the results; returns them.

    InputError: see `plan`; an error of a stage, with its name; `output` is another study, or none.
    """
    with locked(config.output):
        _refuse_other_folder(config.output)
        tried = plan_tuning(config)
        runs = plan(config, {})
        with worker_pool(config.workers) as pool:
            seconds = execute(config, tried, pool)
            tuning = _tuning(tried)
            if tried:
                rates = _best_rates(tuning)
                runs = plan(config, rates)
                for one in tuning:
                    one["taken"] = rates[one["pair"], one["method"]] == one["learning_rate"]
            seconds |= execute(config, runs, pool)
        if not config.keep_models:
            stages = _in_order([*tried, *runs])
            _remove_used(stages, stages, {stage.key for stage in stages})
        write_json(config.output / STUDY_FILE, _record(config, runs, tuning))
        finished = read_study(config.output)
        results = finished.results()
        print_results(results)
        report = write_report(finished, results)
    took = f"{sum(seconds.values()):.0f} s of stages" if seconds else "all was finished before"
    console.print(f"The report is {report} ({took}).", highlight=False, soft_wrap=True)
    return results


def _refuse_other_folder(output: Path) -> None:
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    if names and STAGES_FOLDER not in names:
        raise InputError(f"--output: {output} exists and is not a study; choose another folder")


def _tuning(tried: Sequence[Run]) -> list[dict[str, Any]]:
    """The accuracy at every learning rate of the grid."""
    entries = []
    for run in tried:
        folder = run.evaluations[TUNING].folder
        metrics = read_json(folder / "metrics.json")
        entries.append(
            {
                "pair": run.pair,
                "method": run.method,
                "learning_rate": run.learning_rate,
                "accuracy": metrics["accuracy"],
                "standard_error": metrics["standard_error"],
                "folder": folder.name,
            }
        )
    return entries


def _best_rates(tuning: Sequence[dict[str, Any]]) -> Rates:
    """The best rate of each pair and method; of equally good ones the first in the grid."""
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in tuning:
        name = entry["pair"], entry["method"]
        if name not in best or entry["accuracy"] > best[name]["accuracy"]:
            best[name] = entry
    return {name: entry["learning_rate"] for name, entry in best.items()}


def _record(
    config: StudyConfig, runs: Sequence[Run], tuning: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The table of runs, with the folders of their stages."""
    return {
        "settings": config.model_dump(mode="json", exclude={"output", "overwrite", "workers"}),
        # Objects in this file are sorted by their names.
        "methods": [INSTRUCT, *config.methods],
        "evaluations": sorted(config.evaluations, key=lambda n: config.evaluations[n].retention),
        "compared": config.compared,
        "tuning": tuning,
        "runs": [
            {
                "pair": run.pair,
                "method": run.method,
                "seed": run.seed,
                "learning_rate": run.learning_rate,
                "stages": {kind: stage.folder.name for kind, stage in run.stages.items()},
                "evaluations": {name: stage.folder.name for name, stage in run.evaluations.items()},
            }
            for run in runs
        ],
        "versions": versions(),
    }


def execute(
    config: StudyConfig, runs: Sequence[Run], pool: ProcessPoolExecutor
) -> dict[str, float]:
    """Runs the stages that are not finished; returns the seconds that each took, by its key.

    If a stage fails, finished ones are kept, and the same call resumes.
    """
    stages = _in_order(runs)
    waiting = _unfinished(stages, config.overwrite)
    seconds: dict[str, float] = {}
    done = {stage.key for stage in stages} - {stage.key for stage in waiting}
    running: dict[Future[float], Stage] = {}
    workers = default_workers(config.workers)
    with progress("study", len(waiting)) as bar:
        while waiting or running:
            ready = [s for s in waiting if all(need.key in done for need in s.needs)]
            for stage in ready[: workers - len(running)]:
                waiting.remove(stage)
                running[pool.submit(_run_stage, stage, config.overwrite)] = stage
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                seconds[stage.key] = _seconds(future, stage)
                done.add(stage.key)
                bar.note(stage.label)
                bar.advance()
                if not config.keep_models:
                    _remove_used(stage.needs, stages, done)
    return seconds


def _in_order(runs: Sequence[Run]) -> list[Stage]:
    """Every stage once, in an order that respects `needs`."""
    found: dict[str, Stage] = {}
    for run in runs:
        for stage in (*run.stages.values(), *run.evaluations.values()):
            found.setdefault(stage.key, stage)
    return list(found.values())


def _unfinished(stages: Sequence[Stage], overwrite: bool) -> list[Stage]:
    """The stages to run; a merged model only if an unfinished stage reads it."""
    needed: list[Stage] = []
    read: set[str] = set()
    for stage in reversed(stages):
        wanted = stage.key in read or stage.kind != "merge"
        if wanted and not is_finished(stage.folder, stage.key, overwrite):
            needed.append(stage)
            read |= {need.key for need in stage.needs}
    return needed[::-1]


def _remove_used(candidates: Iterable[Stage], stages: Sequence[Stage], done: set[str]) -> None:
    """Removes merged models among the candidates that no further stage reads."""
    read = {need.key for stage in stages if stage.key not in done for need in stage.needs}
    for stage in candidates:
        if stage.kind == "merge" and stage.key not in read:
            remove_published(stage.folder)


def _seconds(future: "Future[float]", stage: Stage) -> float:
    try:
        return future.result()
    except InputError as error:
        raise InputError(f"{stage.label}: {error}") from None
    except BrokenProcessPool:
        raise InputError(
            f"--workers: a worker was killed, perhaps for memory, during {stage.label} or beside "
            "it; the same command resumes, with fewer workers"
        ) from None
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise RuntimeError(f"out of memory in {stage.label}: {error}") from error
        raise


@contextmanager
def worker_pool(workers: int | None) -> Iterator[ProcessPoolExecutor]:
    """Processes that each see one GPU, or without GPUs share the cores.

    Spawned, not forked: PyTorch's threads and CUDA do not survive a fork. They start with the first
    stage.
    """
    workers = default_workers(workers)
    context = get_context("spawn")
    places = context.Queue()
    for place in worker_places(workers, visible_gpus()):
        places.put(place)
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin_worker, initargs=(places,)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def default_workers(workers: int | None) -> int:
    """The number given, or one per GPU, or one."""
    return workers or max(1, torch.cuda.device_count())


def visible_gpus() -> list[str]:
    """The GPUs of this process as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def worker_places(workers: int, gpus: Sequence[str]) -> list[tuple[str | None, int]]:
    """The GPU of each worker, in turn, and its number of threads."""
    threads = max(1, torch.get_num_threads() // workers)
    return [(gpus[n % len(gpus)] if gpus else None, threads) for n in range(workers)]


def _begin_worker(places: Any) -> None:
    import transformers

    for name in OF_TORCHRUN:
        os.environ.pop(name, None)
    gpu, threads = places.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA starts, with the first stage
    torch.set_num_threads(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def _run_stage(stage: Stage, overwrite: bool) -> float:
    """Runs one stage, with its output in a log next to its folder. Returns its seconds.

    A resumed stage appends to its log.
    """
    started = time.perf_counter()
    stage.folder.parent.mkdir(parents=True, exist_ok=True)
    config = stage.config.model_copy(update={"overwrite": overwrite})
    mode = "w" if stage.folder.exists() else "a"
    with (
        stage.folder.with_suffix(".log").open(mode, encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        FUNCTIONS[stage.kind](config, stage.key)
    return time.perf_counter() - started
