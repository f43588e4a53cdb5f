"""Evaluates a model on questions with known answers: generate and check, or choose; average.

A reply that did not end counts as wrong unless `unfinished` says otherwise: it has no final answer,
and math-verify would take the last expression before the cut. `unfinished_correct` reports the
share of replies that match the reference but did not end.
"""

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift.config import EvaluateConfig
from gift.console import progress
from gift.data.rows import json_lines
from gift.distributed import ranks
from gift.distributed.ranks import Group
from gift.errors import InputError
from gift.evaluation.answers import Checker, Verdict, open_checker
from gift.evaluation.benchmarks import BENCHMARKS, MATH_PROMPT, benchmark_rows
from gift.evaluation.choices import CHOICE_PROMPT, rate_options
from gift.evaluation.endpoint import ServedReply, ask_server, require_client, summarize_server
from gift.evaluation.generation import (
    FinishedReply,
    Reply,
    end_token_ids,
    generate_replies,
    reply_limits,
)
from gift.evaluation.harness import evaluate_tasks
from gift.evaluation.metrics import (
    pass_at_k,
    print_metrics,
    standard_error,
    summarize,
    summarize_choices,
)
from gift.evaluation.questions import LETTERS, Question, read_questions, render_prompts
from gift.models.loading import (
    load_causal_lm,
    model_hash,
    pick_device,
    pick_dtype,
    require_embeddings,
    resolve_model,
    versions,
)
from gift.models.tokenizer import load_tokenizer, tokenizer_hash
from gift.speed import SPEED_FILE, Clock, load_and_hash, print_times
from gift.storage.files import (
    hash_json,
    read_json_lines,
    sealed_files,
    write_json,
    write_json_lines,
)
from gift.storage.publish import Output, warn

__all__ = [
    "Reply",
    "evaluate",
    "generate_replies",
    "pass_at_k",
    "standard_error",
]


def evaluate(config: EvaluateConfig, key: str = "") -> dict[str, Any]:
    """Generates, checks and writes samples.jsonl and metrics.json; returns the metrics.

    Finished batches stay in OUTPUT.partial, so that a call with the same settings, model and data
    resumes where an interrupted one stopped, and ends with the same files. Several ranks share the
    batches; the main one checks, writes and returns the metrics, the others return nothing. `key`
    is stored in the folder's `gift_files.json`, see `publish.output_folder`.

    Raises:
        InputError: bad options, data or model, or an existing output.
    """
    config.refuse_unread_settings()
    if config.harness_tasks():
        return evaluate_tasks(config, key)
    if config.endpoint is not None:
        require_client(config)
    check = config.check_by()
    with (
        ranks.process_group(on_host=True) as group,
        ranks.shared_folder(group, config.output, overwrite=config.overwrite, key=key) as output,
    ):
        questions, source = asked_questions(config, check)
        with nullcontext() if check == "choice" else _checker(config, check) as checker:
            unreadable = _count_unreadable(checker, questions) if checker and group.is_main else 0
            if config.endpoint is None:
                samples, metrics = _ask_model(config, checker, questions, output, group)
            else:
                samples, metrics = _ask_server(config, checker, questions, output)
            if not group.is_main:
                return {}
            if checker is not None:
                metrics["unreadable_answers"] = unreadable
        write_json_lines(output.partial / "samples.jsonl", samples)
        metrics |= {
            "data": source,
            "settings": config.model_dump(mode="json"),
            "data_hash": hash_json([{**asdict(question), "place": ""} for question in questions]),
            "versions": versions(),
        }
        write_json(output.partial / "metrics.json", metrics)
    print_metrics(config, metrics)
    return metrics


