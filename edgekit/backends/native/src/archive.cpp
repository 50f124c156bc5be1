#pragma GCC optimize("Os")  // runs once per bundle: small is better than quick

#include "archive.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <unordered_set>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "json.h"
#include "sha256.h"
#include "status.h"

namespace edgekit {
namespace {

constexpr size_t kLocal = 30, kCentral = 46, kEnd = 22;
constexpr size_t kMostFiles = 10000, kMostName = 240, kMostParts = 4, kMostPart = 80;
constexpr uint32_t kAlign = 64, kAlignPayload = 16384;

class File : public Source {
  public:
    explicit File(const char* path) : fd_(open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC)) {
        if (fd_ < 0) fail(EK_IO, "cannot be read: %s", std::strerror(errno));
        struct stat info;
        if (fstat(fd_, &info) != 0) {
            const int error = errno;
            close(fd_);
            fail(EK_IO, "cannot be read: %s", std::strerror(error));
        }
        if (!S_ISREG(info.st_mode)) {
            close(fd_);
            if (S_ISDIR(info.st_mode)) fail(EK_UNSUPPORTED, "is a folder, expected a file");
            fail(EK_BAD_FILE, "not a regular file");
        }
        size_ = uint64_t(info.st_size);
    }
    ~File() override { close(fd_); }

    void read(uint64_t at, void* to, size_t count) const override {
        for (size_t done = 0; done < count;) {
            const ssize_t n = pread(fd_, static_cast<uint8_t*>(to) + done, count - done, off_t(at + done));
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) fail(EK_IO, "cannot be read: %s", std::strerror(errno));
            if (n == 0) fail(EK_IO, "became shorter while it was read");
            done += size_t(n);
        }
    }

  private:
    int fd_;
};

class Memory : public Source {
  public:
    Memory(const void* data, size_t bytes) : data_(static_cast<const uint8_t*>(data)) { size_ = bytes; }
    void read(uint64_t at, void* to, size_t count) const override {
        if (count) std::memcpy(to, data_ + at, count);
    }

  private:
    const uint8_t* data_;
};

uint32_t u16(const uint8_t* p) { return uint32_t(p[0]) | uint32_t(p[1]) << 8; }
uint32_t u32(const uint8_t* p) { return u16(p) | u16(p + 2) << 16; }

class Record {
  public:
    Record& two(uint32_t v) { return byte(v), byte(v >> 8), *this; }
    Record& four(uint32_t v) { return two(v & 0xffff).two(v >> 16); }
    Record& text(const std::string& v) { return bytes_ += v, *this; }
    Record& zeros(size_t n) { return bytes_.append(n, '\0'), *this; }
    const std::string& bytes() const { return bytes_; }

  private:
    void byte(uint32_t v) { bytes_ += char(v & 255); }
    std::string bytes_;
};

std::string local_header(const Entry& e, uint64_t position) {
    const uint32_t align = e.name.rfind("segments/", 0) == 0 ? kAlignPayload : kAlign;
    const uint32_t padding = uint32_t(-int64_t(position + kLocal + e.name.size() + 6)) % align;
    Record r;
    r.text(std::string("PK\3\4", 4)).two(10).two(0).two(0).two(0).two(0x21).four(e.crc).four(e.bytes).four(e.bytes);
    r.two(uint32_t(e.name.size())).two(6 + padding).text(e.name).two(0xd935).two(2 + padding).two(align).zeros(padding);
    return r.bytes();
}

std::string central_record(const Entry& e, uint32_t position) {
    Record r;
    r.text(std::string("PK\1\2", 4)).two(0x0314).two(10).two(0).two(0).two(0).two(0x21).four(e.crc).four(e.bytes).four(e.bytes);
    r.two(uint32_t(e.name.size())).zeros(8).four(0x81a40000u).four(position).text(e.name);
    return r.bytes();
}

bool sound_name(const std::string& name) {
    if (name.empty() || name.size() > kMostName) return false;
    size_t parts = 1, part = 0;
    for (const char c : name) {
        if (c == '/') {
            if (part == 0 || ++parts > kMostParts) return false;
            part = 0;
            continue;
        }
        const bool plain = (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
        if (!(plain || (c == '.' && part > 0)) || ++part > kMostPart) return false;
    }
    return part > 0;
}

// No two names may be equal, or one lie below another, on any file system.
void check_names(const std::vector<Entry>& entries) {
    std::unordered_set<std::string> all;
    const auto folded = [](std::string name) {
        for (char& c : name) c = c >= 'A' && c <= 'Z' ? char(c + 32) : c;
        return name;
    };
    for (const Entry& e : entries) {
        if (!sound_name(e.name)) fail(EK_BAD_FILE, "file name '%s': not allowed in a bundle", printable(e.name).c_str());
        if (!all.insert(folded(e.name)).second) fail(EK_BAD_FILE, "file name '%s': there twice (upper and lower case count as equal)", e.name.c_str());
    }
    for (const Entry& e : entries) {
        const std::string name = folded(e.name);
        for (size_t i = name.find('/'); i != std::string::npos; i = name.find('/', i + 1))
            if (all.count(name.substr(0, i))) fail(EK_BAD_FILE, "file name '%s': lies below a file", e.name.c_str());
    }
}

// Place of a name in the order of the file: these four, then the others.
int rank(const std::string& name) {
    static const char* const first[] = {"manifest.json", "manifest.sha256", "signature.json", "evidence.json"};
    for (int i = 0; i < 4; i++)
        if (name == first[i]) return i;
    return 4;
}

}  // namespace

