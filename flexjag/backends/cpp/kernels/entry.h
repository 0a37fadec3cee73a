// The functions that Python calls.
#pragma once
#include "backward.h"

namespace flexjag {

extern "C" int64_t attend(const Call* c) { return forward(*c); }
extern "C" int64_t differentiate(const Call* c) { return backward(*c); }

}  // namespace flexjag
