// Convolution and ConvLSTM step in Winograd's domain on the CPU; include/conv_lstm.h has the
// formulas and the layouts. Transforms are vectorised over channels, products over the other side's
// channels. One task of the forward pass makes, for some tiles and 64 output slots, n^2 small
// products whose results stay in cache, and transforms them at once; those 64 slots are the four
// gates of the same 16 channels, so the cell's step is taken there and the pre-activations are
// written only for backward. What has to move: each image once, U once for all tiles of a call, and
// V three times, n^2 / m^2 times the size of the images.
#pragma once

#include "cpu/gemm.h"
#include "cpu/lstm_gates.h"
#include "cpu/winograd.h"
#include "include/conv_lstm.h"

namespace geco::cpu {
namespace {

using conv_lstm::kGroup;

constexpr int kParts = int(kGroup) / kLanes<float>;  // vectors of a group

// Calls body.run<pairs, outputs>() for the form of a geometry. The choice of forms is
// ops/conv_lstm.cpp's.
template <class Body>
inline void visit_form(const conv_lstm::Geometry& g, Body body) {
  if (g.points() == 6)
    body.template operator()<2, 4>();
  else if (g.outputs == 6)
    body.template operator()<3, 6>();
  else if (g.outputs == 4)
    body.template operator()<3, 4>();
  else
    body.template operator()<3, 2>();
}

struct Tile {
  std::int64_t image, y, x;  // of the first output
};
inline Tile tile_at(const conv_lstm::Geometry& g, std::int64_t tile) {
  const std::int64_t within = tile % g.tiles_per_image();
  return {tile / g.tiles_per_image(), within / g.tiles_x * g.outputs,
          within % g.tiles_x * g.outputs};
}

// The vectors of a group of `count` channels: body(offset) for whole ones, body(offset, rest) for
// the last one.
template <class Body>
inline __attribute__((always_inline)) void for_each_part(int count, Body body) {
  constexpr int kWidth = kLanes<float>;
  int j = 0;
  for (; j + kWidth <= count; j += kWidth) body(j);
  if (j < count) body(j, count - j);
}

// The points of one tile or filter lie in planes far apart, and a store waits for its line: so that
// of a later one is asked for, too. Nothing is read, so the place may be past the end.
inline void store_at_point(float* to, VecF32 x) {
  constexpr std::int64_t kAhead = 3 * kPanel;
  store(to, x);
  __builtin_prefetch(to + kAhead, 1);
}

// Pixels that a tile sees, or its outputs; outside of the image, zeros.
template <int kSide>
struct Window {
  const float* pixel[kSide * kSide];

