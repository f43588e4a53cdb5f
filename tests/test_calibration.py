"""Calibration: each figure against a computation by hand, and the command on a real store."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from gift.annotate import annotate
from gift.calibration.command import calibration
from gift.calibration.kinds import kind_of, token_kinds
from gift.calibration.measures import auroc, by_kind, calibration_error, reliability
from gift.confidence_store import load_statistics, load_store
from gift.config import AnnotateConfig, CalibrationConfig, ImportScoresConfig
from gift.data.encoding import encode, read_rows
from gift.errors import InputError
from gift.scores import import_scores

REPLIES = ["The sum is 5.\n\nSo x = 5", "2 + 3 = 5", "The answer is 7.", "It is 1.5 + x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    tiny.make_model(folder / "instruct", "phi-head-bias", initializer_range=0.1)
    model = AutoModelForCausalLM.from_pretrained(folder / "instruct")
    with torch.no_grad():  # so that some targets, of several kinds, are its first choice
        for text in ("<|im_end|>", "5", " ", "."):
            model.lm_head.bias[tiny.make_tokenizer()(text)["input_ids"][-1]] += 3
    model.save_pretrained(folder / "instruct")
    rows = [
        {"instruction": f"What is {n} plus 3?", "response": REPLIES[n % 4], "right": n % 3 == 0}
        for n in range(12)
    ]
    del rows[5]["right"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    annotate(
        AnnotateConfig(
            model=str(folder / "instruct"),
            data=folder / "rows.jsonl",
            output=folder / "store",
            batch_tokens=150,
            guide_temperature=0.5,
            ignore_keys="right",
        )
    )
    return folder


def config(folder: Path, **options) -> CalibrationConfig:
    return CalibrationConfig(
        **{"store": folder / "store", "data": folder / "rows.jsonl", "resamples": 100, **options}
    )


def test_statistics_are_those_of_the_models_own_softmax(folder):
    store = load_store(folder / "store")
    statistics = load_statistics(store, "STORE")
    model = AutoModelForCausalLM.from_pretrained(folder / "instruct", dtype=torch.float32).eval()
    data = encode(read_rows(folder / "rows.jsonl"), store.tokenizer(), max_length=2048)
    expected = []
    for example in data.kept:
        ids = torch.from_numpy(example.input_ids).long()
        with torch.no_grad():
            p = torch.softmax(model(ids[None]).logits[0, :-1] / 0.5, -1)
        p, target = p[example.is_target[1:]], ids[example.is_target]
        largest = p.max(-1)
        expected.append(
            [largest.values, (largest.indices == target).float(), -(p * p.log()).sum(-1)]
        )
    truth = [torch.cat(values).numpy() for values in zip(*expected, strict=True)]
    np.testing.assert_allclose(statistics.largest, truth[0], rtol=2e-4)
    assert 0.05 < statistics.top1.mean() < 0.9, "or the next line would prove little"
    assert statistics.top1.dtype == bool and statistics.top1.tolist() == truth[1].tolist()
    np.testing.assert_allclose(statistics.entropy, truth[2], rtol=2e-4)


def test_reliability_is_by_the_largest_probability():
    largest = np.array([0.25, 0.3, 0.75, 1.0, 0.8, 0.9], np.float32)
    top1 = np.array([True, False, True, True, False, True])
    bands = reliability(largest, top1, 4)
    assert [(band["from"], band["to"], band["tokens"]) for band in bands] == [
        (0.25, 0.5, 2),
        (0.75, 1.0, 4),
    ]
    assert [band["first_choice_is_target"] for band in bands] == [0.5, 0.75]
    assert [band["mean_largest"] for band in bands] == pytest.approx([0.275, 0.8625])
    assert calibration_error(bands) == pytest.approx((2 * 0.225 + 4 * 0.1125) / 6)


def test_a_guide_that_is_right_as_often_as_it_says_has_no_error():
    generator = np.random.default_rng(1)
    largest = generator.uniform(0.2, 1, 100_000)
    bands = reliability(largest, generator.uniform(size=100_000) < largest, 10)
    assert calibration_error(bands) < 0.01
    overconfident = reliability(largest, generator.uniform(size=100_000) < largest**2, 10)
    assert calibration_error(overconfident) == pytest.approx(
        float(np.mean(largest - largest**2)), abs=0.01
    )


def test_share_by_kind_and_confidence():
    kinds = np.array(["word", "number", "word", "word"])
    found = by_kind(kinds, np.array([0.05, 0.1, 0.6, 0.95]), np.array([False, False, True, True]))
    assert [(kind["kind"], kind["tokens"], kind["share"]) for kind in found] == [
        ("all", 4, 1.0),
        ("word", 3, 0.75),
        ("number", 1, 0.25),
    ]
    assert list(found[1]["by_confidence"].values()) == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    assert list(found[2]["by_confidence"].values()) == [0, 1, 0, 0]
    assert found[1]["mean_confidence"] == pytest.approx(1.6 / 3)
    assert [kind["first_choice_is_target"] for kind in found] == pytest.approx([0.5, 2 / 3, 0])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *((text, "number") for text in ("5", " 12", "3.5", "٣", "1,000")),
        *((text, "operator") for text in ("+", " =", "-", "×", "≤", "**", "/")),
        *((text, "word") for text in ("sum", " x", "é", "x2", "答")),
        *((text, "line break") for text in ("\n", ".\n\n", " \n")),
        *((text, "other") for text in (".", " ", ",", "(", "\ufffd", "")),
    ],
)
def test_the_kind_of_a_token_is_what_its_text_is(text, kind):
    assert kind_of(text) == kind


def test_every_target_has_a_kind_and_a_turns_last_is_an_end(folder):
    tokenizer = load_store(folder / "store").tokenizer()
    data = encode(read_rows(folder / "rows.jsonl"), tokenizer, max_length=2048)
    kinds = token_kinds(data.kept, tokenizer)
    assert len(kinds) == sum(example.targets for example in data.kept)
    assert (kinds == "end").sum() == 12
    assert set(kinds) == {"end", "word", "number", "operator", "line break", "other"}
    first = kinds[: data.kept[0].targets].tolist()
    assert first[-2:] == ["number", "end"] and first.count("line break") in (1, 2)


def test_auroc_is_the_share_of_pairs_in_order_a_tie_counting_half():
    score = np.array([0.9, 0.5, 0.4, 0.5, 0.1])
    correct = np.array([True, True, False, False, True])
    # Of 3 × 2 pairs: 0.9 over both, 0.5 over one and level with one, 0.1 over none.
    found = auroc(score, correct, 200, 0)
    assert found is not None and found["auroc"] == pytest.approx(3.5 / 6)
    assert found["low"] <= found["auroc"] <= found["high"]
    assert found == auroc(score, correct, 200, 0)
    for right in (0, 1, 4, 5):
        assert auroc(score, np.arange(5) < right, 200, 0) is None


def test_the_interval_holds_the_truth_about_19_times_in_20():
    """Scores of right rows are larger by 1 standard deviation: the truth is Φ(1 / √2) = 0.7602."""
    generator, held = np.random.default_rng(3), []
    correct = np.arange(80) < 40
    for _ in range(150):
        found = auroc(generator.normal(size=80) + correct, correct, 200, 0)
        assert found is not None
        held.append(found["low"] <= 0.7602 <= found["high"])
    assert 0.88 < np.mean(held) < 0.99


def test_the_report_of_a_store_is_written_drawn_and_printed(folder, tmp_path, capsys):
    report = calibration(config(folder, correct_field="right", output=tmp_path / "report"))
    assert report == json.loads((tmp_path / "report" / "calibration.json").read_text())
    assert (tmp_path / "report" / "calibration.png").stat().st_size > 1000
    store = load_store(folder / "store")
    statistics = load_statistics(store, "STORE")
    assert sum(band["tokens"] for band in report["reliability"]) == report["tokens"]
    assert report["correctness"]["rows"] == 11 and report["correctness"]["correct"] == 4
    # By hand: pairs of a right and a wrong row.
    rows = [row for row in range(12) if row != 5]
    lowest = {row: store.row(row).min() for row in rows}
    pairs = [(a, b) for a in rows if a % 3 == 0 for b in rows if b % 3]
    area = np.mean([(lowest[a] > lowest[b]) + 0.5 * (lowest[a] == lowest[b]) for a, b in pairs])
    assert report["correctness"]["lowest_confidence"]["auroc"] == pytest.approx(float(area))
    surest = report["examples"]["sure_of_another"][0]
    assert surest["largest"] == pytest.approx(float(statistics.largest[~statistics.top1].max()))
    assert surest["confidence"] < surest["largest"]
    ids = encode(read_rows(folder / "rows.jsonl"), store.tokenizer(), max_length=2048)
    text = store.tokenizer().decode(ids.kept[surest["row"]].input_ids.tolist())
    assert surest["before"] + surest["target"] in text
    unsure = report["examples"]["unsure_and_right"]
    assert len(unsure) == 5
    assert all(e["confidence"] == pytest.approx(e["largest"], rel=1e-6) for e in unsure)
    printed = capsys.readouterr().out
    for words in ("expected calibration error", "line break", "AUROC", "[["):
        assert words in printed


def test_what_is_missing_or_wrong_is_one_error(folder, tmp_path):
    with pytest.raises(InputError, match="--correct-field: no row of .* has nothing"):
        calibration(config(folder, correct_field="nothing"))
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows[3]["right"] = "yes"
    changed = tmp_path / "rows.jsonl"
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"rows.jsonl, line 4: right is 'yes', not true or false"):
        calibration(config(folder, data=changed, correct_field="right"))
    rows[3]["response"] = "Other."
    changed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="STORE: row 3 of the data is not the row"):
        calibration(config(folder, data=changed))
    with pytest.raises(InputError, match="STORE: .* is no confidence store"):
        calibration(config(folder, store=tmp_path))


def test_imported_scores_have_no_calibration(folder, tmp_path):
    tokenizer = tiny.make_tokenizer()
    count = len(tokenizer("5")["input_ids"])
    row = {"instruction": "What?", "response": "5", "scores": [[0.5, 0.5]] * count}
    (tmp_path / "scores.jsonl").write_text(json.dumps(row) + "\n")
    import_scores(
        ImportScoresConfig(
            scores=tmp_path / "scores.jsonl",
            tokenizer=str(folder / "instruct"),
            output=tmp_path / "store",
        )
    )
    with pytest.raises(InputError, match="STORE: .* has confidences only .* gift annotate"):
        calibration(config(tmp_path, data=tmp_path / "scores.jsonl"))
