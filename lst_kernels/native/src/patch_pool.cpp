// patch_pool: (T, F) -> (P, F), a reduction over each patch's tokens. patch_expand: (P, F) -> (T, F),
// a patch's row for each token. And their backward passes.
//
// The work is cut into items of one patch (or token) × one tile of features, numbered patch by
// patch; whoever takes an item writes all of its output. Here are the checks, the order of work, and
// what only copies rows; the arithmetic is in pool_kernels.cpp.
#include <algorithm>
#include <cstring>
#include <functional>

#include "common.h"
#include "levels.h"
#include "pool.h"

namespace {

using lst::kTileFeatures;
using lst::Pool;
using lst::PoolItem;
using lst::PoolKernels;

enum Reduce : int32_t { kMean = 0, kSum = 1, kMax = 2, kMin = 3, kFirst = 4, kLast = 5 };

constexpr int64_t kElementsPerChunk = 32768;  // below this, waking a thread costs more than it saves
constexpr int64_t kElementBytes[] = {4, 2, 8};

constexpr const char* kBadDtype = "dtype is not one that this library knows";
constexpr const char* kBadReduce = "reduce is not one that this library knows";
constexpr const char* kBadOffsets =
    "cu_patches must start at 0, never fall, and end at the number of tokens";
constexpr const char* kBadIds = "ids must lie between -1 and the number of patches";
constexpr const char* kBadReaders = "start and stop must be ranges of the tokens";

const PoolKernels& kernels_for(int32_t dtype) {
#if defined(LST_HAS_X86_LEVELS)
  if (lst::level() == lst::kAvx512) return lst::pool_kernels_avx512[dtype];
  if (lst::level() == lst::kAvx2) return lst::pool_kernels_avx2[dtype];
#endif
  return lst::pool_kernels_portable[dtype];
}

bool known(int32_t dtype) { return dtype >= 0 && dtype < 3; }

bool well_formed(const int32_t* cu_patches, int64_t num_patches, int64_t num_tokens) {
  for (int64_t patch = 0; patch < num_patches; ++patch) {
    if (cu_patches[patch] > cu_patches[patch + 1]) return false;
  }
  return cu_patches[0] == 0 && cu_patches[num_patches] == num_tokens;
}

// Calls body for every item of num_rows rows of num_features.
void for_each_item(int64_t num_rows, int64_t num_features, int64_t num_elements, int32_t num_threads,
                   const std::function<void(const PoolItem&)>& body) {
  const int64_t num_tiles = (num_features + kTileFeatures - 1) / kTileFeatures;
  const int64_t num_items = num_rows * num_tiles;
  const int64_t per_chunk =
      std::max<int64_t>(kElementsPerChunk * num_items / std::max<int64_t>(num_elements, 1), 1);
  lst::parallel_for(num_items, per_chunk, num_threads, [&](int64_t first, int64_t last) {
    for (int64_t number = first; number < last; ++number) {
      const int64_t feature = number % num_tiles * kTileFeatures;
      body({number / num_tiles, feature, std::min(kTileFeatures, num_features - feature)});
    }
  });
}

}  // namespace

// x (T, F), cu_patches (P + 1,) -> out (P, F) and, for max and min alone, index (P, F): the token
// that won, -1 in an empty patch. An empty patch gives 0.
LST_EXPORT const char* lst_patch_pool_forward(const void* x, const int32_t* cu_patches, void* out,
                                              int32_t* index, int64_t num_tokens,
                                              int64_t num_patches, int64_t num_features,
                                              int32_t reduce, int32_t dtype, int32_t num_threads) {
  if (!known(dtype)) return kBadDtype;
  if (reduce < kMean || reduce > kLast) return kBadReduce;
  if (!well_formed(cu_patches, num_patches, num_tokens)) return kBadOffsets;
  const Pool pool{cu_patches, cu_patches + 1, const_cast<void*>(x), out, index, num_features};
  const PoolKernels& kernels = kernels_for(dtype);
  const int64_t bytes = kElementBytes[dtype];
  const auto pick = [&](const PoolItem& item) {
    const int64_t start = cu_patches[item.row], stop = cu_patches[item.row + 1];
    char* const target = static_cast<char*>(out) + (item.row * num_features + item.feature) * bytes;
    if (start == stop) {
      std::memset(target, 0, static_cast<size_t>(item.width * bytes));
      return;
    }
    const int64_t token = reduce == kFirst ? start : stop - 1;
    const char* const source =
        static_cast<const char*>(x) + (token * num_features + item.feature) * bytes;
    std::memcpy(target, source, static_cast<size_t>(item.width * bytes));
  };
  for_each_item(num_patches, num_features, (num_tokens + num_patches) * num_features, num_threads,
                [&](const PoolItem& item) {
                  if (reduce == kMean || reduce == kSum) {
                    kernels.sum(pool, item, reduce == kMean);
                  } else if (reduce == kMax || reduce == kMin) {
                    kernels.extreme(pool, item, reduce == kMin);
                  } else {
                    pick(item);
                  }
                });
  return nullptr;
}

