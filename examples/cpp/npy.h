// The header of a .npy array: dtype, shape, and where the data is.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace trim {

struct NpyArray {
  std::string dtype;  // as numpy writes it, such as "<f4"
  std::vector<int64_t> shape;
  std::string_view data;
};

inline NpyArray ReadNpy(std::string_view bytes) {
  if (bytes.size() < 12 || bytes.substr(0, 6) != "\x93NUMPY") throw std::runtime_error("not a .npy array");
  auto byte = [&](size_t at) { return static_cast<size_t>(static_cast<unsigned char>(bytes[at])); };
  const bool first_version = byte(6) == 1;
  const size_t size = byte(8) + 256 * byte(9) + (first_version ? 0 : 65536 * (byte(10) + 256 * byte(11)));
  const size_t start = first_version ? 10 : 12;
  if (bytes.size() < start + size) throw std::runtime_error("a .npy array is truncated");
  const std::string_view header = bytes.substr(start, size);
  auto after = [&](const char* key, const char* text) {
    const size_t at = header.find(key);
    const size_t found = at == std::string_view::npos ? at : header.find(text, at);
    if (found == std::string_view::npos) throw std::runtime_error("a .npy header is malformed");
    return found + 1;
  };
  if (header.find("'fortran_order': False") == std::string_view::npos) throw std::runtime_error("not row-major");
  NpyArray array;
  const size_t dtype = after("'descr':", " '") + 1;
  array.dtype = header.substr(dtype, header.find('\'', dtype) - dtype);
  const size_t shape = after("'shape':", "(");
  std::string digits;
  for (const char c : header.substr(shape, header.find(')', shape) - shape + 1)) {
    if (c >= '0' && c <= '9') {
      digits += c;
    } else if (!digits.empty()) {
      array.shape.push_back(std::stoll(digits));
      digits.clear();
    }
  }
  array.data = bytes.substr(start + size);
  uint64_t expected = array.dtype.size() == 3 ? array.dtype[2] - '0' : 0;  // every dtype used here has one digit
  for (const int64_t extent : array.shape) expected *= extent;
  if (expected != array.data.size()) throw std::runtime_error("a .npy array is truncated, or of an unusual dtype");
  return array;
}

// How numpy writes a dtype of a manifest, such as "<f4" for f32; bf16 is kept as its bits.
inline std::string NpyType(const std::string& dtype) {
  if (dtype == "bool") return "|b1";
  if (dtype == "bf16") return "<u2";
  const int bytes = std::stoi(dtype.substr(1)) / 8;
  return (bytes == 1 ? "|" : "<") + dtype.substr(0, 1) + std::to_string(bytes);
}

// What comes before the data of a row-major array in a .npy file.
inline std::string NpyHeader(const std::string& npy_type, const std::vector<int64_t>& shape) {
  std::string text = "{'descr': '" + npy_type + "', 'fortran_order': False, 'shape': (";
  for (const int64_t extent : shape) text += std::to_string(extent) + ",";
  text += "), }";
  text.resize((10 + text.size()) / 64 * 64 + 53, ' ');  // the data starts at a multiple of 64
  text += '\n';
  const char size[] = {static_cast<char>(text.size() & 255), static_cast<char>(text.size() >> 8)};
  return std::string("\x93NUMPY\x01\x00", 8) + std::string(size, 2) + text;
}

}  // namespace trim
