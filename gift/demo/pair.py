"""A base model and the instruct model post-trained from it, trained from scratch in a minute.

Both are Llama models of about 113 thousand parameters in ordinary Transformers folders: weights as
safetensors, configuration, a word tokenizer, a chat template and a generation configuration. The
base is trained on documents, after a primer of copying tasks and clean programs without which
induction heads may not form; the instruct model is the base after full fine-tuning on
conversations. The same seed gives the same files.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from gift.console import Bar, progress
from gift.demo.world import (
    SEPARATOR,
    VOCABULARY,
    Mixture,
    Sample,
    draw_conversation,
    draw_document,
    draw_primer,
)
from gift.storage.files import hash_json, write_json
from gift.storage.publish import output_folder, published_key

BOS, EOS, PAD, UNKNOWN = "<|begin|>", "<|end|>", "<|pad|>", "<|unknown|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, UNKNOWN, BOS, EOS, TURN_START, TURN_END)
# Generation stops at the end of the turn.
TOKEN_IDS: dict[str, Any] = {
    "bos_token_id": SPECIAL_TOKENS.index(BOS),
    "eos_token_id": SPECIAL_TOKENS.index(TURN_END),
    "pad_token_id": SPECIAL_TOKENS.index(PAD),
}
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IGNORED = -100
MAX_LENGTH = 128
SETTINGS_FILE = "recipe.json"


@dataclass(frozen=True)
class Pair:
    """The folders of the two models."""

    base: Path
    instruct: Path


@dataclass(frozen=True)
class Recipe:
    """How the pair is made."""

    hidden_size: int = 64
    layers: int = 2
    heads: int = 2
    mlp_size: int = 192
    rope_theta: float = 100.0
    initializer_range: float = 0.08
    batch: int = 16
    base_steps: int = 2200
    primer_steps: int = 800  # the first ones of `base_steps`
    base_learning_rate: float = 3e-3
    instruct_steps: int = 1300
    instruct_learning_rate: float = 1.5e-3
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    mixture: Mixture = field(default_factory=Mixture)


def make_pair(
    folder: Path,
    seed: int,
    *,
    steps_scale: float = 1.0,
    recipe: Recipe | None = None,
    overwrite: bool = False,
) -> Pair:
    """Makes both models in `folder`/base and `folder`/instruct.

    An existing pair with the same settings is kept; a call killed between the two models resumes
    with the second. Training runs on one thread, which is as fast as two here and gives the same
    files on any number of cores.

    Args:
        folder: a folder with other files in it is an error without `overwrite`.
        seed: of initial weights and all data.
        steps_scale: scales the numbers of training steps; below 1 for a quick, unskilled pair.
        recipe: all other settings.
    """
    recipe = recipe or Recipe()
    settings = {"seed": seed, "steps_scale": steps_scale, "recipe": asdict(recipe)}
    pair, key = Pair(folder / "base", folder / "instruct"), hash_json(settings)
    if published_key(folder) == key:
        return pair
    tokenizer = make_tokenizer()
    with output_folder(folder, overwrite=overwrite, key=key) as output, _one_thread():
        partial = output.begin(settings, keep=("base", "instruct"))
        write_json(partial / SETTINGS_FILE, settings)
        base, instruct = partial / "base", partial / "instruct"
        if not base.exists():
            with output_folder(base) as made:
                model = _make_base(recipe, tokenizer, seed, steps_scale)
                _save(model, tokenizer, made.begin())
        if not instruct.exists():
            with output_folder(instruct) as made:
                model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
                model = _make_instruct(model, recipe, tokenizer, seed, steps_scale)
                _save(model, tokenizer, made.begin())
    return pair


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config = GenerationConfig(**TOKEN_IDS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer for the world's vocabulary, with a chat template."""
    words = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *VOCABULARY))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[TURN_START, TURN_END],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


@dataclass(frozen=True)
class _Encoded:
    """Token ids of one sample and the position of the first one that is a target."""

    ids: list[int]
    first_target: int

    def targets(self) -> list[int]:
        """The ids, with those before the first target ignored."""
        return [IGNORED] * self.first_target + self.ids[self.first_target :]


