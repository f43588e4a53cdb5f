"""Multiple choice by likelihood: the answer is the option whose letter the model finds likeliest.

    score_c = Σ_t log p(letter_c's token t | prompt, letter_c's tokens before t)

The letter is the whole reply, after the chat template's header. This is the rule of
lm-evaluation-harness's `multiple_choice` tasks (Gao et al., Zenodo 10.5281/zenodo.12608602), with
the letter as the continuation. One forward pass a question where letters are single tokens; nothing
is generated, and no logits are held.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from gift.data.batches import Batch, make_inputs
from gift.data.encoding import Example
from gift.data.packing import enable_packing
from gift.distributed.ranks import ALONE, Group
from gift.errors import InputError
from gift.evaluation.generation import reply_limits
from gift.evaluation.questions import LETTERS, Question
from gift.models.head import last_hidden_state, lm_head
from gift.models.memory import in_parts
from gift_kernels import token_confidence

CHOICE_PROMPT = "Answer with the letter of the right option alone."


class _Asked(NamedTuple):
    """A question's forward passes, and the (pass, position, token) of every option's score."""

    inputs: list[list[int]]
    options: list[list[tuple[int, int, int]]]

    def rows(self) -> list[Example]:
        """The passes as rows without targets."""
        return [
            Example(0, np.array(ids, np.int32), np.zeros(len(ids), bool)) for ids in self.inputs
        ]


def rate_options(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[str],
    *,
    batch_size: int,
    done: Mapping[int, list[float]],
    on_batch: Callable[[dict[int, list[float]]], None],
    group: Group = ALONE,
) -> list[list[float]]:
    """The log-likelihood of every option's letter, by question and option.

    Args:
        prompts: the questions as texts, up to the header of the reply.
        batch_size: questions at a time, the longest first.
        done: scores of an earlier call by question, which are not computed again.
        on_batch: receives each batch's scores by question.
        group: ranks that share the batches; each returns the scores of all.

    Raises:
        InputError: a prompt is empty or fills the model's context, or letters have no tokens.
    """
    asked = [
        _ask(tokenizer, prompt, len(question.choices or ()))
        for question, prompt in zip(questions, prompts, strict=True)
    ]
    reply_limits(model, [each.inputs[0] for each in asked], 1)
    scores = dict(done)
    pending = [
        row
        for row in sorted(range(len(asked)), key=lambda row: -len(asked[row].inputs[0]))
        if row not in scores
    ]
    batches = [pending[n : n + batch_size] for n in range(0, len(pending), batch_size)]
    packed = enable_packing(model, [row for each in asked for row in each.rows()])
    own: dict[int, list[float]] = {}

    def score(rows: Sequence[int]) -> list[list[float]]:
        return _score(model, [asked[row] for row in rows], packed)

    for rows, scores_of in in_parts(score, group.share(batches), "questions"):
        found = dict(zip(rows, scores_of, strict=True))
        own |= found
        on_batch(found)
    scores |= dict(group.gather(list(own.items())))
    return [scores[row] for row in range(len(asked))]


def _ask(tokenizer: PreTrainedTokenizerBase, prompt: str, count: int) -> _Asked:
    texts = [prompt + letter for letter in LETTERS[:count]]
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]  # pyright: ignore
    # A letter may join the prompt's last token: what all options share is the prompt.
    differing = (n for n, ids in enumerate(zip(*tokens, strict=False)) if len(set(ids)) > 1)
    shared = next(differing, None)
    if shared is None or len(set(map(tuple, tokens))) < count:
        raise InputError(
            f"--check choice: the model's tokenizer writes {', '.join(LETTERS[:count])} alike; it "
            "cannot answer by letter"
        )
    inputs: list[list[int]] = []
    options = []
    for ids in tokens:
        if ids[:-1] not in inputs:
            inputs.append(ids[:-1])
        number = inputs.index(ids[:-1])
        options.append([(number, place - 1, ids[place]) for place in range(shared, len(ids))])
    return _Asked(inputs, options)


@torch.no_grad()
def _score(model: Any, batch: Sequence[_Asked], packed: bool) -> list[list[float]]:
    passes = [row.input_ids for asked in batch for row in asked.rows()]
    inputs, starts = make_inputs(passes, packed=packed)
    predicts: list[int] = []
    targets: list[int] = []
    first = 0
    for asked in batch:
        for number, place, token in itertools.chain.from_iterable(asked.options):
            predicts.append(starts[first + number] + place)
            targets.append(token)
        first += len(asked.inputs)
    made = Batch(inputs, torch.tensor(predicts), torch.tensor(targets))
    made = made.to(model.get_input_embeddings().weight.device)
    head = lm_head(model)
    hidden = last_hidden_state(model, **made.inputs).flatten(0, 1).index_select(0, made.predicts)
    _, stats = token_confidence(
        hidden.to(head.weight.dtype), head.weight, made.targets, stats=("nll",), **head.options()
    )
    assert stats.nll is not None
    left = iter((-stats.nll.double()).tolist())
    return [[sum(next(left) for _ in option) for option in asked.options] for asked in batch]
