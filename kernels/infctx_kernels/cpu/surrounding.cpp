// The operators around the recurrence: every activation is read once and written once in each direction.
//
// The arithmetic is float32, rounded once where a result is stored. Sums over tokens are taken over segments whose
// borders depend on the sizes alone, then over the segments in their order: the number of threads changes no bit.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <vector>

#include "vector.h"

namespace infctx {
namespace {

// Enough segments for many threads; so long, and so few, that their sums stay small beside the activations.
constexpr int64_t MOST_SEGMENTS = 64, FEWEST_TOKENS = 32;
// A task's channels: the sums and weights of five mixes stay in a core's first cache.
constexpr int64_t CHANNELS_AT_ONCE = 256;
constexpr int64_t ELEMENTS_AT_ONCE = 8192;
// The largest logit is looked for in the stretch in which it was met; sums over stretches round off less than one sum.
constexpr int64_t IDS_AT_ONCE = 1024;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename Body>
void side_by_side(int64_t tasks, int64_t threads, const Body& body) {
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)std::max<int64_t>(1, std::min(tasks, threads)))
    for (int64_t task = 0; task < tasks; ++task) {
        FlushToZero flush;
        body(task);
    }
}

// Tokens in segments, and for each segment a row of float sums, which may be left out.
class Segments {
    int64_t tokens, length, width;
    float* sums = nullptr;

   public:
    Segments(int64_t tokens, int64_t width, bool with_sums)
        : tokens(tokens), length(std::max(FEWEST_TOKENS, divide_up(tokens, MOST_SEGMENTS))), width(width) {
        if (with_sums) sums = (float*)std::calloc(count() * width, sizeof(float));
    }
    ~Segments() { std::free(sums); }
    Segments(const Segments&) = delete;
    Segments& operator=(const Segments&) = delete;
    int64_t count() const { return divide_up(tokens, length); }
    int64_t begin(int64_t segment) const { return segment * length; }
    int64_t end(int64_t segment) const { return std::min(tokens, (segment + 1) * length); }
    bool has_sums() const { return sums != nullptr; }
    float* sums_of(int64_t segment) const { return sums ? sums + segment * width : nullptr; }

    void add_up(float* total, int64_t threads) const {
        side_by_side(divide_up(width, ELEMENTS_AT_ONCE), threads, [&](int64_t task) {
            const int64_t first = task * ELEMENTS_AT_ONCE;
            over(std::min(ELEMENTS_AT_ONCE, width - first), [&](int64_t i, auto n) {
                Vec sum = {};
                for (int64_t segment = 0; segment < count(); ++segment) sum += load(sums_of(segment) + first + i, n);
                store(total + first + i, sum, n);
            });
        });
    }
};

template <typename T>
struct ShiftedMix {
    int64_t rows, row_tokens, channels, mixes;
    const T *hidden, *carried;  // [rows, row_tokens, channels], [rows, channels]
    const float* weights;       // [mixes, channels]
    const T* dynamic;           // [mixes, rows, row_tokens, channels], or null
    const uint8_t* starts;      // [rows, row_tokens], or null

    int64_t tokens() const { return rows * row_tokens; }
    bool is_start(int64_t token) const { return starts && starts[token]; }
    const T* dynamic_of(int64_t mix, int64_t at) const {
        return dynamic ? dynamic + mix * tokens() * channels + at : nullptr;
    }

    // Channels [first, first + width) of the token before, zeros at a start, minus the token's own.
    void read_difference(int64_t token, int64_t first, int64_t width, float* difference) const {
        const T* own = hidden + token * channels + first;
        const T* fed = carried + token / row_tokens * channels + first;
        const T* before = token % row_tokens == 0 ? fed : own - channels;
        if (is_start(token)) {
            over(width, [&](int64_t i, auto n) { store(difference + i, -load(own + i, n)); });
        } else {
            over(width, [&](int64_t i, auto n) { store(difference + i, load(before + i, n) - load(own + i, n)); });
        }
    }

