"""An evaluation: its prompts, its metrics, and resuming after an interruption."""

import itertools
import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import gift.evaluate
from gift.config import EvaluateConfig
from gift.errors import InputError
from gift.evaluate import evaluate

SPECIAL = ["<pad>", "<bos>", "<end>", "<system>", "<user>", "<assistant>"]
WORDS = ["answer", "what", "is", "plus", "think", "be", "brief", *map(str, range(4))]
TEMPLATE = (
    "<bos>{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}<{{ m.role }}> {{ m.content }} <end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose tokenizer adds a BOS of its own to every text."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    words.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<end>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=96,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_data(path: Path, rows: list[Any] | None = None) -> Path:
    if rows is None:
        rows = [
            {"question": f"what is {n} plus {n // 2} " + "plus 1 " * (n % 3), "answer": n % 4}
            for n in range(9)
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def configure(model: Path, folder: Path, **options: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        "model": str(model),
        "data": folder / "data.jsonl",
        "output": folder / "out",
        "check": "exact",
        "answer_pattern": r"(\d)",
        "max_new_tokens": 12,
        "batch_size": 8,
        "device": "cpu",
    }
    if not settings["data"].exists():
        write_data(settings["data"])
    return EvaluateConfig(**settings | options)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_samples_and_metrics_are_written_and_agree(model, tmp_path):
    rows = [
        {"question": "what is 1 plus 1", "answer": n % 4, "level": "odd" if n % 2 else "even"}
        for n in range(10)
    ]
    config = configure(
        model, tmp_path, data=write_data(tmp_path / "d.jsonl", rows), group_by="level"
    )
    returned = evaluate(config)
    assert sorted(path.name for path in config.output.iterdir()) == [
        "gift_files.json",
        "metrics.json",
        "samples.jsonl",
        "speed.json",
    ]
    metrics = json.loads((config.output / "metrics.json").read_text())
    assert metrics == returned
    samples = read_lines(config.output / "samples.jsonl")
    assert [(s["row"], s["sample"]) for s in samples] == list(
        itertools.product(range(10), range(4))
    )
    for sample in samples:
        digits = [word for word in sample["reply"].split() if word.isdigit()]
        assert sample["answer"] == str(sample["row"] % 4)
        assert sample["extracted"] == (digits[-1] if digits else None)
        assert sample["matches"] == (sample["extracted"] == sample["answer"])
        assert sample["correct"] == (sample["matches"] and sample["finished"])
        assert sample["tokens"] == 12 or sample["finished"]
    by_row = [[s["correct"] for s in samples[start : start + 4]] for start in range(0, 40, 4)]
    means = [fmean(correct) for correct in by_row]
    assert 0 < metrics["accuracy"] < 1
    assert metrics["accuracy"] == pytest.approx(fmean(means))
    assert metrics["standard_error"] == pytest.approx(stdev(means) / math.sqrt(10))
    assert metrics["pass"]["1"]["estimate"] == pytest.approx(metrics["accuracy"])
    assert metrics["pass"]["4"]["estimate"] == pytest.approx(fmean(map(any, by_row)))
    assert list(metrics["pass"]) == ["1", "2", "3", "4"]
    assert metrics["unfinished"] == pytest.approx(fmean(not s["finished"] for s in samples))
    assert 0 < metrics["unfinished"] < 1
    assert metrics["mean_reply_tokens"] == pytest.approx(fmean(s["tokens"] for s in samples))
    assert metrics["groups"]["odd"]["accuracy"] == pytest.approx(fmean(means[1::2]))
    assert metrics["groups"]["even"]["questions"] == 5
    assert metrics["settings"]["temperature"] == 1.0 and metrics["model_hash"]


def test_the_prompt_is_the_chat_templates_with_a_single_bos(model, tmp_path, monkeypatch):
    asked: list[list[int]] = []
    original = gift.evaluate.generate_replies

    def spy(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        asked.extend(prompts)
        return original(model, tokenizer, prompts, **options)

    monkeypatch.setattr(gift.evaluate, "generate_replies", spy)
    rows = [
        {"problem": "what is 1", "answer": "1"},
        {"messages": [{"role": "user", "content": "what is 2"}], "answer": 2.0},
    ]
    config = configure(
        model,
        tmp_path,
        data=write_data(tmp_path / "d.jsonl", rows),
        system_prompt="be brief",
        prompt_suffix="think",
    )
    evaluate(config)
    samples = read_lines(config.output / "samples.jsonl")
    assert samples[0]["prompt"] == (
        "<bos><system> be brief <end><user> what is 1\nthink <end><assistant>"
    )
    assert samples[4]["answer"] == "2" and "what is 2\nthink" in samples[4]["prompt"]
    everything = [*SPECIAL, *WORDS]
    assert " ".join(everything[token] for token in asked[0]) == (
        "<bos> <system> be brief <end> <user> what is 1 think <end> <assistant>"
    )


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_evaluation_goes_on_and_ends_the_same(
    model, tmp_path, monkeypatch, stop_after
):
    config = configure(model, tmp_path)
    evaluate(config)
    names = ("metrics.json", "samples.jsonl")
    expected = [(config.output / name).read_bytes() for name in names]
    for path in config.output.iterdir():
        path.unlink()
    config.output.rmdir()

    load, prefills = gift.evaluate.load_causal_lm, []

    def load_failing(*arguments: Any) -> Any:
        loaded = load(*arguments)

        def count_and_fail(module: Any, args: Any, kwargs: Any) -> None:
            if kwargs["input_ids"].shape[1] > 1:
                prefills.append(kwargs["input_ids"])
            if len(prefills) > stop_after:
                raise RuntimeError("stopped")

        loaded.register_forward_pre_hook(count_and_fail, with_kwargs=True)
        return loaded

    monkeypatch.setattr(gift.evaluate, "load_causal_lm", load_failing)
    with pytest.raises(RuntimeError, match="stopped"):
        evaluate(config)
    assert not config.output.exists()
    assert len(list((tmp_path / "out.partial" / "work").glob("*.jsonl"))) == stop_after
    prefills.clear()
    stop_after = 5 - stop_after  # 36 replies in batches of 8 are 5 batches
    evaluate(config)
    assert len(prefills) == stop_after
    assert [(config.output / name).read_bytes() for name in names] == expected
    assert not (tmp_path / "out.partial").exists()


def test_unfinished_work_serves_another_batch_size_but_no_other_settings(
    model, tmp_path, monkeypatch, capfd
):
    def interrupt(config: EvaluateConfig) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(gift.evaluate, "_check", lambda *_: (_ for _ in ()).throw(OSError))
            with pytest.raises(OSError):
                evaluate(config)

    def made() -> int:
        parts = (tmp_path / "out.partial" / "work").glob("*.jsonl")
        return sum(len(read_lines(path)) for path in parts)

    interrupt(configure(model, tmp_path))
    assert made() == 36
    sorted((tmp_path / "out.partial" / "work").glob("*.jsonl"))[2].unlink()
    interrupt(configure(model, tmp_path, batch_size=3))
    assert made() == 36
    assert "starting over" not in capfd.readouterr().err
    interrupt(configure(model, tmp_path, temperature=0.5, samples=2))
    assert made() == 18
    assert "differs in samples, temperature" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("unfinished", ["wrong", "checked"])
def test_a_reply_without_end_counts_as_asked(model, tmp_path, unfinished):
    rows = [{"question": "what is", "answer": n % 4} for n in range(8)]
    config = configure(
        model,
        tmp_path,
        data=write_data(tmp_path / "d.jsonl", rows),
        unfinished=unfinished,
        max_new_tokens=4,
    )
    metrics = evaluate(config)
    samples = read_lines(config.output / "samples.jsonl")
    cut_right = [s["correct"] for s in samples if s["matches"] and not s["finished"]]
    assert metrics["unfinished_correct"] == len(cut_right) / len(samples) > 0
    assert set(cut_right) == {unfinished == "checked"}


def test_math_checks_meaning_and_reports_what_hangs_and_what_it_cannot_read(model, tmp_path):
    rows = [
        {"question": "what is 2", "answer": "\\frac{4}{2}"},
        {"question": "what is 3", "answer": "9^{9^{9^{9^9}}}"},
        {"question": "what is 1", "answer": "}"},
    ]
    config = configure(
        model,
        tmp_path,
        data=write_data(tmp_path / "d.jsonl", rows),
        check="math",
        check_timeout=2.0,
        samples=2,
        top_p=0.9,
        unfinished="checked",
    )
    metrics = evaluate(config)
    samples = read_lines(config.output / "samples.jsonl")
    assert all(s["matches"] == (s["extracted"] == "2") for s in samples[:2])
    hanging = [s for s in samples[2:4] if s["extracted"] is not None]
    assert metrics["check_timeouts"] == len(hanging) > 0
    assert all(s["problem"] == "timeout" and not s["correct"] for s in hanging)
    assert metrics["unreadable_answers"] == 1


def test_an_existing_output_is_refused_unless_overwritten(model, tmp_path):
    config = configure(model, tmp_path, limit=2, samples=1)
    evaluate(config)
    before = (config.output / "samples.jsonl").read_bytes()
    with pytest.raises(InputError, match="already exists"):
        evaluate(config)
    assert (config.output / "samples.jsonl").read_bytes() == before
    evaluate(config.model_copy(update={"overwrite": True, "limit": 3}))
    assert len(read_lines(config.output / "samples.jsonl")) == 3


def test_a_prompt_that_the_template_refuses_is_named(model, tmp_path):
    turns = [{"role": "tool", "content": "what"}, {"role": "user", "content": "is"}]
    data = write_data(tmp_path / "d.jsonl", [{"messages": turns, "answer": 1}])
    with pytest.raises(InputError, match=r"line 1: the chat template refuses.*no tools"):
        evaluate(configure(model, tmp_path, data=data))


def test_unknown_options_and_values_out_of_range_are_refused(model, tmp_path):
    for options in ({"temprature": 1}, {"samples": 0}, {"top_p": 0}, {"check": "fuzzy"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            configure(model, tmp_path, **options)
