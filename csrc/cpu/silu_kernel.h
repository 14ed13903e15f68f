// SiLU for the vectorised kernels, which include this file inside their namespace.

// A constant that the compiler cannot fold into the instruction that uses it, as a load, and so keeps in a register as
// long as there are enough: a loop that reads four tables already is bound by its loads.
template <typename T>
static inline __attribute__((always_inline)) T in_register(T value) {
  asm("" : "+r"(value));
  return value;
}

// What follows the normalisation; make one outside the loop.
//
// SiLU is u / (1 + e) with e = exp(-u) = 2^n * p(r), n + r = -u / ln2, |r| <= 1/2, and p within 1.4e-7 of 2^r. The
// exponent is clamped to where e is 0 for a large u and infinite for one below -88.37, so that the result is u and -0
// there.
// A NaN gives some number for e, and the quotient restores it. The clamps compare bit patterns: as integers the
// non-negative floats are ordered as they are, and so are, unsigned, the negative ones by magnitude. The compiler makes
// one instruction of an integer minimum, and a branch, for NaN's sake, of a float's.
template <bool silu>
class Activation {
 public:
  __attribute__((always_inline)) Activation() {}  // the implicit one is not compiled for the instruction set

  float operator()(float u) const { return silu ? gate(u, u) : u; }

  // u / (1 + exp(-v))
  float gate(float u, float v) const {
    int32_t bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    bits = bits < highest ? bits : highest;
    uint32_t magnitude = uint32_t(bits);
    magnitude = magnitude < lowest ? magnitude : lowest;
    float a;
    __builtin_memcpy(&a, &magnitude, sizeof a);

    const float shifted = a * minus_log2_e + to_exponent;
    const float n = shifted - to_exponent;
    const float r = a * minus_log2_e - n;
    float p = p5;
    p = p * r + p4;
    p = p * r + p3;
    p = p * r + p2;
    p = p * r + p1;
    p = p * r + one;
    uint32_t exponent;
    __builtin_memcpy(&exponent, &shifted, sizeof exponent);
    exponent <<= 23;
    float power;
    __builtin_memcpy(&power, &exponent, sizeof power);
    return u / (p * power + one);
  }

 private:
  const float minus_log2_e = in_register(-1.44269504f);
  // 1.5 * 2^23 and more: the sum's last bits are n + 127, the exponent of 2^n
  const float to_exponent = in_register(12582912.0f + 127.0f);
  const float one = in_register(1.0f);
  const float p1 = in_register(6.931470037e-1f), p2 = in_register(2.402224243e-1f), p3 = in_register(5.550733581e-2f),
              p4 = in_register(9.671512991e-3f), p5 = in_register(1.326472731e-3f);
  const int32_t highest = in_register(0x42b00000);   // 88.0f, where n is -127
  const uint32_t lowest = in_register(0xc2b20000u);  // -89.0f, where n is 128
};