    void forward(int64_t token, int64_t first, int64_t width, void* const* mixed) const {
        alignas(64) float difference[CHANNELS_AT_ONCE];
        read_difference(token, first, width, difference);
        const int64_t at = token * channels + first;
        const T* own = hidden + at;
        for (int64_t mix = 0; mix < mixes; ++mix) {
            const float* weight = weights + mix * channels + first;
            const T* added = dynamic_of(mix, at);
            T* out = (T*)mixed[mix] + at;
            over(width, [&](int64_t i, auto n) {
                const Vec amount = load(weight + i, n) + (added ? load(added + i, n) : Vec{});
                // The next token's: rows are too short and too many for the hardware to run ahead by itself.
                if (added) __builtin_prefetch(added + i + channels);
                __builtin_prefetch(out + i + channels, 1);
                store(out + i, load(own + i, n) + load(difference + i) * amount, n);
            });
        }
    }

    // Adds what the mixes of a token send to `to_own`, itself, and `to_previous`, the one before it.
    void send_back(int64_t token, int64_t first, int64_t width, const void* const* gradients, float* to_own,
                   float* to_previous, T* dynamic_gradient, float* weight_sums) const {
        alignas(64) float difference[CHANNELS_AT_ONCE];
        read_difference(token, first, width, difference);
        const int64_t at = token * channels + first;
        for (int64_t mix = 0; mix < mixes; ++mix) {
            T* outgoing = dynamic_gradient ? dynamic_gradient + mix * tokens() * channels + at : nullptr;
            if (!gradients[mix]) {
                if (outgoing) std::memset(outgoing, 0, width * sizeof(T));
                continue;
            }
            const T* incoming = (const T*)gradients[mix] + at;
            const float* weight = weights + mix * channels + first;
            const T* added = dynamic_of(mix, at);
            float* total = weight_sums ? weight_sums + mix * channels + first : nullptr;
            over(width, [&](int64_t i, auto n) {
                const Vec gradient = load(incoming + i, n);
                __builtin_prefetch(incoming + i + channels);
                if (added) __builtin_prefetch(added + i + channels);
                if (outgoing) __builtin_prefetch(outgoing + i + channels, 1);
                const Vec amount = load(weight + i, n) + (added ? load(added + i, n) : Vec{});
                store(to_own + i, load(to_own + i) + gradient * (1.0f - amount));
                store(to_previous + i, load(to_previous + i) + gradient * amount);
                const Vec to_amount = gradient * load(difference + i);
                if (outgoing) store(outgoing + i, to_amount, n);
                if (total) store(total + i, load(total + i, n) + to_amount, n);
            });
        }
    }

    // Tokens [begin, end) in the order in which they lie in memory: what a token sends to the one before it completes
    // that one's gradient. A gradient that is null is zero; results that are null are not wanted.
    void backward(int64_t begin, int64_t end, int64_t first, int64_t width, const void* const* gradients,
                  T* hidden_gradient, float* carried_gradient, T* dynamic_gradient, float* weight_sums) const {
        alignas(64) float rows_of_sums[3][CHANNELS_AT_ONCE];
        float *to_own = rows_of_sums[0], *to_previous = rows_of_sums[1], *of_previous = rows_of_sums[2];
        const auto clear = [](float* x) { std::memset(x, 0, CHANNELS_AT_ONCE * sizeof(float)); };
        const auto complete = [&](int64_t token, bool is_sent) {
            if (!hidden_gradient) return;
            T* out = hidden_gradient + token * channels + first;
            over(width, [&](int64_t i, auto n) {
                store(out + i, load(of_previous + i) + (is_sent ? load(to_previous + i) : Vec{}), n);
            });
        };
        for (int64_t token = begin; token < end; ++token) {
            clear(to_own);
            clear(to_previous);
            send_back(token, first, width, gradients, to_own, to_previous, dynamic_gradient, weight_sums);
            const bool is_first = token % row_tokens == 0;
            if (token > begin) complete(token - 1, !is_first && !is_start(token));
            if (is_first) {
                if (is_start(token)) clear(to_previous);
                float* to = carried_gradient + token / row_tokens * channels + first;
                std::memcpy(to, to_previous, width * sizeof(float));
            }
            std::swap(to_own, of_previous);
        }
        // What the next segment's first token sends here is computed twice: segments tell each other nothing.
        const bool is_sent = end < tokens() && end % row_tokens != 0 && !is_start(end);
        if (is_sent) {
            clear(to_own);
            clear(to_previous);
            send_back(end, first, width, gradients, to_own, to_previous, nullptr, nullptr);
        }
        complete(end - 1, is_sent);
    }

