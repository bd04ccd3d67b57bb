// The gated delta rule, forward and backward, on a CPU, head by head in the cache: forward as delta_rule.py's
// recurrence, backward by chunks.
//
// In a chunk of C keys, with c the running sum of log alpha from the chunk's start and S the memory [d,e] there:
//   L_ij = exp(c_i - c_j) k_i.k_j (j < i)     x_i = v_i - exp(c_i) S^T k_i - sum_j L_ij u_j     u_i = beta_i x_i
//   P_rj = exp(c_n - c_j) q_r.k_j (j < n)     o_r = exp(c_n) S^T q_r + sum_j P_rj u_j, after n keys
//   S' = exp(c_C) S + sum_j exp(c_C - c_j) k_j u_j^T
// Decays enter only as exp of differences that are <= 0. The backward pass has the memory at each chunk's start and
// computes the rest again.

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
  int ask(int64_t chunk) {
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

  // Key by key, as the recurrence stands: no more work than by chunks, and the memory stays in the cache
  void forward() {
    transpose([&](int e) { return t.state + (head * w.e + e) * w.d; }, w.e, w.d, w.S, w.lde);
    const float by = 1.0f / std::sqrt(float(w.d));
    // What comes next is on its way while this is used: the next chunk's tokens (beyond the last key mostly another head
    // begins) and the next head's memory, a little with each token.
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
        auto answer = [&](int r) { return t.out + (head * s.R + s.order[r]) * w.e + from; };
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
            memory.write(key(first + i - 1), value(first + i - 1) + from, w.c[i - 1], be[i - 1], one ? query(s.order[r]) : nullptr, by, one ? answer(r) : nullptr);
            if (one) r = to;
          }
          if (r == to) continue;
          memory.settle();
          for (int x = r; x < to; x++)
            for (int j = 0; j < w.d; j += V) store(w.Q + size_t(x - r) * w.ldd + j, by * load(query(s.order[x]) + j, w.d - j));
          multiply(to - r, w.Q, w.ldd, memory.state, w.lde, w.d, WIDTH, w.O, w.lde);
          for (int x = r; x < to; x++) copy(answer(x), w.O + size_t(x - r) * w.lde, std::min(WIDTH, w.e - from));
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
      const int n = solve(chunk), rows = ask(chunk), from = s.first[chunk];
      transpose([&](int i) { return w.U + size_t(i) * w.lde; }, C, w.e, w.Ut, C);
      transpose([&](int j) { return w.S + size_t(j) * w.lde; }, w.d, w.e, w.St, w.ldd);
      transpose([&](int j) { return w.dS + size_t(j) * w.lde; }, w.d, w.e, w.dSt, w.ldd);
      for (int r = 0; r < rows; r++) {
        float* o = w.dO + size_t(r) * w.lde;
        if (t.dout) copy(o, t.dout + (head * s.R + s.order[from + r]) * w.e, w.e);
        else std::fill(o, o + w.lde, 0.0f);
      }
      // dlog alpha of a key: what all later loss gains by the memory before it, summed from the chunk's end backwards
      float gain[C + 1] = {};
      for (int r = 0; r < rows; r++)
        if (const int upto = s.upto[from + r])
          gain[upto - 1] += dot(w.dO + size_t(r) * w.lde, t.out + (head * s.R + s.order[from + r]) * w.e, w.e);
      // x: through the answers, the memory after the chunk, and later x
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
      // keys: through the memory after the chunk, ...
      multiply(C, w.U, w.lde, w.dSt, w.ldd, w.e, w.ldd, w.dK, w.ldd);
      for (int i = 0; i < C; i++) scale(w.dK + size_t(i) * w.ldd, w.fade[i], w.ldd);
      // ... through L, both ways, ...
      float* dL = w.dL;
      multiply(C, w.dX, w.lde, w.Ut, C, w.e, C, dL, C);
      for (int i = 0; i < C; i++) times(dL + i * C, w.D + (i + 1) * C, C), scale(dL + i * C, -1.0f, C), dL[i * C + i] = 0.0f;
      transpose([&](int i) { return dL + size_t(i) * C; }, C, C, dL + C * C, C);
      for (int i = 0; i < C * C; i += V) store(dL + i, load(dL + i) + load(dL + C * C + i));
      multiply<true>(C, dL, C, w.K, w.ldd, C, w.ldd, w.dK, w.ldd);
      // ... and through what the memory before the chunk told them
      for (int i = 0; i < C; i++) scale(w.dX + size_t(i) * w.lde, -w.grow[i], w.lde);
      multiply<true>(C, w.dX, w.lde, w.St, w.ldd, w.e, w.ldd, w.dK, w.ldd);
      scale(w.dS, w.end, w.d * w.lde);
      multiply<true>(w.d, w.Kt, C, w.dX, w.lde, C, w.lde, w.dS, w.lde);
      if (rows) {  // queries
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
      for (int i = 0; i < n; i++) copy(t.dk + (head * s.T + chunk * C + i) * w.d, w.dK + size_t(i) * w.ldd, w.d);
    }
    transpose([&](int j) { return w.dS + size_t(j) * w.lde; }, w.d, w.e, t.dstate + head * w.e * w.d, w.d);
  }
};

