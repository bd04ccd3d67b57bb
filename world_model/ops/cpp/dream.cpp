// A whole step of a small world model in one call: draft, denoise, reward, write, without Python between the layers.
//
// The same arithmetic as world_model.py and transformer.py, which are the reference; names and shapes are theirs. Dreams
// are taken in tiles that stay in the cache, and the weights are packed once so that the products run over them in order.
// A dream's numbers are the same, up to rounding, whatever batch it is in.

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

// Writes clean frames to the memory: scaled observations [rows,ldo] and actions [rows,ldx].
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
  Trunk(m, p, s.ldw, s.lda, a).run(world, s.ldw, action, s.lda);
}

size_t tile_room(const Model& m) {
  const Sizes s(m);
  const size_t rows = size_t(TILE) * m.K;
  const size_t wide = panels(4 * m.O) * PANEL + PANEL + 4 * size_t(s.ldo) + panels(3 * m.O + m.A) * PANEL + 2 * s.ldf +
                      m.P * s.ldw + s.lda + panels(m.A) * PANEL + 3 * panels(m.W) * PANEL;
  const size_t draft = size_t(TILE) * (panels(2 * m.O + m.A) * PANEL + 5 * panels(2 * m.W) * PANEL + 4 * s.ldo + panels(2 * m.O) * PANEL);
  return rows * wide + draft + rows * (s.ldf + m.P * s.ldw + s.lda) + pass_room(m, int(rows)) + size_t(256) * V;
}

inline vec clip(const Model& m, int j, vec x) {  // to the bounds of the observation space; NaN stays NaN
  const vec low = load(m.obs_low.data() + j), high = load(m.obs_high.data() + j);
  return x < low ? low : x > high ? high : x;
}

// Draft.unroll of a tile of dreams: mean and variance of each frame from the one before.
struct DraftTile {
  const Model& m;
  const Sizes s;
  const int dreams, F, O, ldi, ldh, ld2, ldr;
  float *now, *earlier, *variance;  // [dreams,ldo]; two frames and the variance so far
  float *x, *hidden, *normed, *wide, *output, *change, *spread;

  DraftTile(const Model& m, int dreams, int F, Arena& a)
      : m(m), s(m), dreams(dreams), F(F), O(m.O), ldi(panels(m.frames * O + m.A) * PANEL), ldh(panels(m.W) * PANEL),
        ld2(panels(2 * m.W) * PANEL), ldr(panels(2 * O) * PANEL) {
    auto take = [&](int ld) { return a.take(size_t(dreams) * ld); };
    now = take(s.ldo), earlier = take(s.ldo), variance = take(s.ldo), x = take(ldi), hidden = take(ldh);
    normed = take(ldh), wide = take(ld2), output = a.take(size_t(dreams) * ldr + V);
    change = a.take(size_t(s.ldo)), spread = a.take(size_t(s.ldo));
  }

  // From `start` [dreams,ldo] through the chunk -> columns of the noisy input (mean, change, spread) and the scale.
  void unroll(const float* start, const float* before, const float* act, int ldx, float* noisy, int ldn, float* scale) {
    std::memcpy(now, start, size_t(dreams) * s.ldo * sizeof(float));
    std::memcpy(earlier, before, size_t(dreams) * s.ldo * sizeof(float));
    std::fill(variance, variance + size_t(dreams) * s.ldo, 0.0f);
    for (int f = 0; f < F; f++) {
      if (m.draft) predict(f, act, ldx);
      for (int b = 0; b < dreams; b++)
        advance(b, f, start + size_t(b) * s.ldo, noisy + size_t(b * F + f) * ldn, scale + size_t(b * F + f) * s.ldo);
    }
  }

