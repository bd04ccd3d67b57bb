"""The command line: each subcommand is a thin layer over one Python call, which its help names."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from gymnasium.error import Error as GymnasiumError
from tyro.conf import Positional, arg

from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.evaluation.compare_config import CompareConfig
from kairos_gym.learning.learn_config import LearnConfig
from kairos_gym.learning.loop_config import LoopConfig
from kairos_gym.learning.train_config import TrainConfig

if TYPE_CHECKING:
    from planners import Planner
    from world_model.model.world_model import WorldModel

Simulator = Positional[Annotated[str, arg(metavar="SIMULATOR")]]
Dataset = Positional[Annotated[str, arg(metavar="DATASET")]]
Datasets = Positional[Annotated[tuple[str, ...], arg(metavar="DATASET [DATASET ...]")]]
Model = Positional[Annotated[str, arg(metavar="MODEL")]]
Folder = Positional[Annotated[Path, arg(metavar="FOLDER")]]
Config = TypeVar("Config")
Flags = Annotated[Config, arg(name="")]  # a config whose fields are the command's own flags, without a prefix


@dataclass(frozen=True)
class PlannerConfig:
    """How to plan, in ``plan`` and ``explain``."""

    # the cross-entropy method, iCEM, MPPI, random shooting, or gradient ascent (in the dream only)
    planner: Literal["cem", "icem", "mppi", "shooting", "gradient"] = "cem"

    horizon: int = 15  # how many chunks to look ahead
    chunk: int = 1  # how many steps to play before planning again
    candidates: int = 200  # how many plans to dream at once; gradient ascent, which is slow, starts with a 25th of them
    std: float = 0.5  # how widely the search starts, in half ranges of the actions; 0.12 suits Reacher

    def make(self) -> Planner:
        from planners import CEM, ICEM, MPPI, Gradient, RandomShooting

        size: dict[str, Any] = {"horizon": self.horizon, "chunk": self.chunk}
        candidates, std = self.candidates, self.std
        if self.planner == "shooting":
            return RandomShooting(**size, candidates=candidates)
        if self.planner == "gradient":
            return Gradient(**size, starts=max(1, candidates // 25), std=std)
        if self.planner == "mppi":
            return MPPI(**size, candidates=candidates, std=std)
        if candidates < 2:
            raise ValueError(f"{self.planner} needs at least 2 candidates, got {candidates}")
        planner, elites = CEM if self.planner == "cem" else ICEM, max(2, candidates // 10)
        return planner(**size, candidates=candidates, elites=elites, std=std, min_std=min(0.01, std))


def collect(env_id: Simulator, dataset_id: Dataset, config: Flags[CollectConfig]) -> None:
    """Record experience of a real simulator as a Minari dataset (kairos_gym.data.collect.collect).

    A collection that was stopped goes on with the same command.

    Args:
        env_id: the simulator, such as Reacher-v5 or robosuite/Lift-v0,robots=Sawyer
        dataset_id: the dataset's name, such as kairos/reacher-v0
    """
    from kairos_gym.data.collect import collect

    dataset = collect(env_id, dataset_id, config)
    print(f"{dataset_id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps")


def train(dataset_id: Dataset, out: Folder, config: Flags[TrainConfig]) -> None:
    """Train a world model on a Minari dataset (kairos_gym.learning.train.train).

    A training that was stopped goes on with the same command.

    Args:
        dataset_id: the dataset's name, as collect was given it
        out: the folder to write the model to
    """
    from kairos_gym.learning.train import train

    model = train(dataset_id, out, config)
    print(f"The model is in {out}.")
    if "errors" not in model.card:
        print(f"No held-out episode is long enough to score it: collect others, and kairos score {out} with those.")
        return
    errors = model.card["errors"]["held_out"]
    _print_errors(errors)
    longest = max(int(name[1:]) for name in errors)
    print(f"\nOther horizons: kairos score {out} {dataset_id}{'' if longest == 64 else f' --horizon {longest}'}")


def plan(
    model: Model,
    config: Flags[PlannerConfig],
    env: str | None = None,
    where: Literal["dream", "simulator"] = "dream",
    episodes: int = 10,
    seed: int = 0,
) -> None:
    """Plan in the dream, act in the real simulator, and print a table (kairos_gym.evaluation.control.evaluate_planner).

    Args:
        model: a shipped model's name, a folder or a hub id
        env: the simulator to act in, instead of the one that the model was trained on
        where: plan in the model's dream, or in the true simulator, for comparison
        episodes: how many episodes to play, side by side
        seed: episode e starts with seed + e
    """
    import numpy as np

    from envs import SimulatorDynamics
    from kairos_gym.evaluation import control
    from kairos_gym.report import as_text

    world, env_id = _load(model, env)
    dynamics: Any = world if where == "dream" else SimulatorDynamics(env_id)
    run = control.evaluate_planner(env_id, dynamics, config.make(), episodes=episodes, seed=seed)
    row = {
        "planner": config.planner,
        "evaluations": run.evaluations,
        "planned in": where,
        "simulator": env_id,
        "episodes": episodes,
        "mean return": float(run.returns.mean()),
        "95% interval": "{:.2f} to {:.2f}".format(*run.interval()),
        "median": float(np.median(run.returns)),
        "ms a decision": run.ms_per_decision,
    }
    print(as_text(list(row), [list(row.values())]))


def explain(
    model: Model,
    config: Flags[PlannerConfig],
    env: str | None = None,
    decision: int = 5,
    seed: int = 0,
    dims: tuple[int, ...] = (),
    out: Path = Path("reports/plan.svg"),
) -> None:
    """Draw all futures dreamed for one decision, beside what then happened (kairos_gym.evaluation.explain.explain).

    Args:
        model: a shipped model's name, a folder or a hub id
        env: the simulator to act in, instead of the one that the model was trained on
        decision: which one, 0 is the episode's first
        seed: of the episode and the search
        dims: which dimensions of the observation to draw; where not given, up to three in which the futures differ most
        out: the picture to write
    """
    from kairos_gym.evaluation.explain import draw_decision, explain

    world, env_id = _load(model, env)
    decided = explain(env_id, world, config.make(), decision=decision, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if out.suffix == ".svg" else None
    draw_decision(decided, dims or None).savefig(out, dpi=100, metadata=metadata)
    print(out)


def learn(model: Model, out: Folder, config: Flags[LearnConfig], env: str | None = None) -> None:
    """Learn a policy in a model's dream, evaluated in the real simulator (kairos_gym.learning.learn.learn).

    A call that was stopped goes on with the same command, from the last of its ten evaluations.

    Args:
        model: a shipped model's name, a folder or a hub id
        out: the folder for the policies, their returns, and TensorBoard's logs
        env: the simulator to evaluate in, instead of the one that the model was trained on
    """
    from kairos_gym.learning.learn import learn

    learn(model, out, config, env_id=env)
    _print_evaluations(out)


def loop(env_id: Simulator, out: Folder, config: Flags[LoopConfig]) -> None:
    """Learn a policy from few real steps, by a world model trained along with it (kairos_gym.learning.loop.loop).

    Each round plays in the simulator, trains the world model on all that was played, and trains the policy in its
    dreams. A call that was stopped goes on with the same command.

    Args:
        env_id: the simulator, such as Pendulum-v1
        out: the folder for the policies, the models, the data, the returns, and TensorBoard's logs
    """
    from kairos_gym.learning.loop import loop

    loop(env_id, out, config)
    _print_evaluations(out)


def score(
    model: Model,
    dataset_id: Dataset,
    horizon: int = 64,
    context: int = 16,
    chunk: int = 1,
    trajectories: int | None = None,
) -> None:
    """Measure the dream's open-loop error on recorded episodes (kairos_gym.evaluation.open_loop.score).

    Args:
        model: a shipped model's name, a folder or a hub id
        dataset_id: the recorded episodes; of those that are long enough, the last ones are used
        horizon: how many steps to dream without looking
        context: how many real frames to show first
        chunk: how many steps to imagine at once
        trajectories: how many episodes to take; all that training left out of this dataset, or else up to 64
    """
    from kairos_gym.evaluation.open_loop import score

    result = score(model, dataset_id, horizon=horizon, context=context, chunk=chunk, trajectories=trajectories)
    _print_errors(result.table(sorted({h for h in (1, 2, 4, 8, 16, 32, 64, 128, 256) if h < horizon} | {horizon})))
    print(f"\n{len(result.obs_error)} episodes of {dataset_id}, dreamed after {context} real frames")


def calibrate(model: Model, dataset_ids: Datasets, out: Path | None = None, seed: int = 0) -> None:
    """Give a model an error bound, measured on episodes it never saw (kairos_gym.evaluation.calibrate.calibrate).

    Args:
        model: a folder, or a shipped model's name or a hub id with --out
        dataset_ids: recorded episodes, one dataset or more; of its own training data, only those left out are used.
            The first half of them fits how uncertainty grows along a dream, the second how large the bound must be for
            it: record it with other policies, and the bound allows for policies that the fit never saw
        out: the folder to save the calibrated model to, instead of its own
        seed: of everything drawn at random
    """
    from kairos_gym.evaluation.calibrate import calibrate
    from kairos_gym.evaluation.comparison import steps_of

    dreams = calibrate(model, dataset_ids, out, seed=seed).card["trust"]["dreams"]
    print("Calibrated on", ", ".join(f"{n} dreams of {steps_of(h[1:])}" for h, n in dreams.items() if n))


def compare(
    model: str,
    config: Flags[CompareConfig],
    env: str | None = None,
    policies: tuple[str, ...] = (),
    success: str | None = None,
    out: Path | None = None,
) -> None:
    """Compare a dream with its simulator and write a report page (kairos_gym.evaluation.compare.compare).

    Ten policies of different skill play in both; some are trained first, where they haven't been (some minutes).

    Args:
        model: a shipped model's name, a folder or a hub id
        env: the simulator, instead of the one that the model was trained on
        policies: more policies, Stable-Baselines3 files such as ppo:runs/mine.zip; load only those you trust
        success: which observations are a success, as module:function, (obs [N,...]) -> bool [N]
        out: the folder to write index.html, comparison.json and logs/ to; reports/MODEL-ENV where not given
    """
    from kairos_gym.evaluation import page
    from kairos_gym.evaluation.compare import compare
    from kairos_gym.policies.ladder import load_policy

    _, env_id = _load(model, env)
    comparison = compare(
        model,
        config,
        env_id=env_id,
        also=[load_policy(source, env_id) for source in policies],
        success_fn=None if success is None else _function(success),
    )
    folder = out or Path("reports") / f"{Path(model).name}-{env_id}".replace("/", "-")
    path = page.write_report(comparison, folder, f"kairos {' '.join(map(shlex.quote, sys.argv[1:]))}")
    print("\n".join(page.summarise(comparison.numbers())), f"The report: {path}", sep="\n\n")


def demo(model: str = "reacher", episodes: int = 8, seed: int = 1000, out: Path = Path("reports/demo.html")) -> None:
    """Plan in a dream, act in the real simulator, and write a report page (kairos_gym.demo.demo).

    Args:
        model: a shipped model's name, a folder or a hub id
        episodes: how many episodes to play each way
        seed: episode e starts with seed + e
        out: the page to write
    """
    from kairos_gym.demo import demo

    demo(model, episodes=episodes, seed=seed, out=out)


def info() -> None:
    """Show versions, threads and the models that ship with the package (kairos_gym.shipped, kairos_gym.load)."""
    from kairos_gym.models import load, shipped
    from kairos_gym.report import Cell, as_text, machine

    print(machine(), end="\n\n")
    rows: list[list[Cell]] = []
    for name in shipped():
        model = load(name)
        weights = sum(p.numel() for p in model.parameters())
        card, config = model.card, model.config
        errors = ["{rms:.2g} ({median:.2g})".format(**card["errors"]["test"]["all"][h]) for h in ("h1", "h8", "h64")]
        rows.append([name, card["env"], card["time_limit"], config.pattern, config.chunk, f"{weights:,}", *errors])
    columns = ["model", "simulator", "time limit", "layers", "chunk", "weights", "h1", "h8", "h64"]
    print(as_text(columns, rows))
    print("\nh1, h8, h64: open-loop NRMSE on test episodes after 1, 8 and 64 steps, RMS and (median) over trajectories")


def bench() -> None:
    """Measure a figure of the README again (kairos_gym.bench.commands); `kairos bench --help` lists them."""


COMMANDS = {
    f.__name__: f for f in (collect, train, learn, loop, score, calibrate, compare, plan, explain, demo, info, bench)
}


def main(args: Sequence[str] | None = None) -> None:
    """Run ``kairos``, on one thread: more would slow models this small down, most on a shared machine.

    A mistake of the user is one line on stderr and exit code 2.
    """
    import torch

    torch.set_num_threads(1)
    args = sys.argv[1:] if args is None else list(args)
    try:
        if args[:1] == ["bench"]:
            from kairos_gym.bench.commands import COMMANDS as BENCHES
            from kairos_gym.bench.harness import append_row

            row = tyro.extras.subcommand_cli_from_dict(BENCHES, prog="kairos bench", args=args[1:])
            if row is not None:
                append_row(row)
            return
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="kairos",
            args=args,
            description="Learned dreams of real simulators: record, train, plan, compare.",
        )
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, ArithmeticError, GymnasiumError) as error:
        print("kairos:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _load(model: str, env: str | None) -> tuple[WorldModel, str]:
    """The model, and the id of the simulator to use: ``env``, or the one that its card names."""
    from kairos_gym.models import load

    world = load(model)
    env_id = env or world.card.get("env")
    if env_id is None:
        raise ValueError(f"the card of {model} names no simulator: say which with --env")
    return world, env_id


def _function(name: str) -> Any:
    """The function that "module:function" names."""
    from importlib import import_module

    module, _, attribute = name.partition(":")
    function = getattr(import_module(module), attribute, None)
    if not callable(function):
        raise ValueError(f"success must be module:function, and there is no function {name!r}")
    return function


def _print_evaluations(out: Path) -> None:
    """The returns of the policies in ``out``, evaluation by evaluation."""
    import numpy as np

    from kairos_gym.report import Cell, as_text

    evaluations = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    rows: list[list[Cell]] = [
        [f"{row['steps']:,}", float(np.mean(row["imagined"])), float(np.mean(row["real"]))] for row in evaluations
    ]
    print(as_text(["steps", "imagined return", "real return"], rows))
    best = max(float(np.mean(row["real"])) for row in evaluations)
    print(f"\nThe policy that earned {best:.4g} is {out / 'best.zip'}. Curves: tensorboard --logdir {out / 'logs'}")


def _print_errors(table: dict[str, dict[str, float]]) -> None:
    from kairos_gym.report import Cell, as_text

    rows: list[list[Cell]] = [[name, errors["rms"], errors["median"]] for name, errors in table.items()]
    print(as_text(["horizon", "NRMSE (RMS)", "NRMSE (median)"], rows))


if __name__ == "__main__":
    main()
