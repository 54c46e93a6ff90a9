// What every op family shares: how a function leaves the library, and how its work is split among
// threads.
#pragma once

#include <cstdint>
#include <functional>

// An exported op checks its arguments, does its work, and returns nullptr, or a message of static
// lifetime saying what the caller must mend. It throws nothing.
#if defined(_WIN32)
#define LST_EXPORT extern "C" __declspec(dllexport)
#else
#define LST_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace lst {

// Calls body(first, last) on ranges that together cover [0, num_items) once, on up to num_threads
// threads, the caller's among them. Ranges hold items_per_chunk items, except the last, and are
// handed out in order to whichever thread is free. A body that writes only rows of its own range
// gives the same bits for every number of threads. It must not throw. A thread on which `prepare` is
// false takes no range; on the caller's it must be true.
void parallel_for(int64_t num_items, int64_t items_per_chunk, int num_threads,
                  const std::function<void(int64_t first, int64_t last)>& body,
                  const std::function<bool()>& prepare = [] { return true; });

}  // namespace lst
