#include "common.h"

// Raised with every change to an exported signature or to the meaning of an argument, here and in
// lst_kernels/native/__init__.py, so that a library left from an older build is refused by name.
LST_EXPORT int32_t lst_abi_version() { return 7; }
