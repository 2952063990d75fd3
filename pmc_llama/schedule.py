"""The learning rate of each step."""

import math

from pmc_llama.config import ScheduleConfig


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleConfig) -> float:
    """The learning rate of update `step`, counted from 1 to `steps`.

    Linear from 0 to `peak` over the first `warmup_ratio` of the steps, then half a cosine down towards
    `final_learning_rate_ratio` of the peak (Loshchilov & Hutter, arXiv 1608.03983, eq. 5, without restarts),
    which it would reach one step after the last: no step is spent at a rate of 0.
    """
    warmup = math.ceil(schedule.warmup_ratio * steps)
    if step <= warmup:
        return peak * (step / warmup)
    progress = (step - warmup) / (steps - warmup + 1)
    floor = schedule.final_learning_rate_ratio
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
