"""A training loop of one's own: annotated weights, no logits, one divisor for the global batch.

python examples/own_loop.py
python examples/own_loop.py --base BASE --instruct INSTRUCT --data task.jsonl --output out
"""

import torch
import torch.nn.functional as F
from example_inputs import read_arguments, read_rows
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from gift.annotate import annotate
from gift.confidence_store import load_store
from gift.config import AnnotateConfig
from gift.datasets import with_confidence
from gift.integrations import WeightedCollator
from gift_kernels import weighted_ce

ACCUMULATION = 2


def main() -> None:
    given = read_arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = given.output / "confidence"
    annotate(AnnotateConfig(model=given.instruct, data=given.data, output=store, overwrite=True))
    collator = WeightedCollator(DataCollatorForSeq2Seq(load_store(store).tokenizer()))
    data = with_confidence(read_rows(given.data), store)
    batches = list(DataLoader(data, batch_size=4, shuffle=True, collate_fn=collator))
    model = AutoModelForCausalLM.from_pretrained(given.base).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for start in range(0, len(batches), ACCUMULATION):
        step = batches[start : start + ACCUMULATION]
        labels_of_step = sum((batch["labels"] != -100).sum() for batch in step).to(device)
        total = 0.0
        for batch in (batch.to(device) for batch in step):
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
            # Position t predicts token t + 1: its label, and its label's weight.
            target = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
            weight = F.pad(batch["token_weight"][:, 1:], (0, 1))
            head = model.get_output_embeddings().weight
            loss = weighted_ce(hidden, head, target, weight, normalizer=labels_of_step)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {total:.4f}")
    model.save_pretrained(given.output / "trained")


if __name__ == "__main__":
    main()
