// Matrices of any strides to and from the panels of gemm.h.
#pragma once

#include "cpu/gemm.h"
#include "include/strided.h"

namespace geco::cpu {
namespace {

template <class T>
inline T* place_of(const Matrix& matrix, std::int64_t row, std::int64_t column) {
  return static_cast<T*>(matrix.data) + row * matrix.row + column * matrix.column;
}

// a[first], b[first], a[first + 1], b[first + 1], ...
template <class V, int kFirst, int... kLane>
inline V interleave(V a, V b, std::integer_sequence<int, kLane...>) {
  return V{(kLane % 2 == 0 ? a : b)[kFirst + kLane / 2]...};
}

// As many vectors as they have lanes: after log2(lanes) such rounds row and column have changed
// places.
template <class T>
inline __attribute__((always_inline)) void transpose(Vec<T>* rows) {
  constexpr auto kEach = std::make_integer_sequence<int, kLanes<T>>{};
  constexpr int kHalf = kLanes<T> / 2;
#pragma GCC unroll 4
  for (int step = 1; step < kLanes<T>; step *= 2) {
    Vec<T> next[kLanes<T>];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = interleave<Vec<T>, 0>(rows[i], rows[i + kHalf], kEach);
      next[2 * i + 1] = interleave<Vec<T>, kHalf>(rows[i], rows[i + kHalf], kEach);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) rows[i] = next[i];
  }
}

// to[r][j] = from(r, j), r < rows, j < columns; the panel's other columns are zero. Rows or columns
// that are next to each other are read as vectors.
template <class T>
void pack_panel(const T* from, std::int64_t row, std::int64_t column, std::int64_t rows,
                int columns, T* to) {
  constexpr int kWidth = kLanes<T>;
  std::int64_t r = 0;
  if (column == 1) {
    for (; r < rows; ++r, from += row, to += kPanel)
      for (int j = 0; j < kPanel; j += kWidth) {
        const int left = columns - j;
        store(to + j, left >= kWidth ? load(from + j) : left > 0 ? load(from + j, left) : Vec<T>{});
      }
    return;
  }
  if (row == 1)
    for (; r + kWidth <= rows; r += kWidth, from += kWidth, to += kWidth * kPanel)
      for (int j = 0; j < kPanel; j += kWidth) {
        Vec<T> lines[kWidth];
        for (int k = 0; k < kWidth; ++k)
          lines[k] = j + k < columns ? load(from + (j + k) * column) : Vec<T>{};
        transpose<T>(lines);
        for (int k = 0; k < kWidth; ++k) store(to + k * kPanel + j, lines[k]);
      }
  for (; r < rows; ++r, from += row, to += kPanel) {
    for (int j = 0; j < columns; ++j) to[j] = from[j * column];
    fill(to + columns, kPanel - columns, T(0));
  }
}

// to(r, j) = from[r][j] of the same.
template <class T>
void unpack_panel(const T* from, std::int64_t rows, int columns, T* to, std::int64_t row,
                  std::int64_t column) {
  for (std::int64_t r = 0; r < rows; ++r, from += kPanel, to += row) {
    int j = 0;
    if (column == 1)
      for (; j + kLanes<T> <= columns; j += kLanes<T>) store(to + j, load(from + j));
    for (; j < columns; ++j) to[j * column] = from[j];
  }
}

// to[j] = from[j], j < count.
template <class T>
inline void unpack_row(const T* from, std::int64_t count, T* to) {
  std::int64_t j = 0;
  for (; j + kLanes<T> <= count; j += kLanes<T>) store(to + j, load(from + j));
  if (j < count) store(to + j, load(from + j, int(count - j)), int(count - j));
}

// panel[r][j] += from[r row + j], r < rows, j < columns.
template <class T>
void add_panel(const T* from, std::int64_t row, std::int64_t rows, int columns, T* panel) {
  for (std::int64_t r = 0; r < rows; ++r, from += row, panel += kPanel)
    for (int j = 0; j < columns; j += kLanes<T>) {
      const int left = columns - j;
      store(panel + j,
            load(panel + j) + (left >= kLanes<T> ? load(from + j) : load(from + j, left)));
    }
}

// How many columns of a matrix lie in a panel.
inline int columns_of(std::int64_t panel, std::int64_t width) {
  return int(smaller<std::int64_t>(kPanel, width - panel * kPanel));
}

// Rows of a matrix to panels of as many rows, and back.
template <class T>
void pack(const Matrix& from, std::int64_t first, std::int64_t rows, std::int64_t width, T* to) {
  for (std::int64_t panel = 0; panel * kPanel < width; ++panel, to += rows * kPanel)
    pack_panel(place_of<T>(from, first, panel * kPanel), from.row, from.column, rows,
               columns_of(panel, width), to);
}
template <class T>
void unpack(const T* from, std::int64_t first, std::int64_t rows, std::int64_t width,
            const Matrix& to) {
  for (std::int64_t panel = 0; panel * kPanel < width; ++panel, from += rows * kPanel)
    unpack_panel(from, rows, columns_of(panel, width), place_of<T>(to, first, panel * kPanel),
                 to.row, to.column);
}

}  // namespace
}  // namespace geco::cpu
