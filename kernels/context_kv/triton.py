"""Launches the Triton kernels that read a context once: LayerNorm folded into products.

Row t of the context is z_t = [x_t | p_(t mod Np)], of width W = D + P, and zhat_t = (z_t - mean_t)
rstd_t. Neither the concatenation nor zhat is ever written. Ragged rows are cut in chunks that are
counted from the start of each bag, so that a bag alone gives what it gives in any batch.
"""

import torch
from torch import Tensor

from ..backends import capability
from ..launch import cdiv, launch, next_power_of_2
from ..ragged import count_slots
from .triton_kernels import combine_pool_kernel, pool_kernel, project_kernel

# Dtypes whose raw x goes to the matrix units, the mean taken out afterwards. bf16 has 8 bits: what
# the fp32 sums lose at mean/SD 100 (1e-3 at worst) is below its rounding. Others subtract first.
_DIRECT = (torch.bfloat16,)


def project(
    x: Tensor,
    p: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight zhat + bias and the statistics of the rows, reading x from memory once.

    Programs that share rows are neighbours in the grid and read them through the second-level
    cache: 128 outputs, on Hopper 256, fit in one program's registers, and 1,648 are needed.

    Args:
        x: [T, D], last stride 1.
        p: [Np, P] positional channels, T a multiple of Np; or None.
        weight: contiguous [S, O, W], of the dtype to work in.
        bias: [S, O] or None.
        offsets: None, and every weight set sees every row; or int64 [S + 1] on the device, and set
            s sees rows offsets[s] to offsets[s + 1].
        mean, rstd: fp32 [T] if known, else None.
        eps: LayerNorm's.

    Returns:
        [S, T, O], or [T, O] with offsets, of weight's dtype; mean and rstd, fp32 [T].
    """
    rows, width = x.shape
    sets, outputs, total = weight.shape
    grouped = offsets is not None
    given = mean is not None
    direct = x.dtype == weight.dtype and x.dtype in _DIRECT
    columns = outputs if grouped else sets * outputs
    block_t, block_o, block_d = _project_blocks(x, weight, columns, direct=direct, given=given)
    y = torch.empty(
        (rows, outputs) if grouped else (sets, rows, outputs), dtype=weight.dtype, device=x.device
    )
    if mean is None or rstd is None:
        own = {"dtype": torch.float32, "device": x.device}
        mean, rstd = torch.empty(rows, **own), torch.empty(rows, **own)
    # An odd W would leave every row of the weight unaligned, without asynchronous copies.
    weight_x = weight if p is None else weight[..., :width].contiguous()
    slots = count_slots(rows, sets, block_t) if grouped else cdiv(rows, block_t)
    if rows and y.numel():
        launch(
            project_kernel, x, (slots * cdiv(columns, block_o),),
            x, p, weight_x, weight, bias,
            weight.sum(-1, dtype=torch.float32) if direct else None,
            offsets, mean, rstd, y, x.stride(0), 0 if p is None else p.stride(0),
            sets, rows, 0 if grouped else rows, 1 if p is None else p.shape[0], eps,
            COLUMNS=columns, OUTPUTS=outputs, D=width, P=total - width,
            BLOCK_T=block_t, BLOCK_O=block_o, BLOCK_D=block_d,
            BLOCK_P=max(16, next_power_of_2(total - width)),
            GROUPED=grouped, GIVEN=given, DIRECT=direct,
            num_warps=8 if block_t * block_o > 64 * 64 else 4, num_stages=3,
        )  # fmt: skip
    return y, mean, rstd


def pool(
    a: Tensor,
    x: Tensor,
    p: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    offsets: Tensor | None,
    groups: int = 1,
) -> Tensor:
    """Return sum_t a[t] zhat[t]^T over the rows t of each bag, in fp32 and in a fixed order.

    Rows are cut in chunks of 16 times the number of outputs, 512 to 16,384 rows, so that the
    partial results take an eighth of a 16-bit x at most (a fifth for 1,648 outputs), and one more
    result per bag.

    Args:
        a: [T, O], or [S, T, O] with one bag; its dtype is the one to work in.
        x, p: as given to project.
        mean, rstd: fp32 [T].
        offsets: int64 [G + 1] on the device: bag g owns rows offsets[g] to offsets[g + 1].
        groups: without offsets, the number of equally long bags.

    Returns:
        fp32 [G, O, W], or [S, O, W] for a of three axes.
    """
    if a.stride(-1) != 1:  # the gradient of a sum, say
        a = a.contiguous()
    rows, width = x.shape
    outputs = a.shape[-1]
    sets = a.shape[0] if a.ndim == 3 else 1
    columns = sets * outputs
    bags = groups if offsets is None else offsets.shape[0] - 1
    length = rows // groups if offsets is None else 0
    chunk = max(512, min(16384, next_power_of_2(16 * columns)))
    slots = groups * cdiv(length, chunk) if offsets is None else count_slots(rows, bags, chunk)
    total = width + (0 if p is None else p.shape[1])
    out = x.new_empty(sets if a.ndim == 3 else bags, outputs, total, dtype=torch.float32)
    if not out.numel():
        return out
    partial = x.new_empty(slots, columns, total, dtype=torch.float32)
    # Triton takes no notice of strides that 8 divides but not 16, such as 200 outputs'.
    unit = 8 if a.stride(-2) % 8 == 0 else 1
    for part, at in ((x, 0), (p, width)):
        if part is None or not slots:
            continue
        grid, blocks = _pool_blocks(a, part, columns, slots)
        launch(
            pool_kernel, x, grid,
            a, part, mean, rstd, offsets, partial, a.stride(0) if a.ndim == 3 else 0,
            a.stride(-2) // unit, part.stride(0), at, total, bags, length, part.shape[0],
            A_UNIT=unit, COLUMNS=columns, OUTPUTS=outputs, D=part.shape[1], CHUNK=chunk,
            RAGGED=offsets is not None, REPEATED=part.shape[0] != rows,
            DIRECT=part.dtype == a.dtype and part.dtype in _DIRECT, **blocks, num_stages=3,
        )  # fmt: skip
    launch(
        combine_pool_kernel, x, (cdiv(columns * total, 128), bags),
        partial, offsets, out, length, columns * total, CHUNK=chunk, RAGGED=offsets is not None,
        num_warps=4,
    )  # fmt: skip
    return out


def _project_blocks(
    x: Tensor, weight: Tensor, columns: int, *, direct: bool, given: bool
) -> tuple[int, int, int]:
    """Return the rows, outputs and channels of a step of project_kernel."""
    # 256 outputs spill on sm_80 (2 stores) and sm_100 (16), where operands pass through registers.
    widest = 256 if direct and capability(x) == 90 else 128
    block_o = _output_block(columns, widest)
    if weight.element_size() > 2 or x.element_size() > 2:
        return 64, block_o, 32
    # Of the others, 128 rows by 128 outputs with statistics spill on sm_100 (2 stores).
    return 128 if direct or given else 64, block_o, 64


def _output_block(columns: int, widest: int) -> int:
    """Return the block that reads least from cache, 128 rows and its own columns per program."""
    if columns <= 64:
        return max(16, next_power_of_2(columns))
    blocks = [block for block in (64, 128, 256) if block <= widest]
    return min(blocks, key=lambda block: cdiv(columns, block) * (128 + block))


def _pool_blocks(
    a: Tensor, part: Tensor, columns: int, slots: int
) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid of pool_kernel for x or the positions, and the blocks of a step."""
    width = part.shape[1]
    half = a.element_size() == 2 and part.element_size() == 2
    # 128 by 128 spill where the outputs do not fill the last block (14 to 38 stores).
    block_o, block_d = _output_block(columns, 128), 64 if width > 32 else 32
    blocks = {"BLOCK_T": 64 if half else 32, "BLOCK_O": block_o, "BLOCK_D": block_d}
    blocks["num_warps"] = 8 if block_d * block_o > 64 * 64 else 4
    return (slots * cdiv(width, block_d) * cdiv(columns, block_o),), blocks
