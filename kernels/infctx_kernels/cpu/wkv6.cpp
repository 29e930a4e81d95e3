// The WKV6 recurrence and its gradient, one (row, head) at a time, in fused sweeps over blocks of tokens.
//
// With the state S (key rows, value columns) before a token, its adjoint Z after it, and G the output's gradient:
//
//     y_t  = r_t S + (r·u·k)_t v_t                S <- diag(w_t) S + k_t v_t^T        tokens first to last
//     dr_t = S G_t + u k_t (v·G)_t
//     dv_t = k_t Z + (r·u·k)_t G_t                Z <- diag(w_t) Z + r_t G_t^T        tokens last to first
//     dk_t = Z v_t + u r_t (v·G)_t
//     d log w_t = rowsum(Z ∘ diag(w_t) S)
//
// Each line with a matrix is one primitive, `sweep`: read a row of outputs from a matrix, then add an outer product to
// it. To leave the decay out of the inner loop, the matrix is kept divided by the decays since the block's beginning:
// what is read is multiplied by them, what is added is divided by them, and the matrix is multiplied once at the end.
// Where a channel decays by more than SMALLEST_PRODUCT within a block, it decays token by token instead.
//
// d log w follows from what is there already. With q_t = rowsum(Z ∘ S) after token t,
//
//     d log w_t = q_t - k_t (Z v_t),      q_{t-1} = d log w_t + r_t (S G_t),
//
// differences that lose digits as they are carried on, so q is computed anew from the matrices every few tokens.
#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <vector>

#include "vector.h"

namespace infctx {
namespace {

constexpr int BLOCK_TOKENS = 16;
// States are kept, and q computed anew, once in this many blocks.
constexpr int BLOCKS_BETWEEN_STATES = 2;
constexpr float SMALLEST_PRODUCT = 1e-12f;
// Below this the gradient with respect to the log decay is smaller than what its difference form rounds off.
constexpr float FORGOTTEN_LOG_DECAY = -17.0f;
constexpr float LARGEST_RAW_DECAY = 20.0f;
constexpr int TILE_ROWS = 4;
#if defined(__AVX512F__) || !defined(__AVX__)
constexpr int TILE_VECTORS = 4;  // 32 registers: 16 of the matrix, 4 rows in, 4 rows out
#else
constexpr int TILE_VECTORS = 2;
#endif

struct Shape {
    int64_t rows, tokens, heads, size, padded;
    int32_t dtype, decay_dtype;
    bool decay_is_raw;

    int64_t at(int64_t row, int64_t token, int64_t head) const { return ((row * tokens + token) * heads + head) * size; }
    int64_t matrix(int64_t row, int64_t head) const { return (row * heads + head) * size * size; }
};

struct Block {
    int64_t begin, length;
    bool starts_document;
};

// Blocks of at most BLOCK_TOKENS tokens, each in one document.
std::vector<Block> blocks_of(const uint8_t* starts, int64_t tokens) {
    std::vector<Block> blocks;
    for (int64_t begin = 0; begin < tokens;) {
        int64_t end = begin + 1;
        while (end < tokens && end < begin + BLOCK_TOKENS && !(starts && starts[end])) ++end;
        blocks.push_back({begin, end - begin, starts && starts[begin]});
        begin = end;
    }
    return blocks;
}

// A block's rows in the order in which a sweep goes through them: last to first where it goes back in time.
struct Order {
    Block block;
    bool backwards;

