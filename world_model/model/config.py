"""WorldModelConfig: every setting that determines a world model's weights and shapes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

LAYER_KINDS = {"S": "sliding window", "D": "dilated sliding window", "G": "gated delta rule"}


@dataclass(frozen=True)
class WorldModelConfig:
    """The settings of a world model; ``window``, ``dilation`` and ``chunk`` are in frames.

    ``pattern`` has one letter a layer: S sliding window, D dilated sliding window, G gated delta rule
    (Kairos, arXiv 2606.16533, repeats S,S,D,G). ``draft=False`` is the plain Kairos form: the transformer alone. Sizes
    below 1 and unknown letters raise ValueError.
    """

    obs_dim: int  # O
    action_dim: int  # A
    pattern: str = "SGDG"
    chunk: int = 4  # the longest K that one imagine() takes
    tokens: int = 1  # P, world tokens a frame
    width: int = 64  # D of the world stream
    action_width: int = 32  # D of the action stream
    heads: int = 2
    head_dim: int = 32
    expand: int = 2  # feed-forward width over model width
    window: int = 8  # S layers see the last `window` frames
    dilation: int = 4  # D layers see the frames at t-d, t-2d, ..., t-taps*d
    taps: int = 4
    draft: bool = True
    draft_frames: int = 1  # 2: the draft also sees the last change, for tasks where one frame is ambiguous
    draft_width: int = 96
    draft_blocks: int = 3

    def __post_init__(self) -> None:
        unknown = sorted(set(self.pattern) - set(LAYER_KINDS))
        if unknown or not self.pattern:
            known = ", ".join(f"{kind} ({what})" for kind, what in LAYER_KINDS.items())
            raise ValueError(f"pattern={self.pattern!r} has unknown layer letters {unknown}; known are {known}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{field.name} must be an integer of at least 1, got {value!r}")
        if self.draft_frames > 2:
            raise ValueError(f"draft_frames must be 1 or 2, got {self.draft_frames}")
        if self.head_dim < 2:
            raise ValueError(f"head_dim must be at least 2 (the delta rule's norm needs it), got {self.head_dim}")

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WorldModelConfig:
        """A config from ``to_json``'s dict. Raises ValueError for an unknown key."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"config has unknown keys {unknown}; was it written by a newer kairos_gym?")
        return cls(**values)
