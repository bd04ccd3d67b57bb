// The gated delta rule, forward and backward, on a CPU, head by head in the cache: forward as delta_rule.py's
// recurrence, backward by chunks.
//
// In a chunk of C keys, with c the running sum of log alpha from the chunk's start and S the memory [d,e] there:
//   L_ij = exp(c_i - c_j) k_i.k_j (j < i)     x_i = v_i - exp(c_i) S^T k_i - sum_j L_ij u_j     u_i = beta_i x_i
//   P_rj = exp(c_n - c_j) q_r.k_j (j < n)     o_r = exp(c_n) S^T q_r + sum_j P_rj u_j, after n keys
//   S' = exp(c_C) S + sum_j exp(c_C - c_j) k_j u_j^T
// Decays enter only as exp of differences that are <= 0. The backward pass has the memory at each chunk's start and
// computes the rest again.

#pragma once

#include "vectors.h"

namespace {

constexpr int C = 16;  // keys of a chunk
constexpr float LEAST = -100;  // of log alpha, as in delta_rule.py

vec counting() {
  vec x;
  for (int i = 0; i < V; i++) x[i] = float(i);
  return x;
}
const vec COUNT = counting();  // 0, 1, 2, ...

struct Shape {
  int64_t B, H, T, R, d, e;
  int64_t q[3], k[3], v[3];  // strides of B, H and the token, in floats; a token's own numbers lie side by side
  int64_t chunks;
  const int32_t *order, *upto, *first;  // reads by chunk: which [R], how many of the chunk's keys [R], from where [chunks+1]
};

struct Tensors {
  const float *q, *k, *v, *log_alpha, *beta, *state;
  float *out, *final, *saved;  // saved [B,H,chunks,d,ld(e)]: the memory at each chunk's start, or null
  const float *dout, *dfinal;  // null: zero
  float *dq, *dk, *dv, *dlog_alpha, *dbeta, *dstate;
};

struct Work {  // of one head; every matrix row by row
  int d, e, ldd, lde, ldr;
  float *S, *dS, *St, *dSt;         // [d,e]; transposed [e,d]
  float *K, *Kt, *V, *U, *Ut, *X;   // [C,d], [d,C], [C,e], [C,e], [e,C], [C,e]
  float *D, *L, *Lb, *Q, *Qt, *P, *Pt, *O;  // [C+1,C], [C,C], L and beta, [R,d], [d,R], [R,C], [C,R], [R,e]
  float *dX, *dP, *dK, *dQ, *dO, *dL;  // dL, then its transpose
  float c[C], grow[C], fade[C], beta[C], end;  // running log decay, its exp, exp(c_C - c)
  float *up;                                   // [R] exp(c_n) of each read
};

Work work(const Shape& s, int most, Arena& a) {
  Work w;
  w.d = int(s.d), w.e = int(s.e), w.ldd = pad(w.d), w.lde = pad(w.e), w.ldr = pad(most);
  auto take = [&](int rows, int ld) {
    float* p = a.take(size_t(rows) * ld);
    std::fill(p, p + size_t(rows) * ld, 0.0f);  // the padding must be finite: it is multiplied by zeros
    return p;
  };
  w.S = take(w.d, w.lde), w.dS = take(w.d, w.lde), w.St = take(w.e, w.ldd), w.dSt = take(w.e, w.ldd);
  w.K = take(C, w.ldd), w.Kt = take(w.d, C), w.V = take(C, w.lde), w.U = take(C, w.lde), w.Ut = take(w.e, C);
  w.X = take(C, w.lde), w.D = take(C + 1, C), w.L = take(C, C), w.Lb = take(C, C), w.Q = take(most, w.ldd), w.Qt = take(w.d, w.ldr), w.P = take(most, C);
  w.Pt = take(C, w.ldr), w.O = take(most, w.lde), w.dX = take(C, w.lde), w.dP = take(most, C), w.dK = take(C, w.ldd);
  w.dQ = take(most, w.ldd), w.dO = take(most, w.lde), w.dL = take(2 * C, C);
  w.up = take(1, w.ldr);
  return w;
}

size_t work_room(const Shape& s, int most) {
  const size_t ldd = pad(int(s.d)), lde = pad(int(s.e)), ldr = pad(most), m = most;
  return 2 * s.d * lde + 2 * s.e * ldd + C * (2 * ldd + 4 * lde + 3 * C + 1 + ldr) + (s.d + s.e) * C + s.d * ldr +
         m * (2 * ldd + 2 * lde + 2 * C) + C * 2 * C + ldr + 64 * V;
}

inline void times(float* x, const float* y, int n) {  // whole vectors
  for (int i = 0; i < n; i += V) store(x + i, load(x + i) * load(y + i));
}

inline void scale(float* x, float by, int n) {  // whole vectors
  for (int i = 0; i < n; i += V) store(x + i, load(x + i) * by);
}

// x [C,V] with rows `ld` apart := (I + L)^-1 x, for L [C,C] of which the strict lower triangle counts
inline void substitute(const float* L, float* x, int ld) {
  vec row[C];
#pragma GCC unroll 16
  for (int i = 0; i < C; i++) row[i] = load(x + size_t(i) * ld);
#pragma GCC unroll 16
  for (int i = 0; i < C; i++)
#pragma GCC unroll 16
    for (int j = i + 1; j < C; j++) row[j] -= L[j * C + i] * row[i];
#pragma GCC unroll 16
  for (int i = 0; i < C; i++) store(x + size_t(i) * ld, row[i]);
}

// x := (I + L)^-T x
inline void substitute_back(const float* L, float* x, int ld) {
  vec row[C];
#pragma GCC unroll 16
  for (int i = 0; i < C; i++) row[i] = load(x + size_t(i) * ld);
#pragma GCC unroll 16
  for (int i = C - 1; i >= 0; i--)
#pragma GCC unroll 16
    for (int j = 0; j < i; j++) row[j] -= L[i * C + j] * row[i];
#pragma GCC unroll 16
  for (int i = 0; i < C; i++) store(x + size_t(i) * ld, row[i]);
}

struct Head {
  const Shape& s;
  const Tensors& t;
  Work& w;
  int64_t b, h, head;

