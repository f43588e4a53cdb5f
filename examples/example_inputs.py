"""What the examples work on: what is named on the command line, or tiny random models and rows."""

import argparse
import random
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import LlamaConfig, LlamaForCausalLM

from gift.demo.pair import make_tokenizer
from gift.demo.world import task_rows, write_rows


def read_arguments(description: str) -> argparse.Namespace:
    """base and instruct (folders or hub ids), data (JSONL) and output, a folder."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="the model to train")
    parser.add_argument("--instruct", help="the guide, and the model to merge into")
    parser.add_argument("--data", type=Path, help="JSONL rows, as gift annotate reads them")
    parser.add_argument("--output", type=Path, default=Path("example-output"))
    given = parser.parse_args()
    given.base = given.base or make_model(given.output / "base", seed=0)
    given.instruct = given.instruct or make_model(given.output / "instruct", seed=1)
    if given.data is None:
        given.data = given.output / "task.jsonl"
        write_rows(given.data, task_rows(random.Random(0), 16))
    return given


def make_model(folder: Path, seed: int) -> str:
    """Writes a random model of some thousand parameters, with its tokenizer."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def read_rows(path: Path) -> Dataset:
    """A JSONL file as a data set."""
    return load_dataset("json", data_files=str(path), split="train")