    void forward_all(void* const* mixed, int64_t threads) const {
        const Segments segments(tokens(), 0, false);
        each_part(segments, threads, [&](int64_t segment, int64_t first, int64_t width) {
            for (int64_t token = segments.begin(segment); token < segments.end(segment); ++token) {
                forward(token, first, width, mixed);
            }
        });
    }

    bool backward_all(const void* const* gradients, void* hidden_gradient, float* carried_gradient,
                      void* dynamic_gradient, float* weight_gradient, int64_t threads) const {
        const Segments segments(tokens(), mixes * channels, weight_gradient != nullptr);
        if (weight_gradient && !segments.has_sums()) return false;
        each_part(segments, threads, [&](int64_t segment, int64_t first, int64_t width) {
            backward(segments.begin(segment), segments.end(segment), first, width, gradients, (T*)hidden_gradient,
                     carried_gradient, (T*)dynamic_gradient, segments.sums_of(segment));
        });
        if (weight_gradient) segments.add_up(weight_gradient, threads);
        return true;
    }

    template <typename Body>
    void each_part(const Segments& segments, int64_t threads, const Body& body) const {
        const int64_t blocks = divide_up(channels, CHANNELS_AT_ONCE);
        side_by_side(segments.count() * blocks, threads, [&](int64_t task) {
            const int64_t first = task % blocks * CHANNELS_AT_ONCE;
            body(task / blocks, first, std::min(CHANNELS_AT_ONCE, channels - first));
        });
    }
};

template <typename X, typename G>
struct GroupNormGate {
    int64_t tokens, heads, size;
    float eps;
    const X* x;                  // [tokens, heads · size]
    const G* gate;               // [tokens, heads · size]
    const float *weight, *bias;  // [heads · size]

    int64_t width() const { return heads * size; }
    int64_t padded() const { return divide_up(size, LANES) * LANES; }

    // A head's values minus their mean, and what they are to be multiplied by to have variance 1.
    float centre(int64_t at, float* centred) const {
        Vec total = {}, squares = {};
        over(size, [&](int64_t i, auto n) {
            const Vec value = load(x + at + i, n);
            total += value;
            store(centred + i, value);
        });
        const float mean = sum(total) / size;
        over(size, [&](int64_t i, auto n) {
            const Vec value = inside(load(centred + i) - mean, n);
            squares += value * value;
            store(centred + i, value);
        });
        return 1.0f / std::sqrt(sum(squares) / size + eps);
    }

    void forward(int64_t token, G* out, float* normed) const {
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t column = head * size, at = token * width() + column;
            const float scale = centre(at, normed);
            over(size, [&](int64_t i, auto n) {
                const Vec affine = load(normed + i) * scale * load(weight + column + i, n) + load(bias + column + i, n);
                const Vec opening = load(gate + at + i, n);
                store(out + at + i, affine * opening * sigmoid(opening).open, n);
            });
        }
    }

    // The statistics are computed again: they are two passes over what is in the cache by then.
    void backward(int64_t token, const G* gradient, X* x_gradient, G* gate_gradient, float* weight_sums,
                  float* bias_sums, float* normed, float* to_normed) const {
        for (int64_t head = 0; head < heads; ++head) {
            const int64_t column = head * size, at = token * width() + column;
            const float scale = centre(at, normed);
            Vec total = {}, along = {};
            over(size, [&](int64_t i, auto n) {
                const Vec incoming = load(gradient + at + i, n), opening = load(gate + at + i, n);
                const Vec scaling = load(weight + column + i, n), value = load(normed + i) * scale;
                const Sigmoid gates = sigmoid(opening);
                const Vec affine = value * scaling + load(bias + column + i, n);
                store(gate_gradient + at + i, incoming * affine * gates.open * (1.0f + opening * gates.shut), n);
                const Vec to_affine = incoming * opening * gates.open;
                if (weight_sums) {
                    float *to_weight = weight_sums + column + i, *to_bias = bias_sums + column + i;
                    store(to_weight, load(to_weight, n) + to_affine * value, n);
                    store(to_bias, load(to_bias, n) + to_affine, n);
                }
                const Vec back = to_affine * scaling;
                total += back;
                along += back * value;
                store(to_normed + i, back);
                store(normed + i, value);
            });
            const float mean = sum(total) / size, slope = sum(along) / size;
            over(size, [&](int64_t i, auto n) {
                const Vec centred = load(to_normed + i) - mean - load(normed + i) * slope;
                store(x_gradient + at + i, centred * scale, n);
            });
        }
    }

    void forward_all(void* out, int64_t threads) const {
        const Segments segments(tokens, 0, false);
        side_by_side(segments.count(), threads, [&](int64_t segment) {
            std::vector<float> normed(padded());
            for (int64_t token = segments.begin(segment); token < segments.end(segment); ++token) {
                forward(token, (G*)out, normed.data());
            }
        });
    }

    bool backward_all(const void* gradient, void* x_gradient, void* gate_gradient, float* affine_gradient,
                      int64_t threads) const {
        const Segments segments(tokens, 2 * width(), affine_gradient != nullptr);
        if (affine_gradient && !segments.has_sums()) return false;
        side_by_side(segments.count(), threads, [&](int64_t segment) {
            std::vector<float> normed(padded()), to_normed(padded());
            float* sums = segments.sums_of(segment);
            for (int64_t token = segments.begin(segment); token < segments.end(segment); ++token) {
                backward(token, (const G*)gradient, (X*)x_gradient, (G*)gate_gradient, sums,
                         sums ? sums + width() : nullptr, normed.data(), to_normed.data());
            }
        });
        if (affine_gradient) segments.add_up(affine_gradient, threads);
        return true;
    }
};

