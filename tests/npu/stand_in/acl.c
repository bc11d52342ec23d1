/* A stand-in for CANN's runtime: torch_npu's wheel imports and runs with it, without a card.
 *
 * Device memory is host memory, copies are memcpy, and streams and events are done at once. Nothing
 * computes: operators that torch_npu would send to the card have to be caught before (simulated.py).
 * Signatures are those of CANN's public acl headers. What torch_npu links to but does not need here
 * succeeds without doing anything.
 *
 * Environment: STAND_IN_DEVICES (1), STAND_IN_SOC ("Ascend910B2"), STAND_IN_BYTES (64 GiB each).
 * Control, from Python through ctypes: stand_in_*, at the end.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 207001, INVALID_DEVICE = 107001 };
enum { DEVICES = 16, ALIGNMENT = 512 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int64_t live[DEVICES], peak[DEVICES], total = -1;
static int64_t calls, synchronizes, syncs_until_loss = -1;
static int lost;
static __thread int current;

static int64_t setting(const char *name, int64_t otherwise) {
    const char *text = getenv(name);
    return text ? strtoll(text, NULL, 10) : otherwise;
}

static int64_t device_bytes(void) {
    if (total < 0) total = setting("STAND_IN_BYTES", 64LL << 30);
    return total;
}

/* Count a call that a lost card fails. */
static int reach_card(void) {
    __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    return lost;
}

static int synchronize(void) {
    pthread_mutex_lock(&lock);
    synchronizes++;
    if (syncs_until_loss > 0 && --syncs_until_loss == 0 && !lost) lost = 507899;
    pthread_mutex_unlock(&lock);
    return reach_card();
}

/* ---- devices ---- */

int aclrtGetDeviceCount(uint32_t *count) {
    *count = (uint32_t)setting("STAND_IN_DEVICES", 1);
    return SUCCESS;
}

int aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= setting("STAND_IN_DEVICES", 1)) return INVALID_DEVICE;
    current = device;
    return SUCCESS;
}

int aclrtGetDevice(int32_t *device) { *device = current; return SUCCESS; }

int aclrtGetCurrentContext(void **context) {
    static int contexts[DEVICES];
    *context = &contexts[current];
    return SUCCESS;
}

const char *aclrtGetSocName(void) {
    const char *name = getenv("STAND_IN_SOC");
    return name ? name : "Ascend910B2";
}

int aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) { *can = 0; return SUCCESS; }
int aclrtGetRunMode(int *mode) { *mode = 1; return SUCCESS; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return SUCCESS; }
int aclrtCtxGetSysParamOpt(int option, int64_t *value) { *value = 0; return SUCCESS; }
const char *aclGetRecentErrMsg(void) { return lost ? "EZ9999: Inner Error! the stand-in's card is lost" : ""; }

/* ---- memory ---- */

static int take(int64_t bytes) {
    pthread_mutex_lock(&lock);
    int fits = live[current] + bytes <= device_bytes();
    if (fits) {
        live[current] += bytes;
        if (live[current] > peak[current]) peak[current] = live[current];
    }
    pthread_mutex_unlock(&lock);
    return fits ? SUCCESS : OUT_OF_MEMORY;
}

static void give(int device, int64_t bytes) {
    pthread_mutex_lock(&lock);
    live[device] -= bytes;
    pthread_mutex_unlock(&lock);
}

/* What precedes each piece of device memory, in ALIGNMENT bytes of its own. */
struct piece { int64_t bytes; int device; };

/* Large pieces may add up to more than the host has, as long as nobody writes to them. */
static int is_large(size_t bytes) { return bytes >= (size_t)1 << 26; }

static void *from_host(size_t bytes) {
    if (!is_large(bytes)) return aligned_alloc(ALIGNMENT, bytes);
    void *memory = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? 0 : memory;
}

static void to_host(void *memory, size_t bytes) {
    if (is_large(bytes)) munmap(memory, bytes); else free(memory);
}

