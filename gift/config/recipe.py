"""A command's options from a YAML recipe and flags."""

from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gift.errors import InputError

Config = TypeVar("Config", bound=BaseModel)


def build_config(
    model: type[Config], recipe: Path | None, flags: dict[str, Any], command: str = ""
) -> Config:
    """A config from a YAML recipe and flags; flags take precedence, all mistakes are reported.

    `flags` holds only what the user gave.
    """
    values = _read_recipe(recipe) if recipe is not None else {}
    unknown = sorted(set(values) - set(model.model_fields))
    if unknown:
        known = ", ".join(sorted(model.model_fields))
        raise InputError(f"{recipe}: unknown key {', '.join(unknown)}; the keys are {known}")
    try:
        return model.model_validate({**values, **flags})
    except ValidationError as error:
        problems = [_sentence(problem, recipe, flags) for problem in error.errors()]
        raise InputError("; ".join(problems)) from None


class _Loader(yaml.SafeLoader):
    """Refuses a mapping that has a key twice; YAML keeps the last in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, count in keys.items() if count > 1]:
            line = node.start_mark.line + 1
            raise InputError(
                f"{', '.join(twice)} is there twice, in the mapping from line {line}; keep one"
            )
        return node


def _read_recipe(recipe: Path) -> dict[str, Any]:
    """The recipe's values by their options' names; InputError where one is there twice."""
    try:
        content = yaml.load(recipe.read_text(encoding="utf-8"), _Loader)  # a safe loader
    except FileNotFoundError:
        raise InputError(f"--config: {recipe}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"--config: {recipe}: is a folder; give the recipe's file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise InputError(f"--config: {recipe}: not valid YAML ({detail})") from None
    except InputError as error:
        raise InputError(f"--config: {recipe}: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"--config: {recipe}: expected a mapping of option names to values")
    names = Counter(key.replace("-", "_") for key in content)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"--config: {recipe}: {', '.join(twice)} is there twice; keep one")
    return {key.replace("-", "_"): value for key, value in content.items()}


def _sentence(problem: Any, recipe: Path | None, flags: dict[str, Any]) -> str:
    ours = problem.get("ctx", {}).get("error")
    if isinstance(ours, InputError):
        return str(ours)
    return f"{_place(problem, recipe, flags)}: {_reason(problem)}"


def _place(problem: Any, recipe: Path | None, flags: dict[str, Any]) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else "options"
    flag = f"--{name.replace('_', '-')}"
    if name in flags or recipe is None:
        return flag
    return f"{recipe}: {'.'.join(map(str, problem['loc']))}"


def _reason(problem: Any) -> str:
    if problem["type"] == "missing":
        return "is required"
    return f"{problem['msg'].lower()}, got {problem['input']!r}"
