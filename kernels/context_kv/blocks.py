"""Which block of outputs one program of a product with the tokens computes."""

from typing import NamedTuple

from ..launch import cdiv, next_power_of_2

# Compute capabilities whose kernels read tiles by the tensor memory accelerator (TMA).
TMA = (90, 100, 103)


class ColumnBlocks(NamedTuple):
    """The outputs of one program: a main block, and a narrow block beside it, or 0 for none.

    Triton's tiles have powers of 2 as sizes. With one block, the 136 outputs of 17 latents and 8
    heads would take 256 columns, almost half of them padding; with two they take
    128 + 16.
    """

    main: int
    narrow: int

    @property
    def width(self) -> int:
        return self.main + self.narrow


_SMALL = (ColumnBlocks(16, 0), ColumnBlocks(32, 0), ColumnBlocks(64, 0))
# For 32-bit operands, and for tokens that are centred or normalised in registers, which hold no
# more.
SINGLE = (*_SMALL, ColumnBlocks(128, 0))
# For 16-bit operands on sm_80, and in projections on sm_100: larger ones spill registers.
HALF = (*_SMALL, ColumnBlocks(64, 16), ColumnBlocks(128, 0), ColumnBlocks(128, 16))
# For pooling by TMA on sm_100.
WIDE = (*HALF, ColumnBlocks(256, 0))
# For both products by TMA on sm_90.
HOPPER = (*WIDE, ColumnBlocks(128, 32), ColumnBlocks(128, 64), ColumnBlocks(256, 16))


def columns_of(outputs: int, allowed: tuple[ColumnBlocks, ...]) -> ColumnBlocks:
    """Return the block of outputs, of those allowed, with the fewest reads from the L2 cache.

    In every step a program reads 128 rows of tokens and the rows of weights of its outputs, so the
    reads are (128 + width) times the number of programs that the outputs take. Of two blocks with
    equal reads the narrower one is taken.
    """
    return min(
        allowed, key=lambda block: (cdiv(outputs, block.width) * (128 + block.width), block.width)
    )


def padded_columns(outputs: int, capability: int) -> int:
    """Return how many outputs a projection computes for `outputs`, those of padding included."""
    block = columns_of(outputs, HOPPER if capability == 90 else HALF)
    return cdiv(outputs, block.width) * block.width


def pool_chunk(outputs: int) -> int:
    """Return the rows that one program pools: 16 to 32 for each output, from 512 to 16,384.

    A program writes one fp32 row of the tokens' width for each output, which another kernel reads.
    With 16 to 32 rows for each output, that moves an eighth to a quarter of the bytes of the
    tokens in 16 bits. The size of a chunk depends on nothing else, so that a bag is cut alike in
    any batch.
    """
    return max(512, min(16384, next_power_of_2(32 * outputs + 1) // 2))
