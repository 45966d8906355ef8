// Owns the counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
// 3").
#pragma once

#include "scalar.h"

QK_NAMESPACE_BEGIN

struct PhiloxKey {
  uint32_t word[2];
};

// U is a 32-bit word, or a vector of the words of many blocks.
template <class U>
struct PhiloxWords {
  U word[4];
};
using PhiloxBlock = PhiloxWords<uint32_t>;

template <class U>
struct WideProduct {
  U high, low;
};

QK_INLINE WideProduct<uint32_t> multiply_wide(uint32_t constant, uint32_t word) {
  const uint64_t product = uint64_t{constant} * word;
  return {static_cast<uint32_t>(product >> 32), static_cast<uint32_t>(product)};
}
QK_INLINE uint32_t exclusive_or(uint32_t a, uint32_t b, uint32_t key) { return a ^ b ^ key; }

template <class U>
QK_INLINE PhiloxWords<U> philox4x32(PhiloxWords<U> c, PhiloxKey key) {
  for (int round = 0; round < 10; ++round) {
    const WideProduct<U> first = multiply_wide(0xD2511F53u, c.word[0]);
    const WideProduct<U> second = multiply_wide(0xCD9E8D57u, c.word[2]);
    c = {{exclusive_or(second.high, c.word[1], key.word[0]), second.low,
          exclusive_or(first.high, c.word[3], key.word[1]), first.low}};
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
