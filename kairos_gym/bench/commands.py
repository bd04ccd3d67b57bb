"""The commands of ``kairos bench``, each of which measures one table or draws one figure."""

from kairos_gym.bench.endurance import endurance
from kairos_gym.bench.env import env
from kairos_gym.bench.gpu import gpu
from kairos_gym.bench.gradients import gradients
from kairos_gym.bench.learning import learned, learning
from kairos_gym.bench.lift import lift
from kairos_gym.bench.lift_speed import lift_speed
from kairos_gym.bench.memory import memory
from kairos_gym.bench.models import models
from kairos_gym.bench.pessimism import pessimism
from kairos_gym.bench.planners import planners
from kairos_gym.bench.recall import floor, recall
from kairos_gym.bench.speed import speed
from kairos_gym.bench.step import step
from kairos_gym.bench.table import table
from kairos_gym.bench.together import together
from kairos_gym.bench.trust import trust
from kairos_gym.bench.updates import updates

COMMANDS = {
    f.__name__: f
    for f in (
        models,
        recall,
        floor,
        planners,
        together,
        pessimism,
        learning,
        learned,
        gradients,
        env,
        endurance,
        trust,
        lift,
        lift_speed,
        memory,
        step,
        speed,
        updates,
        gpu,
        table,
    )
}
