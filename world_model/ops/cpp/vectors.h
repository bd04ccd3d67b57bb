// Building blocks of all compiled code: vectors, exp and log, products, norms, transposes, working memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int V = 16, ROWS = 12;  // floats in a vector, rows of a block of a product: what the registers hold
#elif defined(__AVX__)
constexpr int V = 8, ROWS = 6;
#else
constexpr int V = 4, ROWS = 4;
#endif
constexpr int PANEL = 2 * V, TILE = 2 * 12;
constexpr float NEVER = -std::numeric_limits<float>::infinity();

typedef float vec __attribute__((vector_size(V * 4)));
typedef int32_t ivec __attribute__((vector_size(V * 4)));

inline vec load(const float* p) { vec x; std::memcpy(&x, p, sizeof x); return x; }
inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }
inline void keep(vec& x) {  // in its register: GCC would load it anew for each row
#if defined(__AVX512F__)
  asm("" : "+v"(x));
#elif defined(__SSE__)
  asm("" : "+x"(x));
#endif
}
inline vec all(float x) { return x - vec{}; }
inline vec least(vec a, vec b) { return a < b ? a : b; }
inline vec most(vec a, vec b) { return a > b ? a : b; }
inline float sum(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s = 0;
  for (int i = 0; i < V; i++) s += x[i];
  return s;
#endif
}
constexpr int pad(int n) { return (n + V - 1) / V * V; }
constexpr int panels(int n) { return (n + PANEL - 1) / PANEL; }

inline float highest(vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float s = x[0];
  for (int i = 1; i < V; i++) s = x[i] > s ? x[i] : s;
  return s;
#endif
}

inline vec exponential(vec x) {  // Cephes' expf: two ulp; NaN stays NaN, exp(-inf) is 0
#if defined(__AVX512F__)
  const vec c = (vec)_mm512_min_ps((__m512)all(89.0f), _mm512_max_ps((__m512)all(-104.0f), (__m512)x));  // both keep NaN
  const vec n = (vec)_mm512_roundscale_ps((__m512)(c * 1.44269504f), 0);
#else
  const vec c = least(most(x, all(-87.3f)), all(88.3f));
  const vec n = (c * 1.44269504f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
#endif
  const vec r = c - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const vec y = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (vec)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  const ivec scaled = (ivec)y + (__builtin_convertvector(n, ivec) << 23);
  vec e = x < -87.3f ? all(0.0f) : (vec)scaled;
  e = x > 88.3f ? all(std::numeric_limits<float>::infinity()) : e;
  return x != x ? x : e;
#endif
}

inline vec logarithm(vec x) {  // Cephes' logf, of positive numbers; NaN stays NaN
  ivec bits = (ivec)x;
  vec e = __builtin_convertvector(((bits >> 23) & 255) - 126, vec);
  vec m = (vec)((bits & 0x007fffff) | 0x3f000000);  // in [0.5, 1)
  e = m < 0.707106781f ? e - 1.0f : e;
  m = m < 0.707106781f ? m + m - 1.0f : m - 1.0f;
  vec z = m * m, p = all(7.0376836292e-2f);
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  vec y = p * m * z + e * -2.12194440e-4f - 0.5f * z;
  y = m + y + e * 0.693359375f;
  return x != x ? x : y;
}

inline vec root(vec x) {
#if defined(__AVX512F__)
  return (vec)_mm512_sqrt_ps((__m512)x);
#else
  for (int i = 0; i < V; i++) x[i] = std::sqrt(x[i]);
  return x;
#endif
}


inline vec load(const float* p, int n) {  // the first n numbers, then zeros
#if defined(__AVX512F__)
  return (vec)_mm512_maskz_loadu_ps(__mmask16(n >= V ? ~0u : (1u << n) - 1), p);
#else
  if (n >= V) return load(p);
  vec x = {};
  std::memcpy(&x, p, n * sizeof(float));
  return x;
#endif
}
inline void store(float* p, vec x, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, __mmask16(n >= V ? ~0u : (1u << n) - 1), (__m512)x);
#else
  if (n >= V) return store(p, x);
  std::memcpy(p, &x, n * sizeof(float));
#endif
}

inline void copy(float* to, const float* from, int n) {
  for (int i = 0; i < n; i += V) store(to + i, load(from + i, n - i), n - i);
}

