// The plan of a batch, in one pass over its tokens and patches: what vectorised code on a device
// takes many passes for (lst_kernels/ranges.py), and has to give the same.
#include <algorithm>
#include <numeric>

#include "common.h"

namespace {

constexpr const char* kBadRanges = "start and stop must never fall, and lie within the keys";
constexpr const char* kBadOffsets =
    "cu_patches and cu_documents must rise from 0, to the tokens and to the patches";

bool rises(const int32_t* offsets, int64_t num_parts, int64_t total) {
  for (int64_t i = 0; i < num_parts; ++i) {
    if (offsets[i] > offsets[i + 1]) return false;
  }
  return offsets[0] == 0 && offsets[num_parts] == total;
}

// Ranges whose ends never fall, of rows over columns: rows are queries or, transposed, keys.
struct Ranges {
  const int32_t* start;
  const int32_t* stop;
  int64_t num_rows;
};

bool well_formed(const Ranges& ranges, int64_t num_columns) {
  if (ranges.num_rows == 0) return true;
  bool falls = false;
  for (int64_t i = 0; i < ranges.num_rows; ++i) falls |= ranges.stop[i] < ranges.start[i];
  for (int64_t i = 1; i < ranges.num_rows; ++i) {
    falls |= ranges.start[i] < ranges.start[i - 1] || ranges.stop[i] < ranges.stop[i - 1];
  }
  return !falls && ranges.start[0] >= 0 && ranges.stop[ranges.num_rows - 1] <= num_columns;
}

// counts[j]: how many of the ends are at most j.
void at_or_below(const int32_t* ends, int64_t num_ends, int64_t num_counts, int32_t* counts) {
  int64_t j = 0;
  for (int64_t i = 0; i < num_ends; ++i) {
    const int64_t end = std::min<int64_t>(ends[i], num_counts);
    for (; j < end; ++j) counts[j] = static_cast<int32_t>(i);
  }
  std::fill(counts + j, counts + num_counts, static_cast<int32_t>(num_ends));
}

// Blocks of rows in decreasing order of the columns they span; equal ones keep their order.
void heavy_first(const Ranges& ranges, int64_t block_rows, int32_t* order) {
  const int64_t num_blocks = (ranges.num_rows + block_rows - 1) / block_rows;
  const auto columns = [&](int32_t block) {
    const int64_t first = block * block_rows;
    const int64_t last = std::min(first + block_rows, ranges.num_rows) - 1;
    return ranges.stop[last] - ranges.start[first];
  };
  std::iota(order, order + num_blocks, 0);
  std::stable_sort(order, order + num_blocks,
                   [&](int32_t a, int32_t b) { return columns(a) > columns(b); });
}

struct Facts {
  int64_t num_pairs = 0;
  int64_t longest = 0;   // the most columns that one row reads
  bool disjoint = true;  // any two ranges are equal or share no column
  int64_t group = 1;     // rows that share each range; 0 where there is no such number
};

// Of ranges that are disjoint.
int64_t group_of(const Ranges& ranges) {
  int64_t group = 0;       // rows of the first run that reads anything; 0 before there is one
  int64_t empty_rows = 0;  // greatest common divisor of the runs that read nothing
  for (int64_t first = 0, last = 0; first < ranges.num_rows; first = last) {
    const int32_t start = ranges.start[first], stop = ranges.stop[first];
    for (last = first + 1; last < ranges.num_rows; ++last) {
      if (ranges.start[last] != start || ranges.stop[last] != stop) break;
    }
    if (start == stop) {
      empty_rows = std::gcd(empty_rows, last - first);
    } else if (group == 0) {
      group = last - first;
    } else if (last - first != group) {
      return 0;
    }
  }
  if (group == 0) return 1;
  return empty_rows % group == 0 ? group : 0;
}

Facts facts_of(const Ranges& ranges) {
  Facts facts;
  int32_t longest = 0;
  bool overlap = false;
  for (int64_t i = 0; i < ranges.num_rows; ++i) {
    const int32_t length = ranges.stop[i] - ranges.start[i];
    facts.num_pairs += length;
    longest = std::max(longest, length);
  }
  for (int64_t i = 1; i < ranges.num_rows; ++i) {
    const bool differs =
        ranges.start[i] != ranges.start[i - 1] || ranges.stop[i] != ranges.stop[i - 1];
    overlap |= differs && ranges.start[i] < ranges.stop[i - 1];
  }
  facts.longest = longest;
  facts.disjoint = !overlap;
  facts.group = overlap ? 0 : group_of(ranges);
  return facts;
}

}  // namespace

