// The tiled family. Scores are in units of log2: the scale times log2(e) is folded into the queries
// (forward) or the keys (backward) when they are packed, so that exp2 needs no product.
#pragma once

#include <math.h>

#include "attention.h"
#include "product.h"

namespace {

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.693147180559945309417;

template <class T>
struct Tiled {
  typedef typename Compute<T>::type C;
  typedef typename Simd<C>::V V;
  typedef typename Simd<C>::I I;
  typedef typename Simd<C>::Integer Integer;
  typedef lst::Attention Attention;
  static constexpr int64_t kWidth = kLanes<C>;
  static constexpr int64_t kRows = lst::kTileQueries;
  static_assert(lst::kStripRows % kWidth == 0, "forward, each lane is a row");

  // --- rows of tensors, packed ---------------------------------------------------------------

  static int64_t padded(const Attention& p) { return round_up(p.head_dim, kWidth); }

  // (count, D) rows -> (count, width) packed and multiplied; columns past D are 0.
  static void pack(C* target, int64_t width, const T* source, int64_t stride, int64_t count,
                   int64_t head_dim, C factor) {
    const int64_t whole = head_dim / kWidth * kWidth;
    for (int64_t i = 0; i < count; ++i, source += stride, target += width) {
      for (int64_t d = 0; d < whole; d += kWidth) {
        store(target + d, load_row<C>(source + d) * factor);
      }
      if (whole < head_dim) {
        store(target + whole, load_part<C>(source + whole, head_dim - whole) * factor);
      }
    }
  }

  // (count, width) packed rows -> (D, columns), transposed and multiplied; columns past count are 0.
  static void transpose(C* target, int64_t columns, const C* rows, int64_t width, int64_t count,
                        int64_t head_dim, C factor) {
    for (int64_t d = 0; d < head_dim; ++d) {
      C* const line = target + d * columns;
      for (int64_t i = 0; i < count; ++i) line[i] = rows[i * width + d] * factor;
      for (int64_t i = count; i < columns; ++i) line[i] = 0;
    }
  }

  // Rows r … r + count - 1 of one key head: a query's heads side by side, then the next query's.
  static void pack_rows(C* target, int64_t width, const T* tensor, int64_t row_stride,
                        int64_t head_stride, const Attention& p, int64_t kv_head, int64_t r,
                        int64_t count, C factor) {
    const int64_t group = p.group();
    for (int64_t end = r + count; r < end;) {
      const int64_t query = r / group, head = r % group;
      const T* const source = tensor + query * row_stride + (kv_head * group + head) * head_stride;
      // With one head a query the rows are evenly spaced.
      const int64_t run = group == 1 ? end - r : smaller(group - head, end - r);
      const int64_t stride = group == 1 ? row_stride : head_stride;
      pack(target, width, source, stride, run, p.head_dim, factor);
      target += run * width;
      r += run;
    }
  }

  // Where row r of a key head lies in a contiguous (Q, Hq) tensor.
  static int64_t place(const Attention& p, int64_t kv_head, int64_t r) {
    const int64_t group = p.group();
    return r / group * p.num_heads + kv_head * group + r % group;
  }

  // --- forward ---------------------------------------------------------------------------------

  // A tile of rows on its way through the keys.
  struct RowTile {
    C *query_columns, *out, *maximum, *total;  // (D, 64), (64, width), (64,), (64,)
    Integer *start, *stop;                     // (64,) each
    int64_t first_row, num_rows;

    int64_t last() const { return num_rows - 1; }
  };

  struct ForwardScratch {
    RowTile tiles[lst::kTilesPerTask];
    C *keys, *values, *scores, *decay;

    ForwardScratch(const Attention& p, void* memory) {
      C* next = static_cast<C*>(memory);
      auto take = [&](int64_t count) { C* const taken = next; next += count; return taken; };
      for (RowTile& tile : tiles) {
        tile.query_columns = take(p.head_dim * kRows);
        tile.out = take(kRows * padded(p));
        tile.maximum = take(kRows);
        tile.total = take(kRows);
        tile.start = reinterpret_cast<Integer*>(take(kRows));
        tile.stop = reinterpret_cast<Integer*>(take(kRows));
      }
      keys = take(lst::kTileKeys * padded(p));
      values = take(lst::kTileKeys * padded(p));
      scores = take(lst::kTileKeys * kRows);
      decay = take(kRows);
    }
  };

