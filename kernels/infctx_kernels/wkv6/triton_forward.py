"""Forward kernels: the states of segments, the scan over segments, and the outputs.

A segment is a run of blocks of one row and head that one program walks through. With enough rows and heads to fill
the device there is one segment, and `outputs_kernel` alone is the whole forward pass. Else every segment's local state
(from zero) and decay are made in parallel, a scan over the segments gives the state each one begins with, and the
outputs of all segments are made in parallel from those.

Where a document starts, the running state is exchanged for the start state by a selection, never by a product with 0:
a state that is not finite would survive that.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from infctx_kernels.wkv6.triton_blocks import (
    BLOCK_TOKENS,
    as_operand,
    block_offset,
    decay_over,
    finish_scores,
    load_document,
    load_log2_decay,
    load_tokens,
    mild_or_any_scores,
    path_from_front,
    path_from_own_start,
    path_to_end,
    scores_by_levels,
    split_exponents,
    token_offsets,
    tokens_inside,
)

# Stands in a segment's log decay, else <= 0 or NaN: nothing from before the segment leaves it.
DOCUMENT_STARTED = tl.constexpr(1.0)


@triton.jit
@no_type_check
def state_of_last_document(
    state, document, start_state, HAS_STARTS: tl.constexpr, HAS_START_STATE: tl.constexpr
):  # fmt: skip
    """The state that the block's last document began with: the state before the block, unless a document starts in it.

    start_state: pointers to the same tile.
    """
    if HAS_STARTS:
        if HAS_START_STATE:
            if tl.max(document, axis=0) > 0:
                state = tl.load(start_state).to(tl.float32)
        else:
            state = tl.where(tl.max(document, axis=0) > 0, 0.0, state)
    return state


@triton.jit
@no_type_check
def total_of_last_document(log2_decay, document, HAS_STARTS: tl.constexpr):
    """The log2 decay from the last start in the block, else from its front, to its end, [channels]."""
    if HAS_STARTS:
        log2_decay = tl.where((document == tl.max(document, axis=0))[:, None], log2_decay, 0.0)
    return tl.sum(log2_decay, axis=0)


@triton.jit
@no_type_check
def state_after_block(
    state, k_to_end, v, total, document, HAS_STARTS: tl.constexpr, BY_VALUE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """The state after a block, from the one that its last document began with; [keys, values] if not BY_VALUE.

    total: of `total_of_last_document`.
    """
    if HAS_STARTS:
        k_to_end = tl.where((document == tl.max(document, axis=0))[:, None], k_to_end, 0.0)
    if BY_VALUE:
        return tl.dot(tl.trans(v), k_to_end, acc=state * tl.exp2(total)[None, :], input_precision=PRECISION)
    else:
        return tl.dot(tl.trans(k_to_end), v, acc=state * tl.exp2(total)[:, None], input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "segment_blocks"])
@no_type_check
def segment_states_kernel(
    key, value, decay, starts, start_state, segment_states, segment_decays,
    num_tokens, rows_and_heads, heads, num_segments, segment_blocks,
    HEAD_SIZE: tl.constexpr, VALUE_TILE: tl.constexpr, DECAY_IS_RAW: tl.constexpr, HAS_STARTS: tl.constexpr,
    HAS_START_STATE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each segment's state from zero, [B * H, segments, N, N], and its log2 decay, [B * H, segments, N]."""
    tiles: tl.constexpr = HEAD_SIZE // VALUE_TILE
    program = tl.program_id(0)
    tile, row_head, segment = program % tiles, program // tiles % rows_and_heads, program // tiles // rows_and_heads
    row, head = row_head // heads, row_head % heads
    keys = tl.arange(0, HEAD_SIZE)
    values = tile * VALUE_TILE + tl.arange(0, VALUE_TILE)
    in_state = values[:, None] + keys[None, :] * HEAD_SIZE
    at_keys = token_offsets(heads, keys, HEAD_SIZE)
    at_values = token_offsets(heads, values, HEAD_SIZE)
    start_tile = start_state + head * HEAD_SIZE * HEAD_SIZE + in_state

    state = tl.zeros((VALUE_TILE, HEAD_SIZE), tl.float32)
    segment_decay = tl.zeros((HEAD_SIZE,), tl.float32)
    num_started = 0
    first_block = segment * segment_blocks
    # Fetched a block ahead by hand: the compiler does not pipeline what it has to transpose.
    here = block_offset(row, head, first_block, num_tokens, heads, HEAD_SIZE)
    v_ahead = tl.load(value + here + at_values, mask=tokens_inside(first_block, num_tokens), other=0.0)
    for block in range(first_block, tl.minimum(first_block + segment_blocks, tl.cdiv(num_tokens, BLOCK_TOKENS))):
        inside = tokens_inside(block, num_tokens)
        here = block_offset(row, head, block, num_tokens, heads, HEAD_SIZE)
        k = load_tokens(key + here, at_keys, inside)
        v = v_ahead.to(tl.float32)
        ahead = block_offset(row, head, block + 1, num_tokens, heads, HEAD_SIZE)
        v_ahead = tl.load(value + ahead + at_values, mask=tokens_inside(block + 1, num_tokens), other=0.0)
        log2_decay = load_log2_decay(decay + here, at_keys, inside, DECAY_IS_RAW)
        if HAS_STARTS:
            document = load_document(starts + tl.cast(row, tl.int64) * num_tokens, block, num_tokens)
            num_started += tl.max(document, axis=0)
        else:
            document = 0
        k_to_end = as_operand(k * decay_over(path_to_end(), split_exponents(log2_decay)), PRECISION)
        state = state_of_last_document(state, document, start_tile, HAS_STARTS, HAS_START_STATE)
        total = total_of_last_document(log2_decay, document, HAS_STARTS)
        state = state_after_block(state, k_to_end, v, total, document, HAS_STARTS, True, PRECISION)
        segment_decay += tl.sum(log2_decay, axis=0)

    place = tl.cast(row_head, tl.int64) * num_segments + segment
    tl.store(segment_states + place * HEAD_SIZE * HEAD_SIZE + in_state, state)
    if HAS_STARTS:
        segment_decay = tl.where(num_started > 0, DOCUMENT_STARTED, segment_decay)
    if tile == 0:
        tl.store(segment_decays + place * HEAD_SIZE + keys, segment_decay)


