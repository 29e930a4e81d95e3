"""Backward kernels: the state gradients of segments, the value gradients, and the gradients per key channel.

The gradient of the state runs from the last token to the first as the state runs forward: local gradients of segments,
the same scan reversed, and a walk through each segment. That walk gives the value gradients. It leaves the state
gradient behind every span of blocks, so that the rest, the gradients of receptance, key, decay and bonus, needs no
walk through the sequence: all spans at once, each from the states that the forward pass saved in front of its blocks.
Values are split between programs in the first, key channels in the second; neither needs a sum over the other's
programs.

A log decay gets the sum over everything that decays through its token, in pieces: pairs within each level of halves,
state to query, key to state gradient, state to state gradient. Each summand holds that decay as a factor, so that the
gradient is exact where the decay is tiny and the difference of two large sums would not be.
"""

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

from infctx_kernels.wkv6.triton_blocks import (
    BLOCK_TOKENS,
    LN_2,
    NUM_LEVELS,
    add_over_paths,
    as_log2_decay,
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
    path_of_level,
    path_to_end,
    scores_by_levels,
    split_exponents,
    token_offsets,
    tokens_inside,
)
from infctx_kernels.wkv6.triton_forward import (
    DOCUMENT_STARTED,
    state_after_block,
    state_of_last_document,
    total_of_last_document,
)