  Window(const conv_lstm::Geometry& g, const conv_lstm::Image& image, const float* zeros,
         std::int64_t batch, std::int64_t top, std::int64_t left) {
    for (int i = 0; i < kSide; ++i)
      for (int j = 0; j < kSide; ++j) {
        const std::int64_t y = top + i, x = left + j;
        const bool inside = y >= 0 && y < g.height && x >= 0 && x < g.width;
        pixel[i * kSide + j] =
            inside ? image.data + batch * image.step[0] + y * image.step[1] + x * image.step[2]
                   : zeros;
      }
  }
};

// Zeros for the vectors of a group that hold none of its `count` channels.
inline void clear_rest(int count, int points, float* to, std::int64_t plane_step) {
  constexpr int kWidth = kLanes<float>;
  for (int j = (count + kWidth - 1) / kWidth * kWidth; j < kGroup; j += kWidth)
    for (int point = 0; point < points; ++point) store(to + point * plane_step + j, VecF32{});
}

// V of a tile: B^T d B of both sources.
template <int kPairs, int kOutputs>
void winograd_input_tile(const conv_lstm::Tiles& p, std::int64_t tile) {
  constexpr int kSide = kPointCount<kPairs>;
  const conv_lstm::Geometry& g = p.geometry;
  const Tile at = tile_at(g, p.first + tile);
  const int pad = g.kernel / 2;
  std::int64_t slot_group = 0;
  for (int source = 0; source < 2; ++source) {
    const conv_lstm::Channels& channels = g.in[source];
    if (channels.channels == 0) continue;
    const Window<kSide> window(g, p.image[source], p.zeros, at.image, at.y - pad, at.x - pad);
    for (std::int64_t group = 0; group < channels.groups(); ++group, ++slot_group) {
      float* to = p.planes.data + slot_group / 2 * p.planes.panel_step + tile * kPanel +
                  slot_group % 2 * kGroup;
      const std::int64_t first = channels.first(group);
      const auto part = [&](int offset, auto... rest) __attribute__((always_inline)) {
        VecF32 rows[kSide][kSide];
        for (int i = 0; i < kSide; ++i) {
          VecF32 d[kSide];
#pragma GCC unroll 8
          for (int j = 0; j < kSide; ++j)
            d[j] = load(window.pixel[i * kSide + j] + first + offset, rest...);
          to_points<kPairs>(d, rows[i]);
        }
        for (int j = 0; j < kSide; ++j) {
          VecF32 d[kSide], v[kSide];
#pragma GCC unroll 8
          for (int i = 0; i < kSide; ++i) d[i] = rows[i][j];
          to_points<kPairs>(d, v);
#pragma GCC unroll 8
          for (int i = 0; i < kSide; ++i)
            store_at_point(to + (i * kSide + j) * p.planes.plane_step + offset, v[i]);
        }
      };
      for_each_part(channels.count(group), part);
      clear_rest(channels.count(group), kSide * kSide, to, p.planes.plane_step);
    }
  }
}

void winograd_input(const conv_lstm::Tiles& params, std::int64_t begin, std::int64_t end) {
  visit_form(params.geometry, [&]<int kPairs, int kOutputs>() {
    for (std::int64_t tile = begin; tile < end; ++tile)
      winograd_input_tile<kPairs, kOutputs>(params, tile);
  });
}

// dM of a tile: A dY A^T.
template <int kPairs, int kOutputs>
void winograd_gradient_tile(const conv_lstm::Tiles& p, std::int64_t tile) {
  constexpr int kSide = kPointCount<kPairs>;
  const conv_lstm::Geometry& g = p.geometry;
  const Tile at = tile_at(g, p.first + tile);
  const Window<kOutputs> window(g, p.image[0], p.zeros, at.image, at.y, at.x);
  for (std::int64_t group = 0; group < g.out.groups(); ++group) {
    float* to =
        p.planes.data + group / 2 * p.planes.panel_step + tile * kPanel + group % 2 * kGroup;
    const std::int64_t first = g.out.first(group);
    const auto part = [&](int offset, auto... rest) __attribute__((always_inline)) {
      VecF32 rows[kOutputs][kSide];
      for (int i = 0; i < kOutputs; ++i) {
        VecF32 y[kOutputs];
#pragma GCC unroll 8
        for (int j = 0; j < kOutputs; ++j)
          y[j] = load(window.pixel[i * kOutputs + j] + first + offset, rest...);
        from_outputs<kPairs, kOutputs>(y, rows[i]);
      }
      for (int j = 0; j < kSide; ++j) {
        VecF32 y[kOutputs], v[kSide];
#pragma GCC unroll 8
        for (int i = 0; i < kOutputs; ++i) y[i] = rows[i][j];
        from_outputs<kPairs, kOutputs>(y, v);
#pragma GCC unroll 8
        for (int i = 0; i < kSide; ++i)
          store_at_point(to + (i * kSide + j) * p.planes.plane_step + offset, v[i]);
      }
    };
    for_each_part(g.out.count(group), part);
    clear_rest(g.out.count(group), kSide * kSide, to, p.planes.plane_step);
  }
}

void winograd_gradient(const conv_lstm::Tiles& params, std::int64_t begin, std::int64_t end) {
  visit_form(params.geometry, [&]<int kPairs, int kOutputs>() {
    for (std::int64_t tile = begin; tile < end; ++tile)
      winograd_gradient_tile<kPairs, kOutputs>(params, tile);
  });
}

// A^T M A of one vector of channels: outputs y[kOutputs^2].
template <int kPairs, int kOutputs>
inline __attribute__((always_inline)) void winograd_output(const float* m, std::int64_t plane_step,
                                                           VecF32* y) {
  constexpr int kSide = kPointCount<kPairs>;
  VecF32 rows[kOutputs][kSide];
  for (int j = 0; j < kSide; ++j) {
    VecF32 v[kSide], column[kOutputs];
#pragma GCC unroll 8
    for (int i = 0; i < kSide; ++i) v[i] = load(m + (i * kSide + j) * plane_step);
    to_outputs<kPairs, kOutputs>(v, column);
#pragma GCC unroll 8
    for (int i = 0; i < kOutputs; ++i) rows[i][j] = column[i];
  }
  for (int i = 0; i < kOutputs; ++i) to_outputs<kPairs, kOutputs>(rows[i], y + i * kOutputs);
}

// Sets the flag if a sum of values is not finite.
inline void watch(VecF32 sum, std::int32_t* flag) {
  const VecF32 difference = sum - sum;
  bool finite = true;
  for (int lane = 0; lane < kLanes<float>; ++lane) finite &= difference[lane] == 0;
  if (!finite) __atomic_store_n(flag, 1, __ATOMIC_RELAXED);
}

inline float* pixel_of(const conv_lstm::Image& image, const Tile& at, std::int64_t i,
                       std::int64_t j) {
  return image.data + at.image * image.step[0] + (at.y + i) * image.step[1] +
         (at.x + j) * image.step[2];
}

// Writes one group of channels of one tile of a convolution's result.
template <int kPairs, int kOutputs>
void winograd_write(const conv_lstm::Forward& p, const Tile& at, std::int64_t group, const float* m,
                    std::int64_t plane_step) {
  const conv_lstm::Geometry& g = p.geometry;
  const std::int64_t first = g.out.first(group);
  const std::int64_t rows = smaller<std::int64_t>(kOutputs, g.height - at.y);
  const std::int64_t columns = smaller<std::int64_t>(kOutputs, g.width - at.x);
  for_each_part(g.out.count(group), [&](int offset, auto... rest) __attribute__((always_inline)) {
    VecF32 y[kOutputs * kOutputs];
    winograd_output<kPairs, kOutputs>(m + offset, plane_step, y);
    VecF32 sum{};
    for (const VecF32& each : y) sum += each;
    watch(sum, p.not_finite);
    VecF32 bias{};
    if (p.bias != nullptr) bias = load(p.bias + first + offset, rest...);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < columns; ++j)
        store(pixel_of(p.result, at, i, j) + first + offset, y[i * kOutputs + j] + bias, rest...);
  });
}

// Takes the step of one group of channels of one tile; m holds its four gates, 16 slots each, the
// third and fourth in the next panel.
template <int kPairs, int kOutputs>
void winograd_step(const conv_lstm::Forward& p, const Tile& at, std::int64_t group, const float* m,
                   std::int64_t plane_step, std::int64_t panel_step) {
  const conv_lstm::Geometry& g = p.geometry;
  const std::int64_t channel = group * kGroup, channels = g.out.channels;
  const std::int64_t rows = smaller<std::int64_t>(kOutputs, g.height - at.y);
  const std::int64_t columns = smaller<std::int64_t>(kOutputs, g.width - at.x);
  const float forget_bias = float(p.forget_bias);
  for_each_part(
      g.out.count(4 * group), [&](int offset, auto... rest) __attribute__((always_inline)) {
        VecF32 u[4][kOutputs * kOutputs], sum{};
        for (int gate = 0; gate < 4; ++gate) {
          winograd_output<kPairs, kOutputs>(m + gate / 2 * panel_step + gate % 2 * kGroup + offset,
                                            plane_step, u[gate]);
          for (const VecF32& each : u[gate]) sum += each;
          if (p.bias == nullptr) continue;
          const VecF32 bias = load(p.bias + gate * channels + channel + offset, rest...);
          for (VecF32& each : u[gate]) each += bias;
        }
        watch(sum, p.not_finite);
        for (std::int64_t i = 0; i < rows; ++i)
          for (std::int64_t j = 0; j < columns; ++j) {
            VecF32 gates[4];
            for (int gate = 0; gate < 4; ++gate) {
              const std::int64_t at_channel = gate * channels + channel + offset;
              gates[gate] = u[gate][i * kOutputs + j];
              if (p.projection.data != nullptr)
                gates[gate] += load(pixel_of(p.projection, at, i, j) + at_channel, rest...);
              if (p.gates.data != nullptr)
                store(pixel_of(p.gates, at, i, j) + at_channel, gates[gate], rest...);
            }
            const VecF32 c = load(pixel_of(p.c, at, i, j) + channel + offset, rest...);
            const Gates<float> r =
                lstm_gates_head<float>(gates[0], gates[1] + forget_bias, gates[2], gates[3], c);
            store(pixel_of(p.c_next, at, i, j) + channel + offset, r.c_next, rest...);
            store(pixel_of(p.h_next, at, i, j) + channel + offset, lstm_gates_hidden(r), rest...);
          }
      });
}

// Floats of scratch memory of one task.
std::int64_t winograd_forward_scratch(const conv_lstm::Forward& p) {
  const std::int64_t points = p.geometry.points();
  return points * points * (2 * p.block * kPanel + kPanel);
}

template <int kPairs, int kOutputs>
void winograd_forward_task(const conv_lstm::Forward& p, std::int64_t task, float* scratch) {
  constexpr int kPoints = kPointCount<kPairs> * kPointCount<kPairs>;
  const conv_lstm::Geometry& g = p.geometry;
  const std::int64_t first = task % p.blocks() * p.block;
  const std::int64_t tiles = smaller(p.block, p.count - first);
  const std::int64_t group = task / p.blocks() * 4;
  const std::int64_t groups = smaller<std::int64_t>(4, g.out.groups() - group);
  const std::int64_t slots = g.in_slots();
  const std::int64_t panel_step = p.block * kPanel, plane_step = 2 * panel_step + kPanel;
  const std::int64_t panels = (groups + 1) / 2;
  const auto left = [&](std::int64_t point) {
    return p.inputs.data + point * p.inputs.plane_step + first * kPanel;
  };
  const auto right = [&](std::int64_t k) {  // panels of one point after those of another
    return p.transformed + k / panels * g.weight_step() + (group / 2 + k % panels) * slots * kPanel;
  };
  for (std::int64_t k = 0; k < kPoints * panels; ++k) {
    const std::int64_t point = k / panels, panel = k % panels;
    const bool last = k + 1 == kPoints * panels;
    gemm<float, Left::kRows, false>(
        left(point), p.inputs.panel_step, right(k),
        scratch + point * plane_step + panel * panel_step, tiles, slots,
        groups - 2 * panel > 1 ? kPanel : int(kGroup),
        {left(last ? point : (k + 1) / panels), right(last ? k : k + 1)});
  }
  for (std::int64_t t = 0; t < tiles; ++t) {
    const Tile at = tile_at(g, p.first + first + t);
    const float* m = scratch + t * kPanel;
    if (g.out.blocks == 4) {
      winograd_step<kPairs, kOutputs>(p, at, group / 4, m, plane_step, panel_step);
      continue;
    }
    for (std::int64_t k = 0; k < groups; ++k)
      winograd_write<kPairs, kOutputs>(p, at, group + k, m + k / 2 * panel_step + k % 2 * kGroup,
                                       plane_step);
  }
}

void winograd_forward(const conv_lstm::Forward& params, std::int64_t begin, std::int64_t end,
                      float* scratch) {
  visit_form(params.geometry, [&]<int kPairs, int kOutputs>() {
    for (std::int64_t task = begin; task < end; ++task)
      winograd_forward_task<kPairs, kOutputs>(params, task, scratch);
  });
}

std::int64_t winograd_backward_input_scratch(const conv_lstm::BackwardInput& p) {
  const std::int64_t points = p.geometry.points();
  return points * points * (p.block * kPanel + kPanel);
}

// Adds B dV B^T of one tile and group to the gradient of its source.
template <int kPairs>
void winograd_add(const conv_lstm::Geometry& g, const conv_lstm::Image& image, const Tile& at,
                  std::int64_t first, int count, const float* dv, std::int64_t plane_step,
                  std::int32_t* not_finite) {
  constexpr int kSide = kPointCount<kPairs>;
  const std::int64_t top = at.y - g.kernel / 2, left = at.x - g.kernel / 2;
  const int y_begin = top < 0 ? int(-top) : 0, x_begin = left < 0 ? int(-left) : 0;
  const int y_end = int(smaller<std::int64_t>(kSide, g.height - top));
  const int x_end = int(smaller<std::int64_t>(kSide, g.width - left));
  const Tile origin = {at.image, top, left};
  for_each_part(count, [&](int offset, auto... rest) __attribute__((always_inline)) {
    VecF32 rows[kSide][kSide];
    for (int j = 0; j < kSide; ++j) {
      VecF32 v[kSide], d[kSide];
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) v[i] = load(dv + (i * kSide + j) * plane_step + offset);
      from_points<kPairs>(v, d);
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i) rows[i][j] = d[i];
    }
    VecF32 sum{};
    for (int i = y_begin; i < y_end; ++i) {
      VecF32 d[kSide];
      from_points<kPairs>(rows[i], d);
      float* to = pixel_of(image, origin, i, 0) + first + offset;
#pragma GCC unroll 8
      for (int j = 0; j < kSide; ++j) {
        if (j < x_begin || j >= x_end) continue;
        float* pixel = to + j * image.step[2];
        store(pixel, load(pixel, rest...) + d[j], rest...);
        sum += d[j];
      }
    }
    watch(sum, not_finite);
  });
}

