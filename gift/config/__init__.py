"""Every command's options, a file a command; `recipe` reads them from a YAML file and flags."""

from gift.config.annotate import (
    AnnotateConfig,
    AnnotateOptions,
    CalibrationConfig,
    ImportScoresConfig,
)
from gift.config.demo import DemoConfig
from gift.config.evaluate import EvaluateConfig, EvaluateOptions
from gift.config.merge import DiffConfig, MergeConfig, MergeOptions, StatisticsConfig, UnmergeConfig
from gift.config.options import DataOptions, DeviceOptions, Options, OutputOptions
from gift.config.run import RunConfig, RunOptions
from gift.config.study import ReportConfig, StudyConfig
from gift.config.train import TrainConfig, TrainOptions

__all__ = [
    "AnnotateConfig",
    "AnnotateOptions",
    "CalibrationConfig",
    "DataOptions",
    "DemoConfig",
    "DeviceOptions",
    "DiffConfig",
    "EvaluateConfig",
    "EvaluateOptions",
    "ImportScoresConfig",
    "MergeConfig",
    "MergeOptions",
    "Options",
    "OutputOptions",
    "ReportConfig",
    "RunConfig",
    "RunOptions",
    "StatisticsConfig",
    "StudyConfig",
    "TrainConfig",
    "TrainOptions",
    "UnmergeConfig",
]
