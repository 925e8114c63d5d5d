"""The learning rate as a function of the step."""

import math


def warmup_cosine(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear warm-up from 0 to `peak`, then half a cosine down to 0.

    Args:
        step: index of the optimizer step, from 0.
        total_steps: steps of the whole run; at and after this one the rate is 0.
        warmup_steps: steps of the warm-up, at the start; may be 0.
        peak: the learning rate at its end.

    Returns:
        The learning rate of this step.

    Raises:
        ValueError: `step` is negative, or `warmup_steps` is not in [0, total_steps].

    Source: arXiv 2102.06171, section 5 (training details).
    """
    if step < 0:
        raise ValueError(f"step is {step}, expected 0 or more; count steps from 0.")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}, expected 0 to total_steps = {total_steps}; "
            "shorten the warm-up or train for longer."
        )
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= total_steps:
        return 0.0
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
