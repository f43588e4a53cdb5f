"""README's example before and after: the same loss and gradients."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tiny
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

README = Path(__file__).parent.parent / "README.md"


def test_the_example_before_and_after_gives_the_same(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny.make_model(tmp_path / "model"))
    input_ids = torch.randint(64, (3, 9), generator=generator)
    labels = input_ids.masked_fill(torch.rand(3, 9, generator=generator) < 0.4, -100)
    names: dict[str, Any] = {
        "F": F,
        "model": model,
        "input_ids": input_ids,
        "labels": labels,
        "weights": torch.rand(3, 8, generator=generator),
        "num_tokens": int((labels[:, 1:] != -100).sum()),
    }
    found = []
    for block in blocks:
        exec(block, names)
        found.append((names["loss"], torch.autograd.grad(names["loss"], list(model.parameters()))))
    (before, gradients_before), (after, gradients_after) = found
    assert before > 0
    torch.testing.assert_close(after, before, rtol=1e-5, atol=0)
    for one, other in zip(gradients_after, gradients_before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