// body(i, n) for every vector of `size` elements that do not depend on each other.
template <typename Body>
void over_elements(int64_t size, int64_t threads, const Body& body) {
    side_by_side(divide_up(size, ELEMENTS_AT_ONCE), threads, [&](int64_t task) {
        const int64_t first = task * ELEMENTS_AT_ONCE;
        over(std::min(ELEMENTS_AT_ONCE, size - first), [&](int64_t i, auto n) { body(first + i, n); });
    });
}

template <typename T>
void squared_relu(int64_t size, int64_t threads, const T* x, T* out) {
    over_elements(size, threads, [&](int64_t i, auto n) {
        const Vec value = load(x + i, n);
        // The comparison lets NaN through.
        store(out + i, select(value <= Vec{}, Vec{}, value * value), n);
    });
}

template <typename T>
void squared_relu_backward(int64_t size, int64_t threads, const T* gradient, const T* x, T* x_gradient) {
    over_elements(size, threads, [&](int64_t i, auto n) {
        const Vec value = load(x + i, n);
        store(x_gradient + i, select(value <= Vec{}, Vec{}, 2.0f * value * load(gradient + i, n)), n);
    });
}

template <typename T>
void sigmoid_gate(int64_t size, int64_t threads, const T* receptance, const T* value, T* out) {
    over_elements(size, threads, [&](int64_t i, auto n) {
        store(out + i, sigmoid(load(receptance + i, n)).open * load(value + i, n), n);
    });
}

template <typename T>
void sigmoid_gate_backward(int64_t size, int64_t threads, const T* gradient, const T* receptance, const T* value,
                           T* receptance_gradient, T* value_gradient) {
    over_elements(size, threads, [&](int64_t i, auto n) {
        const Vec incoming = load(gradient + i, n);
        const Sigmoid gates = sigmoid(load(receptance + i, n));
        store(receptance_gradient + i, incoming * load(value + i, n) * gates.open * gates.shut, n);
        store(value_gradient + i, incoming * gates.open, n);
    });
}

float element(const float* from) { return *from; }