    int64_t token(int64_t j) const { return backwards ? block.begin + block.length - 1 - j : block.begin + j; }
};

// Where channels of a block decay inside the loop, and where they are scaled.
struct Decays {
    float* log_decay;  // [block, padded], each
    float* decay;
    float* before;     // product of the decays of the earlier rows; 1 where the channel decays in the loop
    float* in_loop;    // the decay where the channel decays in the loop, else 1
    float* total;      // [padded] product over the block; 1 where the channel decays in the loop
    bool any_in_loop;
};

void read(const void* from, int32_t dtype, int64_t at, int64_t size, float* to, float fill = 0.0f) {
    if (dtype == BFLOAT16) {
        read_row((const uint16_t*)from + at, size, to, fill);
    } else {
        read_row((const float*)from + at, size, to, fill);
    }
}

void write(const float* from, void* to, int32_t dtype, int64_t at, int64_t size) {
    if (dtype == BFLOAT16) {
        write_row(from, size, (uint16_t*)to + at);
    } else {
        write_row(from, size, (float*)to + at);
    }
}

void read_rows(const Shape& s, const void* from, int64_t row, int64_t head, const Order& order, float* to) {
    for (int64_t j = 0; j < order.block.length; ++j) {
        read(from, s.dtype, s.at(row, order.token(j), head), s.size, to + j * s.padded);
    }
}

// What the next block will read and this one will write, asked for from memory while a sweep computes: the rows of one
// head lie a token's whole width apart, too far for the hardware to guess.
class Ahead {
    struct Rows {
        const char* from;
        int64_t stride, bytes, count;
        bool to_write;
    };
    Rows all[8];
    int count = 0;

   public:
    void add(const Shape& s, const void* from, int32_t dtype, int64_t row, int64_t head, const Block& block, bool to_write) {
        const int64_t element = dtype == BFLOAT16 ? 2 : 4;
        const char* first = (const char*)from + s.at(row, block.begin, head) * element;
        all[count++] = {first, s.heads * s.size * element, s.size * element, block.length, to_write};
    }

