// Reads uncompressed zip archives from memory: enough for a .trim file and for the check.npz inside it.
//
// The data of an entry is used where it is; in a .trim file it starts at a multiple of 64 bytes. Bounds are checked, so a
// damaged file throws. Hashes are not: check a file once when it is installed, with `python -m trimtab.runtime.self_check`
// or by comparing its SHA-256.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>

namespace trim {

class ZipReader {
 public:
  explicit ZipReader(std::string_view bytes) : bytes_(bytes) { ReadDirectory(); }

  bool Has(const std::string& name) const { return entries_.count(name) != 0; }

  const std::map<std::string, std::string_view>& entries() const { return entries_; }

  std::string_view Get(const std::string& name) const {
    auto found = entries_.find(name);
    if (found == entries_.end()) throw std::runtime_error("the archive has no entry " + name);
    return found->second;
  }

 private:
  template <typename T>
  T Read(uint64_t offset) const {
    if (offset > bytes_.size() || bytes_.size() - offset < sizeof(T)) throw std::runtime_error("the archive is truncated");
    T value;  // all zip numbers are little-endian, like the machines this runs on
    std::memcpy(&value, bytes_.data() + offset, sizeof(T));
    return value;
  }

  std::string_view Slice(uint64_t offset, uint64_t size) const {
    if (offset > bytes_.size() || size > bytes_.size() - offset) throw std::runtime_error("the archive is truncated");
    return bytes_.substr(offset, size);
  }

  void ReadDirectory() {
    const size_t end = bytes_.rfind(std::string_view("PK\x05\x06", 4));
    if (end == std::string_view::npos) throw std::runtime_error("not a zip archive, or truncated");
    if (end + 22 + Read<uint16_t>(end + 20) != bytes_.size()) throw std::runtime_error("the archive is truncated");
    uint64_t count = Read<uint16_t>(end + 10);
    uint64_t position = Read<uint32_t>(end + 16);
    if (end >= 20 && Read<uint32_t>(end - 20) == 0x07064b50) {  // zip64: a .trim file always has this record
      const uint64_t end64 = Read<uint64_t>(end - 12);
      count = Read<uint64_t>(end64 + 32);
      position = Read<uint64_t>(end64 + 48);
    }
    for (uint64_t index = 0; index < count; ++index) position = ReadRecord(position);
  }

  uint64_t ReadRecord(uint64_t at) {
    if (Read<uint32_t>(at) != 0x02014b50) throw std::runtime_error("the archive's directory is malformed");
    if (Read<uint16_t>(at + 10) != 0) throw std::runtime_error("the archive is compressed");
    uint64_t size = Read<uint32_t>(at + 24);
    uint64_t header = Read<uint32_t>(at + 42);
    const uint16_t name_size = Read<uint16_t>(at + 28);
    const uint16_t extra_size = Read<uint16_t>(at + 30);
    const uint16_t comment_size = Read<uint16_t>(at + 32);
    const std::string name(Slice(at + 46, name_size));
    const uint64_t extra_end = at + 46 + name_size + extra_size;
    for (uint64_t field = at + 46 + name_size; field + 4 <= extra_end; field += 4 + Read<uint16_t>(field + 2)) {
      if (Read<uint16_t>(field) != 1) continue;
      // The 64-bit values of those numbers whose 32-bit places are all ones, in this order.
      uint64_t value = field + 4;
      if (size == 0xffffffff) size = Read<uint64_t>(value), value += 8;
      if (Read<uint32_t>(at + 20) == 0xffffffff) value += 8;
      if (header == 0xffffffff) header = Read<uint64_t>(value);
    }
    // The header in front of the data has a name and an extra field of its own length.
    const uint64_t start = header + 30 + Read<uint16_t>(header + 26) + Read<uint16_t>(header + 28);
    entries_[name] = Slice(start, size);
    return extra_end + comment_size;
  }

  std::string_view bytes_;
  std::map<std::string, std::string_view> entries_;
};

}  // namespace trim