template <int kPairs>
void winograd_backward_input_task(const conv_lstm::BackwardInput& p, std::int64_t task,
                                  float* scratch) {
  constexpr int kPoints = kPointCount<kPairs> * kPointCount<kPairs>;
  const conv_lstm::Geometry& g = p.geometry;
  const std::int64_t panel = task / p.shares(), share = task % p.shares() * p.share;
  struct {
    const conv_lstm::Image* image;
    std::int64_t first;
    int count;
  } group[2] = {};
  for (int k = 0; k < 2; ++k) {
    std::int64_t slot_group = 2 * panel + k;
    for (int source = 0; source < 2; ++source) {
      const std::int64_t groups = g.in[source].groups();
      if (slot_group >= 0 && slot_group < groups && p.grad_image[source].data != nullptr)
        group[k] = {&p.grad_image[source], g.in[source].first(slot_group),
                    g.in[source].count(slot_group)};
      slot_group -= groups;
    }
  }
  if (group[0].image == nullptr && group[1].image == nullptr) return;
  const std::int64_t slots = g.out_slots(), plane_step = p.block * kPanel + kPanel;
  const std::int64_t end = smaller(share + p.share, p.count);
  for (std::int64_t first = share; first < end; first += p.block) {
    const std::int64_t tiles = smaller(p.block, end - first);
    const auto left = [&](int point) {
      return p.grad.data + point * p.grad.plane_step + first * kPanel;
    };
    const auto right = [&](int point) {
      return p.transposed + point * g.transposed_step() + panel * slots * kPanel;
    };
    for (int point = 0; point < kPoints; ++point) {
      const int next = point + 1 < kPoints ? point + 1 : point;
      gemm<float, Left::kRows, false>(
          left(point), p.grad.panel_step, right(point), scratch + point * plane_step, tiles, slots,
          group[1].image == nullptr ? int(kGroup) : kPanel, {left(next), right(next)});
    }
    for (std::int64_t t = 0; t < tiles; ++t) {
      const Tile at = tile_at(g, p.first + first + t);
      for (int k = 0; k < 2; ++k)
        if (group[k].image != nullptr)
          winograd_add<kPairs>(g, *group[k].image, at, group[k].first, group[k].count,
                               scratch + t * kPanel + k * kGroup, plane_step, p.not_finite);
    }
  }
}

