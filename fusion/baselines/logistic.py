"""Logistic regression with a ridge penalty, on rotated features."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from .cox import OrthonormalAxes
from .cross_validation import FittingData, Floats, choose, log_likelihood_score
from .features import FlatFeatures
from .models import LinearModel

# The C of scikit-learn, the inverse of a penalty. It rises, so that each fit starts near its end.
STRENGTHS = tuple(float(10 ** (exponent / 2)) for exponent in range(-12, 3))


def logistic_regression(features: FlatFeatures, data: FittingData) -> LinearModel:
    """Fit (multinomial) logistic regression, with the penalty of the best cross-validated log loss.

    Raises:
        ValueError: a single class.
    """
    axes = OrthonormalAxes.of(data.x)
    rotated = data.with_features(axes.rotate(data.x))
    classes = int(data.outcome[0].max()) + 1

    def fit_strengths(part: FittingData) -> Callable[[Floats], Floats]:
        fits = _fit(part, STRENGTHS, classes)

        def predict(z: Floats) -> Floats:
            logits = [intercepts + z @ coefficients.T for coefficients, intercepts in fits]
            return softmax(np.stack(logits), axis=2)

        return predict

    chosen = choose(rotated, fit_strengths, log_likelihood_score, "logistic regression")
    # Up to the chosen strength, so that the fit starts where that of the folds did.
    coefficients, intercepts = _fit(rotated, STRENGTHS[: chosen + 1], classes)[-1]
    model = axes.linear_model(features, coefficients)
    model.bias.data += torch.from_numpy(intercepts)
    return model


def _fit(
    data: FittingData, strengths: Sequence[float], classes: int
) -> list[tuple[Floats, Floats]]:
    """Return coefficients [K, r] and intercepts [K] at every strength; each starts from the last.

    A class without a patient has the intercept -inf.
    """
    model = LogisticRegression(max_iter=5000, tol=1e-6, warm_start=True)
    fits = []
    for strength in strengths:
        model.set_params(C=strength).fit(data.x, data.outcome[0])
        of_classes, starts = model.coef_, np.asarray(model.intercept_)
        if len(of_classes) == 1:  # of two classes, scikit-learn has the second alone
            of_classes = np.concatenate([np.zeros_like(of_classes), of_classes])
            starts = np.array([0.0, starts[0]])
        coefficients = np.zeros((classes, data.x.shape[1]))
        intercepts = np.full(classes, -np.inf)
        coefficients[model.classes_], intercepts[model.classes_] = of_classes, starts
        fits.append((coefficients, intercepts))
    return fits