def _ask_model(
    config: EvaluateConfig,
    checker: Checker | None,
    questions: Sequence[Question],
    output: Output,
    group: Group,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Loads the model and asks it: the rows of samples.jsonl, and metrics; empty on other ranks."""
    assert config.model is not None, "checked with the options"
    folder = resolve_model(config.model)
    tokenizer = load_tokenizer(folder)
    prompts = render_prompts(tokenizer, questions)
    device = pick_device(config.device)
    load = partial(load_causal_lm, folder, pick_dtype(config.dtype, device), device)
    clock = Clock()
    model, weights = load_and_hash(folder, clock, load)
    inputs = _token_ids(tokenizer, prompts)
    require_embeddings(model, max(max(ids, default=0) for ids in inputs), config.model)
    # Everything that determines the replies. Not the batch size, so that a run that ran out of
    # memory can resume with a smaller one; nor the answers and the check.
    made_from = {
        "model": weights,
        "tokenizer": tokenizer_hash(tokenizer),
        "prompts": hash_json(inputs),
        "device": model.device.type,
        "dtype": str(model.dtype),
    }
    groups = [question.group for question in questions]
    if checker is None:
        with clock("compute"):
            samples = _choose(
                config, model, made_from, tokenizer, questions, prompts, output, group
            )
        metrics = summarize_choices(samples, groups)
    else:
        short = _count_short(config, model, inputs)
        with clock("compute"):
            replies = _generate(config, model, made_from, tokenizer, inputs, output, group)
        if not group.is_main:
            return [], {}
        with clock("check"):
            samples = _check(config, checker, questions, prompts, replies)
        metrics = summarize(samples, groups) | {"questions_cut_by_context": short}
    if group.is_main:
        write_json(output.partial / SPEED_FILE, {"seconds": clock.seconds})
        print_times(clock)
    return samples, metrics | {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_hash": weights,
    }


def _ask_server(
    config: EvaluateConfig, checker: Checker | None, questions: Sequence[Question], output: Output
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Asks a server: the rows of samples.jsonl, with the turns as prompts, and metrics."""
    assert checker is not None, "options with --check choice are refused"
    lengths = weights = None
    if config.model is not None:
        folder = resolve_model(config.model)
        tokenizer, weights = load_tokenizer(folder), model_hash(folder)
        lengths = [len(ids) for ids in _token_ids(tokenizer, render_prompts(tokenizer, questions))]
    replies = ask_server(config, questions, output, lengths, weights)
    turns = [question.turns for question in questions]
    checked = _check(config, checker, questions, turns, replies)
    flat = itertools.chain.from_iterable(replies)
    samples = [
        row | {"finish_reason": reply.finish_reason, "reasoning": reply.reasoning}
        for row, reply in zip(checked, flat, strict=True)
    ]
    metrics = summarize(samples, [question.group for question in questions])
    return samples, metrics | {"server": summarize_server(config, replies)}


def _token_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]  # pyright: ignore


def asked_questions(config: EvaluateConfig, check: str) -> tuple[list[Question], dict[str, Any]]:
    """The questions, and their source; InputError where neither option is given."""
    suffix, group = config.prompt_suffix, config.group_by
    if config.benchmark is not None:
        benchmark = BENCHMARKS[config.benchmark]
        rows, source = benchmark_rows(config.benchmark, config.data)
        suffix = MATH_PROMPT if suffix is None and benchmark.check == "math" else suffix
        group = group or benchmark.group
    elif config.data is not None:
        rows, source = json_lines(config.data), {"file": str(config.data)}
    else:
        raise InputError("--data: is required, or name a --benchmark")
    questions = read_questions(
        rows,
        choices=check == "choice",
        limit=config.limit,
        question_field=config.question_field,
        group_by=group,
        system_prompt=config.system_prompt,
        prompt_suffix=CHOICE_PROMPT if suffix is None and check == "choice" else suffix,
        ignore=config.ignored_keys(),
    )
    if not questions:
        raise InputError(f"--data: {config.data or config.benchmark} has no rows")
    return questions, source


def check_evaluation(config: EvaluateConfig) -> None:
    """InputError where `evaluate` could not ask or check these questions with any model."""
    check = config.check_by()
    if check != "choice":
        _checker(config, check)
    asked_questions(config, check)


def _checker(config: EvaluateConfig, check: Literal["exact", "math"]) -> Checker:
    return open_checker(check, config.answer_pattern, config.check_timeout)


def _count_unreadable(checker: Checker, questions: Sequence[Question]) -> int:
    """Counts the references in which math-verify finds no expression, with a warning."""
    unreadable = [question for question in questions if not checker.can_read(question.answer)]
    if unreadable:
        warn(
            f"math-verify cannot read {len(unreadable)} of {len(questions)} answers, the first in "
            f"{unreadable[0].place}: {unreadable[0].answer!r}; only the same text counts as right "
            "there"
        )
    return len(unreadable)


def _count_short(
    config: EvaluateConfig, model: PreTrainedModel, inputs: Sequence[Sequence[int]]
) -> int:
    """Counts the questions that leave less than `max_new_tokens` in the context, with a warning."""
    limits = reply_limits(model, inputs, config.max_new_tokens)
    short = sum(limit < config.max_new_tokens for limit in limits)
    if short:
        warn(
            f"{short} of {len(inputs)} questions leave less than a reply's {config.max_new_tokens} "
            f"tokens in the model's context, the least {min(limits)} tokens"
        )
    return short


