#include "meeting.h"

#include <algorithm>

namespace qk::simt {
namespace {

uint32_t combine(Collective operation, uint32_t a, uint32_t b) {
  const auto signed_a = static_cast<int32_t>(a), signed_b = static_cast<int32_t>(b);
  switch (operation) {
    case Collective::kAny:
    case Collective::kReduceOr:
      return a | b;
    case Collective::kAll:
    case Collective::kReduceAnd:
      return a & b;
    case Collective::kReduceXor:
      return a ^ b;
    case Collective::kReduceAdd:
      return a + b;
    case Collective::kReduceMin:
      return std::min(a, b);
    case Collective::kReduceMax:
      return std::max(a, b);
    case Collective::kReduceMinSigned:
      return static_cast<uint32_t>(std::min(signed_a, signed_b));
    case Collective::kReduceMaxSigned:
      return static_cast<uint32_t>(std::max(signed_a, signed_b));
    default:
      return 0;
  }
}

}  // namespace

bool is_shuffle(Collective operation) {
  return operation >= Collective::kShuffleIndex && operation <= Collective::kShuffleXor;
}

const char* name_of(Collective operation) {
  switch (operation) {
    case Collective::kBallot:
      return "__ballot_sync";
    case Collective::kAny:
      return "__any_sync";
    case Collective::kAll:
      return "__all_sync";
    case Collective::kShuffleIndex:
      return "__shfl_sync";
    case Collective::kShuffleUp:
      return "__shfl_up_sync";
    case Collective::kShuffleDown:
      return "__shfl_down_sync";
    case Collective::kShuffleXor:
      return "__shfl_xor_sync";
    case Collective::kReduceAdd:
      return "__reduce_add_sync";
    case Collective::kReduceMin:
    case Collective::kReduceMinSigned:
      return "__reduce_min_sync";
    case Collective::kReduceMax:
    case Collective::kReduceMaxSigned:
      return "__reduce_max_sync";
    case Collective::kReduceAnd:
      return "__reduce_and_sync";
    case Collective::kReduceOr:
      return "__reduce_or_sync";
    case Collective::kReduceXor:
      return "__reduce_xor_sync";
    case Collective::kSyncWarp:
      return "__syncwarp";
  }
  return "an unknown collective";
}

uint32_t reduce(const Meeting& meeting) {
  const int first = __builtin_ctz(meeting.arrived);
  auto result = static_cast<uint32_t>(meeting.value[first]);
  if (meeting.operation == Collective::kBallot) result <<= first;
  for (unsigned lanes = meeting.arrived & (meeting.arrived - 1); lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    const auto value = static_cast<uint32_t>(meeting.value[lane]);
    result =
        meeting.operation == Collective::kBallot ? result | value << lane : combine(meeting.operation, result, value);
  }
  return result;
}

}  // namespace qk::simt
