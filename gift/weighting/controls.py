"""Controls: weights distributed like the guide's, without its judgement of the tokens.

    shuffle    a row's confidences, in a random order
    random     each drawn from the confidences of all rows, with replacement
    invert     1 − q
    constant   the mean of all confidences

Each is transformed as the guide's confidences are, then scaled so that the weights of all rows have
the mean that the guide's would have. Each row is drawn with the seed and its number; `random`,
`constant` and the scale read the confidences of all rows. All weights are formed before training,
so they do not depend on ranks, micro-batches or resuming.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gift.config.train import Control
from gift.errors import InputError
from gift_kernels import WeightTransform
from gift_kernels.reference import transform_weight

# A sentence each for a study's report.
ABOUT: dict[str, str] = {
    "shuffle": "The guide's confidences, in a random order within each row.",
    "random": "Confidences drawn from those of all rows.",
    "invert": "1 - confidence: most is learned from what the guide finds unlikely.",
    "constant": "The mean of all confidences, for every token.",
}


def controlled_weights(
    control: Control,
    seed: int,
    rows: Sequence[int],
    confidence: Sequence[Tensor],
    free: Sequence[Tensor],
    transform: WeightTransform,
) -> list[Tensor]:
    """Weights float32 [targets] of every row under a control, 0 where not `free`.

    Args:
        rows: the rows' numbers in the data.
        confidence: float32 [targets] by row.
        free: bool [targets] by row; False for tokens of fixed weight, which are left out.

    Raises:
        InputError: every controlled weight is 0 and none of the guide's is.
    """
    pairs = list(zip(confidence, free, strict=True))
    pool = torch.cat([q[is_free] for q, is_free in pairs])
    weights = []
    for row, (q, is_free) in zip(rows, pairs, strict=True):
        own = q[is_free]
        generator = np.random.default_rng([seed, row])
        match control:
            case "shuffle":
                drawn = own[torch.from_numpy(generator.permutation(len(own)))]
            case "random":
                drawn = pool[torch.from_numpy(generator.integers(len(pool), size=len(own)))]
            case "invert":
                drawn = 1 - own
            case "constant":
                drawn = torch.full_like(own, float(pool.mean(dtype=torch.float64)))
        weight = torch.zeros_like(q)
        weight[is_free] = transform_weight(drawn, transform)
        weights.append(weight)
    wanted = float(transform_weight(pool, transform).sum(dtype=torch.float64))
    got = sum(float(weight.sum(dtype=torch.float64)) for weight in weights)
    if wanted > 0 and got == 0:
        raise InputError(
            f"--control: every weight of {control} is 0, so that none can have the guide's mean; "
            "lower --confidence-threshold or choose another control"
        )
    return [weight * (wanted / got if got else 0.0) for weight in weights]
