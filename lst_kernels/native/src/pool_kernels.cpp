// The hot loops of patch_pool and patch_expand, compiled once per level with LST_LEVEL its name.
//
// A run of features stays in registers while the rows go by; every byte of x, y and index is touched
// once, so the ops run at the speed of memory.
#include "carry.h"
#include "pool.h"
#include "simd.h"

namespace {

using lst::Pool;
using lst::PoolItem;

typedef int32_t HalfIntegers __attribute__((vector_size(kVectorBytes / 2)));

LST_INLINE Simd<float>::I load_index(const int32_t* source, float) {
  return load<Simd<float>::I>(source);
}
LST_INLINE Simd<double>::I load_index(const int32_t* source, double) {
  return __builtin_convertvector(load<HalfIntegers>(source), Simd<double>::I);
}
LST_INLINE void store_index(int32_t* target, Simd<float>::I v) { store(target, v); }
LST_INLINE void store_index(int32_t* target, Simd<double>::I v) {
  store(target, __builtin_convertvector(v, HalfIntegers));
}

template <class T>
struct Pooling {
  typedef typename Carry<T>::type A;
  typedef typename Simd<A>::V AV;
  typedef typename Compute<T>::type C;
  typedef typename Simd<C>::V V;
  typedef typename Simd<C>::I I;
  static constexpr int64_t kRun = 8;

  // Where an item's rows lie: of x and y, and how far apart x's are.
  struct Place {
    T* x;  // row start of x
    T* y;
    int32_t* index;
    int64_t stride, start, stop;
  };

  static LST_INLINE Place place(const Pool& p, const PoolItem& item) {
    const int64_t start = p.start[item.row], at = item.row * p.num_features + item.feature;
    return {static_cast<T*>(p.x) + start * p.num_features + item.feature,
            static_cast<T*>(p.y) + at,
            p.index == nullptr ? nullptr : p.index + at,
            p.num_features,
            start,
            p.stop[item.row]};
  }

  // --- sums ---

  template <int kVectors>
  static LST_INLINE void sum_run(const Place& at, int64_t feature, A divisor) {
    AV total[kVectors] = {};
    const T* row = at.x + feature;
    for (int64_t token = at.start; token < at.stop; ++token, row += at.stride) {
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) total[i] += widen(row + i * kLanes<A>);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) narrow(at.y + feature + i * kLanes<A>, total[i] / divisor);
  }

  static void sum(const Pool& p, const PoolItem& item, bool mean) {
    const Place at = place(p, item);
    const A divisor = mean && at.start < at.stop ? static_cast<A>(at.stop - at.start) : A(1);
    int64_t j = 0;
    for (; j + kRun * kLanes<A> <= item.width; j += kRun * kLanes<A>) sum_run<kRun>(at, j, divisor);
    for (; j + kLanes<A> <= item.width; j += kLanes<A>) sum_run<1>(at, j, divisor);
    for (; j < item.width; ++j) {
      A total = 0;
      const T* element = at.x + j;
      for (int64_t token = at.start; token < at.stop; ++token, element += at.stride) {
        total += widen_one(element);
      }
      narrow_one(at.y + j, total / divisor);
    }
  }

