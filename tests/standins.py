"""The least that a comparison needs of planned trials and tasks, for the tests of comparison and report."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_modules.config import TrialConfig


@dataclass(frozen=True)
class Planned:
    trial_id: str
    role: str
    configuration: str
    seed: int
    config: TrialConfig
    task: str | None = None
    baselines: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    category: str
    metric: str = "accuracy"
