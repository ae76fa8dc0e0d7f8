// A compiled model, opened from a .trim file: maps the weights, loads the code, calls it.
//
// Needs libtvm_ffi (linked) and the TVM runtime library that the file carries (or libtvm_runtime.so on the library path
// when the file was compiled without it). No Python, no compiler.
#pragma once

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/tvm_ffi.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "zip_reader.h"

namespace trim {

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

inline json::Value Field(const json::Value& object, const char* name) {
  return object.cast<json::Object>().at(ffi::String(name));
}

inline std::string Text(const json::Value& value) { return std::string(value.cast<ffi::String>()); }

// A file mapped read-only for as long as the process lives.
inline std::string_view MapFile(const std::string& path) {
  const int descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status {};
  if (descriptor < 0 || fstat(descriptor, &status) != 0) throw std::runtime_error("cannot open " + path);
  void* memory = mmap(nullptr, status.st_size, PROT_READ, MAP_SHARED, descriptor, 0);
  close(descriptor);
  if (memory == MAP_FAILED) throw std::runtime_error("cannot map " + path);
  return {static_cast<const char*>(memory), static_cast<size_t>(status.st_size)};
}

// A path under which the dynamic loader finds these bytes.
inline std::string LibraryPath(const std::string& name, std::string_view bytes) {
  const int descriptor = memfd_create(name.c_str(), MFD_CLOEXEC);  // stays open: its number is the library's name
  if (descriptor < 0) throw std::runtime_error("cannot create a file in memory for " + name);
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t written = write(descriptor, bytes.data() + done, bytes.size() - done);
    if (written <= 0) throw std::runtime_error("cannot write " + name);
    done += written;
  }
  return "/proc/self/fd/" + std::to_string(descriptor);
}

inline DLDataType DataType(const std::string& name) {
  if (name == "bool") return {kDLBool, 8, 1};
  if (name == "bf16") return {kDLBfloat, 16, 1};
  const uint8_t code = name[0] == 'f' ? kDLFloat : name[0] == 'i' ? kDLInt : kDLUInt;
  return {code, static_cast<uint8_t>(std::stoi(name.substr(1))), 1};
}

// A tensor over memory that somebody else owns; it must be 64-byte aligned and outlive the tensor.
inline ffi::Tensor Borrow(const void* data, const std::vector<int64_t>& shape, const std::string& dtype) {
  struct Memory {
    const void* data;
    void AllocData(DLTensor* tensor) { tensor->data = const_cast<void*>(data); }
    void FreeData(DLTensor*) {}
  };
  if (reinterpret_cast<uintptr_t>(data) % 64 != 0) throw std::runtime_error("a tensor is not 64-byte aligned");
  return ffi::Tensor::FromNDAlloc(Memory{data}, ffi::Shape(shape), DataType(dtype), DLDevice{kDLCPU, 0});
}

// Row-major input data in memory of its own, aligned as generated code assumes.
class AlignedCopy {
 public:
  AlignedCopy(std::string_view data, const std::vector<int64_t>& shape, const std::string& dtype)
      : bytes_(data.size() + 64) {
    char* start = bytes_.data() + (64 - reinterpret_cast<uintptr_t>(bytes_.data()) % 64) % 64;
    std::memcpy(start, data.data(), data.size());
    tensor_ = Borrow(start, shape, dtype);
  }
  const ffi::Tensor& tensor() const { return tensor_; }

 private:
  std::vector<char> bytes_;
  ffi::Tensor tensor_;
};

class Model {
 public:
  explicit Model(const std::string& path) : archive_(MapFile(path)) {
    const std::string_view text = archive_.Get("manifest.json");
    manifest_ = json::Parse(ffi::String(text.data(), text.size()));
    if (Field(manifest_, "schema").cast<int64_t>() != 1) throw std::runtime_error("unknown schema; upgrade this program");
    const json::Value variant = SelectVariant();
    LoadRuntime(variant);
    LoadWeights(variant);
    LoadCode(variant);
  }

  const ZipReader& archive() const { return archive_; }
  const json::Value& manifest() const { return manifest_; }

  // Not from several threads at once: calls share the memory for intermediate tensors. Make a model per thread.
  std::vector<ffi::Tensor> operator()(const std::vector<ffi::Tensor>& inputs) {
    std::vector<ffi::AnyView> arguments(inputs.begin(), inputs.end());
    if (arena_size_ != nullptr) GrowArena(arguments);
    arguments.insert(arguments.end(), weights_.begin(), weights_.end());
    if (arena_size_ != nullptr) arguments.push_back(arena_);
    ffi::Any result;
    main_.CallPacked(arguments.data(), static_cast<int32_t>(arguments.size()), &result);
    if (auto single = result.try_cast<ffi::Tensor>()) return {*single};
    const auto several = result.cast<ffi::Array<ffi::Tensor>>();
    return {several.begin(), several.end()};
  }