inline void add(float* to, const float* x, int n) {
  for (int i = 0; i < n; i += V) store(to + i, load(to + i, n - i) + load(x + i, n - i), n - i);
}

// y [n] = x sigmoid(x), times y where TIMES
template <bool TIMES = false>
inline void silu(const float* x, float* y, int n) {
  for (int i = 0; i < n; i += V) {
    const vec a = load(x + i, n - i), to = a / (1.0f + exponential(-a));
    store(y + i, TIMES ? load(y + i, n - i) * to : to, n - i);
  }
}

inline float dot(const float* x, const float* y, int n) {
  vec total = {};
  int i = 0;
  for (; i + V <= n; i += V) total += load(x + i) * load(y + i);
  float s = sum(total);
  for (; i < n; i++) s += x[i] * y[i];
  return s;
}

// --- products

struct Matrix {  // [in,out] in panels of columns, each stored row by row; zeros beyond `out`
  int in = 0, out = 0;
  std::vector<float> weight, bias;
  int ld() const { return panels(out) * PANEL; }
};

// `rows` [from,to) of a torch Linear's weight [out,in] and bias [out]
Matrix packed(const float* weight, const float* bias, int in, int from, int to) {
  Matrix m;
  m.in = in, m.out = to - from;
  m.weight.assign(size_t(m.ld()) * in, 0.0f), m.bias.assign(m.ld(), 0.0f);
  for (int o = 0; o < m.out; o++) {
    for (int i = 0; i < in; i++)
      m.weight[size_t(o / PANEL) * PANEL * in + size_t(i) * PANEL + o % PANEL] = weight[size_t(from + o) * in + i];
    if (bias) m.bias[o] = bias[from + o];
  }
  return m;
}

// c [M,N*V] = a [M,in] @ w [in,N*V] + bias, or +=; the rows of w are `ldw` apart. FLIP: a is given as [in,M].
template <int M, int N, bool ADD, bool FLIP>
inline void block(const float* a, int lda, const float* w, int ldw, int in, const float* bias, float* c, int ldc) {
  constexpr int U = M == 1 ? 4 : M <= 3 ? 2 : 1;  // few rows: several sums each, so that none waits for another
  vec sums[U][M][N] = {};
  for (int i = 0; i < M; i++)
    for (int n = 0; n < N; n++) {
      if (bias) sums[0][i][n] = load(bias + n * V);
      if (ADD) sums[0][i][n] += load(c + size_t(i) * ldc + n * V);
    }
  int k = 0;
  for (; k + U <= in; k += U)
    for (int u = 0; u < U; u++, w += ldw) {
      vec row[N];
      for (int n = 0; n < N; n++) row[n] = load(w + n * V), keep(row[n]);
      for (int i = 0; i < M; i++) {
        float x = FLIP ? a[size_t(k + u) * lda + i] : a[size_t(i) * lda + k + u];
        for (int n = 0; n < N; n++) sums[u][i][n] += x * row[n];
      }
    }
  for (; k < in; k++, w += ldw)
    for (int i = 0; i < M; i++) {
      float x = FLIP ? a[size_t(k) * lda + i] : a[size_t(i) * lda + k];
      for (int n = 0; n < N; n++) sums[0][i][n] += x * load(w + n * V);
    }
  for (int i = 0; i < M; i++)
    for (int n = 0; n < N; n++) {
      for (int u = 1; u < U; u++) sums[0][i][n] += sums[u][i][n];
      store(c + size_t(i) * ldc + n * V, sums[0][i][n]);
    }
}

template <int M, int N, bool ADD, bool FLIP>
void rest(int rows, const float* a, int lda, const float* w, int ldw, int in, const float* bias, float* c, int ldc) {
  if constexpr (M > 0) {
    if (rows == M) block<M, N, ADD, FLIP>(a, lda, w, ldw, in, bias, c, ldc);
    else rest<M - 1, N, ADD, FLIP>(rows, a, lda, w, ldw, in, bias, c, ldc);
  }
}

template <int N, bool ADD, bool FLIP = false>
inline void columns_of(int rows, const float* a, int lda, const float* w, int ldw, int in, const float* bias, float* c,
                       int ldc) {
  constexpr int M = N == 1 && V == 16 ? 16 : ROWS;
  int r = 0;
  for (; r + M <= rows; r += M)
    block<M, N, ADD, FLIP>(a + size_t(r) * (FLIP ? 1 : lda), lda, w, ldw, in, bias, c + size_t(r) * ldc, ldc);
  rest<M - 1, N, ADD, FLIP>(rows - r, a + size_t(r) * (FLIP ? 1 : lda), lda, w, ldw, in, bias, c + size_t(r) * ldc, ldc);
}

