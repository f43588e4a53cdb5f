"""TRL's SFTTrainer as its users run it, launched by accelerate on the rows of `end_to_end`.

    accelerate launch -m benchmarks.trl_sft llama-3.1-8b bfloat16

Plain supervised fine-tuning with LoRA and gradient checkpointing, packed where flash-attn keeps the
rows apart, else padded as by default. It has no weights, so its results are not compared, only its
time and memory. `trl_row` runs it in its own process.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures import SIZES, Spec, make_examples, make_model

TRL = "TRL's SFTTrainer (no weights)"
STEPS = 6
SECONDS = 300


def trl_row(spec: Spec, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Status, time and memory of a step; measured on a GPU with TRL installed."""
    if importlib.util.find_spec("trl") is None:
        return {"status": "not installed"}
    if device.type != "cuda":
        return {"status": "not run: needs a GPU"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1"]
    command = [*launch, "-m", "benchmarks.trl_sft", spec.name, str(dtype)]
    root = Path(__file__).parent.parent
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, cwd=root
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"status": f"failed: {type(error).__name__}"}
    if finished.returncode:
        return {"status": f"failed: {' '.join(finished.stderr.split())[-120:]}"}
    return {"status": "unjudged", **json.loads(finished.stdout.splitlines()[-1])}


def main() -> None:
    """Trains for a few steps and prints the last steps' median as JSON."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from transformers.utils import is_flash_attn_2_available
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    spec = next(spec for size in SIZES.values() for spec in size if spec.name == sys.argv[1])
    dtype = getattr(torch, sys.argv[2].removeprefix("torch."))
    examples = make_examples(spec, spec.rows * STEPS)
    rows = [{"input_ids": example.input_ids.tolist()} for example in examples]
    ends: list[float] = []

    class Timed(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_model(spec, dtype, device)
    packed = is_flash_attn_2_available()
    if packed:
        model.set_attn_implementation("flash_attention_2")
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    # The rows are tokens already; the trainer wants to know what pads them.
    words = Tokenizer(models.WordLevel({"<pad>": 0}, "<pad>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>"
    )
    with tempfile.TemporaryDirectory() as folder:
        options = SFTConfig(
            output_dir=folder,
            max_length=spec.lengths[1],
            packing=packed,
            per_device_train_batch_size=spec.micro_rows,
            gradient_accumulation_steps=spec.rows // spec.micro_rows,
            gradient_checkpointing=True,
            bf16=dtype == torch.bfloat16,
            use_cpu=device.type == "cpu",
            max_steps=STEPS,
            save_strategy="no",
            report_to=[],
        )
        trainer = SFTTrainer(
            model=model,
            args=options,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=spec.rank, target_modules="all-linear"),
            callbacks=[Timed()],
        )
        trainer.train()
    steps = sorted(late - early for early, late in itertools.pairwise(ends[1:]))
    seconds = steps[len(steps) // 2]
    # Packed, a row of the trainer's holds several of the data's.
    trained: Any = trainer.train_dataset
    seen = [len(row["input_ids"]) for row in trained]
    found = {"ms": 1e3 * seconds, "tokens/s": spec.rows * sum(seen) / len(seen) / seconds}
    if device.type == "cuda":
        found["peak extra MB"] = (torch.cuda.max_memory_allocated() - held) / 1e6
    print(json.dumps(found))


if __name__ == "__main__":
    main()
