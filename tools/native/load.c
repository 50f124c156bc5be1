/* How long a payload takes to load, what memory that takes, how long it runs (also in time of the CPU, for a machine with other work):
 *     cc -O2 -I edgekit/backends/native/include tools/native/load.c edgekit/libedgekit.so -o load
 *     LD_LIBRARY_PATH=edgekit ./load payload [threads [runs [isa]]]
 * Memory is that of the whole process (VmRSS) when all has run, and the peak. Prints JSON. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "edgekit.h"

static double ms(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static double now_ms(void) { return ms(CLOCK_MONOTONIC); }
static double cpu_ms(void) { return ms(CLOCK_PROCESS_CPUTIME_ID); }

static long status_kb(const char* key) {
    char line[256];
    long value = -1;
    FILE* file = fopen("/proc/self/status", "r");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, key, strlen(key))) value = atol(line + strlen(key) + 1);
    if (file) fclose(file);
    return value;
}

static int ascending(const void* a, const void* b) {
    const double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

static void check(ek_status status) {
    if (status == EK_OK) return;
    fprintf(stderr, "%s\n", ek_last_error());
    exit(1);
}

int main(int argc, char** argv) {
    if (argc < 2) return fprintf(stderr, "usage: load payload [threads [runs [isa]]]\n"), 2;
    const long before = status_kb("VmRSS:");
    const int file = open(argv[1], O_RDONLY);
    struct stat about;
    if (file < 0 || fstat(file, &about)) return perror(argv[1]), 1;
    const double start = now_ms(), cpu = cpu_ms();
    void* data = mmap(NULL, (size_t)about.st_size, PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED) return perror("mmap"), 1;
    ek_options options = {sizeof options, argc > 2 ? (uint32_t)atoi(argv[2]) : 1, argc > 4 ? argv[4] : NULL, 0, ~0u};
    ek_engine* engine;
    ek_session* session;
    check(ek_engine_open(data, (size_t)about.st_size, &options, &engine));
    const double opened = now_ms(), cpu_opened = cpu_ms();
    munmap(data, (size_t)about.st_size);
    check(ek_session_create(engine, &session));
    const double ready = now_ms();
    const long loaded = status_kb("VmRSS:");
    uint32_t ports = 0;
    size_t port_bytes = 0;
    check(ek_engine_ports(engine, &ports));
    for (uint32_t i = 0; i < ports; ++i) {
        ek_port port;
        void* memory;
        check(ek_engine_port(engine, i, &port));
        check(ek_session_memory(session, i, &memory));
        if (!port.output) memset(memory, 0, port.bytes); /* as whoever brings a picture: pages that nobody writes take no memory */
        port_bytes += port.bytes;
    }
    const int runs = argc > 3 ? atoi(argv[3]) : 20;
    double* times = malloc(sizeof(double) * (size_t)(runs > 0 ? runs : 1));
    const double cpu_runs = cpu_ms();
    for (int i = 0; i < runs; ++i) {
        const double begin = now_ms();
        check(ek_session_run(session));
        times[i] = now_ms() - begin;
    }
    const double cpu_done = cpu_ms();
    qsort(times, (size_t)runs, sizeof(double), ascending);
    char isa[32] = "", arena[32] = "0";
    const char* facts = ek_engine_describe(engine);
    sscanf(facts, "{\"isa\": \"%31[^\"]", isa);
    const char* found = strstr(facts, "\"arena_bytes\": ");
    if (found) sscanf(found + 15, "%31[0-9]", arena);
    printf("{\"isa\": \"%s\", \"payload_kb\": %ld, \"arena_kb\": %ld, \"ports_kb\": %ld, \"open_ms\": %.2f, \"open_cpu_ms\": %.2f, \"session_ms\": %.2f, "
           "\"run_ms\": %.3f, \"run_min_ms\": %.3f, \"run_cpu_ms\": %.3f, \"rss_before_kb\": %ld, \"rss_loaded_kb\": %ld, \"rss_kb\": %ld, \"peak_kb\": %ld}\n",
           isa, (long)about.st_size / 1024, atol(arena) / 1024, (long)port_bytes / 1024, opened - start, cpu_opened - cpu, ready - opened, runs ? times[runs / 2] : 0.0,
           runs ? times[0] : 0.0, (cpu_done - cpu_runs) / (runs > 0 ? runs : 1), before, loaded, status_kb("VmRSS:"), status_kb("VmHWM:"));
    ek_session_close(session);
    ek_engine_close(engine);
    return 0;
}
