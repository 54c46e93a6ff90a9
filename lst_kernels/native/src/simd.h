// Vectors of the instruction set that a file is being compiled for. Included only by files that are
// compiled once per level (levels.h); all of it is in an unnamed namespace, so that no two levels'
// code can be merged by the linker, and none of it comes from the standard library's templates.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if !defined(LST_INLINE)
#define LST_INLINE inline __attribute__((always_inline))
#endif
#define LST_LAMBDA_INLINE __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// How many vectors wide and rows high a product's block in registers is: AVX-512 and arm64 have 32
// vector registers, the others 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;

struct bfloat16 {
  uint16_t bits;
};

// V a vector of C, I of the integers of C's size; C is what a dtype is computed in.
template <class C>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Integer;
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Integer;
};

template <class C>
constexpr int kLanes = kVectorBytes / sizeof(C);

template <class T>
struct Compute {
  typedef T type;
};
template <>
struct Compute<bfloat16> {
  typedef float type;
};

LST_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LST_INLINE int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
LST_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

template <class V>
LST_INLINE V load(const void* source) {
  V v;
  __builtin_memcpy(&v, source, sizeof v);
  return v;
}

template <class V>
LST_INLINE void store(void* target, V v) {
  __builtin_memcpy(target, &v, sizeof v);
}

template <class C>
LST_INLINE typename Simd<C>::V splat(C value) {
  return value - typename Simd<C>::V{};
}

template <class V>
LST_INLINE V greater_of(V a, V b) {
  return a > b ? a : b;
}

template <class C>
LST_INLINE typename Simd<C>::I lane_numbers() {
  typename Simd<C>::I numbers;
  for (int i = 0; i < kLanes<C>; ++i) numbers[i] = i;
  return numbers;
}

// A whole vector from or to a row of T, computed in C.

template <class C>
LST_INLINE typename Simd<C>::V load_row(const C* source) {
  return load<typename Simd<C>::V>(source);
}

template <class C>
LST_INLINE void store_row(C* target, typename Simd<C>::V v) {
  store(target, v);
}

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t FullBits __attribute__((vector_size(kVectorBytes)));

template <class C>
LST_INLINE Simd<float>::V load_row(const bfloat16* source) {
  return (Simd<float>::V)(__builtin_convertvector(load<HalfBits>(source), FullBits) << 16);
}

LST_INLINE void store_row(bfloat16* target, Simd<float>::V v) {
  const FullBits bits = (FullBits)v;
  const FullBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const FullBits quiet = (bits >> 16) | 0x40;                            // a NaN stays one
  store(target, __builtin_convertvector(v == v ? rounded : quiet, HalfBits));
}

// The first `count` lanes of a vector, the others 0 when loaded and left alone when stored.

template <class C, class T>
LST_INLINE typename Simd<C>::V load_part(const T* source, int64_t count) {
  T lanes[kLanes<C>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = source[i];
  return load_row<C>(lanes);
}

template <class C, class T>
LST_INLINE void store_part(T* target, typename Simd<C>::V v, int64_t count) {
  T lanes[kLanes<C>];
  store_row(lanes, v);
  for (int64_t i = 0; i < count; ++i) target[i] = lanes[i];
}

// The lanes' sum, by halves.
template <class C>
LST_INLINE C lane_sum(typename Simd<C>::V v) {
#if defined(__clang__)
  C lanes[kLanes<C>];
  store(lanes, v);
  for (int half = kLanes<C> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
#else
#pragma GCC unroll 4
  for (int half = kLanes<C> / 2; half > 0; half /= 2) {
    v += __builtin_shuffle(v, lane_numbers<C>() ^ half);
  }
  return v[0];
#endif
}

// 2^x = 2^n 2^r with n the nearest integer and |r| <= 1/2. Exactly 0 for x <= -127 (float32) and
// x <= -1023 (float64), -infinity included; NaN stays NaN; x stays below the largest exponent.

LST_INLINE Simd<float>::V exp2(Simd<float>::V x) {
  // Minimax in relative error on [-1/2, 1/2]: 2e-9, so that rounding, about 1 ulp, is all that shows.
  constexpr float c[] = {0x1p0f,         0x1.62e430p-1f,  0x1.ebfbdcp-3f, 0x1.c6aee8p-5f,
                         0x1.3b2d4cp-7f, 0x1.5f3e54p-10f, 0x1.41fbbap-13f};
  constexpr float kShift = 0x1.8p23f;  // adding it rounds to an integer, kept in the low bits
  typedef Simd<float>::I I;
  x = x < -127.0f ? splat(-127.0f) : x;
  const Simd<float>::V shifted = x + kShift;
  const Simd<float>::V r = x - (shifted - kShift);
  Simd<float>::V sum = splat(c[6]);
  for (int i = 5; i >= 0; --i) sum = sum * r + c[i];
  return sum * (Simd<float>::V)(((I)shifted + 127) << 23);
}

LST_INLINE Simd<double>::V exp2(Simd<double>::V x) {
  constexpr double kLn2 = 0.693147180559945309417;
  constexpr double kShift = 0x1.8p52;
  typedef Simd<double>::I I;
  x = x < -1023.0 ? splat(-1023.0) : x;
  const Simd<double>::V shifted = x + kShift;
  const Simd<double>::V r = (x - (shifted - kShift)) * kLn2;
  Simd<double>::V sum = splat(1.0);  // exp's series to r^13 / 13!, which leaves 4e-18
  for (int i = 13; i >= 1; --i) sum = sum * (r * (1.0 / i)) + 1.0;
  return sum * (Simd<double>::V)(((I)shifted + 1023) << 52);
}

}  // namespace
