// Owns the counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2,
// 3").
#pragma once

#include "scalar.h"

QK_NAMESPACE_BEGIN

constexpr int kPhiloxRounds = 10;

struct PhiloxKey {
  uint32_t word[2];

  QK_INLINE uint32_t of_round(int round, int index) const {
    return word[index] + static_cast<uint32_t>(round) * (index == 0 ? 0x9E3779B9u : 0xBB67AE85u);
  }
};

// The keys of all rounds in memory, where a vector operation takes them from without an instruction of their own.
struct PhiloxKeys {
  uint32_t word[kPhiloxRounds][2];

  explicit PhiloxKeys(PhiloxKey key) {
    for (int round = 0; round < kPhiloxRounds; ++round)
      for (int index = 0; index < 2; ++index) word[round][index] = key.of_round(round, index);
  }
  QK_INLINE uint32_t of_round(int round, int index) const { return word[round][index]; }
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

// Recursive, so that every compiler unrolls the rounds: in a loop the words of many blocks would go through memory.
template <int kRound, class U, class Key>
QK_INLINE PhiloxWords<U> philox_rounds(const PhiloxWords<U>& c, const Key& key) {
  if constexpr (kRound == kPhiloxRounds) {
    return c;
  } else {
    const WideProduct<U> first = multiply_wide(0xD2511F53u, c.word[0]);
    const WideProduct<U> second = multiply_wide(0xCD9E8D57u, c.word[2]);
    return philox_rounds<kRound + 1, U>({{exclusive_or(second.high, c.word[1], key.of_round(kRound, 0)), second.low,
                                          exclusive_or(first.high, c.word[3], key.of_round(kRound, 1)), first.low}},
                                        key);
  }
}

// Key is PhiloxKey or PhiloxKeys.
template <class U, class Key>
QK_INLINE PhiloxWords<U> philox4x32(const PhiloxWords<U>& counter, const Key& key) {
  return philox_rounds<0, U>(counter, key);
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
