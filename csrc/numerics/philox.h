// Owns the counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
// 3").
#pragma once

#include "scalar.h"

QK_NAMESPACE_BEGIN

struct PhiloxKey {
  uint32_t word[2];
};

struct PhiloxBlock {
  uint32_t word[4];
};

QK_INLINE PhiloxBlock philox4x32(PhiloxBlock c, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * c.word[0];
    const uint64_t second = uint64_t{0xCD9E8D57u} * c.word[2];
    c = {{static_cast<uint32_t>(second >> 32) ^ c.word[1] ^ key.word[0], static_cast<uint32_t>(second),
          static_cast<uint32_t>(first >> 32) ^ c.word[3] ^ key.word[1], static_cast<uint32_t>(first)}};
    key = {{key.word[0] + 0x9E3779B9u, key.word[1] + 0xBB67AE85u}};
  }
  return c;
}

QK_INLINE PhiloxKey philox_key(int64_t seed) {
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)}};
}

// Four elements share a block; both counters are 64 bits, low word first.
QK_INLINE PhiloxBlock philox_counter(int64_t block, int64_t step) {
  return {{static_cast<uint32_t>(block), static_cast<uint32_t>(static_cast<uint64_t>(block) >> 32),
           static_cast<uint32_t>(step), static_cast<uint32_t>(static_cast<uint64_t>(step) >> 32)}};
}

// Uniform in [-1/2, 1/2), a multiple of 2^-24, exact. The conversion is of a signed number: that is one instruction.
QK_INLINE float centred_uniform(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>(word >> 8)) * 0x1p-24f - 0.5f;
}

QK_NAMESPACE_END
