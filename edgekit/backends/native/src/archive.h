// The container of a bundle: a zip file in canonical form (docs/bundle.md, 2 and 3). Names, sizes, checksums and their
// order determine every other byte, so headers are derived again and compared: nothing can hide in it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace edgekit {

// Memory that a payload can be used in: aligned to 64 bytes, with 64 readable ones behind it.
class Bytes {
  public:
    explicit Bytes(size_t size);  // throws std::bad_alloc
    uint8_t* data() const { return memory_.get(); }
    size_t size() const { return size_; }

  private:
    struct Free { void operator()(uint8_t* memory) const; };
    std::unique_ptr<uint8_t[], Free> memory_;
    size_t size_;
};

// Where bytes come from. They are copied before they are checked: what is used cannot change any more.
class Source {
  public:
    virtual ~Source() = default;
    virtual void read(uint64_t at, void* to, size_t count) const = 0;  // within size(); throws Error, EK_IO
    uint64_t size() const { return size_; }

    static std::unique_ptr<Source> file(const char* path);                      // throws Error
    static std::unique_ptr<Source> memory(const void* data, size_t bytes);      // must stay

  protected:
    uint64_t size_ = 0;
};

struct Entry {
    std::string name;
    uint64_t at;
    uint32_t bytes, crc;
};

class Archive {
  public:
    // Checks the container. Throws Error.
    explicit Archive(std::unique_ptr<Source> source);

    const std::vector<Entry>& entries() const { return entries_; }
    const Entry* find(const std::string& name) const;  // or null
    // The file's bytes, which have the CRC-32 that the container says. Throws Error.
    Bytes read(const Entry& entry) const;

  private:
    std::unique_ptr<Source> source_;
    std::vector<Entry> entries_;
    std::unordered_map<std::string, size_t> numbers_;
};

}  // namespace edgekit