    // The rows of one token. Inlined by force: GCC takes prefetching functions for ones without effect.
    __attribute__((always_inline)) inline void ask_for(int64_t token) const {
        for (int i = 0; i < count; ++i) {
            if (token >= all[i].count) continue;
            const char* at = all[i].from + token * all[i].stride;
            for (int64_t offset = 0; offset < all[i].bytes; offset += 64) {
                if (all[i].to_write) {
                    __builtin_prefetch(at + offset, 1);
                } else {
                    __builtin_prefetch(at + offset, 0);
                }
            }
        }
    }
};

void read_decays(const Shape& s, const void* from, int64_t row, int64_t head, const Order& order, Decays& d) {
    const int64_t length = order.block.length, padded = s.padded;
    for (int64_t j = 0; j < length; ++j) {
        float* log_decay = d.log_decay + j * padded;
        read(from, s.decay_dtype, s.at(row, order.token(j), head), s.size, log_decay, s.decay_is_raw ? -100.0f : 0.0f);
    }
    if (s.decay_is_raw) {
#pragma GCC unroll 4
        for (int64_t i = 0; i < length * padded; i += LANES) {
            const Vec x = load(d.log_decay + i);
            store(d.log_decay + i, -exp_of(select(x > splat(LARGEST_RAW_DECAY), splat(LARGEST_RAW_DECAY), x)));
        }
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < length * padded; i += LANES) store(d.decay + i, exp_of(load(d.log_decay + i)));
    IntVec any_small = {};
    for (int64_t i = 0; i < padded; i += LANES) {
        Vec product = splat(1.0f);
        for (int64_t j = 0; j < length; ++j) {
            store(d.before + j * padded + i, product);
            product *= load(d.decay + j * padded + i);
        }
        // A NaN counts as large: it is seen in the result either way.
        any_small |= product < splat(SMALLEST_PRODUCT);
        store(d.total + i, product);
    }
    d.any_in_loop = false;
    for (int lane = 0; lane < LANES; ++lane) d.any_in_loop |= any_small[lane] != 0;
    if (!d.any_in_loop) return;
    for (int64_t i = 0; i < padded; i += LANES) {
        const IntVec small = load(d.total + i) < splat(SMALLEST_PRODUCT);
        store(d.total + i, select(small, splat(1.0f), load(d.total + i)));
        for (int64_t j = 0; j < length; ++j) {
            float* before = d.before + j * padded + i;
            store(before, select(small, splat(1.0f), load(before)));
            store(d.in_loop + j * padded + i, select(small, load(d.decay + j * padded + i), splat(1.0f)));
        }
    }
}

// x times the decays before each row: for what is read from the matrix.
void scale_read(const Decays& d, int64_t length, int64_t padded, const float* x, float* scaled) {
    for (int64_t i = 0; i < length * padded; i += LANES) store(scaled + i, load(x + i) * load(d.before + i));
}

// x divided by the decays up to and with each row: for what is added to the matrix.
void scale_added(const Decays& d, int64_t length, int64_t padded, const float* x, float* scaled) {
    if (!d.any_in_loop) {
        for (int64_t i = 0; i < length * padded; i += LANES) {
            store(scaled + i, load(x + i) / (load(d.before + i) * load(d.decay + i)));
        }
        return;
    }
    for (int64_t j = 0; j < length; ++j) {
        for (int64_t i = 0; i < padded; i += LANES) {
            const int64_t at = j * padded + i;
            // The decay that is left to divide by: 1 where it is in the loop, and there it may be 0 / 0.
            const IntVec looped = load(d.in_loop + at) != splat(1.0f);
            store(scaled + at, load(x + at) / select(looped, splat(1.0f), load(d.before + at) * load(d.decay + at)));
        }
    }
}

enum class DecayOf { ROWS, COLUMNS };

// For each j: out[j] += read[j] M, then M = diag(decay) M + added_rows[j] added_columns[j]^T, for VECTORS columns of M.
// Between, `scale` multiplies M's rows or columns once at the end. All [block, padded]; M [padded, padded].
template <int VECTORS, DecayOf AXIS>
void sweep_columns(int64_t length, int64_t padded, int64_t column, const float* read, const float* added_rows,
                   const float* added_columns, const Decays& d, float* matrix, float* out, const Ahead* ahead) {
    const int64_t tokens_ahead = (BLOCK_TOKENS * TILE_ROWS + padded - 1) / padded;
    for (int64_t i = 0; i < padded; i += TILE_ROWS) {
        for (int64_t n = 0; ahead && n < tokens_ahead; ++n) ahead->ask_for(i / TILE_ROWS * tokens_ahead + n);
        bool decays_in_loop = d.any_in_loop;
        if (AXIS == DecayOf::ROWS && d.any_in_loop) {
            decays_in_loop = false;
            for (int64_t j = 0; j < length; ++j) {
                for (int r = 0; r < TILE_ROWS; ++r) decays_in_loop |= d.in_loop[j * padded + i + r] != 1.0f;
            }
        }
        Vec m[TILE_ROWS][VECTORS];
        for (int r = 0; r < TILE_ROWS; ++r) {
            for (int v = 0; v < VECTORS; ++v) m[r][v] = load(matrix + (i + r) * padded + column + v * LANES);
        }
        for (int64_t j = 0; j < length; ++j) {
            const int64_t at = j * padded;
            Vec y[VECTORS], q[VECTORS];
            for (int v = 0; v < VECTORS; ++v) {
                y[v] = load(out + at + column + v * LANES);
                q[v] = load(added_columns + at + column + v * LANES);
            }
            for (int r = 0; r < TILE_ROWS; ++r) {
                const Vec x = splat(read[at + i + r]);
                for (int v = 0; v < VECTORS; ++v) y[v] += x * m[r][v];
            }
            if (decays_in_loop) {
                for (int r = 0; r < TILE_ROWS; ++r) {
                    for (int v = 0; v < VECTORS; ++v) {
                        m[r][v] *= AXIS == DecayOf::ROWS ? splat(d.in_loop[at + i + r])
                                                         : load(d.in_loop + at + column + v * LANES);
                    }
                }
            }
            for (int r = 0; r < TILE_ROWS; ++r) {
                const Vec p = splat(added_rows[at + i + r]);
                for (int v = 0; v < VECTORS; ++v) m[r][v] += p * q[v];
            }
            for (int v = 0; v < VECTORS; ++v) store(out + at + column + v * LANES, y[v]);
        }
        for (int r = 0; r < TILE_ROWS; ++r) {
            for (int v = 0; v < VECTORS; ++v) {
                const int64_t c = column + v * LANES;
                const Vec scale = AXIS == DecayOf::ROWS ? splat(d.total[i + r]) : load(d.total + c);
                store(matrix + (i + r) * padded + c, m[r][v] * scale);
            }
        }
    }
}

template <DecayOf AXIS>
void sweep(int64_t length, int64_t padded, int64_t first, int64_t last, const float* read, const float* added_rows,
           const float* added_columns, const Decays& d, const Ahead& ahead, float* matrix, float* out) {
    int64_t column = first;
    for (; column + TILE_VECTORS * LANES <= last; column += TILE_VECTORS * LANES) {
        sweep_columns<TILE_VECTORS, AXIS>(length, padded, column, read, added_rows, added_columns, d, matrix, out,
                                          column == first ? &ahead : nullptr);
    }
    for (; column < last; column += LANES) {
        sweep_columns<1, AXIS>(length, padded, column, read, added_rows, added_columns, d, matrix, out,
                               column == first ? &ahead : nullptr);
    }
}

void read_matrix(const float* from, int64_t size, int64_t padded, float* to) {
    for (int64_t i = 0; i < size; ++i) read_row(from + i * size, size, to + i * padded);
}

void read_transposed(const float* from, int64_t size, int64_t padded, float* to) {
    for (int64_t i = 0; i < size; ++i) {
        for (int64_t j = 0; j < size; ++j) to[j * padded + i] = from[i * size + j];
    }
}

void clear(float* x, int64_t count) { std::memset(x, 0, count * sizeof(float)); }

// Float buffers of one task, aligned to a vector. Padding must be zero.
class Buffers {
    float* memory;
    int64_t used = 0;

