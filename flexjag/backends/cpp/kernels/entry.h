// The functions that Python calls.
#pragma once
#include "backward.h"
#include "narrow.h"
#include "stick_breaking.h"

namespace flexjag {

constexpr bool STICK_BREAKING = NORMALIZER == Normalizer::stick_breaking;

extern "C" int64_t attend(const Call* c) {
  if constexpr (STICK_BREAKING) return forward<SticksForward, break_block>(*c);
  else return forward<Forward, attend_block>(*c);
}

extern "C" int64_t differentiate(const Call* c) {
  if constexpr (STICK_BREAKING) return backward<SticksBackward, mend_block>(*c);
  else return backward<Backward, differentiate_block>(*c);
}

extern "C" int64_t narrow(Narrowing* c) {
  narrow_spans(*c);
  return DONE;
}

}  // namespace flexjag
