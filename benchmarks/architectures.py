"""Public architectures with random weights, and batches of random tokens for them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model

from gift.data.encoding import Example


@dataclass(frozen=True)
class Spec:
    """An architecture by its public config, and the batch it is measured on."""

    name: str
    config_class: str
    config: dict[str, Any]
    rows: int  # of the training step; annotation has four times as many
    micro_rows: int
    lengths: tuple[int, int]  # shortest and longest row
    rank: int = 64
    annotate_tokens: int = 16384  # a batch


def _llama(hidden: int, layers: int, intermediate: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": tied,
    }


QWEN_HALF_B = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
SMALL = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "intermediate_size": 704,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 16384,
}
TOY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
SIZES: dict[str, tuple[Spec, ...]] = {
    "gpu": (
        Spec("llama-3.1-8b", "LlamaConfig", _llama(4096, 32, 14336, 32, False), 8, 4, (300, 1200)),
        Spec("qwen2.5-0.5b", "Qwen2Config", QWEN_HALF_B, 16, 8, (300, 1200)),
        Spec("llama-3.2-3b", "LlamaConfig", _llama(3072, 28, 8192, 24, True), 8, 4, (300, 1200)),
    ),
    "cpu": (Spec("cpu-small", "Qwen2Config", SMALL, 4, 2, (100, 300), annotate_tokens=1024),),
    "toy": (Spec("toy", "LlamaConfig", TOY, 2, 2, (12, 24), rank=4, annotate_tokens=64),),
}


def growth(size: str) -> Iterator[tuple[str, Spec]]:
    """The size's first architecture, cut to four layers, with more tokens, vocabulary and rank.

    All start from one common point, measured once: one batch of twice the usual micro-batch.
    """
    spec = SIZES[size][0]
    rows = 2 * spec.micro_rows
    config = {**spec.config, "num_hidden_layers": 4}
    spec = replace(spec, config=config, rows=rows, micro_rows=rows)
    factors = {"gpu": (1, 4, 16), "cpu": (1, 4), "toy": (1,)}[size]
    for factor in factors:
        rows = spec.micro_rows * factor // 4
        yield f"{rows} rows at once", replace(spec, rows=rows, micro_rows=rows)
    for factor in {"gpu": (1, 16), "cpu": (1,), "toy": ()}[size]:
        vocab = spec.config["vocab_size"] * factor // 4
        yield f"vocabulary {vocab}", replace(spec, config={**spec.config, "vocab_size": vocab})
    for rank in {"gpu": (8, 256), "cpu": (8, 16), "toy": (8,)}[size]:
        yield f"rank {rank}", replace(spec, rank=rank)


def make_model(spec: Spec, dtype: torch.dtype, device: torch.device) -> Any:
    """The architecture with random weights, in evaluation mode."""
    torch.manual_seed(0)
    config = getattr(transformers, spec.config_class)(**spec.config)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def make_adapted(spec: Spec, dtype: torch.dtype, device: torch.device) -> Any:
    """The model with a LoRA adapter on all linear layers, as `gift train` makes it."""
    model = make_model(spec, dtype, device)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=2 * spec.rank,
        target_modules="all-linear",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(1)
    return get_peft_model(model, config).train()


def make_examples(spec: Spec, count: int) -> list[Example]:
    """Rows of random tokens, a quarter of each its prompt."""
    generator = np.random.default_rng(0)
    shortest, longest = spec.lengths
    examples = []
    for row in range(count):
        length = int(generator.integers(shortest, longest + 1))
        ids = generator.integers(0, spec.config["vocab_size"], length).astype(np.int32)
        examples.append(Example(row, ids, np.arange(length) >= length // 4))
    return examples
