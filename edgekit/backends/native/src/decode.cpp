#include "decode.h"

#include <cmath>
#include <limits>
#include <map>
#include <numeric>

#pragma GCC push_options
#pragma GCC optimize("O3")  // it carries the time, whatever the rest is compiled with
#include "../../../kernels/decode/decoder.h"
#pragma GCC pop_options
#include "status.h"

#pragma GCC optimize("Os")

namespace edgekit {
namespace {

constexpr int kMostClasses = 65536, kMostCandidates = 30000, kMostNumber = 1 << 24;

const char* const kFamilies[] = {"yolox", "yolov5", "yolov8", "nanodet", "fastestdet", "rows"};

bool distribution(HeadFamily family) { return family == HeadFamily::yolov8 || family == HeadFamily::nanodet; }
bool needs_objectness(HeadFamily family) {
    return family == HeadFamily::yolox || family == HeadFamily::yolov5 || family == HeadFamily::fastestdet;
}

HeadChannels read_channels(const Value& table) {
    table.keys({"tensor"}, {"start"});
    return {table["tensor"].text(), table.has("start") ? int(table["start"].integer(0, kMostNumber)) : 0};
}

HeadLevel read_level(const Value& table, HeadFamily family) {
    table.keys({"stride", "box", "classes"}, {"objectness", "anchors"});
    HeadLevel level;
    level.stride = int(table["stride"].integer(1, 16384));
    level.box = read_channels(table["box"]);
    level.classes = read_channels(table["classes"]);
    if (table.has("objectness")) level.objectness = read_channels(table["objectness"]);
    if (table.has("anchors"))
        for (const Value& anchor : table["anchors"].items()) {
            const std::vector<Value> sides = anchor.items();
            if (sides.size() != 2) anchor.refuse("2 values");
            level.anchors.emplace_back(sides[0].number(), sides[1].number());
        }
    if (level.anchors.size() > 64) table["anchors"].refuse("at most 64 anchors");
    if (level.objectness.tensor.empty() && needs_objectness(family)) table.refuse("an objectness channel");
    if ((family == HeadFamily::yolov5) == level.anchors.empty()) table.refuse(level.anchors.empty() ? "anchors" : "no anchors");
    return level;
}

double share(const Value& value) {
    const double x = value.number();
    if (!(x >= 0 && x <= 1)) value.refuse("a number from 0 to 1");
    return x;
}

// Column of each name; `cls*` stands for all classes, `_end` for the number of columns.
std::map<std::string, int> read_columns(const DetectSpec& spec) {
    static const char* const known[] = {"x1", "y1", "x2", "y2", "cx", "cy", "w", "h", "obj", "score", "class", "cls*"};
    std::map<std::string, int> index;
    int at = 0;
    for (const std::string& name : spec.columns) {
        if (std::find(std::begin(known), std::end(known), name) == std::end(known))
            fail(EK_BAD_FILE, "column '%s': unknown", printable(name).c_str());
        if (!index.emplace(name, at).second) fail(EK_BAD_FILE, "column '%s': named twice", name.c_str());
        at += name == "cls*" ? spec.classes : 1;
    }
    const auto all = [&](std::initializer_list<const char*> names) {
        return std::all_of(names.begin(), names.end(), [&](const char* n) { return index.count(n) != 0; });
    };
    const bool corners = all({"x1", "y1", "x2", "y2"}), centre = all({"cx", "cy", "w", "h"});
    const bool scored = index.count("score") != index.count("cls*");
    const bool labelled = !index.count("score") || index.count("class") || spec.classes == 1;
    if (corners == centre || !scored || !labelled)
        fail(EK_BAD_FILE, "columns: incomplete, expected x1,y1,x2,y2 or cx,cy,w,h, then score,class or cls* (with obj or without)");
    index["_end"] = at;
    return index;
}

// An output as the decoder sees it, [1, C, H, W] with strides.
struct Seen {
    int number = 0;  // of the view
    View view{};
};

const OutputPort& find(const std::vector<OutputPort>& outputs, const std::string& name) {
    for (const OutputPort& o : outputs)
        if (o.port.name == name) {
            if (o.port.dtype != EK_F32) fail(EK_BAD_FILE, "output '%s': wrong dtype, expected float32", printable(name).c_str());
            return o;
        }
    fail(EK_BAD_FILE, "output '%s': missing", printable(name).c_str());
}

View grid_view(const OutputPort& output) {
    const ek_port& p = output.port;
    if (p.rank != 4 || p.shape[0] != 1) fail(EK_BAD_FILE, "output '%s': wrong shape, expected [1, C, H, W]", p.name);
    const ptrdiff_t c = p.shape[1], h = p.shape[2], w = p.shape[3];
    const char* base = static_cast<const char*>(output.memory);
    if (p.channels_last) return {base, 4, 4 * w * c, 4 * c, int(c), int(h), int(w)};
    return {base, 4 * h * w, 4 * w, 4, int(c), int(h), int(w)};
}

// [1, N, D], or [1, D, N] where transposed, as one row of a grid.
View rows_view(const OutputPort& output, bool transposed) {
    const ek_port& p = output.port;
    if (p.rank != 3 || p.shape[0] != 1) fail(EK_BAD_FILE, "output '%s': wrong shape, expected three axes", p.name);
    const bool turned = p.channels_last != 0;  // memory [1, last, middle]
    const ptrdiff_t middle = p.shape[1], last = p.shape[2];
    const ptrdiff_t step_middle = turned ? 4 : 4 * last, step_last = turned ? 4 * middle : 4;
    const char* base = static_cast<const char*>(output.memory);
    if (transposed) return {base, step_middle, step_last * last, step_last, int(middle), 1, int(last)};
    return {base, step_last, step_middle * middle, step_middle, int(last), 1, int(middle)};
}

}  // namespace

DetectSpec DetectSpec::read(const Value& pipeline) {
    pipeline.keys({"preprocess", "head", "labels"}, {"score_threshold", "iou_threshold", "max_detections"});
    DetectSpec spec;
    spec.rule = ImageRule::read(pipeline["preprocess"]);
    const Value head = pipeline["head"];
    head.keys({"family", "num_classes"}, {"levels", "bins", "cell_offset", "rows", "columns", "transposed", "normalized"});
    spec.family = HeadFamily(head["family"].choice({kFamilies[0], kFamilies[1], kFamilies[2], kFamilies[3], kFamilies[4], kFamilies[5]}));
    spec.classes = int(head["num_classes"].integer(1, kMostClasses));
    if (head.has("bins")) spec.bins = int(head["bins"].integer(0, 4096));
    if (head.has("cell_offset")) spec.cell_offset = head["cell_offset"].number();
    if (head.has("rows")) spec.rows = head["rows"].text();
    if (head.has("columns")) spec.columns = head["columns"].texts();
    if (head.has("transposed")) spec.transposed = head["transposed"].truth();
    if (head.has("normalized")) spec.normalized = head["normalized"].truth();
    if (spec.family == HeadFamily::rows) {
        if (spec.rows.empty() || spec.columns.empty()) head.refuse("an output and its columns");
        read_columns(spec);
    }
    if (head.has("levels"))
        for (const Value& level : head["levels"].items()) spec.levels.push_back(read_level(level, spec.family));
    if (spec.family != HeadFamily::rows && (spec.levels.empty() || spec.levels.size() > 64)) head.refuse("1 to 64 levels");
    if (distribution(spec.family) && spec.bins < 2) head.refuse("at least 2 bins");
    spec.labels = pipeline["labels"].texts();
    if (spec.labels.size() != size_t(spec.classes)) pipeline["labels"].refuse(("a label for each of " + std::to_string(spec.classes) + " classes").c_str());
    if (pipeline.has("score_threshold")) spec.score_threshold = share(pipeline["score_threshold"]);
    if (pipeline.has("iou_threshold")) spec.iou_threshold = share(pipeline["iou_threshold"]);
    if (pipeline.has("max_detections")) spec.max_detections = int(pipeline["max_detections"].integer(1, 100000));
    return spec;
}

ClassifySpec ClassifySpec::read(const Value& pipeline) {
    pipeline.keys({"preprocess", "output", "labels"}, {"activation", "top_k", "score_threshold"});
    ClassifySpec spec;
    spec.rule = ImageRule::read(pipeline["preprocess"]);
    spec.output = pipeline["output"].text();
    spec.labels = pipeline["labels"].texts();
    if (spec.labels.empty()) pipeline["labels"].refuse("at least one label");
    if (pipeline.has("activation")) spec.softmax = pipeline["activation"].choice({"none", "softmax"}) == 1;
    if (pipeline.has("top_k")) spec.top_k = int(pipeline["top_k"].integer(1, 1000));
    if (pipeline.has("score_threshold")) spec.score_threshold = share(pipeline["score_threshold"]);
    return spec;
}

struct BoxDecoder::Work {
    std::vector<Seen> seen;
    std::vector<const OutputPort*> ports;
    Decoder decoder;

