#pragma GCC optimize("Os")  // runs once per bundle: small is better than quick

#include "json.h"

#include <charconv>
#include <clocale>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "status.h"

namespace edgekit {
namespace {

constexpr size_t kMostBytes = 16 << 20, kMostValues = 1000000;
constexpr int kMostDepth = 64, kMostDigits = 19;

// In the C locale, whatever the program's is; std::from_chars would bring tables that are larger than this reader.
double number_of(const std::string& text) {
    static const locale_t c = newlocale(LC_ALL_MASK, "C", nullptr);
    return strtod_l(text.c_str(), nullptr, c);
}

bool to_number(const char* begin, const char* end, double* value) {
    *value = number_of(std::string(begin, end));
    return std::isfinite(*value);
}

// The decimal digits of a positive number, as many as asked for, and the exponent of the first.
struct Decimal {
    std::string digits;
    int exponent;

    Decimal(double value, int count) {
        char text[40];
        std::snprintf(text, sizeof text, "%.*e", count - 1, value);
        const char* at = text;
        for (; *at != 'e'; at++)
            if (*at >= '0' && *at <= '9') digits += *at;  // and not the locale's point
        exponent = std::atoi(at + 1);
    }

    // The next larger one of as many digits.
    void raise() {
        size_t i = digits.size();
        while (i > 0 && digits[i - 1] == '9') digits[--i] = '0';
        if (i > 0) digits[i - 1]++;
        else digits[0] = '1', exponent++;
    }

    double value() const { return number_of(digits.substr(0, 1) + "." + digits.substr(1) + "e" + std::to_string(exponent)); }
};

// The shortest one that reads back equal. Below a power of two numbers lie closer: there it may be the one above the nearest.
Decimal shortest_decimal(double value) {
    for (int count = 1; count < 17; count++) {
        Decimal d(value, count);
        if (d.value() == value) return d;
        d.raise();
        if (d.value() == value) return d;
    }
    return Decimal(value, 17);
}

// As Python writes it: the shortest digits that read back equal.
std::string shortest(double value) {
    const std::string sign = std::signbit(value) ? "-" : "";
    if (value == 0) return sign + "0.0";
    const Decimal d = shortest_decimal(std::fabs(value));
    const int exponent = d.exponent;
    const std::string& digits = d.digits;
    if (exponent < -4 || exponent > 15) {
        std::string out = sign + digits[0];
        if (digits.size() > 1) out += "." + digits.substr(1);
        char tail[16];
        std::snprintf(tail, sizeof tail, "e%c%02d", exponent < 0 ? '-' : '+', std::abs(exponent));
        return out + tail;
    }
    if (exponent < 0) return sign + "0." + std::string(size_t(-exponent - 1), '0') + digits;
    if (digits.size() <= size_t(exponent) + 1) return sign + digits + std::string(size_t(exponent) + 1 - digits.size(), '0') + ".0";
    return sign + digits.substr(0, size_t(exponent) + 1) + "." + digits.substr(size_t(exponent) + 1);
}

bool is_shortest(const char* begin, const char* end, double value) {
    return shortest(value) == std::string_view(begin, size_t(end - begin));
}

// Bytes of the UTF-8 character at p, 0 where it is none (RFC 3629, section 4).
int character(const uint8_t* p, const uint8_t* end) {
    const auto tail = [&](int i, uint8_t low = 0x80, uint8_t high = 0xbf) { return p + i < end && p[i] >= low && p[i] <= high; };
    if (p[0] < 0x80) return 1;
    if (p[0] >= 0xc2 && p[0] <= 0xdf) return tail(1) ? 2 : 0;
    if (p[0] >= 0xe0 && p[0] <= 0xef)
        return tail(1, p[0] == 0xe0 ? 0xa0 : 0x80, p[0] == 0xed ? 0x9f : 0xbf) && tail(2) ? 3 : 0;
    if (p[0] >= 0xf0 && p[0] <= 0xf4)
        return tail(1, p[0] == 0xf0 ? 0x90 : 0x80, p[0] == 0xf4 ? 0x8f : 0xbf) && tail(2) && tail(3) ? 4 : 0;
    return 0;
}

int hex(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1; }

}  // namespace

class Json::Parser {
  public:
    Parser(Json& json, const char* where) : text_(json.text_), nodes_(json.nodes_), where_(where) {}

    void run() {
        value(1);
        if (at_ != text_.size()) trouble("something follows the value");
    }

  private:
    [[noreturn]] void trouble(const char* what) const {
        fail(EK_BAD_FILE, "%s: not canonical JSON at byte %zu: %s", where_, at_, what);
    }
    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
    void expect(char c) {
        if (peek() != c) trouble((std::string("expected '") + c + "'").c_str());
        at_++;
    }

