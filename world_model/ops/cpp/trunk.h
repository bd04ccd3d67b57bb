// One pass of a tile of dreams through the layers: transformer.py's Trunk onto a memory that exists.
#pragma once

#include "weights.h"

namespace {

struct Call {
  int64_t batch, frames;  // B, and K or T
  int steps;              // Euler steps
  const float* grid;      // [steps+1]
  const int64_t* age;
  const float *obs, *before, *actions, *noise;  // [B,O], [B,O] or null, [B,F,A], [B,F,O] or null
  const float* seen;                            // [B,F,O], evidence
  const float* const* memory;                   // a layer's tensors in the order of its letter
  float* const* written;
  float *obs_out, *reward;  // [B,F,O], [B,F]
  uint8_t* terminated;
  float *last, *before_out;  // [B,O]
  int64_t* age_out;
};

struct Tokens {  // where one pass keeps its projections
  float *keys, *queries, *gates;
  int ld_keys, ld_queries, ld_gates;
};

const float* memory_of(const Model& m, const float* const* tensors, int layer, int which) {
  int at = 0;
  for (int i = 0; i < layer; i++) at += m.layers[i].letter == 'G' ? 1 : 2;
  return tensors[at + which];
}

void project(const Layer& l, const Stream& s, int rows, const float* x, int ldx, float* normed, Tokens& t, bool queries,
             bool gates, int inner) {
  normalise(s.norm, 1e-5f, rows, x, ldx, normed, ldx);
  linear(s.keys, rows, normed, ldx, t.keys, t.ld_keys);
  if (queries) {
    linear(s.queries, rows, normed, ldx, t.queries, t.ld_queries);
    if (s.hidden)
      for (int r = 0; r < rows; r++) {
        float* hidden = t.queries + size_t(r) * t.ld_queries + inner;
        silu(hidden, hidden, s.hidden);
      }
  }
  if (gates) {  // in place: alpha of each head, then beta
    linear(s.gates, rows, normed, ldx, t.gates, t.ld_gates);
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < int(l.rate.size()); j += V) {
        float* g = t.gates + size_t(r) * t.ld_gates + j;
        const vec x = load(g), rate = load(l.rate.data() + j), e = exponential(x);
        const vec alpha = exponential(-rate * (x > 15.0f ? x : logarithm(1.0f + e)));
        store(g, rate >= 0.0f ? alpha : x > 15.0f ? all(1.0f) : e / (1.0f + e));
      }
  }
}

// Softmax attention of one dream's head: queries [rows,d] of a sight's frames, `per` each, become what they are answered
// over keys^T [d,ld] and the values at `value`; the slots below `dead` were never written.
void attend(const Sight& s, int head, int per, float* q, int ldq, int d, const float* keys, const float* const* value,
            int dead, float scale, float* scores) {
  const int rows = (s.to - s.from) * per, count = int(s.slots.size());
  multiply(rows, q, ldq, keys, s.ld, d, s.ld, scores, s.ld);
  for (int r = 0; r < rows; r++) {
    float* x = scores + size_t(r) * s.ld;
    const float* b = s.bias.data() + (size_t(head) * (s.to - s.from) + r / per) * s.ld;
    for (int j = 0; j < s.ld; j += V) store(x + j, load(x + j) * scale + load(b + j));
    for (int j = 0; j < count && s.slots[j] < dead; j++) x[j] = NEVER;
    softmax(x, s.ld);
  }
  blend<4>(rows, scores, s.ld, value, count, d, q, ldq);
}

struct Pass {
  int dreams, frames;
  int64_t first;  // of the dreams, in the call
  bool noisy;
  const Call* call;
};

size_t pass_room(const Model& m, int rows) {  // rows: frames of all dreams of a tile
  size_t most_keys = 0, group = m.group();
  for (const Layer& l : m.layers) most_keys = std::max<size_t>(most_keys, m.keys(l, m.K));
  const size_t ldk = pad(most_keys), ldv = panels(m.d) * PANEL;
  const size_t width = pad(std::max(m.D, m.Da)), token = rows * group;
  size_t own = token * (width + panels(2 * m.inner()) * PANEL + panels(2 * m.H) * PANEL +
                        panels(m.inner() + m.expand * std::max(m.D, m.Da)) * PANEL + PANEL);
  size_t heads = pad(m.d) * ldk + m.K * group * (ldk + ldv) + ldv * size_t(pad(m.d));
  return own + heads + size_t(64) * V;
}

