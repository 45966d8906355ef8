// Owns the CPU side of every job: which SIMD tier runs it and how it is split among threads.
#pragma once

#include <string>
#include <vector>

#include "../jobs.h"

namespace qk::cpu {

// Calls body(begin, end, context) on parts of [begin, end), each of at least `grain` indices, possibly on several
// threads.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

// Tiers this processor can run, slowest first.
std::vector<std::string> available_tiers();
// The tier in use: the fastest, or the one named by QUANTKERNELS_CPU_CAPABILITY. Throws std::runtime_error if that
// names none of the available ones.
const char* active_tier();

void run(const AffineJob& job, ParallelFor parallel_for);
void run(const RangeJob& job, ParallelFor parallel_for);
void run(const CurrentJobs& jobs, ParallelFor parallel_for);
void run(const StraightThroughJobs& jobs, ParallelFor parallel_for);
void run(const BeginStepJob& job, ParallelFor parallel_for);
void run(const EndStepJob& job, ParallelFor parallel_for);
void run(const LearnedGradientJob& job, ParallelFor parallel_for);
void run(const StraightThroughJob& job, ParallelFor parallel_for);
void run(const ExtremaJob& job, ParallelFor parallel_for);
void run(const DoReFaWeightJob& job, ParallelFor parallel_for);
void run(const DoReFaWeightGradientJob& job, ParallelFor parallel_for);
void run(const DoReFaActivationJob& job, ParallelFor parallel_for);
void run(const DoReFaGradientJob& job, ParallelFor parallel_for);
void run(const BatchNormJob& job, ParallelFor parallel_for);
void run(const BatchNormGradientJob& job, ParallelFor parallel_for);
void run(const ActivationJob& job, ParallelFor parallel_for);
void run(const ActivationGradientJob& job, ParallelFor parallel_for);
// Values to levels; whether the way back gives every value's bits.
bool pack(const LevelsJob& job, ParallelFor parallel_for);
void unpack(const LevelsJob& job, ParallelFor parallel_for);

}  // namespace qk::cpu
