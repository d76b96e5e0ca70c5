"""How many outputs of a product with the tokens a program computes, by arithmetic alone."""

from typing import NamedTuple

from ..launch import cdiv, next_power_of_2

# Compute capabilities whose kernels read tiles by the tensor memory accelerator (TMA).
TMA = (90, 100, 103)


class Columns(NamedTuple):
    """The outputs of one program: a block, and a narrow one beside it, powers of 2 as tiles are.

    136 outputs, those of 17 latents and 8 heads, take 128 + 16 columns, not 256.
    """

    main: int
    rest: int

    @property
    def width(self) -> int:
        return self.main + self.rest


_NARROW = (Columns(16, 0), Columns(32, 0), Columns(64, 0))
# Of 32 bits, or of what is normalised in registers.
SINGLE = (*_NARROW, Columns(128, 0))
# On sm_80, and in projections on sm_100, more spill.
HALF = (*_NARROW, Columns(64, 16), Columns(128, 0), Columns(128, 16))
WIDE = (*HALF, Columns(256, 0))
HOPPER = (*WIDE, Columns(128, 32), Columns(128, 64), Columns(256, 16))


def columns_of(outputs: int, allowed: tuple[Columns, ...]) -> Columns:
    """Return which columns, of those allowed, read least from the second-level cache.

    That is 128 rows of tokens and its own outputs' weights in every step of a program.
    """
    return min(allowed, key=lambda own: (cdiv(outputs, own.width) * (128 + own.width), own.width))


def padded_columns(outputs: int, capability: int) -> int:
    """Return how many outputs a projection computes for `outputs`, beyond the last too."""
    own = columns_of(outputs, HOPPER if capability == 90 else HALF)
    return cdiv(outputs, own.width) * own.width


def pool_chunk(outputs: int) -> int:
    """Return the rows that one program pools: 512 to 16,384, 16 to 32 for each output.

    Its result is float32, so that to write and to read the results of all programs takes an eighth
    to a quarter of what reading the tokens in 16 bits does. Chunks depend on nothing else: a bag
    alone is cut as it is in any batch.
    """
    return max(512, min(16384, next_power_of_2(32 * outputs + 1) // 2))