def _encode(
    tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample], *, prompts_too: bool
) -> list[_Encoded]:
    """Samples as token ids; of conversations only the reply is a target unless `prompts_too`."""
    texts, prompts = [], []
    for sample in samples:
        if sample.chat:
            messages = sample.messages()
            texts.append(tokenizer.apply_chat_template(messages, tokenize=False))
            prompts.append(
                tokenizer.apply_chat_template(
                    messages[:1], tokenize=False, add_generation_prompt=True
                )
            )
        else:
            texts.append(f"{BOS} {sample.prompt} {SEPARATOR} {sample.reply} {EOS}")
            prompts.append(BOS)
    starts = [1] * len(texts)
    if not prompts_too:
        starts = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [_Encoded(row, start) for row, start in zip(ids, starts, strict=True)]


@dataclass(frozen=True)
class _Batch:
    """A batch of whole samples packed several to a row, `ids` and `targets` int64 [rows, length].

    `mask` bool [rows, 1, length, length] lets a token see its own sample up to itself.
    """

    ids: Tensor
    targets: Tensor
    mask: Tensor


def _pack(samples: Sequence[_Encoded]) -> _Batch:
    """Packs samples into rows as long as the longest one, longest first into the first row."""
    length = max(len(sample.ids) for sample in samples)
    rows: list[list[_Encoded]] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        for row in rows:
            if sum(len(other.ids) for other in row) + len(sample.ids) <= length:
                row.append(sample)
                break
        else:
            rows.append([sample])
    ids, targets, owner = [], [], []
    for row in rows:
        padding = length - sum(len(sample.ids) for sample in row)
        ids.append(
            [token for sample in row for token in sample.ids]
            + [TOKEN_IDS["pad_token_id"]] * padding
        )
        targets.append([token for sample in row for token in sample.targets()])
        targets[-1] += [IGNORED] * padding
        owner.append([number for number, sample in enumerate(row) for _ in sample.ids])
        owner[-1] += [-1] * padding
    owners = torch.tensor(owner)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (owners[:, :, None] == owners[:, None, :]) & causal
    return _Batch(torch.tensor(ids), torch.tensor(targets), mask[:, None])


def _train(
    model: LlamaForCausalLM,
    samples: Sequence[_Encoded],
    learning_rate: float,
    recipe: Recipe,
    bar: Bar,
) -> None:
    """Trains all weights on the samples in order, with a short warm-up and a cosine to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=learning_rate,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    steps = len(samples) // recipe.batch
    warmup = min(recipe.warmup_steps, steps // 10 + 1)
    model.train()
    for step in range(steps):
        rate = 0.5 * learning_rate * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warmup)
        batch = _pack(samples[step * recipe.batch : (step + 1) * recipe.batch])
        hidden = model.model(
            input_ids=batch.ids, attention_mask=batch.mask, use_cache=False
        ).last_hidden_state
        labels = batch.targets[:, 1:]
        wanted = labels != IGNORED
        loss = functional.cross_entropy(model.lm_head(hidden[:, :-1][wanted]), labels[wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.advance()
        if step % 50 == 0:
            bar.note(f"loss {loss.item():.3f}")
    model.eval()


def _new_model(recipe: Recipe, vocabulary: int, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.mlp_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=True,
        dtype="float32",
        **TOKEN_IDS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _make_base(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int, scale: float
) -> LlamaForCausalLM:
    """A new model that has read the primer and then the documents."""
    rng = Random(f"base/{seed}")
    primer, steps = _scaled(recipe.primer_steps, scale), _scaled(recipe.base_steps, scale)
    samples = [draw_primer(rng, recipe.mixture) for _ in range(primer * recipe.batch)]
    samples += [draw_document(rng, recipe.mixture) for _ in range((steps - primer) * recipe.batch)]
    model = _new_model(recipe, len(tokenizer), seed)
    rows = _encode(tokenizer, samples, prompts_too=True)
    with progress("base model", steps) as bar:
        _train(model, rows, recipe.base_learning_rate, recipe, bar)
    return model


def _make_instruct(
    model: LlamaForCausalLM,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    scale: float,
) -> LlamaForCausalLM:
    """Fine-tunes all weights of the base model on conversations, in place."""
    rng = Random(f"instruct/{seed}")
    steps = _scaled(recipe.instruct_steps, scale)
    samples = [draw_conversation(rng, recipe.mixture) for _ in range(steps * recipe.batch)]
    rows = _encode(tokenizer, samples, prompts_too=False)
    with progress("instruct model", steps) as bar:
        _train(model, rows, recipe.instruct_learning_rate, recipe, bar)
    return model


def _scaled(steps: int, scale: float) -> int:
    return max(1, round(steps * scale))
