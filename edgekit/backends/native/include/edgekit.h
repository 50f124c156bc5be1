/* edgekit for C: networks, and bundles with what belongs around them, on the CPU. Nothing else to link.
 *
 * Every function returns a status; `ek_last_error()` says more, for the calling thread. No function throws.
 * An engine is immutable and may be shared by threads; a session belongs to one thread at a time.
 */
#ifndef EDGEKIT_H
#define EDGEKIT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define EK_API
#else
#define EK_API __attribute__((visibility("default")))
#endif

#define EK_VERSION 1

typedef enum ek_status {
    EK_OK = 0,
    EK_BAD_ARGUMENT = 1,   /* a null pointer, a number out of range, a name that is not there */
    EK_BAD_FILE = 2,       /* not a payload or bundle, or one that breaks its format */
    EK_UNSUPPORTED = 3,    /* sound, but not for this version or this CPU */
    EK_NO_MEMORY = 4,
    EK_IO = 5,             /* a file could not be read */
    EK_INTERNAL = 6,
    EK_WRONG_RESULT = 7    /* ek_bundle_test: this machine computes something else than the bundle promises */
} ek_status;

typedef enum ek_dtype { EK_U8 = 0, EK_F32 = 1 } ek_dtype;

/* What went wrong last in this thread, one line; "" if nothing did. Valid until the thread's next call. */
EK_API const char* ek_last_error(void);

/* --- networks: payloads of edgekit/backends/native, docs/native.md --- */

typedef struct ek_engine ek_engine;
typedef struct ek_session ek_session;

typedef struct ek_options {
    uint32_t size;      /* sizeof(ek_options), so that later versions can add fields */
    uint32_t threads;   /* 0 = 1; at most 64. The caller is one of them */
    const char* isa;    /* NULL = the best of this CPU; "scalar", "avx2", ... */
    uint32_t keep;      /* 1 = every tensor has memory of its own, so that ek_session_tensor can read all of them */
    uint32_t spin_us;   /* how long threads look for work between two steps before they sleep; ~0u = the default */
} ek_options;

/* data: at a multiple of 64 bytes; it is checked before it is used, and not needed any more afterwards: unmap or free it. */
EK_API ek_status ek_engine_open(const void* data, size_t bytes, const ek_options* options, ek_engine** engine);
EK_API void ek_engine_close(ek_engine* engine);  /* sessions keep what they need */

typedef struct ek_port {
    const char* name;
    ek_dtype dtype;
    uint32_t output;      /* 0 input, 1 output */
    uint32_t rank, shape[8];   /* as the network's author sees it: [N, C, H, W] of pictures */
    uint32_t channels_last;    /* 1: the memory holds [N, H, W, C] of that shape */
    float scale;          /* u8: real = scale * (code - zero) */
    int32_t zero;
    int32_t next;         /* of an input that is a state: number of the port that is its next value, else -1 */
    size_t bytes;
} ek_port;

EK_API ek_status ek_engine_ports(const ek_engine* engine, uint32_t* count);
EK_API ek_status ek_engine_port(const ek_engine* engine, uint32_t number, ek_port* port);
/* As JSON: {"isa", "threads", "steps": [{"name", "type", "kernel"}], "arena_bytes", "weight_bytes"}. Valid while the engine is. */
EK_API const char* ek_engine_describe(const ek_engine* engine);

EK_API ek_status ek_session_create(const ek_engine* engine, ek_session** session);
EK_API void ek_session_close(ek_session* session);
/* A port's memory: aligned to 64 bytes, the session's own unless ek_session_bind gave another one. */
EK_API ek_status ek_session_memory(ek_session* session, uint32_t port, void** memory);
/* Work in the caller's memory instead: port.bytes of it, aligned to 64, with 64 more bytes behind that may be read. */
EK_API ek_status ek_session_bind(ek_session* session, uint32_t port, void* memory);
EK_API ek_status ek_session_run(ek_session* session);
/* After a run: states become inputs of the next one, without a copy where both lie in the session's own memory. */
EK_API ek_status ek_session_turn(ek_session* session);
/* All states to what a real 0 is. */
EK_API ek_status ek_session_reset(ek_session* session);
/* With keep: tensor `number` of the payload as it lies, for checks layer by layer. `bytes` is 0 for a range of another buffer's channels:
 * read it by offset and pitch. */
EK_API ek_status ek_session_tensor(ek_session* session, uint32_t number, const void** memory);
/* Nanoseconds of each step of the last run; `nanoseconds` has room for `count`. Measured only after ek_session_profile(session, 1). */
EK_API ek_status ek_session_profile(ek_session* session, uint32_t on);
EK_API ek_status ek_session_times(const ek_session* session, uint64_t* nanoseconds, uint32_t count);

/* --- bundles: files that `edgekit build` writes (docs/bundle.md), with a network of this engine inside; docs/c-api.md --- */

/* Immutable, and shared by the threads of a program: one per network, and a detector or classifier of it per thread. */
typedef struct ek_bundle ek_bundle;

