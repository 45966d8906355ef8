// Owns the message of an error found while a kernel runs. It allocates nothing: the fiber that fails is never unwound,
// and no fiber may allocate under ThreadSanitizer.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdio>

namespace qk::simt {

class Message {
 public:
  Message() = default;
  __attribute__((format(printf, 2, 3))) Message(const char* pattern, ...) {
    va_list arguments;
    va_start(arguments, pattern);
    append(pattern, arguments);
    va_end(arguments);
  }
  __attribute__((format(printf, 2, 3))) void append(const char* pattern, ...) {
    va_list arguments;
    va_start(arguments, pattern);
    append(pattern, arguments);
    va_end(arguments);
  }
  const char* text() const { return text_; }

 private:
  // What does not fit is cut off.
  void append(const char* pattern, va_list arguments) {
    const int length = std::vsnprintf(text_ + size_, sizeof(text_) - size_, pattern, arguments);
    if (length > 0) size_ += static_cast<size_t>(length);
    if (size_ >= sizeof(text_)) size_ = sizeof(text_) - 1;
  }

  char text_[1024] = "";
  size_t size_ = 0;
};

// Abandons the running kernel; its launch throws Error with this message.
[[noreturn]] void fail(const Message& message);

}  // namespace qk::simt
