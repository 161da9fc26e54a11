#include "primitives.h"

#include "on_cpu.h"

namespace mlk::graph {

namespace {

class QuantizedProduct : public OnCpu {
 public:
  QuantizedProduct(mx::Stream stream, int group, int bits)
      : OnCpu(stream), group_(group), bits_(bits), is_coarse_(takes_bytes) {}
  const char* name() const override { return "MlxLlamaQuantizedProduct"; }
  bool is_equivalent(const Primitive& other) const override {
    const auto& o = dynamic_cast<const QuantizedProduct&>(other);
    return group_ == o.group_ && bits_ == o.bits_ && is_coarse_ == o.is_coarse_;
  }

 protected:
  Work work() const override {
    return [group = group_, bits = bits_, is_coarse = is_coarse_](const std::vector<array>& in, array& out) {
      Straight x(in[0]), words(in[1]), scales(in[2]), biases(in[3]);
      Matrix a{words.data(), type_of(in[2]), size_t(in[1].shape(0)), size_t(in[0].shape(-1)),
               bits,         group,          scales.data(),          biases.data(),
               is_coarse};
      mlk::matrix_product(Pool::shared(), chosen(), a, rows_of(in[0], x), out.data<char>());
    };
  }

 private:
  int group_, bits_;
  bool is_coarse_;
};

class Product : public OnCpu {
 public:
  explicit Product(mx::Stream stream) : OnCpu(stream) {}
  const char* name() const override { return "MlxLlamaProduct"; }
  bool is_equivalent(const Primitive&) const override { return true; }

 protected:
  Work work() const override {
    return [](const std::vector<array>& in, array& out) {
      Straight x(in[0]), weight(in[1]);
      Matrix a{weight.data(), type_of(in[1]), size_t(in[1].shape(0)), size_t(in[1].shape(1))};
      mlk::matrix_product(Pool::shared(), chosen(), a, rows_of(in[0], x), out.data<char>());
    };
  }
};

class RmsNorm : public OnCpu {
 public:
  RmsNorm(mx::Stream stream, float eps) : OnCpu(stream), eps_(eps) {}
  const char* name() const override { return "MlxLlamaRmsNorm"; }
  bool is_equivalent(const Primitive& other) const override {
    return eps_ == static_cast<const RmsNorm&>(other).eps_;
  }

 protected:
  Work work() const override {
    return [eps = eps_](const std::vector<array>& in, array& out) {
      Straight x(in[0]), weight(in[1]);
      mlk::rms_norm(Pool::shared(), chosen(), rows_of(in[0], x), weight.data(), type_of(in[1]), eps,
               out.data<char>());
    };
  }

 private:
  float eps_;
};

class SwiGlu : public OnCpu {
 public:
  explicit SwiGlu(mx::Stream stream) : OnCpu(stream) {}
  const char* name() const override { return "MlxLlamaSwiGlu"; }
  bool is_equivalent(const Primitive&) const override { return true; }

 protected:
  Work work() const override {
    return [](const std::vector<array>& in, array& out) {
      Straight x(in[0]);
      mlk::swiglu(Pool::shared(), chosen(), rows_of(in[0], x), out.data<char>());
    };
  }
};

class Rotation : public OnCpu {
 public:
  Rotation(mx::Stream stream, int offset) : OnCpu(stream), offset_(offset) {}
  const char* name() const override { return "MlxLlamaRotation"; }
  size_t tokens(const array& out) const override { return size_t(out.shape(0)) * out.shape(2); }
  bool is_equivalent(const Primitive& other) const override {
    return offset_ == static_cast<const Rotation&>(other).offset_;
  }

 protected:
  Work work() const override {
    return [offset = offset_](const std::vector<array>& in, array& out) {
      Headed x(in[0]);
      Straight periods(in[1]);
      mlk::rotate(Pool::shared(), chosen(), x.get(), static_cast<const float*>(periods.data()), offset,
             out.data<char>());
    };
  }