   public:
    // `zeroed` floats, and behind them as many as the task writes before it reads them: those are not touched here.
    explicit Buffers(int64_t zeroed, int64_t written = 0)
        : memory((float*)std::aligned_alloc(64, ((zeroed + written) * 4 + 63) / 64 * 64)) {
        if (memory) clear(memory, zeroed);
    }
    ~Buffers() { std::free(memory); }
    Buffers(const Buffers&) = delete;
    Buffers& operator=(const Buffers&) = delete;
    bool ok() const { return memory != nullptr; }
    float* take(int64_t count) {
        float* taken = memory + used;
        used += count;
        return taken;
    }
    Decays take_decays(int64_t padded) {
        const int64_t block = BLOCK_TOKENS * padded;
        Decays d;
        d.log_decay = take(block);
        d.decay = take(block);
        d.before = take(block);
        d.in_loop = take(block);
        d.total = take(padded);
        d.any_in_loop = false;
        return d;
    }
};

constexpr int64_t ROWS_OF_DECAYS = 4 * BLOCK_TOKENS + 1;

float dot3(const float* a, const float* b, const float* c, int64_t padded) {
    Vec total = {};
    for (int64_t i = 0; i < padded; i += LANES) total += load(a + i) * load(b + i) * load(c + i);
    return sum(total);
}

float dot(const float* a, const float* b, int64_t padded) {
    Vec total = {};
    for (int64_t i = 0; i < padded; i += LANES) total += load(a + i) * load(b + i);
    return sum(total);
}

struct Forward {
    Shape s;
    const void *receptance, *key, *value, *decay;
    const float *bonus, *state;
    const uint8_t* starts;
    const float* start_state;
    void* output;
    float* new_state;