Bytes::Bytes(size_t size) : size_(size) {
    void* memory = nullptr;
    if (size > SIZE_MAX - 64 || posix_memalign(&memory, 64, size + 64) != 0) throw std::bad_alloc();
    memory_.reset(static_cast<uint8_t*>(memory));
    std::memset(memory_.get() + size, 0, 64);
}

void Bytes::Free::operator()(uint8_t* memory) const { std::free(memory); }

std::unique_ptr<Source> Source::file(const char* path) { return std::make_unique<File>(path); }
std::unique_ptr<Source> Source::memory(const void* data, size_t bytes) { return std::make_unique<Memory>(data, bytes); }

Archive::Archive(std::unique_ptr<Source> source) : source_(std::move(source)) {
    const uint64_t size = source_->size();
    uint8_t head[4] = {}, end[kEnd] = {};
    if (size < kEnd) fail(EK_BAD_FILE, "%llu bytes, too short for a bundle. Copy or build it again", static_cast<unsigned long long>(size));
    if (size > 0xffffffffull) fail(EK_BAD_FILE, "larger than the 4 GiB that a bundle file can have");
    source_->read(0, head, 4);
    if (std::memcmp(head, "PK\3\4", 4) != 0) fail(EK_BAD_FILE, "not a bundle, expected a zip file that starts with 'PK'");
    source_->read(size - kEnd, end, kEnd);
    if (std::memcmp(end, "PK\5\6", 4) != 0) fail(EK_BAD_FILE, "damaged: its end is missing or something follows it. Copy or build it again");
    const uint32_t count = u16(end + 10), table_bytes = u32(end + 12), table = u32(end + 16);
    if (count > kMostFiles) fail(EK_BAD_FILE, "%u files, expected at most %zu", count, kMostFiles);
    Record wanted;
    wanted.text(std::string("PK\5\6", 4)).two(0).two(0).two(count).two(count).four(table_bytes).four(table).two(0);
    if (uint64_t(table) + table_bytes != size - kEnd || table_bytes > kMostFiles * (kCentral + kMostName) ||
        std::memcmp(end, wanted.bytes().data(), kEnd) != 0)
        fail(EK_BAD_FILE, "damaged or altered: end record is not in canonical form. Copy or build it again");

    std::string records(table_bytes, '\0');
    source_->read(table, records.data(), table_bytes);
    std::vector<uint32_t> positions;
    size_t at = 0;
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t* p = reinterpret_cast<const uint8_t*>(records.data()) + at;
        if (records.size() - at < kCentral || records.size() - at - kCentral < u16(p + 28))
            fail(EK_BAD_FILE, "damaged: file table is cut short. Copy or build it again");
        Entry e{records.substr(at + kCentral, u16(p + 28)), 0, u32(p + 24), u32(p + 16)};
        const std::string record = central_record(e, u32(p + 42));
        if (records.compare(at, record.size(), record) != 0)
            fail(EK_BAD_FILE, "damaged or altered: table entry of '%s' is not in canonical form", printable(e.name).c_str());
        at += record.size();
        positions.push_back(u32(p + 42));
        entries_.push_back(std::move(e));
    }
    if (at != records.size()) fail(EK_BAD_FILE, "damaged: bytes behind the file table");
    check_names(entries_);
    const auto before = [](const Entry& a, const Entry& b) {
        return rank(a.name) != rank(b.name) ? rank(a.name) < rank(b.name) : a.name < b.name;
    };
    if (!std::is_sorted(entries_.begin(), entries_.end(), before)) fail(EK_BAD_FILE, "altered: files are not in canonical order");

    uint64_t position = 0;
    std::string found;
    for (size_t i = 0; i < entries_.size(); i++) {
        Entry& e = entries_[i];
        const std::string header = local_header(e, position);
        if (positions[i] != position || position + header.size() + e.bytes > table)
            fail(EK_BAD_FILE, "damaged: file '%s' is not where it belongs. Copy or build it again", e.name.c_str());
        found.resize(header.size());
        source_->read(position, found.data(), header.size());
        if (found != header) fail(EK_BAD_FILE, "damaged or altered: header of '%s' is not in canonical form", e.name.c_str());
        e.at = position + header.size();
        numbers_[e.name] = i;
        position = e.at + e.bytes;
    }
    if (position != table) fail(EK_BAD_FILE, "damaged or altered: bytes belong to no file");
}

const Entry* Archive::find(const std::string& name) const {
    const auto at = numbers_.find(name);
    return at == numbers_.end() ? nullptr : &entries_[at->second];
}

Bytes Archive::read(const Entry& entry) const {
    Bytes bytes(entry.bytes);
    source_->read(entry.at, bytes.data(), bytes.size());
    if (crc32(bytes.data(), bytes.size()) != entry.crc)
        fail(EK_BAD_FILE, "file '%s' is damaged: its CRC-32 differs. Copy or build it again", entry.name.c_str());
    return bytes;
}

}  // namespace edgekit