  const float* key(int64_t n) const { return t.k + b * s.k[0] + h * s.k[1] + n * s.k[2]; }
  const float* value(int64_t n) const { return t.v + b * s.v[0] + h * s.v[1] + n * s.v[2]; }
  const float* query(int64_t r) const { return t.q + b * s.q[0] + h * s.q[1] + r * s.q[2]; }

  // Keys, values, gates and L of the chunk; from S: x and u. -> how many keys
  int solve(int64_t chunk) {
    const int64_t from = chunk * C;
    const int n = int(std::min<int64_t>(C, s.T - from));
    const float *la = t.log_alpha + head * s.T + from, *be = t.beta + head * s.T + from;
    float sum = 0;
    for (int64_t i = from + C; i < std::min(from + 2 * C, s.T); i++)  // the next chunk's
      for (int j = 0; j < w.d; j += 16) __builtin_prefetch(key(i) + j), __builtin_prefetch(value(i) + j);
    for (int i = 0; i < C; i++) {  // beyond the last key nothing is written: beta 0, alpha 1
      sum += i < n ? std::max(la[i], LEAST) : 0.0f;
      w.c[i] = sum, w.beta[i] = i < n ? be[i] : 0.0f;
      if (i < n) copy(w.K + size_t(i) * w.ldd, key(from + i), w.d), copy(w.V + size_t(i) * w.lde, value(from + i), w.e);
      else std::fill(w.K + size_t(i) * w.ldd, w.K + size_t(i + 1) * w.ldd, 0.0f), std::fill(w.V + size_t(i) * w.lde, w.V + size_t(i + 1) * w.lde, 0.0f);
    }
    for (int i = 0; i < C; i += V)
      store(w.grow + i, exponential(load(w.c + i))), store(w.fade + i, exponential(sum - load(w.c + i)));
    w.end = w.grow[C - 1];
    transpose([&](int i) { return w.K + size_t(i) * w.ldd; }, C, w.d, w.Kt, C);
    multiply(C, w.K, w.ldd, w.Kt, C, w.d, C, w.L, C);
    // Row n of D: what is left of each key after n of them, zero for those still to come.
    for (int i = 0; i < C; i++)
      for (int j = 0; j < C; j += V) {
        const vec left = exponential(least(w.c[i] - load(w.c + j), all(0.0f)));
        const vec decay = float(i - j) - COUNT < 0.0f ? all(0.0f) : left;
        store(w.D + (i + 1) * C + j, decay);
        store(w.L + i * C + j, load(w.L + i * C + j) * decay);
      }
    multiply(C, w.K, w.ldd, w.S, w.lde, w.d, w.lde, w.X, w.lde);
    for (int i = 0; i < C; i++)
      for (int e = 0; e < w.lde; e += V) {
        float* x = w.X + size_t(i) * w.lde + e;
        store(x, load(w.V + size_t(i) * w.lde + e) - w.grow[i] * load(x));
      }
    for (int i = 0; i < C; i++)  // the same L, of x in the place of u
      for (int j = 0; j < C; j += V) store(w.Lb + i * C + j, load(w.L + i * C + j) * load(w.beta + j));
    for (int e = 0; e < w.lde; e += V) substitute(w.Lb, w.X + e, w.lde);
    for (int i = 0; i < C; i++)
      for (int e = 0; e < w.lde; e += V) store(w.U + size_t(i) * w.lde + e, w.beta[i] * load(w.X + size_t(i) * w.lde + e));
    return n;
  }

