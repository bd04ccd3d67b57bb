// The weights of a WorldModel, packed for products, and its units; names and shapes are those of world_model.py.
#pragma once

#include "vectors.h"

namespace {

struct Stream {
  int width, hidden;  // hidden: 0 where this stream ends with what it writes
  Norm norm;
  Matrix keys, queries, gates, leave;  // keys and values; queries and feed-forward
};

struct Sight {  // what the frames [from,to) see: keys of the buffer, then of the pass itself
  int from, to, ld;
  std::vector<int> slots;   // rising
  std::vector<float> bias;  // what is added to the scores [H,to-from,ld], -inf where a frame doesn't see a slot
};

struct Layer {
  char letter;
  bool last;
  int past, stride;
  Stream world, action;
  std::vector<float> rate;                       // G: exp(log_rate) [H], then -1
  std::vector<std::vector<Sight>> noisy, clean;  // by frames; of G the noisy chunk among itself alone
};

struct Gated { Norm norm; Matrix enter, leave; };

struct Model {
  int O, A, K, P, D, Da, H, d, expand, window, dilation, taps, L, draft, frames, W, blocks, terminates;
  Matrix clean_in, noisy_in, level_in, action_in, out, memory, judge[3];
  std::vector<float> place, begin;
  Norm features;
  std::vector<Layer> layers;
  Matrix draft_in, draft_out;
  std::vector<Gated> gated;
  // units; `error` [K,O]
  std::vector<float> obs_mean, obs_std, step_std, obs_low, obs_high, act_low, act_high, error;
  float reward_mean, reward_std;
  std::vector<std::vector<float>> kept;  // the norms' weights