@triton.jit
@no_type_check
def state_gradient_before_block(
    d_state, r_from_front, d_y, total, document, HAS_STARTS: tl.constexpr, BY_VALUE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a block from the one behind it, [values, keys] if BY_VALUE, else [keys, values].

    total: the log2 decay of the block's last document.
    """
    kept = d_state * (tl.exp2(total)[None, :] if BY_VALUE else tl.exp2(total)[:, None])
    if HAS_STARTS:
        kept = tl.where(tl.max(document, axis=0) > 0, 0.0, kept)
        r_from_front = tl.where((document == 0)[:, None], r_from_front, 0.0)
    if BY_VALUE:
        return tl.dot(tl.trans(d_y), r_from_front, acc=kept, input_precision=PRECISION)
    else:
        return tl.dot(tl.trans(r_from_front), d_y, acc=kept, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "segment_blocks"])
@no_type_check
def segment_state_gradients_kernel(
    receptance, decay, starts, d_output, segment_gradients, segment_decays,
    num_tokens, rows_and_heads, heads, num_segments, segment_blocks,
    HEAD_SIZE: tl.constexpr, VALUE_TILE: tl.constexpr, DECAY_IS_RAW: tl.constexpr, HAS_STARTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What each segment's outputs alone give to the state in front of it, and the segment's log2 decay."""
    tiles: tl.constexpr = HEAD_SIZE // VALUE_TILE
    program = tl.program_id(0)
    tile, row_head, segment = program % tiles, program // tiles % rows_and_heads, program // tiles // rows_and_heads
    row, head = row_head // heads, row_head % heads
    keys = tl.arange(0, HEAD_SIZE)
    values = tile * VALUE_TILE + tl.arange(0, VALUE_TILE)
    in_state = values[:, None] + keys[None, :] * HEAD_SIZE
    at_keys = token_offsets(heads, keys, HEAD_SIZE)
    at_values = token_offsets(heads, values, HEAD_SIZE)

    d_state = tl.zeros((VALUE_TILE, HEAD_SIZE), tl.float32)
    segment_decay = tl.zeros((HEAD_SIZE,), tl.float32)
    num_started = 0
    first_block = segment * segment_blocks
    num_blocks = tl.minimum(segment_blocks, tl.cdiv(num_tokens, BLOCK_TOKENS) - first_block)
    # Fetched a block ahead by hand, as the values of the forward pass.
    last_block = first_block + num_blocks - 1
    here = block_offset(row, head, last_block, num_tokens, heads, HEAD_SIZE)
    d_y_ahead = tl.load(d_output + here + at_values, mask=tokens_inside(last_block, num_tokens), other=0.0)
    for step in range(num_blocks):
        block = last_block - step
        inside = tokens_inside(block, num_tokens)
        here = block_offset(row, head, block, num_tokens, heads, HEAD_SIZE)
        r = load_tokens(receptance + here, at_keys, inside)
        d_y = d_y_ahead.to(tl.float32)
        next_block = tl.maximum(block - 1, 0)
        ahead = block_offset(row, head, next_block, num_tokens, heads, HEAD_SIZE)
        d_y_ahead = tl.load(d_output + ahead + at_values, mask=tokens_inside(next_block, num_tokens), other=0.0)
        log2_decay = load_log2_decay(decay + here, at_keys, inside, DECAY_IS_RAW)
        if HAS_STARTS:
            document = load_document(starts + tl.cast(row, tl.int64) * num_tokens, block, num_tokens)
            num_started += tl.max(document, axis=0)
        else:
            document = 0
        r_from_front = as_operand(r * decay_over(path_from_front(), split_exponents(log2_decay)), PRECISION)
        total = tl.sum(log2_decay, axis=0)
        d_state = state_gradient_before_block(d_state, r_from_front, d_y, total, document, HAS_STARTS, True, PRECISION)
        segment_decay += total

    place = tl.cast(row_head, tl.int64) * num_segments + segment
    tl.store(segment_gradients + place * HEAD_SIZE * HEAD_SIZE + in_state, d_state)
    if HAS_STARTS:
        segment_decay = tl.where(num_started > 0, DOCUMENT_STARTED, segment_decay)
    if tile == 0:
        tl.store(segment_decays + place * HEAD_SIZE + keys, segment_decay)


@triton.jit(do_not_specialize=["num_tokens", "num_segments", "segment_blocks"])
@no_type_check
def value_gradients_kernel(
    receptance, key, decay, bonus, starts, d_output, end_gradients, d_value, d_initial_state, d_start_state,
    span_gradients, num_tokens, rows_and_heads, heads, num_segments, segment_blocks,
    HEAD_SIZE: tl.constexpr, VALUE_TILE: tl.constexpr, SPAN_BLOCKS: tl.constexpr, CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr, DECAY_IS_RAW: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_START_STATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk each segment backwards from the state gradient behind it, end_gradients [B * H, segments, N, N].

    d_start_state: [B * H, segments, N, N], zeros before; what this segment's starts give to the start state.
    span_gradients: [B * H, ceil(blocks / SPAN_BLOCKS), N, N], the state gradient behind each span.
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
    u = tl.load(bonus + head * HEAD_SIZE + keys).to(tl.float32)

    blocks_of_row = tl.cdiv(num_tokens, BLOCK_TOKENS)
    num_spans = tl.cdiv(blocks_of_row, SPAN_BLOCKS)
    place = tl.cast(row_head, tl.int64) * num_segments + segment
    d_state = tl.load(end_gradients + place * HEAD_SIZE * HEAD_SIZE + in_state)
    first_block = segment * segment_blocks
    num_blocks = tl.minimum(segment_blocks, blocks_of_row - first_block)
    # Fetched a block ahead by hand, as the values of the forward pass.
    last_block = first_block + num_blocks - 1
    here = block_offset(row, head, last_block, num_tokens, heads, HEAD_SIZE)
    d_y_ahead = tl.load(d_output + here + at_values, mask=tokens_inside(last_block, num_tokens), other=0.0)
    for step in range(num_blocks):
        block = last_block - step
        inside = tokens_inside(block, num_tokens)
        here = block_offset(row, head, block, num_tokens, heads, HEAD_SIZE)
        r = load_tokens(receptance + here, at_keys, inside)
        k = load_tokens(key + here, at_keys, inside)
        d_y = d_y_ahead.to(tl.float32)
        log2_decay = load_log2_decay(decay + here, at_keys, inside, DECAY_IS_RAW)
        if ((block + 1) % SPAN_BLOCKS == 0) | (block == blocks_of_row - 1):
            span = tl.cast(row_head, tl.int64) * num_spans + block // SPAN_BLOCKS
            tl.store(span_gradients + span * HEAD_SIZE * HEAD_SIZE + in_state, d_state)

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
            k_to_end = k * decay_over(path_to_end(), parts)
        scores = finish_scores(scores, own, document, HAS_STARTS, PRECISION)
        # [values, tokens], as in the forward pass.
        d_v = as_operand(tl.dot(d_state, tl.trans(k_to_end), input_precision=PRECISION), PRECISION)
        if HAS_STARTS:
            d_v = tl.where((document == tl.max(document, axis=0))[None, :], d_v, 0.0)
        d_v = tl.trans(tl.dot(tl.trans(d_y), scores, acc=d_v, input_precision=PRECISION))
        tl.store(d_value + here + at_values, d_v.to(d_value.dtype.element_ty), mask=inside)

        if PRECISION != "tf32":
            r_from_front = r * decay_over(path_of_queries, parts)
        total = total_of_last_document(log2_decay, document, HAS_STARTS)
        # Not one condition: the first is known to the compiler, the second only on the device.
        if HAS_STARTS and HAS_START_STATE:  # noqa: SIM102
            if tl.max(document, axis=0) > 0:
                r_of_starts = tl.where((document > 0)[:, None], r_from_front, 0.0)
                d_fresh = tl.dot(
                    tl.trans(d_y), r_of_starts, acc=d_state * tl.exp2(total)[None, :], input_precision=PRECISION
                )
                # Not a race: no other program adds here. Carried along, it would cost registers in every block.
                tl.atomic_add(d_start_state + place * HEAD_SIZE * HEAD_SIZE + in_state, d_fresh)
        d_state = state_gradient_before_block(d_state, r_from_front, d_y, total, document, HAS_STARTS, True, PRECISION)
        next_block = tl.maximum(block - 1, 0)
        ahead = block_offset(row, head, next_block, num_tokens, heads, HEAD_SIZE)
        d_y_ahead = tl.load(d_output + ahead + at_values, mask=tokens_inside(next_block, num_tokens), other=0.0)
    if segment == 0:
        tl.store(d_initial_state + tl.cast(row_head, tl.int64) * HEAD_SIZE * HEAD_SIZE + in_state, d_state)


@triton.jit
@no_type_check
def add_pairs(d_r, d_k, d_log_decay, r, k, parts, d_scores, PRECISION: tl.constexpr):
    """Add what pairs of tokens of the block give, by the levels of halves.

    A token is on one side of a level's cuts only, query or key: one product gives the gradients of both.
    """
    i = tl.arange(0, BLOCK_TOKENS)[:, None]
    j = tl.arange(0, BLOCK_TOKENS)[None, :]
    d_pairs = tl.where(i > j, d_scores, tl.trans(d_scores))
    for level in tl.static_range(NUM_LEVELS):
        is_query = ((i >> level) & 1) == 1
        either = tl.where(is_query, r, k)
        across = tl.where(((i ^ j) >> level) == 1, d_pairs, 0.0)
        if level == 0:
            d_either = as_operand(tl.dot(across, either, input_precision=PRECISION), PRECISION)
        else:
            path = path_of_level(level)
            # Once for the decayed factor, once for the gradients across.
            decayed = as_operand(decay_over(path, parts), PRECISION)
            d_either = decayed * tl.dot(across, either * decayed, input_precision=PRECISION)
            d_log_decay = add_over_paths(tl.trans(path), either * d_either, d_log_decay, PRECISION)
        d_r = tl.where(is_query, d_r + d_either, d_r)
        d_k = tl.where(is_query, d_k, d_k + d_either)
    return d_r, d_k, d_log_decay


@triton.jit(do_not_specialize=["num_tokens"])
@no_type_check
def key_gradients_kernel(
    receptance, key, value, decay, bonus, starts, start_state, d_output, checkpoints, span_gradients,
    d_receptance, d_key, d_decay, d_bonus, num_tokens, rows_and_heads, heads,
    HEAD_SIZE: tl.constexpr, KEY_TILE: tl.constexpr, CHECKPOINT_BLOCKS: tl.constexpr, SPAN_BLOCKS: tl.constexpr,
    DECAY_IS_RAW: tl.constexpr, HAS_STARTS: tl.constexpr, HAS_START_STATE: tl.constexpr, PRECISION: tl.constexpr,
    WITH_STATE: tl.constexpr, WITH_PAIRS: tl.constexpr,
):  # fmt: skip
    """Gradients of everything that has a key channel, for one span and a tile of key channels.

    d_bonus: [B * H, spans, N], this span's part of it.
    WITH_STATE, WITH_PAIRS: what goes through the states, and what stays in a block. Where both at once would not fit
    into registers, a second run WITH_PAIRS adds to the results of a first one WITH_STATE.
    """
    tiles: tl.constexpr = HEAD_SIZE // KEY_TILE
    program = tl.program_id(0)
    tile, row_head, span = program % tiles, program // tiles % rows_and_heads, program // tiles // rows_and_heads
    row, head = row_head // heads, row_head % heads
    keys = tile * KEY_TILE + tl.arange(0, KEY_TILE)
    values = tl.arange(0, HEAD_SIZE)
    in_state = keys[:, None] * HEAD_SIZE + values[None, :]
    at_keys = token_offsets(heads, keys, HEAD_SIZE)
    at_values = token_offsets(heads, values, HEAD_SIZE)
    start_tile = start_state + head * HEAD_SIZE * HEAD_SIZE + in_state
    starts_of_row = starts + tl.cast(row, tl.int64) * num_tokens
    u = tl.load(bonus + head * HEAD_SIZE + keys).to(tl.float32)
    tokens = tl.arange(0, BLOCK_TOKENS)

    blocks_of_row = tl.cdiv(num_tokens, BLOCK_TOKENS)
    num_checkpoints = tl.cdiv(blocks_of_row, CHECKPOINT_BLOCKS)
    place = tl.cast(row_head, tl.int64) * tl.cdiv(blocks_of_row, SPAN_BLOCKS) + span
    if WITH_STATE:
        d_state = tl.load(span_gradients + place * HEAD_SIZE * HEAD_SIZE + in_state)
    d_u = tl.zeros((BLOCK_TOKENS, KEY_TILE), tl.float32)
    first_block = span * SPAN_BLOCKS
    num_blocks = tl.minimum(SPAN_BLOCKS, blocks_of_row - first_block)
    last_block = first_block + num_blocks - 1
    # Fetched a block ahead by hand: the compiler pipelines inner loops only.
    inside = tokens_inside(last_block, num_tokens)
    here = block_offset(row, head, last_block, num_tokens, heads, HEAD_SIZE)
    r_ahead = tl.load(receptance + here + at_keys, mask=inside, other=0.0)
    k_ahead = tl.load(key + here + at_keys, mask=inside, other=0.0)
    decay_ahead = tl.load(decay + here + at_keys, mask=inside, other=0.0)
    v_ahead = tl.load(value + here + at_values, mask=inside, other=0.0)
    d_y_ahead = tl.load(d_output + here + at_values, mask=inside, other=0.0)
    for step in range(num_blocks):
        block = last_block - step
        if WITH_STATE:
            checkpoint = block // CHECKPOINT_BLOCKS
            state_place = tl.cast(row_head, tl.int64) * num_checkpoints + checkpoint
            state = tl.load(checkpoints + state_place * HEAD_SIZE * HEAD_SIZE + in_state)
            for earlier in range(checkpoint * CHECKPOINT_BLOCKS, block):
                # Whole blocks: only the last of a row has tokens missing.
                here = block_offset(row, head, earlier, num_tokens, heads, HEAD_SIZE)
                k = tl.load(key + here + at_keys).to(tl.float32)
                v = tl.load(value + here + at_values).to(tl.float32)
                log2_decay = load_log2_decay(decay + here, at_keys, tokens_inside(earlier, num_tokens), DECAY_IS_RAW)
                document = load_document(starts_of_row, earlier, num_tokens) if HAS_STARTS else 0
                k_to_end = as_operand(k * decay_over(path_to_end(), split_exponents(log2_decay)), PRECISION)
                state = state_of_last_document(state, document, start_tile, HAS_STARTS, HAS_START_STATE)
                total = total_of_last_document(log2_decay, document, HAS_STARTS)
                state = state_after_block(state, k_to_end, v, total, document, HAS_STARTS, False, PRECISION)

        inside = tokens_inside(block, num_tokens)
        here = block_offset(row, head, block, num_tokens, heads, HEAD_SIZE)
        r, k = r_ahead.to(tl.float32), k_ahead.to(tl.float32)
        v, d_y = v_ahead.to(tl.float32), d_y_ahead.to(tl.float32)
        log2_decay = as_log2_decay(decay_ahead, inside, DECAY_IS_RAW)

        parts = split_exponents(log2_decay)
        document = 0
        if HAS_STARTS:
            document = load_document(starts_of_row, block, num_tokens)
            last = tl.max(document, axis=0)

        # What needs all values comes first: those operands take the most registers.
        if WITH_PAIRS:
            d_scores = tl.dot(d_y, tl.trans(v), input_precision=PRECISION)  # [i, j]
            if HAS_STARTS:
                d_scores = tl.where(document[:, None] == document[None, :], d_scores, 0.0)
        d_log_decay = tl.zeros((BLOCK_TOKENS, KEY_TILE), tl.float32)
        if WITH_STATE:
            from_state = tl.dot(d_y, tl.trans(state), input_precision=PRECISION)
            from_d_state = as_operand(tl.dot(v, tl.trans(d_state), input_precision=PRECISION), PRECISION)
            path_of_queries, path_from_queries = path_from_front(), path_to_end()
            if HAS_STARTS:
                path_of_queries = path_from_own_start(document)
                path_from_queries = tl.trans(path_of_queries)
                from_d_state = tl.where((document == last)[:, None], from_d_state, 0.0)
                if HAS_START_STATE:
                    if last > 0:
                        state = tl.load(start_tile).to(tl.float32)
                        from_start_state = tl.dot(d_y, tl.trans(state), input_precision=PRECISION)
                        from_state = tl.where((document == 0)[:, None], from_state, from_start_state)
                else:
                    from_state = tl.where((document == 0)[:, None], from_state, 0.0)
                    state = tl.where(last > 0, 0.0, state)
            # Once for the decayed receptance, once for what came from the state.
            from_front = as_operand(decay_over(path_of_queries, parts), PRECISION)
            total = total_of_last_document(log2_decay, document, HAS_STARTS)
            through = (tl.exp2(total) * tl.sum(state * d_state, axis=1))[None, :]
            d_state = state_gradient_before_block(
                d_state, r * from_front, d_y, total, document, HAS_STARTS, False, PRECISION
            )

            # State to query, key to state gradient, and state to state gradient.
            d_r = from_front * from_state
            d_k = decay_over(path_to_end(), parts) * from_d_state
            if HAS_STARTS:
                through = tl.where((document == last)[:, None], through, 0.0)
            d_log_decay = add_over_paths(path_from_queries, r * d_r, d_log_decay, PRECISION)
            d_log_decay = add_over_paths(path_from_front(), k * d_k, d_log_decay, PRECISION)
        else:
            d_r = load_tokens(d_receptance + here, at_keys, inside)
            d_k = load_tokens(d_key + here, at_keys, inside)

        if WITH_PAIRS:
            d_own = tl.sum(tl.where(tokens[:, None] == tokens[None, :], d_scores, 0.0), axis=1)[:, None]
            d_u += r * k * d_own
            through_bonus = d_own * u[None, :]
            d_r += through_bonus * k
            d_k += through_bonus * r
            d_r, d_k, d_log_decay = add_pairs(d_r, d_k, d_log_decay, r, k, parts, d_scores, PRECISION)
        tl.store(d_receptance + here + at_keys, d_r.to(d_receptance.dtype.element_ty), mask=inside)
        tl.store(d_key + here + at_keys, d_k.to(d_key.dtype.element_ty), mask=inside)
        d_log_decay = as_operand(d_log_decay, PRECISION)
        if WITH_STATE:
            d_log_decay += through
        if DECAY_IS_RAW:
            d_log_decay *= log2_decay * LN_2
        if not WITH_STATE:
            d_log_decay += load_tokens(d_decay + here, at_keys, inside)
        tl.store(d_decay + here + at_keys, d_log_decay.to(d_decay.dtype.element_ty), mask=inside)
        # Only here: in flight all through the block, they would take its registers.
        ahead = block_offset(row, head, tl.maximum(block - 1, 0), num_tokens, heads, HEAD_SIZE)
        is_there = tokens_inside(tl.maximum(block - 1, 0), num_tokens)
        r_ahead = tl.load(receptance + ahead + at_keys, mask=is_there, other=0.0)
        k_ahead = tl.load(key + ahead + at_keys, mask=is_there, other=0.0)
        decay_ahead = tl.load(decay + ahead + at_keys, mask=is_there, other=0.0)
        v_ahead = tl.load(value + ahead + at_values, mask=is_there, other=0.0)
        d_y_ahead = tl.load(d_output + ahead + at_values, mask=is_there, other=0.0)
    if WITH_PAIRS:
        tl.store(d_bonus + place * HEAD_SIZE + keys, tl.sum(d_u, axis=0))
