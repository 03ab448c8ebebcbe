"""What the project does with its data: two actors that learn something."""

import formldemodependency
from forml import project
from forml.pipeline import wrap


@wrap.Actor.train
def centring(state, features, labels):
    """Learn the mean of the features."""
    return sum(row[0] for row in features) / len(features)


@wrap.Operator.mapper
@centring.apply
def centre(state, features):
    """Take the mean away."""
    return [[row[0] - state] for row in features]


@wrap.Actor.train
def averaging(state, features, labels):
    """Learn the mean of the labels, and how often that was learnt."""
    times = 0 if state is None else state["times"]
    return {"mean": sum(labels) / len(labels), "times": times + 1}


@wrap.Operator.mapper
@averaging.apply
def average(state, features):
    """Predict the mean of the labels."""
    offset = formldemodependency.OFFSET
    return [[row[0] + offset + state["mean"], state["times"]] for row in features]


project.setup(centre() >> average())
