"""One file makes a merge method: everything else is read from what it defines."""

import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from gift.config import MergeOptions, StatisticsConfig
from gift.merge import methods
from gift.merge.method import Rows
from gift.merge.methods import METHODS

FOLDER = Path(methods.__file__).parent
EXAMPLE = re.compile(r"```python\n(.*?METHOD = .*?)```", re.DOTALL)


def test_every_file_is_the_method_it_is_named_for() -> None:
    files = {path.stem.replace("_", "-") for path in FOLDER.glob("*.py")} - {"--init--"}
    assert set(METHODS) == files


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_spelled_in_its_own_file_only(name: str) -> None:
    """But for the default of `gift merge --method`."""
    spelled = {
        str(path.relative_to(FOLDER.parent.parent))
        for path in FOLDER.parent.parent.rglob("*.py")
        if re.search(rf'"{name}"', path.read_text(encoding="utf-8"))
    }
    default = {"config/merge.py"} if name == "lora" else set()
    assert spelled == {f"merge/methods/{name.replace('-', '_')}.py"} | default


def test_settings_are_options_and_every_setting_is_read() -> None:
    settings = {setting for method in METHODS.values() for setting in method.settings}
    others = {"method", "untie_embeddings", "save_residual"}
    assert settings == set(MergeOptions.model_fields) - others


def test_choices_of_the_commands_are_the_registrys() -> None:
    for name in METHODS:
        assert MergeOptions(method=name).method == name
    with pytest.raises(ValidationError, match="Input should be 'dare', "):
        MergeOptions(method="lore")
    kinds = StatisticsConfig.model_fields["kind"].annotation.__args__  # pyright: ignore
    assert kinds == tuple(name for name in METHODS if METHODS[name].statistics)


def test_one_file_is_a_new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of CONTRIBUTING.md."""
    example = EXAMPLE.search((FOLDER.parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert example is not None
    (tmp_path / "mean.py").write_text(example[1], encoding="utf-8")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    found = methods.read_methods()
    assert found.keys() == METHODS.keys() | {"mean"}
    one, options = torch.tensor([[3.0]]), MergeOptions(task_weight=0.5)
    rows = Rows(one, None, [torch.tensor([[4.0]]), torch.tensor([[6.0]])])
    assert found["mean"].merge(rows, options).item() == 3 + 0.5 * (4 + 6) / 2
    assert found["mean"].sum_weight(options, 2, False) == 0.5 / 2
