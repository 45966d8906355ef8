// Owns the threads of the operators in TensorFlow, whose C API lends none.
#pragma once

#include <cfenv>

#include "../cpu/run.h"

namespace qk::tensorflow {

// While it lives, this thread computes as IEEE 754 says: TensorFlow's threads flush subnormal numbers to zero, and so
// do the threads that they start.
class DefaultArithmetic {
 public:
  DefaultArithmetic() {
    std::fegetenv(&before_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultArithmetic() { std::fesetenv(&before_); }
  DefaultArithmetic(const DefaultArithmetic&) = delete;
  DefaultArithmetic& operator=(const DefaultArithmetic&) = delete;

 private:
  std::fenv_t before_;
};

// Splits [begin, end) among the processors that this process may use, or as many as TF_NUM_INTRAOP_THREADS says. While
// another call has the threads, or inside a body, the caller computes all by itself.
void parallel_for(int64_t begin, int64_t end, int64_t grain, cpu::ParallelBody body, void* context);

}  // namespace qk::tensorflow