void winograd_backward_input(const conv_lstm::BackwardInput& params, std::int64_t begin,
                             std::int64_t end, float* scratch) {
  visit_form(params.geometry, [&]<int kPairs, int kOutputs>() {
    for (std::int64_t task = begin; task < end; ++task)
      winograd_backward_input_task<kPairs>(params, task, scratch);
  });
}

// The bias' gradient: at the point (1, 1) every power is one, so dM is the sum of a tile's outputs.
void winograd_backward_bias(const conv_lstm::BackwardWeight& p, std::int64_t panel) {
  const conv_lstm::Geometry& g = p.geometry;
  const std::int64_t point = g.points() + 1;
  const float* rows = p.grad.data + point * p.grad.plane_step + panel * p.grad.panel_step;
  for (std::int64_t group = 2 * panel; group < smaller(2 * panel + 2, g.out.groups()); ++group)
    for_each_part(g.out.count(group), [&](int offset, auto... rest) __attribute__((always_inline)) {
      const float* from = rows + group % 2 * kGroup + offset;
      float* to = p.grad_bias + g.out.first(group) + offset;
      VecF32 sum{}, lost{};
      if (p.adds_bias) sum = load(to, rest...);
      for (std::int64_t t = 0; t < p.count; ++t) {
        const VecF32 x = load(from + t * kPanel) - lost;
        const VecF32 next = sum + x;
        lost = (next - sum) - x;
        sum = next;
      }
      store(to, sum, rest...);
    });
}

