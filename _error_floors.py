"""Error floors: what a result may be off float64 in any case, beside twice what its reference is.

One table for tests (`python_tests/conftest.py`), the checks on a GPU (`benchmarks/checks.py`) and
benchmarks, by the name of the dtype that is worked in. An operator or model passes if its error is
at most 2 err(reference in that dtype) + floor. The floor is for what the reference happens to have
no error in: a sum in another order, a result that is rounded once more.

With u the unit roundoff (float64 1.1e-16, float32 6.0e-8, float16 4.9e-4, bfloat16 3.9e-3), one
rounding is at most u for a number and, as a root mean square over many, about 0.4 u; a sum of n
terms in two orders differs by about sqrt(n) u of its terms' size (at most n u).
"""

# The largest error of a number, in units of the largest number or of 1 where all are smaller.
# float32: 17 u, sums of 300 terms. Half precision: 2 u, since sums are in float32, and the result
# is rounded, and what was made on the way once more. float64: 9000 u: there the reference is the
# standard itself and has no error, so that this bound alone has to hold for a whole chain.
ELEMENT = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}

# The error of one operator on a GPU as a norm, relative to the norm of what is right. float32:
# 84 u, sums over 7000 tokens. Half precision: 0.6 and 0.5 u, the result being rounded once.
OPERATOR = {"float32": 5e-6, "float16": 3e-4, "bfloat16": 2e-3}

# The same of a whole model with its gradients. float32: 168 u, a few such operators in a chain.
# bfloat16: 1.3 u, ten roundings to it in a row (0.4 sqrt(10) u). float64: not from a count of
# roundings; far above what models leave and far below what a wrong formula does.
MODEL = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 5e-3}

# What two float32 forms of a deep model may differ by, where no reference in float32 is beside them
# to double: 1700 u, ten times MODEL, since passes that divide by a norm may lose one more digit.
DEEP_MODEL = {"float32": 1e-4}

# An error above this is no rounding but a fault; what has it is not timed.
FAULT = 1e-3
