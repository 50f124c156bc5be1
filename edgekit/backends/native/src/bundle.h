// A bundle with a network of this engine: container, manifest and payload, checked before they are used (docs/bundle.md).
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "../include/edgekit.h"
#include "archive.h"
#include "decode.h"

namespace edgekit {

// What is used of a manifest that keeps all its rules. manifest.cpp.
struct Manifest {
    struct Tensor {
        std::string name, dtype;
        std::vector<uint32_t> shape;
        uint64_t bytes = 0;
    };
    struct File {
        std::string name, sha256;
        uint64_t bytes = 0;
    };
    struct Golden {
        std::string tensor, path;
        double atol = 0, rtol = 0, allow = 0;
    };
    struct Codes {  // uint8, of a tensor that is real in the plan
        std::string tensor;
        float scale;
        int zero;
    };
    struct Variant {
        std::string name, backend, precision, path;
        bool packed = false;
        std::vector<Codes> codes;
    };

    std::string model, task, target, payload_digest;
    std::vector<std::string> inputs, outputs;
    std::vector<Tensor> tensors;
    std::vector<File> files;
    std::vector<Golden> golden_inputs, golden_outputs;
    std::vector<Variant> variants;
    bool states = false;
    std::optional<DetectSpec> detect;      // by the task
    std::optional<ClassifySpec> classify;

    // Checks it against its checksums and the container. Throws Error; EK_UNSUPPORTED for plans of several steps.
    static Manifest read(const Archive& archive);

    const Tensor& tensor(const std::string& name) const;
    const File* file(const std::string& name) const;  // or null
    const std::vector<std::string>& labels() const;
};

class Bundle {
  public:
    Bundle(std::unique_ptr<Source> source, const char* variant, const ek_options* options);
    ~Bundle();
    Bundle(const Bundle&) = delete;
    Bundle& operator=(const Bundle&) = delete;

    const Manifest& manifest() const { return manifest_; }
    const ek_engine* engine() const { return engine_; }
    const char* describe() const { return facts_.c_str(); }

    // The port of a plan's tensor, and its number. Throws Error where it is none or another one.
    uint32_t port(const std::string& tensor, bool output, ek_port* port) const;

    void test() const;

  private:
    Bytes file(const std::string& name) const;  // checked against its digest
    void tell(const Manifest::Variant& variant);

    Archive archive_;
    Manifest manifest_;
    ek_engine* engine_ = nullptr;
    std::string facts_;
};

// One session of a bundle and what is around it.
class Pipeline {
  public:
    Pipeline(std::shared_ptr<const Bundle> bundle, const ImageRule& rule);
    ~Pipeline();
    Pipeline(const Pipeline&) = delete;
    Pipeline& operator=(const Pipeline&) = delete;

    const Bundle& bundle() const { return *bundle_; }
    std::vector<OutputPort> outputs() const;  // those of the plan
    // Picture to outputs; where it lies in the input. finish() is called at the end of a run, for the clock.
    const Placement& run(const ek_picture& picture);
    void finish();
    const uint64_t* times() const { return times_; }

  private:
    std::shared_ptr<const Bundle> bundle_;
    ek_session* session_ = nullptr;
    std::unique_ptr<PictureInput> input_;
    uint64_t times_[3] = {}, ran_ = 0;
};

}  // namespace edgekit
