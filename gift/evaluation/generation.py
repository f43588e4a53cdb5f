"""Batched generation whose samples depend on (seed, row, sample) and on nothing else.

Every token of sample s of prompt r is drawn by inverting the cumulative distribution at a uniform
number from its own stream, seeded with (seed, r, s). So a sample is the same alone or in any batch,
today or after a resume, up to the floating-point differences that a batch's shape makes in the
model; and a higher `max_new_tokens` continues the same replies.

The loop calls the model directly, for decoder-only Transformers models with an attention cache.
Shapes: B sequences in the batch, T prompt tokens after left padding, V vocabulary.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from gift.distributed.ranks import ALONE, Group
from gift.errors import InputError
from gift.models.loading import context_length
from gift.models.memory import in_parts

# Removing finished sequences from the batch copies the cache, which costs about as much as a step
# of the whole batch; it pays off if at least this share of the batch is finished.
DROP_SHARE = 0.2


@dataclass(frozen=True)
class Reply:
    """One generated reply; `tokens` includes the end token if there is one."""

    tokens: tuple[int, ...]
    text: str
    finished: bool

    @property
    def length(self) -> int:
        """Tokens of the reply."""
        return len(self.tokens)


FinishedReply = tuple[int, int, Reply]  # row, sample, reply


def generate_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    batch_size: int,
    on_batch: Callable[[list[FinishedReply]], None] | None = None,
    done: Mapping[tuple[int, int], Reply] | None = None,
    group: Group = ALONE,
) -> list[list[Reply]]:
    """Generates `samples` replies to every prompt; the result is indexed [row][sample].

    Args:
        prompts: token ids, complete with any special tokens and the header of the reply.
        temperature: 0 takes the likeliest token every time.
        top_p: draws from the smallest set of likeliest tokens that holds this probability (the
            nucleus of Holtzman et al. 2020, arXiv 1904.09751); 1 draws from all.
        max_new_tokens: a reply that has not ended by then, or by the end of the model's context,
            is unfinished.
        batch_size: sequences at a time; longest prompts first, to run out of memory early.
        on_batch: receives each batch as it is finished.
        done: replies of an earlier call by (row, sample), which are not generated again.
        group: ranks that share the batches; each returns the replies of all.

    Raises:
        InputError: an option out of range, an empty prompt or one that fills the context, no end
            token, or a model whose logits are not numbers.
    """
    _check_options(samples, temperature, top_p, max_new_tokens, seed, batch_size)
    end_ids = end_token_ids(model, tokenizer)
    limits = reply_limits(model, prompts, max_new_tokens)
    replies = dict(done or {})
    own: list[FinishedReply] = []
    with _evaluating(model):

        def decode(batch: Sequence[tuple[int, int]]) -> list[list[int]]:
            return _decode_batch(
                model,
                [prompts[row] for row, _ in batch],
                [limits[row] for row, _ in batch],
                end_ids,
                _Sampler(batch, seed, temperature, top_p, max_new_tokens, model.device),
            )

        # Whole batches, so that several ranks give the same replies as one.
        batches = group.share(_pending_batches(prompts, samples, replies, batch_size))
        for batch, tokens in in_parts(decode, batches, "replies"):
            finished = [
                (row, sample, _reply(tokenizer, ids, end_ids))
                for (row, sample), ids in zip(batch, tokens, strict=True)
            ]
            own += finished
            if on_batch is not None:
                on_batch(finished)
    replies |= {(row, sample): reply for row, sample, reply in group.gather(own)}
    return [[replies[row, sample] for sample in range(samples)] for row in range(len(prompts))]


def _pending_batches(
    prompts: Sequence[Sequence[int]],
    samples: int,
    done: Collection[tuple[int, int]],
    batch_size: int,
) -> list[list[tuple[int, int]]]:
    """The unfinished (row, sample), longest prompts first, in batches of `batch_size`.

    The sort is stable, so the order does not depend on which are done.
    """
    pending = [
        (row, sample)
        for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        for sample in range(samples)
        if (row, sample) not in done
    ]
    return [pending[n : n + batch_size] for n in range(0, len(pending), batch_size)]


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a reply: the generation config's and the tokenizer's, ascending."""
    configured: Any = getattr(model.generation_config, "eos_token_id", None)
    named = configured if isinstance(configured, list | tuple) else [configured]
    ids = {token for token in [*named, tokenizer.eos_token_id] if token is not None}
    if not ids:
        raise InputError(
            "neither the model's generation_config.json nor the tokenizer names an end token "
            "(eos_token_id), so no reply would ever end; add one"
        )
    return tuple(sorted(ids))


def _check_options(
    samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    seed: int,
    batch_size: int,
) -> None:
    counts = {"samples": samples, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name}: got {value}, expected at least 1")
    if temperature < 0:
        raise InputError(f"temperature: got {temperature}, expected 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p: got {top_p}, expected more than 0 and at most 1")
    if seed < 0:
        raise InputError(f"seed: got {seed}, expected 0 or more")
    refuse_equal_samples(samples, temperature)


def refuse_equal_samples(samples: int, temperature: float) -> None:
    """InputError where several greedy replies per question are requested."""
    if temperature == 0 and samples > 1:
        raise InputError(
            f"samples: got {samples} at temperature 0, where all are the same; "
            "use 1 sample or a temperature above 0"
        )