/* Opens a bundle file and its network. Everything that is used is read into memory and checked against its digest first, so the
 * file may be replaced meanwhile. variant: the name of the payload to take; NULL = the first one for this engine. */
EK_API ek_status ek_bundle_open(const char* path, const char* variant, const ek_options* options, ek_bundle** bundle);
/* The same of a bundle in memory, which must stay until the bundle is closed. */
EK_API ek_status ek_bundle_open_bytes(const void* data, size_t bytes, const char* variant, const ek_options* options, ek_bundle** bundle);
EK_API void ek_bundle_close(ek_bundle* bundle);  /* detectors and classifiers keep what they need */

/* As JSON: {"model", "task", "target", "payload_digest", "variant", "precision", "width", "height", "classes"}; the sizes are the
 * network's input. Valid while the bundle is. */
EK_API const char* ek_bundle_describe(const ek_bundle* bundle);
/* How many classes it tells apart, and the name of one, "" if there is none. Valid while the bundle is. */
EK_API uint32_t ek_bundle_classes(const ek_bundle* bundle);
EK_API const char* ek_bundle_label(const ek_bundle* bundle, uint32_t number);
/* The network by itself, for what is not below. The bundle's own: do not close it. */
EK_API const ek_engine* ek_bundle_engine(const ek_bundle* bundle);
/* Runs the inputs that the bundle brings along and compares with the outputs that it promises, within its own tolerances:
 * EK_WRONG_RESULT where they differ. Takes an inference or two; a robot does it once, after it was switched on. */
EK_API ek_status ek_bundle_test(const ek_bundle* bundle);

typedef enum ek_format {
    EK_BGR = 0, EK_RGB = 1,     /* one plane, 3 bytes a pixel */
    EK_BGRA = 2, EK_RGBA = 3,   /* one plane, 4 bytes a pixel, the last one ignored */
    EK_GREY = 4,                /* one plane, 1 byte a pixel */
    EK_YUYV = 5, EK_UYVY = 6,   /* one plane, 2 bytes a pixel; the width is even */
    EK_NV12 = 7, EK_NV21 = 8,   /* Y, then U and V in turn (V and U), one pair for 2 x 2 pixels */
    EK_I420 = 9                 /* Y, U, V */
} ek_format;
enum { EK_BT601 = 0, EK_BT709 = 1 };
enum { EK_LIMITED = 0, EK_FULL = 1 };

/* A picture where the camera put it; nothing is copied. Begin with {0}: what is left at 0 has a usual meaning. */
typedef struct ek_picture {
    uint32_t size;             /* sizeof(ek_picture) */
    uint32_t format;           /* ek_format */
    uint32_t width, height;    /* pixels, up to 65536 */
    const uint8_t* plane[3];   /* top row of each; a second or third one that is NULL follows the one before it */
    ptrdiff_t stride[3];       /* bytes from row to row; 0 = no padding, negative = upside down */
    uint32_t matrix, range;    /* of YUV: EK_BT601 or EK_BT709, EK_LIMITED or EK_FULL */
} ek_picture;

typedef struct ek_box {
    float x1, y1, x2, y2;      /* pixels of the picture, within it */
    float score;               /* 0..1 */
    int32_t number;            /* of the class */
} ek_box;

/* Task "detect". For one thread at a time; allocates nothing once it has seen a picture of the size. */
typedef struct ek_detector ek_detector;
EK_API ek_status ek_detector_create(const ek_bundle* bundle, ek_detector** detector);
EK_API void ek_detector_close(ek_detector* detector);
/* Instead of the bundle's: least score, overlap (IoU) above which the lesser box of a class goes, most boxes. Below 0 and 0 = the bundle's. */
EK_API ek_status ek_detector_limits(ek_detector* detector, float score, float overlap, uint32_t most);
/* Boxes of a picture, best first. They are the detector's, until its next run. */
EK_API ek_status ek_detector_run(ek_detector* detector, const ek_picture* picture, const ek_box** boxes, uint32_t* count);
/* Nanoseconds of the last run: picture to input, network, outputs to boxes. */
EK_API ek_status ek_detector_times(const ek_detector* detector, uint64_t nanoseconds[3]);

typedef struct ek_class {
    float score;               /* 0..1 */
    int32_t number;
} ek_class;

/* Task "classify". As ek_detector. */
typedef struct ek_classifier ek_classifier;
EK_API ek_status ek_classifier_create(const ek_bundle* bundle, ek_classifier** classifier);
EK_API void ek_classifier_close(ek_classifier* classifier);
/* Classes of a picture, best first, as many as the bundle says. They are the classifier's, until its next run. */
EK_API ek_status ek_classifier_run(ek_classifier* classifier, const ek_picture* picture, const ek_class** classes, uint32_t* count);
/* Scores of all classes of the last run, by number: ek_bundle_classes of them. */
EK_API ek_status ek_classifier_scores(const ek_classifier* classifier, const float** scores);
EK_API ek_status ek_classifier_times(const ek_classifier* classifier, uint64_t nanoseconds[3]);

#ifdef __cplusplus
}
#endif
#endif