// c [rows,columns] = a [rows,in] @ w + bias, or +=; w in panels, c with room for whole panels
template <bool ADD = false>
void product(int rows, const float* a, int lda, const float* w, int in, int columns, const float* bias, float* c,
             int ldc) {
  for (int p = 0; p < columns; p += PANEL, w += size_t(in) * PANEL)
    columns_of<2, ADD>(rows, a, lda, w, PANEL, in, bias ? bias + p : nullptr, c + p, ldc);
}

// The same of a plain w [in,columns] with rows `ldw` apart; columns are whole vectors
template <bool ADD = false, bool FLIP = false>
void multiply(int rows, const float* a, int lda, const float* w, int ldw, int in, int columns, float* c, int ldc) {
  int p = 0;
  for (; p + PANEL <= columns; p += PANEL) columns_of<2, ADD, FLIP>(rows, a, lda, w + p, ldw, in, nullptr, c + p, ldc);
  if (p < columns) columns_of<1, ADD, FLIP>(rows, a, lda, w + p, ldw, in, nullptr, c + p, ldc);
}

template <bool ADD = false>
void linear(const Matrix& m, int rows, const float* a, int lda, float* c, int ldc) {
  product<ADD>(rows, a, lda, m.weight.data(), m.in, m.out, m.bias.data(), c, ldc);
}

struct Norm {
  int size = 0;
  const float *weight = nullptr, *bias = nullptr;
};

// y [rows,size] = layer norm of x; without weights where `norm.weight` is null. y may be x.
void normalise(const Norm& norm, float eps, int rows, const float* x, int ldx, float* y, int ldy) {
  const int n = norm.size, whole = n / V * V;
  for (int r = 0; r < rows; r++, x += ldx, y += ldy) {
    vec total = {}, square = {};
    for (int i = 0; i < whole; i += V) total += load(x + i);
    float mean = sum(total);
    for (int i = whole; i < n; i++) mean += x[i];
    mean /= n;
    for (int i = 0; i < whole; i += V) { vec a = load(x + i) - mean; square += a * a; }
    float var = sum(square);
    for (int i = whole; i < n; i++) var += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(var / n + eps);
    if (norm.weight) {
      for (int i = 0; i < whole; i += V)
        store(y + i, (load(x + i) - mean) * scale * load(norm.weight + i) + load(norm.bias + i));
      for (int i = whole; i < n; i++) y[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i];
    } else {
      for (int i = 0; i < whole; i += V) store(y + i, (load(x + i) - mean) * scale);
      for (int i = whole; i < n; i++) y[i] = (x[i] - mean) * scale;
    }
  }
}

// dy [size] -> dx through `normalise` of one row x; what the weights gain is added, where there are any
inline void normalise_back(const Norm& norm, float eps, const float* x, const float* dy, float* dx, float* dgain,
                           float* dshift) {
  const int n = norm.size;
  vec total = {}, squares = {}, along = {}, whole = {};
  for (int i = 0; i < n; i += V) total += load(x + i, n - i);
  const float mean = sum(total) / n;
  for (int i = 0; i < n; i += V) {
    vec a = load(x + i, n - i) - mean;
    if (n - i < V) a = load((const float*)&a, n - i);
    squares += a * a;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / n + eps);
  auto given = [&](int i) { return norm.weight ? load(dy + i, n - i) * load(norm.weight + i, n - i) : load(dy + i, n - i); };
  for (int i = 0; i < n; i += V) {
    const vec unit = (load(x + i, n - i) - mean) * scale, back = given(i);
    if (norm.weight) {
      const vec raw = load(dy + i, n - i);
      store(dgain + i, load(dgain + i) + raw * unit), store(dshift + i, load(dshift + i) + raw);
    }
    along += back * unit, whole += back;
  }
  const float by_unit = sum(along) / n, by_all = sum(whole) / n;
  for (int i = 0; i < n; i += V)
    store(dx + i, scale * (given(i) - by_all - (load(x + i, n - i) - mean) * scale * by_unit), n - i);
}