float element(const uint16_t* from) {
    const uint32_t bits = (uint32_t)*from << 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

template <typename T>
struct RowPass {
    int64_t num_ids;
    float l2_wrap;
    bool wants_gradient;

    // The loss of one row of logits, which its gradient overwrites where that is wanted.
    float run(T* logits, int64_t target, float weight) const {
        if (weight == 0.0f) {
            if (wants_gradient) std::memset(logits, 0, num_ids * sizeof(T));
            return 0.0f;
        }
        const bool is_known = target >= 0 && target < num_ids;
        // An id that does not exist must be seen, in the loss and in the gradient.
        if (!is_known) weight = std::numeric_limits<float>::quiet_NaN();
        const float of_target = is_known ? element(logits + target) : 0.0f;
        int64_t place = 0;
        const float largest = find_largest(logits, &place);
        const float total = sum_of_exponentials(logits, largest);
        const float to_largest = l2_wrap != 0.0f ? weight * l2_wrap * largest : 0.0f;
        if (wants_gradient) {
            const float scale = weight / total;
            const auto gradient_of = [&](Vec x) { return exp_of(x - largest) * scale; };
            over(num_ids, [&](int64_t i, auto n) { store(logits + i, gradient_of(load(logits + i, n)), n); });
            // Not what was just stored: that is rounded.
            if (is_known) {
                const float extra = place == target ? to_largest : 0.0f;
                store(logits + target, gradient_of(splat(of_target)) - weight + extra, Part{1});
            }
            if (l2_wrap != 0.0f && place != target) {
                store(logits + place, gradient_of(splat(largest)) + to_largest, Part{1});
            }
        }
        const float loss = std::log(total) + (largest - of_target);
        return (l2_wrap != 0.0f ? loss + 0.5f * l2_wrap * largest * largest : loss) * weight;
    }

    // The largest logit and, of equal ones, the first. NaN are passed over: they are seen in the sum.
    float find_largest(const T* logits, int64_t* place) const {
        const float lowest = -std::numeric_limits<float>::infinity();
        float largest = lowest;
        int64_t stretch = 0;
        for (int64_t first = 0; first < num_ids; first += IDS_AT_ONCE) {
            Vec here = splat(lowest);
            over(std::min(IDS_AT_ONCE, num_ids - first), [&](int64_t i, auto n) {
                const Vec x = inside(load(logits + first + i, n), n, lowest);
                here = select(x > here, x, here);
            });
            float most = lowest;
            for (int lane = 0; lane < LANES; ++lane) most = here[lane] > most ? here[lane] : most;
            if (most > largest) {
                largest = most;
                stretch = first;
            }
        }
        *place = stretch;
        const int64_t end = std::min(num_ids, stretch + IDS_AT_ONCE);
        for (int64_t id = stretch; l2_wrap != 0.0f && id < end; ++id) {
            if (element(logits + id) == largest) {
                *place = id;
                break;
            }
        }
        return largest;
    }

    float sum_of_exponentials(const T* logits, float largest) const {
        Vec total = {};
        for (int64_t first = 0; first < num_ids; first += IDS_AT_ONCE) {
            Vec here = {};
            over(std::min(IDS_AT_ONCE, num_ids - first), [&](int64_t i, auto n) {
                here += inside(exp_of(load(logits + first + i, n) - largest), n);
            });
            total += here;
        }
        return sum(total);
    }
};

template <typename T>
void row_pass(const int64_t* sizes, float l2_wrap, T* logits, const int64_t* targets, const float* loss_weight,
              float* losses) {
    const RowPass<T> pass{sizes[1], l2_wrap, sizes[3] != 0};
    side_by_side(sizes[0], sizes[4], [&](int64_t row) {
        losses[row] = pass.run(logits + row * pass.num_ids, targets[row], loss_weight[row]);
    });
}

// run(T{}), with T what a tensor of this dtype consists of.
template <typename Run>
auto with_dtype(int64_t dtype, const Run& run) {
    return dtype == BFLOAT16 ? run(uint16_t{}) : run(float{});
}

template <typename T>
ShiftedMix<T> shifted_mix_of(const int64_t* sizes, const void* hidden, const void* carried, const float* weights,
                             const void* dynamic, const uint8_t* starts) {
    return {sizes[0],         sizes[1], sizes[2],          sizes[3], (const T*)hidden,
            (const T*)carried, weights,  (const T*)dynamic, starts};
}

// run(pass) with the pass of these dtypes; sizes: tokens, heads, head size, x's dtype, gate's dtype.
template <typename Run>
auto with_norm(const int64_t* sizes, double eps, const void* x, const void* gate, const float* weight,
               const float* bias, const Run& run) {
    return with_dtype(sizes[3], [&](auto of_x) {
        return with_dtype(sizes[4], [&](auto of_gate) {
            using X = decltype(of_x);
            using G = decltype(of_gate);
            const GroupNormGate<X, G> pass{sizes[0],       sizes[1],       sizes[2], (float)eps, (const X*)x,
                                           (const G*)gate, weight,         bias};
            return run(pass);
        });
    });
}

}  // namespace
}  // namespace infctx

// All tensors contiguous. All functions return 0, or 1 where memory ran out.

