"""robosuite's manipulation tasks: arms, environments, scripted experts and rewards."""

from envs.robosuite.env import RobosuiteEnv

__all__ = ["RobosuiteEnv"]  # recorded datasets name envs.robosuite:RobosuiteEnv