int most_reads(const Shape& s) {  // after any chunk
  int most = 0;
  for (int64_t chunk = 0; chunk < s.chunks; chunk++) most = std::max(most, s.first[chunk + 1] - s.first[chunk]);
  return most;
}

template <class Run>
void heads(const Shape& s, const Tensors& t, int threads, Run run) {
  const int most = most_reads(s);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Arena a = room.open(work_room(s, most));
    Work w = work(s, most, a);
#pragma omp for
    for (int64_t head = 0; head < s.B * s.H; head++) {
      Head one{s, t, w, head / s.H, head % s.H, head};
      run(one);
    }
  }
}

// A G layer's whole mixing, of one dream's head at a time: delta_layer.py's delta_layer_torch of both streams' tokens.
struct Mix {
  int64_t B, F, P, H, d, clean, chunk, skip;  // the first `clean` frames are written; then come chunks of `chunk` frames
  int64_t ldw, lda, ldgw, ldga;               // strides of the rows of the streams and of their gates
  const float *world, *action, *gates_world, *gates_action;  // [B,F,P,3*inner], [B,F,1,3*inner], [B,F,P,2*H], ...
  const float *log_rate, *state;                             // [H], [B,H,d,d]
  float *out_world, *out_action, *final;                     // [B,F,P,inner], [B,F,1,inner], [B,H,d,d]
  float *out, *saved;                                        // [B,H,R,d], [B,H,chunks,d,ld]
  const float *dout_world, *dout_action, *dfinal;
  float *dworld, *daction, *dgates_world, *dgates_action, *dlog_rate, *dstate;
};

struct Mixer {
  const Mix& m;
  Shape s;
  Tensors t{};
  int N, cut, own, lds, group, inner, d;
  float *q, *k, *v, *lq, *lk, *log_alpha, *beta, *dq, *dk, *dv, *dlog_alpha, *dbeta, *dout, *scores, *dscores, *line;

  Mixer(const Mix& m, const Shape& reads, Arena& a) : m(m), s(reads) {
    group = int(m.P) + 1, N = int(m.F) * group, cut = int(m.clean) * group, own = int(m.chunk) * group;
    d = int(m.d), inner = int(m.H) * d;
    s.B = s.H = 1, s.T = cut, s.R = N - m.skip, s.d = s.e = d;
    for (int64_t* stride : {s.q, s.k, s.v}) stride[0] = stride[1] = 0, stride[2] = d;
    auto take = [&](size_t n) { return a.take(n); };
    q = take(size_t(N) * d), k = take(size_t(N) * d), v = take(size_t(N) * d), lq = take(N), lk = take(N);
    log_alpha = take(cut), beta = take(cut), dq = take(size_t(N) * d), dk = take(size_t(N) * d);
    dv = take(size_t(N) * d), dlog_alpha = take(cut), dbeta = take(cut), dout = take(size_t(N) * d);
    lds = pad(own), scores = take(size_t(own) * lds), dscores = take(size_t(own) * lds), line = take(d);
    t.q = q + m.skip * d, t.k = k, t.v = v, t.log_alpha = log_alpha, t.beta = beta;
    t.dq = dq + m.skip * d, t.dk = dk, t.dv = dv, t.dlog_alpha = dlog_alpha, t.dbeta = dbeta, t.dout = dout;
  }

