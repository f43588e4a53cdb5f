"""Tiny real models and tokenizers, made on the spot from Transformers configs."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SENTENCES = [
    "What is two plus three? Two plus three is five.",
    "Add the numbers seven and eight; the sum is fifteen, so the answer is fifteen.",
    "A train leaves at nine and arrives at noon: it travels for three hours.",
    "Let x be the number of apples. Then x + 4 = 9 gives x = 5, and we are done.",
    "user assistant system tool Please answer briefly. The answer is \\boxed{12}.",
]
SHARED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ARCHITECTURES: dict[str, Any] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2, "intermediate_size": 48}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 2, "intermediate_size": 48}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}),
    "gemma2": (
        Gemma2Config,
        {
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "head_dim": 8,
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "phi-head-bias": (PhiConfig, {"intermediate_size": 48}),
    "cohere-logit-scale": (CohereConfig, {"num_key_value_heads": 2, "intermediate_size": 48}),
    "granite-logits-scaling": (
        GraniteConfig,
        {"num_key_value_heads": 2, "intermediate_size": 48, "logits_scaling": 8.0},
    ),
}


def make_tokenizer(template: str = CHATML, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences, with ChatML's special tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_train_tokenizer()),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>" if pad_is_eos else "<|pad|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})  # pyright: ignore
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def _train_tokenizer() -> str:
    """Trained once: equal counts are merged in an order that differs from call to call."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    return backend.to_str()


def make_model(folder: Path, architecture: str = "llama", seed: int = 0, **overrides: Any) -> Path:
    """Writes a random model with its tokenizer; weights are large enough that q varies."""
    tokenizer = make_tokenizer()
    config_class, options = ARCHITECTURES[architecture]
    config = config_class(
        **{
            **SHARED,
            **options,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "initializer_range": 0.2,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            **overrides,
        }
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if architecture == "phi-head-bias":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int = 12) -> Path:
    """A JSONL file of instruction/response rows of different lengths."""
    rows = [
        {
            "instruction": f"What is {number} plus {number % 5}?",
            "response": " ".join([f"The answer is {number + number % 5}."] * (1 + number % 4)),
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_chats(path: Path, count: int = 8) -> Path:
    """A JSONL file of rows with messages, as TRL reads them too."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} plus 2?"},
                {"role": "assistant", "content": f"The sum is {number + 2}."},
            ]
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
