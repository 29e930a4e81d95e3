// Float vectors of this machine's width, and what the kernels need of them: loads and stores of every dtype, exp.
//
// Written with the vector types of GCC and Clang, which become AVX-512, AVX2, NEON or whatever -march=native offers.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace infctx {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IntVec __attribute__((vector_size(LANES * 4)));
typedef uint32_t UintVec __attribute__((vector_size(LANES * 4)));
typedef uint16_t HalfVec __attribute__((vector_size(LANES * 2)));

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

static inline Vec splat(float x) { return x - Vec{}; }

static inline Vec load(const float* from) {
    Vec x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

static inline void store(float* to, Vec x) { std::memcpy(to, &x, sizeof x); }

static inline Vec load(const uint16_t* from) {  // bfloat16
#if defined(__AVX512F__)
    // Compilers make two halves of the conversion.
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#else
    HalfVec half;
    std::memcpy(&half, from, sizeof half);
    return (Vec)(__builtin_convertvector(half, UintVec) << 16);
#endif
}

#if defined(__AVX512BF16__)
// As below in one instruction; it flushes denormals, as the kernels do.
static inline void store(uint16_t* to, Vec x) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(to, &half, sizeof half);
}
#else
static inline void store(uint16_t* to, Vec x) {
    UintVec bits = (UintVec)x;
    // To the nearest, ties to even; a NaN stays one though its low bits are cut off.
    UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    UintVec nan = (UintVec)(x != x);
    HalfVec half = __builtin_convertvector((rounded & ~nan) | (((bits >> 16) | 0x40u) & nan), HalfVec);
    std::memcpy(to, &half, sizeof half);
}
#endif

static inline Vec select(IntVec condition, Vec yes, Vec no) {
    return condition ? yes : no;
}

static inline float sum(Vec x) {
    typedef float Four __attribute__((vector_size(16)));
    Four parts[LANES / 4];
    std::memcpy(parts, &x, sizeof x);
    for (int width = LANES / 8; width > 0; width /= 2) {
        for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
    }
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

// exp to about 1e-7, for x <= 88; below -87 it is 0, as it is once denormals are flushed. NaN stays NaN.
static inline Vec exp_of(Vec x) {
    const float magic = 12582912.0f;  // 1.5 · 2^23: adding it leaves the rounded integer in the low bits
    Vec held = select(x < splat(-87.3f), splat(-87.3f), x);
    Vec shifted = held * 1.442695041f + magic;
    Vec whole = shifted - magic;
    Vec rest = held - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    Vec p = splat(1.0f / 5040);
    p = p * rest + 1.0f / 720;
    p = p * rest + 1.0f / 120;
    p = p * rest + 1.0f / 24;
    p = p * rest + 1.0f / 6;
    p = p * rest + 0.5f;
    p = p * rest + 1.0f;
    p = p * rest + 1.0f;
    Vec power = (Vec)(((IntVec)shifted + 127) << 23);
    return select(x < splat(-87.3f), Vec{}, p * power);
}

static inline Vec absolute(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }

struct Sigmoid {
    Vec open, shut;  // sigmoid(x), sigmoid(-x): the latter loses every digit as 1 - sigmoid(x)
};

static inline Sigmoid sigmoid(Vec x) {
    // The exponential of a positive number could overflow.
    const Vec small = exp_of(-absolute(x));
    const Vec larger = 1.0f / (1.0f + small);
    const Vec smaller = small * larger;
    const IntVec positive = x >= Vec{};
    return {select(positive, larger, smaller), select(positive, smaller, larger)};
}

// Old states decay into denormal numbers, which are slow: they count as zero while an object of this class lives.
class FlushToZero {
#if defined(__x86_64__) || defined(__i386__)
    unsigned before = _mm_getcsr();

   public:
    FlushToZero() { _mm_setcsr(before | 0x8040u); }
    ~FlushToZero() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;

   public:
    FlushToZero() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | (1ull << 24)));
    }
    ~FlushToZero() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

// Rows of `size` elements, of any dtype, to and from rows of floats padded with `fill` to a whole number of vectors.
template <typename T>
static inline void read_row(const T* from, int64_t size, float* to, float fill = 0.0f) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(to + i, load(from + i));
    if (i < size) {
        T rest[LANES] = {};
        std::memcpy(rest, from + i, (size - i) * sizeof(T));
        Vec x = load(rest);
        for (int j = 0; j < LANES; ++j) to[i + j] = i + j < size ? x[j] : fill;
    }
}

template <typename T>
static inline void write_row(const float* from, int64_t size, T* to) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(to + i, load(from + i));
    if (i < size) {
        T rest[LANES];
        store(rest, load(from + i));
        std::memcpy(to + i, rest, (size - i) * sizeof(T));
    }
}

// A vector of a row, or what is left at the row's end: loads put zeros beyond it, stores leave what is there.
struct Whole {};
struct Part {
    int64_t count;
};

template <typename T>
static inline Vec load(const T* from, Whole) {
    return load(from);
}

template <typename T>
static inline Vec load(const T* from, Part part) {
    T some[LANES] = {};
    std::memcpy(some, from, part.count * sizeof(T));
    return load(some);
}

template <typename T>
static inline void store(T* to, Vec x, Whole) {
    store(to, x);
}

template <typename T>
static inline void store(T* to, Vec x, Part part) {
    T some[LANES];
    store(some, x);
    std::memcpy(to, some, part.count * sizeof(T));
}

// x with `fill` beyond the row's end.
static inline Vec inside(Vec x, Whole, float = 0.0f) { return x; }

static inline Vec inside(Vec x, Part part, float fill = 0.0f) {
    for (int lane = 0; lane < LANES; ++lane) x[lane] = lane < part.count ? x[lane] : fill;
    return x;
}

// body(i, n) for every vector of a row: from element i, and n is Whole, or a Part for the last one.
template <typename Body>
static inline void over(int64_t size, const Body& body) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) body(i, Whole{});
    if (i < size) body(i, Part{size - i});
}

}  // namespace infctx
