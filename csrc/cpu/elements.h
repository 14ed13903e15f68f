// Element types of feature maps; arithmetic runs in float.

#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace fastsd {

inline float load(const float* p) {
  return *p;
}
inline float load(const c10::BFloat16* p) {
  return c10::detail::f32_from_bits(p->x);
}
inline float load(const c10::Half* p) {
  return c10::detail::fp16_ieee_to_fp32_value(p->x);
}

inline void store(float* p, float value) {
  *p = value;
}
inline void store(c10::BFloat16* p, float value) {
  p->x = c10::detail::round_to_nearest_even(value);
}
inline void store(c10::Half* p, float value) {
  p->x = c10::detail::fp16_ieee_from_fp32_value(value);
}

}  // namespace fastsd
