// patch_pool: (T, F) -> (P, F), the mean, sum or maximum over each patch's tokens, and its backward.
//
// The work is cut into items of one patch × one tile of features, numbered patch by patch. An item
// owns its tile of the output row (forward) or of its tokens' rows (backward) and walks the tokens in
// order, so the bits depend neither on the number of threads nor on who took which item. Every byte
// of x and of the outputs is touched once: the ops run at the speed of memory.
#include <algorithm>

#include "common.h"

namespace {

enum Reduce : int32_t { kMean = 0, kSum = 1, kMax = 2 };

constexpr int64_t kTile = 256;               // features of an item: their sums in double fill 2 KiB
constexpr int64_t kElementsPerChunk = 32768;  // below this, waking a thread costs more than it saves

struct Patches {
  const int32_t* cu_patches;  // (P + 1,)
  int64_t num_patches;
  int64_t num_tokens;
  int64_t num_features;

  int64_t num_tiles() const { return (num_features + kTile - 1) / kTile; }
  int64_t num_items() const { return num_patches * num_tiles(); }
  int64_t items_per_chunk() const {
    const int64_t elements = std::max<int64_t>((num_tokens + num_patches) * num_features, 1);
    return std::max<int64_t>(kElementsPerChunk * num_items() / elements, 1);
  }
  bool well_formed() const {
    for (int64_t patch = 0; patch < num_patches; ++patch) {
      if (cu_patches[patch] > cu_patches[patch + 1]) return false;
    }
    return cu_patches[0] == 0 && cu_patches[num_patches] == num_tokens;
  }
};

constexpr const char* kBadOffsets =
    "cu_patches must start at 0, never fall, and end at the number of tokens";
constexpr const char* kBadReduce = "reduce is not one that this library knows";

// The place of one item: its patch, that patch's tokens [start, stop), and its tile of features.
struct Item {
  int64_t patch, start, stop, feature, width;

  Item(const Patches& patches, int64_t number) {
    patch = number / patches.num_tiles();
    feature = number % patches.num_tiles() * kTile;
    width = std::min(kTile, patches.num_features - feature);
    start = patches.cu_patches[patch];
    stop = patches.cu_patches[patch + 1];
  }
};

// Sums are carried in double, so that a patch of 10,000 tokens is as exact as one of two.
LST_CLONES void sum_items(const Patches& patches, bool mean, const float* x, float* out,
                          int64_t first, int64_t last) {
  for (int64_t number = first; number < last; ++number) {
    const Item item(patches, number);
    double total[kTile] = {};
    for (int64_t token = item.start; token < item.stop; ++token) {
      const float* row = x + token * patches.num_features + item.feature;
      for (int64_t j = 0; j < item.width; ++j) total[j] += static_cast<double>(row[j]);
    }
    const int64_t length = std::max<int64_t>(item.stop - item.start, 1);
    const double divisor = mean ? static_cast<double>(length) : 1.0;
    float* out_row = out + item.patch * patches.num_features + item.feature;
    for (int64_t j = 0; j < item.width; ++j) out_row[j] = static_cast<float>(total[j] / divisor);
  }
}

// The first of equal values wins; the first NaN wins over everything.
LST_CLONES void max_items(const Patches& patches, const float* x, float* out, int32_t* index,
                          int64_t first, int64_t last) {
  for (int64_t number = first; number < last; ++number) {
    const Item item(patches, number);
    float* __restrict best = out + item.patch * patches.num_features + item.feature;
    int32_t* __restrict winner = index + item.patch * patches.num_features + item.feature;
    if (item.start == item.stop) {
      std::fill_n(best, item.width, 0.0f);
      std::fill_n(winner, item.width, -1);
      continue;
    }
    const float* opening = x + item.start * patches.num_features + item.feature;
    std::copy_n(opening, item.width, best);
    std::fill_n(winner, item.width, static_cast<int32_t>(item.start));
    for (int64_t token = item.start + 1; token < item.stop; ++token) {
      const float* __restrict row = x + token * patches.num_features + item.feature;
      const int32_t here = static_cast<int32_t>(token);
      for (int64_t j = 0; j < item.width; ++j) {
        // True for a greater value and, both comparisons being false for NaN, for the first NaN.
        const bool wins = !(row[j] <= best[j]) & (best[j] == best[j]);
        best[j] = wins ? row[j] : best[j];
        winner[j] = wins ? here : winner[j];
      }
    }
  }
}

LST_CLONES void spread_items(const Patches& patches, bool mean, const float* grad, float* grad_x,
                             int64_t first, int64_t last) {
  for (int64_t number = first; number < last; ++number) {
    const Item item(patches, number);
    const float divisor = mean ? static_cast<float>(item.stop - item.start) : 1.0f;
    const float* grad_row = grad + item.patch * patches.num_features + item.feature;
    float share[kTile];
    for (int64_t j = 0; j < item.width; ++j) share[j] = grad_row[j] / divisor;
    for (int64_t token = item.start; token < item.stop; ++token) {
      std::copy_n(share, item.width, grad_x + token * patches.num_features + item.feature);
    }
  }
}

// Each token takes the gradient where it won. Comparing instead of scattering writes every element
// once and keeps inside the patch whatever the index holds.
LST_CLONES void award_items(const Patches& patches, const float* grad, const int32_t* index,
                            float* grad_x, int64_t first, int64_t last) {
  for (int64_t number = first; number < last; ++number) {
    const Item item(patches, number);
    const float* __restrict grad_row = grad + item.patch * patches.num_features + item.feature;
    const int32_t* __restrict winner = index + item.patch * patches.num_features + item.feature;
    for (int64_t token = item.start; token < item.stop; ++token) {
      float* __restrict row = grad_x + token * patches.num_features + item.feature;
      const int32_t here = static_cast<int32_t>(token);
      for (int64_t j = 0; j < item.width; ++j) row[j] = winner[j] == here ? grad_row[j] : 0.0f;
    }
  }
}

}  // namespace

