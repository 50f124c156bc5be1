/* detect: boxes of pictures, by a bundle and libedgekit alone.
 *
 *   detect BUNDLE picture.ppm ...            PPM (P6) or PGM (P5) files
 *   detect BUNDLE nv12:1280x720:frame.raw    raw frames; bgr, rgb, bgra, rgba, grey, yuyv, uyvy, nv12, nv21, i420
 *   detect BUNDLE /dev/video0 [FRAMES]       a camera, YUYV or NV12 as it gives it, straight from the driver's buffers
 *
 * Options before BUNDLE: -t THREADS, -s SCORE (least), -r RUNS (of each picture, for times), -q (no self-test).
 * Prints one line per box: source x1 y1 x2 y2 score class; times go to stderr. Exit code: 0, or 1 with a line that says why.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <linux/videodev2.h>

#include "edgekit.h"

static const char* const names[] = {"bgr", "rgb", "bgra", "rgba", "grey", "yuyv", "uyvy", "nv12", "nv21", "i420"};

static int complain(const char* what, const char* why)
{
    fprintf(stderr, "detect: %s: %s\n", what, why);
    return 1;
}

static int print_boxes(const ek_bundle* bundle, ek_detector* detector, const ek_picture* picture, const char* source)
{
    const ek_box* box;
    uint32_t count;
    if (ek_detector_run(detector, picture, &box, &count)) return complain(source, ek_last_error());
    for (uint32_t i = 0; i < count; i++)
        printf("%s %.2f %.2f %.2f %.2f %.4f %s\n", source, box[i].x1, box[i].y1, box[i].x2, box[i].y2, box[i].score,
               ek_bundle_label(bundle, (uint32_t)box[i].number));
    return 0;
}

static void print_times(const ek_detector* detector, const char* source)
{
    uint64_t ns[3];
    if (!ek_detector_times(detector, ns))
        fprintf(stderr, "%s: %.3f ms picture, %.3f ms network, %.3f ms boxes\n", source, ns[0] / 1e6, ns[1] / 1e6, ns[2] / 1e6);
}

/* --- files --- */

static uint8_t* read_file(const char* path, size_t* bytes)
{
    FILE* file = fopen(path, "rb");
    uint8_t* data = NULL;
    struct stat info;
    if (file && !fstat(fileno(file), &info) && S_ISREG(info.st_mode)) {
        data = malloc((size_t)info.st_size + 1);
        if (data && fread(data, 1, (size_t)info.st_size, file) != (size_t)info.st_size) free(data), data = NULL;
        *bytes = (size_t)info.st_size;
        if (data) data[*bytes] = 0; /* so that numbers of a header end */
    }
    if (file) fclose(file);
    return data;
}

/* A number of a PNM header, after white space and comments; 0 where there is none. */
static unsigned header_number(const char** at)
{
    while (**at == ' ' || (**at >= '\t' && **at <= '\r') || **at == '#')
        if (**at == '#') *at += strcspn(*at, "\n");
        else ++*at;
    return (unsigned)strtoul(*at, (char**)at, 10);
}

/* Looks at a PPM or PGM file. 0 = it is one. */
static int parse_pnm(const uint8_t* data, size_t bytes, ek_picture* picture)
{
    const char* at = (const char*)data + 2;
    if (bytes < 8 || data[0] != 'P' || (data[1] != '5' && data[1] != '6')) return 1;
    picture->format = data[1] == '6' ? EK_RGB : EK_GREY;
    picture->width = header_number(&at), picture->height = header_number(&at);
    if (header_number(&at) != 255 || picture->width > 65536 || picture->height > 65536) return 1;
    picture->plane[0] = (const uint8_t*)at + 1;
    return bytes < (size_t)(picture->plane[0] - data) + (size_t)picture->width * picture->height * (data[1] == '6' ? 3 : 1);
}

static size_t raw_bytes(const ek_picture* p)
{
    size_t pixels = (size_t)p->width * p->height, quarter = (size_t)((p->width + 1) / 2) * ((p->height + 1) / 2);
    static const size_t each[] = {3, 3, 4, 4, 1, 2, 2, 1, 1, 1};
    return pixels * each[p->format] + (p->format >= EK_NV12 ? 2 * quarter : 0);
}

static int detect_file(const ek_bundle* bundle, ek_detector* detector, const char* source, int runs)
{
    ek_picture picture = {0};
    const char* path = source;
    char format[8];
    int taken = 0, failed;
    size_t bytes = 0;
    picture.size = sizeof picture;
    picture.format = ~0u;
    if (sscanf(source, "%7[a-z0-9]:%ux%u:%n", format, &picture.width, &picture.height, &taken) == 3 && taken > 0) {
        for (uint32_t i = 0; i < sizeof names / sizeof *names; i++)
            if (!strcmp(names[i], format)) picture.format = i;
        if (picture.format == ~0u || picture.width > 65536 || picture.height > 65536) return complain(source, "unknown format or size");
        path = source + taken;
    }
    uint8_t* data = read_file(path, &bytes);
    if (!data) return complain(path, errno ? strerror(errno) : "cannot be read");
    if (path != source) {
        picture.plane[0] = data;
        failed = bytes < raw_bytes(&picture);
    } else {
        failed = parse_pnm(data, bytes, &picture);
    }
    if (failed) failed = complain(path, path == source ? "no PPM file with 8 bits, or too short" : "too short for its size");
    else failed = print_boxes(bundle, detector, &picture, path);
    const ek_box* box;
    uint32_t count;
    for (int i = 1; i < runs && !failed; i++) failed = ek_detector_run(detector, &picture, &box, &count) != EK_OK;
    if (!failed) print_times(detector, path);
    free(data);
    return failed;
}

