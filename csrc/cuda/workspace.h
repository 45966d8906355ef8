// Owns the temporary memory of a job: where it comes from, and how arrays lie in it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qk::cuda {

class Workspace {
 public:
  // Memory of any content, aligned to 16 bytes, for what is enqueued until the next call; null for no bytes.
  virtual void* take(size_t bytes) = 0;

 protected:
  ~Workspace() = default;
};

// Lays arrays out one after the other; with null memory it only counts the bytes.
class WorkspaceLayout {
 public:
  explicit WorkspaceLayout(void* memory) : base_(reinterpret_cast<uintptr_t>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    constexpr size_t kAlignment = 16;
    T* const array = reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return array;
  }
  size_t bytes() const { return bytes_; }

 private:
  uintptr_t base_;
  size_t bytes_ = 0;
};

// Arrays takes its pointers from the layout that its constructor gets first.
template <class Arrays, class... Arguments>
Arrays lay_out(Workspace& workspace, const Arguments&... arguments) {
  WorkspaceLayout counted(nullptr);
  static_cast<void>(Arrays(counted, arguments...));
  WorkspaceLayout layout(workspace.take(counted.bytes()));
  return Arrays(layout, arguments...);
}

}  // namespace qk::cuda
