// A CUDA driver that executes nothing. It counts the launches of each kernel, so that what a program asks of a
// GPU, and the time that the CPU takes to ask for it, can be measured on a machine without one. By its attributes
// the GPU is an H200. Its memory is that of the host. What is read from it is 0, and the first byte of values of up to 4 bytes is 1:
// a program that checks whether a loss is finite, or a token is in the vocabulary, goes on.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef int Result;
typedef unsigned long long Pointer;
enum { OK = 0, OUT_OF_MEMORY = 2 };

typedef struct Kernel {
    char name[256];
    long launches;
    struct Kernel* next;
} Kernel;
static Kernel* kernels;

static int by_launches(const void* a, const void* b) {
    long x = (*(Kernel**)a)->launches, y = (*(Kernel**)b)->launches;
    return (x < y) - (x > y);
}

__attribute__((destructor)) static void report(void) {
    long n = 0, total = 0;
    for (Kernel* k = kernels; k; k = k->next) n++, total += k->launches;
    Kernel** sorted = malloc((n + 1) * sizeof *sorted);
    n = 0;
    for (Kernel* k = kernels; k; k = k->next) sorted[n++] = k;
    qsort(sorted, n, sizeof *sorted, by_launches);
    fprintf(stderr, "%ld launches\n", total);
    for (long i = 0; i < n && sorted[i]->launches; i++)
        fprintf(stderr, "%8ld %s\n", sorted[i]->launches, sorted[i]->name);
}

Result cuInit(unsigned flags) { return OK; }
Result cuDriverGetVersion(int* version) { return *version = 12080, OK; }
Result cuDeviceGetCount(int* count) { return *count = 1, OK; }
Result cuDeviceGet(int* device, int index) { return *device = index, OK; }
Result cuDeviceGetName(char* name, int size, int device) {
    return snprintf(name, size, "no GPU, as an H200"), OK;
}
Result cuDeviceGetPCIBusId(char* id, int size, int device) { return snprintf(id, size, "0000:00:00.0"), OK; }
Result cuDeviceTotalMem_v2(size_t* bytes, int device) { return *bytes = 150754820096, OK; }

Result cuDeviceGetAttribute(int* value, int attribute, int device) {
    static const int attributes[][2] = {
        {1, 1024},                               // threads of a block
        {2, 1024},       {3, 1024},  {4, 64},    // its extents
        {5, 2147483647}, {6, 65535}, {7, 65535}, // those of a grid
        {8, 49152},                              // shared memory of a block
        {10, 32},                                // threads of a warp
        {16, 132},                               // multiprocessors
        {75, 9},         {76, 0},                // compute capability
        {97, 232448},                            // shared memory of a block, at most
    };
    *value = 1;
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
        if (attributes[i][0] == attribute) *value = attributes[i][1];
    return OK;
}

static int context;
Result cuDevicePrimaryCtxRetain(void** out, int device) { return *out = &context, OK; }
Result cuCtxSetCurrent(void* ctx) { return OK; }
Result cuCtxGetCurrent(void** out) { return *out = &context, OK; }
Result cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = 0, OK; }
Result cuStreamCreate(void** out, unsigned flags) { return *out = malloc(1), OK; }
Result cuStreamCreateWithPriority(void** out, unsigned flags, int priority) { return *out = malloc(1), OK; }
Result cuStreamDestroy_v2(void* stream) { return free(stream), OK; }
Result cuStreamSynchronize(void* stream) { return OK; }
Result cuStreamWaitEvent(void* stream, void* event, unsigned flags) { return OK; }
Result cuEventCreate(void** out, unsigned flags) { return *out = malloc(1), OK; }
Result cuEventDestroy_v2(void* event) { return free(event), OK; }
Result cuEventRecord(void* event, void* stream) { return OK; }
Result cuEventQuery(void* event) { return OK; }
Result cuEventSynchronize(void* event) { return OK; }
Result cuEventElapsedTime_v2(float* ms, void* from, void* to) { return *ms = 0.01f, OK; }
Result cuEventElapsedTime(float* ms, void* from, void* to) { return *ms = 0.01f, OK; }

