// How things fail: inside by Error, towards C by a status and a line of text for the calling thread.
#pragma once

#include <new>
#include <string>

#include "../include/edgekit.h"

namespace edgekit {

struct Error {
    ek_status status;
    std::string text;
};

// Throws an Error with a line of text, made as printf makes it.
[[noreturn]] void fail(ek_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

// What ek_last_error gives in this thread.
ek_status remember(ek_status status, const char* text) noexcept;
const char* last_error_text() noexcept;

// Runs what may throw, and gives a status: nothing leaves the library as an exception.
template <typename Work> ek_status guarded(Work&& work) noexcept {
    remember(EK_OK, "");
    try {
        work();
        return EK_OK;
    } catch (const Error& error) {
        return remember(error.status, error.text.c_str());
    } catch (const std::bad_alloc&) {
        return remember(EK_NO_MEMORY, "memory: not enough");
    } catch (const std::exception& error) {
        return remember(EK_INTERNAL, error.what());
    } catch (...) {
        return remember(EK_INTERNAL, "unknown trouble");
    }
}

}  // namespace edgekit
