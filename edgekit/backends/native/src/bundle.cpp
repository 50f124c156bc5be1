// The half of edgekit.h that opens bundles.
#pragma GCC optimize("Os")  // runs once per bundle: small is better than quick

#include "bundle.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "sha256.h"
#include "status.h"

namespace edgekit {
namespace {

// A call of the other half of edgekit.h: its trouble is ours.
void must(ek_status status) {
    if (status != EK_OK) throw Error{status, ek_last_error()};
}

uint64_t now() {
    return uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch()).count());
}

std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
        char escaped[8];
        if (c == '"' || c == '\\') out += '\\', out += c;
        else if (uint8_t(c) < 0x20) std::snprintf(escaped, sizeof escaped, "\\u%04x", uint8_t(c)), out += escaped;
        else out += c;
    }
    return out + "\"";
}

size_t item_of(const std::string& dtype) { return dtype == "float32" ? 4 : dtype == "uint8" ? 1 : 0; }

double golden_value(const Bytes& bytes, const std::string& dtype, size_t i) {
    if (dtype == "uint8") return bytes.data()[i];
    float x;
    std::memcpy(&x, bytes.data() + 4 * i, 4);
    return double(x);
}

// Calls visit(i, at): element i in the order that sessions see is number `at` in memory.
template <class Visit>
void each(const ek_port& port, const Visit& visit) {
    size_t outer = port.rank > 0 ? port.shape[0] : 1, channels = 1, inner = 1;
    if (port.rank > 1) channels = port.shape[1];
    for (uint32_t axis = 2; axis < port.rank; axis++) inner *= port.shape[axis];
    size_t i = 0;
    for (size_t n = 0; n < outer; n++)
        for (size_t c = 0; c < channels; c++)
            for (size_t p = 0; p < inner; p++, i++) visit(i, port.channels_last ? (n * inner + p) * channels + c : i);
}

class SessionHandle {
  public:
    explicit SessionHandle(const ek_engine* engine) { must(ek_session_create(engine, &session_)); }
    ~SessionHandle() { ek_session_close(session_); }
    SessionHandle(const SessionHandle&) = delete;
    SessionHandle& operator=(const SessionHandle&) = delete;
    ek_session* get() const { return session_; }
    uint8_t* memory(uint32_t port) const {
        void* memory = nullptr;
        must(ek_session_memory(session_, port, &memory));
        return static_cast<uint8_t*>(memory);
    }

  private:
    ek_session* session_ = nullptr;
};

}  // namespace

Bundle::Bundle(std::unique_ptr<Source> source, const char* variant, const ek_options* options)
    : archive_(std::move(source)), manifest_(Manifest::read(archive_)) {
    const Manifest::Variant* taken = nullptr;
    bool packed = false;
    for (const Manifest::Variant& v : manifest_.variants) {
        if (v.backend != "native" || (variant && v.name != variant)) continue;
        packed = packed || v.packed;
        if (!taken && !v.packed) taken = &v;
    }
    if (!taken && packed) fail(EK_UNSUPPORTED, "its weights are packed (options.packed). Build it without --weights-codec");
    if (!taken && variant) fail(EK_BAD_ARGUMENT, "variant '%s': no such variant of the backend 'native'", printable(variant).c_str());
    if (!taken) fail(EK_UNSUPPORTED, "has no variant of the backend 'native'. Build it for a CPU in a precision that it has (edgekit build --precision int8)");
    const Bytes payload = file(taken->path);  // not needed once it is loaded
    try {
        must(ek_engine_open(payload.data(), payload.size(), options, &engine_));
        ek_port p;
        for (const std::string& name : manifest_.inputs) {
            port(name, false, &p);
            const auto named = [&](const Manifest::Codes& c) { return c.tensor == name && c.scale == p.scale && c.zero == p.zero; };
            if (p.dtype == EK_U8 && manifest_.tensor(name).dtype != "uint8" && std::none_of(taken->codes.begin(), taken->codes.end(), named))
                fail(EK_BAD_FILE, "input '%s': the payload has codes of scale %g and zero point %d, which its options do not say. Build the bundle again",
                     printable(name).c_str(), double(p.scale), int(p.zero));
        }
        for (const std::string& name : manifest_.outputs) port(name, true, &p);
        tell(*taken);
    } catch (Error& error) {
        ek_engine_close(engine_);
        throw Error{error.status, "variant '" + taken->name + "': " + error.text};
    } catch (...) {
        ek_engine_close(engine_);
        throw;
    }
}

Bundle::~Bundle() { ek_engine_close(engine_); }

