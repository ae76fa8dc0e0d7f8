// Runs a compiled model on the sample inputs it carries, compares with the outputs it carries, and times it.
//
//     run_artifact model.trim [repetitions]
//
// Exit code 0: all outputs are within the manifest's tolerance. 7: they are not, or the file was refused.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>

#include "model.h"
#include "npy.h"

namespace {

namespace ffi = tvm::ffi;

template <typename T>
double Load(const char* data, size_t index) {
  T value;
  std::memcpy(&value, data + index * sizeof(T), sizeof(T));
  return static_cast<double>(value);
}

double LoadHalf(const char* data, size_t index, bool brain) {
  uint16_t bits;
  std::memcpy(&bits, data + 2 * index, 2);
  const int exponent_bits = brain ? 8 : 5, fraction_bits = 15 - exponent_bits;
  const int exponent = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
  const int bias = (1 << (exponent_bits - 1)) - 1;
  double value;
  if (exponent == (1 << exponent_bits) - 1) {
    value = fraction ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else {
    value = std::ldexp(exponent ? fraction + (1 << fraction_bits) : fraction, std::max(exponent, 1) - bias - fraction_bits);
  }
  return bits & 0x8000 ? -value : value;
}

double Element(const char* data, size_t index, const std::string& dtype) {
  if (dtype == "f64") return Load<double>(data, index);
  if (dtype == "f32") return Load<float>(data, index);
  return LoadHalf(data, index, dtype == "bf16");
}

// Prints the largest difference; returns whether it is within max|got - expected| <= atol + rtol * max|expected|.
bool Compare(const std::string& label, const ffi::Tensor& got, const trim::NpyArray& expected, const std::string& dtype,
             double rtol, double atol) {
  const ffi::ShapeView shape = got.shape();
  if (!std::equal(shape.begin(), shape.end(), expected.shape.begin(), expected.shape.end())) {
    std::printf("%s: wrong shape\n", label.c_str());
    return false;
  }
  const char *a = static_cast<const char*>(got.data_ptr()), *b = expected.data.data();
  if (dtype != "bf16" && dtype[0] != 'f') {
    const bool equal = std::memcmp(a, b, expected.data.size()) == 0;
    std::printf("%s: %s\n", label.c_str(), equal ? "equal" : "different");
    return equal;
  }
  double largest = 0, scale = 0;
  for (int64_t index = 0, count = got.numel(); index < count; ++index) {
    const double x = Element(a, index, dtype), y = Element(b, index, dtype);
    if (std::isfinite(y)) {
      scale = std::max(scale, std::abs(y));
      const double difference = std::abs(x - y);
      largest = std::isnan(difference) ? std::numeric_limits<double>::infinity() : std::max(largest, difference);
    } else if (!(x == y || (std::isnan(x) && std::isnan(y)))) {
      largest = std::numeric_limits<double>::infinity();
    }
  }
  std::printf("%s: max difference %.3g (allowed %.3g)\n", label.c_str(), largest, atol + rtol * scale);
  return largest <= atol + rtol * scale;
}

bool Run(const std::string& path, int repetitions) {
  trim::Model model(path);
  const trim::json::Value tolerance = trim::Field(model.manifest(), "tolerance");
  if (tolerance == nullptr) throw std::runtime_error("the file carries no samples to compare with");
  const double rtol = trim::Field(tolerance, "rtol").cast<double>(), atol = trim::Field(tolerance, "atol").cast<double>();
  const auto inputs = trim::Field(model.manifest(), "inputs").cast<trim::json::Array>();
  const auto outputs = trim::Field(model.manifest(), "outputs").cast<trim::json::Array>();
  const trim::ZipReader samples(model.archive().Get("check.npz"));
  bool passed = true;
  for (int sample = 0; samples.Has(std::to_string(sample) + "/output/0.npy"); ++sample) {
    const std::string prefix = std::to_string(sample);
    std::vector<trim::AlignedCopy> memory;
    std::vector<ffi::Tensor> tensors;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const auto array = trim::ReadNpy(samples.Get(prefix + "/input/" + std::to_string(i) + ".npy"));
      memory.emplace_back(array.data, array.shape, trim::Text(trim::Field(inputs[i], "dtype")));
      tensors.push_back(memory.back().tensor());
    }
    const std::vector<ffi::Tensor> results = model(tensors);
    if (results.size() != outputs.size()) throw std::runtime_error("the code returned another number of outputs");
    for (size_t i = 0; i < outputs.size(); ++i) {
      const auto expected = trim::ReadNpy(samples.Get(prefix + "/output/" + std::to_string(i) + ".npy"));
      const std::string label = "sample " + prefix + ", output " + trim::Text(trim::Field(outputs[i], "name"));
      passed &= Compare(label, results[i], expected, trim::Text(trim::Field(outputs[i], "dtype")), rtol, atol);
    }
    double best = std::numeric_limits<double>::infinity();
    for (int call = 0; call < repetitions; ++call) {
      const auto begin = std::chrono::steady_clock::now();
      model(tensors);
      best = std::min(best, std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
    }
    std::printf("sample %d: best of %d calls %.3f ms\n", sample, repetitions, best);
  }
  return passed;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: %s model.trim [repetitions]\n", argv[0]);
    return 2;
  }
  try {
    const bool passed = Run(argv[1], argc > 2 ? std::max(1, std::atoi(argv[2])) : 20);
    std::puts(passed ? "passed" : "FAILED");
    return passed ? 0 : 7;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 7;
  }
}
