"""A study of two methods and two seeds on a tiny pair."""

import json
from pathlib import Path
from typing import Any

import tiny

from gift.config import StudyConfig

ASKED = {
    "check": "exact",
    # A random model is right by chance: its reply holds the letter.
    "answer_pattern": "(?s)(e)",
    "unfinished": "checked",
    "max_new_tokens": 6,
}
SETTINGS = {"lora_rank": 2, "global_batch_size": 6, "device": "cpu"}


def make_inputs(folder: Path) -> Path:
    """A pair, rows and questions."""
    tiny.make_model(folder / "instruct", "qwen2", seed=1, num_hidden_layers=1)
    tiny.make_model(folder / "base", "qwen2", seed=2, num_hidden_layers=1)
    tiny.write_rows(folder / "rows.jsonl", 12)
    for number, name in enumerate(("task", "other", "held-out")):
        rows = [{"question": f"What is {n} plus {number}?", "answer": "e"} for n in range(6)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(folder: Path, output: Path, **changes: Any) -> StudyConfig:
    """The study of what `make_inputs` made."""
    options: dict[str, Any] = {
        "pairs": {"tiny": {"base": str(folder / "base"), "instruct": str(folder / "instruct")}},
        "settings": {"data": str(folder / "rows.jsonl"), **SETTINGS},
        "methods": {"GIFT": None, "Shadow-FT": {"weighting": "uniform"}},
        "evaluations": {
            "task": {"data": str(folder / "task.jsonl"), "samples": 3, **ASKED},
            "other": {
                "data": str(folder / "other.jsonl"),
                "samples": 2,
                "retention": True,
                **ASKED,
            },
        },
        "tuning": {
            "data": str(folder / "held-out.jsonl"),
            "learning_rates": [1e-3, 1e-1],
            **ASKED,
        },
        "seeds": [0, 1],
        "workers": 2,
        "output": output,
    }
    return StudyConfig(**{**options, **changes})
