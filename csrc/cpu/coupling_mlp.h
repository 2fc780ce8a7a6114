// A chain of linear layers on the CPU, forward and backward; include/coupling_mlp.h has the
// formulas and the layouts. A block of rows goes through all layers before the next one does: its
// values stay in cache, in panels, and bias, context and activation are applied to each panel as a
// product leaves it. Backward takes the same road with D, then makes the weights' gradients tile by
// tile, each summed over the blocks in their order. What has to move: the operands once, the packed
// weights once for each block, and for backward y and D, written once and read by each run of
// tiles. The trick that isn't obvious: D times a weight takes it as it lies, in panels; only
// forward's copy is transposed.
#pragma once

#include "cpu/affine_coupling.h"
#include "cpu/panels.h"
#include "include/coupling_mlp.h"

namespace geco::cpu {
namespace {

namespace mlp = coupling_mlp;

static_assert(mlp::kPanel == kPanel);

// y = value(u), and gradient(kept, d) is d times the derivative, where y or u is kept. What NaN
// gives is PyTorch's choice.
template <class T>
struct Linear {
  static Vec<T> value(Vec<T> u) { return u; }
};
template <class T>
struct Relu {
  static Vec<T> value(Vec<T> u) { return u < T(0) ? Vec<T>{} : u; }
  static Vec<T> gradient(Vec<T> y, Vec<T> d) { return y <= T(0) ? Vec<T>{} : d; }
};
template <class T>
struct LeakyRelu {
  static Vec<T> value(Vec<T> u) { return u > T(0) ? u : u * T(0.01); }
  static Vec<T> gradient(Vec<T> y, Vec<T> d) { return y > T(0) ? d : d * T(0.01); }
};
template <class T>
struct Tanh {
  static Vec<T> value(Vec<T> u) {
    const TanhParts<T> t = tanh_parts<T>(u);
    return t.numerator * reciprocal(t.denominator);
  }
  static Vec<T> gradient(Vec<T> u, Vec<T> d) {
    const TanhParts<T> t = tanh_parts<T>(u);
    return d * t.derivative(reciprocal(t.denominator));
  }
};
template <class T>
struct Elu {
  static Vec<T> value(Vec<T> u) { return u > T(0) ? u : expm1_twice<T>(u * T(0.5)); }
  static Vec<T> gradient(Vec<T> u, Vec<T> d) { return u > T(0) ? d : d * exp<T, 1>(u); }
};
template <class T>
struct Silu {
  static constexpr T kBound = kSigmoidBound<T>;
  static Vec<T> sigmoid(Vec<T> u, Vec<T> e) { return zero_below(u, -kBound, reciprocal(e + T(1))); }
  static Vec<T> value(Vec<T> u) { return u * sigmoid(u, sigmoid_exp<T>(u, kBound)); }
  static Vec<T> gradient(Vec<T> u, Vec<T> d) {
    // Past the bound it isn't small beside every u.
    const Vec<T> e = u > kBound ? Vec<T>{} : sigmoid_exp<T>(u, kBound);
    const Vec<T> q = sigmoid(u, e);
    return d * (q * (u * (e * q) + T(1)));
  }
};

template <class T, class Body>
inline void visit_activation(mlp::Activation activation, Body body) {
  switch (activation) {
    case mlp::Activation::kRelu:
      return body(Relu<T>{});
    case mlp::Activation::kLeakyRelu:
      return body(LeakyRelu<T>{});
    case mlp::Activation::kTanh:
      return body(Tanh<T>{});
    case mlp::Activation::kElu:
      return body(Elu<T>{});
    case mlp::Activation::kSilu:
      return body(Silu<T>{});
  }
}

// Calls body(zero of the type of the operands).
template <class Body>
inline void visit_wide(DType dtype, Body body) {
  if (dtype == DType::kFloat64)
    body(0.0);
  else
    body(0.0f);
}

// Calls body(layer, panel) for the tasks [begin, end), where `count` gives each layer's.
template <class Count, class Body>
inline void for_each_task(const mlp::Chain& p, std::int64_t begin, std::int64_t end, Count count,
                          Body body) {
  for (std::int64_t l = 0; l < p.count && end > 0; ++l) {
    const std::int64_t tasks = count(p.layers[l]);
    for (std::int64_t task = larger<std::int64_t>(begin, 0); task < smaller(end, tasks); ++task)
      body(p.layers[l], task);
    begin -= tasks;
    end -= tasks;
  }
}

// The rows of a block, and where its panels begin.
struct BlockOfRows {
  std::int64_t first, rows;
  BlockOfRows(const mlp::Batch& batch, std::int64_t block)
      : first(batch.first(block)), rows(batch.first(block + 1) - first) {}
  template <class T>
  T* panels(void* values, std::int64_t width) const {
    return static_cast<T*>(values) + first * mlp::padded(width);
  }
};

// A panel of what comes into a layer: columns of y, or of the context.
struct Part {
  bool context;
  std::int64_t first;
  int columns;

