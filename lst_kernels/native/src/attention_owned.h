// The patch-owned family: no key is read through two different ranges, so whoever owns a range owns
// its keys. Memory-bound: each row of k, v and q is read once and each row of the outputs written
// once, dk and dv in the same pass as dq. All heads of a token lie side by side, so the heads are
// the inner loop.
#pragma once

#include <math.h>

#include "attention.h"
#include "simd.h"

namespace {

template <class T>
struct Owned {
  typedef typename Compute<T>::type C;
  typedef typename Simd<C>::V V;
  typedef lst::Attention Attention;
  typedef lst::OwnedPart OwnedPart;
  static constexpr int64_t kWidth = kLanes<C>;
  static constexpr double kLog2E = 1.44269504088896340736;
  static constexpr double kLn2 = 0.693147180559945309417;

  static size_t scratch(const Attention& p) {
    const int64_t width = round_up(p.head_dim, kWidth), line = round_up(p.max_owned_keys, kWidth);
    return sizeof(C) * static_cast<size_t>(p.max_owned_rows * (2 * line + width));
  }

  static void forward(const Attention& p, const OwnedPart& part, void* memory) {
    dispatch<Forward>(p, part, memory);
  }
  static void backward(const Attention& p, const OwnedPart& part, void* memory) {
    dispatch<Backward>(p, part, memory);
  }

  // The common head sizes keep a head in registers.
  template <template <int> class Pass>
  static void dispatch(const Attention& p, const OwnedPart& part, void* memory) {
    switch (p.head_dim % kWidth == 0 ? p.head_dim / kWidth : 0) {
      case 1: return Pass<1>::run(p, part, memory);
      case 2: return Pass<2>::run(p, part, memory);
      case 4: return Pass<4>::run(p, part, memory);
      case 8: return Pass<8>::run(p, part, memory);
      default: return Pass<0>::run(p, part, memory);
    }
  }

  // One head of one row: kVectors whole vectors, or with 0 as many as it takes, the last in part.
  template <int kVectors>
  struct Head {
    V x[kVectors ? kVectors : 256 / kWidth];

    static LST_INLINE int64_t count(int64_t head_dim) {
      return kVectors ? kVectors : (head_dim + kWidth - 1) / kWidth;
    }
    static LST_INLINE int64_t lanes_of_last(int64_t head_dim) {
      return kVectors ? kWidth : head_dim - (count(head_dim) - 1) * kWidth;
    }
    LST_INLINE void read(const T* source, int64_t head_dim) {
      const int64_t last = count(head_dim) - 1, lanes = lanes_of_last(head_dim);
      for (int64_t i = 0; i < last; ++i) x[i] = load_row<C>(source + i * kWidth);
      const T* const rest = source + last * kWidth;
      x[last] = lanes == kWidth ? load_row<C>(rest) : load_part<C>(rest, lanes);
    }
    LST_INLINE void write(T* target, int64_t head_dim) const {
      const int64_t last = count(head_dim) - 1, lanes = lanes_of_last(head_dim);
      for (int64_t i = 0; i < last; ++i) store_row(target + i * kWidth, x[i]);
      T* const rest = target + last * kWidth;
      if (lanes == kWidth) {
        store_row(rest, x[last]);
      } else {
        store_part<C>(rest, x[last], lanes);
      }
    }
    LST_INLINE void clear(int64_t head_dim) {
      for (int64_t i = 0; i < count(head_dim); ++i) x[i] = V{};
    }
    LST_INLINE void multiply(C factor, int64_t head_dim) {
      for (int64_t i = 0; i < count(head_dim); ++i) x[i] *= factor;
    }
    LST_INLINE void add(C factor, const Head& other, int64_t head_dim) {
      for (int64_t i = 0; i < count(head_dim); ++i) x[i] += factor * other.x[i];
    }
    LST_INLINE C dot(const Head& other, int64_t head_dim) const {
      V sum = x[0] * other.x[0];
      for (int64_t i = 1; i < count(head_dim); ++i) sum += x[i] * other.x[i];
      return lane_sum<C>(sum);
    }
  };

  // Queries [first, last) that share the keys [start, stop).
  struct Group {
    int64_t first, last, start, stop;
  };

  static Group next_group(const Attention& p, int64_t first, int64_t end) {
    Group group{first, first + 1, p.start[first], p.stop[first]};
    while (group.start < group.stop && group.last < end && p.start[group.last] == group.start &&
           p.stop[group.last] == group.stop) {
      ++group.last;
    }
    return group;
  }

