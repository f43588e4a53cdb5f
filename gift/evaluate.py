"""Evaluates a model on questions with known answers: generate, check, average.

A reply that did not end counts as wrong unless `unfinished` says otherwise: it has not committed to
an answer, and math-verify would take the last expression before the cut. `unfinished_correct`
reports the share of replies that match the reference but did not end: what this rule costs.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gift.answers import Checker, Verdict, open_checker
from gift.config import EvaluateConfig
from gift.console import print_summary, print_table, progress
from gift.files import hash_json, replacing, sealed_files, write_json
from gift.generation import FinishedReply, Reply, end_token_ids, generate_replies, reply_limits
from gift.metrics import pass_at_k, standard_error, summarize
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
from gift.publish import Output, output_folder, warn
from gift.questions import Question, read_questions, render_prompts

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
    resumes where an interrupted one stopped, and ends with the same files. `key` is stored in the
    folder's `gift_files.json`, see `publish.output_folder`.

    Raises:
        InputError: bad options, data or model, or an existing output.
    """
    with output_folder(config.output, overwrite=config.overwrite, key=key) as output:
        questions = read_questions(
            config.data,
            limit=config.limit,
            question_field=config.question_field,
            group_by=config.group_by,
            system_prompt=config.system_prompt,
            prompt_suffix=config.prompt_suffix,
            ignore=config.ignored_keys(),
        )
        with open_checker(config.check, config.answer_pattern, config.check_timeout) as checker:
            unreadable = _count_unreadable(checker, questions, config.data)
            folder = resolve_model(config.model)
            tokenizer = load_tokenizer(folder)
            texts = render_prompts(tokenizer, questions, config.data)
            weights = model_hash(folder)
            device = pick_device(config.device)
            model = load_causal_lm(folder, pick_dtype(config.dtype, device), device)
            prompts: list[list[int]] = [
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts
            ]
            require_embeddings(model, max(max(ids, default=0) for ids in prompts), config.model)
            limits = reply_limits(model, prompts, config.max_new_tokens)
            short = sum(limit < config.max_new_tokens for limit in limits)
            if short:
                warn(
                    f"{short} of {len(prompts)} questions leave less than --max-new-tokens "
                    f"{config.max_new_tokens} in the model's context, the least {min(limits)} "
                    "tokens"
                )
            replies = _generate(config, model, weights, tokenizer, prompts, output)
            samples = _check(config, checker, questions, texts, replies)
        _write_lines(output.partial / "samples.jsonl", samples)
        metrics = summarize(samples, [question.group for question in questions])
        metrics |= {
            "unreadable_answers": unreadable,
            "questions_cut_by_context": short,
            "settings": config.model_dump(mode="json"),
            "device": str(model.device),
            "dtype": str(model.dtype).removeprefix("torch."),
            "model_hash": weights,
            "data_hash": hash_json([asdict(question) for question in questions]),
            "versions": versions(),
        }
        write_json(output.partial / "metrics.json", metrics)
    _print(config, metrics)
    return metrics


def _count_unreadable(checker: Checker, questions: Sequence[Question], data: Path) -> int:
    """Counts, and warns of, references in which math-verify finds no expression to compare."""
    unreadable = [question for question in questions if not checker.can_read(question.answer)]
    if unreadable:
        warn(
            f"math-verify cannot read {len(unreadable)} of {len(questions)} answers in {data}, "
            f"the first in line {unreadable[0].line}: {unreadable[0].answer!r}; only the same text "
            "counts as right there"
        )
    return len(unreadable)


def _generate(
    config: EvaluateConfig,
    model: PreTrainedModel,
    weights_hash: str,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    output: Output,
) -> list[list[Reply]]:
    """All replies [row][sample]: loads those in the work folder, generates and saves the rest."""
    # Everything that determines the replies. Not the batch size, so that a run that went out of
    # memory can resume with a smaller one; nor the reference answers and the check.
    output.begin(
        {
            "model": weights_hash,
            "tokenizer": tokenizer_hash(tokenizer),
            "end tokens": list(end_token_ids(model, tokenizer)),
            "prompts": hash_json(prompts),
            "samples": config.samples,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "max_new_tokens": config.max_new_tokens,
            "seed": config.seed,
            "device": model.device.type,
            "dtype": str(model.dtype),
        }
    )
    kept = sealed_files(output.work)
    done = _read_replies(kept.values())
    number = 1 + max((int(Path(name).stem) for name in kept), default=-1)
    with progress("generating", len(prompts) * config.samples, done=len(done)) as bar:

        def keep(batch: list[FinishedReply]) -> None:
            nonlocal number
            rows = [{"row": row, "sample": sample} | asdict(r) for row, sample, r in batch]
            _write_lines(output.work / f"{number:06d}.jsonl", rows, sealed=True)
            number += 1
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
        )


def _read_replies(parts: Iterable[Path]) -> dict[tuple[int, int], Reply]:
    done = {}
    for path in parts:
        for line in path.read_text(encoding="utf-8").splitlines():
            kept = json.loads(line)
            reply = Reply(tuple(kept["tokens"]), kept["text"], kept["finished"])
            done[kept["row"], kept["sample"]] = reply
    return done


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
    count = metrics["samples"]
    shown = [n for n in (1, 2, 4, 8, 16, 32, 64) if 1 < n < count] + [count] * (count > 1)
    print_summary(
        f"Evaluation of {config.model}",
        {
            "questions": metrics["questions"],
            f"avg@{count}": _percent(metrics["accuracy"], metrics["standard_error"]),
            **{
                f"pass@{n}": _percent(
                    metrics["pass"][str(n)]["estimate"], metrics["pass"][str(n)]["standard_error"]
                )
                for n in shown
            },
            "unfinished replies": _percent(metrics["unfinished"]),
            "replies without an answer": _percent(metrics["no_answer_found"]),
            "mean reply tokens": f"{metrics['mean_reply_tokens']:.1f}",
            "check timeouts": metrics["check_timeouts"],
            "check crashes": metrics["check_crashes"],
            "written to": config.output,
        },
    )
    if metrics["groups"]:
        print_table(
            f"By {config.group_by}",
            (str(config.group_by), "questions", f"avg@{count}"),
            [
                (
                    name,
                    str(group["questions"]),
                    _percent(group["accuracy"], group["standard_error"]),
                )
                for name, group in metrics["groups"].items()
            ],
        )
    if metrics["unfinished"] > WARN_UNFINISHED:
        warn(
            f"{_percent(metrics['unfinished'])} of the replies did not end within "
            f"{config.max_new_tokens} tokens or the model's context; raise --max-new-tokens, or "
            "the model does not use its end token"
        )


def _percent(share: float, error: float | None = None) -> str:
    return f"{share:.1%}" + ("" if error is None else f" ± {100 * error:.1f}")