def _choose(
    config: EvaluateConfig,
    model: PreTrainedModel,
    made_from: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[str],
    output: Output,
    group: Group,
) -> list[dict[str, Any]]:
    """Multiple choice: the rows of samples.jsonl, from finished batches and new ones."""
    options = [len(question.choices or ()) for question in questions]
    ranks.begin_shared(group, output, {**made_from, "options": options})
    done = {row["row"]: row["scores"] for row in _finished(output, group)}
    total = len(done) + group.count(len(prompts) - len(done))
    with progress("choosing", total, done=len(done)) as bar:

        def keep(batch: dict[int, list[float]]) -> None:
            rows = [{"row": row, "scores": scores} for row, scores in batch.items()]
            write_json_lines(output.work / f"{min(batch):06d}.jsonl", rows, sealed=True)
            bar.advance(len(batch))

        scores = rate_options(
            model,
            tokenizer,
            questions,
            prompts,
            batch_size=config.batch_size,
            done=done,
            on_batch=keep,
            group=group,
        )
    rows = []
    for number, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
        shares = torch.tensor(scores[number], dtype=torch.float64).softmax(0).tolist()
        probabilities = dict(zip(LETTERS, shares, strict=False))
        chosen = max(probabilities, key=probabilities.__getitem__)
        rows.append(
            {
                "row": number,
                "sample": 0,
                "prompt": prompt,
                "answer": question.answer,
                "chosen": chosen,
                "correct": chosen == question.answer,
                "probabilities": probabilities,
            }
        )
    return rows


def _generate(
    config: EvaluateConfig,
    model: PreTrainedModel,
    made_from: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    output: Output,
    group: Group,
) -> list[list[Reply]]:
    """All replies [row][sample]: loads those in the work folder, generates and saves the rest."""
    ranks.begin_shared(
        group,
        output,
        {
            **made_from,
            "end tokens": list(end_token_ids(model, tokenizer)),
            "samples": config.samples,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_new_tokens": config.max_new_tokens,
            "seed": config.seed,
        },
    )
    done = {
        (row["row"], row["sample"]): Reply(tuple(row["tokens"]), row["text"], row["finished"])
        for row in _finished(output, group)
    }
    total = len(done) + group.count(len(prompts) * config.samples - len(done))
    with progress("generating", total, done=len(done)) as bar:

        def keep(batch: list[FinishedReply]) -> None:
            rows = [{"row": row, "sample": sample} | asdict(r) for row, sample, r in batch]
            first = "{:06d}-{:04d}".format(*batch[0][:2])  # no other batch begins with it
            write_json_lines(output.work / f"{first}.jsonl", rows, sealed=True)
            bar.advance(len(batch))

        return generate_replies(
            model,
            tokenizer,
            prompts,
            samples=config.samples,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            batch_size=config.batch_size,
            on_batch=keep,
            done=done,
            group=group,
        )


def _finished(output: Output, group: Group) -> list[dict[str, Any]]:
    """The lines of the finished batches, read by the main rank before any rank adds one."""
    return group.from_main(lambda: list(read_json_lines(sealed_files(output.work).values())))


def _check(
    config: EvaluateConfig,
    checker: Checker,
    questions: Sequence[Question],
    prompts: Sequence[Any],
    replies: Sequence[Sequence[Reply | ServedReply]],
) -> list[dict[str, Any]]:
    """The rows of samples.jsonl, question by question."""
    verdicts: dict[tuple[str, str], Verdict] = {}  # equal replies are checked once
    rows = []
    with progress("checking", len(questions)) as bar:
        for row, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
            for sample, reply in enumerate(replies[row]):
                key = (reply.text, question.answer)
                if key not in verdicts:
                    verdicts[key] = checker.check(*key)
                verdict = verdicts[key]
                counts = reply.finished or config.unfinished == "checked"
                rows.append(
                    {
                        "row": row,
                        "sample": sample,
                        "prompt": prompt,
                        "reply": reply.text,
                        "answer": question.answer,
                        "extracted": verdict.extracted,
                        "correct": verdict.correct and counts,
                        "matches": verdict.correct,
                        "problem": verdict.problem,
                        "finished": reply.finished,
                        "tokens": reply.length,
                    }
                )
            bar.advance()
    return rows