  // Queries of the chunk, scaled, and P. -> how many
  int read(int64_t chunk) {
    const int from = s.first[chunk], rows = s.first[chunk + 1] - from;
    const float by = 1.0f / std::sqrt(float(w.d));
    if (chunk + 1 < s.chunks)
      for (int r = s.first[chunk + 1]; r < s.first[chunk + 2]; r++)
        for (int j = 0; j < w.d; j += 16) __builtin_prefetch(query(s.order[r]) + j);
    for (int r = 0; r < rows; r++) {
      copy(w.Q + size_t(r) * w.ldd, query(s.order[from + r]), w.d);
      scale(w.Q + size_t(r) * w.ldd, by, w.ldd);
    }
    multiply(rows, w.Q, w.ldd, w.Kt, C, w.d, C, w.P, C);
    for (int r = 0; r < rows; r++) {
      const int n = s.upto[from + r];
      w.up[r] = n ? w.grow[n - 1] : 1.0f;
      times(w.P + size_t(r) * C, w.D + n * C, C);
    }
    return rows;
  }

  // Key by key, as the recurrence: no more work than by chunks, and the memory stays in the cache
  void forward() {
    transpose([&](int e) { return t.state + (head * w.e + e) * w.d; }, w.e, w.d, w.S, w.lde);
    const float by = 1.0f / std::sqrt(float(w.d));
    // Prefetch the next chunk's tokens (beyond the last key mostly another head begins) and the next head's memory, a
    // little with each token.
    const int64_t size = int64_t(w.d) * w.e, share = (size / std::min<int64_t>(C, s.T) + 15) / 16 * 16;
    int64_t near = (head + 1) * size;
    const int64_t far = near + size;
    over_columns(w.d, w.e, w.lde, w.S, [&](auto& memory, int from) {
      constexpr int WIDTH = sizeof(memory.wrote) / sizeof(float);
      for (int64_t chunk = 0; chunk < s.chunks; chunk++) {
        if (t.saved) {
          memory.settle();
          float* to = t.saved + (head * s.chunks + chunk) * w.d * w.lde + from;
          for (int j = 0; j < w.d; j++) std::memcpy(to + size_t(j) * w.lde, memory.state + size_t(j) * w.lde, sizeof memory.wrote);
        }
        const int64_t first = chunk * C;
        const int n = int(std::min<int64_t>(C, s.T - first)), last = s.first[chunk + 1];
        const float *la = t.log_alpha + head * s.T + first, *be = t.beta + head * s.T + first;
        for (int i = 0; i < n; i += V) store(w.c + i, exponential(load(la + i, n - i)));
        int r = s.first[chunk];  // the reads come in the order of time
        auto output = [&](int r) { return t.out + (head * s.R + s.order[r]) * w.e + from; };
        for (int i = 0; i <= n; i++) {
          int to = r;
          while (to < last && s.upto[to] == i) to++;
          if (i) {
            for (int j = 0; j < w.d; j += 16) {
              const int64_t next = first + i - 1 + C;
              __builtin_prefetch(key(next) + j), __builtin_prefetch(value(next) + j), __builtin_prefetch(query(next) + j);
              __builtin_prefetch(t.out + (head * s.R + next) * w.e + j, 1);
            }
            for (const int64_t to = std::min(near + share, far); near < to; near += 16)
              __builtin_prefetch(t.state + near), __builtin_prefetch(t.final + near, 1);
            const bool one = to == r + 1;
            memory.write(key(first + i - 1), value(first + i - 1) + from, w.c[i - 1], be[i - 1], one ? query(s.order[r]) : nullptr, by, one ? output(r) : nullptr);
            if (one) r = to;
          }
          if (r == to) continue;
          memory.settle();
          for (int x = r; x < to; x++)
            for (int j = 0; j < w.d; j += V) store(w.Q + size_t(x - r) * w.ldd + j, by * load(query(s.order[x]) + j, w.d - j));
          multiply(to - r, w.Q, w.ldd, memory.state, w.lde, w.d, WIDTH, w.O, w.lde);
          for (int x = r; x < to; x++) copy(output(x), w.O + size_t(x - r) * w.lde, std::min(WIDTH, w.e - from));
          r = to;
        }
      }
    });
    transpose([&](int j) { return w.S + size_t(j) * w.lde; }, w.d, w.e, t.final + head * w.e * w.d, w.d);
  }

