// Owns the interface of the CUDA side: one launcher per job of jobs.h. Every pointer is on the current device.
//
// A launcher enqueues its kernels on the stream and returns the first error of a launch. It neither synchronises nor
// allocates: `workspace` has workspace_bytes(job) bytes, aligned to 16, of any content, and must live until the stream
// has passed. The launches of one job may be captured in a CUDA graph.
#pragma once

#include <cstddef>

#if __has_include("simt.h")
#include "simt.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "../jobs.h"

namespace qk::cuda {

cudaError_t run(const AffineJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const LearnedGradientJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const StraightThroughJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const ExtremaJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const RangeJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const CurrentJobs& jobs, void* workspace, cudaStream_t stream);
cudaError_t run(const StraightThroughJobs& jobs, void* workspace, cudaStream_t stream);
cudaError_t run(const BeginStepJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const EndStepJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const DoReFaWeightJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const DoReFaWeightGradientJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const DoReFaActivationJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const DoReFaGradientJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const BatchNormJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const BatchNormGradientJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const ActivationJob& job, void* workspace, cudaStream_t stream);
cudaError_t run(const ActivationGradientJob& job, void* workspace, cudaStream_t stream);

size_t workspace_bytes(const AffineJob& job);
size_t workspace_bytes(const LearnedGradientJob& job);
size_t workspace_bytes(const StraightThroughJob& job);
size_t workspace_bytes(const ExtremaJob& job);
size_t workspace_bytes(const RangeJob& job);
size_t workspace_bytes(const CurrentJobs& jobs);
size_t workspace_bytes(const StraightThroughJobs& jobs);
size_t workspace_bytes(const BeginStepJob& job);
size_t workspace_bytes(const EndStepJob& job);
size_t workspace_bytes(const DoReFaWeightJob& job);
size_t workspace_bytes(const DoReFaWeightGradientJob& job);
size_t workspace_bytes(const DoReFaActivationJob& job);
size_t workspace_bytes(const DoReFaGradientJob& job);
size_t workspace_bytes(const BatchNormJob& job);
size_t workspace_bytes(const BatchNormGradientJob& job);
size_t workspace_bytes(const ActivationJob& job);
size_t workspace_bytes(const ActivationGradientJob& job);

}  // namespace qk::cuda
