// Runs the CPU kernels on random networks, for AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer to
// watch. See tests/sanitize/run.
//
//     driver SEED ITERATIONS [FIRST]
//
// Every configuration is printed before it runs, so the last line of the output names the one that a sanitizer ended.
// Results must be finite and agree with the kernels in double precision: loosely, since accuracy is the business of
// tests/test_network.py and this only has to notice that the wrong element was read.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <iostream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/isa/isa.h"
#include "cpu/tiles.h"
#include "network_call.h"

namespace m3oe {
namespace {

constexpr int64_t kMostWork = 600'000;

struct Variant {
  std::string name;
  const NetworkKernels<float>* kernels;
  double tolerance;
};

std::vector<const Isa*> runnable_isas() {
  std::vector<const Isa*> sets;
  const std::vector<std::string> names = supported_isas();
  const auto add = [&](const Isa& isa, bool always) {
    if (always || std::find(names.begin(), names.end(), isa.name) != names.end()) sets.push_back(&isa);
  };
  add(isa_scalar(), true);
#if defined(__x86_64__)
  // Not where they are fast, but wherever they run at all.
  const bool bf16 = __builtin_cpu_supports("avx512bf16") != 0 && __builtin_cpu_supports("avx512bw") != 0;
  add(isa_avx2(), false);
  add(isa_avx512(), false);
  add(isa_avx512_bf16(), bf16);
  add(isa_amx(), false);
  add(isa_amx_emulated(), bf16);
#endif
  return sets;
}

std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (const Isa* isa : runnable_isas()) {
    const std::string name = isa->name;
    all.push_back({name + " fp32", &isa->fp32, 0.05});
    if (isa->bf16x3.tile_forward != nullptr) all.push_back({name + " bf16x3", &isa->bf16x3, 0.25});
    if (isa->bf16.tile_forward != nullptr) all.push_back({name + " bf16", &isa->bf16, 1.0});
  }
  return all;
}

// The first calls of a process race for what is set up once.
void race_for_dispatch() {
  const auto look = [] {
    tiles_permitted();
    supported_isas();
    active_kernels<float>(Precision::kBf16);
    active_kernels<double>(Precision::kFp32);
    float sink = 0.5f;
    active_isa().fma_burst(16, &sink);
    poison_workspace(true);
    workspace(64);
  };
  std::vector<std::jthread> pool;
  for (int i = 0; i < 4; ++i) pool.emplace_back(look);
}

using Named = std::vector<std::pair<std::string, std::vector<double>>>;

template <typename T>
std::vector<double> wide(const std::vector<T>& values) {
  return {values.begin(), values.end()};
}

// The rows of a sparse gradient in their places.
template <typename T>
std::vector<double> dense_table(const Case& c, const Results<T>& from) {
  if (c.embedding_grad != EmbeddingForm::kSparse) return wide(from.d_embedding);
  const std::vector<int64_t>& rows = from.embedding_rows;
  int64_t total = 0;
  for (const int64_t size : c.vocab) total += size;
  require(std::adjacent_find(rows.begin(), rows.end(), std::greater_equal<>()) == rows.end() &&
              (rows.empty() || (rows.front() >= 0 && rows.back() < total)),
          "the rows of the sparse gradient do not ascend within the table");
  const int64_t width = c.embedding_width;
  std::vector<double> dense(total * width, 0);
  for (size_t i = 0; i < rows.size(); ++i) {
    std::copy_n(from.d_embedding.begin() + static_cast<int64_t>(i) * width, width, dense.begin() + rows[i] * width);
  }
  return dense;
}

template <typename T>
Named named(const Case& c, const Results<T>& from) {
  Named all{{"output", wide(from.output)}, {"pair_loss", wide(from.pair_loss)}, {"d_x", wide(from.d_x)}};
  all.push_back({"d_embedding", dense_table(c, from)});
  for (size_t i = 0; i < from.d_weights.size(); ++i)
    all.push_back({"d_weight " + std::to_string(i), wide(from.d_weights[i])});
  return all;
}

double norm(const std::vector<double>& values) {
  double squares = 0;
  for (const double value : values) squares += value * value;
  return std::sqrt(squares);
}

// The largest relative error of a tensor, in the 2-norm: single elements differ as soon as one ReLU decides otherwise.
double compare(const Named& actual, const Named& expected) {
  double largest = 0, worst = 0;
  for (const auto& [name, values] : expected) largest = std::max(largest, norm(values));
  for (size_t i = 0; i < expected.size(); ++i) {
    const auto& [name, values] = actual[i];
    require(values.size() == expected[i].second.size(), name + " has the wrong size");
    std::vector<double> error(values.size());
    for (size_t j = 0; j < values.size(); ++j) {
      require(std::isfinite(values[j]), name + "[" + std::to_string(j) + "] is not finite");
      error[j] = values[j] - expected[i].second[j];
    }
    // A gradient that is nothing but a cancellation has no digits to compare.
    const double scale = std::max(norm(expected[i].second), 1e-2 * largest);
    if (scale > 0) worst = std::max(worst, norm(error) / scale);
  }
  return worst;
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <typename T>
bool same_bits(const Results<T>& a, const Results<T>& b) {
  const auto equal = [](const std::vector<T>& x, const std::vector<T>& y) { return same_bits(x, y); };
  return equal(a.output, b.output) && equal(a.pair_loss, b.pair_loss) && equal(a.d_x, b.d_x) &&
         equal(a.d_embedding, b.d_embedding) && a.embedding_rows == b.embedding_rows &&
         std::equal(a.d_weights.begin(), a.d_weights.end(), b.d_weights.begin(), b.d_weights.end(), equal);
}

// Whether the difference says anything. Normalising a few numbers that are nearly equal magnifies rounding to nonsense,
// and behind a narrow layer many rows are nearly one: rounding then turns the same ReLU in all of them.
bool comparable(const Case& c, const Variant& variant) {
  if (variant.tolerance < 0.1) return true;  // fp32
  const NetworkShape& s = c.shape;
  const auto narrow = [](int64_t width) { return width <= 8; };
  return !std::any_of(s.widths.begin() + (s.representation ? 0 : 1), s.widths.end(), narrow) && !narrow(s.tower);
}

class Driver {
 public:
  explicit Driver(uint64_t seed) : seed_(seed), variants_(variants()), worst_(variants_.size(), 0) {}

  void iterate(int64_t iteration) {
    Random random(seed_, static_cast<uint64_t>(iteration));
    const Case c = random_case(random, kMostWork);
    // Flushed, since a sanitizer ends the process without asking.
    std::cout << "iteration " << iteration << ": " << c.describe() << std::endl;
    const Inputs<float> inputs = random_inputs(random, c);
    const Inputs<double> wide_inputs = widen(c, inputs);
    const Named expected = named(c, run_network(c, wide_inputs, network_kernels_double()));
    const size_t repeated = random.whole(0, static_cast<int64_t>(variants_.size()) - 1);
    std::vector<std::exception_ptr> failures(variants_.size());
    for_workers(c.callers, [&](int64_t caller) {
      for (size_t v = caller; v < variants_.size(); v += c.callers) {
        try {
          check(c, inputs, v, expected, v == repeated);
        } catch (...) {
          failures[v] = std::current_exception();
        }
      }
    });
    for (const std::exception_ptr& failure : failures) {
      if (failure) std::rethrow_exception(failure);
    }
  }

  void report() const {
    for (size_t v = 0; v < variants_.size(); ++v) {
      std::cout << variants_[v].name << ": at most " << worst_[v] << " from double precision" << std::endl;
    }
  }

 private:
  // Different callers check different variants.
  void check(const Case& c, const Inputs<float>& inputs, size_t v, const Named& expected, bool repeat) {
    const Variant& variant = variants_[v];
    try {
      const Results<float> results = run_network(c, inputs, *variant.kernels);
      const double error = compare(named(c, results), expected);
      if (comparable(c, variant)) {
        worst_[v] = std::max(worst_[v], error);
        require(error <= variant.tolerance, "off by " + std::to_string(error));
      }
      if (repeat) require(same_bits(results, run_network(c, inputs, *variant.kernels)), "a second run differs");
    } catch (const std::exception& error) {
      throw std::runtime_error(variant.name + ": " + error.what());
    }
  }

  uint64_t seed_;
  std::vector<Variant> variants_;
  std::vector<double> worst_;
};

int run(int argc, char** argv) {
  if (argc < 3 || argc > 4) {
    std::cerr << "usage: driver SEED ITERATIONS [FIRST]\n";
    return 2;
  }
  const int64_t first = argc == 4 ? std::stoll(argv[3]) : 0;
  const int64_t last = first + std::stoll(argv[2]);
  race_for_dispatch();
  Driver driver(std::stoull(argv[1]));
  for (int64_t i = first; i < last; ++i) driver.iterate(i);
  driver.report();
  return 0;
}

}  // namespace
}  // namespace m3oe

int main(int argc, char** argv) {
  try {
    return m3oe::run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "driver: " << error.what() << std::endl;
    return 1;
  }
}
