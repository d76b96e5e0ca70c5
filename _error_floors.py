"""Error floors: the error that is allowed in addition to twice the error of the reference.

An operator or model passes if its error against float64 is at most 2 err(reference) + floor, with
the reference in the same dtype. The floor is for errors that the reference happens not to have: a
sum in another order, a result that is rounded once more. Tests and the checks on a GPU
(`python_tests/comparison.py`) and benchmarks use these tables; the keys are the dtypes.

With u the unit roundoff (float64 1.1e-16, float32 6.0e-8, float16 4.9e-4, bfloat16 3.9e-3), one
rounding is at most u for a number and, as a root mean square over many, about 0.4 u; a sum of n
terms in two orders differs by about sqrt(n) u of its terms' size (at most n u).
"""

# The largest error of an element, relative to the largest element, or to 1 if all are smaller.
# float32: 17 u, for sums of 300 terms. Half precision: 2 u, since sums are in float32, and there
# are two roundings: of an intermediate and of the result. float64: 9000 u; the reference in float64
# is itself the exact result and has no error, so this floor alone must cover a chain of operators.
ELEMENT = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}

# The error of one operator on a GPU as a norm, relative to the norm of the exact result. float32:
# 84 u, for sums over 7000 tokens. Half precision: 0.6 and 0.5 u, for one rounding of the result.
OPERATOR = {"float32": 5e-6, "float16": 3e-4, "bfloat16": 2e-3}

# The same for a whole model with its gradients. float32: 168 u, for a few such operators in a
# chain. bfloat16: 1.3 u, for ten roundings in a row (0.4 sqrt(10) u). float64: not derived from
# roundings; it is far above the errors of the models and far below that of a wrong formula.
MODEL = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 5e-3}

# The allowed difference of two float32 forms of a deep model, if there is no reference in float32:
# 1700 u, ten times MODEL, since passes that divide by a norm may lose one more digit.
DEEP_MODEL = {"float32": 1e-4}

# An error above this is a fault, not rounding; nothing with such an error is timed.
FAULT = 1e-3
