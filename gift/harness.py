"""Tasks of EleutherAI's lm-evaluation-harness, asked of a model that is loaded as for any stage.

Prompts, sampling, filters and metrics are the task's. The chat template is applied, few-shot
examples are turns of it and those that lm-eval draws by default.
"""

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Sequence
from typing import Any

from gift.config import EvaluateConfig
from gift.console import print_table
from gift.errors import InputError
from gift.files import hash_json, write_json, write_json_lines
from gift.models import (
    listed,
    load_causal_lm,
    load_tokenizer,
    model_hash,
    pick_device,
    pick_dtype,
    resolve_model,
    versions,
)
from gift.publish import output_folder

MISSING = "install gift-tuning[harness]"


def evaluate_tasks(config: EvaluateConfig, key: str = "") -> dict[str, Any]:
    """Runs the tasks and writes samples.jsonl and metrics.json; returns the metrics.

    An interrupted call starts anew. `key`: see `publish.output_folder`.

    Raises:
        InputError: no lm-eval, unknown tasks or tasks whose data cannot be had, a bad model, or an
            existing output.
    """
    _require_harness(config)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    assert config.model is not None, "checked with the options"
    with output_folder(config.output, overwrite=config.overwrite, key=key) as output:
        manager = TaskManager(include_path=config.include_path)
        tasks = _load_tasks(manager, config.harness_tasks())
        folder = resolve_model(config.model)
        tokenizer = load_tokenizer(folder)
        device = pick_device(config.device)
        model = load_causal_lm(folder, pick_dtype(config.dtype, device), device)
        found: Any = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size),  # pyright: ignore
            tasks=tasks,
            task_manager=manager,
            limit=config.limit,
            system_instruction=config.system_prompt,
            apply_chat_template=True,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
        )
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


def _require_harness(config: EvaluateConfig) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(f"--lm-eval: the package lm-eval is not installed; {MISSING}")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("--lm-eval: one process runs the tasks; start it without torchrun")
    if config.include_path is not None and not config.include_path.is_dir():
        raise InputError(f"--include-path: {config.include_path} is no folder")


def _load_tasks(manager: Any, names: Sequence[str]) -> list[Any]:
    """The tasks and groups named, with their data; InputError where one cannot be had."""
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
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"--lm-eval: {', '.join(names)} cannot be loaded ({reason}); connect to the network, "
            "or bring the data and name its files in a task of your own (--include-path)"
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
    """The content as JSON has it."""
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