  void backward() {
    std::fill(w.dS, w.dS + size_t(w.d) * w.lde, 0.0f);
    if (t.dfinal) transpose([&](int e) { return t.dfinal + (head * w.e + e) * w.d; }, w.e, w.d, w.dS, w.lde);
    for (int64_t chunk = s.chunks - 1; chunk >= 0; chunk--) {
      std::memcpy(w.S, t.saved + (head * s.chunks + chunk) * w.d * w.lde, size_t(w.d) * w.lde * sizeof(float));
      const int n = solve(chunk), rows = read(chunk), from = s.first[chunk];
      transpose([&](int i) { return w.U + size_t(i) * w.lde; }, C, w.e, w.Ut, C);
      transpose([&](int j) { return w.S + size_t(j) * w.lde; }, w.d, w.e, w.St, w.ldd);
      transpose([&](int j) { return w.dS + size_t(j) * w.lde; }, w.d, w.e, w.dSt, w.ldd);
      for (int r = 0; r < rows; r++) {
        float* o = w.dO + size_t(r) * w.lde;
        if (t.dout) copy(o, t.dout + (head * s.R + s.order[from + r]) * w.e, w.e);
        else std::fill(o, o + w.lde, 0.0f);
      }
      values_backward(chunk, n, rows, from);
      keys_backward();
      if (rows) queries_backward(rows, from);
      for (int i = 0; i < n; i++) copy(t.dk + (head * s.T + chunk * C + i) * w.d, w.dK + size_t(i) * w.ldd, w.d);
    }
    transpose([&](int j) { return w.dS + size_t(j) * w.lde; }, w.d, w.e, t.dstate + head * w.e * w.d, w.d);
  }

  // dX, and with it the gradients of the values and of both gates.
  void values_backward(int64_t chunk, int n, int rows, int from) {
    // dlog alpha of a key: the loss of everything later through the memory before it, summed from the chunk's end back
    float gain[C + 1] = {};
    for (int r = 0; r < rows; r++)
      if (const int upto = s.upto[from + r])
        gain[upto - 1] += dot(w.dO + size_t(r) * w.lde, t.out + (head * s.R + s.order[from + r]) * w.e, w.e);
    // x: through the outputs, the memory after the chunk, and later x
    multiply(C, w.K, w.ldd, w.dS, w.lde, w.d, w.lde, w.dX, w.lde);
    gain[C] = w.end * dot(w.S, w.dS, w.d * w.lde);
    for (int i = 0; i < C; i++) scale(w.dX + size_t(i) * w.lde, w.fade[i], w.lde);
    for (int i = 0; i < C; i++) gain[C] += dot(w.U + size_t(i) * w.lde, w.dX + size_t(i) * w.lde, w.e);
    if (rows) {
      transpose([&](int r) { return w.P + size_t(r) * C; }, rows, C, w.Pt, w.ldr);
      multiply<true>(C, w.Pt, w.ldr, w.dO, w.lde, rows, w.lde, w.dX, w.lde);
    }
    for (int i = 0; i < C; i++)
      for (int j = 0; j < C; j += V) store(w.Lb + i * C + j, w.beta[i] * load(w.L + i * C + j));
    for (int e = 0; e < w.lde; e += V) substitute_back(w.Lb, w.dX + e, w.lde);
    for (int i = 0; i < C; i++) {
      float* dx = w.dX + size_t(i) * w.lde;
      if (i < n) t.dbeta[head * s.T + chunk * C + i] = dot(dx, w.X + size_t(i) * w.lde, w.e);
      scale(dx, w.beta[i], w.lde);
    }
    float later = gain[C];
    for (int i = C - 1; i >= 0; i--) {
      const float* dx = w.dX + size_t(i) * w.lde;
      later += gain[i] - dot(dx, w.V + size_t(i) * w.lde, w.e);
      if (i >= n) continue;
      t.dlog_alpha[head * s.T + chunk * C + i] = later;
      copy(t.dv + (head * s.T + chunk * C + i) * w.e, dx, w.e);
    }
  }