@triton.jit(do_not_specialize=["num_segments"])
@no_type_check
def scan_kernel(
    initial, segment_states, segment_decays, num_segments,
    HEAD_SIZE: tl.constexpr, KEY_TILE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Exchange each segment's local state for the one it begins with, in place; REVERSE: the state's gradient.

    initial: [B * H, N, N], before the first segment (REVERSE: behind the last).
    """
    tiles: tl.constexpr = HEAD_SIZE // KEY_TILE
    row_head = tl.cast(tl.program_id(0) // tiles, tl.int64)
    keys = tl.program_id(0) % tiles * KEY_TILE + tl.arange(0, KEY_TILE)
    in_state = keys[:, None] * HEAD_SIZE + tl.arange(0, HEAD_SIZE)[None, :]
    running = tl.load(initial + row_head * HEAD_SIZE * HEAD_SIZE + in_state)
    for step in range(num_segments):
        segment = num_segments - 1 - step if REVERSE else step
        place = row_head * num_segments + segment
        here = segment_states + place * HEAD_SIZE * HEAD_SIZE + in_state
        local = tl.load(here)
        log2_decay = tl.load(segment_decays + place * HEAD_SIZE + keys)
        tl.store(here, running)
        kept = tl.where((log2_decay == DOCUMENT_STARTED)[:, None], 0.0, running * tl.exp2(log2_decay)[:, None])
        running = kept + local


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "segment_blocks"])
@no_type_check
def outputs_kernel(
    receptance, key, value, decay, bonus, starts, start_state, front_states, output, new_state, checkpoints,
    num_tokens, rows_and_heads, heads, num_segments, segment_blocks,
    HEAD_SIZE: tl.constexpr, VALUE_TILE: tl.constexpr, CHECKPOINT_BLOCKS: tl.constexpr, CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr, DECAY_IS_RAW: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_START_STATE: tl.constexpr,
    SAVES_CHECKPOINTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of each segment from the state it begins with, front_states [B * H, segments, N, N].

    checkpoints: [B * H, ceil(blocks / CHECKPOINT_BLOCKS), N, N], the state in front of every so many blocks.
    """
    tiles: tl.constexpr = HEAD_SIZE // VALUE_TILE
    program = tl.program_id(0)
    tile, row_head, segment = program % tiles, program // tiles % rows_and_heads, program // tiles // rows_and_heads
    row, head = row_head // heads, row_head % heads
    keys = tl.arange(0, HEAD_SIZE)
    values = tile * VALUE_TILE + tl.arange(0, VALUE_TILE)
    in_state = values[:, None] + keys[None, :] * HEAD_SIZE
    at_keys = token_offsets(heads, keys, HEAD_SIZE)
    at_values = token_offsets(heads, values, HEAD_SIZE)
    start_tile = start_state + head * HEAD_SIZE * HEAD_SIZE + in_state
    u = tl.load(bonus + head * HEAD_SIZE + keys).to(tl.float32)

    num_blocks = tl.cdiv(num_tokens, BLOCK_TOKENS)
    num_checkpoints = tl.cdiv(num_blocks, CHECKPOINT_BLOCKS)
    place = tl.cast(row_head, tl.int64) * num_segments + segment
    state = tl.load(front_states + place * HEAD_SIZE * HEAD_SIZE + in_state)
    first_block = segment * segment_blocks
    # Fetched a block ahead by hand, as above.
    here = block_offset(row, head, first_block, num_tokens, heads, HEAD_SIZE)
    v_ahead = tl.load(value + here + at_values, mask=tokens_inside(first_block, num_tokens), other=0.0)
    for block in range(first_block, tl.minimum(first_block + segment_blocks, num_blocks)):
        inside = tokens_inside(block, num_tokens)
        here = block_offset(row, head, block, num_tokens, heads, HEAD_SIZE)
        r = load_tokens(receptance + here, at_keys, inside)
        k = load_tokens(key + here, at_keys, inside)
        v = v_ahead.to(tl.float32)
        log2_decay = load_log2_decay(decay + here, at_keys, inside, DECAY_IS_RAW)
        # Not one condition: the first is known to the compiler, the second only on the device.
        if SAVES_CHECKPOINTS:  # noqa: SIM102
            if block % CHECKPOINT_BLOCKS == 0:
                checkpoint = tl.cast(row_head, tl.int64) * num_checkpoints + block // CHECKPOINT_BLOCKS
                tl.store(checkpoints + checkpoint * HEAD_SIZE * HEAD_SIZE + in_state, state)

        parts = split_exponents(log2_decay)
        document = 0
        path_of_queries = path_from_front()
        if HAS_STARTS:
            document = load_document(starts + tl.cast(row, tl.int64) * num_tokens, block, num_tokens)
            path_of_queries = path_from_own_start(document)
        own = tl.sum(r * k * u[None, :], axis=1)
        if PRECISION == "tf32":
            r_from_front = as_operand(r * decay_over(path_of_queries, parts), PRECISION)
            k_to_end = as_operand(k * decay_over(path_to_end(), parts), PRECISION)
            total = tl.sum(log2_decay, axis=0)
            scores = mild_or_any_scores(
                receptance + here, key + here, decay + here, heads, inside, r_from_front, k_to_end, total, document,
                HEAD_SIZE, CHANNELS, LEVELS, DECAY_IS_RAW, HAS_STARTS,
            )  # fmt: skip
        else:
            scores = scores_by_levels(
                receptance + here,
                key + here,
                decay + here,
                heads,
                inside,
                HEAD_SIZE,
                CHANNELS,
                LEVELS,
                DECAY_IS_RAW,
                PRECISION,
            )
            r_from_front = r * decay_over(path_of_queries, parts)
        scores = finish_scores(scores, own, document, HAS_STARTS, PRECISION)
        # [values, tokens]: with the state on the left, Hopper's own matrix instructions can take it.
        if HAS_STARTS and HAS_START_STATE and PRECISION != "tf32":
            reads = tl.zeros((VALUE_TILE, BLOCK_TOKENS), tl.float32)
            # One product in a loop: two would keep the three parts of what they share. It costs the fetching ahead.
            for is_fresh in tl.range(0, tl.where(tl.max(document, axis=0) > 0, 2, 1), num_stages=1):
                if is_fresh == 1:
                    state = tl.load(start_tile).to(tl.float32)
                found = tl.dot(state, tl.trans(r_from_front), input_precision=PRECISION)
                reads = tl.where(((document > 0) == (is_fresh == 1))[None, :], found, reads)
        else:
            reads = as_operand(tl.dot(state, tl.trans(r_from_front), input_precision=PRECISION), PRECISION)
            if HAS_STARTS:
                if HAS_START_STATE:
                    if tl.max(document, axis=0) > 0:
                        state = tl.load(start_tile).to(tl.float32)
                        fresh_reads = tl.dot(state, tl.trans(r_from_front), input_precision=PRECISION)
                        reads = tl.where((document == 0)[None, :], reads, as_operand(fresh_reads, PRECISION))
                else:
                    reads = tl.where((document == 0)[None, :], reads, 0.0)
                    state = tl.where(tl.max(document, axis=0) > 0, 0.0, state)
        y = tl.trans(tl.dot(tl.trans(v), tl.trans(scores), acc=reads, input_precision=PRECISION))
        tl.store(output + here + at_values, y.to(output.dtype.element_ty), mask=inside)
        if PRECISION != "tf32":
            k_to_end = k * decay_over(path_to_end(), parts)
        total = total_of_last_document(log2_decay, document, HAS_STARTS)
        state = state_after_block(state, k_to_end, v, total, document, HAS_STARTS, True, PRECISION)
        ahead = block_offset(row, head, block + 1, num_tokens, heads, HEAD_SIZE)
        v_ahead = tl.load(value + ahead + at_values, mask=tokens_inside(block + 1, num_tokens), other=0.0)
    if segment == num_segments - 1:
        tl.store(new_state + tl.cast(row_head, tl.int64) * HEAD_SIZE * HEAD_SIZE + in_state, state)
