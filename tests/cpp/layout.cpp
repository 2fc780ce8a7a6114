// Images brought from one memory format to the other.
#include "include/layout.h"

#include <algorithm>
#include <vector>

#include "harness.h"

namespace geco::test {
namespace {

void transposed(const cpu::Level& level) {
  Random random(31);
  for (const std::int64_t rows : {1, 3, 4, 15, 16, 17, 64})
    for (const std::int64_t columns : {1, 7, 16, 63, 64, 65, 196})
      for (const Edge edge : kEdges) {
        const std::int64_t size = rows * columns, room = size + random.below(3), batch = 3;
        std::vector<float> given(std::size_t((batch - 1) * room + size));
        for (float& each : given) each = float(random.normal());
        const Guarded from(given.size() * sizeof(float), edge);
        const Guarded to(std::size_t(batch * size) * sizeof(float), edge);
        std::copy(given.begin(), given.end(), reinterpret_cast<float*>(from.data()));
        const float* result = reinterpret_cast<const float*>(to.data());
        const layout::Transpose params{reinterpret_cast<const float*>(from.data()),
                                       reinterpret_cast<float*>(to.data()),
                                       batch,
                                       rows,
                                       columns,
                                       room,
                                       size};
        const std::int64_t middle = random.below(params.tasks() + 1);
        level.kernels->transpose_images(params, middle, params.tasks());
        level.kernels->transpose_images(params, 0, middle);
        for (std::int64_t image = 0; image < batch; ++image)
          for (std::int64_t r = 0; r < rows; ++r)
            for (std::int64_t c = 0; c < columns; ++c)
              expect(result[image * size + c * rows + r] ==
                         given[std::size_t(image * room + r * columns + c)],
                     "transposed image",
                     [&] { return std::to_string(rows) + " x " + std::to_string(columns); });
      }
}

const Register tests[] = {{"transpose_images", transposed}};

}  // namespace
}  // namespace geco::test