  static size_t size(const Mix& m) {
    const size_t N = m.F * (m.P + 1), own = m.chunk * (m.P + 1);
    return 8 * N * m.d + 8 * N + 2 * own * pad(int(own)) + m.d + 32 * V;
  }

  template <class T>
  T* row(T* world, T* action, int64_t ldw, int64_t lda, int64_t b, int n) const {
    return token(world, action, ldw, lda, m.F, m.P, b, n);
  }

  // Unit queries and keys, values, and what the gates say
  void prepare(int64_t b, int64_t h) {
    const float rate = std::exp(m.log_rate[h]);
    for (int n = 0; n < N; n++) {
      const float* x = row(m.world, m.action, m.ldw, m.lda, b, n) + h * d;
      lq[n] = to_unit(x, q + size_t(n) * d, d), lk[n] = to_unit(x + inner, k + size_t(n) * d, d);
      copy(v + size_t(n) * d, x + 2 * inner, d);
      if (n >= cut) continue;
      const float* g = row(m.gates_world, m.gates_action, m.ldgw, m.ldga, b, n);
      log_alpha[n] = -rate * (g[h] > 20.0f ? g[h] : std::log1p(std::exp(g[h]))), beta[n] = 1.0f / (1.0f + std::exp(-g[m.H + h]));
    }
    const int64_t head = b * m.H + h;
    t.state = m.state + head * d * d, t.final = m.final + head * d * d, t.out = m.out + head * s.R * d;
    t.saved = m.saved ? m.saved + head * s.chunks * d * pad(d) : nullptr;
    t.dfinal = m.dfinal ? m.dfinal + head * d * d : nullptr, t.dstate = m.dstate ? m.dstate + head * d * d : nullptr;
  }

  // What the tokens of the chunk at token `from` are to each other: softmax(sqrt(d) q k^T)
  void weigh(int from) {
    const float by = std::sqrt(float(d));
    for (int i = 0; i < own; i++) {
      float* p = scores + size_t(i) * lds;
      for (int j = 0; j < own; j++) p[j] = by * dot(q + size_t(from + i) * d, k + size_t(from + j) * d, d);
      std::fill(p + own, p + lds, NEVER);
      softmax(p, lds);
    }
  }

  void forward(int64_t b, int64_t h, Work& w) {
    prepare(b, h);
    if (s.chunks) Head{s, t, w, 0, 0, 0}.forward();
    for (int n = 0; n < N; n++) {
      float* to = row(m.out_world, m.out_action, inner, inner, b, n) + h * d;
      if (n < m.skip) {
        std::fill(to, to + d, 0.0f);
        continue;
      }
      float* o = t.out + (n - m.skip) * d;
      for (int i = 0; i < d; i++) line[i] = o[i] * std::sqrt(float(d));
      normalise(Norm{d}, 1e-2f, 1, line, d, line, d);
      if (n >= cut && (n - cut) % own == 0) weigh(n);
      if (n >= cut) {
        const int first = cut + (n - cut) / own * own;
        const float* p = scores + size_t(n - first) * lds;
        for (int j = 0; j < own; j++) gain(line, v + size_t(first + j) * d, p[j]);
      }
      copy(to, line, d);
    }
  }

  void gain(float* to, const float* x, float by) const {
    for (int i = 0; i < d; i += V) store(to + i, load(to + i, d - i) + by * load(x + i, d - i), d - i);
  }

