// The instruction sets that one build carries. Files with hot loops are compiled once per level
// (CMakeLists.txt) and hand out a table of functions; the level is chosen when an op is called.
#pragma once

namespace lst {

enum Level : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// The best level that this build carries and this machine runs, or the lower one asked for through
// lst_set_level.
Level level();

}  // namespace lst
