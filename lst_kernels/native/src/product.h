// Small dense matrix products out of cache: C (M, N) = A (M, K) B (K, N), the one loop in which the
// tiled kernels spend their time. A block of up to 6 rows and 2 or 4 vectors of C stays in registers
// while K runs; rows of B are read as vectors, elements of A one by one and spread over a vector. So
// A may lie in any order, and the transposed products need no transposed copies.
#pragma once

#include "simd.h"

namespace {

// What becomes of the values that are in C already.
enum class Onto { kNothing, kSum, kScaledSum };

// A's element (m, k) is a[m * row + k * step].
template <class C>
struct Spread {
  const C* a;
  int64_t row, step;
};

// scale: for kScaledSum, each row's factor for what is in C.
template <int kRows, int kVectors, Onto kOnto, class C>
LST_INLINE void product_block(C* c, int64_t c_row, Spread<C> a, const C* b, int64_t b_row,
                              int64_t depth, const C* scale) {
  typedef typename Simd<C>::V V;
  V sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    V columns[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) columns[n] = load<V>(b + k * b_row + n * kLanes<C>);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const C element = a.a[m * a.row + k * a.step];
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sum[m][n] += element * columns[n];
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      C* const place = c + m * c_row + n * kLanes<C>;
      if (kOnto == Onto::kSum) sum[m][n] += load<V>(place);
      if (kOnto == Onto::kScaledSum) sum[m][n] += scale[m] * load<V>(place);
      store(place, sum[m][n]);
    }
  }
}

template <int kVectors, Onto kOnto, class C>
void product_panel(C* c, int64_t c_row, Spread<C> a, const C* b, int64_t b_row, int64_t height,
                   int64_t depth, const C* scale) {
  int64_t m = 0;
  for (; m + kTileRows <= height; m += kTileRows) {
    const Spread<C> rows{a.a + m * a.row, a.row, a.step};
    product_block<kTileRows, kVectors, kOnto>(c + m * c_row, c_row, rows, b, b_row, depth,
                                                scale);
    if (kOnto == Onto::kScaledSum) scale += kTileRows;
  }
  c += m * c_row;
  a.a += m * a.row;
  static_assert(kTileRows == 6, "the rows that are left are 0 to 5");
  switch (height - m) {
    case 1: return product_block<1, kVectors, kOnto>(c, c_row, a, b, b_row, depth, scale);
    case 2: return product_block<2, kVectors, kOnto>(c, c_row, a, b, b_row, depth, scale);
    case 3: return product_block<3, kVectors, kOnto>(c, c_row, a, b, b_row, depth, scale);
    case 4: return product_block<4, kVectors, kOnto>(c, c_row, a, b, b_row, depth, scale);
    case 5: return product_block<5, kVectors, kOnto>(c, c_row, a, b, b_row, depth, scale);
  }
}

// width: columns of C, a multiple of a vector's lanes.
template <Onto kOnto, class C>
LST_INLINE void product(C* c, int64_t c_row, Spread<C> a, const C* b, int64_t b_row, int64_t height,
                        int64_t width, int64_t depth, const C* scale = nullptr) {
  int64_t vectors = width / kLanes<C>;
  while (vectors > 0) {
    // Panels of like width: 5 vectors as 3 + 2, for a narrow panel waits on its own sums.
    const int64_t panels = (vectors + kTileVectors - 1) / kTileVectors;
    const int64_t taken = (vectors + panels - 1) / panels;
    switch (taken) {
      case 1: product_panel<1, kOnto>(c, c_row, a, b, b_row, height, depth, scale); break;
      case 2: product_panel<2, kOnto>(c, c_row, a, b, b_row, height, depth, scale); break;
#if defined(__AVX512F__) || defined(__aarch64__)
      case 3: product_panel<3, kOnto>(c, c_row, a, b, b_row, height, depth, scale); break;
      case 4: product_panel<4, kOnto>(c, c_row, a, b, b_row, height, depth, scale); break;
#endif
    }
    c += taken * kLanes<C>;
    b += taken * kLanes<C>;
    vectors -= taken;
  }
}

}  // namespace