 private:
  int offset_;
};

class Append : public OnCpu {
 public:
  Append(mx::Stream stream, int row) : OnCpu(stream), row_(row) {}
  const char* name() const override { return "MlxLlamaAppend"; }
  size_t tokens(const array&) const override { return 1; }
  bool is_equivalent(const Primitive& other) const override {
    return row_ == static_cast<const Append&>(other).row_;
  }

 protected:
  void allocate(const std::vector<array>& in, array& out) const override {
    if (in[0].is_donatable() && in[0].flags().row_contiguous) out.copy_shared_buffer(in[0]);
    else OnCpu::allocate(in, out);
  }
  Work work() const override {
    return [row = row_](const std::vector<array>& in, array& out) {
      char* to = out.data<char>();
      if (in[0].data<char>() != to) std::memcpy(to, Straight(in[0]).data(), out.nbytes());
      Headed x(in[1]);
      mlk::append(Pool::shared(), chosen(), x.get(),
                  {to, type_of(out), size_t(out.shape(2)), size_t(row)});
    };
  }

 private:
  int row_;
};

class CacheAttention : public OnCpu {
 public:
  CacheAttention(mx::Stream stream, const Cached& cached) : OnCpu(stream), cached_(cached) {}
  const char* name() const override { return "MlxLlamaAttention"; }
  bool reads_cache() const override { return true; }
  size_t tokens(const array& out) const override { return size_t(out.shape(0)) * out.shape(1); }
  bool is_equivalent(const Primitive& other) const override {
    return cached_ == static_cast<const CacheAttention&>(other).cached_;
  }

 protected:
  Work work() const override {
    return [cached = cached_](const std::vector<array>& in, array& out) {
      with_attention(cached, in, [&](Attention a) {
        a.out = out.data<char>();
        mlk::attention(Pool::shared(), chosen(), a);
      });
    };
  }

