"""The confidence store: its values, its resumption, its importer."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import gift.annotate as annotate_module
import gift.annotation.batches as annotation_batches
from gift.annotate import annotate
from gift.confidence_store import CONFIDENCE_FILE, load_store
from gift.config import AnnotateConfig, ImportScoresConfig
from gift.data.batches import make_batch, plan_batches
from gift.data.encoding import encode, read_rows
from gift.errors import InputError
from gift.models.head import check_head, lm_head
from gift.models.loading import context_length, load_causal_lm
from gift.models.tokenizer import load_tokenizer
from gift.scores import import_scores
from gift.storage.files import replacing
from gift.storage.publish import partial_path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("annotate")
    tiny.make_model(folder / "instruct", "qwen2")
    tiny.write_rows(folder / "rows.jsonl")
    return folder


def config(folder: Path, output: Path, **options) -> AnnotateConfig:
    settings = {"model": str(folder / "instruct"), "data": folder / "rows.jsonl", **options}
    return AnnotateConfig(output=output, **settings)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_confidence_is_softmax_of_the_models_own_float32_logits(architecture, tmp_path):
    tiny.make_model(tmp_path / "instruct", architecture)
    tiny.write_rows(tmp_path / "rows.jsonl", 5)
    annotate(config(tmp_path, tmp_path / "store", batch_tokens=100))
    store = load_store(tmp_path / "store")
    tokenizer = store.tokenizer()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "instruct", dtype=torch.float32).eval()
    data = encode(read_rows(tmp_path / "rows.jsonl"), tokenizer, max_length=2048)
    for example in data.kept:
        ids = torch.from_numpy(example.input_ids).long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].float()
        probability = torch.softmax(logits, -1).gather(1, ids[1:, None]).squeeze(1)
        expected = probability[torch.from_numpy(example.is_target[1:])].numpy()
        np.testing.assert_allclose(store.row(example.row), expected, rtol=2e-4, atol=1e-9)
        # A store of one constant would pass a loose bound.
        assert expected.std() > 1e-5
    assert store.confidence.dtype == np.float32 and store.offsets.dtype == np.int64


def test_a_head_that_does_something_else_is_refused(tmp_path):
    tiny.make_model(tmp_path / "instruct", "gemma2")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "instruct").eval()
    ids = torch.arange(5, 25)
    check_head(model, ids)
    assert lm_head(model).logit_softcap == 2.0
    forward = type(model).forward

    def shifted(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = shifted.__get__(model)
    with pytest.raises(InputError, match="its head does something that is not a bias"):
        check_head(model, ids)


def test_weights_that_are_nan_are_named_as_such(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "instruct").eval()
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"the model's loss is nan: its weights are damaged"):
        check_head(model, torch.arange(5, 12))


def test_batch_size_does_not_change_the_confidence(folder, tmp_path):
    annotate(config(folder, tmp_path / "one", batch_tokens=1))
    annotate(config(folder, tmp_path / "many", batch_tokens=10_000))
    one, many = load_store(tmp_path / "one"), load_store(tmp_path / "many")
    np.testing.assert_allclose(one.confidence, many.confidence, rtol=1e-4)
    assert one.offsets.tolist() == many.offsets.tolist()


def test_batches_hold_every_row_within_the_budget(folder):
    examples = encode_rows(folder)
    lengths = [len(example.input_ids) for example in examples]
    for packed in (True, False):
        batches = plan_batches(lengths, 120, packed=packed)
        assert sorted(number for batch in batches for number in batch) == list(range(12))
        for numbers in batches:
            chosen = [lengths[number] for number in numbers]
            tokens = sum(chosen) if packed else max(chosen) * len(chosen)
            assert len(numbers) == 1 or tokens <= 120
        batch = make_batch([examples[number] for number in batches[-1]], packed=packed)
        ids = batch.inputs["input_ids"].flatten()
        assert ids[batch.predicts + 1].tolist() == batch.targets.tolist()
        expected = [examples[n].input_ids[examples[n].is_target] for n in batches[-1]]
        assert batch.targets.tolist() == np.concatenate(expected).tolist()
    at_most_two = plan_batches(lengths, 1000, packed=True, rows=2)
    assert [len(batch) for batch in at_most_two] == [2] * 6


def test_interrupted_annotation_gives_the_same_bytes(folder, tmp_path, monkeypatch):
    options = {"batch_tokens": 60, "part_batches": 2}
    annotate(config(folder, tmp_path / "whole", **options))
    calls = []
    real = annotation_batches.annotate_batch

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(annotation_batches, "annotate_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        annotate(config(folder, tmp_path / "cut", **options))
    assert not (tmp_path / "cut").exists() and partial_path(tmp_path / "cut").exists()
    before = len(calls)
    annotate(config(folder, tmp_path / "cut", **options))
    lengths = [len(example.input_ids) for example in encode_rows(folder)]
    total = len(plan_batches(lengths, 60, packed=True))
    assert len(calls) - before == total - 3, "the finished parts must not be computed again"
    for name in ("confidence.safetensors", "tokenizer/tokenizer.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    whole, cut = (
        json.loads((tmp_path / n / "manifest.json").read_text()) for n in ("whole", "cut")
    )
    assert whole == cut
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def encode_rows(folder: Path):
    tokenizer = load_tokenizer(folder / "instruct")
    return encode(read_rows(folder / "rows.jsonl"), tokenizer, max_length=2048).kept


def test_parts_of_other_settings_are_not_reused(folder, tmp_path, monkeypatch):
    options = {"batch_tokens": 60, "part_batches": 1}
    real = annotation_batches.annotate_batch
    calls = []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(annotation_batches, "annotate_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        annotate(config(folder, tmp_path / "store", **options))
    monkeypatch.undo()
    annotate(config(folder, tmp_path / "store", guide_temperature=3.0, **options))
    annotate(config(folder, tmp_path / "fresh", guide_temperature=3.0, **options))
    assert (tmp_path / "store/confidence.safetensors").read_bytes() == (
        tmp_path / "fresh/confidence.safetensors"
    ).read_bytes()


def test_only_this_runs_parts_are_collected(folder, tmp_path, monkeypatch):
    """A sealed file of another name has the same rows, in a shape of its own."""
    annotate(config(folder, tmp_path / "whole"))
    real = annotate_module._annotate_batches

    def beside(*args):
        done = real(*args)
        work = partial_path(tmp_path / "store") / "work"
        with replacing(work / "zzz-00000.safetensors", sealed=True) as temporary:
            rows = {str(row): np.zeros(3, np.float32) for row in range(12)}
            save_file(rows, temporary)
        return done

    monkeypatch.setattr(annotate_module, "_annotate_batches", beside)
    annotate(config(folder, tmp_path / "store"))
    whole, store = ((tmp_path / n / CONFIDENCE_FILE).read_bytes() for n in ("whole", "store"))
    assert whole == store


def test_parts_of_padded_rows_are_not_reused_for_packed_ones(folder, tmp_path, monkeypatch, capsys):
    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(annotate_module, "enable_packing", lambda *_: False)
        patch.setattr(annotate_module, "collect_parts", cut)
        with pytest.raises(KeyboardInterrupt):
            annotate(config(folder, tmp_path / "store"))
    annotate(config(folder, tmp_path / "store"))
    assert "differs in layout" in " ".join(capsys.readouterr().err.split())


def test_dropped_rows_have_length_zero_and_a_reason(folder, tmp_path):
    rows = (folder / "rows.jsonl").read_text() + json.dumps({"instruction": "a", "response": ""})
    (tmp_path / "rows.jsonl").write_text(rows + "\n")
    summary = annotate(
        config(folder, tmp_path / "store", data=tmp_path / "rows.jsonl", max_dropped=0.1)
    )
    store = load_store(tmp_path / "store")
    assert summary["rows_dropped"] == 1 and len(store.row(12)) == 0
    assert store.manifest["data"]["lost"] == [
        {"row": 12, "action": "dropped", "reason": "no assistant text"}
    ]


def test_existing_output_is_refused_and_kept(folder, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "mine").write_text("keep")
    with pytest.raises(InputError, match=r"--output: .*store already exists; .* --overwrite"):
        annotate(config(folder, tmp_path / "store"))
    assert (tmp_path / "store" / "mine").read_text() == "keep"
    annotate(config(folder, tmp_path / "store", overwrite=True))
    assert not (tmp_path / "store" / "mine").exists()


def test_model_smaller_than_the_tokenizer_is_refused(folder, tmp_path):
    tiny.make_model(tmp_path / "small", "llama", vocab_size=40, eos_token_id=2, pad_token_id=3)
    with pytest.raises(InputError, match="40 token embeddings, but the tokenizer gives id"):
        annotate(config(folder, tmp_path / "store", model=str(tmp_path / "small")))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing/model", "no such folder, and not available from the hub"),
        ("/no/such/folder", "expected a model folder or a hub id"),
    ],
)
def test_missing_models_are_one_clear_error(folder, tmp_path, monkeypatch, model, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message):
        annotate(config(folder, tmp_path / "store", model=model))


def test_authors_scores_become_a_store(folder, tmp_path):
    """One pair per response token, the end of turn left out."""
    conversations, examples = read_rows(folder / "rows.jsonl"), encode_rows(folder)
    rows, values = [], []
    for conversation, example in zip(conversations, examples, strict=True):
        scores = [round(math.exp(-number / 7), 6) for number in range(example.targets - 1)]
        values.append([*scores, 0.25])
        question, reply = (turn["content"] for turn in conversation.turns)
        pairs = [[score, score] for score in scores]
        rows.append({"instruction": question, "response": reply, "scores": pairs})
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"scores": path, "tokenizer": str(folder / "instruct"), "end_confidence": 0.25}
    import_scores(ImportScoresConfig(output=tmp_path / "store", **options))
    store = load_store(tmp_path / "store")
    for row, expected in enumerate(values):
        np.testing.assert_allclose(store.row(row), expected, rtol=1e-6)
    rows[4]["scores"] = rows[4]["scores"][:-2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="row 4 has .* scores, its response has .* tokens"):
        import_scores(ImportScoresConfig(output=tmp_path / "other", **options))
    assert not (tmp_path / "other").exists()


def test_damaged_stores_are_named(folder, tmp_path):
    annotate(config(folder, tmp_path / "store"))
    tensors = (tmp_path / "store/confidence.safetensors").read_bytes()
    (tmp_path / "store/confidence.safetensors").write_bytes(tensors[:50])
    with pytest.raises(InputError, match="confidence.safetensors: has 50 bytes, .* were written"):
        load_store(tmp_path / "store")
    with pytest.raises(InputError, match="is no confidence store"):
        load_store(tmp_path)


def test_rows_are_shown_with_their_targets_and_nothing_is_written(folder, tmp_path, capsys):
    tiny.make_model(tmp_path / "guide", "qwen2")
    (tmp_path / "guide/model.safetensors").unlink()
    annotate(config(folder, tmp_path / "store", model=str(tmp_path / "guide"), show_rows=2))
    shown = capsys.readouterr().out
    assert "[[The answer is 0.<|im_end|>]]" in shown and "row 1: " in shown
    assert "row 2: " not in shown and "\x1b" not in shown
    example = encode_rows(folder)[0]
    assert f"row 0: {len(example.input_ids)} tokens, {example.targets} targets" in shown
    assert not (tmp_path / "store").exists() and not partial_path(tmp_path / "store").exists()


def test_rows_beyond_the_guides_context_are_counted(folder, tmp_path):
    tiny.make_model(tmp_path / "guide", "qwen2", max_position_embeddings=45)
    options = {"model": str(tmp_path / "guide"), "max_dropped": 1.0}
    summary = annotate(config(folder, tmp_path / "store", **options))
    lost = load_store(tmp_path / "store").manifest["data"]["lost"]
    assert 0 < summary["rows_dropped"] == len(lost) < 12
    assert all("the model's context is 45" in loss["reason"] for loss in lost)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 512),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 2048),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 256,
                }
            },
            1024,
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            512,
        ),
    ],
    ids=["plain", "linear", "yarn", "llama3"],
)
def test_a_models_context_counts_its_rope_scaling(options, expected):
    assert context_length(LlamaConfig(max_position_embeddings=512, **options)) == expected
    assert context_length(GPT2Config(n_positions=96)) == 96


def test_weights_that_the_model_does_not_read_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.make_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    load_causal_lm(folder, torch.float32, torch.device("cpu"))
    message = capsys.readouterr().err
    assert "does not read model.layers." in message and "warning" in message
