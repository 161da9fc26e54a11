#include "on_cpu.h"
#include "primitives.h"
#include "sampling.h"

namespace mlk::graph {

namespace {

class Likeliest : public OnCpu {
 public:
  Likeliest(mx::Stream stream, const Choice& choice) : OnCpu(stream), choice_(choice) {}
  const char* name() const override { return "MlxLlamaLikeliest"; }
  bool is_equivalent(const Primitive& other) const override {
    const Choice &a = choice_, &b = static_cast<const Likeliest&>(other).choice_;
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

}  // namespace

array keep_likeliest(const array& scores, int top_k, double top_p, double min_p) {
  if (scores.dtype() != mx::float32 || scores.ndim() != 1) refuse("scores: expected (V,) float32");
  Choice choice{size_t(std::max(0, top_k)), top_p, min_p};
  return array(scores.shape(), mx::float32, std::make_shared<Likeliest>(cpu(), choice), {scores});
}

}  // namespace mlk::graph