// grad (P, F), cu_patches (P + 1,), for max and min index (P, F) -> grad_x (T, F).
LST_EXPORT const char* lst_patch_pool_backward(const void* grad, const int32_t* cu_patches,
                                               const int32_t* index, void* grad_x,
                                               int64_t num_tokens, int64_t num_patches,
                                               int64_t num_features, int32_t reduce, int32_t dtype,
                                               int32_t num_threads) {
  if (!known(dtype)) return kBadDtype;
  if (reduce < kMean || reduce > kLast) return kBadReduce;
  if (!well_formed(cu_patches, num_patches, num_tokens)) return kBadOffsets;
  const Pool pool{cu_patches,   cu_patches + 1, grad_x, const_cast<void*>(grad),
                  const_cast<int32_t*>(index), num_features};
  const PoolKernels& kernels = kernels_for(dtype);
  const int64_t bytes = kElementBytes[dtype];
  const auto give = [&](const PoolItem& item) {
    const int64_t start = cu_patches[item.row], stop = cu_patches[item.row + 1];
    const int64_t receiver = reduce == kFirst ? start : stop - 1;
    const char* const source =
        static_cast<const char*>(grad) + (item.row * num_features + item.feature) * bytes;
    for (int64_t token = start; token < stop; ++token) {
      char* const target =
          static_cast<char*>(grad_x) + (token * num_features + item.feature) * bytes;
      if (token == receiver) {
        std::memcpy(target, source, static_cast<size_t>(item.width * bytes));
      } else {
        std::memset(target, 0, static_cast<size_t>(item.width * bytes));
      }
    }
  };
  for_each_item(num_patches, num_features, (num_tokens + num_patches) * num_features, num_threads,
                [&](const PoolItem& item) {
                  if (reduce == kMean || reduce == kSum) {
                    kernels.spread(pool, item, reduce == kMean);
                  } else if (reduce == kMax || reduce == kMin) {
                    kernels.award(pool, item);
                  } else {
                    give(item);
                  }
                });
  return nullptr;
}

// z (P, F), ids (T,), residual (T, F) or null -> out (T, F): row ids[t], 0 where that is -1, added to
// the residual's.
LST_EXPORT const char* lst_patch_expand_forward(const void* z, const int32_t* ids,
                                                const void* residual, void* out,
                                                int64_t num_tokens, int64_t num_patches,
                                                int64_t num_features, int32_t dtype,
                                                int32_t num_threads) {
  if (!known(dtype)) return kBadDtype;
  const bool inside = std::all_of(ids, ids + num_tokens,
                                  [&](int32_t id) { return id >= -1 && id < num_patches; });
  if (!inside) return kBadIds;
  const PoolKernels& kernels = kernels_for(dtype);
  const int64_t bytes = kElementBytes[dtype];
  for_each_item(num_tokens, num_features, num_tokens * num_features, num_threads,
                [&](const PoolItem& item) {
                  const int64_t id = ids[item.row], at = item.row * num_features + item.feature;
                  char* const target = static_cast<char*>(out) + at * bytes;
                  const size_t size = static_cast<size_t>(item.width * bytes);
                  const char* const own =
                      residual == nullptr ? nullptr : static_cast<const char*>(residual) + at * bytes;
                  if (id < 0 && own == nullptr) {
                    std::memset(target, 0, size);
                  } else if (id < 0) {
                    std::memcpy(target, own, size);
                  } else {
                    const char* const row =
                        static_cast<const char*>(z) + (id * num_features + item.feature) * bytes;
                    if (own == nullptr) {
                      std::memcpy(target, row, size);
                    } else {
                      kernels.add(row, own, target, item.width);
                    }
                  }
                });
  return nullptr;
}

// grad (T, F), start and stop (P,) -> grad_z (P, F): the sum over tokens start[p] … stop[p] - 1.
LST_EXPORT const char* lst_patch_expand_backward(const void* grad, const int32_t* start,
                                                 const int32_t* stop, void* grad_z,
                                                 int64_t num_tokens, int64_t num_patches,
                                                 int64_t num_features, int32_t dtype,
                                                 int32_t num_threads) {
  if (!known(dtype)) return kBadDtype;
  for (int64_t i = 0; i < num_patches; ++i) {
    if (start[i] < 0 || start[i] > stop[i] || stop[i] > num_tokens) return kBadReaders;
  }
  const Pool pool{start, stop, const_cast<void*>(grad), grad_z, nullptr, num_features};
  const PoolKernels& kernels = kernels_for(dtype);
  for_each_item(num_patches, num_features, (num_tokens + num_patches) * num_features, num_threads,
                [&](const PoolItem& item) { kernels.sum(pool, item, false); });
  return nullptr;
}
