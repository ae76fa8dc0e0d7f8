// Calls a compiled model with arrays from .npy files, and writes its outputs as such files.
//
//     call_model model.trim input.npy... output.npy...
//
// All inputs come first, in the model's order, then a name for each output. Exit code 7: the file or an array was refused.

#include <cstdio>
#include <cstring>
#include <fstream>

#include "model.h"
#include "npy.h"

namespace {

namespace ffi = tvm::ffi;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot open " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

void Call(const std::string& path, const std::vector<std::string>& files) {
  trim::Model model(path);
  const auto inputs = trim::Field(model.manifest(), "inputs").cast<trim::json::Array>();
  const auto outputs = trim::Field(model.manifest(), "outputs").cast<trim::json::Array>();
  if (files.size() != inputs.size() + outputs.size()) {
    throw std::runtime_error("the model has " + std::to_string(inputs.size()) + " inputs and " +
                             std::to_string(outputs.size()) + " outputs");
  }
  std::vector<trim::AlignedCopy> memory;
  std::vector<ffi::Tensor> tensors;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const std::string dtype = trim::Text(trim::Field(inputs[i], "dtype")), bytes = ReadFile(files[i]);
    const trim::NpyArray array = trim::ReadNpy(bytes);
    if (array.dtype != trim::NpyType(dtype)) throw std::runtime_error(files[i] + " is not of dtype " + dtype);
    memory.emplace_back(array.data, array.shape, dtype);
    tensors.push_back(memory.back().tensor());
  }
  const std::vector<ffi::Tensor> results = model(tensors);
  for (size_t i = 0; i < outputs.size(); ++i) {
    const std::string type = trim::NpyType(trim::Text(trim::Field(outputs[i], "dtype")));
    const ffi::ShapeView shape = results.at(i).shape();
    const std::string header = trim::NpyHeader(type, {shape.begin(), shape.end()});
    std::ofstream file(files[inputs.size() + i], std::ios::binary);
    file.write(header.data(), header.size());
    file.write(static_cast<const char*>(results[i].data_ptr()), results[i].numel() * (type[2] - '0'));
    if (!file) throw std::runtime_error("cannot write " + files[inputs.size() + i]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s model.trim input.npy... output.npy...\n", argv[0]);
    return 2;
  }
  try {
    Call(argv[1], {argv + 2, argv + argc});
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 7;
  }
}