  static size_t forward_scratch(const Attention& p) {
    const int64_t width = padded(p), tile = (p.head_dim + width + 4) * kRows;
    return sizeof(C) * static_cast<size_t>(lst::kTilesPerTask * tile +
                                           lst::kTileKeys * (2 * width + kRows) + kRows);
  }

  // Scores (keys, 64): one key a line, so that each lane belongs to a row and the softmax needs no
  // sums across lanes. Turns scores into weights and says by how much earlier sums must shrink.
  template <bool kMasked>
  static void soften(const ForwardScratch& s, const RowTile& tile, int64_t first, int64_t count,
                     int64_t first_key, int64_t num_keys) {
    const V nothing = splat<C>(-HUGE_VAL);
    for (int64_t r = first; r < first + count; r += kWidth) {
      C* const lane = s.scores + r;
      const I start = load<I>(tile.start + r), stop = load<I>(tile.stop + r);
      const V before = load<V>(tile.maximum + r);
      V maximum = before;
      for (int64_t k = 0; k < num_keys; ++k) {
        V score = load<V>(lane + k * kRows);
        if (kMasked) {
          const I key = static_cast<Integer>(first_key + k) - I{};
          score = ((key >= start) & (key < stop)) ? score : nothing;
          store(lane + k * kRows, score);
        }
        maximum = greater_of(score, maximum);
      }
      // A row that has read no key yet: all its weights are exp2(-infinity - 0) = 0.
      const V base = maximum == nothing ? V{} : maximum;
      const V decay = exp2(before - base);
      V total = load<V>(tile.total + r) * decay;
      for (int64_t k = 0; k < num_keys; ++k) {
        const V weight = exp2(load<V>(lane + k * kRows) - base);
        total += weight;
        store(lane + k * kRows, weight);
      }
      store(tile.maximum + r, maximum);
      store(tile.total + r, total);
      store(s.decay + r, decay);
    }
  }

  // Several tiles of rows go through the keys together, so that keys and values are packed once.
  static void forward(const Attention& p, int64_t first_tile, int64_t num_tiles, int64_t kv_head,
                      void* memory) {
    ForwardScratch s(p, memory);
    const int64_t width = padded(p);
    for (int64_t i = 0; i < num_tiles; ++i) open_tile(p, first_tile + i, kv_head, s.tiles[i]);
    const RowTile& final_tile = s.tiles[num_tiles - 1];
    const int64_t end = final_tile.stop[final_tile.last()];
    const T* const k = static_cast<const T*>(p.k) + kv_head * p.k_head;
    const T* const v = static_cast<const T*>(p.v) + kv_head * p.v_head;
    for (int64_t key = s.tiles[0].start[0]; key < end; key += lst::kTileKeys) {
      const int64_t num_keys = smaller(lst::kTileKeys, end - key);
      bool packed = false;
      for (int64_t i = 0; i < num_tiles; ++i) {
        if (!reads_any(s.tiles[i], key, key + num_keys)) continue;
        if (!packed) {
          pack(s.keys, width, k + key * p.k_row, p.k_row, num_keys, p.head_dim, C(1));
          pack(s.values, width, v + key * p.v_row, p.v_row, num_keys, p.head_dim, C(1));
          packed = true;
        }
        attend(p, s, s.tiles[i], key, num_keys);
      }
    }
    for (int64_t i = 0; i < num_tiles; ++i) close_tile(p, kv_head, s.tiles[i]);
  }