// Pages take memory when they are written. The size is before what is returned.
enum { PAGE = 4096 };
static Result reserve(Pointer* out, size_t size) {
    char* p =
        mmap(0, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return OUT_OF_MEMORY;
    *(size_t*)p = size + PAGE;
    return *out = (Pointer)(uintptr_t)p + PAGE, OK;
}
static Result release(Pointer pointer) {
    char* p = (char*)(uintptr_t)(pointer - PAGE);
    return munmap(p, *(size_t*)p), OK;
}
Result cuMemAlloc_v2(Pointer* out, size_t size) { return reserve(out, size); }
Result cuMemAllocAsync(Pointer* out, size_t size, void* stream) { return reserve(out, size); }
Result cuMemFree_v2(Pointer pointer) { return release(pointer); }
Result cuMemFreeAsync(Pointer pointer, void* stream) { return release(pointer); }
Result cuMemAllocHost_v2(void** out, size_t size) {
    return posix_memalign(out, PAGE, size) ? OUT_OF_MEMORY : OK;
}
Result cuMemFreeHost(void* p) { return free(p), OK; }
Result cuMemGetInfo_v2(size_t* available, size_t* total) { return *available = *total = 150754820096, OK; }

static void read_device(void* to, size_t size) {
    memset(to, 0, size);
    if (size <= 4) *(char*)to = 1;
}
Result cuMemcpyHtoDAsync_v2(Pointer to, const void* from, size_t size, void* stream) {
    return memcpy((void*)(uintptr_t)to, from, size), OK;
}
Result cuMemcpyDtoHAsync_v2(void* to, Pointer from, size_t size, void* stream) {
    return read_device(to, size), OK;
}
Result cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, size_t size, void* stream) { return OK; }

typedef struct Copy {
    size_t from_x, from_y;
    unsigned from_type;
    const char* from_host;
    Pointer from_device;
    void* from_array;
    size_t from_pitch, to_x, to_y;
    unsigned to_type;
    char* to_host;
    Pointer to_device;
    void* to_array;
    size_t to_pitch, width, height;
} Copy;
enum { HOST = 1 };
Result cuMemcpy2DAsync_v2(const Copy* of, void* stream) {
    for (size_t y = 0; y < of->height; y++) {
        char* to = of->to_type == HOST ? of->to_host : (char*)(uintptr_t)of->to_device;
        to += (of->to_y + y) * of->to_pitch + of->to_x;
        if (of->to_type == HOST) {
            read_device(to, of->width);
        } else if (of->from_type == HOST) {
            memcpy(to, of->from_host + (of->from_y + y) * of->from_pitch + of->from_x, of->width);
        }
    }
    return OK;
}

Result cuModuleLoadData(void** out, const void* image) { return *out = malloc(1), OK; }
Result cuModuleLoadDataEx(void** out, const void* image, unsigned n, void* options, void* values) {
    return *out = malloc(1), OK;
}
Result cuModuleGetFunction(void** out, void* module, const char* name) {
    Kernel* kernel = calloc(1, sizeof *kernel);
    snprintf(kernel->name, sizeof kernel->name, "%s", name);
    kernel->next = kernels;
    return *out = kernels = kernel, OK;
}
Result cuFuncSetAttribute(void* function, int attribute, int value) { return OK; }
Result cuLaunchKernel(Kernel* kernel, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                      unsigned threads_y, unsigned threads_z, unsigned shared, void* stream,
                      void** parameters, void** extra) {
    return kernel->launches++, OK;
}
Result cuLaunchKernelEx(const void* config, Kernel* kernel, void** parameters, void** extra) {
    return kernel->launches++, OK;
}
Result cuGetErrorName(int error, const char** name) { return *name = "an error of no GPU", OK; }
Result cuGetErrorString(int error, const char** text) { return *text = "an error of no GPU", OK; }
