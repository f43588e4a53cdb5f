"""Evaluates a model on questions with known answers: generate and check, or choose; average.

A reply that did not end counts as wrong unless `unfinished` says otherwise: it has not committed to
an answer, and math-verify would take the last expression before the cut. `unfinished_correct`
reports the share of replies that match the reference but did not end: what this rule costs.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift import ranks
from gift.answers import Checker, Verdict, open_checker
from gift.benchmarks import BENCHMARKS, MATH_PROMPT, benchmark_rows
from gift.choices import CHOICE_PROMPT, rate_options
from gift.config import EvaluateConfig
from gift.console import print_summary, print_table, progress
from gift.errors import InputError
from gift.files import hash_json, replacing, sealed_files, write_json
from gift.generation import FinishedReply, Reply, end_token_ids, generate_replies, reply_limits
from gift.metrics import pass_at_k, standard_error, summarize, summarize_choices
from gift.models import (
    load_causal_lm,
    load_tokenizer,
    model_hash,
    pick_device,
    pick_dtype,
    require_embeddings,
    resolve_model,
    tokenizer_hash,
    versions,
)
from gift.publish import Output, warn
from gift.questions import LETTERS, Question, read_questions, render_prompts
from gift.ranks import Group
from gift.rows import json_lines

__all__ = [
    "Reply",
    "evaluate",
    "generate_replies",
    "pass_at_k",
    "standard_error",
]

WARN_UNFINISHED = 0.2


def evaluate(config: EvaluateConfig, key: str = "") -> dict[str, Any]:
    """Generates, checks and writes samples.jsonl and metrics.json; returns the metrics.

    Finished batches stay in OUTPUT.partial, so that a call with the same settings, model and data
    resumes where an interrupted one stopped, and ends with the same files. Several ranks share the
    batches; the main one checks, writes and returns the metrics, the others return nothing. `key`
    is stored in the folder's `gift_files.json`, see `publish.output_folder`.

    Raises:
        InputError: bad options, data or model, or an existing output.
    """
    check = config.check_by()
    with (
        ranks.process_group(on_host=True) as group,
        ranks.shared_folder(group, config.output, overwrite=config.overwrite, key=key) as output,
    ):
        questions, source = asked_questions(config, check)
        with nullcontext() if check == "choice" else _checker(config, check) as checker:
            unreadable = _count_unreadable(checker, questions) if checker and group.is_main else 0
            folder = resolve_model(config.model)
            tokenizer = load_tokenizer(folder)
            prompts = render_prompts(tokenizer, questions)
            weights = model_hash(folder)
            device = pick_device(config.device)
            model = load_causal_lm(folder, pick_dtype(config.dtype, device), device)
            inputs: list[list[int]] = [
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts
            ]
            require_embeddings(model, max(max(ids, default=0) for ids in inputs), config.model)
            # Everything that determines what the model says. Not the batch size, so that a run that
            # went out of memory can resume with a smaller one; nor the answers and the check.
            made_from = {
                "model": weights,
                "tokenizer": tokenizer_hash(tokenizer),
                "prompts": hash_json(inputs),
                "device": model.device.type,
                "dtype": str(model.dtype),
            }
            groups = [question.group for question in questions]
            if checker is None:
                scores = _rate(
                    config, model, made_from, tokenizer, questions, prompts, output, group
                )
                if not group.is_main:
                    return {}
                samples = _chosen(scores, questions, prompts)
                metrics = summarize_choices(samples, groups)
            else:
                short = _count_short(config, model, inputs)
                replies = _generate(config, model, made_from, tokenizer, inputs, output, group)
                if not group.is_main:
                    return {}
                samples = _check(config, checker, questions, prompts, replies)
                metrics = summarize(samples, groups)
                metrics |= {"unreadable_answers": unreadable, "questions_cut_by_context": short}
        _write_lines(output.partial / "samples.jsonl", samples)
        metrics |= {
            "data": source,
            "settings": config.model_dump(mode="json"),
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "model_hash": weights,
            "data_hash": hash_json([{**asdict(question), "place": ""} for question in questions]),
            "versions": versions(),
        }
        write_json(output.partial / "metrics.json", metrics)
    _print(config, metrics)
    return metrics


def asked_questions(config: EvaluateConfig, check: str) -> tuple[list[Question], dict[str, Any]]:
    """The questions, and where they come from; InputError where neither option says it."""
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
    """InputError where `evaluate` could not ask or check these questions, whatever the model."""
    check = config.check_by()
    if check != "choice":
        _checker(config, check)
    asked_questions(config, check)


def _checker(config: EvaluateConfig, check: Literal["exact", "math"]) -> Checker:
    return open_checker(check, config.answer_pattern, config.check_timeout)


def _count_unreadable(checker: Checker, questions: Sequence[Question]) -> int:
    """Counts, and warns of, references in which math-verify finds no expression to compare."""
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
    """Counts, and warns of, questions that leave less than `max_new_tokens` in the context."""
    limits = reply_limits(model, inputs, config.max_new_tokens)
    short = sum(limit < config.max_new_tokens for limit in limits)
    if short:
        warn(
            f"{short} of {len(inputs)} questions leave less than --max-new-tokens "
            f"{config.max_new_tokens} in the model's context, the least {min(limits)} tokens"
        )
    return short


def _rate(
    config: EvaluateConfig,
    model: PreTrainedModel,
    made_from: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    prompts: Sequence[str],
    output: Output,
    group: Group,
) -> list[list[float]]:
    """The scores of all options [row][option]: loads finished batches, rates the rest."""
    options = [len(question.choices or ()) for question in questions]
    ranks.begin_shared(group, output, {**made_from, "options": options})
    done = {row["row"]: row["scores"] for row in _finished_lines(output, group)}
    total = len(done) + group.count(len(prompts) - len(done))
    with progress("choosing", total, done=len(done)) as bar:

        def keep(batch: dict[int, list[float]]) -> None:
            rows = [{"row": row, "scores": scores} for row, scores in batch.items()]
            _write_lines(output.work / f"{min(batch):06d}.jsonl", rows, sealed=True)
            bar.advance(len(batch))

        return rate_options(
            model,
            tokenizer,
            questions,
            prompts,
            batch_size=config.batch_size,
            done=done,
            on_batch=keep,
            group=group,
        )


def _chosen(
    scores: Sequence[Sequence[float]], questions: Sequence[Question], prompts: Sequence[str]
) -> list[dict[str, Any]]:
    """The rows of samples.jsonl of multiple choices."""
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
        for row in _finished_lines(output, group)
    }
    total = len(done) + group.count(len(prompts) * config.samples - len(done))
    with progress("generating", total, done=len(done)) as bar:

        def keep(batch: list[FinishedReply]) -> None:
            rows = [{"row": row, "sample": sample} | asdict(r) for row, sample, r in batch]
            first = "{:06d}-{:04d}".format(*batch[0][:2])  # no other batch begins with it
            _write_lines(output.work / f"{first}.jsonl", rows, sealed=True)
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


def _finished_lines(output: Output, group: Group) -> list[dict[str, Any]]:
    """The lines of the finished batches, as the main rank finds them before any rank adds one."""
    return group.from_main(lambda: list(_read_lines(sealed_files(output.work).values())))


def _read_lines(parts: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in parts:
        for line in path.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]], *, sealed: bool = False) -> None:
    with replacing(path, sealed=sealed) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _check(
    config: EvaluateConfig,
    checker: Checker,
    questions: Sequence[Question],
    texts: Sequence[str],
    replies: Sequence[Sequence[Reply]],
) -> list[dict[str, Any]]:
    """The rows of samples.jsonl, question by question."""
    verdicts: dict[tuple[str, str], Verdict] = {}  # equal replies are checked once
    rows = []
    with progress("checking", len(questions)) as bar:
        for row, (question, text) in enumerate(zip(questions, texts, strict=True)):
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
                        "prompt": text,
                        "reply": reply.text,
                        "answer": question.answer,
                        "extracted": verdict.extracted,
                        "correct": verdict.correct and counts,
                        "matches": verdict.correct,
                        "problem": verdict.problem,
                        "finished": reply.finished,
                        "tokens": len(reply.tokens),
                    }
                )
            bar.advance()
    return rows


def _print(config: EvaluateConfig, metrics: dict[str, Any]) -> None:
    accuracy = _percent(metrics["accuracy"], metrics["standard_error"])
    shown: dict[str, Any] = {"questions": metrics["questions"]}
    if "samples" in metrics:
        mean = f"avg@{metrics['samples']}"
        shown |= {mean: accuracy, **_reply_figures(metrics)}
    else:
        mean = "accuracy"
        right = _percent(metrics["mean_probability_of_answer"])
        shown |= {mean: accuracy, "mean probability of the right option": right}
    print_summary(f"Evaluation of {config.model}", shown | {"written to": config.output})
    if metrics["groups"]:
        print_table(
            "By group",
            ("group", "questions", mean),
            [
                (
                    name,
                    str(group["questions"]),
                    _percent(group["accuracy"], group["standard_error"]),
                )
                for name, group in metrics["groups"].items()
            ],
        )
    if metrics.get("unfinished", 0) > WARN_UNFINISHED:
        warn(
            f"{_percent(metrics['unfinished'])} of the replies did not end within "
            f"{config.max_new_tokens} tokens or the model's context; raise --max-new-tokens, or "
            "the model does not use its end token"
        )


def _reply_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    count, estimates = metrics["samples"], metrics["pass"]
    shown = [n for n in (1, 2, 4, 8, 16, 32, 64) if 1 < n < count] + [count] * (count > 1)
    return {
        **{
            f"pass@{n}": _percent(
                estimates[str(n)]["estimate"], estimates[str(n)]["standard_error"]
            )
            for n in shown
        },
        "unfinished replies": _percent(metrics["unfinished"]),
        "replies without an answer": _percent(metrics["no_answer_found"]),
        "mean reply tokens": f"{metrics['mean_reply_tokens']:.1f}",
        "check timeouts": metrics["check_timeouts"],
        "check crashes": metrics["check_crashes"],
    }


def _percent(share: float, error: float | None = None) -> str:
    return f"{share:.1%}" + ("" if error is None else f" ± {100 * error:.1f}")