// x (T, F), cu_patches (P + 1,) -> out (P, F) and, for the maximum alone, index (P, F): the token
// that won, -1 in an empty patch. An empty patch gives 0.
LST_EXPORT const char* lst_patch_pool_f32(const float* x, const int32_t* cu_patches, float* out,
                                          int32_t* index, int64_t num_tokens, int64_t num_patches,
                                          int64_t num_features, int32_t reduce,
                                          int32_t num_threads) {
  const Patches patches{cu_patches, num_patches, num_tokens, num_features};
  if (!patches.well_formed()) return kBadOffsets;
  if (reduce != kMean && reduce != kSum && reduce != kMax) return kBadReduce;
  lst::parallel_for(patches.num_items(), patches.items_per_chunk(), num_threads,
                    [&](int64_t first, int64_t last) {
                      if (reduce == kMax) {
                        max_items(patches, x, out, index, first, last);
                      } else {
                        sum_items(patches, reduce == kMean, x, out, first, last);
                      }
                    });
  return nullptr;
}

// grad (P, F), cu_patches (P + 1,), for the maximum index (P, F) -> grad_x (T, F).
LST_EXPORT const char* lst_patch_pool_backward_f32(const float* grad, const int32_t* cu_patches,
                                                   const int32_t* index, float* grad_x,
                                                   int64_t num_tokens, int64_t num_patches,
                                                   int64_t num_features, int32_t reduce,
                                                   int32_t num_threads) {
  const Patches patches{cu_patches, num_patches, num_tokens, num_features};
  if (!patches.well_formed()) return kBadOffsets;
  if (reduce != kMean && reduce != kSum && reduce != kMax) return kBadReduce;
  lst::parallel_for(patches.num_items(), patches.items_per_chunk(), num_threads,
                    [&](int64_t first, int64_t last) {
                      if (reduce == kMax) {
                        award_items(patches, grad, index, grad_x, first, last);
                      } else {
                        spread_items(patches, reduce == kMean, grad, grad_x, first, last);
                      }
                    });
  return nullptr;
}