Bytes Bundle::file(const std::string& name) const {
    const Entry* entry = archive_.find(name);
    const Manifest::File* listed = manifest_.file(name);
    if (!entry || !listed) fail(EK_BAD_FILE, "file '%s' is missing", printable(name).c_str());
    Bytes bytes = archive_.read(*entry);
    if (sha256(bytes.data(), bytes.size()) != listed->sha256)
        fail(EK_BAD_FILE, "file '%s' is damaged: its SHA-256 differs. Copy or build it again", name.c_str());
    return bytes;
}

void Bundle::tell(const Manifest::Variant& variant) {
    const ImageRule* rule = manifest_.detect ? &manifest_.detect->rule : manifest_.classify ? &manifest_.classify->rule : nullptr;
    facts_ = "{\"model\": " + quoted(manifest_.model) + ", \"task\": " + quoted(manifest_.task) + ", \"target\": " + quoted(manifest_.target) +
             ", \"payload_digest\": " + quoted(manifest_.payload_digest) + ", \"variant\": " + quoted(variant.name) +
             ", \"precision\": " + quoted(variant.precision);
    if (rule) facts_ += ", \"width\": " + std::to_string(rule->width) + ", \"height\": " + std::to_string(rule->height);
    facts_ += ", \"classes\": " + std::to_string(manifest_.labels().size()) + "}";
}

uint32_t Bundle::port(const std::string& name, bool output, ek_port* port) const {
    const Manifest::Tensor& tensor = manifest_.tensor(name);
    uint32_t count = 0;
    must(ek_engine_ports(engine_, &count));
    for (uint32_t i = 0; i < count; i++) {
        must(ek_engine_port(engine_, i, port));
        if ((port->output != 0) != output || name != port->name) continue;
        if (port->rank != tensor.shape.size() || !std::equal(tensor.shape.begin(), tensor.shape.end(), port->shape))
            fail(EK_BAD_FILE, "%s '%s': the payload has another shape than the manifest", output ? "output" : "input", printable(name).c_str());
        return i;
    }
    fail(EK_BAD_FILE, "%s '%s': the payload has none", output ? "output" : "input", printable(name).c_str());
}

void Bundle::test() const {
    if (manifest_.states) fail(EK_UNSUPPORTED, "has states, which this test does not set");
    const SessionHandle session(engine_);
    for (const Manifest::Golden& golden : manifest_.golden_inputs) {
        const std::string& dtype = manifest_.tensor(golden.tensor).dtype;
        if (!item_of(dtype)) fail(EK_UNSUPPORTED, "golden '%s': type %s", printable(golden.tensor).c_str(), dtype.c_str());
        const Bytes values = file(golden.path);
        ek_port p;
        uint8_t* memory = session.memory(port(golden.tensor, false, &p));
        each(p, [&](size_t i, size_t at) {
            const float x = float(golden_value(values, dtype, i));
            if (p.dtype == EK_F32) std::memcpy(memory + 4 * at, &x, 4);
            else memory[at] = input_code(x, p);
        });
    }
    must(ek_session_run(session.get()));
    for (const Manifest::Golden& golden : manifest_.golden_outputs) {
        const std::string& dtype = manifest_.tensor(golden.tensor).dtype;
        if (!item_of(dtype)) fail(EK_UNSUPPORTED, "golden '%s': type %s", printable(golden.tensor).c_str(), dtype.c_str());
        const Bytes values = file(golden.path);
        ek_port p;
        const uint8_t* memory = session.memory(port(golden.tensor, true, &p));
        size_t count = 0, wrong = 0;
        double worst = 0;
        each(p, [&](size_t i, size_t at) {
            float x;
            if (p.dtype == EK_F32) std::memcpy(&x, memory + 4 * at, 4);
            else x = dtype == "uint8" ? float(memory[at]) : p.scale * float(memory[at] - p.zero);
            const double wanted = golden_value(values, dtype, i), error = std::fabs(double(x) - wanted);
            const bool good = error <= golden.atol + golden.rtol * std::fabs(wanted) || (std::isnan(wanted) && std::isnan(x));
            count++, wrong += !good;
            if (!good && !(error <= worst)) worst = error;
        });
        if (double(wrong) > golden.allow * double(count))
            fail(EK_WRONG_RESULT, "output '%s': %zu of %zu values differ from those that the bundle promises, by up to %g", printable(golden.tensor).c_str(),
                 wrong, count, worst);
    }
}