def reply_limits(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[int]:
    """Tokens that each reply may have within `max_new_tokens` and the model's context."""
    context = context_length(model.config)
    limits = []
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"row {row} (counted from 0): the prompt has no tokens")
        room = max_new_tokens if context is None else context - len(prompt)
        if room < 1:
            raise InputError(
                f"row {row} (counted from 0): the prompt has {len(prompt)} tokens and leaves no "
                f"room for a reply in the model's context of {context}; shorten or remove it"
            )
        limits.append(min(max_new_tokens, room))
    return limits


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _reply(tokenizer: PreTrainedTokenizerBase, ids: list[int], end_ids: tuple[int, ...]) -> Reply:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "one sequence decodes to one text"
    return Reply(tuple(ids), text, ids[-1] in end_ids)


class _Sampler:
    """Chooses the next tokens of a batch; `batch` holds the (row, sample) of each sequence."""

    def __init__(
        self,
        batch: Sequence[tuple[int, int]],
        seed: int,
        temperature: float,
        top_p: float,
        max_new_tokens: int,
        device: torch.device,
    ) -> None:
        self._temperature = temperature
        self._top_p = top_p
        # float64 keeps the sum over a large vocabulary exact enough; Apple's GPUs have none.
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._uniforms: Tensor | None = None  # [B, max_new_tokens] in [0, 1)
        if temperature > 0:
            draws = [
                numpy.random.default_rng((seed, row, sample)).random(max_new_tokens)
                for row, sample in batch
            ]
            self._uniforms = torch.from_numpy(numpy.stack(draws)).to(device, self._dtype)

    def choose(self, logits: Tensor, sequences: Tensor, step: int) -> Tensor:
        """Token ids [n] for logits [n, V] of the batch's `sequences` [n] at a step of the reply."""
        if self._uniforms is None:
            return logits.argmax(-1)
        probabilities = (logits.float() / self._temperature).softmax(-1)
        if self._top_p < 1:
            probabilities = _nucleus(probabilities, self._top_p)
        # Cumulated in the order of token ids: in the order of probabilities, near ties could swap
        # and change the draw.
        cumulative = probabilities.to(self._dtype).cumsum(-1)
        total = cumulative[:, -1:]
        # Rounding may raise the product to the total, past the last token.
        target = torch.minimum(
            self._uniforms[sequences, step, None] * total,
            torch.nextafter(total, torch.zeros_like(total)),
        )
        # The first token whose cumulative probability exceeds the target has a probability over 0.
        return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Zeroes all but the smallest set of likeliest tokens that holds `top_p`.

    Ties at the threshold are kept. [n, V] to [n, V], not renormalized.
    """
    ranked = probabilities.sort(-1, descending=True).values
    kept = ranked.cumsum(-1) - ranked < top_p
    edge = ranked.masked_fill(~kept, 1.0).amin(-1, keepdim=True)
    return probabilities.masked_fill(probabilities < edge, 0.0)


def _decode_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    end_ids: tuple[int, ...],
    sampler: _Sampler,
) -> list[list[int]]:
    """The reply's token ids of each prompt, up to and with the end token or to its limit."""
    device = model.device
    steps = max(limits)
    ids, mask = _left_padded(prompts, steps, end_ids[0], device)  # [B, T], [B, T + steps]
    width = ids.shape[1]
    positions = (mask[:, :width].cumsum(-1) - 1).clamp_min(0)  # [B, T]
    limit = torch.tensor(limits, device=device)  # [B]
    ends = torch.tensor(end_ids, device=device)
    output = torch.zeros(len(prompts), steps, dtype=torch.long, device=device)
    length = torch.zeros(len(prompts), dtype=torch.long, device=device)  # 0: still running
    sequences = torch.arange(len(prompts), device=device)  # [n]: those still in the batch
    cache = DynamicCache(config=model.config)
    options = _forward_options(model)
    for step in range(steps):
        logits = model(
            input_ids=ids,
            attention_mask=mask[:, : width + step],
            past_key_values=cache,
            use_cache=True,
            **({"position_ids": positions} if "position_ids" in options else {}),
            **({"logits_to_keep": 1} if "logits_to_keep" in options else {}),
        ).logits[:, -1]  # [n, V]
        if step == 0 and bool(logits.isnan().any()):
            raise InputError("the model's logits are NaN: its weights are damaged or overflow")
        token = sampler.choose(logits, sequences, step)  # [n]
        output[sequences, step] = token
        over = (token[:, None] == ends).any(-1) | (step + 1 >= limit[sequences])
        length[sequences] = torch.where(
            (length[sequences] == 0) & over, step + 1, length[sequences]
        )
        running = (length[sequences] == 0).nonzero().squeeze(-1)
        if len(running) == 0:
            break
        positions = positions[:, -1:] + 1
        if len(running) <= (1 - DROP_SHARE) * len(sequences):
            sequences, token, mask = sequences[running], token[running], mask[running]
            positions = positions[running]
            cache.reorder_cache(running)  # pyright: ignore[reportArgumentType]
        ids = token[:, None]
    return [row[:count] for row, count in zip(output.tolist(), length.tolist(), strict=True)]


def _left_padded(
    prompts: Sequence[Sequence[int]], steps: int, padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts as ids [B, T], and their attention mask with room for the reply [B, T + steps]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[padding] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * (len(p) + steps) for p in prompts])
    return ids.to(device), mask.to(device)


def _forward_options(model: PreTrainedModel) -> set[str]:
    """Names of the arguments of the model's forward method, beneath a PEFT wrapper if any."""
    unwrap: Any = getattr(model, "get_base_model", None)
    return set(inspect.signature((unwrap() if unwrap else model).forward).parameters)