    Work(const DetectSpec& spec, const std::vector<OutputPort>& outputs) : decoder(grids(spec, outputs), detect_isa()) {
        std::vector<View> views;
        for (const Seen& s : seen) views.push_back(s.view);
        decoder.bind(std::move(views));
    }

    const Seen& see(const std::vector<OutputPort>& outputs, const std::string& name, const DetectSpec& spec) {
        const OutputPort& output = find(outputs, name);
        for (size_t i = 0; i < ports.size(); i++)
            if (ports[i] == &output) return seen[i];
        ports.push_back(&output);
        seen.push_back({int(seen.size()), spec.family == HeadFamily::rows ? rows_view(output, spec.transposed) : grid_view(output)});
        return seen.back();
    }

    std::vector<Grid> grids(const DetectSpec& spec, const std::vector<OutputPort>& outputs) {
        std::vector<Grid> all;
        if (spec.family == HeadFamily::rows) {
            const auto index = read_columns(spec);
            const Seen& rows = see(outputs, spec.rows, spec);
            if (rows.view.channels != index.at("_end"))
                fail(EK_BAD_FILE, "output '%s': wrong shape, expected %d columns, got %d", printable(spec.rows).c_str(), index.at("_end"), rows.view.channels);
            const auto at = [&](const char* name, int missing) { return index.count(name) ? index.at(name) : missing; };
            Grid g{};
            g.family = Family::rows;
            g.height = 1, g.width = rows.view.width, g.stride = 1;
            g.num_classes = spec.classes;
            g.corners = index.count("x1") != 0;
            const char* const names[2][4] = {{"cx", "cy", "w", "h"}, {"x1", "y1", "x2", "y2"}};
            for (int k = 0; k < 4; k++) g.box[k] = index.at(names[g.corners][k]);
            g.class_start = at("cls*", 0);
            g.object_tensor = index.count("obj") ? 0 : -1, g.object_start = at("obj", 0);
            g.score = at("score", -1), g.label = at("class", -1);
            g.scale[0] = spec.normalized ? spec.rule.width : 1, g.scale[1] = spec.normalized ? spec.rule.height : 1;
            all.push_back(g);
            return all;
        }
        for (const HeadLevel& level : spec.levels) add_level(spec, level, outputs, all);
        return all;
    }