// Everything that lst_kernels.KeyRanges keeps beside its ranges.
//
// start, stop: (num_queries) the range of each query.
// query_start, query_stop: (num_keys) written, the queries that read each key.
// query_order, key_order: written, one number for each block of block_rows queries or keys.
// facts: (6) written: num_pairs, max_keys, max_queries, disjoint, slots, key_slots.
LST_EXPORT const char* lst_plan_ranges(const int32_t* start, const int32_t* stop,
                                       int32_t* query_start, int32_t* query_stop,
                                       int32_t* query_order, int32_t* key_order, int64_t* facts,
                                       int64_t num_queries, int64_t num_keys, int64_t block_rows) {
  const Ranges queries{start, stop, num_queries};
  if (!well_formed(queries, num_keys)) return kBadRanges;
  at_or_below(stop, num_queries, num_keys, query_start);
  at_or_below(start, num_queries, num_keys, query_stop);
  const Ranges keys{query_start, query_stop, num_keys};
  heavy_first(queries, block_rows, query_order);
  heavy_first(keys, block_rows, key_order);
  const Facts of_queries = facts_of(queries), of_keys = facts_of(keys);
  facts[0] = of_queries.num_pairs;
  facts[1] = of_queries.longest;
  facts[2] = of_keys.longest;
  facts[3] = of_queries.disjoint;
  facts[4] = of_queries.group;
  facts[5] = of_keys.group;
  return nullptr;
}

// Everything that lst_kernels.PatchLayout keeps beside its offsets.
//
// cu_patches: (num_patches + 1) token offset of each patch, from 0 to num_tokens.
// cu_documents: (num_documents + 1) patch offset of each document, from 0 to num_patches.
// closed_late: (num_patches) not zero where a patch's end shows only in the token after it.
// cu_tokens: (num_documents + 1) written.
// patch_ids, token_positions, readable_ids: (num_tokens) written.
// patch_positions, replaced_at: (num_patches) written.
// readable_from: (num_patches) written; read instead where has_readable_from.
// longest: (3) written: tokens of a patch that is not dead; tokens, and patches, of a document.
LST_EXPORT const char* lst_plan_layout(const int32_t* cu_patches, const int32_t* cu_documents,
                                       const uint8_t* closed_late, int32_t* cu_tokens,
                                       int32_t* patch_ids, int32_t* token_positions,
                                       int32_t* readable_ids, int32_t* patch_positions,
                                       int32_t* readable_from, int32_t* replaced_at,
                                       int64_t* longest, int64_t num_tokens, int64_t num_patches,
                                       int64_t num_documents, int64_t num_dead_patches,
                                       int32_t has_readable_from) {
  if (!rises(cu_patches, num_patches, num_tokens)) return kBadOffsets;
  if (!rises(cu_documents, num_documents, num_patches)) return kBadOffsets;
  const int64_t num_live = num_patches - num_dead_patches;
  const int32_t end = static_cast<int32_t>(num_tokens);
  int32_t longest_patch = 0, most_tokens = 0, most_patches = 0;
  for (int64_t n = 0; n <= num_documents; ++n) cu_tokens[n] = cu_patches[cu_documents[n]];

  int32_t readable = 0;  // a running maximum: an empty patch takes the value of the one before it
  for (int64_t n = 0; n < num_documents; ++n) {
    const int32_t first_patch = cu_documents[n], first_token = cu_tokens[n];
    most_patches = std::max(most_patches, cu_documents[n + 1] - first_patch);
    most_tokens = std::max(most_tokens, cu_tokens[n + 1] - first_token);
    for (int32_t p = first_patch; p < cu_documents[n + 1]; ++p) {
      const int32_t start = cu_patches[p], stop = cu_patches[p + 1];
      patch_positions[p] = p - first_patch;
      for (int32_t t = start; t < stop; ++t) {
        patch_ids[t] = p;
        token_positions[t] = t - first_token;
      }
      if (p < num_live) longest_patch = std::max(longest_patch, stop - start);
      if (has_readable_from) continue;
      readable = std::max(readable, stop > start ? stop - 1 + (closed_late[p] != 0) : first_token);
      readable_from[p] = p < num_live ? readable : end;
    }
  }

  for (int64_t n = 0; n < num_documents; ++n) {
    for (int32_t p = cu_documents[n]; p < cu_documents[n + 1]; ++p) {
      const int32_t next = p + 1 < num_patches ? readable_from[p + 1] : end;
      replaced_at[p] = p < num_live ? std::min(next, cu_tokens[n + 1]) : end;
    }
  }

  int32_t last = -1;  // the last patch that is readable, of whatever document
  for (int64_t n = 0; n < num_documents; ++n) {
    for (int32_t t = cu_tokens[n]; t < cu_tokens[n + 1]; ++t) {
      while (last + 1 < num_patches && readable_from[last + 1] <= t) ++last;
      readable_ids[t] = last >= cu_documents[n] ? last : -1;
    }
  }
  longest[0] = longest_patch;
  longest[1] = most_tokens;
  longest[2] = most_patches;
  return nullptr;
}