    uint32_t value(int depth) {
        if (depth > kMostDepth) trouble("nested too deep, expected at most 64 levels");
        if (nodes_.size() >= kMostValues) trouble("too many values, expected at most 1000000");
        const uint32_t me = uint32_t(nodes_.size());
        nodes_.emplace_back();
        nodes_[me].begin = uint32_t(at_);
        Type type;
        switch (peek()) {
            case '{': type = Type::kObject, object(me, depth); break;
            case '[': type = Type::kArray, array(me, depth); break;
            case '"': type = Type::kString, string(); break;
            case 't': type = Type::kTrue, word("true"); break;
            case 'f': type = Type::kFalse, word("false"); break;
            case 'n': type = Type::kNull, word("null"); break;
            default: type = number();
        }
        nodes_[me].type = type;
        nodes_[me].end = uint32_t(at_);
        return me;
    }

    void object(uint32_t me, int depth) {
        expect('{');
        uint32_t last = 0;
        std::string before;
        while (peek() != '}') {
            if (last) expect(',');
            const size_t begin = at_;
            string();
            const size_t end = at_;
            std::string key = Json::Parser::decoded(text_, begin, end);
            if (last && key <= before) at_ = begin, trouble("keys are not in order, or one is there twice");
            expect(':');
            const uint32_t child = value(depth + 1);
            nodes_[child].key_begin = uint32_t(begin), nodes_[child].key_end = uint32_t(end);
            (last ? nodes_[last].next : nodes_[me].children) = child;
            last = child;
            before = std::move(key);
        }
        at_++;
    }

    void array(uint32_t me, int depth) {
        expect('[');
        uint32_t last = 0;
        while (peek() != ']') {
            if (last) expect(',');
            const uint32_t child = value(depth + 1);
            (last ? nodes_[last].next : nodes_[me].children) = child;
            last = child;
        }
        at_++;
    }

    void word(const char* text) {
        if (text_.compare(at_, std::strlen(text), text) != 0) trouble("expected a value");
        at_ += std::strlen(text);
    }

    void string() {
        expect('"');
        const uint8_t* const data = reinterpret_cast<const uint8_t*>(text_.data());
        for (;;) {
            if (at_ >= text_.size()) trouble("a string without an end");
            const uint8_t c = data[at_];
            if (c == '"') break;
            if (c < 0x20) trouble("a control character in a string");
            if (c == '\\') {
                escape();
            } else {
                const int bytes = character(data + at_, data + text_.size());
                if (bytes == 0) trouble("not UTF-8");
                at_ += size_t(bytes);
            }
        }
        at_++;
    }

    void escape() {
        at_++;
        const char c = peek();
        if (c == 'u') {
            const int high = at_ + 4 < text_.size() ? hex(text_[at_ + 3]) : -1, low = high >= 0 ? hex(text_[at_ + 4]) : -1;
            const int code = 16 * high + low;
            const bool shorter = code == 8 || code == 9 || code == 10 || code == 12 || code == 13;
            if (low < 0 || text_[at_ + 1] != '0' || text_[at_ + 2] != '0' || high > 1 || shorter) trouble("an escape that is not needed");
            at_ += 5;
        } else {
            if (c == '\0' || !std::strchr("\"\\bfnrt", c)) trouble("an escape that is not needed");
            at_++;
        }
    }

    Type number() {
        const size_t begin = at_;
        if (peek() == '-') at_++;
        const size_t first = at_;
        while (peek() >= '0' && peek() <= '9') at_++;
        const size_t digits = at_ - first;
        if (digits == 0) at_ = begin, trouble("expected a value");
        if (digits > 1 && text_[first] == '0') at_ = begin, trouble("a number that begins with 0");
        const bool whole = peek() != '.' && peek() != 'e' && peek() != 'E';
        if (whole) {
            if (digits > size_t(kMostDigits)) at_ = begin, trouble("an integer of more than 19 digits");
            if (first != begin && text_[first] == '0') at_ = begin, trouble("minus 0");
            return Type::kInteger;
        }
        while (peek() != '\0' && std::strchr("0123456789.eE+-", peek())) at_++;
        double value = 0;
        const char *from = text_.data() + begin, *to = text_.data() + at_;
        if (!to_number(from, to, &value) || !std::isfinite(value) || !is_shortest(from, to, value))
            at_ = begin, trouble("a number in another form than the shortest");
        return Type::kNumber;
    }

  public:
    // What a checked string says; begin and end with its quotes.
    static std::string decoded(const std::string& text, size_t begin, size_t end) {
        std::string out;
        out.reserve(end - begin);
        for (size_t i = begin + 1; i + 1 < end; i++) {
            if (text[i] != '\\') {
                out += text[i];
                continue;
            }
            const char c = text[++i];
            if (c == 'u') out += char(16 * hex(text[i + 3]) + hex(text[i + 4])), i += 4;
            else out += c == 'b' ? '\b' : c == 'f' ? '\f' : c == 'n' ? '\n' : c == 'r' ? '\r' : c == 't' ? '\t' : c;
        }
        return out;
    }

