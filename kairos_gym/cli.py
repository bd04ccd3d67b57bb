"""The command line: each subcommand is a thin layer over one Python call, which its help names."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from gymnasium.error import Error as GymnasiumError
from tyro.conf import OmitArgPrefixes, Positional, arg

from kairos_gym.data.collect_config import CollectConfig
from kairos_gym.learning.loop_config import LoopConfig

if TYPE_CHECKING:
    from planners import Planner
    from world_model.model.world_model import WorldModel

Simulator = Positional[Annotated[str, arg(metavar="SIMULATOR")]]
Dataset = Positional[Annotated[str, arg(metavar="DATASET")]]
Datasets = Positional[Annotated[tuple[str, ...], arg(metavar="DATASET [DATASET ...]")]]
Model = Positional[Annotated[str, arg(metavar="MODEL")]]
Folder = Positional[Annotated[Path, arg(metavar="FOLDER")]]
Method = Literal["cem", "icem", "mppi", "shooting", "gradient"]


def collect(env_id: Simulator, dataset_id: Dataset, config: Annotated[CollectConfig, arg(name="")]) -> None:
    """Record experience of a real simulator as a Minari dataset (kairos_gym.data.collect.collect).

    A collection that was stopped goes on with the same command.

    Args:
        env_id: the simulator, such as Reacher-v5 or robosuite/Lift-v0,robots=Sawyer
        dataset_id: the dataset's name, such as kairos/reacher-v0
    """
    from kairos_gym.data.collect import collect

    dataset = collect(env_id, dataset_id, config)
    print(f"{dataset_id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps")


def train(
    dataset_id: Dataset,
    out: Folder,
    pattern: str = "SGDG",
    chunk: int = 4,
    draft: bool = True,
    draft_steps: int | None = None,
    steps: int | None = None,
    held_out: int = 64,
    seed: int = 0,
) -> None:
    """Train a world model on a Minari dataset (kairos_gym.learning.train.train).

    A training that was stopped goes on with the same command.

    Args:
        dataset_id: the dataset's name, as collect was given it
        out: the folder to write the model to
        pattern: the layers, one letter each: S sliding window, D dilated sliding window, G gated delta rule
        chunk: the longest number of steps that one call imagines
        draft: begin with the draft; without it, the plain transformer
        draft_steps: updates of the draft
        steps: updates of the transformer
        held_out: how many episodes at the end of the dataset to leave for score
        seed: of everything drawn at random
    """
    from kairos_gym.learning.train import train

    steps_given: dict[str, Any] = {"draft_steps": draft_steps, "steps": steps}
    given = {name: n for name, n in steps_given.items() if n is not None}
    model = train(dataset_id, out, pattern=pattern, chunk=chunk, draft=draft, held_out=held_out, seed=seed, **given)
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
    env: str | None = None,
    planner: Method = "cem",
    where: Literal["dream", "simulator"] = "dream",
    episodes: int = 10,
    horizon: int = 15,
    chunk: int = 1,
    candidates: int = 200,
    std: float = 0.5,
    seed: int = 0,
) -> None:
    """Plan in the dream, act in the real simulator, and print a table (kairos_gym.evaluation.control.plan).

    Args:
        model: a shipped model's name, a folder or a hub id
        env: the simulator to act in, instead of the one that the model was trained on
        planner: the cross-entropy method, iCEM, MPPI, random shooting, or gradient ascent (in the dream only)
        where: plan in the model's dream, or in the true simulator, for comparison
        episodes: how many episodes to play, side by side
        horizon: how many chunks to look ahead
        chunk: how many steps to play before planning again
        candidates: how many plans to dream at once; gradient ascent, which is slow, begins with a 25th of them
        std: how widely the search begins, in half ranges of the actions; 0.12 suits Reacher, which charges for effort
        seed: episode e begins with seed + e
    """
    import numpy as np

    from envs import SimulatorDynamics
    from kairos_gym.evaluation import control as playing
    from kairos_gym.report import as_text
    from world_model.contract import Dynamics

    world, env_id = _world(model, env)
    method = _method(planner, horizon, chunk, candidates, std)
    dynamics: Dynamics = world if where == "dream" else SimulatorDynamics(env_id)
    run = playing.plan(env_id, dynamics, method, episodes=episodes, seed=seed)
    about = {
        "planner": planner,
        "evaluations": run.evaluations,
        "planned in": where,
        "simulator": env_id,
        "episodes": episodes,
        "mean return": float(run.returns.mean()),
        "95% interval": "{:.2f} to {:.2f}".format(*run.interval()),
        "median": float(np.median(run.returns)),
        "ms a decision": run.ms_per_decision,
    }
    print(as_text(list(about), [list(about.values())]))


def explain(
    model: Model,
    env: str | None = None,
    planner: Method = "cem",
    decision: int = 5,
    horizon: int = 15,
    chunk: int = 1,
    candidates: int = 200,
    std: float = 0.5,
    seed: int = 0,
    dims: tuple[int, ...] = (),
    out: Path = Path("reports/plan.svg"),
) -> None:
    """Draw all futures that were dreamed for one decision, beside what then happened (kairos_gym.evaluation.explain.explain).

    Args:
        model: a shipped model's name, a folder or a hub id
        env: the simulator to act in, instead of the one that the model was trained on
        planner: as in plan
        decision: which one, 0 is the episode's first
        horizon: how many chunks to look ahead
        chunk: how many steps to play before planning again
        candidates: how many plans to dream at once
        std: how widely the search begins, in half ranges of the actions
        seed: of the episode and the search
        dims: which dimensions of the observation to draw; where not given, up to three in which the futures differ most
        out: the picture to write
    """
    from kairos_gym.evaluation.explain import draw_decision, explain

    world, env_id = _world(model, env)
    method = _method(planner, horizon, chunk, candidates, std)
    explained = explain(env_id, world, method, decision=decision, seed=seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_decision(explained, dims or None).savefig(
        out, dpi=100, metadata={"Date": None} if out.suffix == ".svg" else None
    )
    print(out)


def learn(
    model: Model,
    out: Folder,
    env: str | None = None,
    algorithm: Literal["sac", "td3", "ppo", "shac"] = "sac",
    steps: int | None = None,
    dreams: int = 64,
    max_error: float | None = None,
    penalty: float = 0.0,
    seed: int = 0,
) -> None:
    """Learn a policy in a model's dream, judged in the real simulator as it learns (kairos_gym.learning.learn.learn).

    A call that was stopped goes on with the same command, from the last of the ten times that it was judged.

    Args:
        model: a shipped model's name, a folder or a hub id
        out: the folder for the policies, what they earned, and TensorBoard's logs
        env: the simulator that judges, instead of the one that the model was trained on
        algorithm: Stable-Baselines3's soft actor-critic, TD3 or PPO; or shac, by gradients through the model's draft
        steps: of single dreams, in all; where not given, 100,000, and for shac 2,000,000
        dreams: how many dreams go on side by side
        max_error: cut a dream short where it may be wrong by more than this, with a confidence of 0.9
        penalty: what steps far from the training data cost, in standard deviations of the reward
        seed: of everything drawn at random
    """
    from kairos_gym.learning.learn import learn

    learn(
        model,
        out,
        env_id=env,
        algorithm=algorithm,
        steps=steps,
        dreams=dreams,
        max_error=max_error,
        penalty=penalty,
        seed=seed,
    )
    _print_evaluations(out)


def loop(env_id: Simulator, out: Folder, config: Annotated[LoopConfig, OmitArgPrefixes] = LoopConfig()) -> None:
    """Learn a policy from few real steps: play, train the world model, train the policy in it, again (kairos_gym.learning.loop).

    A call that was stopped goes on with the same command.

    Args:
        env_id: the simulator, such as Pendulum-v1
        out: the folder for the policies, the models, the data, what was earned, and TensorBoard's logs
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
    """Teach a model how wrong it may be, on recorded episodes it never saw (kairos_gym.evaluation.calibrate.calibrate).

    Args:
        model: a folder, or a shipped model's name or a hub id with --out
        dataset_ids: recorded episodes, one dataset or more; of its own training data, only those left out are used.
            The first half teaches how doubt grows, the second says how much is enough: record it with other policies,
            and the bound allows for those that it never saw
        out: the folder to save the calibrated model to, instead of its own
        seed: of everything drawn at random
    """
    from kairos_gym.evaluation.calibrate import calibrate
    from kairos_gym.evaluation.comparison import steps_of

    told = calibrate(model, dataset_ids, out, seed=seed).card["trust"]["dreams"]
    print("Calibrated on", ", ".join(f"{n} dreams of {steps_of(h[1:])}" for h, n in told.items() if n))


