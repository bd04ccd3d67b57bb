// A whole step of a small world model in one call: draft, denoise, reward, write, without Python between the layers.
//
// The same arithmetic as world_model.py and transformer.py, which are the truth; names and shapes are theirs. Dreams are
// taken in tiles that stay in the cache, and the weights are packed once so that the products run over them in order.
// A dream's numbers are the same, up to rounding, whatever stands around it.

#include "trunk.h"

namespace {

struct Sizes {
  int ldo, ldw, lda, ldf;  // observations, world tokens, action tokens, all world tokens of a frame
  explicit Sizes(const Model& m)
      : ldo(panels(m.O) * PANEL), ldw(panels(m.D) * PANEL), lda(panels(m.Da) * PANEL), ldf(panels(m.P * m.D) * PANEL) {}
};

void scale_actions(const Model& m, const float* raw, int rows, float* to, int ld) {
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < m.A; j++)
      to[size_t(r) * ld + j] = 2 * (raw[size_t(r) * m.A + j] - m.act_low[j]) / (m.act_high[j] - m.act_low[j]) - 1;
}

void spread_tokens(const Model& m, const float* frames, int ldf, int rows, float* world, int ldw) {
  for (int r = 0; r < rows; r++)
    for (int g = 0; g < m.P; g++)
      std::memcpy(world + size_t(r * m.P + g) * ldw, frames + size_t(r) * ldf + size_t(g) * m.D, m.D * sizeof(float));
}

// Clean frames, scaled observations [rows,ldo] and actions [rows,ldx], onto the memory.
void write(const Model& m, const Pass& p, const float* scaled, const float* act, int ldx, Arena a) {
  const Sizes s(m);
  const int rows = p.dreams * p.frames;
  float* frames = a.take(size_t(rows) * s.ldf);
  float* world = a.take(size_t(rows) * m.P * s.ldw);
  float* action = a.take(size_t(rows) * s.lda);
  linear(m.clean_in, rows, scaled, s.ldo, frames, s.ldf);
  spread_tokens(m, frames, s.ldf, rows, world, s.ldw);
  linear(m.action_in, rows, act, ldx, action, s.lda);
  for (int b = 0; b < p.dreams; b++)
    if (p.call->age[p.first + b] == 0)  // no action led to a dream's first frame
      std::memcpy(action + size_t(b) * p.frames * s.lda, m.begin.data(), m.Da * sizeof(float));
  trunk(m, p, world, s.ldw, action, s.lda, a);
}

size_t tile_room(const Model& m) {
  const Sizes s(m);
  const size_t rows = size_t(TILE) * m.K;
  const size_t wide = panels(4 * m.O) * PANEL + PANEL + 4 * size_t(s.ldo) + panels(3 * m.O + m.A) * PANEL + 2 * s.ldf +
                      m.P * s.ldw + s.lda + panels(m.A) * PANEL + 3 * panels(m.W) * PANEL;
  const size_t draft = size_t(TILE) * (panels(2 * m.O + m.A) * PANEL + 5 * panels(2 * m.W) * PANEL + 4 * s.ldo + panels(2 * m.O) * PANEL);
  return rows * wide + draft + rows * (s.ldf + m.P * s.ldw + s.lda) + pass_room(m, int(rows)) + size_t(256) * V;
}

inline vec limited(const Model& m, int j, vec x) {  // cut off at the bounds of the observation space; NaN stays NaN
  const vec low = load(m.obs_low.data() + j), high = load(m.obs_high.data() + j);
  return x < low ? low : x > high ? high : x;
}

