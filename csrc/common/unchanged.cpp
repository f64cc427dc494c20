// Whether memory still holds what it held: read at every call of what was computed from it, so without a
// dispatcher, tensors or Python's lock given up.
#include <cstdint>
#include <cstring>

namespace {

// `count` elements of `size` bytes, at `places` or side by side, and what they were.
struct Probe {
  const char* data;
  const int64_t* places;
  const char* expected;
  int64_t count, size;
};

template <class T>
bool same(const Probe& probe) {
  bool result = true;
  for (int64_t i = 0; i < probe.count; ++i) {
    T now, then;
    std::memcpy(&now, probe.data + probe.places[i] * sizeof(T), sizeof(T));
    std::memcpy(&then, probe.expected + i * sizeof(T), sizeof(T));
    result &= now == then;
  }
  return result;
}

bool holds(const Probe& probe) {
  if (!probe.places) return std::memcmp(probe.data, probe.expected, probe.count * probe.size) == 0;
  return probe.size == 2   ? same<uint16_t>(probe)
         : probe.size == 4 ? same<uint32_t>(probe)
         : probe.size == 8 ? same<uint64_t>(probe)
                           : same<uint8_t>(probe);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int nnfast_unchanged(const void* probes, int64_t count) {
  const Probe* const all = static_cast<const Probe*>(probes);
  for (int64_t i = 0; i < count; ++i)
    if (!holds(all[i])) return 0;
  return 1;
}
