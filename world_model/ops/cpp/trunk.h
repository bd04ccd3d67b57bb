// One pass of a tile of dreams through the layers: transformer.py's Trunk on existing memories.
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
  const float* const* memory;                   // the layers' tensors: one of a G layer, two of the others
  float* const* written;
  float *obs_out, *reward;  // [B,F,O], [B,F]
  uint8_t* terminated;
  float *last, *before_out;  // [B,O]
  int64_t* age_out;
};

struct Tokens {  // the projections of one stream's tokens
  float *keys, *queries, *gates;
  int ld_keys, ld_queries, ld_gates;
};

const float* memory_of(const Model& m, const float* const* tensors, int layer, int which) {
  int at = 0;
  for (int i = 0; i < layer; i++) at += m.layers[i].kind == 'G' ? 1 : 2;
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

// Softmax attention of one dream's head over keys^T [d,ld] and the values at `value`: the output takes the place of the
// queries [rows,d] of the frames of `s`, `per` each. The slots below `dead` were never written.
void attend(const Visible& s, int head, int per, float* q, int ldq, int d, const float* keys, const float* const* value,
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

// One pass over the layers: noisy chunks on the memory, or clean frames, which are written to it.
struct Trunk {
  const Model& m;
  const Pass& p;
  const int group, d, inner, F, N, rows_w, rows_a, ldv;  // N: tokens of a dream; rows: tokens of all, by stream
  Tokens w{}, t{};                                       // of the world and of the action
  float *normed, *keys, *scores, *output, *state;        // output [N,ldv], state: a head's memory transposed
  std::vector<float*> key;                               // where each token's keys [inner] and values [inner] are
  std::vector<const float*> seen, value;                 // of each visible slot

  // ldw, lda: the strides of the streams
  Trunk(const Model& m, const Pass& p, int ldw, int lda, Arena& a)
      : m(m), p(p), group(m.group()), d(m.d), inner(m.inner()), F(p.frames), N(F * group),
        rows_w(p.dreams * F * m.P), rows_a(p.dreams * F), ldv(panels(d) * PANEL), key(N) {
    const int ldk = panels(2 * inner) * PANEL, ldg = panels(2 * m.H) * PANEL;
    const int ldq_w = panels(inner + m.expand * m.D) * PANEL, ldq_a = panels(inner + m.expand * m.Da) * PANEL;
    int most_keys = 0;
    for (const Layer& l : m.layers) most_keys = std::max(most_keys, m.keys(l, F));
    normed = a.take(size_t(std::max(rows_w * ldw, rows_a * lda)));
    auto take = [&](int rows, int ldq) {
      float *k = a.take(size_t(rows) * ldk), *q = a.take(size_t(rows) * ldq), *g = a.take(size_t(rows) * ldg);
      return Tokens{k, q, g, ldk, ldq, ldg};
    };
    w = take(rows_w, ldq_w), t = take(rows_a, ldq_a);
    keys = a.take(size_t(pad(d)) * pad(most_keys));
    scores = a.take(size_t(N) * pad(most_keys));
    output = a.take(size_t(N) * ldv);
    state = a.take(size_t(pad(d)) * ldv);
    seen.resize(most_keys), value.resize(most_keys);
  }

  // world [dreams*frames*P, ldw], action [dreams*frames, lda], in place. The last layer computes only what is used
  // afterwards: the noisy world.
  void run(float* world, int ldw, float* action, int lda) {
    for (int i = 0; i < m.L; i++) {
      const Layer& l = m.layers[i];
      const bool G = l.kind == 'G', query_w = queries_world(l), query_a = !l.last, gates = G && !p.noisy;
      project(l, l.world, rows_w, world, ldw, normed, w, query_w, gates, inner);
      project(l, l.action, rows_a, action, lda, normed, t, query_a, gates, inner);
      for (int b = 0; b < p.dreams; b++) {
        for (int f = 0, n = 0; f < F; f++) {
          for (int g = 0; g < m.P; g++) key[n++] = w.keys + size_t((b * F + f) * m.P + g) * w.ld_keys;
          key[n++] = t.keys + size_t(b * F + f) * t.ld_keys;
        }
        for (int h = 0; h < m.H; h++) mix(i, l, b, h);
        if (!G && !p.noisy) slide(i, l, b);
      }
      if (query_w) linear<true>(l.world.out_proj, rows_w, w.queries, w.ld_queries, world, ldw);
      if (query_a) linear<true>(l.action.out_proj, rows_a, t.queries, t.ld_queries, action, lda);
    }
  }

  bool queries_world(const Layer& l) const { return p.noisy || !l.last; }
  float* world_queries(int b, int h) const { return w.queries + size_t(b) * F * m.P * w.ld_queries + h * d; }
  float* action_queries(int b, int h) const { return t.queries + size_t(b) * F * t.ld_queries + h * d; }
  // A head's part of a layer's tensor [B,H,rows,d] in the call's old or new memory
  const float* old_of(int layer, int which, int64_t row, int h, int rows) const {
    return memory_of(m, p.call->memory, layer, which) + (row * m.H + h) * int64_t(rows) * d;
  }
  float* new_of(int layer, int which, int64_t row, int h, int rows) const {
    return const_cast<float*>(memory_of(m, p.call->written, layer, which)) + (row * m.H + h) * int64_t(rows) * d;
  }

  // One head of one dream: the mixed output takes the place of its queries.
  void mix(int i, const Layer& l, int b, int h) {
    const bool G = l.kind == 'G';
    const int rows = G ? d : l.past * group;
    const int64_t row = p.first + b;
    if (b + 1 < p.dreams)  // fetch the next dream's memory while this one's is used
      for (int which = 0; which < (G ? 1 : 2); which++) {
        const float* next = old_of(i, which, row + 1, h, rows);
        for (size_t at = 0; at < size_t(rows) * d; at += 16) __builtin_prefetch(next + at);
      }
    if (G) read_state(i, l, b, h);
    if (G && !p.noisy) return write_state(i, l, b, h);
    if (!queries_world(l)) return;
    if (!G) return attend_visible(l, b, h, old_of(i, 0, row, h, rows), old_of(i, 1, row, h, rows));
    // The memory's output first, since the chunk's own takes the place of the queries.
    float *qw = world_queries(b, h), *qa = action_queries(b, h);
    auto recall = [&](int rows, const float* q, int ldq, float* to) {
      multiply(rows, q, ldq, state, ldv, d, ldv, to, ldv);
      normalise(Norm{d}, 1e-2f, rows, to, ldv, to, ldv);
    };
    recall(F * m.P, qw, w.ld_queries, output);
    if (!l.last) recall(F, qa, t.ld_queries, output + size_t(F) * m.P * ldv);
    attend_visible(l, b, h, nullptr, nullptr);
    for (int r = 0; r < F * m.P; r++) add(qw + size_t(r) * w.ld_queries, output + size_t(r) * ldv, d);
    for (int r = 0; !l.last && r < F; r++) add(qa + size_t(r) * t.ld_queries, output + size_t(F * m.P + r) * ldv, d);
  }

  // G: keys and queries of length 1, and the memory transposed into `state`.
  void read_state(int i, const Layer& l, int b, int h) {
    float *qw = world_queries(b, h), *qa = action_queries(b, h);
    for (int n = 0; n < N; n++) to_unit(key[n] + h * d, key[n] + h * d, d);
    if (queries_world(l))
      for (int r = 0; r < F * m.P; r++) to_unit(qw + size_t(r) * w.ld_queries, qw + size_t(r) * w.ld_queries, d);
    if (!l.last)
      for (int r = 0; r < F; r++) to_unit(qa + size_t(r) * t.ld_queries, qa + size_t(r) * t.ld_queries, d);
    const float* old = old_of(i, 0, p.first + b, h, d);  // [e,d]
    if (ldv != d) std::fill(state, state + size_t(d) * ldv, 0.0f);
    transpose([=](int e) { return old + size_t(e) * d; }, d, d, state, ldv);
  }

  // G, clean frames: each token's key and value are written to the memory, which then answers its query.
  void write_state(int i, const Layer& l, int b, int h) {
    float *qw = world_queries(b, h), *qa = action_queries(b, h);
    const bool query_w = queries_world(l), query_a = !l.last;
    auto query = [&](int n) { return token(qw, qa, w.ld_queries, t.ld_queries, F, m.P, 0, n); };
    auto has_query = [&](int n) { return n % group < m.P ? query_w : query_a; };
    over_columns(d, d, ldv, state, [&](auto& memory, int from) {
      for (int n = 0; n < N; n++) {
        const float *k = key[n] + h * d, *gate = token(w.gates, t.gates, w.ld_gates, t.ld_gates, F, m.P, b, n);
        memory.write(k, k + inner + from, gate[h], gate[m.H + h], has_query(n) ? query(n) : nullptr, 1.0f,
                     output + size_t(n) * ldv + from);
      }
    });
    for (int n = 0; n < N; n++)
      if (has_query(n)) normalise(Norm{d}, 1e-2f, 1, output + size_t(n) * ldv, ldv, query(n), ldv);
    transpose([=](int j) { return state + size_t(j) * ldv; }, d, d, new_of(i, 0, p.first + b, h, d), d);
  }

  // Attention over the buffer's keys and values [past,d], null of a G layer, and those of the pass itself.
  void attend_visible(const Layer& l, int b, int h, const float* old_k, const float* old_v) {
    const bool G = l.kind == 'G';
    const int past = l.past * group;
    const int dead = G ? 0 : int(std::clamp<int64_t>(l.past - p.call->age[p.first + b], 0, l.past)) * group;
    const float scale = G ? std::sqrt(float(d)) : 1.0f / std::sqrt(float(d));
    for (const Visible& s : (p.noisy ? l.noisy : l.clean)[F]) {
      const int count = int(s.slots.size());
      for (int j = 0; j < count; j++) {
        const int slot = s.slots[j];
        seen[j] = slot < past ? old_k + size_t(slot) * d : key[slot - past] + h * d;
        value[j] = slot < past ? old_v + size_t(slot) * d : key[slot - past] + inner + h * d;
      }
      transpose<true>([&](int j) { return seen[j]; }, count, d, keys, s.ld);
      float* qw = world_queries(b, h) + size_t(s.from) * m.P * w.ld_queries;
      attend(s, h, m.P, qw, w.ld_queries, d, keys, value.data(), dead, scale, scores);
      float* qa = action_queries(b, h) + size_t(s.from) * t.ld_queries;
      if (!l.last) attend(s, h, 1, qa, t.ld_queries, d, keys, value.data(), dead, scale, scores);
    }
  }

  // S and D, clean frames: the buffers move on, and the frames' keys and values are appended.
  void slide(int i, const Layer& l, int b) {
    const int past = l.past * group, kept = std::max(0, past - N);
    for (int h = 0; h < m.H; h++)
      for (int which = 0; which < 2; which++) {
        const float* old = old_of(i, which, p.first + b, h, past);
        float* to = new_of(i, which, p.first + b, h, past);
        std::memcpy(to, old + int64_t(past - kept) * d, size_t(kept) * d * sizeof(float));
        for (int j = kept; j < past; j++) copy(to + size_t(j) * d, key[N - past + j] + which * inner + h * d, d);
      }
  }
};

}  // namespace
