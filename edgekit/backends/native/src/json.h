// JSON in the one form that bundles have (docs/bundle.md, 4): read and checked byte by byte, then looked at in place.
//
// All trouble is an Error with EK_BAD_FILE that names the place. Bounded: 16 MiB, 1,000,000 values, 64 levels.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace edgekit {

class Value;

// A parsed text; holds a copy of it.
class Json {
  public:
    // where: what messages call it, "manifest.json".
    static Value parse(std::string text, const char* where);

    enum class Type : uint8_t { kNull, kFalse, kTrue, kInteger, kNumber, kString, kArray, kObject };
    struct Node {
        Type type = Type::kNull;
        uint32_t begin = 0, end = 0;          // its text, quotes and brackets included
        uint32_t key_begin = 0, key_end = 0;  // of a member of an object: its key, quotes included
        uint32_t children = 0, next = 0;      // first child, next sibling; 0: none, as the root is no one's
    };

  private:
    friend class Value;
    class Parser;
    std::string text_;
    std::vector<Node> nodes_;
};

// A value in a parsed text, and the way to it for messages. Getters throw where it is something else.
class Value {
  public:
    Json::Type type() const { return node().type; }
    bool is_object() const { return type() == Json::Type::kObject; }
    std::string_view raw() const { return std::string_view(json_->text_).substr(node().begin, node().end - node().begin); }
    const std::string& where() const { return where_; }

    // Members. `keys` throws unless all of `required` are there and nothing but these and `optional`.
    void keys(std::initializer_list<const char*> required, std::initializer_list<const char*> optional = {}) const;
    bool has(const char* key) const { return find(key) != 0; }
    Value operator[](const char* key) const;
    std::vector<std::pair<std::string, Value>> members() const;

    std::vector<Value> items() const;
    std::vector<std::string> texts() const;  // a list of strings
    std::string text() const;
    int64_t integer(int64_t low, int64_t high) const;
    double number() const;  // integers too
    bool truth() const;
    size_t choice(std::initializer_list<const char*> names) const;  // which of these strings

    // `<where>: expected <what>, got <this value>`
    [[noreturn]] void refuse(const char* what) const;

  private:
    friend class Json;
    Value(std::shared_ptr<const Json> json, uint32_t at, std::string where) : json_(std::move(json)), at_(at), where_(std::move(where)) {}
    const Json::Node& node() const { return json_->nodes_[at_]; }
    uint32_t find(const char* key) const;
    std::string decoded(uint32_t begin, uint32_t end) const;

    std::shared_ptr<const Json> json_;
    uint32_t at_;
    std::string where_;
};

// `text` on one line, control characters and quotes escaped, cut to `limit` characters: what messages show of strangers' words.
std::string printable(std::string_view text, size_t limit = 80);

}  // namespace edgekit