void winograd_backward_weight(const conv_lstm::BackwardWeight& p, std::int64_t begin,
                              std::int64_t end) {
  const conv_lstm::Geometry& g = p.geometry;
  const std::int64_t slots = g.in_slots();
  for (std::int64_t task = begin; task < end; ++task) {
    const std::int64_t point = task / g.out_panels(), panel = task % g.out_panels();
    if (point == 0 && p.grad_bias != nullptr) winograd_backward_bias(p, panel);
    if (p.grad_transformed == nullptr) continue;
    const int columns = 2 * panel + 1 < g.out.groups() ? kPanel : int(kGroup);
    float* to = p.grad_transformed + point * g.weight_step() + panel * slots * kPanel;
    if (!p.adds_weight) fill(to, slots * kPanel, 0.0f);
    // Tiles are summed in runs: rounding in one sum of them all would grow with their number.
    for (std::int64_t first = 0; first < p.count; first += p.run) {
      const float* right =
          p.grad.data + point * p.grad.plane_step + panel * p.grad.panel_step + first * kPanel;
      for (std::int64_t rows = 0; rows < slots; rows += kPanel) {
        const float* left = p.inputs.data + point * p.inputs.plane_step +
                            rows / kPanel * p.inputs.panel_step + first * kPanel;
        const bool last = rows + kPanel >= slots;
        gemm<float, Left::kColumns, true>(
            left, 0, right, to + rows * kPanel, smaller<std::int64_t>(kPanel, slots - rows),
            smaller(p.run, p.count - first), columns,
            {last ? left : left + p.inputs.panel_step, last ? right + p.grad.panel_step : right});
      }
    }
  }
}