    // Columns [first, last) of the values.
    bool run(int64_t row, int64_t head, int64_t first, int64_t last) const {
        const int64_t padded = s.padded, block = BLOCK_TOKENS * padded, real = std::min(last, s.size) - first;
        Buffers memory(padded * padded + 4 * block + padded + ROWS_OF_DECAYS * padded);
        if (!memory.ok()) return false;
        float *r = memory.take(block), *k = memory.take(block), *v = memory.take(block), *y = memory.take(block);
        float *u = memory.take(padded), *matrix = memory.take(padded * padded);
        Decays d = memory.take_decays(padded);
        read_row(bonus + head * s.size, s.size, u);
        read_matrix(state + s.matrix(row, head), s.size, padded, matrix);
        const std::vector<Block> blocks = blocks_of(starts ? starts + row * s.tokens : nullptr, s.tokens);
        for (size_t n = 0; n < blocks.size(); ++n) {
            const Block& part = blocks[n];
            const Order order{part, false};
            Ahead ahead;
            ahead.add(s, output, s.dtype, row, head, part, true);
            if (n + 1 < blocks.size()) {
                for (const void* x : {receptance, key, value}) ahead.add(s, x, s.dtype, row, head, blocks[n + 1], false);
                ahead.add(s, decay, s.decay_dtype, row, head, blocks[n + 1], false);
            }
            if (part.starts_document) {
                clear(matrix, padded * padded);
                if (start_state) read_matrix(start_state + s.matrix(0, head), s.size, padded, matrix);
            }
            read_rows(s, receptance, row, head, order, r);
            read_rows(s, key, row, head, order, k);
            read_rows(s, value, row, head, order, v);
            for (int64_t j = 0; j < part.length; ++j) {
                const Vec own = splat(dot3(r + j * padded, k + j * padded, u, padded));
                for (int64_t i = first; i < last; i += LANES) {
                    store(y + j * padded + i, own * load(v + j * padded + i));
                }
            }
            read_decays(s, decay, row, head, order, d);
            scale_read(d, part.length, padded, r, r);
            scale_added(d, part.length, padded, k, k);
            sweep<DecayOf::ROWS>(part.length, padded, first, last, r, k, v, d, ahead, matrix, y);
            for (int64_t j = 0; j < part.length; ++j) {
                write(y + j * padded + first, output, s.dtype, s.at(row, part.begin + j, head) + first, real);
            }
        }
        for (int64_t i = 0; i < s.size; ++i) {
            write_row(matrix + i * padded + first, real, new_state + s.matrix(row, head) + i * s.size + first);
        }
        return true;
    }
};

struct Backward {
    Shape s;
    const void *receptance, *key, *value, *decay;
    const float *bonus, *state;
    const uint8_t* starts;
    const float* start_state;
    const void* output_gradient;      // G
    const float* new_state_gradient;  // Z after the last token
    void *receptance_gradient, *key_gradient, *value_gradient, *decay_gradient;
    float *bonus_gradient, *state_gradient, *start_state_gradient;  // [rows, heads, ...], the last may be null

    // Buffers of one task. S and Z are [padded, padded]; blocks' rows [block, padded].
    struct Work {
        float *r, *k, *v, *g, *scaled_r, *scaled_k, *y, *y2;
        float *u, *du, *q;
        float *matrix;          // S transposed in the first pass, Z in the second
        float *transposed;      // Z transposed
        float *start_total;     // what has reached start_state
        float *kept;            // S transposed, columns [first, last), every few blocks
        float *read_gradients;  // r_t (S G_t), [tokens, last - first]
        float *own_gradients;   // (v·G)_t, [tokens]
        Decays d;
    };

