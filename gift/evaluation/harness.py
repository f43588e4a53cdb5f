"""Evaluates a model on tasks of EleutherAI's lm-evaluation-harness.

Prompts, sampling, filters and metrics are the task's. The chat template is applied and writes all
special tokens, as in every stage; few-shot examples are lm-eval's default ones, as turns.
"""

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Sequence
from typing import Any

import torch

from gift.config import EvaluateConfig
from gift.console import print_table
from gift.errors import InputError
from gift.models.loading import (
    listed,
    load_causal_lm,
    model_hash,
    pick_device,
    pick_dtype,
    resolve_model,
    versions,
)
from gift.models.tokenizer import load_tokenizer
from gift.storage.files import hash_json, write_json, write_json_lines
from gift.storage.publish import output_folder, warn

MISSING = "install gift-tuning[harness]"


def evaluate_tasks(config: EvaluateConfig, key: str = "") -> dict[str, Any]:
    """Runs the tasks and writes samples.jsonl and metrics.json; returns the metrics.

    An interrupted call starts over. `key`: see `publish.output_folder`.

    Raises:
        InputError: lm-eval is missing or fails, unknown tasks or tasks without their data, a bad
        model, or an existing output.
    """
    _require_harness(config)
    from lm_eval.tasks import TaskManager

    assert config.model is not None, "checked with the options"
    with output_folder(config.output, overwrite=config.overwrite, key=key) as output:
        manager = TaskManager(include_path=config.include_path)
        tasks = _load_tasks(manager, config.harness_tasks())
        folder = resolve_model(config.model)
        tokenizer = load_tokenizer(folder)
        device = pick_device(config.device)
        model = load_causal_lm(folder, pick_dtype(config.dtype, device), device)
        found, cut = _ask(config, manager, tasks, model, tokenizer)
        output.begin()
        samples = _plain(
            [{"task": task, **sample} for task, rows in found["samples"].items() for sample in rows]
        )
        write_json_lines(output.partial / "samples.jsonl", samples)
        metrics: dict[str, Any] = {
            "tasks": _plain(found["results"]),
            **{
                name.replace("-", "_"): _plain(found[name])
                for name in ("n-samples", "n-shot", "configs", "higher_is_better", "group_subtasks")
            },
            "prompts_cut_by_context": cut,
            "task_versions": found["versions"],
            "settings": config.model_dump(mode="json"),
            "device": str(device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "model_hash": model_hash(folder),
            "data_hash": hash_json([[row["task"], row["doc_hash"]] for row in samples]),
            "versions": versions() | {"lm_eval": importlib.metadata.version("lm_eval")},
        }
        write_json(output.partial / "metrics.json", metrics)
    _print(config, metrics)
    return metrics


def _ask(
    config: EvaluateConfig, manager: Any, tasks: list[Any], model: Any, tokenizer: Any
) -> tuple[Any, int]:
    """The results of lm-eval, and the number of prompts that it truncated, with a warning."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models import huggingface

    base: Any = huggingface.HFLM

    class CountingModel(base):
        """Counts the prompts that lm-eval truncates at their beginning."""

        cut = 0

        def tok_batch_encode(
            self, strings: Any, *args: Any, left_truncate_len: int | None = None, **options: Any
        ) -> Any:
            if left_truncate_len is not None:
                self.cut += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
            return super().tok_batch_encode(
                strings, *args, left_truncate_len=left_truncate_len, **options
            )

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            # The last token of a continuation is not read.
            self.cut += sum(len(ids) + len(more) - 1 > self.max_length for _, ids, more in requests)
            return super()._loglikelihood_tokens(requests, *args, **options)

    asked = CountingModel(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=config.batch_size,
        add_bos_token=False,  # the chat template writes one where the model has one
    )
    try:
        found = simple_evaluate(
            model=asked,
            tasks=tasks,
            task_manager=manager,
            limit=config.limit,
            system_instruction=config.system_prompt,
            apply_chat_template=True,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
        )
    except (InputError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any type: a template, a metric, an assertion of lm-eval
        raise InputError(
            f"--lm-eval: {', '.join(config.harness_tasks())}: lm-eval fails ({_reason(error)}); "
            "change the task in a file of your own (--include-path)"
        ) from error
    if asked.cut:
        warn(
            f"lm-eval left out the beginning of {asked.cut} prompts, which with their replies are "
            f"longer than the model's context of {asked.max_length} tokens"
        )
    return found, asked.cut


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _require_harness(config: EvaluateConfig) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"--lm-eval: the package lm-eval is not installed; {MISSING}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("--lm-eval: one process runs the tasks; start it without torchrun")
    if config.include_path is not None and not config.include_path.is_dir():
        raise InputError(f"--include-path: {config.include_path} is no folder")


def _load_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
    """The named tasks and groups with their data; InputError where one is unavailable."""
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise InputError(
            f"--lm-eval: no task, group or tag is named {listed(unknown)}; `lm-eval ls tasks` "
            "lists lm-eval's own, --include-path FOLDER adds others"
        )
    try:
        loaded = manager.load(names)
    except ImportError as error:
        raise InputError(f"--lm-eval: {', '.join(names)}: {error}; {MISSING}") from error
    except Exception as error:  # of any type: Datasets', the hub's, a task's own code
        raise InputError(
            f"--lm-eval: {', '.join(names)} cannot be loaded ({_reason(error)}); connect to the "
            "network, or bring the data and name its files in a task of your own (--include-path)"
        ) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise InputError(
                f"--lm-eval: {name} executes code that the model writes, or shows it images; "
                "neither is done here, run lm-eval itself"
            )
    children = {child for part in loaded.get("group_map", {}).values() for child in part}
    built = {**loaded.get("groups", {}), **loaded["tasks"]}
    return [task for name, task in built.items() if name not in children]


def _plain(content: Any) -> Any:
    """The content as plain JSON types."""
    from lm_eval.utils import handle_non_serializable

    return json.loads(json.dumps(content, default=handle_non_serializable))


def _print(config: EvaluateConfig, metrics: dict[str, Any]) -> None:
    rows = []
    for task, values in metrics["tasks"].items():
        for name, value in values.items():
            metric, comma, kind = name.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{metric}_stderr,{kind}")
                shown = f"{value:.4g}" + (f" ± {error:.2g}" if isinstance(error, float) else "")
                rows.append((task, metric if kind == "none" else name, shown))
    print_table(f"lm-eval: {config.model}", ("task", "metric", "value"), rows)
