"""Open-loop errors of the shipped recipes beside a plain transformer and a probabilistic ensemble."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from kairos_gym.bench.harness import Row
from kairos_gym.learning.recipes import RECIPES, load_task_data, measure_errors, model_config
from world_model.dynamics.baselines import fit_ensemble
from world_model.training.fit import fit

CPU_SECONDS = 100.0  # the budget of every training here, collection left out


def models(task: str, form: Literal["kairos", "plain", "pets"], seed: int = 0, out: Path = Path("runs")) -> Row:
    """Train one form of model on one task and measure its open-loop error on the test episodes.

    "kairos" is the shipped recipe, "plain" the same transformer without the draft, "pets" the probabilistic ensemble.
    """
    data, recipe = load_task_data(task), RECIPES[task]
    if form == "pets":
        model: Any = fit_ensemble(data.spec, data.train, cpu_seconds=CPU_SECONDS, seed=seed)
        updates, cpu = model.card["updates"], CPU_SECONDS
    else:
        train = replace(recipe.train, seed=seed)
        if form == "plain":  # nearly all of the time goes to the transformer; 500 updates teach it rewards
            train = replace(train, draft_steps=500, steps=10_000)
        config = model_config(recipe, data.spec, draft=form == "kairos")
        model = fit(config, data.spec, data.train, train, out=out / f"{task}-{form}-{seed}")
        updates, cpu = train.draft_steps + train.steps, model.card["fit"]["cpu_seconds"]
    row = {"task": task, "form": form, "seed": seed, "cpu_seconds": cpu, "updates": updates}
    return row | {"test": measure_errors(model, data, data.test)}