int aclrtMalloc(void **pointer, size_t size, int policy) {
    if (reach_card()) return lost;
    int64_t bytes = (int64_t)((size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (take(bytes)) return OUT_OF_MEMORY;
    struct piece *piece = from_host(ALIGNMENT + (size_t)bytes);
    if (!piece) { give(current, bytes); return OUT_OF_MEMORY; }
    piece->bytes = bytes;
    piece->device = current;
    *pointer = (char *)piece + ALIGNMENT;
    return SUCCESS;
}

int aclrtMallocAlign32(void **pointer, size_t size, int policy) { return aclrtMalloc(pointer, size, policy); }

int aclrtFree(void *pointer) {
    struct piece *piece = (struct piece *)((char *)pointer - ALIGNMENT);
    give(piece->device, piece->bytes);
    to_host(piece, ALIGNMENT + (size_t)piece->bytes);
    return SUCCESS;
}

int aclrtMallocHost(void **pointer, size_t size) {
    *pointer = aligned_alloc(ALIGNMENT, (size + ALIGNMENT) / ALIGNMENT * ALIGNMENT);
    return *pointer ? SUCCESS : OUT_OF_MEMORY;
}

int aclrtMallocHostWithCfg(void **pointer, uint64_t size, void *config) { return aclrtMallocHost(pointer, size); }
int aclrtFreeHost(void *pointer) { free(pointer); return SUCCESS; }

int aclrtGetMemInfo(int kind, size_t *free_bytes, size_t *total_bytes) {
    int64_t rest = device_bytes() - live[current];
    *total_bytes = (size_t)device_bytes();
    *free_bytes = (size_t)(rest > 0 ? rest : 0);
    return SUCCESS;
}

/* Expandable segments: addresses are reserved once, and memory is mapped into them by and by. */
static struct range { char *start; size_t bytes; struct range *next; } *ranges;

int aclrtReserveMemAddress(void **pointer, size_t size, size_t alignment, void *wanted, uint64_t flags) {
    struct range *range = malloc(sizeof *range);
    range->start = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range->start == MAP_FAILED) { free(range); return OUT_OF_MEMORY; }
    range->bytes = size;
    pthread_mutex_lock(&lock);
    range->next = ranges;
    ranges = range;
    pthread_mutex_unlock(&lock);
    *pointer = range->start;
    return SUCCESS;
}

int aclrtReleaseMemAddress(void *pointer) {
    pthread_mutex_lock(&lock);
    for (struct range **each = &ranges; *each; each = &(*each)->next)
        if ((*each)->start == pointer) {
            struct range *range = *each;
            *each = range->next;
            munmap(range->start, range->bytes);
            free(range);
            break;
        }
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int aclrtMallocPhysical(void **handle, size_t size, const void *properties, uint64_t flags) {
    if (reach_card()) return lost;
    if (take((int64_t)size)) return OUT_OF_MEMORY;
    struct piece *piece = malloc(sizeof *piece);
    piece->bytes = (int64_t)size;
    piece->device = current;
    *handle = piece;
    return SUCCESS;
}

int aclrtFreePhysical(void *handle) {
    struct piece *piece = handle;
    give(piece->device, piece->bytes);
    to_host(piece, ALIGNMENT + (size_t)piece->bytes);
    return SUCCESS;
}

/* Both are given the start of a mapping; a map of its sizes is not needed, since whole handles are mapped. */
int aclrtMapMem(void *pointer, size_t size, size_t offset, void *handle, uint64_t flags) {
    return mprotect(pointer, size, PROT_READ | PROT_WRITE) ? OUT_OF_MEMORY : SUCCESS;
}

int aclrtUnmapMem(void *pointer) { return SUCCESS; }

/* ---- copies, streams, events ---- */

int aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int kind) {
    if (reach_card()) return lost;
    memcpy(to, from, bytes);
    return SUCCESS;
}

int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
    return aclrtMemcpy(to, room, from, bytes, kind);
}

int aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t bytes, int kind, void *stream) {
    return aclrtMemcpy(to, room, from, bytes, kind);
}

int aclrtMemset(void *to, size_t room, int value, size_t bytes) {
    if (reach_card()) return lost;
    memset(to, value, bytes);
    return SUCCESS;
}

static int create(void **object) { *object = malloc(64); return SUCCESS; }
static int destroy(void *object) { free(object); return SUCCESS; }

int aclrtCreateStream(void **stream) { return create(stream); }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { return create(stream); }
int aclrtDestroyStream(void *stream) { return destroy(stream); }
int aclrtDestroyStreamForce(void *stream) { return destroy(stream); }
int aclrtStreamGetId(void *stream, int32_t *id) { *id = 1; return SUCCESS; }
int aclrtStreamQuery(void *stream, int *status) { *status = 0; return lost; }
int aclrtStreamWaitEvent(void *stream, void *event) { return reach_card(); }

int aclrtCreateEvent(void **event) { return create(event); }
int aclrtCreateEventWithFlag(void **event, uint32_t flags) { return create(event); }
int aclrtCreateEventExWithFlag(void **event, uint32_t flags) { return create(event); }
int aclrtDestroyEvent(void *event) { return destroy(event); }
int aclrtRecordEvent(void *event, void *stream) { return reach_card(); }
int aclrtResetEvent(void *event, void *stream) { return SUCCESS; }
int aclrtQueryEvent(void *event, int *status) { *status = 1; return lost; }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return lost; }
int aclrtQueryEventWaitStatus(void *event, int *status) { *status = 0; return lost; }
int aclrtEventElapsedTime(float *ms, void *start, void *end) { *ms = 1.0f; return SUCCESS; }
int aclrtEventGetTimestamp(void *event, uint64_t *time) { *time = 0; return SUCCESS; }

