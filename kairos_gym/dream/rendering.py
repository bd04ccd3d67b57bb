"""Pictures of dreams: the real simulator draws the state that an observation shows."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import Env
from numpy.typing import NDArray


class Renderer:
    """Draws with the simulator that a model's ``card`` names, which is made when it is first needed.

    dt: the simulated time between two pictures, in seconds.
    """

    def __init__(self, card: dict[str, Any], dt: float):
        self.card, self.dt = card, dt
        self._simulator: Env | None = None

    def metadata(self, render_mode: str | None) -> dict[str, Any]:
        """Gymnasium's metadata about pictures. Raises ValueError where this ``render_mode`` isn't available."""
        modes = ["rgb_array"] if "env" in self.card else []
        if render_mode is not None and render_mode not in modes:
            why = "" if modes else ": its card names no simulator ('env') to draw with"
            raise ValueError(f"render_mode must be one of {[None, *modes]} for this model{why}; got {render_mode!r}")
        return {"render_modes": modes, "render_fps": max(1, round(1 / self.dt))}

    def draw(self, observation: Any) -> NDArray[np.uint8]:
        """An element of the observation space -> [height,width,3].

        Raises TypeError or ValueError where it doesn't determine the simulator's state, ImportError where the simulator
        isn't installed, RuntimeError where it can't draw on this machine.
        """
        name = self.card["env"]
        try:
            from envs import make_real, render_observation  # loads simulators

            if self._simulator is None:
                self._simulator = make_real(name, render_mode="rgb_array")
                self._simulator.reset(seed=0)
            return render_observation(self._simulator, observation)
        except (TypeError, ValueError, ImportError):
            raise  # their messages say what is missing
        except Exception as error:
            raise RuntimeError(
                f"{name} can't draw on this machine ({error}): without a display, set MUJOCO_GL=egl for MuJoCo tasks "
                "(Debian: libegl1 libgl1-mesa-dri) or SDL_VIDEODRIVER=dummy for Pendulum before Python starts"
            ) from error

    def close(self) -> None:
        if self._simulator is not None:
            self._simulator.close()
        self._simulator = None
