// The weights of a WorldModel, packed for products, and its units; names and shapes are those of world_model.py.
#pragma once

#include "vectors.h"

namespace {

struct Stream {
  int width, hidden;  // hidden: 0 in the last layer of a stream that nothing reads afterwards
  Norm norm;
  Matrix keys, queries, gates, out_proj;  // keys and values; queries and feed-forward
};

struct Visible {  // the keys that the frames [from,to) see: of the buffer, then of the pass itself
  int from, to, ld;
  std::vector<int> slots;   // rising
  std::vector<float> bias;  // added to the scores [H,to-from,ld], -inf where a frame doesn't see a slot
};

struct Layer {
  char kind;
  bool last;
  int past, stride;
  Stream world, action;
  std::vector<float> rate;                       // G: exp(log_rate) [H], then -1
  std::vector<std::vector<Visible>> noisy, clean;  // by frames; of G the noisy chunk among itself alone
};

struct Gated { Norm norm; Matrix in_proj, out_proj; };

struct Model {
  int O, A, K, P, D, Da, H, d, expand, window, dilation, taps, L, draft, frames, W, blocks, terminates;
  Matrix clean_in, noisy_in, level_in, action_in, out, memory, reward_head[3];
  std::vector<float> place, begin;
  Norm features;
  std::vector<Layer> layers;
  Matrix draft_in, draft_out;
  std::vector<Gated> gated;
  // units; `error` [K,O]
  std::vector<float> obs_mean, obs_std, step_std, obs_low, obs_high, act_low, act_high, error;
  float reward_mean, reward_std;
  std::vector<std::vector<float>> norm_weights;

