// Owns the workspace that programs give to launchers: allocations of exactly the size, poisoned, for the sanitizers.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>

#include "cuda/workspace.h"

namespace qk::simt {

class ExactWorkspace final : public cuda::Workspace {
 public:
  void* take(size_t bytes) override {
    memory_.reset(bytes == 0 ? nullptr : std::malloc(bytes));
    if (bytes != 0) std::memset(memory_.get(), 0xa5, bytes);
    return memory_.get();
  }

 private:
  std::unique_ptr<void, void (*)(void*)> memory_{nullptr, std::free};
};

}  // namespace qk::simt
