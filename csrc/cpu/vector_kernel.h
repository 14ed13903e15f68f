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

// Swaps the elements of a and b whose places differ by S: one step of a transposition.
template <int S>
static inline __attribute__((always_inline)) void exchange(Vector& a, Vector& b) {
  typedef int Places __attribute__((vector_size(4 * FASTSD_LANES)));
  Vector x = a, y = b;
#if defined(__clang__)
  for (int i = 0; i < kLanes; ++i) {
    a[i] = i & S ? y[i - S] : x[i];
    b[i] = i & S ? y[i] : x[i + S];
  }
#else
  Places of_a, of_b;
  for (int i = 0; i < kLanes; ++i) {
    of_a[i] = i & S ? kLanes + i - S : i;
    of_b[i] = i & S ? kLanes + i : i + S;
  }
  a = __builtin_shuffle(x, y, of_a);
  b = __builtin_shuffle(x, y, of_b);
#endif
}

template <int S>
static inline __attribute__((always_inline)) void exchange_all(Vector* v) {
  if constexpr (S < kLanes) {
    for (int i = 0; i < kLanes; ++i)
      if (!(i & S)) exchange<S>(v[i], v[i + S]);
    exchange_all<2 * S>(v);
  }
}
