"""FitConfig: how a world model is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class FitConfig:
    """How a world model is trained. Steps are optimiser updates, ``frames`` the length of a training window."""

    draft_steps: int = 6000
    steps: int = 2500
    draft_batch: int = 256
    batch: int = 16
    frames: int = 16
    draft_lr: float = 6e-3
    lr: float = 2e-3
    draft_ema: float = 0.999
    ema: float = 0.998
    weight_decay: float = 1e-4  # of both phases; more of it keeps dreams from running away where no data are
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            counts = ("draft_batch", "batch", "frames", "save_every")
            least = 1 if name in counts else 0
            if value < least or (name == "seed" and value >= 2**31):
                raise ValueError(f"{name} must be at least {least} (and a seed below 2**31), got {value}")