Pipeline::Pipeline(std::shared_ptr<const Bundle> bundle, const ImageRule& rule) : bundle_(std::move(bundle)) {
    const Manifest& m = bundle_->manifest();
    if (m.inputs.size() != 1 || m.states) fail(EK_UNSUPPORTED, "expected a network with one input and no state");
    must(ek_session_create(bundle_->engine(), &session_));
    try {
        ek_port port;
        void* memory = nullptr;
        must(ek_session_memory(session_, bundle_->port(m.inputs[0], false, &port), &memory));
        input_ = std::make_unique<PictureInput>(rule, port, memory);
    } catch (...) {
        ek_session_close(session_);
        throw;
    }
}

Pipeline::~Pipeline() { ek_session_close(session_); }

std::vector<OutputPort> Pipeline::outputs() const {
    std::vector<OutputPort> all;
    for (const std::string& name : bundle_->manifest().outputs) {
        OutputPort output{};
        void* memory = nullptr;
        must(ek_session_memory(session_, bundle_->port(name, true, &output.port), &memory));
        output.memory = memory;
        all.push_back(output);
    }
    return all;
}

const Placement& Pipeline::run(const ek_picture& picture) {
    const uint64_t begin = now();
    const Placement& placement = input_->write(picture);
    const uint64_t placed = now();
    must(ek_session_run(session_));
    ran_ = now();
    times_[0] = placed - begin, times_[1] = ran_ - placed;
    return placement;
}

void Pipeline::finish() { times_[2] = now() - ran_; }

}  // namespace edgekit

using edgekit::fail;
using edgekit::guarded;

struct ek_bundle {
    std::shared_ptr<const edgekit::Bundle> bundle;
};

struct ek_detector {
    edgekit::Pipeline pipeline;
    edgekit::BoxDecoder decoder;
    edgekit::BoxDecoder::Limits limits;
    std::vector<ek_box> boxes;

    ek_detector(std::shared_ptr<const edgekit::Bundle> bundle, const edgekit::DetectSpec& spec)
        : pipeline(std::move(bundle), spec.rule), decoder(spec, pipeline.outputs()), limits(defaults(spec)) {}

    static edgekit::BoxDecoder::Limits defaults(const edgekit::DetectSpec& spec) {
        return {float(spec.score_threshold), float(spec.iou_threshold), spec.max_detections};
    }
};

struct ek_classifier {
    edgekit::Pipeline pipeline;
    const float* values = nullptr;
    std::vector<float> scores;
    std::vector<ek_class> best;

    ek_classifier(std::shared_ptr<const edgekit::Bundle> bundle, const edgekit::ClassifySpec& spec) : pipeline(std::move(bundle), spec.rule) {
        for (const edgekit::OutputPort& output : pipeline.outputs())
            if (spec.output == output.port.name && output.port.dtype == EK_F32 && output.port.bytes == 4 * spec.labels.size())
                values = static_cast<const float*>(output.memory);
        if (!values) fail(EK_BAD_FILE, "its pipeline does not fit its network: expected %zu values in output '%s'", spec.labels.size(), edgekit::printable(spec.output).c_str());
        scores.assign(spec.labels.size(), 0.0f);
    }
};

namespace {

template <typename T> T& given(T* pointer, const char* what) {
    if (!pointer) fail(EK_BAD_ARGUMENT, "%s: is null", what);
    return *pointer;
}

template <typename Make>
ek_status open_bundle(const std::string& what, ek_bundle** bundle, const Make& make) {
    return guarded([&] {
        given(bundle, "bundle") = nullptr;
        try {
            *bundle = new ek_bundle{make()};
        } catch (edgekit::Error& error) {
            throw edgekit::Error{error.status, what + ": " + error.text};
        }
    });
}

}  // namespace

