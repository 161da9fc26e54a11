#include "checks.h"
#include "matrices.h"

namespace mlk {

void check_product(Pool& pool, const Table& table) {
  int bits = BITS[between(0, 6)], group = 32 << between(0, 2);
  size_t rows = between(1, 70);
  size_t columns = bits ? size_t(group) * between(1, 1 + 1400 / group) : between(1, 1400);
  size_t m = between(0, 3) ? between(1, 8) : between(9, 70);
  Type x_type = any_type();
  Numbers a(bits, group, any_type(), rows, columns);
  a.matrix.is_coarse = between(0, 2) == 0;
  Values x(x_type, normals(m * columns));
  std::vector<char> y(m * rows * size_of(x_type));
  matrix_product(pool, table, a.matrix, {x.bytes.data(), x_type, m, columns}, y.data());
  // Few rows may be counted in steps of 2^-23 of the largest activation of a group, many in steps of
  // a 32767th, both coarsely of a 127th: these move a sum by no more than weights times half a step.
  const bool is_fine = m <= few_rows && !a.matrix.is_coarse;
  const double step = is_fine ? 2.02 * EPSILON : a.matrix.is_coarse ? 0.505 / 127 : 0.505 / 32767;
  std::vector<double> steps(m * columns, 0.0);
  for (size_t i = 0; bits && i < m * columns; i += group) {
    double largest = 0;
    for (int k = 0; k < group; ++k) largest = std::max(largest, std::abs(x.exact[i + k]));
    for (int k = 0; k < group; ++k) steps[i + k] = largest * step / EPSILON;
  }
  for (size_t i = 0; i < m; ++i) {
    for (size_t r = 0; r < rows; ++r) {
      double expected = 0, size = 0, stepped = 0;
      for (size_t k = 0; k < columns; ++k) {
        expected += x.exact[i * columns + k] * a.exact[r * columns + k];
        size += std::abs(x.exact[i * columns + k]) * a.size[r * columns + k];
        double weight = is_fine ? a.size[r * columns + k] : std::abs(a.exact[r * columns + k]);
        stepped += steps[i * columns + k] * weight;
      }
      double bound = ((std::sqrt(double(columns)) + 4) * size + stepped) * EPSILON;
      require(read(x_type, y, i * rows + r), expected, bound + rounding(x_type, expected), "product");
    }
  }
}

void check_not_finite(Pool& pool, const Table& table, float bad) {
  for (int bits : {2, 3, 4, 5, 6, 8}) {
    for (bool is_coarse : {false, true}) {
      for (size_t m : {3, 20}) {
        size_t rows = 40, columns = 96;
        std::vector<uint32_t> words(rows * columns * bits / 32, 0x76543210u);
        std::vector<float> ones(rows * 3, 1.0f), x = normals(m * columns), y(m * rows);
        x[columns + 5] = bad;
        Matrix a{words.data(), Type::f32, rows, columns, bits, 32, ones.data(), ones.data(), is_coarse};
        matrix_product(pool, table, a, {x.data(), Type::f32, m, columns}, y.data());
        for (size_t i = 0; i < m * rows; ++i) {
          require(std::isfinite(y[i]), i / rows != 1, 0, "products of what is not finite");
        }
      }
    }
  }
}

}  // namespace mlk