 private:
  json::Value SelectVariant() const {
#if defined(__x86_64__)
    const std::string architecture = "x86_64";
#elif defined(__aarch64__)
    const std::string architecture = "aarch64";
#else
    const std::string architecture = "riscv64";
#endif
    std::string targets;
    for (const json::Value& variant : Field(manifest_, "variants").cast<json::Array>()) {
      // A device that may lack the "features" of the variant should compare them with /proc/cpuinfo here.
      const std::string target = Text(Field(variant, "target"));
      if (target.substr(0, target.find('-')) == architecture && Text(Field(variant, "backend")) == "tvm") return variant;
      targets += " " + target;
    }
    throw std::runtime_error("no code for " + architecture + " in this file, only for" + targets);
  }

  void LoadRuntime(const json::Value& variant) const {
    setenv("TVM_BIND_THREADS", "0", 0);  // do not bind the caller's thread to a core; TVM_NUM_THREADS sets the number
    if (ffi::Function::GetGlobal("ffi.Module.load_from_bytes.relax.VMExecutable")) return;  // linked or loaded before
    std::vector<std::string> paths;
    for (const json::Value& name : Field(variant, "runtime").cast<json::Array>()) {
      paths.push_back(LibraryPath("libtvm_runtime.so", archive_.Get(Text(name))));
    }
    if (paths.empty()) paths.push_back("libtvm_runtime.so");
    for (const std::string& path : paths) {
      if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) throw std::runtime_error(dlerror());
    }
  }

  void LoadWeights(const json::Value& variant) {
    if (!archive_.Has("weights.safetensors")) return;
    const std::string_view file = archive_.Get("weights.safetensors");
    uint64_t header_size = 0;
    if (file.size() >= 8) std::memcpy(&header_size, file.data(), 8);
    if (file.size() < 8 || header_size > file.size() - 8) throw std::runtime_error("the weights are truncated");
    const json::Value header = json::Parse(ffi::String(file.data() + 8, header_size));
    const std::string_view data = file.substr(8 + header_size);
    std::map<std::string, json::Value> listed;
    std::vector<std::string> order;
    for (const json::Value& weight : Field(manifest_, "weights").cast<json::Array>()) {
      order.push_back(Text(Field(weight, "name")));
      listed.emplace(order.back(), weight);
    }
    if (const json::Value names = Field(variant, "weights"); names != nullptr) {
      order.clear();
      for (const json::Value& name : names.cast<json::Array>()) order.push_back(Text(name));
    }
    for (const std::string& name : order) {
      const json::Array offsets = Field(Field(header, name.c_str()), "data_offsets").cast<json::Array>();
      const uint64_t begin = offsets[0].cast<int64_t>(), end = offsets[1].cast<int64_t>();
      if (begin > end || end > data.size()) throw std::runtime_error("weight " + name + " lies outside the file");
      std::vector<int64_t> shape;
      for (const json::Value& size : Field(listed.at(name), "shape").cast<json::Array>()) {
        shape.push_back(size.cast<int64_t>());
      }
      weights_.push_back(Borrow(data.data() + begin, shape, Text(Field(listed.at(name), "dtype"))));
    }
  }

  void LoadCode(const json::Value& variant) {
    const std::string name = Text(Field(variant, "library"));
    // Not Module::LoadFromFile: that takes the kind of file from the end of its name, and this one has none.
    const ffi::Function load = ffi::Function::GetGlobalRequired("ffi.Module.load_from_file.so");
    library_ = load(ffi::String(LibraryPath("model.so", archive_.Get(name))), ffi::String("so")).cast<ffi::Module>();
    machine_ = library_->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
    constexpr int kPooledAllocator = 2;
    machine_->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, kPooledAllocator);
    main_ = machine_->GetFunction(Text(Field(variant, "entry"))).value();
    const std::string arena = Text(Field(variant, "arena"));
    if (!arena.empty()) arena_size_ = machine_->GetFunction(arena).value();
  }

  // Makes room for the intermediate tensors of a call with these inputs; the memory is kept for the next call.
  void GrowArena(const std::vector<ffi::AnyView>& inputs) {
    ffi::Any size;
    arena_size_.CallPacked(inputs.data(), static_cast<int32_t>(inputs.size()), &size);
    const auto bytes = static_cast<size_t>(size.cast<int64_t>());
    if (!arena_memory_.empty() && arena_memory_.size() - 64 >= bytes) return;
    arena_memory_ = std::vector<char>(bytes + 64);
    char* start = arena_memory_.data() + (64 - reinterpret_cast<uintptr_t>(arena_memory_.data()) % 64) % 64;
    arena_ = Borrow(start, {static_cast<int64_t>(bytes)}, "u8");
  }

  ZipReader archive_;
  json::Value manifest_;
  ffi::Module library_{ffi::UnsafeInit()};
  ffi::Module machine_{ffi::UnsafeInit()};
  ffi::Function main_;
  ffi::Function arena_size_{nullptr};
  std::vector<ffi::Tensor> weights_;
  std::vector<char> arena_memory_;
  ffi::Tensor arena_;
};

}  // namespace trim
