"""Gates from latents: gradients through a binary choice.

Both estimators take latents x, noise u, uniform in (0, 1), of the same shape, and the offset c, and return the gates
that the model is multiplied with and the 0/1 gates that the parameter budget counts. Noise is an argument, so that
every process of a run draws the same and a resumed run draws what it would have drawn.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

EstimatorName = Literal["reinmax", "gumbel"]
OFFSET = 3.0
"""c in the paper: added to every latent, so that learning starts with nearly everything kept (95 %)."""
TAU = 1.0
"""The paper's temperature of ReinMax."""
TEMPERATURE = 0.4
"""T of the authors' published Gumbel-sigmoid."""


def reinmax(latents: Tensor, noise: Tensor, offset: float = OFFSET) -> tuple[Tensor, Tensor]:
    """Binary ReinMax (the paper's Algorithm 2, after Liu et al., "Bridging Discrete and Back-Propagation", 2023).

    Forward: B ~ Bernoulli(sigmoid(x + c)). Backward, with pi0 = sigmoid(x + c) and
    pi1 = (B + sigmoid((x + c) / tau)) / 2, the derivative is 2 pi1 (1 - pi1) - pi0 (1 - pi0) / 2. At tau = 1 that makes
    the expected gradient exact for every function that is quadratic in the gate (Heun's method).

    Followed line by line but for one, where the paper has sigmoid(stopgrad(ln pi1 - (x + c)) + (x + c)): so it stands
    in the categorical form, where softmax normalises ln pi1. The sigmoid of two classes needs the log odds,
    ln(pi1 / (1 - pi1)); with ln pi1 the value would be pi1 / (1 + pi1), and the gradient wrong.
    """
    x = latents + offset
    pi0 = torch.sigmoid(x)
    sample = (noise < pi0).to(x)
    pi1 = (sample + torch.sigmoid(x / TAU)) / 2
    pi1 = torch.sigmoid((torch.logit(pi1) - x).detach() + x)
    pi2 = 2 * pi1 - pi0 / 2
    gates = pi2 - pi2.detach() + sample
    return gates, gates


def gumbel(latents: Tensor, noise: Tensor, offset: float = OFFSET) -> tuple[Tensor, Tensor]:
    """The Gumbel-sigmoid of the authors' published code.

    The model sees the soft gates sigmoid((x + g + c) / T); the budget counts a second sample, rounded, with the
    gradient of its soft value. The noise g is one Gumbel variable, as in that code, not the difference of two.
    """

    def soft(uniform: Tensor) -> Tensor:
        return torch.sigmoid((latents + offset - torch.log(-torch.log(uniform))) / TEMPERATURE)

    counted = soft(torch.remainder(noise + 0.5, 1.0).clamp(1e-7, 1 - 1e-7))
    return soft(noise.clamp(1e-7, 1 - 1e-7)), counted.round() + counted - counted.detach()


ESTIMATORS: dict[EstimatorName, Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]] = {
    "reinmax": reinmax,
    "gumbel": gumbel,
}
MEDIAN_OF_NOISE: dict[EstimatorName, float] = {"reinmax": 0.0, "gumbel": -math.log(math.log(2.0))}
"""A gate is on more often than off where latent + OFFSET + this is positive."""