// sizes: rows, tokens, channels, mixes, dtype, threads. One pointer of `mixed` for each mix. dynamic and starts may be
// null; carried is in hidden's dtype.
extern "C" int infctx_shifted_mix_forward(const int64_t* sizes, const void* hidden, const void* carried,
                                          const float* weights, const void* dynamic, const uint8_t* starts,
                                          void* const* mixed) {
    infctx::with_dtype(sizes[4], [&](auto t) {
        using T = decltype(t);
        infctx::shifted_mix_of<T>(sizes, hidden, carried, weights, dynamic, starts).forward_all(mixed, sizes[5]);
    });
    return 0;
}

// A pointer of `gradients` that is null stands for zeros. The gradients that are not wanted are null, carried's, which
// is float32, never.
extern "C" int infctx_shifted_mix_backward(const int64_t* sizes, const void* hidden, const void* carried,
                                           const float* weights, const void* dynamic, const uint8_t* starts,
                                           const void* const* gradients, void* hidden_gradient,
                                           float* carried_gradient, float* weight_gradient, void* dynamic_gradient) {
    return infctx::with_dtype(sizes[4], [&](auto t) {
        using T = decltype(t);
        const auto pass = infctx::shifted_mix_of<T>(sizes, hidden, carried, weights, dynamic, starts);
        return !pass.backward_all(gradients, hidden_gradient, carried_gradient, dynamic_gradient, weight_gradient,
                                  sizes[5]);
    });
}

// sizes: tokens, heads, head size, x's dtype, gate's dtype, threads.
extern "C" int infctx_group_norm_gate_forward(const int64_t* sizes, double eps, const void* x, const void* gate,
                                              const float* weight, const float* bias, void* out) {
    infctx::with_norm(sizes, eps, x, gate, weight, bias, [&](const auto& pass) { pass.forward_all(out, sizes[5]); });
    return 0;
}

// affine_gradient: [2, heads · head size] of weight and bias, or null.
extern "C" int infctx_group_norm_gate_backward(const int64_t* sizes, double eps, const void* x, const void* gate,
                                               const float* weight, const float* bias, const void* gradient,
                                               void* x_gradient, void* gate_gradient, float* affine_gradient) {
    return infctx::with_norm(sizes, eps, x, gate, weight, bias, [&](const auto& pass) {
        return !pass.backward_all(gradient, x_gradient, gate_gradient, affine_gradient, sizes[5]);
    });
}

// sizes, of this and the next three: elements, dtype, threads.
extern "C" int infctx_squared_relu_forward(const int64_t* sizes, const void* x, void* out) {
    infctx::with_dtype(sizes[1], [&](auto t) {
        using T = decltype(t);
        infctx::squared_relu(sizes[0], sizes[2], (const T*)x, (T*)out);
    });
    return 0;
}

extern "C" int infctx_squared_relu_backward(const int64_t* sizes, const void* x, const void* gradient,
                                            void* x_gradient) {
    infctx::with_dtype(sizes[1], [&](auto t) {
        using T = decltype(t);
        infctx::squared_relu_backward(sizes[0], sizes[2], (const T*)gradient, (const T*)x, (T*)x_gradient);
    });
    return 0;
}

extern "C" int infctx_sigmoid_gate_forward(const int64_t* sizes, const void* receptance, const void* value,
                                           void* out) {
    infctx::with_dtype(sizes[1], [&](auto t) {
        using T = decltype(t);
        infctx::sigmoid_gate(sizes[0], sizes[2], (const T*)receptance, (const T*)value, (T*)out);
    });
    return 0;
}

extern "C" int infctx_sigmoid_gate_backward(const int64_t* sizes, const void* receptance, const void* value,
                                            const void* gradient, void* receptance_gradient, void* value_gradient) {
    infctx::with_dtype(sizes[1], [&](auto t) {
        using T = decltype(t);
        infctx::sigmoid_gate_backward(sizes[0], sizes[2], (const T*)gradient, (const T*)receptance, (const T*)value,
                                      (T*)receptance_gradient, (T*)value_gradient);
    });
    return 0;
}

// sizes: rows, ids, dtype, whether the gradient is wanted, threads. The gradient overwrites the logits.
extern "C" int infctx_cross_entropy_rows(const int64_t* sizes, double l2_wrap, void* logits, const int64_t* targets,
                                         const float* loss_weight, float* losses) {
    infctx::with_dtype(sizes[2], [&](auto t) {
        using T = decltype(t);
        infctx::row_pass(sizes, (float)l2_wrap, (T*)logits, targets, loss_weight, losses);
    });
    return 0;
}
