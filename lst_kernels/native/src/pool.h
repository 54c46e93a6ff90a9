// What the interface of patch_pool and patch_expand and its kernels, compiled once per level, share.
#pragma once

#include <stdint.h>

namespace lst {

constexpr int64_t kTileFeatures = 256;

// A reduction of rows [start[i], stop[i]) of x (T, F) to row i of y (P, F), or its reverse. x, y are
// of the dtype; index is y's shape.
struct Pool {
  const int32_t* start;  // (P,)
  const int32_t* stop;   // (P,)
  void* x;
  void* y;
  int32_t* index;  // of the extremes: the row of x that won, -1 for none
  int64_t num_features;
};

// One i and some features: what a thread does at a time. Whoever owns it writes all of y's, or
// x's, elements that belong to it, so the bits do not depend on the number of threads.
struct PoolItem {
  int64_t row, feature, width;
};

// The hot loops of one level for one dtype.
struct PoolKernels {
  void (*sum)(const Pool&, const PoolItem&, bool mean);      // x -> y
  void (*spread)(const Pool&, const PoolItem&, bool mean);   // y -> x
  void (*extreme)(const Pool&, const PoolItem&, bool least);  // x -> y, index
  void (*award)(const Pool&, const PoolItem&);               // y, index -> x
  void (*add)(const void* a, const void* b, void* sum, int64_t width);
};

// Three tables, in the order float32, bfloat16, float64.
extern const PoolKernels pool_kernels_portable[3];
extern const PoolKernels pool_kernels_avx2[3];
extern const PoolKernels pool_kernels_avx512[3];

}  // namespace lst
