// Vectors of the vectorised kernels, which include this file inside their namespace.

typedef float Vector __attribute__((vector_size(4 * FASTSD_LANES)));
constexpr int kLanes = FASTSD_LANES;

// V: a Vector, or a float where too few elements are left for one.
template <typename T, typename V>
static inline __attribute__((always_inline)) void read(const T* p, V& v) {
  float lanes[sizeof v / sizeof(float)];
  for (size_t i = 0; i < sizeof v / sizeof(float); ++i) lanes[i] = load(p + i);
  __builtin_memcpy(&v, lanes, sizeof v);
}

template <typename V>
static inline __attribute__((always_inline)) void read(const float* p, V& v) {
  __builtin_memcpy(&v, p, sizeof v);
}

template <typename V>
static inline __attribute__((always_inline)) void write(float* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof v);
}
