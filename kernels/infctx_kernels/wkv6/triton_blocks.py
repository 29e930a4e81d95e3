"""What the Triton kernels share: one block of tokens of one head, and the decays inside it.

Inside a block, token i reads token j < i through the decays between them. Cut the block in halves: every such pair
across the cut decays from j to the cut and from the cut to i; the same again inside each half, down to halves of one
token. So four 16 x 16 products, each of which gives only the pairs of its level, hold every pair, and no exponent is
ever above 0 or a difference of two sums: exact for every decay, without a second path for fast ones.

Each level's exponents are sums of log decays over a few tokens of the block: a product of a constant 0/1 matrix
(`is_on_path`) with the log decays. Its transpose carries the gradient of the exponents back to the log decays, and
every summand of it is a pair that decays through that token: nothing cancels.

Every kernel is `no_type_check`: the tests' import hook would else hand Triton its own wrapper to compile.

Legend: B rows, T tokens, H heads, N head size; r, k, v, u receptance, key, value, bonus; i and j tokens of a block.
Decays are base 2 logarithms here, because exp2 is what the hardware has.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

BLOCK_TOKENS = tl.constexpr(16)
# Halves of 1, 2, 4 and 8 tokens; a matrix product over all levels at once gives each warp a level.
NUM_LEVELS = tl.constexpr(4)
LOG2_E = tl.constexpr(1.4426950408889634)
LOG2_LOG2_E = tl.constexpr(0.5287663729448977)
LN_2 = tl.constexpr(0.6931471805599453)
# exp2 of it is 0, and it is finite in 16 bits.
SMALLEST_LOG2_DECAY = tl.constexpr(-4.0e4)
# Twice its size is far inside the exponents of float32.
MILD_LOG2_DECAY = tl.constexpr(-60.0)
# 1 + 2^-11.5: half of the last digit that tf32 keeps, in the mean over all numbers.
CENTRE_OF_TF32 = tl.constexpr(1.000345)


@triton.jit
@no_type_check
def block_offset(row, head, block, num_tokens, heads, HEAD_SIZE: tl.constexpr):
    """Where a block lies for one head in a contiguous [B, T, H, N]: a scalar, the only offset that can be large."""
    return ((tl.cast(row, tl.int64) * num_tokens + block * BLOCK_TOKENS) * heads + head) * HEAD_SIZE


@triton.jit
@no_type_check
def token_offsets(heads, channels, HEAD_SIZE: tl.constexpr):
    """Offsets of tokens and channels inside a block, [tokens, channels]."""
    return tl.arange(0, BLOCK_TOKENS)[:, None] * (heads * HEAD_SIZE) + channels[None, :]


@triton.jit
@no_type_check
def tokens_inside(block, num_tokens):
    """Which of a block's tokens exist, [tokens, 1]."""
    return (tl.arange(0, BLOCK_TOKENS) + block * BLOCK_TOKENS < num_tokens)[:, None]


