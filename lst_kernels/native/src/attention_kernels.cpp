// The hot loops of range_attention, compiled once per level with LST_LEVEL its name.
//
// Two families. *Tiled*: tiles of rows × keys, with products out of cache (product.h), an online
// softmax, interior tiles unmasked. *Patch-owned*: ranges that share no key, each key and value row
// read once, directly. Neither stores a score beyond its own tile or range.
#include "attention.h"
#include "attention_owned.h"
#include "attention_tiled.h"

#define LST_JOIN_NAMES(a, b) a##b
#define LST_JOIN(a, b) LST_JOIN_NAMES(a, b)

namespace {

template <class T>
constexpr lst::AttentionKernels kernels_for() {
  return {
      Tiled<T>::forward_scratch, Tiled<T>::backward_scratch, Owned<T>::scratch,
      Tiled<T>::forward,         Tiled<T>::backward_prepare, Tiled<T>::backward,
      Tiled<T>::backward_finish, Owned<T>::forward,          Owned<T>::backward,
  };
}

}  // namespace

namespace lst {

const AttentionKernels LST_JOIN(attention_kernels_, LST_LEVEL)[kNumDtypes] = {
    kernels_for<float>(),
    kernels_for<bfloat16>(),
    kernels_for<double>(),
};

}  // namespace lst
