// Errors that reach Python as RuntimeError with the message alone: no file, no line, no condition.
#pragma once

#include <sstream>
#include <stdexcept>

namespace nnfast {

template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

template <class... Parts>
inline void check(bool condition, const Parts&... parts) {
  if (!condition) [[unlikely]]
    fail(parts...);
}

}  // namespace nnfast