// to [n] = x at length 1 -> the length that it had; `to` may be x
inline float to_unit(const float* x, float* to, int n) {
  const float length = std::max(std::sqrt(dot(x, x, n)), 1e-12f);
  for (int i = 0; i < n; i += V) store(to + i, load(x + i, n - i) * (1.0f / length), n - i);
  return length;
}

// The row of token n of dream b in two streams' tensors [B,F,P,..] and [B,F,1,..], whose rows are ldw and lda apart
template <class T>
inline T* token(T* world, T* action, int64_t ldw, int64_t lda, int64_t frames, int64_t tokens, int64_t b, int n) {
  const int64_t f = n / (tokens + 1), g = n % (tokens + 1);
  return g < tokens ? world + ((b * frames + f) * tokens + g) * ldw : action + (b * frames + f) * lda;
}

// x [n], whole vectors, := softmax(x); at least one number isn't -inf
inline void softmax(float* x, int n) {
  vec top = load(x), total = {};
  for (int j = V; j < n; j += V) top = most(top, load(x + j));
  const float peak = highest(top);
  for (int j = 0; j < n; j += V) {
    const vec e = exponential(load(x + j) - peak);
    store(x + j, e), total += e;
  }
  const float by = 1.0f / sum(total);
  for (int j = 0; j < n; j += V) store(x + j, load(x + j) * by);
}

// c [rows,d] = a [rows,count] @ the rows at v[0], v[1], ... [d]
template <int M, int N>
inline void blended(const float* a, int lda, const float* const* v, int count, int from, int d, float* c, int ldc) {
  vec sums[M][N] = {};
  for (int j = 0; j < count; j++) {
    vec row[N];
    for (int n = 0; n < N; n++) row[n] = load(v[j] + from + n * V, d - n * V), keep(row[n]);
    for (int i = 0; i < M; i++)
      for (int n = 0; n < N; n++) sums[i][n] += a[size_t(i) * lda + j] * row[n];
  }
  for (int i = 0; i < M; i++)
    for (int n = 0; n < N; n++) store(c + size_t(i) * ldc + from + n * V, sums[i][n], d - n * V);
}

template <int M>
inline void blend(int rows, const float* a, int lda, const float* const* v, int count, int d, float* c, int ldc) {
  for (; rows >= M; rows -= M, a += size_t(M) * lda, c += size_t(M) * ldc) {
    int from = 0;
    for (; from + V < d; from += PANEL) blended<M, 2>(a, lda, v, count, from, d - from, c, ldc);
    if (from < d) blended<M, 1>(a, lda, v, count, from, d - from, c, ldc);
  }
  if constexpr (M > 1) blend<M / 2>(rows, a, lda, v, count, d, c, ldc);
}

// --- transposes: t [columns][ldt] of the rows [columns] at row(0), row(1), ...

#if defined(__AVX512F__)
template <int S>
inline void butterfly(vec* x) {  // one of the four stages of a 16x16 transpose
  ivec low, high;
  for (int i = 0; i < V; i++) {
    low[i] = (i & S) ? V + (i ^ S) : i;
    high[i] = (i & S) ? V + i : (i ^ S);
  }
  for (int i = 0; i < V; i++)
    if (!(i & S)) {
      vec a = x[i], b = x[i | S];
      x[i] = __builtin_shuffle(a, b, low), x[i | S] = __builtin_shuffle(a, b, high);
    }
}
#endif

// WHOLE: with zeros beyond the rows, up to a whole vector
template <bool WHOLE = false, class Row>
inline void transpose(Row row, int rows, int columns, float* t, int ldt) {
  int whole = 0;
#if defined(__AVX512F__)
  whole = columns / V * V;
  for (int r = 0; r < rows; r += V) {
    const int here = std::min(V, rows - r);
    const __mmask16 mask = WHOLE ? __mmask16(~0u) : __mmask16((1u << here) - 1);
    for (int c = 0; c < whole; c += V) {
      vec x[V];
      for (int i = 0; i < V; i++) x[i] = i < here ? load(row(r + i) + c) : vec{};
      butterfly<8>(x), butterfly<4>(x), butterfly<2>(x), butterfly<1>(x);
      for (int i = 0; i < V; i++) _mm512_mask_storeu_ps(t + size_t(c + i) * ldt + r, mask, (__m512)x[i]);
    }
  }
#endif
  for (int r = 0; r < rows; r++)
    for (int c = whole; c < columns; c++) t[size_t(c) * ldt + r] = row(r)[c];
  for (int c = whole; WHOLE && c < columns; c++) std::fill(t + size_t(c) * ldt + rows, t + size_t(c) * ldt + pad(rows), 0.0f);
}

