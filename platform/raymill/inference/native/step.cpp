// The step: ids of many sequences in, logits out, in one call.
#include "visible.h"

RAYMILL_VISIBLE int raymill_native_version() { return 1; }