extern "C" {

ek_status ek_bundle_open(const char* path, const char* variant, const ek_options* options, ek_bundle** bundle) {
    if (!path) return guarded([] { fail(EK_BAD_ARGUMENT, "path: is null"); });
    return guarded([&] {
        const ek_status status = open_bundle("bundle " + edgekit::printable(path, 200), bundle, [&] {
            return std::make_shared<const edgekit::Bundle>(edgekit::Source::file(path), variant, options);
        });
        edgekit::must(status);
    });
}

ek_status ek_bundle_open_bytes(const void* data, size_t bytes, const char* variant, const ek_options* options, ek_bundle** bundle) {
    if (!data) return guarded([] { fail(EK_BAD_ARGUMENT, "data: is null"); });
    return open_bundle("bundle", bundle, [&] {
        return std::make_shared<const edgekit::Bundle>(edgekit::Source::memory(data, bytes), variant, options);
    });
}

void ek_bundle_close(ek_bundle* bundle) { delete bundle; }

const char* ek_bundle_describe(const ek_bundle* bundle) { return bundle ? bundle->bundle->describe() : "{}"; }

uint32_t ek_bundle_classes(const ek_bundle* bundle) { return bundle ? uint32_t(bundle->bundle->manifest().labels().size()) : 0; }

const char* ek_bundle_label(const ek_bundle* bundle, uint32_t number) {
    return number < ek_bundle_classes(bundle) ? bundle->bundle->manifest().labels()[number].c_str() : "";
}

const ek_engine* ek_bundle_engine(const ek_bundle* bundle) { return bundle ? bundle->bundle->engine() : nullptr; }

ek_status ek_bundle_test(const ek_bundle* bundle) {
    return guarded([&] { given(bundle, "bundle").bundle->test(); });
}

ek_status ek_detector_create(const ek_bundle* bundle, ek_detector** detector) {
    return guarded([&] {
        given(detector, "detector") = nullptr;
        const auto& from = given(bundle, "bundle").bundle;
        if (!from->manifest().detect) fail(EK_UNSUPPORTED, "bundle: its task is '%s', expected 'detect'", from->manifest().task.c_str());
        *detector = new ek_detector(from, *from->manifest().detect);
    });
}

void ek_detector_close(ek_detector* detector) { delete detector; }

ek_status ek_detector_limits(ek_detector* detector, float score, float overlap, uint32_t most) {
    return guarded([&] {
        ek_detector& d = given(detector, "detector");
        edgekit::BoxDecoder::Limits limits = ek_detector::defaults(*d.pipeline.bundle().manifest().detect);
        if (!(score <= 1) || !(overlap <= 1) || most > 100000)
            fail(EK_BAD_ARGUMENT, "limits: expected score and overlap up to 1 and at most 100000 boxes, got %g, %g, %u", double(score), double(overlap), most);
        if (score >= 0) limits.score = score;
        if (overlap >= 0) limits.overlap = overlap;
        if (most > 0) limits.most = int(most);
        d.limits = limits;
    });
}

ek_status ek_detector_run(ek_detector* detector, const ek_picture* picture, const ek_box** boxes, uint32_t* count) {
    return guarded([&] {
        ek_detector& d = given(detector, "detector");
        given(boxes, "boxes") = nullptr;
        given(count, "count") = 0;
        const edgekit::Placement& at = d.pipeline.run(given(picture, "picture"));
        d.decoder.run(d.limits, at, picture->width, picture->height, d.boxes);
        d.pipeline.finish();
        *boxes = d.boxes.data();
        *count = uint32_t(d.boxes.size());
    });
}

ek_status ek_detector_times(const ek_detector* detector, uint64_t nanoseconds[3]) {
    return guarded([&] { std::memcpy(&given(nanoseconds, "nanoseconds"), given(detector, "detector").pipeline.times(), 3 * sizeof(uint64_t)); });
}

ek_status ek_classifier_create(const ek_bundle* bundle, ek_classifier** classifier) {
    return guarded([&] {
        given(classifier, "classifier") = nullptr;
        const auto& from = given(bundle, "bundle").bundle;
        if (!from->manifest().classify) fail(EK_UNSUPPORTED, "bundle: its task is '%s', expected 'classify'", from->manifest().task.c_str());
        *classifier = new ek_classifier(from, *from->manifest().classify);
    });
}

void ek_classifier_close(ek_classifier* classifier) { delete classifier; }

ek_status ek_classifier_run(ek_classifier* classifier, const ek_picture* picture, const ek_class** classes, uint32_t* count) {
    return guarded([&] {
        ek_classifier& c = given(classifier, "classifier");
        given(classes, "classes") = nullptr;
        given(count, "count") = 0;
        c.pipeline.run(given(picture, "picture"));
        edgekit::classify(*c.pipeline.bundle().manifest().classify, c.values, c.scores, c.best);
        c.pipeline.finish();
        *classes = c.best.data();
        *count = uint32_t(c.best.size());
    });
}

ek_status ek_classifier_scores(const ek_classifier* classifier, const float** scores) {
    return guarded([&] { given(scores, "scores") = given(classifier, "classifier").scores.data(); });
}

ek_status ek_classifier_times(const ek_classifier* classifier, uint64_t nanoseconds[3]) {
    return guarded([&] { std::memcpy(&given(nanoseconds, "nanoseconds"), given(classifier, "classifier").pipeline.times(), 3 * sizeof(uint64_t)); });
}

}  // extern "C"