  // The network: `output` is each dream's change and log variance in frame f.
  void predict(int f, const float* act, int ldx) {
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
      linear(g.in_proj, dreams, normed, ldh, wide, ld2);
      for (int b = 0; b < dreams; b++) {
        float* value = wide + size_t(b) * ld2;
        silu<true>(value + m.W, value, m.W);
      }
      linear<true>(g.out_proj, dreams, wide, ld2, hidden, ldh);
    }
    linear(m.draft_out, dreams, hidden, ldh, output, ldr);
  }

  // Dream b by one frame: n [4*O] the noisy input of which all but z is written, sc [O] the scale.
  void advance(int b, int f, const float* st, float* n, float* sc) {
    float *o = now + size_t(b) * s.ldo, *e = earlier + size_t(b) * s.ldo, *v = variance + size_t(b) * s.ldo;
    const float *t = output + size_t(b) * ldr, *err = m.error.data() + size_t(f) * s.ldo;
    if (!m.draft) {
      for (int j = 0; j < O; j++) n[O + j] = st[j], n[2 * O + j] = n[3 * O + j] = 0.0f, sc[j] = err[j];
      return;
    }
    for (int j = 0; j < O; j += V) {  // what runs over the end of one column is overwritten by the next
      const vec u = load(m.step_std.data() + j), was = load(o + j), error = load(err + j);
      const vec log_var = 8.0f - 16.0f / (exponential(load(t + O + j) * 0.25f) + 1.0f) - 6.0f;  // 8 tanh(x / 8) - 6
      const vec next = clip(m, j, was + u * load(t + j));
      const vec var = load(v + j) + u * u * exponential(log_var), std = root(var);
      store(e + j, was), store(o + j, next), store(v + j, var);
      store(n + O + j, next);
      store(sc + j, root(std * error));
      store(change + j, (next - load(st + j)) / u), store(spread + j, logarithm(std / error));
    }
    copy(n + 2 * O, change, O), copy(n + 3 * O, spread, O);
  }
};

// WorldModel.imagine_unchecked of a tile of dreams.
struct ImagineTile {
  const Model& m;
  const Call& c;
  const Sizes s;
  const int64_t first;
  const int dreams, O, F, rows, ldx, ldn;
  float *act, *start, *before, *noisy, *scale, *scaled, *residual, *features;  // noisy: z, mean, change, spread

  ImagineTile(const Model& m, const Call& c, int64_t first, int dreams, Arena& a)
      : m(m), c(c), s(m), first(first), dreams(dreams), O(m.O), F(int(c.frames)), rows(dreams * F),
        ldx(panels(m.A) * PANEL), ldn(panels(4 * O) * PANEL + PANEL) {
    act = a.take(size_t(rows) * ldx);
    start = a.take(size_t(dreams) * s.ldo), before = a.take(size_t(dreams) * s.ldo);
    noisy = a.take(size_t(rows) * ldn), scale = a.take(size_t(rows) * s.ldo), scaled = a.take(size_t(rows) * s.ldo);
    residual = a.take(size_t(rows) * s.ldo), features = a.take(size_t(rows) * s.ldf);
  }

  void read_inputs() {
    scale_actions(m, c.actions + first * F * m.A, rows, act, ldx);
    for (int b = 0; b < dreams; b++)
      for (int j = 0; j < O; j++) {
        const float* from = c.before ? c.before : c.obs;
        start[size_t(b) * s.ldo + j] = (c.obs[(first + b) * O + j] - m.obs_mean[j]) / m.obs_std[j];
        before[size_t(b) * s.ldo + j] = (from[(first + b) * O + j] - m.obs_mean[j]) / m.obs_std[j];
      }
  }

