// What MLX may ask of a primitive besides its numbers: gradients, and itself over one more axis. The
// kernels have neither, and say so with what to do.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mlx/primitives.h"

namespace mlk::graph {

template <class Base>
class Untransformed : public Base {
  using Arrays = std::vector<mlx::core::array>;
  using Indices = std::vector<int>;

 public:
  using Base::Base;

  Arrays jvp(const Arrays&, const Arrays&, const Indices&) override { lacks("derivative"); }
  Arrays vjp(const Arrays&, const Arrays&, const Indices&, const Arrays&) override { lacks("gradient"); }
  std::pair<Arrays, Indices> vmap(const Arrays&, const Indices&) override { lacks("vectorized form (vmap)"); }

 private:
  [[noreturn]] void lacks(const char* what) const {
    throw std::invalid_argument(std::string(this->name()) + ": the native CPU kernels have no " + what +
                                "; uninstall mlx_llama_kernels, and MLX's own operations run, which do");
  }
};

}  // namespace mlk::graph
