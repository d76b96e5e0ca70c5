"""One running size of the gradient for all weights that read a token, in place of Adam's one each.

Adam divides the gradient of each weight by its running size. For the weights that read a row of
thousands of features this makes all of them move equally fast: a feature with a signal as fast as
the noise of each other feature, and together these drown it. Gradient descent moves a weight in
proportion to its gradient, and so finds solutions like those of ridge regression. With one running
size for all weights that read a token, Adam does the same.
"""

import torch
from torch import nn

from .attention import Attention


def token_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that read the features of tokens: LayerNorm and projection."""
    return [
        parameter
        for attention in model.modules()
        if isinstance(attention, Attention) and attention.norm_context is not None
        for part in (attention.norm_context, attention.to_kv)
        for parameter in part.parameters()
        if parameter.requires_grad
    ]


@torch.no_grad()
def share_moments(adam: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Set Adam's second moment of each parameter to its mean over the parameter's weights.

    Called at the start of each epoch: between two calls, a weight's newest gradients count with a
    share of only 1 - beta2 = 0.001 per step, so that the moments hardly differ. Calls in every step
    would give the same results, and on a GPU start two kernels per parameter.

    Args:
        adam: the optimiser; before its first step there are no moments, and nothing happens.
        parameters: of the optimiser.
    """
    for parameter in parameters:
        moment = adam.state.get(parameter, {}).get("exp_avg_sq")
        if moment is not None:
            moment.copy_(moment.mean())