  void draft(Arena a) {
    DraftTile(m, dreams, F, a).unroll(start, before, act, ldx, noisy, ldn, scale);
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < O; j++) noisy[size_t(r) * ldn + j] = c.noise ? c.noise[(first * F + r) * O + j] : 0.0f;
  }

  // One Euler step of z, from noise level c.grid[step] to the next.
  void denoise(int step, Arena b) {
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
    Trunk(m, Pass{dreams, F, first, true, &c}, s.ldw, s.lda, b).run(world, s.ldw, action, s.lda);
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

  void write_obs() {
    for (int r = 0; r < rows; r++) {
      float *x = scaled + size_t(r) * s.ldo, *z = noisy + size_t(r) * ldn, *sc = scale + size_t(r) * s.ldo;
      for (int j = 0; j < O; j += V) store(x + j, clip(m, j, load(z + O + j) + load(sc + j) * load(z + j)));
      for (int j = 0; j < O; j++) c.obs_out[(first * F + r) * O + j] = x[j] * m.obs_std[j] + m.obs_mean[j];
    }
    for (int b = 0; b < dreams; b++) {
      const float* seen = c.obs_out + (first + b) * F * O;
      std::memcpy(c.last + (first + b) * O, seen + size_t(F - 1) * O, O * sizeof(float));
      if (c.before_out)
        std::memcpy(c.before_out + (first + b) * O, F > 1 ? seen + size_t(F - 2) * O : c.obs + (first + b) * O, O * sizeof(float));
      c.age_out[first + b] = c.age[first + b] + F;
    }
  }

  // RewardHead: of each step's observation before and after it, and of the trunk's features.
  void write_rewards(Arena b) {
    const int ldi = panels(3 * O + m.A) * PANEL, ldh = panels(m.W) * PANEL;
    float* x = b.take(size_t(rows) * ldi);
    float* one = b.take(size_t(rows) * ldh);
    float* two = b.take(size_t(rows) * ldh);
    float* output = b.take(size_t(rows) * PANEL);
    for (int r = 0; r < rows; r++) {
      const float* was = r % F ? scaled + size_t(r - 1) * s.ldo : start + size_t(r / F) * s.ldo;
      const float* is = scaled + size_t(r) * s.ldo;
      float* to = x + size_t(r) * ldi;
      for (int j = 0; j < O; j++) to[j] = was[j], to[O + m.A + j] = (is[j] - was[j]) / m.step_std[j], to[2 * O + m.A + j] = is[j];
      std::memcpy(to + O, act + size_t(r) * ldx, m.A * sizeof(float));
    }
    linear(m.reward_head[0], rows, x, ldi, one, ldh);
    for (int r = 0; r < rows; r++) silu(one + size_t(r) * ldh, one + size_t(r) * ldh, m.W);
    linear(m.reward_head[1], rows, one, ldh, two, ldh);
    for (int r = 0; r < rows; r++) silu(two + size_t(r) * ldh, two + size_t(r) * ldh, m.W);
    linear(m.reward_head[2], rows, two, ldh, output, PANEL);
    linear<true>(m.memory, rows, features, s.ldf, output, PANEL);
    for (int r = 0; r < rows; r++) {
      c.reward[first * F + r] = output[size_t(r) * PANEL] * m.reward_std + m.reward_mean;
      c.terminated[first * F + r] = m.terminates && output[size_t(r) * PANEL + 1] > 0;
    }
  }
};

void imagine_tile(const Model& m, const Call& c, int64_t first, int dreams) {
  Arena a = room.open(tile_room(m));
  ImagineTile tile(m, c, first, dreams, a);
  tile.read_inputs();
  tile.draft(a);
  for (int step = 0; step < c.steps; step++) tile.denoise(step, a);
  tile.write_obs();
  tile.write_rewards(a);
  write(m, Pass{dreams, tile.F, first, false, &c}, tile.scaled, tile.act, tile.ldx, a);
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
    const bool is_first = c.age[first + b] == 0;
    std::memcpy(c.last + (first + b) * O, seen + size_t(F - 1) * O, O * sizeof(float));
    if (c.before_out)  // a first frame is its own predecessor
      std::memcpy(c.before_out + (first + b) * O,
                  F > 1 ? seen + size_t(F - 2) * O : is_first ? seen : c.obs + (first + b) * O, O * sizeof(float));
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
  return read_model(sizes, pattern, tensors);
}

void dream_close(void* model) { delete static_cast<Model*>(model); }

// 0, or 1, with nothing done, where an action is out of its bounds or a dream has seen nothing.
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