@triton.jit
@no_type_check
def load_tokens(tensor, offsets, inside):
    """A block's tokens in float32; behind the last token zeros, which read and write nothing.

    tensor: at the block, as in all the loads below.
    """
    return tl.load(tensor + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def as_log2_decay(decay, inside, DECAY_IS_RAW: tl.constexpr):
    """A block's log decays; 0 (no decay) behind the last token, NaN for a decay above 1."""
    log_decay = decay.to(tl.float32)
    if DECAY_IS_RAW:
        log2_decay = tl.where(inside, -tl.exp2(log_decay * LOG2_E + LOG2_LOG2_E), 0.0)
    else:
        log2_decay = tl.where(log_decay <= 0.0, log_decay * LOG2_E, float("nan"))
    # Not a maximum: that would swallow NaN.
    return tl.where(log2_decay < SMALLEST_LOG2_DECAY, SMALLEST_LOG2_DECAY, log2_decay)


@triton.jit
@no_type_check
def load_log2_decay(decay, offsets, inside, DECAY_IS_RAW: tl.constexpr):
    """Load and prepare a block's log decays."""
    return as_log2_decay(tl.load(decay + offsets, mask=inside, other=0.0), inside, DECAY_IS_RAW)


@triton.jit
@no_type_check
def load_document(starts, block, num_tokens):
    """Which document of the block each token belongs to, [tokens]; 0 = the one that ran when the block began.

    starts: at the row's first token.
    """
    tokens = tl.arange(0, BLOCK_TOKENS)
    places = tokens + block * BLOCK_TOKENS
    return tl.cumsum(tl.load(starts + places, mask=places < num_tokens, other=0).to(tl.int32), 0)


@triton.jit
@no_type_check
def is_on_path(level, to, through):
    """Whether a token decays through another one on its way to or from the cut between its pair of halves.

    level: the halves have 2^level tokens. Shifts, as a division of integers would be made again in every block.
    """
    is_second = (to >> level) & 1
    between = ((is_second == 1) & (through < to)) | ((is_second == 0) & (through > to))
    return ((to >> level) == (through >> level)) & between


@triton.jit
@no_type_check
def is_pair(level, i, j):
    """Whether j lies in the first, i in the second of two neighbouring halves of 2^level tokens."""
    return (((i ^ j) >> level) == 1) & (i > j)


@triton.jit
@no_type_check
def path_of_level(LEVEL: tl.constexpr):
    """0/1 [token, token]: through which tokens each one decays to or from its cut."""
    tokens = tl.arange(0, BLOCK_TOKENS)
    return is_on_path(LEVEL, tokens[:, None], tokens[None, :]).to(tl.float32)


@triton.jit
@no_type_check
def pairs_of_level(LEVEL: tl.constexpr):
    """[i, j]: the pairs whose decay is the product of those on the paths of i and of j."""
    tokens = tl.arange(0, BLOCK_TOKENS)
    return is_pair(LEVEL, tokens[:, None], tokens[None, :])


@triton.jit
@no_type_check
def path_from_front():
    """0/1 [i, token]: the tokens before i in the block."""
    tokens = tl.arange(0, BLOCK_TOKENS)
    return (tokens[None, :] < tokens[:, None]).to(tl.float32)


@triton.jit
@no_type_check
def path_from_own_start(document):
    """0/1 [i, token]: the tokens before i that are of i's document."""
    tokens = tl.arange(0, BLOCK_TOKENS)
    return ((tokens[None, :] < tokens[:, None]) & (document[None, :] == document[:, None])).to(tl.float32)


@triton.jit
@no_type_check
def path_to_end():
    """0/1 [j, token]: the tokens behind j in the block."""
    tokens = tl.arange(0, BLOCK_TOKENS)
    return (tokens[None, :] > tokens[:, None]).to(tl.float32)


@triton.jit
@no_type_check
def split_exponents(log2_decay):
    """Log decays as sums of two parts of 11 bits, which keep 22 bits of an exponent."""
    coarse = log2_decay.to(tl.float16)
    return coarse, (log2_decay - coarse.to(tl.float32)).to(tl.float16)


@triton.jit
@no_type_check
def decay_over(path, parts):
    """The decay over each path, [tokens, channels], 0 to 1.

    parts: of `split_exponents`. A 0/1 matrix is exact in 16 bits too.
    """
    coarse, fine = parts
    path = path.to(tl.float16)
    return tl.exp2(tl.dot(path, fine, acc=tl.dot(path, coarse)))


@triton.jit
@no_type_check
def as_operand(x, PRECISION: tl.constexpr):
    """Prepare a factor of a matrix product that has more digits than the inputs."""
    if PRECISION == "tf32":
        # The hardware cuts off what tf32 cannot hold, always towards 0: products would be 1e-3 too small. This makes
        # the mean error 0, and leaves a number of 8 bits (a bfloat16 that no decay has touched) exact.
        return x * CENTRE_OF_TF32
    else:
        return x


@triton.jit
@no_type_check
def add_over_paths(path, x, total, PRECISION: tl.constexpr):
    """Add the product of a 0/1 matrix with x, a gradient, to a total that `as_operand` has to correct in the end."""
    if PRECISION == "tf32":
        return tl.dot(path, x, acc=total, input_precision="tf32")
    else:
        # Two parts as above, but with the range of float32.
        coarse = x.to(tl.bfloat16).to(tl.float32)
        total = tl.dot(path, coarse, acc=total, input_precision="tf32")
        return tl.dot(path, x - coarse, acc=total, input_precision="tf32")


@triton.jit
@no_type_check
def scores_by_levels(
    receptance, key, decay, heads, inside, HEAD_SIZE: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr,
    DECAY_IS_RAW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What token i reads of the value of an earlier token j of the block, [i, j], for any decays.

    CHANNELS: how many to multiply at once. LEVELS: how many of the levels; as many as warps gives each warp a level.
    """
    tokens = tl.arange(0, BLOCK_TOKENS)
    i, j = tokens[None, :, None], tokens[None, None, :]
    scores = tl.zeros((BLOCK_TOKENS, BLOCK_TOKENS), tl.float32)
    shape: tl.constexpr = (LEVELS, BLOCK_TOKENS, CHANNELS)
    for first_channel in tl.static_range(0, HEAD_SIZE, CHANNELS):
        # Loaded again: kept until here, they would take registers from blocks that need no levels.
        offsets = token_offsets(heads, first_channel + tl.arange(0, CHANNELS), HEAD_SIZE)
        r = load_tokens(receptance, offsets, inside)
        k = load_tokens(key, offsets, inside)
        coarse, fine = split_exponents(load_log2_decay(decay, offsets, inside, DECAY_IS_RAW))
        parts = (tl.broadcast_to(coarse[None, :, :], shape), tl.broadcast_to(fine[None, :, :], shape))
        for first in tl.static_range(0, NUM_LEVELS, LEVELS):
            level = (tl.arange(0, LEVELS) + first)[:, None, None]
            decays = as_operand(decay_over(is_on_path(level, i, j).to(tl.float32), parts), PRECISION)
            # A token is on one side of its cut: its own row or column of the product is its as a query or as a key.
            either = tl.where(((i >> level) & 1) == 1, r[None, :, :], k[None, :, :]) * decays
            across = tl.dot(either, tl.permute(either, (0, 2, 1)), input_precision=PRECISION)
            scores += tl.sum(tl.where(is_pair(level, i, j), across, 0.0), axis=0)
    return scores


@triton.jit
@no_type_check
def is_mild(total, document, HAS_STARTS: tl.constexpr):
    """Whether one product gives the scores of the block: no decay leaves the range of numbers, no document starts."""
    mild = tl.min(total, axis=0) > MILD_LOG2_DECAY
    if HAS_STARTS:
        mild = mild & (tl.max(document, axis=0) == 0)
    return mild


@triton.jit
@no_type_check
def mild_or_any_scores(
    receptance, key, decay, heads, inside, r_from_front, k_to_end, total, document,
    HEAD_SIZE: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr, DECAY_IS_RAW: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):  # fmt: skip
    """The same from one product where the block allows it; in tf32, below whose precision its larger exponents are."""
    if is_mild(total, document, HAS_STARTS):
        # From the front to i and from j to the end is once too often through the whole block.
        scores = tl.dot(r_from_front * tl.exp2(-total)[None, :], tl.trans(k_to_end), input_precision="tf32")
    else:
        scores = scores_by_levels(
            receptance, key, decay, heads, inside, HEAD_SIZE, CHANNELS, LEVELS, DECAY_IS_RAW, "tf32"
        )
    return scores


@triton.jit
@no_type_check
def finish_scores(scores, own, document, HAS_STARTS: tl.constexpr, PRECISION: tl.constexpr):
    """How much token i reads of the value of each token j of the block, [i, j]; of its own through the bonus."""
    i = tl.arange(0, BLOCK_TOKENS)[:, None]
    j = tl.arange(0, BLOCK_TOKENS)[None, :]
    scores = tl.where(i > j, scores, 0.0)
    if HAS_STARTS:
        scores = tl.where(document[:, None] == document[None, :], scores, 0.0)
    return as_operand(tl.where(i == j, own[:, None], scores), PRECISION)
