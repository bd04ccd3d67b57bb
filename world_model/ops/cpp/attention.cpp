// Softmax attention among the tokens of two streams with an additive bias, forward and backward, head by head.
//
// A frame's tokens are P of the world, then one action; queries, keys and values come as [B,F,P,3*inner] and
// [B,F,1,3*inner], and so does the heads' output, [.., inner]. window_attention.py's `attend` is the reference.

#include "vectors.h"

namespace {

struct Attention {
  int64_t B, F, P, H, d, skip;  // the first `skip` tokens have no query
  int64_t ldw, lda;             // strides of the streams' rows
  float scale;
  const float *world, *action, *bias;  // bias [H,R,N], R = N - skip
  float *out_world, *out_action;       // [B,F,P,inner], [B,F,1,inner]; zeros where there is no query
  const float *dout_world, *dout_action;
  float *dworld, *daction, *dbias;  // [B,F,P,3*inner], ...
};

struct Heads {
  const Attention& s;
  int N, R, d, ldd, ldn, inner, group;
  float *bias, *q, *k, *v, *kt, *vt, *scores, *o, *dmixed, *dscores, *dq, *dk, *dv, *dbias;

  explicit Heads(const Attention& s, bool back) : s(s) {
    group = int(s.P) + 1, N = int(s.F) * group, R = N - int(s.skip), d = int(s.d), inner = int(s.H) * d;
    ldd = pad(d), ldn = pad(N);
    const size_t rows = size_t(N) * ldd, square = size_t(R) * ldn;
    Arena a = room.open(square * (back ? 5 : 2) + rows * (back ? 8 : 4) + 2 * size_t(d) * ldn + 64 * V);
    auto take = [&](size_t n) { float* p = a.take(n); std::fill(p, p + n, 0.0f); return p; };
    bias = take(square), scores = take(square);
    q = take(rows), k = take(rows), v = take(rows), o = take(rows), kt = take(size_t(d) * ldn), vt = take(size_t(d) * ldn);
    if (back) dscores = take(square), dbias = take(square), dmixed = take(rows), dq = take(rows), dk = take(rows), dv = take(rows);
  }

  template <class T>
  T* row(T* world, T* action, int64_t ldw, int64_t lda, int64_t b, int n) const {
    return token(world, action, ldw, lda, s.F, s.P, b, n);
  }

  void begin(int64_t h) {
    for (int r = 0; r < R; r++)
      for (int j = 0; j < ldn; j++) bias[size_t(r) * ldn + j] = j < N ? s.bias[(h * R + r) * N + j] : NEVER;
  }

  // Queries, keys and values of a head, and the weights of its attention
  void weigh(int64_t b, int64_t h) {
    for (int n = 0; n < N; n++) {
      const float* x = row(s.world, s.action, s.ldw, s.lda, b, n) + h * d;
      if (n >= s.skip) {
        float* to = q + size_t(n - s.skip) * ldd;
        for (int i = 0; i < d; i += V) store(to + i, s.scale * load(x + i, d - i));
      }
      copy(k + size_t(n) * ldd, x + inner, d), copy(v + size_t(n) * ldd, x + 2 * inner, d);
    }
    transpose([&](int n) { return k + size_t(n) * ldd; }, N, d, kt, ldn);
    multiply(R, q, ldd, kt, ldn, d, ldn, scores, ldn);
    for (int r = 0; r < R; r++) {
      float *x = scores + size_t(r) * ldn, *b = bias + size_t(r) * ldn;
      for (int j = 0; j < ldn; j += V) store(x + j, load(x + j) + load(b + j));
      softmax(x, ldn);
    }
  }

  void forward(int64_t b, int64_t h) {
    weigh(b, h);
    multiply(R, scores, ldn, v, ldd, N, ldd, o, ldd);
    for (int n = 0; n < N; n++) {
      float* to = row(s.out_world, s.out_action, inner, inner, b, n) + h * d;
      if (n >= s.skip) copy(to, o + size_t(n - s.skip) * ldd, d);
      else std::fill(to, to + d, 0.0f);
    }
  }

  void backward(int64_t b, int64_t h) {
    weigh(b, h);
    for (int n = int(s.skip); n < N; n++)
      copy(dmixed + size_t(n - s.skip) * ldd, row(s.dout_world, s.dout_action, inner, inner, b, n) + h * d, d);
    transpose([&](int n) { return v + size_t(n) * ldd; }, N, d, vt, ldn);
    multiply(R, dmixed, ldd, vt, ldn, d, ldn, dscores, ldn);
    for (int r = 0; r < R; r++) {
      float *x = dscores + size_t(r) * ldn, *p = scores + size_t(r) * ldn, *gain = dbias + size_t(r) * ldn;
      const float mean = dot(x, p, ldn);
      for (int j = 0; j < ldn; j += V) {
        const vec a = load(p + j) * (load(x + j) - mean);
        store(x + j, a), store(gain + j, load(gain + j) + a);
      }
    }
    multiply(R, dscores, ldn, k, ldd, N, ldd, dq, ldd);
    multiply<false, true>(N, dscores, ldn, q, ldd, R, ldd, dk, ldd);
    multiply<false, true>(N, scores, ldn, dmixed, ldd, R, ldd, dv, ldd);
    for (int n = 0; n < N; n++) {
      float* to = row(s.dworld, s.daction, 3 * inner, 3 * inner, b, n) + h * d;
      if (n >= s.skip)
        for (int i = 0; i < d; i += V) store(to + i, s.scale * load(dq + size_t(n - s.skip) * ldd + i), d - i);
      else std::fill(to, to + d, 0.0f);
      copy(to + inner, dk + size_t(n) * ldd, d), copy(to + 2 * inner, dv + size_t(n) * ldd, d);
    }
  }

  void end(int64_t h) {
    for (int r = 0; r < R; r++) copy(s.dbias + (h * R + r) * N, dbias + size_t(r) * ldn, N);
    std::fill(dbias, dbias + size_t(R) * ldn, 0.0f);
  }
};

}  // namespace

extern "C" {

void attention_forward(const Attention* s) {
  Heads heads(*s, false);
  for (int64_t h = 0; h < s->H; h++) {
    heads.begin(h);
    for (int64_t b = 0; b < s->B; b++) heads.forward(b, h);
  }
}

void attention_backward(const Attention* s) {
  Heads heads(*s, true);
  for (int64_t h = 0; h < s->H; h++) {
    heads.begin(h);
    for (int64_t b = 0; b < s->B; b++) heads.backward(b, h);
    heads.end(h);
  }
}

}