    // Key channels [first, last) of dr, dk, d decay and du, and value channels [first, last) of dv and the states.
    bool run(int64_t row, int64_t head, int64_t first, int64_t last) const {
        const int64_t padded = s.padded, block = BLOCK_TOKENS * padded, square = padded * padded;
        const std::vector<Block> blocks = blocks_of(starts ? starts + row * s.tokens : nullptr, s.tokens);
        const int64_t num_blocks = (int64_t)blocks.size();
        const int64_t num_kept = (num_blocks + BLOCKS_BETWEEN_STATES - 1) / BLOCKS_BETWEEN_STATES;
        const int64_t width = last - first, real = std::min(last, s.size) - first;
        Buffers memory(3 * square + 8 * block + 3 * padded + ROWS_OF_DECAYS * padded,
                       num_kept * padded * width + s.tokens * (width + 1));
        if (!memory.ok()) return false;
        Work w;
        for (float** rows : {&w.r, &w.k, &w.v, &w.g, &w.scaled_r, &w.scaled_k, &w.y, &w.y2}) *rows = memory.take(block);
        for (float** one : {&w.u, &w.du, &w.q}) *one = memory.take(padded);
        for (float** whole : {&w.matrix, &w.transposed, &w.start_total}) *whole = memory.take(square);
        w.d = memory.take_decays(padded);
        w.kept = memory.take(num_kept * padded * width);
        w.read_gradients = memory.take(s.tokens * width);
        w.own_gradients = memory.take(s.tokens);
        read_row(bonus + head * s.size, s.size, w.u);

        const auto place_of_state = [&](int64_t n) {
            const bool keeps = n % BLOCKS_BETWEEN_STATES == BLOCKS_BETWEEN_STATES - 1 || n == num_blocks - 1;
            return keeps ? w.kept + n / BLOCKS_BETWEEN_STATES * padded * width : nullptr;
        };
        read_transposed(state + s.matrix(row, head), s.size, padded, w.matrix);
        for (int64_t n = 0; n < num_blocks; ++n) {
            const Ahead ahead = ask_for(row, head, n + 1 < num_blocks ? &blocks[n + 1] : nullptr, blocks[n],
                                        {receptance_gradient}, nullptr);
            read_block(row, head, blocks[n], first, last, w, ahead, place_of_state(n));
        }
        const float* z = new_state_gradient + s.matrix(row, head);
        clear(w.matrix, square);
        read_matrix(z, s.size, padded, w.matrix);
        read_transposed(z, s.size, padded, w.transposed);
        for (int64_t n = num_blocks - 1; n >= 0; --n) {
            const Ahead ahead = ask_for(row, head, n > 0 ? &blocks[n - 1] : nullptr, blocks[n],
                                        {key_gradient, value_gradient}, decay_gradient);
            return_block(row, head, blocks[n], first, last, w, ahead, place_of_state(n));
        }
        write_row(w.du + first, real, bonus_gradient + (row * s.heads + head) * s.size + first);
        for (int64_t i = 0; i < s.size; ++i) {
            const int64_t to = s.matrix(row, head) + i * s.size + first;
            write_row(w.matrix + i * padded + first, real, state_gradient + to);
            if (start_state_gradient) write_row(w.start_total + i * padded + first, real, start_state_gradient + to);
        }
        return true;
    }

    Ahead ask_for(int64_t row, int64_t head, const Block* next, const Block& part, std::initializer_list<void*> written,
                  void* written_decay) const {
        Ahead ahead;
        for (void* x : written) ahead.add(s, x, s.dtype, row, head, part, true);
        if (written_decay) ahead.add(s, written_decay, s.decay_dtype, row, head, part, true);
        if (!next) return ahead;
        for (const void* x : {receptance, key, value, output_gradient}) ahead.add(s, x, s.dtype, row, head, *next, false);
        ahead.add(s, decay, s.decay_dtype, row, head, *next, false);
        return ahead;
    }