  template <int kVectors>
  struct Forward {
    static void run(const Attention& p, const OwnedPart& part, void* memory) {
      C* const weights = static_cast<C*>(memory);
      for (int64_t query = part.first; query < part.last;) {
        const Group group = next_group(p, query, part.last);
        for (int64_t head = 0; head < p.num_kv_heads; ++head) {
          for (query = group.first; query < group.last; ++query) {
            for (int64_t g = head * p.group(); g < (head + 1) * p.group(); ++g) {
              attend(p, group, query, g, head, weights);
            }
          }
        }
        query = group.last;
      }
    }

    static LST_INLINE void attend(const Attention& p, const Group& group, int64_t query,
                                  int64_t head, int64_t kv_head, C* weights) {
      const int64_t head_dim = p.head_dim, num_keys = group.stop - group.start;
      const int64_t at = query * p.num_heads + head;
      const T* const keys = static_cast<const T*>(p.k) + group.start * p.k_row + kv_head * p.k_head;
      const T* const values = static_cast<const T*>(p.v) + group.start * p.v_row + kv_head * p.v_head;
      Head<kVectors> q, row, sum;
      q.read(static_cast<const T*>(p.q) + query * p.q_row + head * p.q_head, head_dim);
      q.multiply(static_cast<C>(p.scale * kLog2E), head_dim);
      C maximum = -HUGE_VAL;
      for (int64_t i = 0; i < num_keys; ++i) {
        row.read(keys + i * p.k_row, head_dim);
        weights[i] = q.dot(row, head_dim);
        maximum = weights[i] > maximum ? weights[i] : maximum;
      }
      for (int64_t i = num_keys; i < round_up(num_keys, kWidth); ++i) weights[i] = -HUGE_VAL;
      const C base = maximum == static_cast<C>(-HUGE_VAL) ? C(0) : maximum;
      V totals = {};
      for (int64_t i = 0; i < num_keys; i += kWidth) {
        const V weight = exp2(load<V>(weights + i) - base);
        totals += weight;
        store(weights + i, weight);
      }
      const C total = lane_sum<C>(totals);
      sum.clear(head_dim);
      for (int64_t i = 0; i < num_keys; ++i) {
        row.read(values + i * p.v_row, head_dim);
        sum.add(weights[i], row, head_dim);
      }
      sum.multiply(total == 0 ? C(0) : 1 / total, head_dim);
      sum.write(static_cast<T*>(p.out) + at * head_dim, head_dim);
      static_cast<C*>(p.lse)[at] = total == 0 ? static_cast<C>(-HUGE_VAL)
                                              : static_cast<C>(maximum * kLn2 + log(total));
    }
  };

  // The whole row of scores is at hand, so the softmax is taken anew and delta is summed from the
  // very products that it is taken from: neither out nor lse is read, and the gradient of a score
  // that is alone is exactly 0.
  template <int kVectors>
  struct Backward {
    typedef Head<kVectors> Row;

    // Of one group and one key head, a line of max_keys for each of its rows.
    struct Scores {
      C *weights, *grads;  // P, and dP that becomes dS
      C* grad_q;           // (rows, D padded)
      int64_t line, width;
    };

    static void run(const Attention& p, const OwnedPart& part, void* memory) {
      const int64_t width = round_up(p.head_dim, kWidth), line = round_up(p.max_owned_keys, kWidth);
      C* const weights = static_cast<C*>(memory);
      C* const grads = weights + p.max_owned_rows * line;
      const Scores scores{weights, grads, grads + p.max_owned_rows * line, line, width};
      int64_t written = part.first_key;  // every key below has its dk and dv
      for (int64_t query = part.first; query < part.last;) {
        const Group group = next_group(p, query, part.last);
        if (group.start < group.stop) {
          clear_keys(p, written, group.start);
          written = group.stop;
        }
        for (int64_t head = 0; head < p.num_kv_heads; ++head) {
          int64_t row = 0;
          for (int64_t i = group.first; i < group.last; ++i) {
            for (int64_t g = head * p.group(); g < (head + 1) * p.group(); ++g) {
              weigh(p, group, i, g, head, row++, scores);
            }
          }
          for (int64_t key = group.start; key < group.stop; ++key) {
            distribute(p, group, head, key, scores);
          }
          write_grad_q(p, group, head, scores);
        }
        query = group.last;
      }
      clear_keys(p, written, part.last_key);
    }

    static void clear_keys(const Attention& p, int64_t first, int64_t last) {
      if (first >= last) return;
      const int64_t width = p.num_kv_heads * p.head_dim;
      const size_t bytes = static_cast<size_t>((last - first) * width) * sizeof(T);
      __builtin_memset(static_cast<T*>(p.grad_k) + first * width, 0, bytes);
      __builtin_memset(static_cast<T*>(p.grad_v) + first * width, 0, bytes);
    }

    static LST_INLINE const T* grad_out(const Attention& p, int64_t query, int64_t head) {
      return static_cast<const T*>(p.grad_out) + query * p.grad_out_row + head * p.grad_out_head;
    }