 private:
  Cached cached_;
};

}  // namespace

void require_packed(int columns, const array& weight, const array& scales, const array& biases,
                    int group_size, int bits) {
  require_float("scales", scales);
  if (weight.dtype() != mx::uint32) refuse("weight: found ", weight.dtype(), ", expected uint32");
  if (biases.dtype() != scales.dtype()) {
    refuse("biases: found ", biases.dtype(), ", expected the scales' ", scales.dtype());
  }
  if (bits < 2 || bits > 8 || bits == 7) {
    refuse("bits: found ", bits, ", expected 2, 3, 4, 5, 6 or 8");
  }
  if (group_size != 32 && group_size != 64 && group_size != 128) {
    refuse("group_size: found ", group_size, ", expected 32, 64 or 128");
  }
  if (weight.ndim() != 2) refuse("weight: found ", weight.ndim(), " dimensions, expected 2");
  if (columns % group_size || columns > int64_t(most_row_groups) * group_size) {
    refuse("x: rows of ", columns, ", expected a multiple of ", group_size, ", at most ", most_row_groups,
           " times");
  }
  if (weight.shape(1) != columns * int64_t(bits) / 32) {
    refuse("weight: rows of ", weight.shape(1), " words, expected ", columns * int64_t(bits) / 32);
  }
  mx::Shape groups{weight.shape(0), columns / group_size};
  if (scales.shape() != groups || biases.shape() != groups) {
    refuse("scales and biases: expected ", groups[0], " rows of ", groups[1]);
  }
}

array quantized_matmul(const array& x, const array& weight, const array& scales,
                       const array& biases, int group_size, int bits) {
  require_float("x", x);
  if (x.ndim() < 1) refuse("x: found 0 dimensions, expected at least 1");
  require_packed(x.shape(-1), weight, scales, biases, group_size, bits);
  mx::Shape shape = x.shape();
  shape.back() = weight.shape(0);
  if (x.shape(-1) == 0) return mx::zeros(shape, x.dtype(), cpu());
  return array(shape, x.dtype(), std::make_shared<QuantizedProduct>(cpu(), group_size, bits),
               {x, weight, scales, biases});
}

array matmul(const array& x, const array& weight) {
  require_float("x", x);
  require_float("weight", weight);
  if (x.ndim() < 1 || weight.ndim() != 2 || weight.shape(1) != x.shape(-1)) {
    refuse("weight: expected (out, in), and rows of x as long");
  }
  mx::Shape shape = x.shape();
  shape.back() = weight.shape(0);
  if (weight.shape(1) == 0) return mx::zeros(shape, x.dtype(), cpu());
  return array(shape, x.dtype(), std::make_shared<Product>(cpu()), {x, weight});
}

void use_byte_activations(bool asked) { takes_bytes = asked; }

array rms_norm(const array& x, const array& weight, float eps) {
  require_float("x", x);
  require_float("weight", weight);
  if (x.ndim() < 1 || weight.ndim() != 1 || weight.shape(0) != x.shape(-1)) {
    refuse("weight: expected one number for each of a row of x");
  }
  return array(x.shape(), x.dtype(), std::make_shared<RmsNorm>(cpu(), eps), {x, weight});
}

array swiglu(const array& x) {
  require_float("x", x);
  if (x.ndim() < 1 || x.shape(-1) % 2) refuse("x: expected rows of gates and as many others");
  mx::Shape shape = x.shape();
  shape.back() /= 2;
  return array(shape, x.dtype(), std::make_shared<SwiGlu>(cpu()), {x});
}

array append(const array& buffer, const array& x, int row) {
  if (buffer.dtype() != mx::uint32 || x.dtype() != mx::uint32) {
    require_float("buffer", buffer);
    require_float("x", x);
  }
  if (buffer.ndim() != 4 || x.ndim() != 4 || x.shape(0) != buffer.shape(0) ||
      x.shape(1) != buffer.shape(1) || x.shape(3) != buffer.shape(3)) {
    refuse("x: expected (batch, heads, rows, dim), all but its rows as the buffer's");
  }
  if (row < 0 || x.shape(2) > buffer.shape(2) - row) {
    refuse("x: ", x.shape(2), " rows from ", row, " on, in a buffer of ", buffer.shape(2));
  }
  if (x.size() == 0) return buffer;
  return array(buffer.shape(), buffer.dtype(), std::make_shared<Append>(cpu(), row), {buffer, x});
}

array rotate(const array& x, const array& periods, int offset) {
  require_float("x", x);
  if (x.ndim() != 4 || x.shape(3) % 2 || size_t(x.shape(3)) > most_dim) {
    refuse("x: expected (batch, heads, rows, dim), dim even and at most ", most_dim);
  }
  if (periods.dtype() != mx::float32 || periods.ndim() != 1 ||
      periods.shape(0) != x.shape(3) / 2) {
    refuse("periods: expected ", x.shape(3) / 2, " numbers in float32");
  }
  return array(x.shape(), x.dtype(), std::make_shared<Rotation>(cpu(), offset), {x, periods});
}

namespace {

// Refuses what is not (batch, heads, rows, dim) as a cache stores it; returns how it is stored.
Storage require_stored(const char* name, const Arrays& arrays, const array& q, int heads, int rows) {
  if (arrays.size() != 1 && arrays.size() != 3) {
    refuse(name, ": found ", arrays.size(), " arrays, expected the numbers, or words, scales and ",
           "biases");
  }
  for (const array& a : arrays) {
    if (a.ndim() != 4 || q.shape(0) != a.shape(0) || a.shape(1) == 0 || heads % a.shape(1)) {
      refuse(name, ": expected (batch, heads, rows, dim), of q's batch size, with heads that divide ",
             "q's");
    }
    if (a.shape(1) != arrays[0].shape(1) || a.shape(2) < rows) {
      refuse(name, ": expected arrays of as many heads, and of ", rows, " rows at least");
    }
  }
  int dim = q.shape(3);
  if (arrays.size() == 1) {
    require_float(name, arrays[0]);
    if (arrays[0].shape(3) != dim) refuse(name, ": rows of ", arrays[0].shape(3), ", q's of ", dim);
    return {0, 0};
  }
  require_float(name, arrays[1]);
  int words = arrays[0].shape(3), groups = arrays[1].shape(3);
  if (arrays[0].dtype() != mx::uint32 || arrays[2].dtype() != arrays[1].dtype()) {
    refuse(name, ": expected words in uint32, scales and biases in one dtype");
  }
  if (words * 32 != dim * 8 && words * 32 != dim * 4) {
    refuse(name, ": rows of ", words, " words for ", dim, " numbers, expected 8 or 4 bits each");
  }
  if (groups == 0 || dim % groups || (dim / groups) % 32 || arrays[2].shape(3) != groups) {
    refuse(name, ": ", groups, " scales for rows of ", dim, ", expected groups of a multiple of 32");
  }
  return {words * 32 / dim, dim / groups};
}

}  // namespace

Cached take_cached(const array& q, int heads, const Parts& parts, float scale,
                   const std::optional<array>& sight, std::vector<array>& inputs) {
  require_float("q", q);
  if (q.ndim() != 4 || size_t(q.shape(3)) > most_dim || q.shape(3) == 0 || heads <= 0 ||
      heads > q.shape(1)) {
    refuse("q: expected (batch, heads, rows, dim), with heads, dim up to ", most_dim);
  }
  const auto& [keys, values, rows] = parts;
  if (keys.empty() || keys.size() != values.size() || keys.size() != rows.size()) {
    refuse("keys, values and rows: found ", keys.size(), ", ", values.size(), " and ", rows.size(),
           " parts, expected as many");
  }
  inputs.push_back(q);
  Storage stored[2];
  int seen = 0;
  for (size_t part = 0; part < keys.size(); ++part) {
    if (rows[part] < 0) refuse("rows: found ", rows[part], ", expected none or more");
    for (auto [which, arrays] : {std::pair(0, &keys[part]), std::pair(1, &values[part])}) {
      const char* name = which ? "values" : "keys";
      Storage found = require_stored(name, *arrays, q, heads, rows[part]);
      if (part && !(found == stored[which])) refuse("keys and values: expected parts stored alike");
      stored[which] = found;
      inputs.insert(inputs.end(), arrays->begin(), arrays->end());
    }
    const array &k = keys[part][0], &v = values[part][0];
    if (k.shape(1) != v.shape(1) || k.shape(1) != keys[0][0].shape(1)) {
      refuse("keys and values: expected as many heads");
    }
    seen += rows[part];
  }
  if (seen == 0 && q.shape(2) > 0) refuse("keys: expected rows to look at, found none");
  if (sight) {
    if (sight->dtype() != mx::int32 || sight->shape() != mx::Shape{2, seen}) {
      refuse("sight: expected (2, ", seen, ") int32");
    }
    inputs.push_back(*sight);
  } else if (q.shape(2) > seen) {
    refuse("q: expected no more rows than keys");
  }
  return {scale, heads, stored[0], stored[1], rows, sight.has_value()};
}

array attention(const array& q, const std::vector<Arrays>& keys, const std::vector<Arrays>& values,
                const std::vector<int>& rows, float scale, const std::optional<array>& sight) {
  std::vector<array> inputs;
  int heads = q.ndim() == 4 ? q.shape(1) : 0;
  Cached cached = take_cached(q, heads, {keys, values, rows}, scale, sight, inputs);
  // Written as the next product reads it, (batch, rows, heads, dim).
  mx::Shape shape{q.shape(0), q.shape(2), q.shape(1), q.shape(3)};
  array out(shape, q.dtype(), std::make_shared<CacheAttention>(cpu(), cached), inputs);
  return mx::transpose(out, {0, 2, 1, 3}, cpu());
}

}  // namespace mlk::graph
