"""The draft, a one-step predictor with a variance, which the transformer refines; and the reward head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from world_model.model.scaling import Scaling
from world_model.ops.dispatch import no_autocast
from world_model.ops.linear import Layer, chain


class GatedBlock(nn.Module):
    """x + W2 (value * silu(gate)), with value and gate = W1 norm(x)."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.in_proj = nn.Linear(width, 2 * width)
        self.out_proj = nn.Linear(width, width)

    def layers(self) -> list[Layer]:
        return [Layer("norm", self.in_proj, self.norm), Layer("gated", self.out_proj, residual=True)]


class Draft(nn.Module):
    """f(o, a) -> mean and log-variance of the scaled change of a normalised observation.

    Each dimension's change is divided by ``step_std`` [O], its RMS in normalised units. With two ``frames`` it is
    f(o, a, c), where c is the scaled change that led to o.
    """

    def __init__(self, obs_dim: int, action_dim: int, width: int, blocks: int, frames: int = 1):
        super().__init__()
        self.frames = frames
        self.in_proj = nn.Linear(frames * obs_dim + action_dim, width)
        self.blocks = nn.ModuleList(GatedBlock(width) for _ in range(blocks))
        self.out_proj = nn.Linear(width, 2 * obs_dim)
        nn.init.zeros_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, obs: Tensor, action: Tensor, last_change: Tensor) -> tuple[Tensor, Tensor]:
        """obs [...,O] normalised, action [...,A] in [-1,1] -> mean, log-variance [...,O] of change / step_std.

        last_change [...,O]: the change that led to obs, over step_std too; zero where it is unknown.
        """
        inputs = [obs, action, last_change] if self.frames > 1 else [obs, action]
        return self.read(chain(torch.cat(inputs, -1), self.layers()))

    def layers(self) -> list[Layer]:
        """The network as ``world_model.ops.linear.chain`` takes it."""
        between = [layer for block in self.blocks for layer in block.layers()]  # type: ignore[operator, union-attr]
        return [Layer("plain", self.in_proj), *between, Layer("plain", self.out_proj)]

    @staticmethod
    def read(output: Tensor) -> tuple[Tensor, Tensor]:
        """The last layer's output [...,2*O] -> mean and log-variance [...,O]."""
        mean, log_var = output.chunk(2, -1)
        return mean, 8 * torch.tanh(log_var / 8) - 6  # soft bounds: variances of 1e-6 to 7 times step_std^2

    def unroll(self, obs: Tensor, actions: Tensor, before: Tensor, scaling: Scaling) -> tuple[Tensor, Tensor]:
        """Predict K steps from obs [B,O] with actions [B,K,A] -> observations and their variances, both [B,K,O].

        before [B,O]: the observation before obs; obs itself where that is unknown.
        """
        means, variances, variance = [], [], torch.zeros_like(obs)
        with no_autocast(obs):  # each prediction is fed back
            for action in actions.unbind(1):
                mean, log_var = self(obs, action, (obs - before) / scaling.step_std)
                before, obs = obs, scaling.limit(obs + scaling.step_std * mean)
                variance = variance + scaling.step_std.square() * log_var.exp()
                means.append(obs)
                variances.append(variance)
        return torch.stack(means, 1), torch.stack(variances, 1)


def beta_nll(mean: Tensor, log_var: Tensor, target: Tensor, beta: float = 0.5) -> Tensor:
    """Gaussian negative log-likelihood times variance^beta (arXiv 2203.09168): plain NLL neglects what is hard."""
    nll = 0.5 * ((target - mean).square() * (-log_var).exp() + log_var)
    return (nll * (beta * log_var.detach()).exp()).mean()


class RewardHead(nn.Module):
    """The normalised reward of a step and the logit of termination, from its two observations and its action."""

    def __init__(self, obs_dim: int, action_dim: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3 * obs_dim + action_dim, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, obs: Tensor, action: Tensor, change: Tensor, after: Tensor) -> Tensor:
        """obs and after [...,O] normalised, change [...,O] over step_std, action [...,A] in [-1,1] -> [...,2]."""
        return chain(torch.cat([obs, action, change, after], -1), self.chain())

    def chain(self) -> list[Layer]:
        """The network as ``world_model.ops.linear.chain`` takes it."""
        in_proj, _, middle, _, out_proj = self.layers
        return [Layer("plain", in_proj), Layer("silu", middle), Layer("silu", out_proj)]  # type: ignore[arg-type]
