"""Guided fine-tuning with TRL: annotate, join, train an adapter of the base model, merge.

python examples/trl_sft.py
python examples/trl_sft.py --base BASE --instruct INSTRUCT --data task.jsonl --output out
"""

import torch
from example_inputs import read_arguments, read_rows
from peft import LoraConfig
from trl import SFTConfig

from gift.annotate import annotate
from gift.confidence_store import load_store
from gift.config import AnnotateConfig, MergeConfig
from gift.datasets import with_confidence
from gift.integrations import WeightedSFTTrainer
from gift.merge.command import merge


def main() -> None:
    given = read_arguments(__doc__)
    store, adapter = given.output / "confidence", given.output / "adapter"
    annotate(AnnotateConfig(model=given.instruct, data=given.data, output=store, overwrite=True))
    trainer = WeightedSFTTrainer(
        given.base,
        SFTConfig(
            output_dir=str(given.output / "checkpoints"),
            learning_rate=1e-4,
            num_train_epochs=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            max_length=2048,
            packing=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=with_confidence(read_rows(given.data), store),
        # The tokenizer and the chat template of the guide, which made the tokens.
        processing_class=load_store(store).tokenizer(),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(str(adapter))
    merged = given.output / "merged"
    merge(MergeConfig(model=given.instruct, adapter=[str(adapter)], output=merged, overwrite=True))


if __name__ == "__main__":
    main()