// The draft from `start` through the chunk -> its columns of the noisy input (mean, change, spread) and the scale.
void guess(const Model& m, int dreams, int F, const float* start, const float* before, const float* act, int ldx,
           float* noisy, int ldn, float* scale, Arena a) {
  const Sizes s(m);
  const int O = m.O, in = m.frames * O + m.A, ldi = panels(in) * PANEL, ldh = panels(m.W) * PANEL;
  const int ld2 = panels(2 * m.W) * PANEL, ldr = panels(2 * O) * PANEL;
  float* now = a.take(size_t(dreams) * s.ldo);
  float* earlier = a.take(size_t(dreams) * s.ldo);
  float* variance = a.take(size_t(dreams) * s.ldo);
  float* x = a.take(size_t(dreams) * ldi);
  float* hidden = a.take(size_t(dreams) * ldh);
  float* normed = a.take(size_t(dreams) * ldh);
  float* wide = a.take(size_t(dreams) * ld2);
  float* told = a.take(size_t(dreams) * ldr + V);
  float* change = a.take(size_t(s.ldo));
  float* spread = a.take(size_t(s.ldo));
  std::memcpy(now, start, size_t(dreams) * s.ldo * sizeof(float));
  std::memcpy(earlier, before, size_t(dreams) * s.ldo * sizeof(float));
  std::fill(variance, variance + size_t(dreams) * s.ldo, 0.0f);
  for (int f = 0; f < F; f++) {
    if (m.draft) {
      for (int b = 0; b < dreams; b++) {
        float* to = x + size_t(b) * ldi;
        std::memcpy(to, now + size_t(b) * s.ldo, O * sizeof(float));
        std::memcpy(to + O, act + size_t(b * F + f) * ldx, m.A * sizeof(float));
        if (m.frames > 1)
          for (int j = 0; j < O; j++)
            to[O + m.A + j] = (now[size_t(b) * s.ldo + j] - earlier[size_t(b) * s.ldo + j]) / m.step_std[j];
      }
      linear(m.draft_in, dreams, x, ldi, hidden, ldh);
      for (const Gated& g : m.gated) {
        normalise(g.norm, 1e-5f, dreams, hidden, ldh, normed, ldh);
        linear(g.enter, dreams, normed, ldh, wide, ld2);
        for (int b = 0; b < dreams; b++) {
          float* value = wide + size_t(b) * ld2;
          silu<true>(value + m.W, value, m.W);
        }
        linear<true>(g.leave, dreams, wide, ld2, hidden, ldh);
      }
      linear(m.draft_out, dreams, hidden, ldh, told, ldr);
    }
    for (int b = 0; b < dreams; b++) {
      float* n = noisy + size_t(b * F + f) * ldn;
      float* sc = scale + size_t(b * F + f) * s.ldo;
      float *o = now + size_t(b) * s.ldo, *e = earlier + size_t(b) * s.ldo, *v = variance + size_t(b) * s.ldo;
      const float *t = told + size_t(b) * ldr, *st = start + size_t(b) * s.ldo, *err = m.error.data() + size_t(f) * s.ldo;
      if (!m.draft) {
        for (int j = 0; j < O; j++) n[O + j] = st[j], n[2 * O + j] = n[3 * O + j] = 0.0f, sc[j] = err[j];
        continue;
      }
      for (int j = 0; j < O; j += V) {  // what runs over the end of one column is written anew by the next
        const vec u = load(m.step_std.data() + j), was = load(o + j), error = load(err + j);
        const vec log_var = 8.0f - 16.0f / (exponential(load(t + O + j) * 0.25f) + 1.0f) - 6.0f;  // 8 tanh(x / 8) - 6
        const vec next = limited(m, j, was + u * load(t + j));
        const vec var = load(v + j) + u * u * exponential(log_var), std = root(var);
        store(e + j, was), store(o + j, next), store(v + j, var);
        store(n + O + j, next);
        store(sc + j, root(std * error));
        store(change + j, (next - load(st + j)) / u), store(spread + j, logarithm(std / error));
      }
      copy(n + 2 * O, change, O), copy(n + 3 * O, spread, O);
    }
  }
}

