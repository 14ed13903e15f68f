// The vectorised loop of digest, compiled once per instruction set by foreach_isa.h.

typedef uint64_t Words __attribute__((vector_size(4 * FASTSD_LANES)));

// One more word. One to one in either: after a change of a single word no later one makes the digest what it was. With
// a single product a change of the highest bits would be known beforehand, and undone by the right change of the next.
template <typename T>
static inline __attribute__((always_inline)) T mix(T digest, T word) {
  digest ^= word;
  digest = (digest ^ (digest >> 32)) * 0xbf58476d1ce4e5b9;
  digest = (digest ^ (digest >> 29)) * 0x94d049bb133111eb;
  return digest ^ (digest >> 32);
}

// Of n bytes; with every instruction set the same.
static uint64_t digest_of(const unsigned char* data, int64_t n) {
  constexpr int lanes = 32, vectors = lanes * sizeof(uint64_t) / sizeof(Words);
  Words sums[vectors] = {};
  int64_t at = 0;
  for (; at + int64_t(sizeof sums) <= n; at += int64_t(sizeof sums))
    for (int j = 0; j < vectors; ++j) {
      Words words;
      __builtin_memcpy(&words, data + at + j * sizeof words, sizeof words);
      sums[j] = mix(sums[j], words);
    }
  uint64_t of_lane[lanes], all = uint64_t(n);
  __builtin_memcpy(of_lane, sums, sizeof sums);
  for (uint64_t lane : of_lane) all = mix(all, lane);
  for (; at < n; at += int64_t(sizeof all)) {
    uint64_t word = 0;
    __builtin_memcpy(&word, data + at, size_t(n - at < int64_t(sizeof word) ? n - at : int64_t(sizeof word)));
    all = mix(all, word);
  }
  return all;
}