  template <int kVectors>
  static LST_INLINE void spread_run(const Place& at, int64_t feature, C divisor) {
    V share[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      share[i] = load_row<C>(at.y + feature + i * kLanes<C>) / divisor;
    }
    T* row = at.x + feature;
    for (int64_t token = at.start; token < at.stop; ++token, row += at.stride) {
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) store_row(row + i * kLanes<C>, share[i]);
    }
  }

  static void spread(const Pool& p, const PoolItem& item, bool mean) {
    const Place at = place(p, item);
    const C divisor = mean ? static_cast<C>(at.stop - at.start) : C(1);
    int64_t j = 0;
    for (; j + kRun * kLanes<C> <= item.width; j += kRun * kLanes<C>) {
      spread_run<kRun>(at, j, divisor);
    }
    for (; j + kLanes<C> <= item.width; j += kLanes<C>) spread_run<1>(at, j, divisor);
    for (; j < item.width; ++j) {
      const V share = load_part<C>(at.y + j, 1) / divisor;
      T* element = at.x + j;
      for (int64_t token = at.start; token < at.stop; ++token, element += at.stride) {
        store_part<C>(element, share, 1);
      }
    }
  }

  // --- extremes: the first of equal values wins, and the first NaN wins over everything ---

  template <bool kLeast>
  static LST_INLINE I wins(V row, V best) {
    // True for a better value and, both comparisons being false for NaN, for the first NaN.
    return ~(kLeast ? row >= best : row <= best) & (best == best);
  }

  template <int kVectors, bool kLeast>
  static LST_INLINE void extreme_run(const Place& at, int64_t feature) {
    V best[kVectors];
    I winner[kVectors];
    const T* row = at.x + feature;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      best[i] = load_row<C>(row + i * kLanes<C>);
      winner[i] = static_cast<typename Simd<C>::Integer>(at.start) - I{};
    }
    for (int64_t token = at.start + 1; token < at.stop; ++token) {
      row += at.stride;
      const I here = static_cast<typename Simd<C>::Integer>(token) - I{};
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        const V value = load_row<C>(row + i * kLanes<C>);
        const I better = wins<kLeast>(value, best[i]);
        best[i] = better ? value : best[i];
        winner[i] = better ? here : winner[i];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      store_row(at.y + feature + i * kLanes<C>, best[i]);
      store_index(at.index + feature + i * kLanes<C>, winner[i]);
    }
  }

  template <bool kLeast>
  static LST_INLINE void extreme_one(const Place& at, int64_t feature) {
    const T* element = at.x + feature;
    V best = load_part<C>(element, 1);
    int32_t winner = static_cast<int32_t>(at.start);
    for (int64_t token = at.start + 1; token < at.stop; ++token) {
      element += at.stride;
      const V value = load_part<C>(element, 1);
      if (wins<kLeast>(value, best)[0]) {
        best = value;
        winner = static_cast<int32_t>(token);
      }
    }
    store_part<C>(at.y + feature, best, 1);
    at.index[feature] = winner;
  }

  template <bool kLeast>
  static LST_INLINE void extremes(const Place& at, int64_t width) {
    constexpr int kVectors = kRun / 2;  // a value and an index each
    int64_t j = 0;
    for (; j + kVectors * kLanes<C> <= width; j += kVectors * kLanes<C>) {
      extreme_run<kVectors, kLeast>(at, j);
    }
    for (; j + kLanes<C> <= width; j += kLanes<C>) extreme_run<1, kLeast>(at, j);
    for (; j < width; ++j) extreme_one<kLeast>(at, j);
  }

  static void extreme(const Pool& p, const PoolItem& item, bool least) {
    const Place at = place(p, item);
    if (at.start == at.stop) {
      __builtin_memset(at.y, 0, static_cast<size_t>(item.width) * sizeof(T));
      __builtin_memset(at.index, -1, static_cast<size_t>(item.width) * sizeof(int32_t));
    } else if (least) {
      extremes<true>(at, item.width);
    } else {
      extremes<false>(at, item.width);
    }
  }

  // Each row of x takes the value where it won. Comparing instead of scattering writes every element
  // once and stays inside the patch whatever the index holds.
  template <int kVectors>
  static LST_INLINE void award_run(const Place& at, int64_t feature) {
    V value[kVectors];
    I winner[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      value[i] = load_row<C>(at.y + feature + i * kLanes<C>);
      winner[i] = load_index(at.index + feature + i * kLanes<C>, C());
    }
    T* row = at.x + feature;
    for (int64_t token = at.start; token < at.stop; ++token, row += at.stride) {
      const I here = static_cast<typename Simd<C>::Integer>(token) - I{};
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        store_row(row + i * kLanes<C>, winner[i] == here ? value[i] : V{});
      }
    }
  }

  static void award(const Pool& p, const PoolItem& item) {
    const Place at = place(p, item);
    constexpr int kVectors = kRun / 2;  // a value and an index each
    int64_t j = 0;
    for (; j + kVectors * kLanes<C> <= item.width; j += kVectors * kLanes<C>) {
      award_run<kVectors>(at, j);
    }
    for (; j + kLanes<C> <= item.width; j += kLanes<C>) award_run<1>(at, j);
    for (; j < item.width; ++j) {
      T* element = at.x + j;
      for (int64_t token = at.start; token < at.stop; ++token, element += at.stride) {
        const V value = at.index[j] == token ? load_part<C>(at.y + j, 1) : V{};
        store_part<C>(element, value, 1);
      }
    }
  }

  // --- a row onto another ---

  static void add(const void* a, const void* b, void* sum, int64_t width) {
    const T *const left = static_cast<const T*>(a), *const right = static_cast<const T*>(b);
    T* const out = static_cast<T*>(sum);
    int64_t j = 0;
    for (; j + kLanes<C> <= width; j += kLanes<C>) {
      store_row(out + j, load_row<C>(left + j) + load_row<C>(right + j));
    }
    const int64_t rest = width - j;
    store_part<C>(out + j, load_part<C>(left + j, rest) + load_part<C>(right + j, rest), rest);
  }
};

template <class T>
constexpr lst::PoolKernels kernels_for() {
  return {Pooling<T>::sum, Pooling<T>::spread, Pooling<T>::extreme, Pooling<T>::award,
          Pooling<T>::add};
}

}  // namespace

#define LST_JOIN_NAMES(a, b) a##b
#define LST_JOIN(a, b) LST_JOIN_NAMES(a, b)

namespace lst {

const PoolKernels LST_JOIN(pool_kernels_, LST_LEVEL)[3] = {
    kernels_for<float>(),
    kernels_for<bfloat16>(),
    kernels_for<double>(),
};

}  // namespace lst
