"""Learning rate as a pure function of the step."""

import math

from cluster.config import TrainSection


def learning_rate(train: TrainSection, step: int) -> float:
    """Rate of optimizer step `step`, counted from 0.

    Linear rise over `warmup_steps`, then a cosine (Loshchilov and Hutter, arXiv:1608.03983, without
    restarts) or a line down to `final_learning_rate` times the peak at the last step.
    """
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return train.learning_rate
    after = max(1, train.steps - 1 - train.warmup_steps)
    share = min(1.0, (step - train.warmup_steps) / after)
    fall = (1 - math.cos(math.pi * share)) / 2 if train.schedule == "cosine" else share
    return train.learning_rate * (1 - (1 - train.final_learning_rate) * fall)
