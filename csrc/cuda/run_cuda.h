// Owns the interface of the CUDA side: one launcher per job of jobs.h. Every pointer is on the current device.
//
// A launcher enqueues its kernels on the stream and returns the first error of a launch. It neither synchronises nor
// allocates but by `workspace`. The launches of one job may be captured in a CUDA graph.
#pragma once

#if __has_include("simt.h")
#include "simt.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "../jobs.h"
#include "workspace.h"

namespace qk::cuda {

cudaError_t run(const AffineJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const LearnedGradientJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const StraightThroughJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const ExtremaJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const RangeJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const CurrentJobs& jobs, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const StraightThroughJobs& jobs, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const BeginStepJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const EndStepJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const DoReFaWeightJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const DoReFaWeightGradientJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const DoReFaActivationJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const DoReFaGradientJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const BatchNormJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const BatchNormGradientJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const ActivationJob& job, Workspace& workspace, cudaStream_t stream);
cudaError_t run(const ActivationGradientJob& job, Workspace& workspace, cudaStream_t stream);

}  // namespace qk::cuda