/* --- cameras --- */

enum { BUFFERS = 4 };

static int detect_camera(const ek_bundle* bundle, ek_detector* detector, const char* device, long frames)
{
    struct v4l2_format format = {.type = V4L2_BUF_TYPE_VIDEO_CAPTURE};
    struct v4l2_requestbuffers request = {.count = BUFFERS, .type = V4L2_BUF_TYPE_VIDEO_CAPTURE, .memory = V4L2_MEMORY_MMAP};
    struct { void* start; size_t bytes; } mapped[BUFFERS] = {{0}};
    const int fd = open(device, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    int failed = 1;
    if (fd < 0) return complain(device, strerror(errno));
    if (ioctl(fd, VIDIOC_G_FMT, &format)) goto trouble;
    if (format.fmt.pix.pixelformat != V4L2_PIX_FMT_YUYV && format.fmt.pix.pixelformat != V4L2_PIX_FMT_NV12) {
        format.fmt.pix.pixelformat = V4L2_PIX_FMT_YUYV;
        if (ioctl(fd, VIDIOC_S_FMT, &format)) goto trouble;
    }
    const struct v4l2_pix_format* pix = &format.fmt.pix;
    ek_picture picture = {.size = sizeof picture, .width = pix->width, .height = pix->height};
    if (pix->pixelformat == V4L2_PIX_FMT_YUYV) picture.format = EK_YUYV;
    else if (pix->pixelformat == V4L2_PIX_FMT_NV12) picture.format = EK_NV12;
    else { complain(device, "gives neither YUYV nor NV12"); goto end; }
    picture.stride[0] = picture.stride[1] = (ptrdiff_t)pix->bytesperline;
    picture.range = pix->quantization == V4L2_QUANTIZATION_FULL_RANGE ? EK_FULL : EK_LIMITED;
    picture.matrix = pix->ycbcr_enc == V4L2_YCBCR_ENC_709 ? EK_BT709 : EK_BT601;
    if (ioctl(fd, VIDIOC_REQBUFS, &request)) goto trouble;
    for (uint32_t i = 0; i < request.count && i < BUFFERS; i++) {
        struct v4l2_buffer buffer = {.index = i, .type = request.type, .memory = request.memory};
        if (ioctl(fd, VIDIOC_QUERYBUF, &buffer)) goto trouble;
        void* start = mmap(NULL, buffer.length, PROT_READ, MAP_SHARED, fd, buffer.m.offset);
        if (start == MAP_FAILED) goto trouble;
        mapped[i].start = start, mapped[i].bytes = buffer.length;
        if (ioctl(fd, VIDIOC_QBUF, &buffer)) goto trouble;
    }
    if (ioctl(fd, VIDIOC_STREAMON, &request.type)) goto trouble;
    for (failed = 0; !failed && frames != 0; frames -= frames > 0) {
        struct pollfd waiting = {.fd = fd, .events = POLLIN};
        struct v4l2_buffer buffer = {.type = request.type, .memory = request.memory};
        if (poll(&waiting, 1, 5000) == 0) { errno = ETIMEDOUT; goto trouble; }
        if (ioctl(fd, VIDIOC_DQBUF, &buffer)) {
            if (errno == EAGAIN || errno == EINTR) continue;
            goto trouble;
        }
        picture.plane[0] = mapped[buffer.index].start;
        if (buffer.bytesused < mapped[buffer.index].bytes / 2) frames += frames > 0; /* a frame that did not arrive whole */
        else failed = print_boxes(bundle, detector, &picture, device);
        fflush(stdout);
        if (ioctl(fd, VIDIOC_QBUF, &buffer)) goto trouble;
    }
    if (!failed) print_times(detector, device);
    goto end;
trouble:
    failed = complain(device, strerror(errno));
end:
    for (int i = 0; i < BUFFERS; i++)
        if (mapped[i].start) munmap(mapped[i].start, mapped[i].bytes);
    close(fd);
    return failed;
}

int main(int argc, char** argv)
{
    ek_options options = {.size = sizeof options, .threads = 1, .spin_us = ~0u};
    ek_bundle* bundle = NULL;
    ek_detector* detector = NULL;
    float score = -1;
    int runs = 1, test = 1, failed = 1, option;
    while ((option = getopt(argc, argv, "t:s:r:q")) != -1) {
        if (option == 't') options.threads = (uint32_t)strtoul(optarg, NULL, 10);
        else if (option == 's') score = strtof(optarg, NULL);
        else if (option == 'r') runs = atoi(optarg);
        else if (option == 'q') test = 0;
        else return 1;
    }
    if (argc - optind < 2) return complain("usage", "detect [-t THREADS] [-s SCORE] [-r RUNS] [-q] BUNDLE PICTURE.ppm|FORMAT:WxH:FILE|/dev/videoN ...");
    if (ek_bundle_open(argv[optind], NULL, &options, &bundle) || (test && ek_bundle_test(bundle)) ||
        ek_detector_create(bundle, &detector) || ek_detector_limits(detector, score, -1, 0)) {
        complain("bundle", ek_last_error());
    } else {
        fprintf(stderr, "%s\n", ek_bundle_describe(bundle));
        const char* first = argv[optind + 1];
        failed = 0;
        if (!strncmp(first, "/dev/video", 10)) failed = detect_camera(bundle, detector, first, argc - optind > 2 ? atol(argv[optind + 2]) : -1);
        else
            for (int i = optind + 1; i < argc && !failed; i++) failed = detect_file(bundle, detector, argv[i], runs);
    }
    ek_detector_close(detector);
    ek_bundle_close(bundle);
    return failed;
}