  private:
    const std::string& text_;
    std::vector<Node>& nodes_;
    const char* where_;
    size_t at_ = 0;
};

Value Json::parse(std::string text, const char* where) {
    if (text.size() > kMostBytes) fail(EK_BAD_FILE, "%s: too large, expected at most %zu bytes, got %zu", where, kMostBytes, text.size());
    auto json = std::make_shared<Json>();
    json->text_ = std::move(text);
    Parser(*json, where).run();
    return Value(std::move(json), 0, where);
}

std::string Value::decoded(uint32_t begin, uint32_t end) const { return Json::Parser::decoded(json_->text_, begin, end); }

void Value::refuse(const char* what) const {
    fail(EK_BAD_FILE, "%s: expected %s, got %s", where_.c_str(), what, printable(raw(), 60).c_str());
}

uint32_t Value::find(const char* key) const {
    if (!is_object()) refuse("a table");
    for (uint32_t i = node().children; i; i = json_->nodes_[i].next)
        if (decoded(json_->nodes_[i].key_begin, json_->nodes_[i].key_end) == key) return i;
    return 0;
}

Value Value::operator[](const char* key) const {
    const uint32_t i = find(key);
    if (!i) fail(EK_BAD_FILE, "%s: key '%s' is missing", where_.c_str(), key);
    return Value(json_, i, where_ + "." + key);
}

std::vector<std::pair<std::string, Value>> Value::members() const {
    if (!is_object()) refuse("a table");
    std::vector<std::pair<std::string, Value>> out;
    for (uint32_t i = node().children; i; i = json_->nodes_[i].next) {
        std::string key = decoded(json_->nodes_[i].key_begin, json_->nodes_[i].key_end);
        const std::string where = where_ + "." + printable(key, 64);
        out.emplace_back(std::move(key), Value(json_, i, where));
    }
    return out;
}

void Value::keys(std::initializer_list<const char*> required, std::initializer_list<const char*> optional) const {
    size_t found = 0;
    for (const auto& [key, value] : members()) {
        bool known = false;
        for (const char* name : required) known = known || key == name;
        found += known;
        for (const char* name : optional) known = known || key == name;
        if (!known) fail(EK_BAD_FILE, "%s: unknown key '%s'", where_.c_str(), printable(key, 64).c_str());
    }
    if (found == required.size()) return;
    for (const char* name : required) (*this)[name];
}

std::vector<Value> Value::items() const {
    if (type() != Json::Type::kArray) refuse("a list");
    std::vector<Value> out;
    for (uint32_t i = node().children; i; i = json_->nodes_[i].next)
        out.push_back(Value(json_, i, where_ + "[" + std::to_string(out.size()) + "]"));
    return out;
}

std::vector<std::string> Value::texts() const {
    std::vector<std::string> out;
    for (const Value& item : items()) out.push_back(item.text());
    return out;
}

std::string Value::text() const {
    if (type() != Json::Type::kString) refuse("a string");
    return decoded(node().begin, node().end);
}

int64_t Value::integer(int64_t low, int64_t high) const {
    int64_t value = 0;
    const std::string_view digits = raw();
    const bool whole = type() == Json::Type::kInteger;
    const bool fits = whole && std::from_chars(digits.data(), digits.data() + digits.size(), value).ec == std::errc();
    if (!whole) refuse("an integer");
    if (!fits || value < low || value > high) refuse(("an integer from " + std::to_string(low) + " to " + std::to_string(high)).c_str());
    return value;
}

double Value::number() const {
    double value = 0;
    const std::string_view digits = raw();
    if (type() != Json::Type::kInteger && type() != Json::Type::kNumber) refuse("a number");
    to_number(digits.data(), digits.data() + digits.size(), &value);
    return value;
}

bool Value::truth() const {
    if (type() != Json::Type::kTrue && type() != Json::Type::kFalse) refuse("true or false");
    return type() == Json::Type::kTrue;
}

size_t Value::choice(std::initializer_list<const char*> names) const {
    const std::string word = type() == Json::Type::kString ? text() : std::string();
    std::string all;
    size_t i = 0;
    for (const char* name : names) {
        if (type() == Json::Type::kString && word == name) return i;
        all += std::string(i++ ? ", " : "") + name;
    }
    refuse(("one of " + all).c_str());
}

std::string printable(std::string_view text, size_t limit) {
    std::string out;
    for (const char c : text) {
        if (out.size() + 4 > limit) return out + "...";
        char escaped[8];
        if (uint8_t(c) >= 0x20 && uint8_t(c) < 0x7f) out += c;
        else std::snprintf(escaped, sizeof escaped, "\\x%02x", uint8_t(c)), out += escaped;
    }
    return out;
}

}  // namespace edgekit
