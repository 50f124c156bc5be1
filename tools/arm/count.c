// Instruction counter for qemu-user 7.2: a plugin that counts what an ARM program executes, by class.
//
//   qemu-aarch64 -plugin libcount.so,out=FILE program
//
// The program writes a line of counts so far by the system call lseek(-77, TAG, 0), which fails and is
// otherwise harmless; one more line is written at exit. Each line is a JSON object. Counts are exact per
// thread and summed over threads; run libraries with one thread, for idle threads spin.
//
// qemu's headers are not needed: the few declarations used are written out below (plugin API 1).
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum cb_flags { CB_NO_REGS };
typedef void (*tb_callback)(plugin_id, struct qemu_plugin_tb *);
typedef void (*vcpu_callback)(unsigned vcpu, void *data);
typedef void (*exit_callback)(plugin_id, void *data);
typedef void (*syscall_callback)(plugin_id, unsigned vcpu, int64_t number, uint64_t, uint64_t, uint64_t,
                                 uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, tb_callback);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, vcpu_callback, enum cb_flags, void *);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id, syscall_callback);
void qemu_plugin_register_atexit_cb(plugin_id, exit_callback, void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

enum { ALL, SIMD, LOAD_STORE, DOT, MMLA, SVE, CLASSES };
static const char *const class_name[CLASSES] = {"all", "simd", "load_store", "dot", "mmla", "sve"};

enum { LSEEK = 62, MARK = -77, THREADS = 256 };
static struct { uint64_t count[CLASSES]; char own_cache_line[64]; } thread[THREADS];
static FILE *out;

// Classes of one instruction word, as bits. Fields from the A64 encoding index of the Arm ARM (DDI 0487).
static unsigned classes_of(uint32_t w)
{
    unsigned found = 1u << ALL;
    unsigned group = w >> 25 & 15;
    if ((group & 7) == 7) found |= 1u << SIMD;        // x111: scalar FP and Advanced SIMD
    if ((group & 5) == 4) found |= 1u << LOAD_STORE;  // x1x0
    if (group == 2) found |= 1u << SVE;               // 0010
    if ((w & 0x9fe0fc00) == 0x0e809400                // SDOT, UDOT (vector)
        || (w & 0x9fc0f400) == 0x0f80e000             // SDOT, UDOT (by element)
        || (w & 0xbfe0fc00) == 0x0e809c00             // USDOT (vector)
        || (w & 0xbf40f400) == 0x0f00f000)            // USDOT, SUDOT (by element)
        found |= 1u << DOT;
    if ((w & 0xdfe0f400) == 0x4e80a400) found |= 1u << MMLA;  // SMMLA, UMMLA, USMMLA
    return found;
}

static void report(const char *what, uint64_t tag)
{
    fprintf(out, "{\"what\": \"%s\", \"tag\": %" PRIu64, what, tag);
    for (int c = 0; c < CLASSES; c++) {
        uint64_t sum = 0;
        for (int t = 0; t < THREADS; t++) sum += thread[t].count[c];
        fprintf(out, ", \"%s\": %" PRIu64, class_name[c], sum);
    }
    fputs("}\n", out);
    fflush(out);
}

static void on_execute(unsigned vcpu, void *data)
{
    const uint32_t *block = data;
    uint64_t *count = thread[vcpu % THREADS].count;
    for (int c = 0; c < CLASSES; c++) count[c] += block[c];
}

static void on_translate(plugin_id id, struct qemu_plugin_tb *tb)
{
    (void)id;
    uint32_t *block = calloc(CLASSES, sizeof *block);  // lives as long as the translated block: for ever
    if (!block) abort();
    size_t n = qemu_plugin_tb_n_insns(tb);
    for (size_t i = 0; i < n; i++) {
        uint32_t word;
        memcpy(&word, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), sizeof word);
        unsigned found = classes_of(word);
        for (int c = 0; c < CLASSES; c++) block[c] += found >> c & 1;
    }
    qemu_plugin_register_vcpu_tb_exec_cb(tb, on_execute, CB_NO_REGS, block);
}

static void on_syscall(plugin_id id, unsigned vcpu, int64_t number, uint64_t a1, uint64_t a2, uint64_t a3,
                       uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8)
{
    (void)id, (void)vcpu, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
    if (number == LSEEK && (int32_t)a1 == MARK) report("mark", a2);
}

static void on_exit_(plugin_id id, void *data)
{
    (void)id, (void)data;
    report("exit", 0);
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info, int argc,
                                                               char **argv)
{
    (void)info;
    out = stderr;
    for (int i = 0; i < argc; i++)
        if (!strncmp(argv[i], "out=", 4) && !(out = fopen(argv[i] + 4, "w"))) {
            perror(argv[i] + 4);
            return 1;
        }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translate);
    qemu_plugin_register_vcpu_syscall_cb(id, on_syscall);
    qemu_plugin_register_atexit_cb(id, on_exit_, NULL);
    return 0;
}