    // One row's line of weights and of gradients of scores, and an empty row of grad_q.
    static LST_INLINE void weigh(const Attention& p, const Group& group, int64_t query,
                                 int64_t head, int64_t kv_head, int64_t row, const Scores& scores) {
      const int64_t head_dim = p.head_dim, num_keys = group.stop - group.start;
      C* const weights = scores.weights + row * scores.line;
      C* const grads = scores.grads + row * scores.line;
      const T* const keys = static_cast<const T*>(p.k) + group.start * p.k_row + kv_head * p.k_head;
      const T* const values = static_cast<const T*>(p.v) + group.start * p.v_row + kv_head * p.v_head;
      Row q, grad, other;
      q.read(static_cast<const T*>(p.q) + query * p.q_row + head * p.q_head, head_dim);
      q.multiply(static_cast<C>(p.scale * kLog2E), head_dim);
      grad.read(grad_out(p, query, head), head_dim);
      C maximum = -HUGE_VAL;
      for (int64_t i = 0; i < num_keys; ++i) {
        other.read(keys + i * p.k_row, head_dim);
        weights[i] = q.dot(other, head_dim);
        maximum = weights[i] > maximum ? weights[i] : maximum;
        other.read(values + i * p.v_row, head_dim);
        grads[i] = grad.dot(other, head_dim);
      }
      for (int64_t i = num_keys; i < round_up(num_keys, kWidth); ++i) {
        weights[i] = -HUGE_VAL;
        grads[i] = 0;
      }
      const C base = maximum == static_cast<C>(-HUGE_VAL) ? C(0) : maximum;
      V totals = {}, deltas = {};
      for (int64_t i = 0; i < num_keys; i += kWidth) {
        const V weight = exp2(load<V>(weights + i) - base);
        totals += weight;
        deltas += weight * load<V>(grads + i);
        store(weights + i, weight);
      }
      const C share = 1 / lane_sum<C>(totals), delta = lane_sum<C>(deltas) * share;
      for (int64_t i = 0; i < num_keys; i += kWidth) {
        const V weight = load<V>(weights + i) * share;
        store(weights + i, weight);
        store(grads + i, weight * (load<V>(grads + i) - delta) * static_cast<C>(p.scale));
      }
      C* const grad_q = scores.grad_q + row * scores.width;
      for (int64_t d = 0; d < scores.width; d += kWidth) store(grad_q + d, V{});
    }

    // dk and dv of one key, and its part of the rows' dq.
    static LST_INLINE void distribute(const Attention& p, const Group& group, int64_t kv_head,
                                      int64_t key, const Scores& scores) {
      const int64_t head_dim = p.head_dim, at = (key * p.num_kv_heads + kv_head) * head_dim;
      Row k, grad_k, grad_v, other;
      k.read(static_cast<const T*>(p.k) + key * p.k_row + kv_head * p.k_head, head_dim);
      grad_k.clear(head_dim);
      grad_v.clear(head_dim);
      int64_t cell = key - group.start;
      C* grad_q = scores.grad_q;
      for (int64_t i = group.first; i < group.last; ++i) {
        for (int64_t g = kv_head * p.group(); g < (kv_head + 1) * p.group(); ++g) {
          const C weight = scores.weights[cell], grad_score = scores.grads[cell];
          other.read(static_cast<const T*>(p.q) + i * p.q_row + g * p.q_head, head_dim);
          grad_k.add(grad_score, other, head_dim);
          other.read(grad_out(p, i, g), head_dim);
          grad_v.add(weight, other, head_dim);
          for (int64_t n = 0; n < Row::count(head_dim); ++n) {
            C* const place = grad_q + n * kWidth;
            store(place, load<V>(place) + grad_score * k.x[n]);
          }
          cell += scores.line;
          grad_q += scores.width;
        }
      }
      grad_k.write(static_cast<T*>(p.grad_k) + at, head_dim);
      grad_v.write(static_cast<T*>(p.grad_v) + at, head_dim);
    }

    static LST_INLINE void write_grad_q(const Attention& p, const Group& group, int64_t kv_head,
                                        const Scores& scores) {
      const C* grad_q = scores.grad_q;
      for (int64_t i = group.first; i < group.last; ++i) {
        for (int64_t g = kv_head * p.group(); g < (kv_head + 1) * p.group(); ++g) {
          Row row;
          for (int64_t n = 0; n < Row::count(p.head_dim); ++n) {
            row.x[n] = load<V>(grad_q + n * kWidth);
          }
          row.write(static_cast<T*>(p.grad_q) + (i * p.num_heads + g) * p.head_dim, p.head_dim);
          grad_q += scores.width;
        }
      }
    }
  };
};

}  // namespace
