// An NVRTC that compiles nothing, for the driver beside it.
#include <stdlib.h>
#include <string.h>

typedef int Result;
enum { OK = 0 };

Result nvrtcVersion(int* major, int* minor) { return *major = 12, *minor = 8, OK; }
Result nvrtcCreateProgram(void** out, const char* source, const char* name, int n, const char** headers,
                          const char** names) {
    return *out = malloc(1), OK;
}
Result nvrtcCompileProgram(void* program, int n, const char** options) { return OK; }
Result nvrtcDestroyProgram(void** program) { return free(*program), OK; }
Result nvrtcGetPTXSize(void* program, size_t* size) { return *size = sizeof "none", OK; }
Result nvrtcGetPTX(void* program, char* out) { return strcpy(out, "none"), OK; }
Result nvrtcGetCUBINSize(void* program, size_t* size) { return *size = sizeof "none", OK; }
Result nvrtcGetCUBIN(void* program, char* out) { return strcpy(out, "none"), OK; }
Result nvrtcGetProgramLogSize(void* program, size_t* size) { return *size = 1, OK; }
Result nvrtcGetProgramLog(void* program, char* out) { return *out = 0, OK; }
const char* nvrtcGetErrorString(int error) { return "an error of no NVRTC"; }
