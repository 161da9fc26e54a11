// Choosing a token: which may be drawn, which is the likeliest, which is drawn.
#include "on_cpu.h"
#include "primitives.h"
#include "sampling.h"

namespace mlk::graph {

namespace {

class KeptLikeliest : public OnCpu {
 public:
  KeptLikeliest(mx::Stream stream, const Choice& choice) : OnCpu(stream), choice_(choice) {}
  const char* name() const override { return "MlxLlamaLikeliest"; }
  bool is_equivalent(const Primitive& other) const override {
    const Choice &a = choice_, &b = static_cast<const KeptLikeliest&>(other).choice_;
    return a.top_k == b.top_k && a.top_p == b.top_p && a.min_p == b.min_p;
  }

 protected:
  Work work() const override {
    return [choice = choice_](const std::vector<array>& in, array& out) {
      Straight scores(in[0]);
      mlk::keep_likeliest(static_cast<const float*>(scores.data()), in[0].size(), choice,
                          out.data<float>());
    };
  }

 private:
  Choice choice_;
};

// One token's number, found by a function of the inputs.
class Chosen : public OnCpu {
 public:
  using Function = size_t (*)(const std::vector<array>&);
  Chosen(mx::Stream stream, const char* name, Function find) : OnCpu(stream), name_(name), find_(find) {}
  const char* name() const override { return name_; }
  bool is_equivalent(const Primitive& other) const override {
    return find_ == static_cast<const Chosen&>(other).find_;
  }

 protected:
  Work work() const override {
    return [find = find_](const std::vector<array>& in, array& out) {
      *out.data<uint32_t>() = uint32_t(find(in));
    };
  }

 private:
  const char* name_;
  Function find_;
};

size_t likeliest_of(const std::vector<array>& in) {
  return mlk::likeliest(static_cast<const float*>(Straight(in[0]).data()), in[0].size());
}

size_t drawn_of(const std::vector<array>& in) {
  Straight scores(in[0]), key(in[1]);
  return mlk::draw(static_cast<const float*>(scores.data()), in[0].size(),
                   static_cast<const uint32_t*>(key.data()));
}

void require_scores(const array& scores) {
  if (scores.dtype() != mx::float32 || scores.ndim() != 1 || scores.size() == 0) {
    refuse("scores: expected (V,) float32");
  }
}

}  // namespace

array likeliest(const array& scores) {
  require_scores(scores);
  return array({1}, mx::uint32, std::make_shared<Chosen>(cpu(), "MlxLlamaLikeliestToken", likeliest_of),
               {scores});
}

array draw(const array& scores, const array& key) {
  require_scores(scores);
  if (key.dtype() != mx::uint32 || key.shape() != mx::Shape{2}) refuse("key: expected (2,) uint32");
  return array({1}, mx::uint32, std::make_shared<Chosen>(cpu(), "MlxLlamaDraw", drawn_of), {scores, key});
}

array keep_likeliest(const array& scores, int top_k, double top_p, double min_p) {
  if (scores.dtype() != mx::float32 || scores.ndim() != 1) refuse("scores: expected (V,) float32");
  Choice choice{size_t(std::max(0, top_k)), top_p, min_p};
  return array(scores.shape(), mx::float32, std::make_shared<KeptLikeliest>(cpu(), choice), {scores});
}

}  // namespace mlk::graph
