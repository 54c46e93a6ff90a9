// What the interface of segment_scan and its kernels, compiled once per level, share.
#pragma once

#include <stdint.h>

namespace lst {

// Features of an item: its state stays in the first-level cache while the rows go by. Also in
// lst_kernels/native/__init__.py, which makes room for the partial sums.
constexpr int64_t kScanFeatures = 128;

// Backward, x is the gradient of y, and out that of x.
struct Scan {
  const void* x;      // (P, F)
  const void* decay;  // (P,) float32, or float64 where x is
  void* out;          // (P, F)
  const void* y;      // (P, F), backward alone
  void* partial;      // (tiles, P) of what T is carried in, backward alone: parts of decay's gradient
  int64_t num_rows, num_features;
};

// Some features of the rows of one segment: what a thread does at a time, writing all of their
// elements and the tile's part of the decay's gradient.
struct ScanItem {
  int64_t start, stop, feature, width;
};

// The hot loops of one level for one dtype.
struct ScanKernels {
  void (*forward)(const Scan&, const ScanItem&);
  void (*backward)(const Scan&, const ScanItem&);
};

// Three tables, in the order float32, bfloat16, float64.
extern const ScanKernels scan_kernels_portable[3];
extern const ScanKernels scan_kernels_avx2[3];
extern const ScanKernels scan_kernels_avx512[3];

}  // namespace lst
