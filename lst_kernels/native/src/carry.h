// The precision that sums over many rows are carried in, and the way there and back. Included only by
// files that are compiled once per level (levels.h).
#pragma once

#include "simd.h"

namespace {

// What sums of T are carried in: float32 in float64, so that a sum of 10,000 rows is as exact as one
// of two.
template <class T>
struct Carry {
  typedef double type;
};
template <>
struct Carry<bfloat16> {
  typedef float type;
};

typedef float HalfFloats __attribute__((vector_size(kVectorBytes / 2)));

LST_INLINE Simd<double>::V widen(const float* source) {
  return __builtin_convertvector(load<HalfFloats>(source), Simd<double>::V);
}
LST_INLINE Simd<double>::V widen(const double* source) { return load_row<double>(source); }
LST_INLINE Simd<float>::V widen(const bfloat16* source) { return load_row<float>(source); }

LST_INLINE void narrow(float* target, Simd<double>::V v) {
  store(target, __builtin_convertvector(v, HalfFloats));
}
LST_INLINE void narrow(double* target, Simd<double>::V v) { store(target, v); }
LST_INLINE void narrow(bfloat16* target, Simd<float>::V v) { store_row(target, v); }

// A single element of T, from and to what it is carried in.

template <class T>
LST_INLINE typename Carry<T>::type widen_one(const T* source) {
  return load_part<typename Compute<T>::type>(source, 1)[0];
}

template <class T>
LST_INLINE void narrow_one(T* target, typename Carry<T>::type value) {
  typedef typename Compute<T>::type C;
  store_part<C>(target, splat<C>(static_cast<C>(value)), 1);
}

}  // namespace
