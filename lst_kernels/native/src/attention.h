// What the interface of range_attention and its kernels, compiled once per level, share.
//
// Shapes: Q queries, K keys, Hq/Hkv heads, D head size, G = Hq / Hkv query heads that share a key
// head. A *row* is one query and one of the G heads: row r of a key head is query r / G, query head
// kv_head * G + r % G. So grouped heads are more rows over the same keys, and dk, dv sum over them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "levels.h"

#define LST_INLINE inline __attribute__((always_inline))

// The arguments of lst_range_attention_forward and _backward, mirrored in
// lst_kernels/native/attention.py. Strides count elements; the head dimension is contiguous.
struct LstRangeAttention {
  const void* q;         // (Q, Hq, D)
  const void* k;         // (K, Hkv, D)
  const void* v;         // (K, Hkv, D)
  const int32_t* start;  // (Q,)
  const int32_t* stop;   // (Q,)
  void* out;             // (Q, Hq, D), contiguous
  void* lse;             // (Q, Hq), contiguous, float64 for float64 and else float32
  const void* grad_out;  // (Q, Hq, D)
  void* grad_q;          // (Q, Hq, D), contiguous
  void* grad_k;          // (K, Hkv, D), contiguous
  void* grad_v;          // (K, Hkv, D), contiguous
  int64_t q_row, q_head, k_row, k_head, v_row, v_head, grad_out_row, grad_out_head;
  int64_t num_queries, num_keys, num_heads, num_kv_heads, head_dim;
  double scale;
  int32_t dtype;   // 0 float32, 1 bfloat16, 2 float64
  int32_t family;  // 0 the library chooses, 1 patch-owned, 2 tiled
  int32_t num_threads;
};

namespace lst {

constexpr int kNumDtypes = 3;

// Rows and keys of a tile, multiples of every vector's lanes; and how many tiles of rows (forward)
// or keys (backward) a task takes through the others together, at most.
constexpr int64_t kTileQueries = 64;
constexpr int64_t kTileKeys = 128;
// Rows of a tile that go through its keys by themselves, where its rows read different keys: few, so
// that their interval is little longer than a row's; a multiple of every vector's lanes.
constexpr int64_t kStripRows = 16;
constexpr int64_t kTilesPerTask = 4;

// The patch-owned family: scores of one range, its rows times its keys, at most.
constexpr int64_t kMaxOwnedScores = 65536;

struct Attention : LstRangeAttention {
  // Always inlined: a copy compiled for one level must not serve another.
  LST_INLINE int64_t group() const { return num_heads / num_kv_heads; }
  LST_INLINE int64_t num_rows() const { return num_queries * group(); }
  LST_INLINE int64_t num_row_tiles() const { return (num_rows() + kTileQueries - 1) / kTileQueries; }

  // Of the backward pass, allocated by the interface and of the dtype that is computed in.
  void* delta = nullptr;       // (Q, Hq), sum of grad_out * out over D
  void* grad_q_sum = nullptr;  // (Q, Hq, D), where grad_q is summed up; grad_q itself if it can be

  // Of the patch-owned family: the most rows that read one range, and the most keys in one.
  int64_t max_owned_rows = 0, max_owned_keys = 0;
};

// Neighbouring tiles of keys in the backward pass, and the rows that read any of their keys.
struct KeyTask {
  int64_t first_tile, num_tiles;
  int64_t first_row, last_row;  // half-open
  int32_t number;               // among the tasks with rows, counted from 0
};

// Keeps the order in which tasks add to a tile of grad_q, so that its bits depend neither on the
// number of threads nor on who came first: task number n waits until all those before it that touch
// the same rows have added theirs.
struct Turns {
  const int32_t* first;  // (row tiles,) number of the first task that adds to these rows
  int32_t* taken;        // (Hkv, row tiles), how many have added theirs
  void (*pause)();       // lets another thread run
};

// Queries [first, last) of the patch-owned family and the keys that they own: those they read, and
// those beside them that nobody reads.
struct OwnedPart {
  int64_t first, last, first_key, last_key;
};

// The hot loops of one level for one dtype. Scratch is 64-byte aligned and private to a call.
struct AttentionKernels {
  size_t (*forward_scratch)(const Attention&);
  size_t (*backward_scratch)(const Attention&);
  size_t (*owned_scratch)(const Attention&);
  void (*tiled_forward)(const Attention&, int64_t first_tile, int64_t num_tiles, int64_t kv_head,
                        void* scratch);
  void (*backward_prepare)(const Attention&, int64_t query);
  void (*tiled_backward)(const Attention&, const KeyTask&, int64_t kv_head, const Turns&,
                         void* scratch);
  void (*backward_finish)(const Attention&, int64_t query);
  void (*owned_forward)(const Attention&, const OwnedPart&, void* scratch);
  void (*owned_backward)(const Attention&, const OwnedPart&, void* scratch);
};

// Three tables, in the order of LstRangeAttention::dtype.
extern const AttentionKernels attention_kernels_portable[kNumDtypes];
extern const AttentionKernels attention_kernels_avx2[kNumDtypes];
extern const AttentionKernels attention_kernels_avx512[kNumDtypes];

}  // namespace lst