  int group() const { return P + 1; }
  int inner() const { return H * d; }
  int keys(const Layer& l, int frames) const { return (l.past + frames) * group(); }
};

struct Reader {
  const float* const* tensors;
  const float* next() { return *tensors++; }
};

std::vector<float> copied(const float* p, int n, float beyond = 0.0f) {  // padded with `beyond` to a whole panel
  std::vector<float> x(p, p + n);
  x.resize(panels(n) * PANEL, beyond);
  return x;
}

Matrix read_linear(Reader& r, int in, int out) {
  const float* w = r.next();
  return packed(w, r.next(), in, 0, out);
}

Norm read_norm(Model& m, Reader& r, int n) {
  for (int i = 0; i < 2; i++) m.norm_weights.push_back(copied(r.next(), n));
  return Norm{n, nullptr, nullptr};
}

Stream read_stream(Model& m, Reader& r, int width, int hidden, bool gates, bool has_output) {
  Stream s;
  const int in = m.inner(), g = gates ? 2 * m.H : 0;
  s.width = width, s.hidden = hidden, s.norm = read_norm(m, r, width);
  const float *w = r.next(), *b = r.next();
  s.keys = packed(w, b, width, in, 3 * in);
  if (gates) s.gates = packed(w, b, width, 3 * in, 3 * in + g);
  // queries, then the feed-forward: one product, and later one operand
  std::vector<float> both(size_t(in + hidden) * width), bias(in + hidden);
  std::copy(w, w + size_t(in) * width, both.begin());
  std::copy(w + size_t(3 * in + g) * width, w + size_t(3 * in + g + hidden) * width, both.begin() + size_t(in) * width);
  std::copy(b, b + in, bias.begin());
  std::copy(b + 3 * in + g, b + 3 * in + g + hidden, bias.begin() + in);
  s.queries = packed(both.data(), bias.data(), width, 0, in + hidden);
  if (has_output) s.out_proj = read_linear(r, in + hidden, width);
  return s;
}

// What the queries of each frame see, and the bias of the scores: window_attention.py's `visible`, of a layer that mixes
// by attention or, where `offsets` is null, of a chunk among itself.
std::vector<Visible> visible(const Model& m, const Layer& l, const float* offsets, int frames, bool noisy) {
  const int group = m.group(), past = l.past, ahead = m.K - 1;
  auto sees = [&](int i, int slot) {
    const int time = slot / group - past, limit = noisy ? 0 : i, offset = i - time;
    const bool remembered = time < limit && offset <= past && offset % l.stride == 0;
    return remembered || (time >= 0 && (noisy || time == i));
  };
  auto seen_by = [&](int from, int to) {
    Visible s{from, to, 0, {}, {}};
    for (int slot = 0; slot < (past + frames) * group; slot++)
      for (int i = from; i < to; i++)
        if (sees(i, slot)) { s.slots.push_back(slot); break; }
    s.ld = pad(int(s.slots.size()));
    s.bias.assign(size_t(m.H) * (to - from) * s.ld, NEVER);
    for (int h = 0; h < m.H; h++)
      for (int i = from; i < to; i++)
        for (int j = 0; j < int(s.slots.size()); j++)
          if (sees(i, s.slots[j]))
            s.bias[(size_t(h) * (to - from) + i - from) * s.ld + j] =
                offsets ? offsets[size_t(h) * (past + m.K) + std::clamp(i - s.slots[j] / group + past + ahead, 0, past + ahead)] : 0.0f;
    return s;
  };
  std::vector<Visible> each, whole{seen_by(0, frames)};
  size_t separate = 0;
  for (int i = 0; i < frames; i++) each.push_back(seen_by(i, i + 1)), separate += each.back().ld;
  // Dilated taps differ from frame to frame: then attention by frame is less work than attention to the union.
  return 2 * separate <= size_t(frames) * whole[0].ld ? each : whole;
}

Layer read_layer(Model& m, Reader& r, char kind, bool last) {
  Layer l;
  l.kind = kind, l.last = last;
  const bool G = kind == 'G';
  l.stride = kind == 'D' ? m.dilation : 1;
  l.past = G ? 0 : kind == 'D' ? m.dilation * m.taps : m.window;
  l.world = read_stream(m, r, m.D, m.expand * m.D, G, true);
  l.action = read_stream(m, r, m.Da, last ? 0 : m.expand * m.Da, G, !last);
  const float* own = r.next();  // log_rate or the biases of offsets
  if (G) {
    l.rate.assign(pad(2 * m.H), -1.0f);
    for (int h = 0; h < m.H; h++) l.rate[h] = std::exp(own[h]);
  }
  l.noisy.resize(m.K + 1), l.clean.resize(m.K + 1);
  for (int f = 1; f <= m.K; f++) {
    l.noisy[f] = visible(m, l, G ? nullptr : own, f, true);
    if (!G) l.clean[f] = visible(m, l, own, f, false);
  }
  return l;
}

void read_draft(Model& m, Reader& r) {
  m.draft_in = read_linear(r, m.frames * m.O + m.A, m.W);
  for (int i = 0; i < m.blocks; i++) {
    Gated g;
    g.norm = read_norm(m, r, m.W), g.in_proj = read_linear(r, m.W, 2 * m.W), g.out_proj = read_linear(r, m.W, m.W);
    m.gated.push_back(std::move(g));
  }
  m.draft_out = read_linear(r, m.W, 2 * m.O);
}

void read_units(Model& m, Reader& r) {
  m.obs_mean = copied(r.next(), m.O), m.obs_std = copied(r.next(), m.O), m.step_std = copied(r.next(), m.O, 1.0f);
  m.obs_low = copied(r.next(), m.O), m.obs_high = copied(r.next(), m.O);
  m.act_low = copied(r.next(), m.A), m.act_high = copied(r.next(), m.A);
  m.reward_mean = *r.next(), m.reward_std = *r.next();
  for (const float *error = r.next(), *end = error + m.K * m.O; error < end; error += m.O) {
    std::vector<float> line = copied(error, m.O, 1.0f);
    m.error.insert(m.error.end(), line.begin(), line.end());
  }
  for (int j = 0; j < m.O; j++) {  // bounds in normalised units
    m.obs_low[j] = (m.obs_low[j] - m.obs_mean[j]) / m.obs_std[j];
    m.obs_high[j] = (m.obs_high[j] - m.obs_mean[j]) / m.obs_std[j];
  }
}

// Points the norms into `norm_weights`, which must not grow any more, in the order in which they were read.
void point_norms(Model& m) {
  size_t at = 0;
  auto point = [&](Norm& n) { n.weight = m.norm_weights[at].data(), n.bias = m.norm_weights[at + 1].data(), at += 2; };
  point(m.features);
  for (Layer& l : m.layers) point(l.world.norm), point(l.action.norm);
  for (Gated& g : m.gated) point(g.norm);
}

// sizes in the order of Model's first line; tensors in the order of compiled_step.py's _tensors
Model* read_model(const int32_t* sizes, const char* pattern, const float* const* tensors) {
  Model* m = new Model();
  std::memcpy(&m->O, sizes, 18 * sizeof(int32_t));
  Model& x = *m;
  Reader r{tensors};
  const int wide = x.P * x.D;
  x.clean_in = read_linear(r, x.O, wide), x.noisy_in = read_linear(r, 4 * x.O, wide), x.level_in = read_linear(r, 16, wide);
  x.place = copied(r.next(), x.K * wide);
  x.action_in = read_linear(r, x.A, x.Da), x.begin = copied(r.next(), x.Da);
  x.features = read_norm(x, r, wide), x.out = read_linear(r, wide, x.O);
  for (int i = 0; i < x.L; i++) x.layers.push_back(read_layer(x, r, pattern[i], i + 1 == x.L));
  x.memory = read_linear(r, wide, 2);
  x.reward_head[0] = read_linear(r, 3 * x.O + x.A, x.W), x.reward_head[1] = read_linear(r, x.W, x.W);
  x.reward_head[2] = read_linear(r, x.W, 2);
  if (x.draft) read_draft(x, r);
  read_units(x, r);
  point_norms(x);
  return m;
}

}  // namespace
