// range_attention: query i attends to keys start[i] … stop[i] - 1; its backward. Here are the checks,
// the choice between the two families, and the order of work; the arithmetic is in
// attention_tiled.h and attention_owned.h.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

#include "attention.h"
#include "common.h"

namespace {

using lst::Attention;
using lst::AttentionKernels;
using lst::KeyTask;
using lst::OwnedPart;
using lst::Turns;

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat64 = 2 };
enum Family : int32_t { kChoose = 0, kOwned = 1, kTiled = 2 };

constexpr const char* kOutOfMemory = "out of memory";  // a MemoryError in Python

constexpr int64_t kElementsPerPart = 65536;  // below this, waking a thread costs more than it saves

const AttentionKernels& kernels_for(const Attention& p) {
#if defined(LST_HAS_X86_LEVELS)
  if (lst::level() == lst::kAvx512) return lst::attention_kernels_avx512[p.dtype];
  if (lst::level() == lst::kAvx2) return lst::attention_kernels_avx2[p.dtype];
#endif
  return lst::attention_kernels_portable[p.dtype];
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<void, Free>;

Memory allocate(size_t bytes) {
  Memory memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// A thread's scratch: kept, for a pool's threads meet the same sizes again and again.
void* scratch(size_t bytes) {
  thread_local Memory memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    size = 0;
    memory.reset();
    memory = allocate(bytes);
    size = bytes;
  }
  return memory.get();
}

bool has_scratch(size_t bytes) {
  try {
    scratch(bytes);
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

// Calls visit(task, scratch) for each task, in order as far as threads are free. A thread that gets
// no memory leaves its tasks to the others; the caller's throws, before any task is begun.
template <class Visit>
void for_each_task(const Attention& p, int64_t num_tasks, size_t bytes, const Visit& visit) {
  scratch(bytes);
  const auto visit_all = [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) visit(task, scratch(bytes));
  };
  lst::parallel_for(num_tasks, 1, p.num_threads, visit_all, [&] { return has_scratch(bytes); });
}

// What the ranges are, as far as the choice of a family needs it.
struct Shape {
  bool ordered = true;   // both ends never fall, and stay within the keys
  bool disjoint = true;  // two ranges are equal or share no key
  int64_t max_keys = 0, max_queries_per_range = 0;
  int64_t num_ranges = 0, num_readers = 0;  // distinct ranges with keys, and the queries with keys
};

Shape shape_of(const Attention& p) {
  Shape shape;
  int64_t start = 0, stop = 0, readers = 0;
  for (int64_t i = 0; i < p.num_queries; ++i) {
    const int64_t next_start = p.start[i], next_stop = p.stop[i];
    shape.ordered &= next_start >= start && next_stop >= stop && next_start <= next_stop;
    if (next_start < next_stop) {
      const bool same = next_start == start && next_stop == stop;
      shape.disjoint &= same || next_start >= stop;
      readers = same ? readers + 1 : 1;
      shape.num_ranges += !same;
      shape.num_readers += 1;
      shape.max_keys = std::max(shape.max_keys, next_stop - next_start);
      shape.max_queries_per_range = std::max(shape.max_queries_per_range, readers);
    }
    start = next_start;
    stop = next_stop;
  }
  shape.ordered &= stop <= p.num_keys;
  return shape;
}

bool can_be_owned(const Attention& p, const Shape& shape) {
  const int64_t max_rows = shape.max_queries_per_range * p.group();
  return shape.disjoint && max_rows * shape.max_keys <= lst::kMaxOwnedScores;
}

// Directly where every key meets few rows; through tiles where they meet enough of them that
// products out of cache pay for scores of pairs that do not belong together.
bool takes_owned(const Attention& p, const Shape& shape) {
  if (p.family != kChoose) return p.family == kOwned;
  return can_be_owned(p, shape) && shape.num_readers * p.group() <= 16 * shape.num_ranges;
}

const char* complaint(const Attention& p, const Shape& shape) {
  if (p.dtype < kFloat32 || p.dtype > kFloat64) return "dtype is not one that this library knows";
  if (p.head_dim < 1 || p.head_dim > 256) return "the head size must lie between 1 and 256";
  if (p.num_heads < 1 || p.num_kv_heads < 1 || p.num_heads % p.num_kv_heads != 0) {
    return "the number of query heads must be a multiple of the number of key heads";
  }
  if (!shape.ordered) return "start and stop must never fall and must lie within the keys";
  if (p.family == kOwned && !can_be_owned(p, shape)) {
    return "these ranges are not for the patch-owned family";
  }
  return nullptr;
}

// Cuts the queries, never between two that share keys, into parts of about kElementsPerPart. A part
// owns the keys from its first range to the next part's; the first and last own those at the ends.
std::vector<OwnedPart> owned_parts(const Attention& p) {
  std::vector<OwnedPart> parts;
  const int64_t per_query = p.num_heads * p.head_dim, per_key = 2 * p.num_kv_heads * p.head_dim;
  OwnedPart part{0, 0, 0, 0};
  int64_t elements = 0, read_to = 0;
  for (int64_t i = 0; i < p.num_queries; ++i) {
    const bool opens = p.start[i] < p.stop[i] && p.start[i] >= read_to;
    if (opens && elements >= kElementsPerPart) {
      part.last = i;
      part.last_key = p.start[i];
      parts.push_back(part);
      part.first = i;
      part.first_key = p.start[i];
      elements = 0;
    }
    if (opens) {
      elements += (p.stop[i] - p.start[i]) * per_key;
      read_to = p.stop[i];
    }
    elements += per_query;
  }
  part.last = p.num_queries;
  part.last_key = p.num_keys;
  parts.push_back(part);
  return parts;
}

void run_owned(Attention p, const Shape& shape, bool forward) {
  const AttentionKernels& kernels = kernels_for(p);
  p.max_owned_rows = shape.max_queries_per_range * p.group();
  p.max_owned_keys = shape.max_keys;
  const size_t bytes = kernels.owned_scratch(p);
  const std::vector<OwnedPart> parts = owned_parts(p);
  const auto pass = forward ? kernels.owned_forward : kernels.owned_backward;
  for_each_task(p, static_cast<int64_t>(parts.size()), bytes, [&](int64_t i, void* memory) {
    pass(p, parts[static_cast<size_t>(i)], memory);
  });
}

// How many tiles a task takes: several save packing, but not where there are few to go round. It
// must not depend on the number of threads, for the bits depend on it.
int64_t tiles_per_task(int64_t num_tiles) { return num_tiles < 256 ? 1 : lst::kTilesPerTask; }

// Tasks with the most keys first: what is left for the end is light, so no thread waits long for
// another.
std::vector<int64_t> heavy_first(const Attention& p, int64_t rows_per_task) {
  std::vector<int64_t> order(static_cast<size_t>((p.num_rows() - 1) / rows_per_task + 1));
  std::iota(order.begin(), order.end(), 0);
  const auto num_keys = [&](int64_t task) {
    const int64_t last_row = std::min((task + 1) * rows_per_task, p.num_rows()) - 1;
    return p.stop[last_row / p.group()] - p.start[task * rows_per_task / p.group()];
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return num_keys(a) > num_keys(b); });
  return order;
}

void run_tiled_forward(const Attention& p) {
  if (p.num_rows() == 0) return;
  const AttentionKernels& kernels = kernels_for(p);
  const size_t bytes = kernels.forward_scratch(p);
  const int64_t num_tiles = p.num_row_tiles(), per_task = tiles_per_task(num_tiles * p.num_kv_heads);
  const std::vector<int64_t> order = heavy_first(p, per_task * lst::kTileQueries);
  const int64_t num_tasks = static_cast<int64_t>(order.size());
  for_each_task(p, num_tasks * p.num_kv_heads, bytes, [&](int64_t i, void* memory) {
    const int64_t tile = order[static_cast<size_t>(i % num_tasks)] * per_task;
    kernels.tiled_forward(p, tile, std::min(per_task, num_tiles - tile), i / num_tasks, memory);
  });
}

// For all keys, in order, the rows that read them. Neither end of a task's rows ever falls.
std::vector<KeyTask> key_tasks(const Attention& p) {
  const int64_t num_tiles = (p.num_keys + lst::kTileKeys - 1) / lst::kTileKeys;
  const int64_t per_task = tiles_per_task(num_tiles * p.num_kv_heads);
  std::vector<KeyTask> tasks;
  int64_t first = 0, last = 0;
  int32_t number = 0;
  for (int64_t tile = 0; tile < num_tiles; tile += per_task) {
    const int64_t key = tile * lst::kTileKeys, end = key + per_task * lst::kTileKeys;
    while (first < p.num_queries && p.stop[first] <= key) ++first;
    while (last < p.num_queries && p.start[last] < end) ++last;
    tasks.push_back({tile, std::min(per_task, num_tiles - tile), first * p.group(),
                     last * p.group(), number});
    if (first < last) ++number;
  }
  return tasks;
}

// The number of the first task that adds to each tile of rows.
std::vector<int32_t> first_numbers(const Attention& p, const std::vector<KeyTask>& tasks) {
  std::vector<int32_t> first(static_cast<size_t>(p.num_row_tiles()), 0);
  int64_t seen = 0;
  for (const KeyTask& task : tasks) {
    if (task.first_row >= task.last_row) continue;
    const int64_t end = (task.last_row - 1) / lst::kTileQueries + 1;
    for (int64_t i = std::max(seen, task.first_row / lst::kTileQueries); i < end; ++i) {
      first[static_cast<size_t>(i)] = task.number;
    }
    seen = std::max(seen, end);
  }
  return first;
}

void run_tiled_backward(Attention p) {
  const AttentionKernels& kernels = kernels_for(p);
  const size_t bytes = kernels.backward_scratch(p);
  const size_t element = p.dtype == kFloat64 ? sizeof(double) : sizeof(float);
  const int64_t num_rows = p.num_queries * p.num_heads;
  const Memory delta = allocate(static_cast<size_t>(num_rows) * element);
  Memory sums;
  if (p.dtype == kBfloat16) sums = allocate(static_cast<size_t>(num_rows * p.head_dim) * element);
  p.delta = delta.get();
  p.grad_q_sum = p.dtype == kBfloat16 ? sums.get() : p.grad_q;

  const int64_t queries_per_chunk = kElementsPerPart / (p.num_heads * p.head_dim) + 1;
  const auto each_query = [&](void (*visit)(const Attention&, int64_t)) {
    lst::parallel_for(p.num_queries, queries_per_chunk, p.num_threads,
                      [&](int64_t first, int64_t last) {
                        for (int64_t i = first; i < last; ++i) visit(p, i);
                      });
  };
  each_query(kernels.backward_prepare);
  const std::vector<KeyTask> tasks = key_tasks(p);
  const std::vector<int32_t> first_number = first_numbers(p, tasks);
  std::vector<int32_t> taken(static_cast<size_t>(p.num_kv_heads * p.num_row_tiles()), 0);
  const Turns turns{first_number.data(), taken.data(), [] { std::this_thread::yield(); }};
  // Tasks in order, each for every head before the next: threads take them in this order, so a task
  // only ever waits for one that has been taken, and mostly for none.
  const int64_t num_tasks = static_cast<int64_t>(tasks.size()) * p.num_kv_heads;
  for_each_task(p, num_tasks, bytes, [&](int64_t i, void* memory) {
    const lst::KeyTask& task = tasks[static_cast<size_t>(i / p.num_kv_heads)];
    kernels.tiled_backward(p, task, i % p.num_kv_heads, turns, memory);
  });
  if (p.dtype == kBfloat16) each_query(kernels.backward_finish);
}

template <class Run>
const char* run_checked(const LstRangeAttention* arguments, Run run) {
  Attention p;
  static_cast<LstRangeAttention&>(p) = *arguments;
  const Shape shape = shape_of(p);
  if (const char* const message = complaint(p, shape)) return message;
  try {
    run(p, shape);
  } catch (const std::bad_alloc&) {
    return kOutOfMemory;
  }
  return nullptr;
}

}  // namespace

// Writes out and lse; an empty range gives 0 and -infinity.
LST_EXPORT const char* lst_range_attention_forward(const LstRangeAttention* arguments) {
  return run_checked(arguments, [](const Attention& p, const Shape& shape) {
    if (takes_owned(p, shape)) {
      run_owned(p, shape, true);
    } else {
      run_tiled_forward(p);
    }
  });
}

// Writes grad_q, grad_k and grad_v from the forward pass's arguments, out, lse, and grad_out.
LST_EXPORT const char* lst_range_attention_backward(const LstRangeAttention* arguments) {
  return run_checked(arguments, [](const Attention& p, const Shape& shape) {
    if (takes_owned(p, shape)) {
      run_owned(p, shape, false);
    } else {
      run_tiled_backward(p);
    }
  });
}