  static void open_tile(const Attention& p, int64_t row_tile, int64_t kv_head, RowTile& tile) {
    const int64_t width = padded(p);
    tile.first_row = row_tile * kRows;
    tile.num_rows = smaller(kRows, p.num_rows() - tile.first_row);
    // The rows are packed where the weighted values will be summed, then turned into columns.
    pack_rows(tile.out, width, static_cast<const T*>(p.q), p.q_row, p.q_head, p, kv_head,
              tile.first_row, tile.num_rows, static_cast<C>(p.scale * kLog2E));
    transpose(tile.query_columns, kRows, tile.out, width, tile.num_rows, p.head_dim, C(1));
    for (int64_t r = 0; r < kRows; ++r) {
      const int64_t query = (tile.first_row + r) / p.group();
      tile.start[r] = r < tile.num_rows ? p.start[query] : 0;
      tile.stop[r] = r < tile.num_rows ? p.stop[query] : 0;
      tile.maximum[r] = -HUGE_VAL;
      tile.total[r] = 0;
    }
    for (int64_t i = 0; i < kRows * width; ++i) tile.out[i] = 0;
  }

  static bool reads_any(const RowTile& tile, int64_t first, int64_t last) {
    bool any = false;
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      any |= larger(tile.start[r], first) < smaller(tile.stop[r], last);
    }
    return any;
  }

  // One tile of rows against the packed keys: all at once if all rows read all keys, and else strip
  // by strip, each against its own interval, for the whole tile's may be much longer than a row's.
  static void attend(const Attention& p, const ForwardScratch& s, const RowTile& tile,
                     int64_t packed_key, int64_t num_packed) {
    const int64_t end = packed_key + num_packed;
    const bool full = tile.start[tile.last()] <= packed_key && end <= tile.stop[0];
    const int64_t rows = full ? tile.num_rows : lst::kStripRows;
    for (int64_t r = 0; r < tile.num_rows; r += rows) {
      attend_rows(p, s, tile, r, smaller(rows, tile.num_rows - r), packed_key, end);
    }
  }

  // Rows first … first + count - 1 of the tile, as far as their interval reaches into the keys.
  static void attend_rows(const Attention& p, const ForwardScratch& s, const RowTile& tile,
                          int64_t first, int64_t count, int64_t packed_key, int64_t packed_end) {
    const int64_t width = padded(p), last = first + count - 1;
    const int64_t first_key = larger(packed_key, tile.start[first]);
    const int64_t end = smaller(packed_end, tile.stop[last]), num_keys = end - first_key;
    if (num_keys <= 0) return;
    const int64_t skipped = (first_key - packed_key) * width;
    C* const scores = s.scores + first;
    product<Onto::kNothing>(scores, kRows, Spread<C>{s.keys + skipped, width, 1},
                            tile.query_columns + first, kRows, num_keys, round_up(count, kWidth),
                            p.head_dim);
    if (tile.start[last] <= first_key && end <= tile.stop[first]) {
      soften<false>(s, tile, first, count, first_key, num_keys);
    } else {
      soften<true>(s, tile, first, count, first_key, num_keys);
    }
    product<Onto::kScaledSum>(tile.out + first * width, width, Spread<C>{scores, 1, kRows},
                              s.values + skipped, width, count, width, num_keys, s.decay + first);
  }

