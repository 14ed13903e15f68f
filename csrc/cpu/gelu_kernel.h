// GELUs for the vectorised kernels, which include this file inside their namespace.

#include "silu_kernel.h"

// z * (1 + erf(z / sqrt(2))) / 2; make one outside the loop.
//
// erf(x) is x * P(x^2) / Q(x^2), fitted by iterated least squares to within 1.5e-8 up to 3.9, from where on it is 1 in
// float. Of a NaN the comparison is false, and the quotient keeps it.
class Gelu {
 public:
  __attribute__((always_inline)) Gelu() {}  // the implicit one is not compiled for the instruction set

  float operator()(float z) const {
    const float x = z * 0.707106781f, t = x * x;
    float p = 2.05038668e-6f, q = 3.82307262e-5f;
    p = p * t + 2.87457049e-4f;
    q = q * t + 1.18173310e-3f;
    p = p * t + 3.83687136e-3f;
    q = q * t + 1.51091944e-2f;
    p = p * t + 5.29669039e-2f;
    q = q * t + 1.14758156e-1f;
    p = p * t + 1.91940904e-1f;
    q = q * t + 5.03434956e-1f;
    p = p * t + 1.12837899f;
    q = q * t + 1.0f;
    const float inside = x * p / q, sign = x < 0.0f ? -1.0f : 1.0f;
    const float erf = t > 3.9f * 3.9f ? sign : inside;
    return z * (0.5f * erf + 0.5f);
  }
};

// z * sigmoid(1.702 z); make one outside the loop.
class QuickGelu {
 public:
  __attribute__((always_inline)) QuickGelu() {}  // as above

  float operator()(float z) const { return silu.gate(z, 1.702f * z); }

 private:
  const Activation<true> silu;
};
