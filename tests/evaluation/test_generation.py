"""Replies follow the model's own distribution, and depend on (seed, row, sample) only."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from gift.errors import InputError
from gift.evaluation.generation import Reply, generate_replies

WORDS = ["<pad>", "<eos>", "<unk>", *(f"w{number}" for number in range(21))]
EOS = 1
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3], [12, 4, 4], [5, 6, 7, 8, 9], [9, 3, 20, 21, 3, 5]]
SIZES: dict[str, Any] = {"vocab_size": len(WORDS), "eos_token_id": EOS, "bos_token_id": None}
BODY: dict[str, Any] = SIZES | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**BODY)),
    # A sliding window shorter than the replies, soft-capped logits and a tied head.
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**BODY, head_dim=8, sliding_window=6)),
    # Learned absolute positions: left padding must not shift them.
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=2, n_positions=96, initializer_range=0.3)
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def build(architecture: str) -> Any:
    """A random model, in float64 where Transformers allows it, so that rounding changes no draw."""
    torch.manual_seed(3)
    model = ARCHITECTURES[architecture]().eval()
    return model if architecture == "gemma2" else model.double()


def generate(model: Any, tokenizer: Any, prompts: Any = PROMPTS, **options: Any) -> Any:
    settings: dict[str, Any] = {
        "samples": 3,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_new_tokens": 24,
        "seed": 7,
        "batch_size": 100,
    }
    return generate_replies(model, tokenizer, prompts, **settings | options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_samples_do_not_depend_on_the_batch(architecture, tokenizer):
    model = build(architecture)
    expected = generate(model, tokenizer, top_p=0.9)
    lengths = {len(reply.tokens) for replies in expected for reply in replies}
    assert len(lengths) > 1  # so that finished sequences leave the batch at different times
    for batch_size in (2, 7):
        assert generate(model, tokenizer, top_p=0.9, batch_size=batch_size) == expected
    alone = generate(model, tokenizer, PROMPTS[:1], top_p=0.9)
    assert alone == expected[:1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_replies_are_those_of_transformers(architecture, tokenizer):
    model = build(architecture)
    replies = generate(model, tokenizer, temperature=0, samples=1)
    for prompt, [reply] in zip(PROMPTS, replies, strict=True):
        own = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            pad_token_id=0,
        )
        assert list(reply.tokens) == own[0, len(prompt) :].tolist()
        assert reply.finished == (reply.tokens[-1] == EOS)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (1.5, 0.3)])
def test_tokens_are_drawn_from_the_models_distribution(temperature, top_p, tokenizer):
    model = build("llama")
    draws = 4000
    [replies] = generate(
        model,
        tokenizer,
        [[5, 6, 7]],
        samples=draws,
        max_new_tokens=1,
        temperature=temperature,
        top_p=top_p,
        batch_size=draws,
    )
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1]
    expected = (logits / temperature).softmax(-1).tolist()
    nucleus, mass = [], 0.0
    for token in sorted(range(len(expected)), key=lambda token: -expected[token]):
        if mass < top_p:
            nucleus.append(token)
            mass += expected[token]
    counts = Counter(reply.tokens[0] for reply in replies)
    assert set(counts) <= set(nucleus)
    assert len(nucleus) < len(expected) or top_p == 1
    for token in nucleus:
        probability = expected[token] / mass
        deviation = math.sqrt(draws * probability * (1 - probability))
        assert abs(counts[token] - draws * probability) <= 4.5 * deviation + 1


def test_rows_samples_and_seeds_have_noise_of_their_own(tokenizer):
    model = build("llama")
    same_prompt = [[5, 6, 7]] * 4
    replies = generate(model, tokenizer, same_prompt)
    others = generate(model, tokenizer, same_prompt, seed=8)
    texts = [reply.text for row in [*replies, *others] for reply in row]
    assert len(set(texts)) > 0.9 * len(texts)
    assert generate(model, tokenizer, same_prompt) == replies


def test_a_longer_limit_continues_the_same_replies(tokenizer):
    model = build("llama")
    short = generate(model, tokenizer, max_new_tokens=5)
    long = generate(model, tokenizer, max_new_tokens=40)
    for row, longer_row in zip(short, long, strict=True):
        for reply, longer in zip(row, longer_row, strict=True):
            assert longer.tokens[: len(reply.tokens)] == reply.tokens
            assert len(reply.tokens) == min(5, len(longer.tokens))
            assert reply.finished == (len(longer.tokens) <= 5 and longer.finished)


def test_every_end_token_ends_a_reply_and_is_kept_out_of_its_text(tokenizer):
    model = build("llama")
    model.generation_config.eos_token_id = [4, 6]
    replies = [reply for row in generate(model, tokenizer, samples=12) for reply in row]
    assert {reply.tokens[-1] for reply in replies if reply.finished} == {EOS, 4, 6}
    for reply in replies:
        assert not {EOS, 4, 6} & set(reply.tokens[:-1])
        assert reply.finished == (reply.tokens[-1] in (EOS, 4, 6))
        assert reply.finished or len(reply.tokens) == 24
        assert "<eos>" not in reply.text
        words = [WORDS[token] for token in reply.tokens if token > 2]
        assert reply.text == " ".join(words)


def test_a_reply_ends_unfinished_where_the_context_ends(tokenizer):
    model = build("llama")
    model.generation_config.eos_token_id = None
    model.lm_head.weight.data[EOS] = 0  # seldom chosen
    prompts = [[5] * 90, [5] * 94]
    replies = generate(model, tokenizer, prompts, samples=10, batch_size=3)
    assert max(len(reply.tokens) for reply in replies[0]) == 6
    assert max(len(reply.tokens) for reply in replies[1]) == 2
    with pytest.raises(InputError, match=r"row 1 .*: the prompt has 96 tokens and leaves no room"):
        generate(model, tokenizer, [[5], [5] * 96])


def test_what_is_done_is_not_made_again(tokenizer):
    model = build("llama")
    complete = generate(model, tokenizer)
    kept = {(0, 1): Reply((9, EOS), "w6", True), (3, 0): complete[3][0]}
    batches: list[Any] = []
    replies = generate(model, tokenizer, done=kept, batch_size=4, on_batch=batches.append)
    assert replies[0][1] == kept[0, 1]
    assert replies[0][0] == complete[0][0] and replies[1:] == complete[1:]
    assert [len(batch) for batch in batches] == [4, 4, 4, 1]
    made = {(row, sample): reply for batch in batches for row, sample, reply in batch}
    assert len(made) == 13 and not made.keys() & kept.keys()
    assert all(replies[row][sample] == reply for (row, sample), reply in made.items())


def test_a_model_in_training_mode_samples_without_dropout_and_stays_in_it(tokenizer):
    config = LlamaConfig(**BODY, attention_dropout=0.5)
    torch.manual_seed(3)
    model: Any = LlamaForCausalLM(config).double()
    expected = generate(model.eval(), tokenizer)
    assert generate(model.train(), tokenizer) == expected
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples: got 0"),
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": 0}, "samples: got 3 at temperature 0"),
        ({"top_p": 0}, "top_p: got 0"),
        ({"top_p": 1.1}, "top_p: got 1.1"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"seed": -1}, "seed: got -1"),
        ({"prompts": [[5], []]}, "row 1 .* no tokens"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range_are_refused(options, message, tokenizer):
    with pytest.raises(InputError, match=message):
        generate(build("llama"), tokenizer, **options)


def test_a_model_without_an_end_token_or_with_broken_weights_is_refused(tokenizer):
    model = build("llama")
    broken = build("llama")
    broken.model.norm.weight.data[3] = math.nan
    with pytest.raises(InputError, match="logits are NaN"):
        generate(broken, tokenizer)
    model.generation_config.eos_token_id = None
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="eos_token_id"):
        generate(model, endless)