// G w G^T of 16 channels of one side, `lane_step` apart in the weight, and one of the other.
template <int kPairs, int kKernel>
inline void winograd_filter(const float* weight, std::int64_t lane_step, int count, float* to,
                            std::int64_t plane_step) {
  constexpr int kSide = kPointCount<kPairs>;
  constexpr Scales<kPairs> kScales;
  float taps[kKernel * kKernel][kGroup] = {};
  for (int lane = 0; lane < count; ++lane)
    for (int tap = 0; tap < kKernel * kKernel; ++tap)
      taps[tap][lane] = weight[lane * lane_step + tap];
  for (int part = 0; part < kGroup; part += kLanes<float>) {
    VecF32 rows[kKernel][kSide];
    for (int a = 0; a < kKernel; ++a) {
      VecF32 w[kKernel];
#pragma GCC unroll 8
      for (int b = 0; b < kKernel; ++b) w[b] = load(taps[a * kKernel + b] + part);
      from_outputs<kPairs, kKernel>(w, rows[a]);
    }
    for (int j = 0; j < kSide; ++j) {
      VecF32 w[kKernel], u[kSide];
#pragma GCC unroll 8
      for (int a = 0; a < kKernel; ++a) w[a] = rows[a][j] * kScales.at[j];
      from_outputs<kPairs, kKernel>(w, u);
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i)
        store_at_point(to + (i * kSide + j) * plane_step + part, u[i] * kScales.at[i]);
    }
  }
}

// G^T dU G of the same.
template <int kPairs, int kKernel>
inline void winograd_filter_backward(const float* from, std::int64_t plane_step, float* weight,
                                     std::int64_t lane_step, int count) {
  constexpr int kSide = kPointCount<kPairs>;
  constexpr Scales<kPairs> kScales;
  float taps[kKernel * kKernel][kGroup];
  for (int part = 0; part < kGroup; part += kLanes<float>) {
    VecF32 rows[kKernel][kSide];
    for (int j = 0; j < kSide; ++j) {
      VecF32 u[kSide], w[kKernel];
#pragma GCC unroll 8
      for (int i = 0; i < kSide; ++i)
        u[i] = load(from + (i * kSide + j) * plane_step + part) * kScales.at[i];
      to_outputs<kPairs, kKernel>(u, w);
#pragma GCC unroll 8
      for (int a = 0; a < kKernel; ++a) rows[a][j] = w[a] * kScales.at[j];
    }
    for (int a = 0; a < kKernel; ++a) {
      VecF32 w[kKernel];
      to_outputs<kPairs, kKernel>(rows[a], w);
#pragma GCC unroll 8
      for (int b = 0; b < kKernel; ++b) store(taps[a * kKernel + b] + part, w[b]);
    }
  }
  for (int lane = 0; lane < count; ++lane)
    for (int tap = 0; tap < kKernel * kKernel; ++tap)
      weight[lane * lane_step + tap] = taps[tap][lane];
}