  // dK without the queries' part, and dS at the chunk's start.
  void keys_backward() {
    // through the memory after the chunk, ...
    multiply(C, w.U, w.lde, w.dSt, w.ldd, w.e, w.ldd, w.dK, w.ldd);
    for (int i = 0; i < C; i++) scale(w.dK + size_t(i) * w.ldd, w.fade[i], w.ldd);
    // ... through L, both ways, ...
    float* dL = w.dL;
    multiply(C, w.dX, w.lde, w.Ut, C, w.e, C, dL, C);
    for (int i = 0; i < C; i++) times(dL + i * C, w.D + (i + 1) * C, C), scale(dL + i * C, -1.0f, C), dL[i * C + i] = 0.0f;
    transpose([&](int i) { return dL + size_t(i) * C; }, C, C, dL + C * C, C);
    for (int i = 0; i < C * C; i += V) store(dL + i, load(dL + i) + load(dL + C * C + i));
    multiply<true>(C, dL, C, w.K, w.ldd, C, w.ldd, w.dK, w.ldd);
    // ... and through the memory before the chunk, which x reads
    for (int i = 0; i < C; i++) scale(w.dX + size_t(i) * w.lde, -w.grow[i], w.lde);
    multiply<true>(C, w.dX, w.lde, w.St, w.ldd, w.e, w.ldd, w.dK, w.ldd);
    scale(w.dS, w.end, w.d * w.lde);
    multiply<true>(w.d, w.Kt, C, w.dX, w.lde, C, w.lde, w.dS, w.lde);
  }

  // dQ, and the queries' part of dK and dS.
  void queries_backward(int rows, int from) {
    multiply(rows, w.dO, w.lde, w.Ut, C, w.e, C, w.dP, C);
    for (int r = 0; r < rows; r++) {
      times(w.dP + size_t(r) * C, w.D + s.upto[from + r] * C, C);
      scale(w.dO + size_t(r) * w.lde, w.up[r], w.lde);
    }
    multiply(rows, w.dO, w.lde, w.St, w.ldd, w.e, w.ldd, w.dQ, w.ldd);
    multiply<true>(rows, w.dP, C, w.K, w.ldd, C, w.ldd, w.dQ, w.ldd);
    transpose([&](int r) { return w.dP + size_t(r) * C; }, rows, C, w.Pt, w.ldr);
    multiply<true>(C, w.Pt, w.ldr, w.Q, w.ldd, rows, w.ldd, w.dK, w.ldd);
    transpose([&](int r) { return w.Q + size_t(r) * w.ldd; }, rows, w.d, w.Qt, w.ldr);
    multiply<true>(w.d, w.Qt, w.ldr, w.dO, w.lde, rows, w.lde, w.dS, w.lde);
    const float by = 1.0f / std::sqrt(float(w.d));
    for (int r = 0; r < rows; r++) {
      scale(w.dQ + size_t(r) * w.ldd, by, w.ldd);
      copy(t.dq + (head * s.R + s.order[from + r]) * w.d, w.dQ + size_t(r) * w.ldd, w.d);
    }
  }
};

int most_reads(const Shape& s) {  // after any chunk
  int most = 0;
  for (int64_t chunk = 0; chunk < s.chunks; chunk++) most = std::max(most, s.first[chunk + 1] - s.first[chunk]);
  return most;
}

}  // namespace