int aclrtSynchronizeDevice(void) { return synchronize(); }
int aclrtSynchronizeDeviceWithTimeout(int32_t ms) { return synchronize(); }
int aclrtSynchronizeStream(void *stream) { return synchronize(); }
int aclrtSynchronizeStreamWithTimeout(void *stream, int32_t ms) { return synchronize(); }
int aclrtSynchronizeEvent(void *event) { return synchronize(); }
int aclrtSynchronizeEventWithTimeout(void *event, int32_t ms) { return synchronize(); }

/* ---- linked to, and not needed here ---- */

#define SUCCEEDS(name) int name(void) { return SUCCESS; }

SUCCEEDS(aclAppLog) SUCCEEDS(aclCreateDataBuffer) SUCCEEDS(aclCreateTensorDesc) SUCCEEDS(aclDestroyDataBuffer)
SUCCEEDS(aclDestroyTensorDesc) SUCCEEDS(aclFinalize) SUCCEEDS(aclGetDeviceCapability)
SUCCEEDS(aclGetTensorDescDimV2) SUCCEEDS(aclGetTensorDescFormat) SUCCEEDS(aclGetTensorDescNumDims)
SUCCEEDS(aclGetTensorDescType) SUCCEEDS(aclInit) SUCCEEDS(aclSetCompileopt) SUCCEEDS(aclSetTensorDescName)
SUCCEEDS(aclSetTensorFormat) SUCCEEDS(aclSetTensorPlaceMent) SUCCEEDS(aclSetTensorShape)
SUCCEEDS(aclmdlFinalizeDump) SUCCEEDS(aclmdlInitDump) SUCCEEDS(aclmdlSetDump) SUCCEEDS(aclopCompileAndExecute)
SUCCEEDS(aclopCreateAttr) SUCCEEDS(aclopDestroyAttr) SUCCEEDS(aclopSetAttrBool) SUCCEEDS(aclopSetAttrDataType)
SUCCEEDS(aclopSetAttrFloat) SUCCEEDS(aclopSetAttrInt) SUCCEEDS(aclopSetAttrListBool)
SUCCEEDS(aclopSetAttrListFloat) SUCCEEDS(aclopSetAttrListInt) SUCCEEDS(aclopSetAttrListListInt)
SUCCEEDS(aclopSetAttrString) SUCCEEDS(aclrtBinaryGetFunction) SUCCEEDS(aclrtBinaryLoadFromData)
SUCCEEDS(aclrtCtxSetSysParamOpt) SUCCEEDS(aclrtDeviceEnablePeerAccess) SUCCEEDS(aclrtDeviceGetBareTgid)
SUCCEEDS(aclrtGetDeviceSatMode) SUCCEEDS(aclrtGetFunctionAddr) SUCCEEDS(aclrtMemExportToShareableHandle)
SUCCEEDS(aclrtMemImportFromShareableHandle) SUCCEEDS(aclrtMemSetPidToShareableHandle)
SUCCEEDS(aclrtProcessReport) SUCCEEDS(aclrtResetDevice) SUCCEEDS(aclrtSetCurrentContext)
SUCCEEDS(aclrtSetDeviceSatMode) SUCCEEDS(aclrtSetOpExecuteTimeOut) SUCCEEDS(aclrtSetSysParamOpt)
SUCCEEDS(aclrtSetOpWaitTimeout)
SUCCEEDS(MsprofGetHashId) SUCCEEDS(MsprofRegisterCallback) SUCCEEDS(MsprofReportAdditionalInfo)
SUCCEEDS(MsprofReportApi) SUCCEEDS(MsprofReportCompactInfo) SUCCEEDS(MsprofSysCycleTime)
SUCCEEDS(rtDevBinaryRegister) SUCCEEDS(rtFunctionRegister) SUCCEEDS(rtGetC2cCtrlAddr) SUCCEEDS(rtKernelLaunch)

/* ---- control ---- */

/* Bytes of device memory that are allocated now, and at most since the last reset. */
int64_t stand_in_live_bytes(int device) { return live[device]; }
int64_t stand_in_peak_bytes(int device) { return peak[device]; }
/* Calls that reached the card, and how many of them waited for it. */
int64_t stand_in_calls(void) { return calls; }
int64_t stand_in_synchronizes(void) { return synchronizes; }

/* Set the memory of each card; allocations beyond it fail as CANN's do. */
void stand_in_set_bytes(int64_t bytes) { total = bytes; }

/* Lose the card now, as error `code`; 0 brings it back. From then on everything that reaches it fails. */
void stand_in_lose(int code) { lost = code; syncs_until_loss = -1; }

/* Lose the card in the n-th wait for it from now, counted from 1. */
void stand_in_lose_in_synchronize(int64_t n) { syncs_until_loss = n; }

/* Bring the card back, with the memory of the environment; what is allocated stays so. */
void stand_in_reset(void) {
    stand_in_lose(0);
    total = -1;
    for (int device = 0; device < DEVICES; device++) peak[device] = live[device];
}