    // First tokens first: dr; and S into `keep`, unless that is null.
    void read_block(int64_t row, int64_t head, const Block& part, int64_t first, int64_t last, Work& w,
                    const Ahead& ahead, float* keep) const {
        const int64_t padded = s.padded, width = last - first, real = std::min(last, s.size) - first;
        const Order order{part, false};
        if (part.starts_document) {
            clear(w.matrix, padded * padded);
            if (start_state) read_transposed(start_state + s.matrix(0, head), s.size, padded, w.matrix);
        }
        read_rows(s, receptance, row, head, order, w.r);
        read_rows(s, key, row, head, order, w.k);
        read_rows(s, value, row, head, order, w.v);
        read_rows(s, output_gradient, row, head, order, w.g);
        read_decays(s, decay, row, head, order, w.d);
        scale_added(w.d, part.length, padded, w.k, w.scaled_k);
        clear(w.y, part.length * padded);
        sweep<DecayOf::COLUMNS>(part.length, padded, first, last, w.g, w.v, w.scaled_k, w.d, ahead, w.matrix, w.y);
        for (int64_t j = 0; j < part.length; ++j) {
            const int64_t at = j * padded, t = part.begin + j;
            w.own_gradients[t] = dot(w.v + at, w.g + at, padded);
            const Vec own_gradient = splat(w.own_gradients[t]);
            for (int64_t i = first; i < last; i += LANES) {
                const Vec inter = load(w.y + at + i) * load(w.d.before + at + i);
                store(w.read_gradients + t * width + i - first, load(w.r + at + i) * inter);
                store(w.y + at + i, inter + load(w.u + i) * load(w.k + at + i) * own_gradient);
            }
            write(w.y + at + first, receptance_gradient, s.dtype, s.at(row, t, head) + first, real);
        }
        for (int64_t i = 0; keep && i < padded; ++i) {
            std::memcpy(keep + i * width, w.matrix + i * padded + first, width * sizeof(float));
        }
    }

    // Last tokens first: dv, dk, d decay, du; q anew from the S in `kept`, unless that is null.
    void return_block(int64_t row, int64_t head, const Block& part, int64_t first, int64_t last, Work& w,
                      const Ahead& ahead, const float* kept) const {
        const int64_t padded = s.padded, square = padded * padded, width = last - first;
        const int64_t real = std::min(last, s.size) - first;
        const Order order{part, true};
        if (kept) {
            for (int64_t i = first; i < last; i += LANES) {
                Vec total[2] = {};
                for (int64_t b = 0; b < padded; ++b) {
                    total[b & 1] += load(w.transposed + b * padded + i) * load(kept + b * width + i - first);
                }
                store(w.q + i, total[0] + total[1]);
            }
        }
        read_rows(s, receptance, row, head, order, w.r);
        read_rows(s, key, row, head, order, w.k);
        read_rows(s, value, row, head, order, w.v);
        read_rows(s, output_gradient, row, head, order, w.g);
        read_decays(s, decay, row, head, order, w.d);
        for (int64_t j = 0; j < part.length; ++j) {
            const int64_t at = j * padded;
            const Vec bonus_read = splat(dot3(w.r + at, w.k + at, w.u, padded));
            for (int64_t i = first; i < last; i += LANES) store(w.y + at + i, bonus_read * load(w.g + at + i));
        }
        clear(w.y2, part.length * padded);
        scale_read(w.d, part.length, padded, w.k, w.scaled_k);
        scale_added(w.d, part.length, padded, w.r, w.scaled_r);
        sweep<DecayOf::ROWS>(part.length, padded, first, last, w.scaled_k, w.scaled_r, w.g, w.d, ahead, w.matrix, w.y);
        sweep<DecayOf::COLUMNS>(part.length, padded, first, last, w.v, w.g, w.scaled_r, w.d, Ahead{}, w.transposed, w.y2);
        for (int64_t j = 0; j < part.length; ++j) {
            const int64_t at = j * padded, t = order.token(j), to = s.at(row, t, head) + first;
            const Vec own_gradient = splat(w.own_gradients[t]);
            for (int64_t i = first; i < last; i += LANES) {
                const Vec inter = load(w.y2 + at + i) * load(w.d.before + at + i);
                const Vec r = load(w.r + at + i), k = load(w.k + at + i);
                const Vec log_decay = load(w.d.log_decay + at + i);
                Vec gradient = load(w.q + i) - k * inter;
                store(w.q + i, gradient + load(w.read_gradients + t * width + i - first));
                gradient = select(log_decay < splat(FORGOTTEN_LOG_DECAY), Vec{}, gradient);
                // In the place of the log decay, which is not needed any more.
                store(w.d.log_decay + at + i, s.decay_is_raw ? gradient * log_decay : gradient);
                store(w.y2 + at + i, inter + load(w.u + i) * r * own_gradient);
                store(w.du + i, load(w.du + i) + r * k * own_gradient);
            }
            write(w.y2 + at + first, key_gradient, s.dtype, to, real);
            write(w.y + at + first, value_gradient, s.dtype, to, real);
            write(w.d.log_decay + at + first, decay_gradient, s.decay_dtype, to, real);
        }
        if (!part.starts_document) return;
        if (start_state_gradient) {
            for (int64_t i = 0; i < square; i += LANES) {
                store(w.start_total + i, load(w.start_total + i) + load(w.matrix + i));
            }
        }
        clear(w.matrix, square);
        clear(w.transposed, square);
        clear(w.q, padded);
    }
};

// Every head of every row, in as many pieces of columns as keep all threads busy. False: out of memory.
template <typename Pass>
bool run_all(const Pass& pass, int32_t threads) {
    const Shape& s = pass.s;
    const int64_t heads = s.rows * s.heads, vectors = s.padded / LANES;
    int64_t pieces = 1;
    while (heads * pieces < threads && vectors % (2 * pieces) == 0) pieces *= 2;
    const int64_t width = s.padded / pieces;
    bool ok = true;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < heads * pieces; ++task) {
        FlushToZero flush;
        const int64_t head = task / pieces, first = task % pieces * width;
        // A piece of padding alone has nothing to do.
        if (first < s.size && !pass.run(head / s.heads, head % s.heads, first, first + width)) {
#pragma omp atomic write
            ok = false;
        }
    }
    return ok;
}

Shape shape_of(const int64_t* sizes) {
    const int64_t padded = (sizes[3] + LANES - 1) / LANES * LANES;
    return {sizes[0], sizes[1], sizes[2], sizes[3], padded, (int32_t)sizes[4], (int32_t)sizes[5], sizes[6] != 0};
}

}  // namespace
}  // namespace infctx

