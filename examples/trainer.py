"""Full fine-tuning with Transformers' Trainer, weighted by a guide model in the same step.

python examples/trainer.py
python examples/trainer.py --base BASE --instruct INSTRUCT --data task.jsonl --output out
"""

from example_inputs import read_arguments, read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from gift.data.encoding import encode
from gift.data.rows import read_conversation
from gift.integrations import WeightedTrainer
from gift_kernels import WeightTransform


def main() -> None:
    given = read_arguments(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(given.instruct)
    rows = read_rows(given.data)
    conversations = [read_conversation(row, f"row {n}")[0] for n, row in enumerate(rows)]
    examples = encode(conversations, tokenizer, max_length=2048).kept
    data = [
        {
            "input_ids": example.input_ids.tolist(),
            # Labels only where the model is to learn: the replies.
            "labels": [
                token if is_target else -100
                for token, is_target in zip(example.input_ids, example.is_target, strict=True)
            ],
        }
        for example in examples
    ]
    trainer = WeightedTrainer(
        AutoModelForCausalLM.from_pretrained(given.base),
        TrainingArguments(
            output_dir=str(given.output / "checkpoints"),
            num_train_epochs=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=data,
        processing_class=tokenizer,
        weights=AutoModelForCausalLM.from_pretrained(given.instruct),
        transform=WeightTransform(floor=0.05),
    )
    trainer.train()
    trainer.save_model(str(given.output / "trained"))


if __name__ == "__main__":
    main()
