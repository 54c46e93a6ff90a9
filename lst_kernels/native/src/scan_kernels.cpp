// The hot loops of segment_scan, compiled once per level with LST_LEVEL its name.
//
//   forward    y[t] = decay[t] y[t-1] + x[t]
//   backward   dx[t] = dy[t] + decay[t+1] dx[t+1]      ddecay[t] = sum over features of dx[t] y[t-1]
//
// The state of an item's features is carried in cache, row after row, so that every element is touched
// once. A decay of 0 takes the row as it is: nothing before it, NaN neither, is multiplied.
#include "carry.h"
#include "scan.h"
#include "simd.h"

namespace {

using lst::kScanFeatures;
using lst::Scan;
using lst::ScanItem;

template <class T>
struct Scanning {
  typedef typename Carry<T>::type A;
  typedef typename Simd<A>::V AV;
  typedef typename Compute<T>::type C;

  // state = decay · state + row, and the row of it.
  static LST_INLINE void step(A decay, A* state, const T* row, T* out, int64_t width) {
    const bool forgets = decay == A(0);
    int64_t j = 0;
    for (; j + kLanes<A> <= width; j += kLanes<A>) {
      const AV value = widen(row + j);
      const AV next = forgets ? value : decay * load<AV>(state + j) + value;
      store(state + j, next);
      narrow(out + j, next);
    }
    for (; j < width; ++j) {
      const A value = widen_one(row + j);
      state[j] = forgets ? value : decay * state[j] + value;
      narrow_one(out + j, state[j]);
    }
  }

  static LST_INLINE A dot(const A* state, const T* row, int64_t width) {
    AV total = {};
    int64_t j = 0;
    for (; j + kLanes<A> <= width; j += kLanes<A>) total += load<AV>(state + j) * widen(row + j);
    A sum = lane_sum<A>(total);
    for (; j < width; ++j) sum += state[j] * widen_one(row + j);
    return sum;
  }

  static void forward(const Scan& s, const ScanItem& item) {
    A state[kScanFeatures] = {};
    const T* const x = static_cast<const T*>(s.x) + item.feature;
    T* const out = static_cast<T*>(s.out) + item.feature;
    const C* const decay = static_cast<const C*>(s.decay);
    for (int64_t row = item.start; row < item.stop; ++row) {
      const A gate = row == item.start ? A(0) : A(decay[row]);
      step(gate, state, x + row * s.num_features, out + row * s.num_features, item.width);
    }
  }

  static void backward(const Scan& s, const ScanItem& item) {
    A state[kScanFeatures] = {};
    const T* const grad = static_cast<const T*>(s.x) + item.feature;
    const T* const y = static_cast<const T*>(s.y) + item.feature;
    T* const out = static_cast<T*>(s.out) + item.feature;
    A* const partial = static_cast<A*>(s.partial) + item.feature / kScanFeatures * s.num_rows;
    const C* const decay = static_cast<const C*>(s.decay);
    for (int64_t row = item.stop - 1; row >= item.start; --row) {
      const A gate = row == item.stop - 1 ? A(0) : A(decay[row + 1]);
      step(gate, state, grad + row * s.num_features, out + row * s.num_features, item.width);
      partial[row] =
          row == item.start ? A(0) : dot(state, y + (row - 1) * s.num_features, item.width);
    }
  }
};

template <class T>
constexpr lst::ScanKernels kernels_for() {
  return {Scanning<T>::forward, Scanning<T>::backward};
}

}  // namespace

#define LST_JOIN_NAMES(a, b) a##b
#define LST_JOIN(a, b) LST_JOIN_NAMES(a, b)

namespace lst {

const ScanKernels LST_JOIN(scan_kernels_, LST_LEVEL)[3] = {
    kernels_for<float>(),
    kernels_for<bfloat16>(),
    kernels_for<double>(),
};

}  // namespace lst