    void add_level(const DetectSpec& spec, const HeadLevel& level, const std::vector<OutputPort>& outputs, std::vector<Grid>& all) {
        const int width = (spec.rule.width + level.stride - 1) / level.stride, height = (spec.rule.height + level.stride - 1) / level.stride;
        const int anchors = std::max<int>(1, int(level.anchors.size())), step = 5 + spec.classes;
        const bool bins = distribution(spec.family);
        const auto use = [&](const HeadChannels& c, int64_t count) {
            const Seen s = see(outputs, c.tensor, spec);
            const int64_t least = c.start + count + int64_t(anchors - 1) * step;
            if (s.view.channels < least || s.view.height != height || s.view.width != width)
                fail(EK_BAD_FILE, "output '%s': wrong shape, expected [1, %lld or more, %d, %d] for stride %d", printable(c.tensor).c_str(),
                     static_cast<long long>(least), height, width, level.stride);
            return s.number;
        };
        const int box = use(level.box, bins ? 4 * int64_t(spec.bins) : 4), classes = use(level.classes, spec.classes);
        const bool object = !level.objectness.tensor.empty();
        const int objectness = object ? use(level.objectness, 1) : -1;
        for (int a = 0; a < anchors; a++) {
            Grid g{};
            g.family = bins ? Family::distribution
                       : spec.family == HeadFamily::yolox ? Family::yolox
                       : spec.family == HeadFamily::yolov5 ? Family::yolov5
                                                           : Family::fastestdet;
            g.height = height, g.width = width, g.stride = level.stride;
            g.bins = bins ? spec.bins : 0, g.offset = spec.cell_offset, g.num_classes = spec.classes;
            if (!level.anchors.empty()) g.anchor[0] = level.anchors[a].first, g.anchor[1] = level.anchors[a].second;
            for (int k = 0; k < 4; k++) g.box[k] = level.box.start + a * step + k * (bins ? spec.bins : 1);
            g.box_tensor = box;
            g.class_tensor = classes, g.class_start = level.classes.start + a * step;
            g.object_tensor = objectness, g.object_start = object ? level.objectness.start + a * step : 0;
            g.score = -1, g.label = -1;
            g.scale[0] = spec.rule.width, g.scale[1] = spec.rule.height;
            all.push_back(g);
        }
    }
};

BoxDecoder::BoxDecoder(const DetectSpec& spec, const std::vector<OutputPort>& outputs)
    : family_(spec.family), work_(std::make_unique<Work>(spec, outputs)) {}
BoxDecoder::~BoxDecoder() = default;

void BoxDecoder::run(const Limits& limits, const Placement& at, uint32_t width, uint32_t height, std::vector<ek_box>& boxes) {
    // least raw values with which a cell may reach the threshold, a little below the exact ones (reference.py: screen)
    const double threshold = limits.score, none = -std::numeric_limits<double>::infinity();
    const auto logit = [&](double p) {
        p = std::min(p, 0.999);
        return p > 0 ? std::log(p / (1.0 - p)) - 1e-3 : none;
    };
    double object = none, classes = none;
    if (threshold > 0) {
        if (family_ == HeadFamily::rows) object = classes = threshold * (1 - 1e-6);
        else if (family_ == HeadFamily::fastestdet) object = logit(std::pow(threshold, 1 / 0.6));
        else object = classes = logit(threshold);
    }
    Decoder& decoder = work_->decoder;
    decoder.decode({limits.score, float(object), float(classes), false});
    const int n = decoder.suppress(limits.overlap, limits.most, kMostCandidates);
    check(n >= 0, "decode class");
    const float left = float(at.left), top = float(at.top), sx = float(at.scale_x), sy = float(at.scale_y), w = float(width), h = float(height);
    const ToPicture to{{left, top, left, top}, {sx, sy, sx, sy}, {w, h, w, h}, true};
    boxes.resize(size_t(n));
    for (int i = 0; i < n; i++) {
        const int kept = decoder.kept()[i];
        float b[4];
        decoder.place(kept, to, b);
        boxes[size_t(i)] = {b[0], b[1], b[2], b[3], decoder.scores()[kept], decoder.classes()[kept]};
    }
}

void classify(const ClassifySpec& spec, const float* values, std::vector<float>& scores, std::vector<ek_class>& best) {
    const size_t count = spec.labels.size();
    scores.assign(values, values + count);
    if (spec.softmax) {
        const float top = *std::max_element(scores.begin(), scores.end());
        double sum = 0;
        for (float& s : scores) s = std::exp(s - top), sum += double(s);
        for (float& s : scores) s = float(double(s) / sum);
    }
    best.clear();
    for (size_t i = 0; i < count; i++) best.push_back({scores[i], int32_t(i)});
    // NaN last, of equal scores the lower number first
    const auto before = [](const ek_class& a, const ek_class& b) {
        const bool x = a.score == a.score, y = b.score == b.score;
        if (x != y) return x;
        if (x && a.score != b.score) return a.score > b.score;
        return a.number < b.number;
    };
    const size_t most = std::min(count, size_t(spec.top_k));
    std::partial_sort(best.begin(), best.begin() + ptrdiff_t(most), best.end(), before);
    size_t kept = 0;
    while (kept < most && (spec.score_threshold <= 0 || best[kept].score >= float(spec.score_threshold))) kept++;
    best.resize(kept);
}

}  // namespace edgekit
