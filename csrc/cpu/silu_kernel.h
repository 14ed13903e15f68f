// SiLU for the vectorised kernels, which include this file inside their namespace.

// u * sigmoid(u) by e = exp(-|u|), so that nothing overflows: u / (1 + e) for u >= 0, else u * e / (1 + e).
//
// e = 2^n * p(r) with n + r = -|u| / ln2, |r| <= 1/2, and p within 1e-7 of 2^r; it is 0 below 2^-126. A NaN gives
// some number for e, and the product with u restores it. The clamp compares bit patterns, which order as magnitudes
// do: the compiler makes one instruction of an integer minimum, and a branch, for NaN's sake, of a float's.
template <bool silu>
static inline float activate(float u) {
  if (!silu) return u;
  int32_t magnitude;
  __builtin_memcpy(&magnitude, &u, sizeof magnitude);
  magnitude &= 0x7fffffff;
  const int32_t limit = 0x42b00000;  // 88.0f
  magnitude = magnitude < limit ? magnitude : limit;
  float a;
  __builtin_memcpy(&a, &magnitude, sizeof a);

  const float minus_log2_e = -1.44269504f;
  const float to_exponent = 12582912.0f + 127.0f;  // 1.5 * 2^23: the sum's last bits are n + 127, the exponent of 2^n
  float shifted = a * minus_log2_e + to_exponent;
  float n = shifted - to_exponent;
  float r = a * minus_log2_e - n;
  float p = 1.326472731e-3f;
  p = p * r + 9.671512991e-3f;
  p = p * r + 5.550733581e-2f;
  p = p * r + 2.402224243e-1f;
  p = p * r + 6.931470037e-1f;
  p = p * r + 1.0f;
  uint32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return u * (u < 0.0f ? p * power : 1.0f) / (p * power + 1.0f);
}
