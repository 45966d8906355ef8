// Owns one meeting of a warp's lanes in a collective: who has arrived with what, and what they get.
#pragma once

#include <cstdint>

#include "simt.h"

namespace qk::simt {

constexpr unsigned kWarpLanes = 32;

// Lanes waiting for each other in a warp collective.
struct Meeting {
  unsigned mask;
  unsigned arrived;
  Collective operation;
  unsigned bytes;
  Site site;
  unsigned sync;
  uint64_t value[kWarpLanes];
  unsigned char source[kWarpLanes];
};

bool is_shuffle(Collective operation);
// CUDA's name.
const char* name_of(Collective operation);

// The result of a complete meeting that all lanes share; of no meaning for a shuffle.
uint32_t reduce(const Meeting& meeting);

}  // namespace qk::simt
