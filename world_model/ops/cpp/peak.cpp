// How fast this processor is at best: what the benchmarks hold every other rate against.

#include "vectors.h"

namespace {

template <int N>
float multiply_add(long rounds) {
  vec x[N];
  for (int i = 0; i < N; i++) x[i] = all(1.0f + i);
  vec by = all(0.999f), plus = all(1e-3f);
  for (long n = 0; n < rounds; n++) {
    for (int i = 0; i < N; i++) x[i] = x[i] * by + plus;
    keep(by), keep(plus);
  }
  float s = 0;
  for (int i = 0; i < N; i++) s += sum(x[i]);
  return s;
}

}  // namespace

extern "C" {

// `rounds` of independent multiply-adds -> how many floating point operations that were
double peak_arithmetic(long rounds, float* result) {
  constexpr int N = V == 16 ? 12 : 10;
  *result = multiply_add<N>(rounds);
  return 2.0 * N * V * rounds;
}

}