// One pass over the layers: noisy chunks onto the memory, or clean frames, which are written to it.
// world [dreams*frames*P, ld], action [dreams*frames, ld]; as after the last layer, where the noisy world is left.
void trunk(const Model& m, const Pass& p, float* world, int ldw, float* action, int lda, Arena a) {
  const int group = m.group(), d = m.d, inner = m.inner(), F = p.frames, N = F * group;
  const int rows_w = p.dreams * F * m.P, rows_a = p.dreams * F;
  const int ldk2 = panels(2 * inner) * PANEL, ldg = panels(2 * m.H) * PANEL, ldv = panels(d) * PANEL;
  const int ldq_w = panels(inner + m.expand * m.D) * PANEL, ldq_a = panels(inner + m.expand * m.Da) * PANEL;
  int most_keys = 0;
  for (const Layer& l : m.layers) most_keys = std::max(most_keys, m.keys(l, F));
  const int most_ld = pad(most_keys);
  float* normed = a.take(size_t(std::max(rows_w * ldw, rows_a * lda)));
  Tokens w{a.take(size_t(rows_w) * ldk2), a.take(size_t(rows_w) * ldq_w), a.take(size_t(rows_w) * ldg), ldk2, ldq_w, ldg};
  Tokens t{a.take(size_t(rows_a) * ldk2), a.take(size_t(rows_a) * ldq_a), a.take(size_t(rows_a) * ldg), ldk2, ldq_a, ldg};
  float* keys = a.take(size_t(pad(d)) * most_ld);
  float* scores = a.take(size_t(N) * most_ld);
  float* told = a.take(size_t(N) * ldv);
  float* state = a.take(size_t(pad(d)) * ldv);
  std::vector<float*> key(N);  // where each token's keys [inner] and values [inner] are
  std::vector<const float*> seen(most_keys), value(most_keys);

  for (int i = 0; i < m.L; i++) {
    const Layer& l = m.layers[i];
    const bool G = l.letter == 'G', ask_w = p.noisy || !l.last, ask_a = !l.last, gates = G && !p.noisy;
    project(l, l.world, rows_w, world, ldw, normed, w, ask_w, gates, inner);
    project(l, l.action, rows_a, action, lda, normed, t, ask_a, gates, inner);
    const int past = l.past * group;
    for (int b = 0; b < p.dreams; b++) {
      const int64_t row = p.first + b;
      for (int f = 0, n = 0; f < F; f++) {
        for (int g = 0; g < m.P; g++) key[n++] = w.keys + size_t((b * F + f) * m.P + g) * ldk2;
        key[n++] = t.keys + size_t(b * F + f) * ldk2;
      }
      float* ask_world = w.queries + size_t(b) * F * m.P * ldq_w;
      float* ask_action = t.queries + size_t(b) * F * ldq_a;
      for (int h = 0; h < m.H; h++) {
        float *qw = ask_world + h * d, *qa = ask_action + h * d;
        if (b + 1 < p.dreams)  // the next dream's memory is on its way while this one's is used
          for (int which = 0; which < (G ? 1 : 2); which++) {
            const size_t size = size_t(G ? d : past) * d;
            const float* next = memory_of(m, p.call->memory, i, which) + ((row + 1) * m.H + h) * size;
            for (size_t at = 0; at < size; at += 16) __builtin_prefetch(next + at);
          }
        if (G) {
          for (int n = 0; n < N; n++) to_unit(key[n] + h * d, key[n] + h * d, d);
          if (ask_w) for (int r = 0; r < F * m.P; r++) to_unit(qw + size_t(r) * ldq_w, qw + size_t(r) * ldq_w, d);
          if (ask_a) for (int r = 0; r < F; r++) to_unit(qa + size_t(r) * ldq_a, qa + size_t(r) * ldq_a, d);
          const float* old = memory_of(m, p.call->memory, i, 0) + (row * m.H + h) * d * d;  // [e,d]
          if (ldv != d) std::fill(state, state + size_t(d) * ldv, 0.0f);
          transpose([=](int e) { return old + size_t(e) * d; }, d, d, state, ldv);
          if (!p.noisy) {
            auto query = [&](int n) { return token(qw, qa, ldq_w, ldq_a, F, m.P, 0, n); };
            auto asks = [&](int n) { return n % group < m.P ? ask_w : ask_a; };
            over_columns(d, d, ldv, state, [&](auto& memory, int from) {
              for (int n = 0; n < N; n++) {
                const float *k = key[n] + h * d, *gate = token(w.gates, t.gates, ldg, ldg, F, m.P, b, n);
                memory.write(k, k + inner + from, gate[h], gate[m.H + h], asks(n) ? query(n) : nullptr, 1.0f,
                             told + size_t(n) * ldv + from);
              }
            });
            for (int n = 0; n < N; n++)
              if (asks(n)) normalise(Norm{d}, 1e-2f, 1, told + size_t(n) * ldv, ldv, query(n), ldv);
            float* to = const_cast<float*>(memory_of(m, p.call->written, i, 0)) + (row * m.H + h) * d * d;
            transpose([=](int j) { return state + size_t(j) * ldv; }, d, d, to, d);
            continue;
          }
        }
        if (!ask_w) continue;  // nobody asks: what is written is all
        const float *old_k = nullptr, *old_v = nullptr;
        if (!G) {
          old_k = memory_of(m, p.call->memory, i, 0) + (row * m.H + h) * int64_t(past) * d;
          old_v = memory_of(m, p.call->memory, i, 1) + (row * m.H + h) * int64_t(past) * d;
        }
        const int dead = G ? 0 : int(std::clamp<int64_t>(l.past - p.call->age[row], 0, l.past)) * group;
        const float scale = G ? std::sqrt(float(d)) : 1.0f / std::sqrt(float(d));
        if (G) {  // what the memory answers, before the queries become what the chunk itself answers
          auto recall = [&](int rows, const float* q, int ldq, float* to) {
            multiply(rows, q, ldq, state, ldv, d, ldv, to, ldv);
            normalise(Norm{d}, 1e-2f, rows, to, ldv, to, ldv);
          };
          recall(F * m.P, qw, ldq_w, told);
          if (ask_a) recall(F, qa, ldq_a, told + size_t(F) * m.P * ldv);
        }
        for (const Sight& s : (p.noisy ? l.noisy : l.clean)[F]) {
          const int count = int(s.slots.size());
          for (int j = 0; j < count; j++) {
            const int slot = s.slots[j];
            seen[j] = slot < past ? old_k + size_t(slot) * d : key[slot - past] + h * d;
            value[j] = slot < past ? old_v + size_t(slot) * d : key[slot - past] + inner + h * d;
          }
          transpose<true>([&](int j) { return seen[j]; }, count, d, keys, s.ld);
          attend(s, h, m.P, qw + size_t(s.from) * m.P * ldq_w, ldq_w, d, keys, value.data(), dead, scale, scores);
          if (ask_a) attend(s, h, 1, qa + size_t(s.from) * ldq_a, ldq_a, d, keys, value.data(), dead, scale, scores);
        }
        if (G) {
          for (int r = 0; r < F * m.P; r++) add(qw + size_t(r) * ldq_w, told + size_t(r) * ldv, d);
          for (int r = 0; ask_a && r < F; r++) add(qa + size_t(r) * ldq_a, told + size_t(F * m.P + r) * ldv, d);
        }
      }
      if (!G && !p.noisy)
        for (int h = 0; h < m.H; h++)
          for (int which = 0; which < 2; which++) {
            const int64_t at = (row * m.H + h) * int64_t(past) * d;
            const float* old = memory_of(m, p.call->memory, i, which) + at;
            float* to = const_cast<float*>(memory_of(m, p.call->written, i, which)) + at;
            const int left = std::max(0, past - N);
            std::memcpy(to, old + int64_t(past - left) * d, size_t(left) * d * sizeof(float));
            for (int j = left; j < past; j++) copy(to + size_t(j) * d, key[N - past + j] + which * inner + h * d, d);
          }
    }
    if (ask_w) linear<true>(l.world.leave, rows_w, w.queries, ldq_w, world, ldw);
    if (ask_a) linear<true>(l.action.leave, rows_a, t.queries, ldq_a, action, lda);
  }
}

}  // namespace