template <class Body>
inline void visit_filter(const conv_lstm::Geometry& g, Body body) {
  if (g.points() == 6)
    body.template operator()<2, 3>();
  else if (g.kernel == 3)
    body.template operator()<3, 3>();
  else if (g.kernel == 5)
    body.template operator()<3, 5>();
  else
    body.template operator()<3, 7>();
}

// The first input channel of a slot's group, counted over both sources, and how many it has.
struct InputGroup {
  std::int64_t first;
  int count;
};
inline InputGroup input_group(const conv_lstm::Geometry& g, std::int64_t group) {
  const std::int64_t before = g.in[0].groups();
  if (group < before) return {g.in[0].first(group), g.in[0].count(group)};
  return {g.in[0].channels + g.in[1].first(group - before), g.in[1].count(group - before)};
}

void winograd_weight(const conv_lstm::Weight& p, std::int64_t begin, std::int64_t end) {
  const conv_lstm::Geometry& g = p.geometry;
  const std::int64_t taps = std::int64_t(g.kernel) * g.kernel;
  const std::int64_t in_channels = g.in[0].channels + g.in[1].channels, in_slots = g.in_slots();
  visit_filter(g, [&]<int kPairs, int kKernel>() {
    for (std::int64_t task = begin; task < end; ++task) {
      const float* from = p.weight + g.out.first(task) * in_channels * taps;
      float* to = p.transformed + task / 2 * in_slots * kPanel + task % 2 * kGroup;
      for (std::int64_t slot = 0; slot < in_slots; ++slot) {
        const InputGroup group = input_group(g, slot / kGroup);
        const int lane = int(slot % kGroup);
        const bool filled = lane < group.count;
        winograd_filter<kPairs, kKernel>(from + (filled ? group.first + lane : 0) * taps,
                                         in_channels * taps, filled ? g.out.count(task) : 0,
                                         to + slot * kPanel, g.weight_step());
      }
    }
  });
}

void winograd_weight_transposed(const conv_lstm::Weight& p, std::int64_t begin, std::int64_t end) {
  const conv_lstm::Geometry& g = p.geometry;
  const std::int64_t taps = std::int64_t(g.kernel) * g.kernel;
  const std::int64_t in_channels = g.in[0].channels + g.in[1].channels, out_slots = g.out_slots();
  visit_filter(g, [&]<int kPairs, int kKernel>() {
    for (std::int64_t task = begin; task < end; ++task) {
      const InputGroup group = input_group(g, task);
      float* to = p.transformed + task / 2 * out_slots * kPanel + task % 2 * kGroup;
      for (std::int64_t slot = 0; slot < out_slots; ++slot) {
        const std::int64_t out_group = slot / kGroup;
        const int lane = int(slot % kGroup);
        const bool filled = lane < g.out.count(out_group);
        const std::int64_t channel = filled ? g.out.first(out_group) + lane : 0;
        winograd_filter<kPairs, kKernel>(p.weight + (channel * in_channels + group.first) * taps,
                                         taps, filled ? group.count : 0, to + slot * kPanel,
                                         g.transposed_step());
      }
    }
  });
}

void winograd_weight_backward(const conv_lstm::Weight& p, std::int64_t begin, std::int64_t end) {
  const conv_lstm::Geometry& g = p.geometry;
  const std::int64_t taps = std::int64_t(g.kernel) * g.kernel;
  const std::int64_t in_channels = g.in[0].channels + g.in[1].channels, in_slots = g.in_slots();
  visit_filter(g, [&]<int kPairs, int kKernel>() {
    for (std::int64_t task = begin; task < end; ++task) {
      float* to = p.weight + g.out.first(task) * in_channels * taps;
      const float* from = p.transformed + task / 2 * in_slots * kPanel + task % 2 * kGroup;
      for (std::int64_t slot = 0; slot < in_slots; ++slot) {
        const InputGroup group = input_group(g, slot / kGroup);
        const int lane = int(slot % kGroup);
        if (lane >= group.count) continue;
        winograd_filter_backward<kPairs, kKernel>(from + slot * kPanel, g.weight_step(),
                                                  to + (group.first + lane) * taps,
                                                  in_channels * taps, g.out.count(task));
      }
    }
  });
}

}  // namespace
}  // namespace geco::cpu