// --- keys onto a memory S^T [d,ld], one after the other: delta_rule.py's recurrence, of one head

// N vectors of the memory's columns, of which `e` count. A key's write is held back until the next pass over the memory,
// which reads for the next key at the same time; the decay of all columns is one factor.
template <int N>
struct Columns {
  int d, ld, e;
  float* state;
  const float* key = nullptr;  // whose write is held back
  vec wrote[N] = {};           // that write over `left`
  float left = 1;

  template <bool WAITS, bool ASKED>
  void pass(const float* k, const float* q, vec* for_key, vec* for_query) {
    vec a[2][N] = {}, b[2][N] = {};  // two sums each: none waits for another
    vec w[N];  // in registers: the compiler can't exclude that a store changes the member
    for (int n = 0; n < N; n++) w[n] = wrote[n];
    const float* const before = key;
    const int rows = d;
    float* s = state;
    auto row = [&](int j, int u) {
      vec of_key = all(k[j]), of_query{}, of_before{};
      keep(of_key);
      if (ASKED) of_query = all(q[j]), keep(of_query);
      if (WAITS) of_before = all(before[j]), keep(of_before);
      for (int n = 0; n < N; n++) {
        vec x = load(s + n * V);
        if (WAITS) x += of_before * w[n], store(s + n * V, x);
        a[u][n] += of_key * x;
        if (ASKED) b[u][n] += of_query * x;
      }
      s += ld;
    };
    int j = 0;
    for (; j + 2 <= rows; j += 2) row(j, 0), row(j + 1, 1);
    if (j < rows) row(j, 0);
    for (int n = 0; n < N; n++) for_key[n] = a[0][n] + a[1][n], for_query[n] = b[0][n] + b[1][n];
  }

  // Writes a key [d] and its value [e]; out [e] is the output of `q`, if not null, times `by`. The key must live until
  // the next write or settle().
  void write(const float* k, const float* value, float decay, float beta, const float* q, float by, float* out) {
    left *= decay;
    if (left < 1e-9f) settle();  // before what is divided by it overflows
    vec mine[N], asked[N];
    if (key) q ? pass<true, true>(k, q, mine, asked) : pass<true, false>(k, q, mine, asked);
    else q ? pass<false, true>(k, q, mine, asked) : pass<false, false>(k, q, mine, asked);
    key = k;
    const float both = q ? dot(k, q, d) : 0.0f, over = 1.0f / left;
    for (int n = 0; n < N; n++) {
      const vec x = (load(value + n * V, e - n * V) - left * mine[n]) * beta;
      if (q) store(out + n * V, (left * asked[n] + both * x) * by, e - n * V);
      wrote[n] = x * over;
    }
  }

  void settle() {
    float* s = state;
    for (int j = 0; j < d; j++, s += ld)
      for (int n = 0; n < N; n++) store(s + n * V, left * (key ? load(s + n * V) + key[j] * wrote[n] : load(s + n * V)));
    key = nullptr, left = 1;
  }
};

// Calls each(columns, from) for all columns of a memory of e, and settles them
template <class Each>
inline void over_columns(int d, int e, int ld, float* state, Each each) {
  auto some = [&](auto columns, int from) { each(columns, from), columns.settle(); };
  int from = 0;
  for (; from + V < e; from += PANEL) some(Columns<2>{d, ld, e - from, state + from}, from);
  if (from < e) some(Columns<1>{d, ld, e - from, state + from}, from);
}

// --- working memory

struct Arena {
  float *base, *end;
  float* take(size_t n) {
    float* p = base;
    base += (n + V - 1) / V * V;
    if (base > end) std::abort();  // the room was computed wrongly
    return p;
  }
};

struct Room {
  float* base = nullptr;
  size_t size = 0;
  ~Room() { std::free(base); }
  Arena open(size_t n) {
    if (n > size) {
      std::free(base);
      base = static_cast<float*>(std::aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64));
      size = base ? n : 0;
    }
    return {base, base + size};
  }
};
thread_local Room room;

}  // namespace
