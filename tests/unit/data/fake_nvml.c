/* A stand-in for NVIDIA's libnvidia-ml.so.1, for the real Python bindings to load. The environment says what it pretends:
 * FAKE_GPUS number of GPUs; FAKE_MIG=1 the first GPU is split into two instances; FAKE_INIT, FAKE_HANDLE, FAKE_MEMORY_V2 an error to return;
 * FAKE_HANG=1 nvmlInit does not return; FAKE_CRASH=1 it crashes. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MIB (1024ULL * 1024)
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
typedef struct { int index, instance; } device;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process;
static device gpus[8], instances[2];

static int number(const char *name) { const char *text = getenv(name); return text ? atoi(text) : 0; }

int nvmlInitWithFlags(unsigned flags) {
  (void)flags;
  if (number("FAKE_HANG")) pause();
  if (number("FAKE_CRASH")) abort();
  return number("FAKE_INIT");
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == 15 ? "GPU is lost" : code == 18 ? "Driver/library version mismatch" : code == 9 ? "Driver Not Loaded" : "Unknown Error"; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "580.159.04"); return SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = number("FAKE_GPUS"); return SUCCESS; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **handle) {
  if (number("FAKE_HANDLE")) return number("FAKE_HANDLE");
  gpus[index].index = index; gpus[index].instance = -1; *handle = &gpus[index]; return SUCCESS;
}
int nvmlDeviceGetCudaComputeCapability(device *d, int *major, int *minor) { (void)d; *major = 9; *minor = 0; return SUCCESS; }
int nvmlDeviceGetName(device *d, char *text, unsigned size) {
  snprintf(text, size, d->instance < 0 ? "NVIDIA H100 80GB HBM3" : "NVIDIA H100 80GB HBM3 MIG 3g.40gb"); return SUCCESS;
}
int nvmlDeviceGetUUID(device *d, char *text, unsigned size) {
  if (d->instance < 0) snprintf(text, size, "GPU-00000000-0000-0000-0000-00000000000%d", d->index);
  else snprintf(text, size, "MIG-00000000-0000-0000-0000-00000000000%d", d->instance);
  return SUCCESS;
}
static unsigned long long total(device *d) { return (d->instance < 0 ? 81559 : 40448) * MIB; }
int nvmlDeviceGetMemoryInfo_v2(device *d, memory_v2 *m) {
  if (number("FAKE_MEMORY_V2")) return number("FAKE_MEMORY_V2");
  if (m->version != 0x02000028) return 25;
  m->total = total(d); m->reserved = 480 * MIB; m->used = 1889 * MIB; m->free = m->total - m->reserved - m->used; return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(device *d, memory_v1 *m) { m->total = total(d); m->used = 2369 * MIB; m->free = m->total - m->used; return SUCCESS; }
int nvmlDeviceGetComputeRunningProcesses_v3(device *d, unsigned *count, process *list) {
  (void)d;
  if (*count < 1 || list == NULL) { *count = 1; return INSUFFICIENT_SIZE; }
  *count = 1; memset(list, 0, sizeof *list); list[0].pid = 4242; list[0].used = 1889 * MIB; return SUCCESS;
}
int nvmlSystemGetProcessName(unsigned pid, char *text, unsigned size) { (void)pid; snprintf(text, size, "/opt/vllm/bin/python"); return SUCCESS; }
int nvmlDeviceGetMigMode(device *d, unsigned *current, unsigned *pending) {
  if (!getenv("FAKE_MIG")) return NOT_SUPPORTED;
  *current = *pending = number("FAKE_MIG") && d->index == 0; return SUCCESS;
}
int nvmlDeviceGetMaxMigDeviceCount(device *d, unsigned *count) { (void)d; *count = 7; return SUCCESS; }
int nvmlDeviceGetMigDeviceHandleByIndex(device *d, unsigned index, device **handle) {
  (void)d;
  if (index > 1) return NOT_FOUND;
  instances[index].instance = index; *handle = &instances[index]; return SUCCESS;
}
