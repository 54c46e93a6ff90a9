// segment_scan: y[t] = decay[t] y[t-1] + x[t] over the rows of each segment, and its backward pass.
//
// The work is cut into items of one segment × one tile of features, numbered segment by segment;
// whoever takes an item writes all of its output. Here are the checks and the order of work; the
// arithmetic is in scan_kernels.cpp.
#include <algorithm>

#include "common.h"
#include "levels.h"
#include "scan.h"

namespace {

using lst::kScanFeatures;
using lst::Scan;
using lst::ScanItem;
using lst::ScanKernels;

constexpr int64_t kElementsPerChunk = 32768;  // below this, waking a thread costs more than it saves
constexpr int32_t kFloat32 = 0, kBfloat16 = 1, kFloat64 = 2;

constexpr const char* kBadDtype = "dtype is not one that this library knows";
constexpr const char* kBadOffsets =
    "cu_segments must start at 0, never fall, and end at the number of rows";

const ScanKernels& kernels_for(int32_t dtype) {
#if defined(LST_HAS_X86_LEVELS)
  if (lst::level() == lst::kAvx512) return lst::scan_kernels_avx512[dtype];
  if (lst::level() == lst::kAvx2) return lst::scan_kernels_avx2[dtype];
#endif
  return lst::scan_kernels_portable[dtype];
}

bool known(int32_t dtype) { return dtype >= kFloat32 && dtype <= kFloat64; }

bool well_formed(const int32_t* cu_segments, int64_t num_segments, int64_t num_rows) {
  for (int64_t i = 0; i < num_segments; ++i) {
    if (cu_segments[i] > cu_segments[i + 1]) return false;
  }
  return cu_segments[0] == 0 && cu_segments[num_segments] == num_rows;
}

int64_t num_tiles(int64_t num_features) {
  return (num_features + kScanFeatures - 1) / kScanFeatures;
}

// Does one pass of the kernel over every segment and tile.
void for_each_item(const Scan& scan, const int32_t* cu_segments, int64_t num_segments,
                   void (*kernel)(const Scan&, const ScanItem&), int32_t num_threads) {
  const int64_t tiles = num_tiles(scan.num_features);
  const int64_t num_items = num_segments * tiles;
  const int64_t num_elements = std::max<int64_t>(scan.num_rows * scan.num_features, 1);
  const int64_t per_chunk = std::max<int64_t>(kElementsPerChunk * num_items / num_elements, 1);
  lst::parallel_for(num_items, per_chunk, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t number = first; number < last; ++number) {
      const int64_t segment = number / tiles, feature = number % tiles * kScanFeatures;
      kernel(scan, {cu_segments[segment], cu_segments[segment + 1], feature,
                    std::min(kScanFeatures, scan.num_features - feature)});
    }
  });
}

// The sum of the tiles' parts, always in the same order.
template <class A, class C>
void add_partials(const Scan& scan, C* grad_decay, int32_t num_threads) {
  const int64_t tiles = num_tiles(scan.num_features);
  const A* const partial = static_cast<const A*>(scan.partial);
  lst::parallel_for(scan.num_rows, kElementsPerChunk, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      A total = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) total += partial[tile * scan.num_rows + row];
      grad_decay[row] = static_cast<C>(total);
    }
  });
}

}  // namespace

// x (P, F), decay (P,), cu_segments (N + 1,) -> y (P, F).
LST_EXPORT const char* lst_segment_scan_forward(const void* x, const void* decay,
                                                const int32_t* cu_segments, void* y,
                                                int64_t num_rows, int64_t num_segments,
                                                int64_t num_features, int32_t dtype,
                                                int32_t num_threads) {
  if (!known(dtype)) return kBadDtype;
  if (!well_formed(cu_segments, num_segments, num_rows)) return kBadOffsets;
  const Scan scan{x, decay, y, nullptr, nullptr, num_rows, num_features};
  for_each_item(scan, cu_segments, num_segments, kernels_for(dtype).forward, num_threads);
  return nullptr;
}

// grad and y (P, F), decay (P,), cu_segments (N + 1,) -> grad_x (P, F), grad_decay (P,). partial is
// room for (tiles of features, P) numbers of float32 for bfloat16, else of float64.
LST_EXPORT const char* lst_segment_scan_backward(const void* grad, const void* decay,
                                                 const int32_t* cu_segments, const void* y,
                                                 void* grad_x, void* grad_decay, void* partial,
                                                 int64_t num_rows, int64_t num_segments,
                                                 int64_t num_features, int32_t dtype,
                                                 int32_t num_threads) {
  if (!known(dtype)) return kBadDtype;
  if (!well_formed(cu_segments, num_segments, num_rows)) return kBadOffsets;
  const Scan scan{grad, decay, grad_x, y, partial, num_rows, num_features};
  for_each_item(scan, cu_segments, num_segments, kernels_for(dtype).backward, num_threads);
  if (dtype == kFloat64) {
    add_partials<double>(scan, static_cast<double*>(grad_decay), num_threads);
  } else if (dtype == kFloat32) {
    add_partials<double>(scan, static_cast<float*>(grad_decay), num_threads);
  } else {
    add_partials<float>(scan, static_cast<float*>(grad_decay), num_threads);
  }
  return nullptr;
}
