"""DreamVectorEnv; moved to ``kairos_gym.dream.envs``."""

from kairos_gym.dream.envs import DreamVectorEnv

__all__ = ["DreamVectorEnv"]
