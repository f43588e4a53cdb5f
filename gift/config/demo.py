"""Options of `gift demo`."""

from pydantic import Field

from gift.config.options import OutputOptions


class DemoConfig(OutputOptions):
    """Options of `gift demo`."""

    pairs: int = Field(
        default=2, ge=1, description="Base/instruct pairs to make, each from its own seed."
    )
    seeds: int = Field(
        default=3, ge=1, description="Task sets and adaptations per pair and method."
    )
    workers: int = Field(
        default=2, ge=1, description="Processes; each works on one pair, on one core."
    )
    clean: bool = Field(
        default=False,
        description="References without noise: a control in which direct fine-tuning is best.",
    )
    questions: int = Field(default=200, ge=4, description="Held-out questions per measure.")
    scale: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the pair's training steps; less is only a trial.",
    )
