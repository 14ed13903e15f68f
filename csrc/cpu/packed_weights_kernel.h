// The vectorised loop of packed_weights, compiled once per instruction set by foreach_isa.h.

// A 64-bit digest of n bytes, of which any change shows but for one in 2^64. Words are added up in lanes, and so are
// the products of the halves of each word and a key of its place: sums alone would miss changes that cancel.
static uint64_t digest_of(const unsigned char* data, int64_t n) {
  constexpr int lanes = 32;
  constexpr uint64_t step = 0x9e3779b97f4a7c15, factor = 0xbf58476d1ce4e5b9;
  uint64_t sum[lanes] = {}, product[lanes] = {}, key[lanes], word[lanes];
  for (int j = 0; j < lanes; ++j) key[j] = uint64_t(j + 1) * factor;
  for (int64_t at = 0; at < n; at += int64_t(sizeof word)) {
    if (n - at >= int64_t(sizeof word)) {
      __builtin_memcpy(word, data + at, sizeof word);
    } else {
      __builtin_memset(word, 0, sizeof word);
      __builtin_memcpy(word, data + at, size_t(n - at));
    }
    for (int j = 0; j < lanes; ++j) {
      const uint64_t keyed = word[j] ^ key[j];
      sum[j] += word[j];
      product[j] += uint64_t(uint32_t(keyed)) * uint32_t(keyed >> 32);
      key[j] += step;
    }
  }
  uint64_t all = uint64_t(n);
  for (int j = 0; j < lanes; ++j)
    for (int half = 0; half < 2; ++half) {
      all = (all ^ (half ? product[j] : sum[j])) * factor;
      all ^= all >> 29;
    }
  return all;
}