def compare(
    model: str,
    env: str | None = None,
    policies: tuple[str, ...] = (),
    episodes: int = 16,
    seed: int = 10_000,
    horizon: int = 64,
    context: int = 16,
    chunk: int = 1,
    episode_steps: int | None = None,
    success: str | None = None,
    references: bool = True,
    out: Path | None = None,
) -> None:
    """Hold a dream against its simulator and write a report page (kairos_gym.evaluation.compare.compare).

    Ten policies of different skill play in both; some are trained first, where they haven't been (some minutes).

    Args:
        model: a shipped model's name, a folder or a hub id
        env: the simulator, instead of the one that the model was trained on
        policies: more policies, Stable-Baselines3 files such as ppo:runs/mine.zip; load only those you trust
        episodes: how many starts, the same for every policy
        seed: start e is that of seed + e
        horizon: how many steps to dream without looking
        context: how many real frames to show first
        chunk: how many steps to imagine at once
        episode_steps: the time limit of an episode, instead of the simulator's own
        success: which observations are a success, as module:function, (obs [N,...]) -> bool [N]
        references: fit what knows less (nothing moves, linear, ensemble) on the model's training data, beside it
        out: the folder to write index.html, comparison.json and logs/ to; reports/MODEL-ENV where not given
    """
    from importlib import import_module

    from kairos_gym.evaluation import page as comparison_page
    from kairos_gym.evaluation.compare import compare
    from kairos_gym.policies.ladder import load_policy

    _, env_id = _world(model, env)
    success_fn = None
    if success is not None:
        module, _, name = success.partition(":")
        success_fn = getattr(import_module(module), name, None)
        if not callable(success_fn):
            raise ValueError(f"success must be module:function, and there is no function {success!r}")
    found = compare(
        model,
        env_id,
        also=[load_policy(source, env_id) for source in policies],
        episodes=episodes,
        seed=seed,
        horizon=horizon,
        context=context,
        chunk=chunk,
        limit=episode_steps,
        success_fn=success_fn,
        references=references,
    )
    folder = out or Path("reports") / f"{Path(model).name}-{env_id}".replace("/", "-")
    path = comparison_page.write(found, folder, f"kairos {' '.join(map(shlex.quote, sys.argv[1:]))}")
    print("\n".join(comparison_page.in_short(found.numbers())), f"The report: {path}", sep="\n\n")