  Part(const mlp::Layer& layer, std::int64_t panel) {
    const std::int64_t own = mlp::panels(layer.own);
    context = panel >= own;
    if (context) panel -= own;
    first = panel * kPanel;
    columns = columns_of(panel, context ? layer.in - own * kPanel : layer.own);
  }
};

// What comes into the first layer.
template <class T>
void pack_inputs(const mlp::Chain& p, const BlockOfRows& at, T* to) {
  const mlp::Layer& layer = p.layers[0];
  const std::int64_t own = mlp::padded(layer.own);
  pack(p.x, at.first, at.rows, layer.own, to);
  if (layer.in > own) pack(p.context, at.first, at.rows, layer.in - own, to + at.rows * own);
}

template <class T>
void coupling_mlp_pack_transposed(const mlp::Layer& layer, std::int64_t panel) {
  const Matrix& w = layer.weight;
  const int columns = columns_of(panel, layer.out);
  T* to = static_cast<T*>(layer.packed) + panel * (layer.in + 1) * kPanel;
  pack_panel(place_of<T>(w, panel * kPanel, 0), w.column, w.row, layer.own, columns, to);
  const std::int64_t own = mlp::padded(layer.own);
  if (layer.in > own) {
    const Matrix& c = layer.context_weight;
    fill(to + layer.own * kPanel, (own - layer.own) * kPanel, T(0));
    pack_panel(place_of<T>(c, panel * kPanel, 0), c.column, c.row, layer.in - own, columns,
               to + own * kPanel);
  }
  to += layer.in * kPanel;
  if (layer.bias.data == nullptr)
    fill(to, kPanel, T(0));
  else
    pack_panel(place_of<T>(layer.bias, 0, panel * kPanel), 0, layer.bias.column, 1, columns, to);
}

void coupling_mlp_forward_pack(const mlp::Forward& params, std::int64_t begin, std::int64_t end) {
  visit_wide(params.dtype, [&]<class T>(T) {
    for_each_task(
        params, begin, end, [](const mlp::Layer& layer) { return mlp::panels(layer.out); },
        coupling_mlp_pack_transposed<T>);
  });
}

// u = product + bias + projection, where the product was, and then y = activation(u) at `to`, which
// may be there, too.
template <class T, class Activation>
void finish_panel(Activation, T* product, const T* bias, const T* projection, T* to,
                  std::int64_t rows, int columns) {
  for (int j = 0; j < columns; j += kLanes<T>) {
    const Vec<T> offset = load(bias + j);
    for (std::int64_t k = j; k < rows * kPanel; k += kPanel) {
      Vec<T> u = load(product + k) + offset;
      if (projection != nullptr) u += load(projection + k);
      store(product + k, u);
      store(to + k, Activation::value(u));
    }
  }
}

// The affine map of a block's rows, and the other features as they are.
template <class T>
void affine_rows(const mlp::Forward& p, const BlockOfRows& at) {
  const mlp::AffineForward& affine = p.affine;
  visit_map(affine.map, affine.inverse, [&]<ScaleMap kMap, bool kInverse>() {
    for (std::int64_t r = at.first; r < at.first + at.rows; ++r) {
      unpack_row(place_of<T>(p.x, r, 0), p.layers[0].own, place_of<T>(affine.kept, r, 0));
      T* const raw = place_of<T>(p.result, r, 0);
      CompensatedSum sum;
      for (std::int64_t j = 0; j < affine.count; j += kSpan<T>) {
        T* const operands[] = {place_of<T>(affine.x, r, j), raw + j, raw + affine.count + j,
                               place_of<T>(affine.y, r, j)};
        sum.add(affine_coupling_span<T, kMap, kInverse>(
            operands, smaller(kSpan<T>, affine.count - j), affine.clamp));
      }
      static_cast<T*>(affine.log_det)[r] = T(kInverse ? -sum.value() : sum.value());
    }
  });
}

// Gradients to x and, at `raw`, to log_scale and shift.
template <class T>
void affine_rows_backward(const mlp::AffineBackward& affine, const BlockOfRows& at, T* raw) {
  const std::int64_t count = affine.count;
  visit_map(affine.map, affine.inverse, [&]<ScaleMap kMap, bool kInverse>() {
    for (std::int64_t r = at.first; r < at.first + at.rows; ++r, raw += 2 * count) {
      T* const given = place_of<T>(affine.raw, r, 0);
      const bool has_grad = affine.grad_y.data != nullptr;
      const T* const grad_y = has_grad ? place_of<T>(affine.grad_y, r, 0) : nullptr;
      for (std::int64_t j = 0; j < count; j += kSpan<T>) {
        T* const operands[] = {
            place_of<T>(affine.x, r, j),
            given + j,
            given + count + j,
            has_grad ? place_of<T>(affine.grad_y, r, j) : nullptr,
            affine.grad_x.data != nullptr ? place_of<T>(affine.grad_x, r, j) : nullptr,
            raw + j,
            kInverse ? raw + count + j : nullptr};
        affine_coupling_backward_span<T, kMap, kInverse, T>(operands, smaller(kSpan<T>, count - j),
                                                            affine.clamp,
                                                            row_scalar<T>(affine.grad_log_det, r));
      }
      if (!has_grad) {
        fill(raw + count, count, T(0));
        if (affine.grad_x.data != nullptr) fill(place_of<T>(affine.grad_x, r, 0), count, T(0));
      } else if (!kInverse) {
        unpack_row(grad_y, count, raw + count);
      }
    }
  });
}

template <class T>
void coupling_mlp_forward_block(const mlp::Forward& p, std::int64_t block, T* scratch) {
  const BlockOfRows at(p.batch, block);
  const std::int64_t panel_size = at.rows * kPanel;
  T* const spare = scratch;
  T* const inputs[] = {spare + mlp::Batch::kMostRows * kPanel,
                       spare + mlp::Batch::kMostRows * (kPanel + p.widest())};
  pack_inputs(p, at, inputs[0]);
  const T* from = inputs[0];
  for (std::int64_t l = 0; l < p.count; ++l) {
    const mlp::Layer& layer = p.layers[l];
    const bool is_last = l + 1 == p.count;
    T* to = inputs[(l + 1) % 2];
    T* product = to;
    if (layer.hidden != nullptr) {
      product = at.panels<T>(layer.hidden, layer.out);
      if (!mlp::keeps_input(p.activation)) to = product;
    }
    const T* weight = static_cast<const T*>(layer.packed);
    const T* const input = from;
    from = to;
    for (std::int64_t panel = 0; panel < mlp::panels(layer.out); ++panel) {
      const int columns = columns_of(panel, layer.out);
      T* const u = is_last ? to : product;
      gemm<T, Left::kRows, false>(input, panel_size, weight, u, at.rows, layer.in, columns,
                                  {input, weight + (layer.in + 1) * kPanel});
      weight += layer.in * kPanel;
      const T* projection = nullptr;
      if (l == 0 && p.projection.data != nullptr) {
        pack_panel(place_of<T>(p.projection, at.first, panel * kPanel), p.projection.row,
                   p.projection.column, at.rows, columns, spare);
        projection = spare;
      }
      if (is_last) {
        finish_panel(Linear<T>{}, u, weight, projection, u, at.rows, columns);
        unpack_panel(u, at.rows, columns, place_of<T>(p.result, at.first, panel * kPanel),
                     p.result.row, p.result.column);
      } else {
        visit_activation<T>(p.activation, [&](auto activation) {
          finish_panel(activation, u, weight, projection, to, at.rows, columns);
        });
        product += panel_size;
        to += panel_size;
      }
      weight += kPanel;
    }
  }
  if (p.affine.count > 0) affine_rows<T>(p, at);
}

void coupling_mlp_forward(const mlp::Forward& params, std::int64_t begin, std::int64_t end,
                          void* scratch) {
  visit_wide(params.dtype, [&]<class T>(T) {
    for (std::int64_t block = begin; block < end; ++block)
      coupling_mlp_forward_block(params, block, static_cast<T*>(scratch));
  });
}

void coupling_mlp_backward_pack(const mlp::Backward& params, std::int64_t begin, std::int64_t end) {
  visit_wide(params.dtype, [&]<class T>(T) {
    for_each_task(
        params, begin, end,
        [](const mlp::Layer& layer) { return layer.packed ? mlp::panels(layer.in) : 0; },
        [](const mlp::Layer& layer, std::int64_t panel) {
          const Part part(layer, panel);
          const Matrix& w = part.context ? layer.context_weight : layer.weight;
          pack_panel(place_of<T>(w, 0, part.first), w.row, w.column, layer.out, part.columns,
                     static_cast<T*>(layer.packed) + panel * layer.out * kPanel);
        });
  });
}

template <class T, class Activation>
void coupling_mlp_backward_block(const mlp::Backward& p, Activation, std::int64_t block,
                                 T* scratch) {
  const BlockOfRows at(p.batch, block);
  const std::int64_t panel_size = at.rows * kPanel;
  const auto through = [&](const mlp::Layer& layer, std::int64_t panel, T* to) {
    const T* const grad = at.panels<T>(layer.grad, layer.out);
    const T* const weight = static_cast<const T*>(layer.packed) + panel * layer.out * kPanel;
    gemm<T, Left::kRows, false>(grad, panel_size, weight, to, at.rows, layer.out,
                                Part(layer, panel).columns, {grad, weight + layer.out * kPanel});
  };
  T* const last = at.panels<T>(p.last().grad, p.last().out);
  if (p.affine.count > 0) {
    affine_rows_backward(p.affine, at, scratch);
    pack({scratch, p.last().out, 1}, 0, at.rows, p.last().out, last);
  } else {
    pack(p.grad, at.first, at.rows, p.last().out, last);
  }
  for (std::int64_t l = p.count - 1; l >= p.lowest; --l) {
    const mlp::Layer& layer = p.layers[l];
    if (l == 0) {
      if (layer.input != nullptr) pack_inputs(p, at, at.panels<T>(layer.input, layer.in));
      if (p.grad_projection.data != nullptr)
        unpack(at.panels<T>(layer.grad, layer.out), at.first, at.rows, layer.out,
               p.grad_projection);
      for (std::int64_t panel = 0; panel < mlp::panels(layer.in); ++panel) {
        const Part part(layer, panel);
        const Matrix& to = part.context ? p.grad_context : p.grad_x;
        if (to.data == nullptr) continue;
        through(layer, panel, scratch);
        const Matrix& more = p.affine.grad_kept;
        if (!part.context && more.data != nullptr)
          add_panel(place_of<T>(more, at.first, part.first), more.row, at.rows, part.columns,
                    scratch);
        unpack_panel(scratch, at.rows, part.columns, place_of<T>(to, at.first, part.first), to.row,
                     to.column);
      }
      continue;
    }
    const mlp::Layer& before = p.layers[l - 1];
    const bool fills_input = layer.input != nullptr && layer.input != before.hidden;
    const bool goes_on = l > p.lowest;
    if (!fills_input && !goes_on) continue;
    const T* const kept = at.panels<T>(before.hidden, layer.in);
    T* const input = fills_input ? at.panels<T>(layer.input, layer.in) : nullptr;
    T* const grad = goes_on ? at.panels<T>(before.grad, layer.in) : nullptr;
    for (std::int64_t panel = 0; panel < mlp::panels(layer.in); ++panel) {
      const std::int64_t first = panel * panel_size, end = first + panel_size;
      if (goes_on) through(layer, panel, grad + first);
      for (int j = 0; j < columns_of(panel, layer.in); j += kLanes<T>)
        for (std::int64_t k = first + j; k < end; k += kPanel) {
          const Vec<T> each = load(kept + k);
          if (fills_input) store(input + k, Activation::value(each));
          if (goes_on) store(grad + k, Activation::gradient(each, load(grad + k)));
        }
    }
  }
}

void coupling_mlp_backward(const mlp::Backward& params, std::int64_t begin, std::int64_t end,
                           void* scratch) {
  visit_wide(params.dtype, [&]<class T>(T) {
    visit_activation<T>(params.activation, [&](auto activation) {
      for (std::int64_t block = begin; block < end; ++block)
        coupling_mlp_backward_block(params, activation, block, static_cast<T*>(scratch));
    });
  });
}

// Tiles that follow one another share a panel of D; as many as fit the second-level cache go
// through the batch together.
template <class T>
void coupling_mlp_tiles(const mlp::Backward& p, const mlp::Layer& layer, std::int64_t first,
                        std::int64_t count, T* sums) {
  const std::int64_t across = mlp::panels(layer.in);
  fill(sums, count * p.kTile, T(0));
  for (std::int64_t block = 0; block < p.batch.blocks(); ++block) {
    const BlockOfRows at(p.batch, block);
    const T* const grad = at.panels<T>(layer.grad, layer.out);
    const T* const input = at.panels<T>(layer.input, layer.in);
    for (std::int64_t k = 0; k < count; ++k) {
      const std::int64_t out = (first + k) / across, in = (first + k) % across;
      const T* const left = grad + out * at.rows * kPanel;
      const T* const right = input + in * at.rows * kPanel;
      gemm<T, Left::kColumns, true>(left, 0, right, sums + k * p.kTile, columns_of(out, layer.out),
                                    at.rows, Part(layer, in).columns,
                                    {left, right + at.rows * kPanel});
    }
  }
  for (std::int64_t k = 0; k < count; ++k) {
    const std::int64_t out = (first + k) / across;
    const Part part(layer, (first + k) % across);
    const Matrix& to = part.context ? layer.grad_context_weight : layer.grad_weight;
    if (to.data == nullptr) continue;
    unpack_panel(sums + k * p.kTile, columns_of(out, layer.out), part.columns,
                 place_of<T>(to, out * kPanel, part.first), to.row, to.column);
  }
}

void coupling_mlp_backward_weight(const mlp::Backward& params, std::int64_t begin, std::int64_t end,
                                  void* scratch) {
  visit_wide(params.dtype, [&]<class T>(T) {
    for (std::int64_t l = 0; l < params.count && end > 0; ++l) {
      const std::int64_t tiles = params.tiles(params.layers[l]), stop = smaller(end, tiles);
      for (std::int64_t first = larger<std::int64_t>(begin, 0); first < stop;
           first += params.kTilesAtOnce)
        coupling_mlp_tiles(params, params.layers[l], first,
                           smaller(params.kTilesAtOnce, stop - first), static_cast<T*>(scratch));
      begin -= tiles;
      end -= tiles;
    }
  });
}

void coupling_mlp_backward_bias(const mlp::Backward& params, std::int64_t begin, std::int64_t end) {
  visit_wide(params.dtype, [&]<class T>(T) {
    for_each_task(
        params, begin, end,
        [](const mlp::Layer& layer) { return layer.grad_bias.data ? mlp::panels(layer.out) : 0; },
        [&](const mlp::Layer& layer, std::int64_t panel) {
          T total[kPanel];
          for (int j = 0; j < columns_of(panel, layer.out); j += kLanes<T>) {
            RunningSum<T> sum;
            for (std::int64_t block = 0; block < params.batch.blocks(); ++block) {
              const BlockOfRows at(params.batch, block);
              const T* d = at.panels<T>(layer.grad, layer.out) + panel * at.rows * kPanel + j;
              for (std::int64_t r = 0; r < at.rows; ++r) sum.add(load(d + r * kPanel));
            }
            store(total + j, sum.lanes());
          }
          unpack_panel(total, 1, columns_of(panel, layer.out),
                       place_of<T>(layer.grad_bias, 0, panel * kPanel), 0, layer.grad_bias.column);
        });
  });
}

}  // namespace
}  // namespace geco::cpu
