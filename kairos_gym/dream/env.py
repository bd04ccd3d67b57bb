"""DreamEnv; moved to ``kairos_gym.dream.envs``."""

from kairos_gym.dream.envs import DreamEnv

__all__ = ["DreamEnv"]