def demo(model: str = "reacher", episodes: int = 8, seed: int = 1000, out: Path = Path("reports/demo.html")) -> None:
    """Plan in a dream, act in the real simulator, and write a report page (kairos_gym.demo.demo).

    Args:
        model: a shipped model's name, a folder or a hub id
        episodes: how many episodes to play each way
        seed: episode e begins with seed + e
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
    """Run ``kairos``, on one thread: models this small lose by more, much where the machine is shared.

    A mistake of the user is one line on stderr and exit code 2.
    """
    import torch

    torch.set_num_threads(1)
    args = sys.argv[1:] if args is None else list(args)
    try:
        if args[:1] == ["bench"]:
            from kairos_gym.bench import commands as benches

            measured = tyro.extras.subcommand_cli_from_dict(benches.COMMANDS, prog="kairos bench", args=args[1:])
            if measured is not None:
                benches.keep(measured)
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


def _world(model: str, env: str | None) -> tuple[WorldModel, str]:
    """The model, and the simulator that is meant."""
    from kairos_gym.models import load

    world = load(model)
    env_id = env or world.card.get("env")
    if env_id is None:
        raise ValueError(f"the card of {model} names no simulator: say which with --env")
    return world, env_id


def _method(name: Method, horizon: int, chunk: int, candidates: int, std: float) -> Planner:
    from planners import CEM, ICEM, MPPI, Gradient, RandomShooting

    if name == "shooting":
        return RandomShooting(horizon=horizon, chunk=chunk, candidates=candidates)
    if name == "gradient":
        return Gradient(horizon=horizon, chunk=chunk, starts=max(1, candidates // 25), std=std)
    if name == "mppi":
        return MPPI(horizon=horizon, chunk=chunk, candidates=candidates, std=std)
    if candidates < 2:
        raise ValueError(f"{name} needs at least 2 candidates, got {candidates}")
    kind, elites = CEM if name == "cem" else ICEM, max(2, candidates // 10)
    return kind(horizon=horizon, chunk=chunk, candidates=candidates, elites=elites, std=std, min_std=min(0.01, std))


def _print_evaluations(out: Path) -> None:
    """What the policies in ``out`` earned, time by time."""
    import json

    import numpy as np

    from kairos_gym.report import Cell, as_text

    told = [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]
    earned = [[float(np.mean(row[name])) for name in ("imagined", "real")] for row in told]
    rows: list[list[Cell]] = [[f"{row['steps']:,}", *means] for row, means in zip(told, earned, strict=True)]
    print(as_text(["steps", "imagined return", "real return"], rows))
    best = max(real for _, real in earned)
    print(f"\nThe policy that earned {best:.4g} is {out / 'best.zip'}. Curves: tensorboard --logdir {out / 'logs'}")


def _print_errors(table: dict[str, dict[str, float]]) -> None:
    from kairos_gym.report import Cell, as_text

    rows: list[list[Cell]] = [[name, errors["rms"], errors["median"]] for name, errors in table.items()]
    print(as_text(["horizon", "NRMSE (RMS)", "NRMSE (median)"], rows))


if __name__ == "__main__":
    main()
