"""The derivative of slerp, in torch."""

import torch
from torch import Tensor

from .coefficients import cosines_between, inverse_sinc, slerp_coefficients


def gradient(grad: Tensor, vectors: list[Tensor], weights: list[float]) -> list[Tensor]:
    """Return the gradients of Σ c_i v_i: directly, and through c by the implicit function theorem.

    With p = G c (G the cosines) and y_i = w_i Θ_i / sin Θ_i at cos Θ_i = p_i, the coefficients
    satisfy c = y / (y·p). Hence (I - J G) dc = J dG c with J = dc/dp, and for h_i = <grad, v_i>:
    dL = λᵀ dG c with λ = Jᵀ (I - J G)^-T h.
    """
    n = len(vectors)
    cosines, norms = cosines_between(vectors)
    direct = slerp_coefficients(cosines, weights)
    w = torch.tensor(weights, dtype=torch.float64)
    grads = [c * grad.double() for c in direct.tolist()]
    if n > 1 and not torch.equal(direct, w):  # linear weights do not depend on the vectors
        p = (cosines @ direct).clamp(-1, 1)
        y = w * inverse_sinc(p)
        square = (1 - p) * (1 + p)
        slope = torch.where(square < 1e-8, -1 / 3 + 0 * p, (p * inverse_sinc(p) - 1) / square)
        jacobian = (torch.diag(w * slope) - torch.outer(direct, w * slope * p + y)) / (y @ p)
        h = torch.stack([(grad.double() * v.double()).sum() for v in vectors]).cpu()
        system = torch.eye(n, dtype=torch.float64) - jacobian @ cosines
        adjoint = jacobian.T @ torch.linalg.solve(system.T, h)
        pull = torch.outer(adjoint, direct) + torch.outer(direct, adjoint)
        pull = (pull - torch.diag(pull.diagonal())) / (norms[:, None] * norms)
        diagonal = -(pull * cosines * norms[:, None] * norms).sum(1) / norms**2
        weight = (pull + torch.diag(diagonal)).tolist()
        for i in range(n):
            for j in range(n):
                grads[i] = grads[i] + weight[i][j] * vectors[j].double()
    return [g.to(grad.dtype).contiguous() for g in grads]