  int group() const { return P + 1; }
  int inner() const { return H * d; }
  int keys(const Layer& l, int frames) const { return (l.past + frames) * group(); }
};

struct Reader {
  const float* const* tensors;
  const float* next() { return *tensors++; }
};

std::vector<float> copied(const float* p, int n, float beyond = 0.0f) {  // with something to read up to a whole panel
  std::vector<float> x(p, p + n);
  x.resize(panels(n) * PANEL, beyond);
  return x;
}

Matrix read_linear(Reader& r, int in, int out) {
  const float* w = r.next();
  return packed(w, r.next(), in, 0, out);
}

Norm read_norm(Model& m, Reader& r, int n) {
  for (int i = 0; i < 2; i++) m.kept.push_back(copied(r.next(), n));
  return Norm{n, nullptr, nullptr};
}

Stream read_stream(Model& m, Reader& r, int width, int hidden, bool gates, bool leaves) {
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
  if (leaves) s.leave = read_linear(r, in + hidden, width);
  return s;
}

// What the queries of each frame see and add to the scores: window_attention.py's `visible`, of a layer that mixes by
// attention or, where `offsets` is null, of a chunk among itself.
std::vector<Sight> sights(const Model& m, const Layer& l, const float* offsets, int frames, bool noisy) {
  const int group = m.group(), past = l.past, ahead = m.K - 1;
  auto sees = [&](int i, int slot) {
    const int time = slot / group - past, limit = noisy ? 0 : i, offset = i - time;
    const bool remembered = time < limit && offset <= past && offset % l.stride == 0;
    return remembered || (time >= 0 && (noisy || time == i));
  };
  auto looked_at = [&](int from, int to) {
    Sight s{from, to, 0, {}, {}};
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
  std::vector<Sight> each, whole{looked_at(0, frames)};
  size_t apart = 0;
  for (int i = 0; i < frames; i++) each.push_back(looked_at(i, i + 1)), apart += each.back().ld;
  // Taps that lie apart show each frame others: then a frame at a time is less work than all that any of them sees.
  return 2 * apart <= size_t(frames) * whole[0].ld ? each : whole;
}

// sizes in the order of Model's first line; tensors in the order of compiled_step.py's _tensors
Model* unpacked(const int32_t* sizes, const char* pattern, const float* const* tensors) {
  Model* m = new Model();
  std::memcpy(&m->O, sizes, 18 * sizeof(int32_t));
  Model& x = *m;
  Reader r{tensors};
  const int wide = x.P * x.D;
  x.clean_in = read_linear(r, x.O, wide), x.noisy_in = read_linear(r, 4 * x.O, wide), x.level_in = read_linear(r, 16, wide);
  x.place = copied(r.next(), x.K * wide);
  x.action_in = read_linear(r, x.A, x.Da), x.begin = copied(r.next(), x.Da);
  x.features = read_norm(x, r, wide), x.out = read_linear(r, wide, x.O);
  for (int i = 0; i < x.L; i++) {
    Layer l;
    l.letter = pattern[i], l.last = i + 1 == x.L;
    const bool G = l.letter == 'G';
    l.stride = l.letter == 'D' ? x.dilation : 1;
    l.past = G ? 0 : l.letter == 'D' ? x.dilation * x.taps : x.window;
    l.world = read_stream(x, r, x.D, x.expand * x.D, G, true);
    l.action = read_stream(x, r, x.Da, l.last ? 0 : x.expand * x.Da, G, !l.last);
    const float* own = r.next();
    if (G) {
      l.rate.assign(pad(2 * x.H), -1.0f);
      for (int h = 0; h < x.H; h++) l.rate[h] = std::exp(own[h]);
    }
    l.noisy.resize(x.K + 1), l.clean.resize(x.K + 1);
    for (int f = 1; f <= x.K; f++) {
      l.noisy[f] = sights(x, l, G ? nullptr : own, f, true);
      if (!G) l.clean[f] = sights(x, l, own, f, false);
    }
    x.layers.push_back(std::move(l));
  }
  x.memory = read_linear(r, wide, 2);
  x.judge[0] = read_linear(r, 3 * x.O + x.A, x.W), x.judge[1] = read_linear(r, x.W, x.W), x.judge[2] = read_linear(r, x.W, 2);
  if (x.draft) {
    x.draft_in = read_linear(r, x.frames * x.O + x.A, x.W);
    for (int i = 0; i < x.blocks; i++) {
      Gated g;
      g.norm = read_norm(x, r, x.W), g.enter = read_linear(r, x.W, 2 * x.W), g.leave = read_linear(r, x.W, x.W);
      x.gated.push_back(std::move(g));
    }
    x.draft_out = read_linear(r, x.W, 2 * x.O);
  }
  x.obs_mean = copied(r.next(), x.O), x.obs_std = copied(r.next(), x.O), x.step_std = copied(r.next(), x.O, 1.0f);
  x.obs_low = copied(r.next(), x.O), x.obs_high = copied(r.next(), x.O);
  x.act_low = copied(r.next(), x.A), x.act_high = copied(r.next(), x.A);
  x.reward_mean = *r.next(), x.reward_std = *r.next();
  for (const float *error = r.next(), *end = error + x.K * x.O; error < end; error += x.O) {
    std::vector<float> line = copied(error, x.O, 1.0f);
    x.error.insert(x.error.end(), line.begin(), line.end());
  }
  for (int j = 0; j < x.O; j++) {  // bounds in normalised units
    x.obs_low[j] = (x.obs_low[j] - x.obs_mean[j]) / x.obs_std[j];
    x.obs_high[j] = (x.obs_high[j] - x.obs_mean[j]) / x.obs_std[j];
  }
  // `kept` has stopped growing: the norms may point into it, in the order in which they were read
  size_t at = 0;
  auto point = [&](Norm& n) { n.weight = x.kept[at].data(), n.bias = x.kept[at + 1].data(), at += 2; };
  point(x.features);
  for (Layer& l : x.layers) point(l.world.norm), point(l.action.norm);
  for (Gated& g : x.gated) point(g.norm);
  return m;
}

}  // namespace