void imagine_tile(const Model& m, const Call& c, int64_t first, int dreams) {
  Arena a = room.open(tile_room(m));
  const Sizes s(m);
  const int O = m.O, F = int(c.frames), rows = dreams * F, ldx = panels(m.A) * PANEL, ldn = panels(4 * O) * PANEL + PANEL;
  float* act = a.take(size_t(rows) * ldx);
  float* start = a.take(size_t(dreams) * s.ldo);
  float* before = a.take(size_t(dreams) * s.ldo);
  float* noisy = a.take(size_t(rows) * ldn);  // z, mean, change, spread
  float* scale = a.take(size_t(rows) * s.ldo);
  float* scaled = a.take(size_t(rows) * s.ldo);
  float* residual = a.take(size_t(rows) * s.ldo);
  float* features = a.take(size_t(rows) * s.ldf);
  scale_actions(m, c.actions + first * F * m.A, rows, act, ldx);
  for (int b = 0; b < dreams; b++)
    for (int j = 0; j < O; j++) {
      const float* from = c.before ? c.before : c.obs;
      start[size_t(b) * s.ldo + j] = (c.obs[(first + b) * O + j] - m.obs_mean[j]) / m.obs_std[j];
      before[size_t(b) * s.ldo + j] = (from[(first + b) * O + j] - m.obs_mean[j]) / m.obs_std[j];
    }
  guess(m, dreams, F, start, before, act, ldx, noisy, ldn, scale, a);
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < O; j++) noisy[size_t(r) * ldn + j] = c.noise ? c.noise[(first * F + r) * O + j] : 0.0f;

  const Pass denoise{dreams, F, first, true, &c};
  for (int step = 0; step < c.steps; step++) {
    Arena b = a;
    float* frames = b.take(size_t(rows) * s.ldf);
    float* world = b.take(size_t(rows) * m.P * s.ldw);
    float* action = b.take(size_t(rows) * s.lda);
    float* level = b.take(s.ldf);
    const float at = c.grid[step], after = c.grid[step + 1];
    float angles[16];
    for (int i = 0; i < 8; i++) {
      const float angle = at * float(std::exp2(i) * M_PI / 2);
      angles[i] = std::sin(angle), angles[8 + i] = std::cos(angle);
    }
    linear(m.level_in, 1, angles, 16, level, s.ldf);
    linear(m.noisy_in, rows, noisy, ldn, frames, s.ldf);
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < m.P * m.D; j++)
        frames[size_t(r) * s.ldf + j] += level[j] + m.place[size_t(r % F) * m.P * m.D + j];
    spread_tokens(m, frames, s.ldf, rows, world, s.ldw);
    linear(m.action_in, rows, act, ldx, action, s.lda);
    trunk(m, denoise, world, s.ldw, action, s.lda, b);
    for (int r = 0; r < rows; r++)
      for (int g = 0; g < m.P; g++)
        std::memcpy(frames + size_t(r) * s.ldf + size_t(g) * m.D, world + size_t(r * m.P + g) * s.ldw, m.D * sizeof(float));
    normalise(m.features, 1e-5f, rows, frames, s.ldf, features, s.ldf);
    linear(m.out, rows, features, s.ldf, residual, s.ldo);
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < O; j++) {
        float& z = noisy[size_t(r) * ldn + j];
        z += (after - at) * (z - residual[size_t(r) * s.ldo + j]) / at;
      }
  }
  for (int r = 0; r < rows; r++) {
    float *x = scaled + size_t(r) * s.ldo, *z = noisy + size_t(r) * ldn;
    for (int j = 0; j < O; j += V) store(x + j, limited(m, j, load(z + O + j) + load(scale + size_t(r) * s.ldo + j) * load(z + j)));
    for (int j = 0; j < O; j++) c.obs_out[(first * F + r) * O + j] = x[j] * m.obs_std[j] + m.obs_mean[j];
  }
  {  // what the step yields
    Arena b = a;
    const int in = 3 * O + m.A, ldi = panels(in) * PANEL, ldh = panels(m.W) * PANEL;
    float* x = b.take(size_t(rows) * ldi);
    float* one = b.take(size_t(rows) * ldh);
    float* two = b.take(size_t(rows) * ldh);
    float* told = b.take(size_t(rows) * PANEL);
    for (int r = 0; r < rows; r++) {
      const float* was = r % F ? scaled + size_t(r - 1) * s.ldo : start + size_t(r / F) * s.ldo;
      const float* is = scaled + size_t(r) * s.ldo;
      float* to = x + size_t(r) * ldi;
      for (int j = 0; j < O; j++) to[j] = was[j], to[O + m.A + j] = (is[j] - was[j]) / m.step_std[j], to[2 * O + m.A + j] = is[j];
      std::memcpy(to + O, act + size_t(r) * ldx, m.A * sizeof(float));
    }
    linear(m.judge[0], rows, x, ldi, one, ldh);
    for (int r = 0; r < rows; r++) silu(one + size_t(r) * ldh, one + size_t(r) * ldh, m.W);
    linear(m.judge[1], rows, one, ldh, two, ldh);
    for (int r = 0; r < rows; r++) silu(two + size_t(r) * ldh, two + size_t(r) * ldh, m.W);
    linear(m.judge[2], rows, two, ldh, told, PANEL);
    linear<true>(m.memory, rows, features, s.ldf, told, PANEL);
    for (int r = 0; r < rows; r++) {
      c.reward[first * F + r] = told[size_t(r) * PANEL] * m.reward_std + m.reward_mean;
      c.terminated[first * F + r] = m.terminates && told[size_t(r) * PANEL + 1] > 0;
    }
  }
  for (int b = 0; b < dreams; b++) {
    const float* seen = c.obs_out + (first + b) * F * O;
    std::memcpy(c.last + (first + b) * O, seen + size_t(F - 1) * O, O * sizeof(float));
    if (c.before_out)
      std::memcpy(c.before_out + (first + b) * O, F > 1 ? seen + size_t(F - 2) * O : c.obs + (first + b) * O, O * sizeof(float));
    c.age_out[first + b] = c.age[first + b] + F;
  }
  write(m, Pass{dreams, F, first, false, &c}, scaled, act, ldx, a);
}

