// manifest.json: all its rules for plans of one network (docs/bundle.md, 4 and 5).
#pragma GCC optimize("Os")  // runs once per bundle: small is better than quick

#include <algorithm>
#include <cstring>
#include <set>

#include "bundle.h"
#include "sha256.h"
#include "status.h"

namespace edgekit {
namespace {

constexpr uint64_t kMostTensor = 1ull << 32, kMostHead = 16 << 20;
constexpr int64_t kMostFile = INT64_MAX;
constexpr size_t kMostTensors = 4096;  // of one network: looking them up takes quadratic time
const char* const kOutside[] = {"manifest.json", "manifest.sha256", "signature.json"};

bool outside(const std::string& name) {
    return std::find(std::begin(kOutside), std::end(kOutside), name) != std::end(kOutside);
}

std::string name_of(const Value& value) {
    const std::string text = value.text();
    bool good = !text.empty() && text.size() <= 80 && text[0] != '.';
    for (const char c : text)
        good = good && ((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-');
    if (!good) value.refuse("1 to 80 letters, digits, '.', '_' or '-', the first one no dot");
    return text;
}

bool is_hex(const std::string& text, size_t digits) {
    return text.size() == digits && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

std::string text_of(const Bytes& bytes) { return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size()); }

void unique(const std::vector<std::string>& names, const char* what) {
    std::set<std::string> seen;
    for (const std::string& name : names)
        if (!seen.insert(name).second) fail(EK_BAD_FILE, "%s '%s': there twice", what, printable(name).c_str());
}

void check_quant(const Value& quant, const std::vector<uint32_t>& shape) {
    quant.keys({"dtype", "scale", "zero_point"}, {"axis"});
    quant["dtype"].choice({"float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64", "bool"});
    const std::vector<Value> scales = quant["scale"].items(), zeros = quant["zero_point"].items();
    size_t wanted = 1;
    if (quant.has("axis")) {
        if (shape.empty()) quant["axis"].refuse("an axis of the tensor");
        wanted = shape[size_t(quant["axis"].integer(0, int64_t(shape.size()) - 1))];
    }
    if (scales.size() != wanted || zeros.size() != wanted) quant.refuse((std::to_string(wanted) + " scales and zero points").c_str());
    for (const Value& scale : scales)
        if (!(scale.number() > 0)) scale.refuse("a positive number");
    for (const Value& zero : zeros) zero.integer(INT64_MIN, INT64_MAX);
}

Manifest::Tensor read_tensor(const Value& table) {
    static const int sizes[] = {4, 2, 2, 1, 1, 4, 8, 1};
    table.keys({"name", "dtype", "shape"}, {"layout", "quant"});
    Manifest::Tensor t;
    t.name = table["name"].text();
    if (t.name.empty() || t.name.size() > 800) table["name"].refuse("1 to 200 characters");
    const size_t dtype = table["dtype"].choice({"float32", "float16", "bfloat16", "int8", "uint8", "int32", "int64", "bool"});
    t.dtype = table["dtype"].text();
    t.bytes = uint64_t(sizes[dtype]);
    const std::vector<Value> shape = table["shape"].items();
    if (shape.size() > 8) table["shape"].refuse("at most 8 axes");
    for (const Value& side : shape) {
        t.shape.push_back(uint32_t(side.integer(1, UINT32_MAX)));
        t.bytes *= t.shape.back();
        if (t.bytes > kMostTensor) table["shape"].refuse("at most 4 GiB");
    }
    if (table.has("layout")) table["layout"].text();
    if (table.has("quant")) check_quant(table["quant"], t.shape);
    return t;
}

std::vector<Manifest::Golden> read_golden(const Value& list) {
    std::vector<Manifest::Golden> all;
    for (const Value& table : list.items()) {
        table.keys({"tensor", "path"}, {"atol", "rtol", "allow"});
        Manifest::Golden g;
        g.tensor = table["tensor"].text();
        g.path = table["path"].text();
        if (table.has("atol")) g.atol = table["atol"].number();
        if (table.has("rtol")) g.rtol = table["rtol"].number();
        if (table.has("allow")) g.allow = table["allow"].number();
        if (!(g.atol >= 0 && g.rtol >= 0 && g.allow >= 0 && g.allow < 1)) table.refuse("atol, rtol >= 0 and 0 <= allow < 1");
        all.push_back(std::move(g));
    }
    return all;
}

// Golden values are there for all of `needed`, those of states may be; their files have the tensors' sizes.
void check_golden(const Manifest& m, const std::vector<Manifest::Golden>& golden, const std::vector<std::string>& needed,
                  const std::set<std::string>& possible, std::set<std::string>& used) {
    std::vector<std::string> names;
    for (const Manifest::Golden& g : golden) {
        names.push_back(g.tensor);
        const bool known = std::find(needed.begin(), needed.end(), g.tensor) != needed.end() || possible.count(g.tensor);
        const Manifest::File* file = m.file(g.path);
        if (!known) fail(EK_BAD_FILE, "golden '%s': no input or output of the plan", printable(g.tensor).c_str());
        if (!file || g.path.rfind("golden/", 0) != 0 || file->bytes != m.tensor(g.tensor).bytes || !used.insert(g.path).second)
            fail(EK_BAD_FILE, "golden '%s': file '%s' is not its own, below golden/ and of its size", printable(g.tensor).c_str(), printable(g.path).c_str());
    }
    unique(names, "golden");
    for (const std::string& name : needed)
        if (std::find(names.begin(), names.end(), name) == names.end())
            fail(EK_BAD_FILE, "golden '%s': missing, the bundle could not test itself", printable(name).c_str());
}

Manifest::Variant read_variant(const Value& table, const std::string& step, const Manifest& m) {
    table.keys({"name", "backend", "precision", "format", "path", "bytes", "digest"}, {"options"});
    Manifest::Variant v;
    v.name = name_of(table["name"]);
    v.backend = name_of(table["backend"]);
    v.precision = table["precision"].text();
    v.path = table["path"].text();
    if (v.path != "segments/" + step + "/" + v.name + "." + name_of(table["format"])) table["path"].refuse("segments/<step>/<variant>.<format>");
    const Manifest::File* file = m.file(v.path);
    if (!file) fail(EK_BAD_FILE, "file '%s': is not in the file table", printable(v.path).c_str());
    if (uint64_t(table["bytes"].integer(1, kMostFile)) != file->bytes) table["bytes"].refuse("what the file table says");
    if (table["digest"].text() != "sha256:" + file->sha256) table["digest"].refuse("what the file table says");
    if (!table.has("options")) return v;
    const Value options = table["options"];
    v.packed = options.has("packed");
    if (!options.has("codes")) return v;
    for (const auto& [tensor, params] : options["codes"].members()) {
        const std::vector<Value> found = params.items();
        if (found.size() != 3) params.refuse("type, scale and zero point");
        if (found[0].text() == "uint8") v.codes.push_back({tensor, float(found[1].number()), int(found[2].integer(0, 255))});
    }
    return v;
}

void check_states(const Value& list, const Manifest& m, std::set<std::string>& inputs, std::set<std::string>& outputs) {
    std::vector<std::string> names;
    for (const Value& table : list.items()) {
        table.keys({"name", "dtype", "shape", "input", "output"}, {"initial", "nominal_dt_s", "reset_after_s", "quant"});
        names.push_back(name_of(table["name"]));
        for (const char* key : {"input", "output"}) {
            const Manifest::Tensor& t = m.tensor(table[key].text());
            std::vector<uint32_t> shape;
            for (const Value& side : table["shape"].items()) shape.push_back(uint32_t(side.integer(1, UINT32_MAX)));
            if (t.dtype != table["dtype"].text() || t.shape != shape) table[key].refuse("a tensor of the state's dtype and shape");
        }
        if (!inputs.insert(table["input"].text()).second || !outputs.insert(table["output"].text()).second) table.refuse("tensors of its own");
        if (std::find(m.inputs.begin(), m.inputs.end(), table["input"].text()) != m.inputs.end()) table["input"].refuse("no input of the plan");
        if (table.has("initial")) table["initial"].number();
        for (const char* key : {"nominal_dt_s", "reset_after_s"})
            if (table.has(key) && !(table[key].number() > 0 && table[key].number() <= 1e9)) table[key].refuse("seconds above 0");
        if (table.has("quant")) check_quant(table["quant"], m.tensor(table["input"].text()).shape);
    }
    unique(names, "state");
}

// The one step: what it reads is there, and what the plan promises it writes.
void check_step(const Value& step, const std::set<std::string>& state_inputs, const std::set<std::string>& state_outputs, Manifest& m) {
    step.keys({"kind", "name", "inputs", "outputs", "variants"}, {"repeat", "when"});
    const std::string name = name_of(step["name"]);
    if ((step.has("repeat") && step["repeat"].integer(1, 256) != 1) || step.has("when")) fail(EK_UNSUPPORTED, "plan: a step that is repeated or skipped");
    const std::vector<std::string> reads = step["inputs"].texts(), writes = step["outputs"].texts();
    unique(reads, "input");
    unique(writes, "output");
    const auto in = [](const std::vector<std::string>& list, const std::string& name) { return std::find(list.begin(), list.end(), name) != list.end(); };
    for (const std::string& tensor : reads)
        if (m.tensor(tensor), !in(m.inputs, tensor) && !state_inputs.count(tensor)) step["inputs"].refuse("inputs and states of the plan");
    for (const std::string& tensor : writes)
        if (m.tensor(tensor), in(m.inputs, tensor) || state_inputs.count(tensor)) step["outputs"].refuse("tensors that nothing else writes");
    for (const std::string& tensor : m.outputs)
        if (!in(writes, tensor)) step["outputs"].refuse("all outputs of the plan");
    for (const std::string& tensor : state_outputs)
        if (!in(writes, tensor)) step["outputs"].refuse("all states of the plan");
    for (const Value& table : step["variants"].items()) m.variants.push_back(read_variant(table, name, m));
    if (m.variants.empty()) step["variants"].refuse("at least one");
    std::vector<std::string> names;
    for (const Manifest::Variant& v : m.variants) names.push_back(v.name);
    unique(names, "variant");
}

// The manifest's bytes, which have the checksum beside them.
std::string checked_head(const Archive& archive) {
    std::string sums, text;
    for (const char* name : kOutside) {
        const Entry* entry = archive.find(name);
        if (!entry && std::strcmp(name, "signature.json") == 0) continue;
        if (!entry) fail(EK_BAD_FILE, "file '%s' is missing. Is it a bundle?", name);
        if (entry->bytes > kMostHead) fail(EK_BAD_FILE, "file '%s': too large, %u bytes", name, entry->bytes);
        const Bytes bytes = archive.read(*entry);
        if (std::strcmp(name, "manifest.sha256") == 0) {
            text.append(text_of(bytes));
            continue;
        }
        sums += sha256(bytes.data(), bytes.size()) + "  " + name + "\n";
    }
    if (sums != text) fail(EK_BAD_FILE, "manifest.json or signature.json is damaged or altered: differs from manifest.sha256. Build it again");
    return text_of(archive.read(*archive.find("manifest.json")));
}

void read_files(const Value& table, const Archive& archive, Manifest& m) {
    size_t there = 0;
    for (const auto& [name, entry] : table.members()) {
        entry.keys({"bytes", "sha256"});
        Manifest::File file{name, entry["sha256"].text(), uint64_t(entry["bytes"].integer(0, kMostFile))};
        if (!is_hex(file.sha256, 64)) entry["sha256"].refuse("64 hex digits");
        const Entry* found = archive.find(name);
        if (outside(name) || !found) fail(EK_BAD_FILE, "file '%s' is missing", printable(name).c_str());
        if (found->bytes != file.bytes)
            fail(EK_BAD_FILE, "file '%s' has %u bytes, the manifest says %llu", name.c_str(), found->bytes, static_cast<unsigned long long>(file.bytes));
        m.files.push_back(std::move(file));
    }
    for (const Entry& entry : archive.entries()) there += !outside(entry.name);
    if (there != m.files.size()) fail(EK_BAD_FILE, "there are files that the manifest does not list");
    if (!m.file("evidence.json")) fail(EK_BAD_FILE, "file 'evidence.json' is missing");
}

// Over the canonical JSON of what decides the result; the manifest is canonical, so its own bytes are put together.
void check_digest(const Value& root, const Manifest& m) {
    std::string text, kernels;
    for (const Manifest::File& file : m.files)
        if (file.name.rfind("kernels/", 0) == 0) kernels += (kernels.empty() ? "\"" : ",\"") + file.name + "\":\"" + file.sha256 + "\"";
    for (const char* key : {"inputs", "kernel_files", "model", "outputs", "pipeline", "plan", "states", "target", "task", "tensors"}) {
        const bool files = std::strcmp(key, "kernel_files") == 0;
        if (files ? kernels.empty() : !root.has(key)) continue;
        text += std::string(text.empty() ? "\"" : ",\"") + key + "\":";
        if (files) text += "{" + kernels + "}";
        else text += root[key].raw();
    }
    text = "{" + text + "}";
    if (m.payload_digest != "sha256:" + sha256(text.data(), text.size())) fail(EK_BAD_FILE, "payload_digest: the plan was altered");
}

}  // namespace

const Manifest::Tensor& Manifest::tensor(const std::string& name) const {
    for (const Tensor& t : tensors)
        if (t.name == name) return t;
    fail(EK_BAD_FILE, "tensor '%s': no such tensor", printable(name).c_str());
}

const Manifest::File* Manifest::file(const std::string& name) const {
    // sorted, as canonical JSON is
    const auto at = std::lower_bound(files.begin(), files.end(), name, [](const File& f, const std::string& n) { return f.name < n; });
    return at != files.end() && at->name == name ? &*at : nullptr;
}

const std::vector<std::string>& Manifest::labels() const {
    static const std::vector<std::string> none;
    return detect ? detect->labels : classify ? classify->labels : none;
}

Manifest Manifest::read(const Archive& archive) {
    const Value root = Json::parse(checked_head(archive), "manifest.json");
    if (root["schema_version"].integer(1, INT32_MAX) > 1) fail(EK_UNSUPPORTED, "needs a newer edgekit, expected schema 1. Upgrade edgekit");
    root.keys({"schema_version", "model", "task", "target", "inputs", "outputs", "tensors", "plan", "pipeline", "payload_digest", "golden", "files",
               "provenance"},
              {"states"});
    Manifest m;
    m.model = name_of(root["model"]), m.task = name_of(root["task"]), m.target = name_of(root["target"]);
    m.payload_digest = root["payload_digest"].text();
    read_files(root["files"], archive, m);
    check_digest(root, m);
    const std::vector<Value> plan = root["plan"].items();
    if (plan.empty()) root["plan"].refuse("at least one step");
    if (plan.size() > 1 || !plan[0].has("kind") || plan[0]["kind"].choice({"segment", "kernel"}) != 0)
        fail(EK_UNSUPPORTED, "plan: %zu steps, expected one network. Run it with edgekit for Python", plan.size());

    for (const Value& tensor : root["tensors"].items()) m.tensors.push_back(read_tensor(tensor));
    if (m.tensors.size() > kMostTensors) fail(EK_UNSUPPORTED, "tensors: %zu, expected at most %zu", m.tensors.size(), kMostTensors);
    std::vector<std::string> names;
    for (const Tensor& t : m.tensors) names.push_back(t.name);
    unique(names, "tensor");
    m.inputs = root["inputs"].texts(), m.outputs = root["outputs"].texts();
    unique(m.inputs, "input");
    unique(m.outputs, "output");
    if (m.inputs.size() + m.outputs.size() > 2 * kMostTensors) root.refuse("inputs and outputs that are tensors");
    for (const auto* list : {&m.inputs, &m.outputs})
        for (const std::string& name : *list) m.tensor(name);
    if (m.inputs.empty() || m.outputs.empty()) root.refuse("at least one input and one output");
    std::set<std::string> state_inputs, state_outputs, used{"evidence.json"};
    if (root.has("states")) check_states(root["states"], m, state_inputs, state_outputs);
    m.states = !state_inputs.empty();
    check_step(plan[0], state_inputs, state_outputs, m);
    for (const Variant& v : m.variants) used.insert(v.path);

    root["golden"].keys({"inputs", "outputs"});
    m.golden_inputs = read_golden(root["golden"]["inputs"]), m.golden_outputs = read_golden(root["golden"]["outputs"]);
    check_golden(m, m.golden_inputs, m.inputs, state_inputs, used);
    check_golden(m, m.golden_outputs, m.outputs, state_outputs, used);
    for (const File& file : m.files)
        if (!used.count(file.name) && file.name.rfind("evidence/", 0) != 0) fail(EK_BAD_FILE, "file '%s': nothing in the manifest refers to it", file.name.c_str());
    if (!root["provenance"].is_object()) root["provenance"].refuse("a table");
    if (m.task == "detect") m.detect = DetectSpec::read(root["pipeline"]);
    else if (m.task == "classify") m.classify = ClassifySpec::read(root["pipeline"]);
    else if (!root["pipeline"].is_object()) root["pipeline"].refuse("a table");
    return m;
}

}  // namespace edgekit
