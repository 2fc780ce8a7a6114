// A chain of linear layers on the CPU, forward and backward; include/coupling_mlp.h has the
// formulas and the layouts. A block of rows goes through all layers before the next one does: its
// values stay in cache, in panels, and bias, context and activation are applied to each panel as a
// product leaves it. Backward takes the same road with D, then makes the weights' gradients tile by
// tile, each summed over the blocks in their order. What has to move: the operands once, the packed
// weights once for each block, and for backward y and D, written once and read by each run of
// tiles. The trick that isn't obvious: D times a weight takes it as it lies, in panels; only
// forward's copy is transposed.
#pragma once

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

template <class T>
void coupling_mlp_pack_transposed(const mlp::Layer& layer, std::int64_t panel) {
  const Matrix& w = layer.weight;
  const int columns = columns_of(panel, layer.out);
  T* to = static_cast<T*>(layer.packed) + panel * (layer.in + 1) * kPanel;
  pack_panel(place_of<T>(w, panel * kPanel, 0), w.column, w.row, layer.in, columns, to);
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

template <class T>
void coupling_mlp_forward_block(const mlp::Forward& p, std::int64_t block, T* scratch) {
  const BlockOfRows at(p.batch, block);
  const std::int64_t panel_size = at.rows * kPanel;
  T* const spare = scratch;
  T* const inputs[] = {spare + mlp::Batch::kMostRows * kPanel,
                       spare + mlp::Batch::kMostRows * (kPanel + p.widest())};
  pack(p.x, at.first, at.rows, p.layers[0].in, inputs[0]);
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
          const Matrix& w = layer.weight;
          pack_panel(place_of<T>(w, 0, panel * kPanel), w.row, w.column, layer.out,
                     columns_of(panel, layer.in),
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
                                columns_of(panel, layer.in), {grad, weight + layer.out * kPanel});
  };
  pack(p.grad, at.first, at.rows, p.last().out, at.panels<T>(p.last().grad, p.last().out));
  for (std::int64_t l = p.count - 1; l >= p.lowest; --l) {
    const mlp::Layer& layer = p.layers[l];
    if (l == 0) {
      if (layer.input != nullptr)
        pack(p.x, at.first, at.rows, layer.in, at.panels<T>(layer.input, layer.in));
      if (p.grad_projection.data != nullptr)
        unpack(at.panels<T>(layer.grad, layer.out), at.first, at.rows, layer.out,
               p.grad_projection);
      for (std::int64_t panel = 0; p.grad_x.data != nullptr && panel < mlp::panels(layer.in);
           ++panel) {
        through(layer, panel, scratch);
        unpack_panel(scratch, at.rows, columns_of(panel, layer.in),
                     place_of<T>(p.grad_x, at.first, panel * kPanel), p.grad_x.row,
                     p.grad_x.column);
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
                                    at.rows, columns_of(in, layer.in),
                                    {left, right + at.rows * kPanel});
    }
  }
  for (std::int64_t k = 0; k < count; ++k) {
    const std::int64_t out = (first + k) / across, in = (first + k) % across;
    unpack_panel(sums + k * p.kTile, columns_of(out, layer.out), columns_of(in, layer.in),
                 place_of<T>(layer.grad_weight, out * kPanel, in * kPanel), layer.grad_weight.row,
                 layer.grad_weight.column);
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
