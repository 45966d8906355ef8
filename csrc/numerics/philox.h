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

// U is a 32-bit word, or a vector of the words of many blocks.
template <class U>
struct PhiloxWords {
  U word[4];
};
using PhiloxBlock = PhiloxWords<uint32_t>;

QK_INLINE void multiply_wide(uint32_t constant, uint32_t word, uint32_t& high, uint32_t& low) {
  const uint64_t product = uint64_t{constant} * word;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}
QK_INLINE uint32_t exclusive_or(uint32_t a, uint32_t b, uint32_t key) { return a ^ b ^ key; }
QK_INLINE uint32_t exclusive_or(uint32_t a, uint32_t key) { return a ^ key; }

constexpr uint32_t kPhiloxFirst = 0xD2511F53u;
constexpr uint32_t kPhiloxSecond = 0xCD9E8D57u;

// Recursive, so that every compiler unrolls the rounds, and on single words: in a loop, or as one object, the words of
// many blocks would go through memory.
// Rounds [kBegin, kEnd); before each, between(round) does something else.
template <int kBegin, int kEnd, class U, class Key, class F>
QK_INLINE void philox_rounds(U& c0, U& c1, U& c2, U& c3, const Key& key, const F& between) {
  if constexpr (kBegin < kEnd) {
    between(kBegin);
    U high_0, low_0, high_1, low_1;
    multiply_wide(kPhiloxFirst, c0, high_0, low_0);
    multiply_wide(kPhiloxSecond, c2, high_1, low_1);
    c0 = exclusive_or(high_1, c1, key.of_round(kBegin, 0));
    c1 = low_1;
    c2 = exclusive_or(high_0, c3, key.of_round(kBegin, 1));
    c3 = low_0;
    philox_rounds<kBegin + 1, kEnd>(c0, c1, c2, c3, key, between);
  }
}

template <class U>
QK_INLINE PhiloxWords<U> philox4x32(const PhiloxWords<U>& counter, const PhiloxKey& key) {
  PhiloxWords<U> w = counter;
  philox_rounds<0, kPhiloxRounds>(w.word[0], w.word[1], w.word[2], w.word[3], key, [](int) QK_INLINE_LAMBDA {});
  return w;
}

// Blocks whose counters differ in their lowest word alone. What the first rounds make of the other words is the same
// for all of them and is computed once, as are the keys: from memory a vector operation takes them without an
// instruction of their own.
class PhiloxStream {
 public:
  // Of all blocks that share the upper words of `counter`.
  PhiloxStream(const PhiloxBlock& counter, PhiloxKey key) : counter_high_(counter.word[1]) {
    for (int round = 0; round < kPhiloxRounds; ++round)
      for (int index = 0; index < 2; ++index) keys_[round][index] = key.of_round(round, index);
    uint32_t high, low;
    multiply_wide(kPhiloxSecond, counter.word[2], high, low);
    round_0_ = counter.word[3] ^ keys_[0][1];
    round_1_[0] = low ^ keys_[1][0];
    multiply_wide(kPhiloxFirst, high ^ counter.word[1] ^ keys_[0][0], high, low);
    round_1_[1] = high ^ keys_[1][1];
    round_2_ = low ^ keys_[2][1];
  }

  QK_INLINE bool holds(const PhiloxBlock& counter) const { return counter.word[1] == counter_high_; }
  QK_INLINE uint32_t of_round(int round, int index) const { return keys_[round][index]; }

  // The words before the last round of the blocks whose lowest counter words, times kPhiloxFirst, are `high` and `low`.
  template <class U, class F>
  QK_INLINE PhiloxWords<U> before_last_round(const U& high, const U& low, const F& between) const {
    U upper, lower, c0, c1, c2, c3;
    multiply_wide(kPhiloxSecond, exclusive_or(high, round_0_), upper, c1);
    c0 = exclusive_or(upper, round_1_[0]);
    c2 = exclusive_or(low, round_1_[1]);
    between(2);
    multiply_wide(kPhiloxFirst, c0, upper, c3);
    multiply_wide(kPhiloxSecond, c2, c0, lower);
    c0 = exclusive_or(c0, c1, keys_[2][0]);
    c1 = lower;
    c2 = exclusive_or(upper, round_2_);
    philox_rounds<3, kPhiloxRounds - 1>(c0, c1, c2, c3, *this, between);
    return {{c0, c1, c2, c3}};
  }

 private:
  uint32_t keys_[kPhiloxRounds][2];
  uint32_t counter_high_;
  uint32_t round_0_, round_1_[2], round_2_;
};

QK_INLINE PhiloxKey philox_key(int64_t seed) {
  return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)}};
}

// Of one of many independent streams: each adds an odd constant to the key, 2^64 over the golden ratio, so that streams of
// neighbouring seeds do not meet.
QK_INLINE PhiloxKey philox_key(int64_t seed, int64_t stream) {
  return philox_key(static_cast<int64_t>(static_cast<uint64_t>(seed) + static_cast<uint64_t>(stream) * 0x9e3779b97f4a7c15u));
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
