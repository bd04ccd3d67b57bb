// The gated delta rule for all heads, and a G layer's whole mixing of one dream's head at a time.

#include "delta_rule.h"

namespace {

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

  // Unit queries and keys, values, and the gates
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

  // The attention weights among the tokens of the chunk at token `from`: softmax(sqrt(d) q k^T)
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
        for (int j = 0; j < own; j++) add_scaled(line, v + size_t(first + j) * d, p[j]);
      }
      copy(to, line, d);
    }
  }

  void add_scaled(float* to, const float* x, float by) const {
    for (int i = 0; i < d; i += V) store(to + i, load(to + i, d - i) + by * load(x + i, d - i), d - i);
  }

  void backward(int64_t b, int64_t h, Work& w) {
    prepare(b, h);
    for (int n = int(m.skip); n < N; n++) {  // through the norm of the memory's output
      const float *dy = row(m.dout_world, m.dout_action, inner, inner, b, n) + h * d, *o = t.out + (n - m.skip) * d;
      float* to = dout + (n - m.skip) * d;
      const float root = std::sqrt(float(d));
      for (int i = 0; i < d; i++) line[i] = o[i] * root;
      normalise_back(Norm{d}, 1e-2f, line, dy, to, nullptr, nullptr);
      for (int i = 0; i < d; i++) to[i] *= root;
    }
    std::fill(dq, dq + size_t(N) * d, 0.0f), std::fill(dk, dk + size_t(N) * d, 0.0f), std::fill(dv, dv + size_t(N) * d, 0.0f);
    if (s.chunks) Head{s, t, w, 0, 0, 0}.backward();
    for (int from = cut; from < N; from += own) {  // through the attention within the chunks
      weigh(from);
      const float by = std::sqrt(float(d));
      for (int i = 0; i < own; i++) {
        const float* dy = row(m.dout_world, m.dout_action, inner, inner, b, from + i) + h * d;
        float *p = scores + size_t(i) * lds, *dp = dscores + size_t(i) * lds, mean = 0;
        for (int j = 0; j < own; j++) dp[j] = dot(dy, v + size_t(from + j) * d, d), mean += dp[j] * p[j];
        for (int j = 0; j < own; j++) {
          const float score = by * p[j] * (dp[j] - mean);
          add_scaled(dv + size_t(from + j) * d, dy, p[j]);
          add_scaled(dq + size_t(from + i) * d, k + size_t(from + j) * d, score);
          add_scaled(dk + size_t(from + j) * d, q + size_t(from + i) * d, score);
        }
      }
    }
    const float rate = std::exp(m.log_rate[h]);
    for (int n = 0; n < N; n++) {
      float* to = row(m.dworld, m.daction, 3 * inner, 3 * inner, b, n) + h * d;
      to_unit_backward(to, dq + size_t(n) * d, q + size_t(n) * d, lq[n]);
      to_unit_backward(to + inner, dk + size_t(n) * d, k + size_t(n) * d, lk[n]);
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

  void to_unit_backward(float* to, const float* given, const float* unit, float length) const {
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