void observe_tile(const Model& m, const Call& c, int64_t first, int dreams) {
  Arena a = room.open(tile_room(m));
  const Sizes s(m);
  const int F = int(c.frames), rows = dreams * F, ldx = panels(m.A) * PANEL, O = m.O;
  float* act = a.take(size_t(rows) * ldx);
  float* scaled = a.take(size_t(rows) * s.ldo);
  scale_actions(m, c.actions + first * F * m.A, rows, act, ldx);
  for (int r = 0; r < rows; r++)
    for (int j = 0; j < O; j++)
      scaled[size_t(r) * s.ldo + j] = (c.seen[(first * F + r) * O + j] - m.obs_mean[j]) / m.obs_std[j];
  for (int b = 0; b < dreams; b++) {
    const float* seen = c.seen + (first + b) * F * O;
    const bool begins = c.age[first + b] == 0;
    std::memcpy(c.last + (first + b) * O, seen + size_t(F - 1) * O, O * sizeof(float));
    if (c.before_out)  // a first frame came from nowhere: it stands for the one before it too
      std::memcpy(c.before_out + (first + b) * O,
                  F > 1 ? seen + size_t(F - 2) * O : begins ? seen : c.obs + (first + b) * O, O * sizeof(float));
    c.age_out[first + b] = c.age[first + b] + F;
  }
  write(m, Pass{dreams, F, first, false, &c}, scaled, act, ldx, a);
}

template <class Tile>
void tiles(int64_t batch, int threads, Tile tile) {
  const int64_t count = (batch + TILE - 1) / TILE;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && count > 1)
  for (int64_t i = 0; i < count; i++) tile(i * TILE, int(std::min<int64_t>(TILE, batch - i * TILE)));
}

}  // namespace

extern "C" {

void* dream_open(const int32_t* sizes, const char* pattern, const float* const* tensors) {
  return unpacked(sizes, pattern, tensors);
}

void dream_close(void* model) { delete static_cast<Model*>(model); }

// 0, or 1 where an action is out of its bounds or a dream has seen nothing: then nothing is done.
int dream_imagine(const void* model, const Call* call, int threads) {
  const Model& m = *static_cast<const Model*>(model);
  for (int64_t b = 0; b < call->batch; b++)
    if (call->age[b] == 0) return 1;
  for (int64_t r = 0; r < call->batch * call->frames; r++)
    for (int j = 0; j < m.A; j++) {
      const float x = call->actions[r * m.A + j], slack = 1e-6f * (m.act_high[j] - m.act_low[j]);
      if (!(x >= m.act_low[j] - slack && x <= m.act_high[j] + slack)) return 1;
    }
  tiles(call->batch, threads, [&](int64_t first, int n) { imagine_tile(m, *call, first, n); });
  return 0;
}

void dream_observe(const void* model, const Call* call, int threads) {
  const Model& m = *static_cast<const Model*>(model);
  tiles(call->batch, threads, [&](int64_t first, int n) { observe_tile(m, *call, first, n); });
}

}