// sizes: rows, tokens, heads, head size, dtype, decay's dtype, whether the decay is raw, threads.
// All tensors contiguous; starts and start_state may be null. Returns 0, or 1 where memory ran out.
extern "C" int infctx_wkv6_forward(const int64_t* sizes, const void* receptance, const void* key, const void* value,
                                   const void* decay, const float* bonus, const float* state, const uint8_t* starts,
                                   const float* start_state, void* output, float* new_state) {
    infctx::Forward pass{infctx::shape_of(sizes), receptance,  key,    value,    decay, bonus, state,
                         starts,                  start_state, output, new_state};
    return infctx::run_all(pass, (int32_t)sizes[7]) ? 0 : 1;
}

extern "C" int infctx_wkv6_backward(const int64_t* sizes, const void* receptance, const void* key, const void* value,
                                    const void* decay, const float* bonus, const float* state, const uint8_t* starts,
                                    const float* start_state, const void* output_gradient,
                                    const float* new_state_gradient, void* receptance_gradient, void* key_gradient,
                                    void* value_gradient, void* decay_gradient, float* bonus_gradient,
                                    float* state_gradient, float* start_state_gradient) {
    infctx::Backward pass{infctx::shape_of(sizes),
                          receptance,
                          key,
                          value,
                          decay,
                          bonus,
                          state,
                          starts,
                          start_state,
                          output_gradient,
                          new_state_gradient,
                          receptance_gradient,
                          key_gradient,
                          value_gradient,
                          decay_gradient,
                          bonus_gradient,
                          state_gradient,
                          start_state_gradient};
    return infctx::run_all(pass, (int32_t)sizes[7]) ? 0 : 1;
}
