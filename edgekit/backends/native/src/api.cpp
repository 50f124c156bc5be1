// edgekit.h, as far as networks go: arguments checked, failures as a status.
#pragma GCC optimize("Os")  // nothing here is on the way of a run

#include <cstdlib>
#include <cstring>
#include <exception>

#include "engine.h"

// The C++ library's own handler would bring what prints names of types, 47 KB. Nothing is thrown out of this library.
namespace __cxxabiv1 {
extern std::terminate_handler __terminate_handler;
std::terminate_handler __terminate_handler = std::abort;
}  // namespace __cxxabiv1

using edgekit::fail;
using edgekit::guarded;
using edgekit::PortPlan;

namespace {

template <typename T> T& given(T* pointer, const char* what) {
    if (!pointer) fail(EK_BAD_ARGUMENT, "%s: is null", what);
    return *pointer;
}

size_t port_of(const edgekit::Engine& engine, uint32_t number) {
    if (number >= engine.ports().size())
        fail(EK_BAD_ARGUMENT, "port %u: there are %zu", number, engine.ports().size());
    return number;
}

}  // namespace

extern "C" {

ek_status ek_engine_open(const void* data, size_t bytes, const ek_options* options, ek_engine** engine) {
    return guarded([&] {
        given(engine, "engine") = nullptr;
        given(static_cast<const uint8_t*>(data), "data");
        ek_options all = {};
        all.spin_us = ~0u;
        if (options) {
            if (options->size < sizeof(uint32_t) || options->size > 4096) fail(EK_BAD_ARGUMENT, "options: size %u", options->size);
            std::memcpy(&all, options, options->size < sizeof(all) ? options->size : sizeof(all));
        }
        *engine = new ek_engine{std::make_shared<const edgekit::Engine>(data, bytes, all)};
    });
}

void ek_engine_close(ek_engine* engine) { delete engine; }

ek_status ek_engine_ports(const ek_engine* engine, uint32_t* count) {
    return guarded([&] { given(count, "count") = static_cast<uint32_t>(given(engine, "engine").engine->ports().size()); });
}

ek_status ek_engine_port(const ek_engine* engine, uint32_t number, ek_port* port) {
    return guarded([&] {
        const edgekit::Engine& all = *given(engine, "engine").engine;
        const PortPlan& p = all.ports()[port_of(all, number)];
        ek_port& to = given(port, "port");
        to = ek_port();
        to.name = p.port.name;
        to.dtype = p.view.dtype == edgekit::Dtype::kU8 ? EK_U8 : EK_F32;
        to.output = p.port.output;
        to.rank = p.port.rank;
        std::memcpy(to.shape, p.port.shape, sizeof(to.shape));
        to.channels_last = p.port.channels_last;
        to.scale = p.view.scale;
        to.zero = p.view.zero;
        to.next = p.next;
        to.bytes = p.bytes;
    });
}

const char* ek_engine_describe(const ek_engine* engine) { return engine ? engine->engine->describe() : "{}"; }

ek_status ek_session_create(const ek_engine* engine, ek_session** session) {
    return guarded([&] {
        given(session, "session") = nullptr;
        *session = new ek_session{edgekit::Session(given(engine, "engine").engine)};
    });
}

void ek_session_close(ek_session* session) { delete session; }

ek_status ek_session_memory(ek_session* session, uint32_t port, void** memory) {
    return guarded([&] {
        const edgekit::Session& s = given(session, "session").session;
        given(memory, "memory") = s.memory(port_of(s.engine(), port));
    });
}

ek_status ek_session_bind(ek_session* session, uint32_t port, void* memory) {
    return guarded([&] {
        edgekit::Session& s = given(session, "session").session;
        given(static_cast<uint8_t*>(memory), "memory");
        s.bind(port_of(s.engine(), port), memory);
    });
}

ek_status ek_session_run(ek_session* session) {
    if (!session) return guarded([&] { given(session, "session"); });
    session->session.run();  // throws nothing, allocates nothing
    return EK_OK;
}

ek_status ek_session_turn(ek_session* session) {
    return guarded([&] { given(session, "session").session.turn(); });
}

ek_status ek_session_reset(ek_session* session) {
    return guarded([&] { given(session, "session").session.reset(); });
}

ek_status ek_session_tensor(ek_session* session, uint32_t number, const void** memory) {
    return guarded([&] {
        const edgekit::Session& s = given(session, "session").session;
        if (!s.engine().keeps()) fail(EK_BAD_ARGUMENT, "engine: opened without keep");
        if (number >= s.engine().network().tensors.size()) fail(EK_BAD_ARGUMENT, "tensor %u: is not there", number);
        given(memory, "memory") = s.tensor(number);
    });
}

ek_status ek_session_profile(ek_session* session, uint32_t on) {
    return guarded([&] { given(session, "session").session.profile(on != 0); });
}

ek_status ek_session_times(const ek_session* session, uint64_t* nanoseconds, uint32_t count) {
    return guarded([&] {
        const auto& times = given(session, "session").session.times();
        if (times.empty()) fail(EK_BAD_ARGUMENT, "times: not measured, see ek_session_profile");
        given(nanoseconds, "nanoseconds");
        for (uint32_t i = 0; i < count; ++i) nanoseconds[i] = i < times.size() ? times[i] : 0;
    });
}

const char* ek_last_error(void) { return edgekit::last_error_text(); }

}  // extern "C"
