// Moments of many numbers, merged from those of their parts.
#pragma once

#include "device.cuh"

namespace fastsd {

// The mean is the sum mean + residue: where it is large and the variance small, one float32 is too coarse for it.
// m2 is the sum of the squared deviations from it.
struct Moments {
  float mean, residue, m2;
};

// Chan, Golub and LeVeque's merge of all parts at once; each lane of the warp takes every 32nd, and all return the same
// bits. of(part) gives a part's moments, elements(part) how many numbers it has, and `all` is how many there are.
template <class Of, class Elements>
__device__ inline Moments merge(int parts, float all, Of of, Elements elements) {
  const int lane = threadIdx.x % kWarp;
  const float origin = of(0).mean;
  float sum = 0.0f, m2 = 0.0f;
#pragma unroll 1
  for (int part = lane; part < parts; part += kWarp) {
    const Moments own = of(part);
    sum += elements(part) * ((own.mean - origin) + own.residue);
  }
  const float correction = warp_sum(sum) / all, mean = origin + correction;
  const float residue = correction - (mean - origin);
#pragma unroll 1
  for (int part = lane; part < parts; part += kWarp) {
    const Moments own = of(part);
    const float deviation = (own.mean - mean) + (own.residue - residue);
    m2 += own.m2 + elements(part) * deviation * deviation;
  }
  return {mean, residue, warp_sum(m2)};
}

}  // namespace fastsd