  void backward(int64_t b, int64_t h, Work& w) {
    prepare(b, h);
    for (int n = int(m.skip); n < N; n++) {  // through the norm of what the memory told
      const float *dy = row(m.dout_world, m.dout_action, inner, inner, b, n) + h * d, *o = t.out + (n - m.skip) * d;
      float* to = dout + (n - m.skip) * d;
      const float root = std::sqrt(float(d));
      for (int i = 0; i < d; i++) line[i] = o[i] * root;
      normalise_back(Norm{d}, 1e-2f, line, dy, to, nullptr, nullptr);
      for (int i = 0; i < d; i++) to[i] *= root;
    }
    std::fill(dq, dq + size_t(N) * d, 0.0f), std::fill(dk, dk + size_t(N) * d, 0.0f), std::fill(dv, dv + size_t(N) * d, 0.0f);
    if (s.chunks) Head{s, t, w, 0, 0, 0}.backward();
    for (int from = cut; from < N; from += own) {  // through what the chunks' tokens tell each other
      weigh(from);
      const float by = std::sqrt(float(d));
      for (int i = 0; i < own; i++) {
        const float* dy = row(m.dout_world, m.dout_action, inner, inner, b, from + i) + h * d;
        float *p = scores + size_t(i) * lds, *dp = dscores + size_t(i) * lds, mean = 0;
        for (int j = 0; j < own; j++) dp[j] = dot(dy, v + size_t(from + j) * d, d), mean += dp[j] * p[j];
        for (int j = 0; j < own; j++) {
          const float now = by * p[j] * (dp[j] - mean);
          gain(dv + size_t(from + j) * d, dy, p[j]);
          gain(dq + size_t(from + i) * d, k + size_t(from + j) * d, now);
          gain(dk + size_t(from + j) * d, q + size_t(from + i) * d, now);
        }
      }
    }
    const float rate = std::exp(m.log_rate[h]);
    for (int n = 0; n < N; n++) {
      float* to = row(m.dworld, m.daction, 3 * inner, 3 * inner, b, n) + h * d;
      back(to, dq + size_t(n) * d, q + size_t(n) * d, lq[n]), back(to + inner, dk + size_t(n) * d, k + size_t(n) * d, lk[n]);
      copy(to + 2 * inner, dv + size_t(n) * d, d);
      float* dg = row(m.dgates_world, m.dgates_action, 2 * m.H, 2 * m.H, b, n);
      if (n >= cut) {
        dg[h] = dg[m.H + h] = 0.0f;
        continue;
      }
      const float g = row(m.gates_world, m.gates_action, m.ldgw, m.ldga, b, n)[h];
      m.dlog_rate[h] += dlog_alpha[n] * log_alpha[n];
      dg[h] = -dlog_alpha[n] * rate / (1.0f + std::exp(-g)), dg[m.H + h] = dbeta[n] * beta[n] * (1.0f - beta[n]);
    }
  }

  void back(float* to, const float* given, const float* unit, float length) const {
    const float along = dot(given, unit, d);
    for (int i = 0; i < d; i += V)
      store(to + i, (load(given + i, d - i) - along * load(unit + i, d - i)) * (1.0f / length), d - i);
  }
};

template <class Run>
void mixers(const Mix& m, const Shape& reads, Run run) {
  const int most = most_reads(reads);
  Shape s = reads;
  s.d = s.e = m.d;
  Arena a = ::room.open(work_room(s, most) + Mixer::size(m));
  Work w = work(s, most, a);
  Mixer mixer(m, reads, a);
  for (int64_t b = 0; b < m.B; b++)
    for (int64_t h = 0; h < m.H; h++) run(mixer, b, h, w);
}

}  // namespace

extern "C" {

void delta_forward(const Shape* s, const Tensors* t, int threads) {
  heads(*s, *t, threads, [](Head& head) { head.forward(); });
}

void delta_backward(const Shape* s, const Tensors* t, int threads) {
  heads(*s, *t, threads, [](Head& head) { head.backward(); });
}

void mix_forward(const Mix* m, const Shape* reads) {
  mixers(*m, *reads, [](Mixer& x, int64_t b, int64_t h, Work& w) { x.forward(b, h, w); });
}

void mix_backward(const Mix* m, const Shape* reads) {
  std::fill(m->dlog_rate, m->dlog_rate + m->H, 0.0f);
  mixers(*m, *reads, [](Mixer& x, int64_t b, int64_t h, Work& w) { x.backward(b, h, w); });
}

}
