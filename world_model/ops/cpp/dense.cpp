// y = base + f(x) W^T + b, forward and backward, row tile by row tile in the cache: linear.py's Layer says what f is.

#include "vectors.h"

namespace {

constexpr int ROWS_AT_ONCE = 96;
enum Kind { PLAIN, NORM, SILU, GATED };

struct Dense {
  int64_t rows, ldx, ldp;            // strides of the rows of x and of `beside`
  int32_t kind, in, out, beside_in;  // `in` columns of f(x), the first `beside_in` of them from `beside`
  const float *x, *beside, *base;    // `beside` and `base` may be null
  const float *gain, *shift;         // of the norm
  const float *weight, *bias;        // [out,in], [out]
  float* y;
  const float* dy;
  float *dx, *dbeside, *dgain, *dshift, *dweight, *dbias;
  const float* also;  // [rows,in], what else x gains, where it goes on to a later base; or null
};

inline vec sigmoid(vec x) { return 1.0f / (1.0f + exponential(-x)); }

// f(x) of `n` rows -> z [n,ldz], zeros beyond its columns
void enter(const Dense& s, int64_t first, int n, float* z, int ldz) {
  const int own = s.in - s.beside_in;
  if (s.kind == NORM) {
    normalise(Norm{s.in, s.gain, s.shift}, 1e-5f, n, s.x + first * s.ldx, int(s.ldx), z, ldz);
    return;
  }
  for (int r = 0; r < n; r++) {
    const float* x = s.x + (first + r) * s.ldx;
    float* to = z + size_t(r) * ldz;
    if (s.beside_in) copy(to, s.beside + (first + r) * s.ldp, s.beside_in);
    if (s.kind == PLAIN) copy(to, x, own);
    if (s.kind == SILU) silu(x, to + s.beside_in, own);
    if (s.kind == GATED) copy(to, x, own), silu<true>(x + own, to, own);
  }
}

// dz [n,ldz] -> dx, and what the norm's weights gain
void leave(const Dense& s, int64_t first, int n, const float* dz, int ldz, float* dgain, float* dshift) {
  const int own = s.in - s.beside_in;
  for (int r = 0; r < n; r++) {
    const float *x = s.x + (first + r) * s.ldx, *d = dz + size_t(r) * ldz;
    if (s.beside_in) copy(s.dbeside + (first + r) * s.beside_in, d, s.beside_in), d += s.beside_in;
    float* dx = s.dx + (first + r) * int64_t(s.kind == GATED ? 2 * own : own);
    if (s.kind == PLAIN) copy(dx, d, own);
    for (int i = 0; i < own && s.kind >= SILU; i += V) {
      const int here = std::min(V, own - i);
      const vec given = load(d + i, here);
      if (s.kind == SILU) {
        const vec a = load(x + i, here), g = sigmoid(a);
        store(dx + i, given * g * (1.0f + a * (1.0f - g)), here);
      } else {
        const vec value = load(x + i, here), a = load(x + own + i, here), g = sigmoid(a);
        store(dx + i, given * a * g, here);
        store(dx + own + i, given * value * g * (1.0f + a * (1.0f - g)), here);
      }
    }
    if (s.kind == NORM) {
      normalise_back(Norm{own, s.gain, s.shift}, 1e-5f, x, d, dx, dgain, dshift);
      for (int i = 0; i < own && s.also; i += V) {
        const float* more = s.also + (first + r) * own + i;
        store(dx + i, load(dx + i, own - i) + load(more, own - i), own - i);
      }
    }
  }
}

void forward(const Dense& s) {
  const int ldz = pad(s.in), ldo = panels(s.out) * PANEL;
  Arena a = room.open(size_t(ldo) * s.in + ldo + size_t(ROWS_AT_ONCE) * (ldz + ldo) + 64 * V);
  float* w = a.take(size_t(ldo) * s.in);
  float* bias = a.take(ldo);
  float* z = a.take(size_t(ROWS_AT_ONCE) * ldz);
  float* y = a.take(size_t(ROWS_AT_ONCE) * ldo);
  for (int from = 0; from < s.out; from += PANEL) {
    const int here = std::min(PANEL, s.out - from);
    float* panel = w + size_t(from) * s.in;
    if (here < PANEL) std::fill(panel, panel + size_t(s.in) * PANEL, 0.0f);
    transpose([&](int r) { return s.weight + size_t(from + r) * s.in; }, here, s.in, panel, PANEL);
  }
  std::fill(bias, bias + ldo, 0.0f);
  copy(bias, s.bias, s.out);
  for (int64_t first = 0; first < s.rows; first += ROWS_AT_ONCE) {
    const int n = int(std::min<int64_t>(ROWS_AT_ONCE, s.rows - first));
    enter(s, first, n, z, ldz);
    product(n, z, ldz, w, s.in, s.out, bias, y, ldo);
    for (int r = 0; r < n; r++) {
      float* to = s.y + (first + r) * s.out;
      const float *from = y + size_t(r) * ldo, *base = s.base ? s.base + (first + r) * s.out : nullptr;
      for (int i = 0; i < s.out; i += V) {
        const int here = std::min(V, s.out - i);
        store(to + i, base ? load(from + i) + load(base + i, here) : load(from + i), here);
      }
    }
  }
}

void backward(const Dense& s) {
  const int ldz = pad(s.in);
  Arena a = room.open(size_t(s.out) * ldz * 2 + pad(s.out) + 2 * ldz + size_t(ROWS_AT_ONCE) * 2 * ldz + 64 * V);
  float* dw = a.take(size_t(s.out) * ldz);
  float* w = a.take(size_t(s.out) * ldz);
  float* db = a.take(pad(s.out));
  float* dgain = a.take(ldz);
  float* dshift = a.take(ldz);
  float* z = a.take(size_t(ROWS_AT_ONCE) * ldz);
  float* dz = a.take(size_t(ROWS_AT_ONCE) * ldz);
  std::fill(dw, dw + size_t(s.out) * ldz, 0.0f), std::fill(db, db + pad(s.out), 0.0f);
  std::fill(dgain, dgain + ldz, 0.0f), std::fill(dshift, dshift + ldz, 0.0f);
  std::fill(z, z + size_t(ROWS_AT_ONCE) * ldz, 0.0f);
  for (int o = 0; o < s.out; o++) {
    if (ldz != s.in) std::fill(w + size_t(o) * ldz, w + size_t(o + 1) * ldz, 0.0f);
    copy(w + size_t(o) * ldz, s.weight + size_t(o) * s.in, s.in);
  }
  for (int64_t first = 0; first < s.rows; first += ROWS_AT_ONCE) {
    const int n = int(std::min<int64_t>(ROWS_AT_ONCE, s.rows - first));
    const float* dy = s.dy + first * s.out;
    if (s.dweight) {
      enter(s, first, n, z, ldz);
      multiply<true, true>(s.out, dy, s.out, z, ldz, n, ldz, dw, ldz);
      for (int r = 0; r < n; r++)
        for (int i = 0; i < s.out; i += V) {
          const int here = std::min(V, s.out - i);
          store(db + i, load(db + i) + load(dy + size_t(r) * s.out + i, here));
        }
    }
    if (!s.dx) continue;
    multiply(n, dy, s.out, w, ldz, s.out, ldz, dz, ldz);
    leave(s, first, n, dz, ldz, dgain, dshift);
  }
  if (!s.dweight) return;
  for (int o = 0; o < s.out; o++) copy(s.dweight + size_t(o) * s.in, dw + size_t(o) * ldz, s.in);
  copy(s.dbias, db, s.out);
  if (s.dgain) copy(s.dgain, dgain, s.in), copy(s.dshift, dshift, s.in);
}

}  // namespace

extern "C" {

// Layers one after another: each x is the y before it.
void dense_forward(const Dense* layers, int count) {
  for (int i = 0; i < count; i++) forward(layers[i]);
}

void dense_backward(const Dense* layers, int count) {
  for (int i = count - 1; i >= 0; i--) backward(layers[i]);
}

}