  static void close_tile(const Attention& p, int64_t kv_head, const RowTile& tile) {
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      const int64_t at = place(p, kv_head, tile.first_row + r);
      const C total = tile.total[r];
      // With a total of 0 nothing was read: the sums are 0, and so is their share.
      const C share = total == 0 ? C(0) : 1 / total;
      unpack(static_cast<T*>(p.out) + at * p.head_dim, tile.out + r * padded(p), p.head_dim, share);
      static_cast<C*>(p.lse)[at] = total == 0 ? static_cast<C>(-HUGE_VAL)
                                              : static_cast<C>(tile.maximum[r] * kLn2 + log(total));
    }
  }

  static void unpack(T* target, const C* row, int64_t head_dim, C factor) {
    int64_t d = 0;
    for (; d + kWidth <= head_dim; d += kWidth) store_row(target + d, load<V>(row + d) * factor);
    if (d < head_dim) store_part<C>(target + d, load<V>(row + d) * factor, head_dim - d);
  }

  // --- backward --------------------------------------------------------------------------------
  //
  // By tiles of keys, which own dk and dv; each in turn adds its part to dq (Turns). With the
  // probabilities P = exp2(S - lse) computed again from the saved lse,
  //   dV = Pᵀ dO,   dS = P ∘ (dO Vᵀ - delta),   dK = scale · dSᵀ Q,   dQ = scale · dS K.

  struct KeyTile {
    C *key_columns, *value_columns, *keys, *grad_k, *grad_v;  // twice (D, 128), then (128, width)
    int64_t first_key, num_keys;
  };

  struct BackwardScratch {
    KeyTile tiles[lst::kTilesPerTask];
    C *queries, *grads, *weights, *grad_scores, *grad_q, *lse, *delta;
    Integer *start, *stop;

    BackwardScratch(const Attention& p, void* memory) {
      C* next = static_cast<C*>(memory);
      auto take = [&](int64_t count) { C* const taken = next; next += count; return taken; };
      const int64_t width = padded(p);
      for (KeyTile& tile : tiles) {
        tile.key_columns = take(p.head_dim * lst::kTileKeys);
        tile.value_columns = take(p.head_dim * lst::kTileKeys);
        tile.keys = take(lst::kTileKeys * width);
        tile.grad_k = take(lst::kTileKeys * width);
        tile.grad_v = take(lst::kTileKeys * width);
      }
      queries = take(kRows * width);
      grads = take(kRows * width);
      weights = take(kRows * lst::kTileKeys);
      grad_scores = take(kRows * lst::kTileKeys);
      grad_q = take(kRows * width);
      lse = take(kRows);
      delta = take(kRows);
      start = reinterpret_cast<Integer*>(take(kRows));
      stop = reinterpret_cast<Integer*>(take(kRows));
    }
  };

  static size_t backward_scratch(const Attention& p) {
    const int64_t width = padded(p), tile = (2 * p.head_dim + 3 * width) * lst::kTileKeys;
    return sizeof(C) * static_cast<size_t>(lst::kTilesPerTask * tile +
                                           kRows * (3 * width + 2 * lst::kTileKeys + 4));
  }

  // delta = sum over D of grad_out ∘ out, and an empty grad_q, for all heads of a query.
  static void backward_prepare(const Attention& p, int64_t query) {
    const T* const grad = static_cast<const T*>(p.grad_out) + query * p.grad_out_row;
    const int64_t at = query * p.num_heads;
    const T* const out = static_cast<const T*>(p.out) + at * p.head_dim;
    C* const grad_q = static_cast<C*>(p.grad_q_sum) + at * p.head_dim;
    for (int64_t head = 0; head < p.num_heads; ++head) {
      static_cast<C*>(p.delta)[at + head] =
          dot(grad + head * p.grad_out_head, out + head * p.head_dim, p.head_dim);
    }
    for (int64_t i = 0; i < p.num_heads * p.head_dim; ++i) grad_q[i] = 0;
  }

  static C dot(const T* a, const T* b, int64_t count) {
    V sum = {};
    int64_t d = 0;
    for (; d + kWidth <= count; d += kWidth) sum += load_row<C>(a + d) * load_row<C>(b + d);
    if (d < count) sum += load_part<C>(a + d, count - d) * load_part<C>(b + d, count - d);
    return lane_sum<C>(sum);
  }

  // grad_q in T where it was summed up elsewhere.
  static void backward_finish(const Attention& p, int64_t query) {
    const int64_t first = query * p.num_heads * p.head_dim;
    unpack(static_cast<T*>(p.grad_q) + first, static_cast<const C*>(p.grad_q_sum) + first,
           p.num_heads * p.head_dim, C(1));
  }

  // Columns [from, to) of the tile's scores become weights and, from dP, gradients of scores.
  template <bool kMasked>
  static void differentiate(const BackwardScratch& s, int64_t first, int64_t count,
                            int64_t first_key, int64_t from, int64_t to) {
    const I lanes = lane_numbers<C>();
    for (int64_t r = first; r < first + count; ++r) {
      C* const weights = s.weights + r * lst::kTileKeys;
      C* const grads = s.grad_scores + r * lst::kTileKeys;
      const C lse = s.lse[r], delta = s.delta[r];
      // The only score of a row has no gradient. Here it would be what rounding leaves of dP - delta.
      const C live = s.stop[r] - s.start[r] == 1 ? 0 : 1;
      for (int64_t k = from; k < to; k += kWidth) {
        V weight = exp2(load<V>(weights + k) - lse);
        V grad = weight * live * (load<V>(grads + k) - delta);
        if (kMasked) {
          const I key = lanes + static_cast<Integer>(first_key + k);
          const I read = (key >= s.start[r]) & (key < s.stop[r]);
          weight = read ? weight : V{};
          grad = read ? grad : V{};
        }
        store(weights + k, weight);
        store(grads + k, grad);
      }
    }
  }

  // Several tiles of keys meet each tile of rows together, so that rows are packed and dq is added
  // to once for all.
  static void backward(const Attention& p, const lst::KeyTask& task, int64_t kv_head,
                       const lst::Turns& turns, void* memory) {
    BackwardScratch s(p, memory);
    for (int64_t i = 0; i < task.num_tiles; ++i) {
      open_keys(p, task, (task.first_tile + i) * lst::kTileKeys, kv_head, s.tiles[i]);
    }
    for (int64_t r = task.first_row; r < task.last_row;) {
      const int64_t row_tile = r / kRows;
      const int64_t num_rows = smaller((row_tile + 1) * kRows, task.last_row) - r;
      read_rows(p, s, kv_head, r, num_rows);
      for (int64_t i = 0; i < num_rows * padded(p); ++i) s.grad_q[i] = 0;
      bool any = false;
      for (int64_t i = 0; i < task.num_tiles; ++i) {
        any |= differentiate_pair(p, s, s.tiles[i], num_rows);
      }
      int32_t* const taken = turns.taken + kv_head * p.num_row_tiles() + row_tile;
      const int32_t turn = task.number - turns.first[row_tile];
      while (__atomic_load_n(taken, __ATOMIC_ACQUIRE) != turn) turns.pause();
      if (any) add_grad_q(p, s, kv_head, r, num_rows);
      __atomic_store_n(taken, turn + 1, __ATOMIC_RELEASE);
      r += num_rows;
    }
    for (int64_t i = 0; i < task.num_tiles; ++i) close_keys(p, kv_head, s.tiles[i]);
  }

  static void open_keys(const Attention& p, const lst::KeyTask& task, int64_t first_key,
                        int64_t kv_head, KeyTile& tile) {
    const int64_t width = padded(p);
    tile.first_key = first_key;
    tile.num_keys = smaller(lst::kTileKeys, p.num_keys - first_key);
    for (int64_t i = 0; i < lst::kTileKeys * width; ++i) tile.grad_k[i] = tile.grad_v[i] = 0;
    if (task.first_row >= task.last_row) return;
    const T* const k = static_cast<const T*>(p.k) + first_key * p.k_row + kv_head * p.k_head;
    const T* const v = static_cast<const T*>(p.v) + first_key * p.v_row + kv_head * p.v_head;
    pack(tile.keys, width, v, p.v_row, tile.num_keys, p.head_dim, C(1));
    transpose(tile.value_columns, lst::kTileKeys, tile.keys, width, tile.num_keys, p.head_dim,
              C(1));
    pack(tile.keys, width, k, p.k_row, tile.num_keys, p.head_dim, static_cast<C>(p.scale));
    transpose(tile.key_columns, lst::kTileKeys, tile.keys, width, tile.num_keys, p.head_dim,
              static_cast<C>(kLog2E));
    // Padding is read as a product's operand: it must not be what an earlier tile left.
    for (int64_t i = tile.num_keys * width; i < lst::kTileKeys * width; ++i) tile.keys[i] = 0;
  }

  static void close_keys(const Attention& p, int64_t kv_head, const KeyTile& tile) {
    for (int64_t i = 0; i < tile.num_keys; ++i) {
      const int64_t at = ((tile.first_key + i) * p.num_kv_heads + kv_head) * p.head_dim;
      unpack(static_cast<T*>(p.grad_k) + at, tile.grad_k + i * padded(p), p.head_dim,
             static_cast<C>(p.scale));
      unpack(static_cast<T*>(p.grad_v) + at, tile.grad_v + i * padded(p), p.head_dim, C(1));
    }
  }

  // Rows r … r + num_rows - 1, all of one tile of rows.
  static void read_rows(const Attention& p, const BackwardScratch& s, int64_t kv_head, int64_t r,
                        int64_t num_rows) {
    for (int64_t i = 0; i < num_rows; ++i) {
      const int64_t query = (r + i) / p.group(), at = place(p, kv_head, r + i);
      s.start[i] = p.start[query];
      s.stop[i] = p.stop[query];
      s.lse[i] = static_cast<const C*>(p.lse)[at] * static_cast<C>(kLog2E);
      s.delta[i] = static_cast<const C*>(p.delta)[at];
    }
    pack_rows(s.queries, padded(p), static_cast<const T*>(p.q), p.q_row, p.q_head, p, kv_head, r,
              num_rows, C(1));
    pack_rows(s.grads, padded(p), static_cast<const T*>(p.grad_out), p.grad_out_row,
              p.grad_out_head, p, kv_head, r, num_rows, C(1));
  }

  // The rows against one tile of keys, all at once or strip by strip, as in the forward pass: adds
  // to grad_k, grad_v and grad_q. False where these rows read none of the keys.
  static bool differentiate_pair(const Attention& p, const BackwardScratch& s, const KeyTile& tile,
                                 int64_t num_rows) {
    const int64_t last = num_rows - 1, end = tile.first_key + tile.num_keys;
    if (larger(s.start[0], tile.first_key) >= smaller(s.stop[last], end)) return false;
    const bool full = s.start[last] <= tile.first_key && end <= s.stop[0];
    const int64_t rows = full ? num_rows : lst::kStripRows;
    for (int64_t r = 0; r < num_rows; r += rows) {
      differentiate_rows(p, s, tile, r, smaller(rows, num_rows - r));
    }
    return true;
  }

  static void differentiate_rows(const Attention& p, const BackwardScratch& s, const KeyTile& tile,
                                 int64_t first, int64_t count) {
    const int64_t width = padded(p), last = first + count - 1;
    const int64_t low = larger(s.start[first] - tile.first_key, 0);
    const int64_t high = smaller(s.stop[last] - tile.first_key, tile.num_keys);
    if (low >= high) return;
    const int64_t from = low / kWidth * kWidth, to = round_up(high, kWidth), span = to - from;
    constexpr int64_t kKeys = lst::kTileKeys;
    C* const weights = s.weights + first * kKeys + from;
    C* const grad_scores = s.grad_scores + first * kKeys + from;
    const C *const queries = s.queries + first * width, *const grads = s.grads + first * width;
    product<Onto::kNothing>(weights, kKeys, Spread<C>{queries, width, 1}, tile.key_columns + from,
                            kKeys, count, span, p.head_dim);
    product<Onto::kNothing>(grad_scores, kKeys, Spread<C>{grads, width, 1},
                            tile.value_columns + from, kKeys, count, span, p.head_dim);
    if (s.start[last] <= tile.first_key + from && tile.first_key + to <= s.stop[first]) {
      differentiate<false>(s, first, count, tile.first_key, from, to);
    } else {
      differentiate<true>(s, first, count, tile.first_key, from, to);
    }
    product<Onto::kSum>(tile.grad_v + from * width, width, Spread<C>{weights, 1, kKeys}, grads,
                        width, span, width, count);
    product<Onto::kSum>(tile.grad_k + from * width, width, Spread<C>{grad_scores, 1, kKeys},
                        queries, width, span, width, count);
    product<Onto::kSum>(s.grad_q + first * width, width, Spread<C>{grad_scores, kKeys, 1},
                        tile.keys + from * width, width, count, width, span);
  }

  static void add_grad_q(const Attention& p, const BackwardScratch& s, int64_t kv_head, int64_t r,
                         int64_t num_rows) {
    const int64_t width = padded(p);
    for (int64_t i = 0; i < num_rows; ++i) {
      C* const target = static_cast<C*>(p.grad_q_sum) + place(p, kv_head, r + i) * p.head_dim;
      const C* const part = s.grad_q + i * width;
      int64_t d = 0;
      for (; d + kWidth <= p.head_dim; d += kWidth) {
        store(target + d, load<V>(target + d) + load<V>(part + d));
      }
      for (; d < p.head_dim; ++d) target[d] += part[d];
    }
  }
};

}  // namespace
