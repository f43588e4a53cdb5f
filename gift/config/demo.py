"""Options of `gift demo`."""

from pathlib import Path

from pydantic import Field

from gift.config.options import OutputOptions


class DemoConfig(OutputOptions):
    """Options of `gift demo`."""

    output: Path = Field(description="The demo's folder; finished parts are kept.")
    overwrite: bool = Field(
        default=False, description="Repeat parts that have other settings or were damaged."
    )
    pairs: int = Field(
        default=2, ge=1, description="Base/instruct pairs to make, each from its own seed."
    )
    seeds: int = Field(
        default=3, ge=1, description="Task sets and adaptations per pair and method."
    )
    workers: int = Field(default=2, ge=1, description="Processes, each on its share of the cores.")
    clean: bool = Field(
        default=False,
        description="References without noise: a control in which direct fine-tuning is best.",
    )
    questions: int = Field(default=200, ge=4, description="Held-out questions per measure.")
    scale: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Factor on the models' training steps; below 1 for a quick trial.",
    )
