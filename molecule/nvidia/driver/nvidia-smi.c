/* As much of nvidia-smi as the collection asks: -L, -q -x, and --query-gpu=uuid,compute_cap. It asks the library beside it. */
#include <stdio.h>
#include <string.h>

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory;
int nvmlInitWithFlags(unsigned), nvmlSystemGetDriverVersion(char *, unsigned), nvmlSystemGetCudaDriverVersion_v2(int *);
int nvmlDeviceGetCount_v2(unsigned *), nvmlDeviceGetHandleByIndex_v2(unsigned, void **), nvmlDeviceGetMemoryInfo_v2(void *, memory *);
int nvmlDeviceGetName(void *, char *, unsigned), nvmlDeviceGetUUID(void *, char *, unsigned);
const char *nvmlErrorString(int);

int main(int argc, char **argv) {
  const char *asked = argc > 1 ? argv[1] : "-L";
  int code = nvmlInitWithFlags(0), cuda = 0;
  unsigned count = 0;
  char driver[80], name[96], uuid[96];
  if (code != 0) {
    printf("Failed to initialize NVML: %s\n", nvmlErrorString(code));
    return code > 255 ? 255 : code;
  }
  nvmlSystemGetDriverVersion(driver, sizeof driver);
  nvmlSystemGetCudaDriverVersion_v2(&cuda);
  nvmlDeviceGetCount_v2(&count);
  if (count == 0) {
    puts("No devices were found");
    return 6;
  }
  if (!strcmp(asked, "-q"))
    printf("<nvidia_smi_log><driver_version>%s</driver_version><cuda_version>%d.%d</cuda_version>\n", driver, cuda / 1000, cuda % 1000 / 10);
  for (unsigned index = 0; index < count; ++index) {
    memory m = {.version = 0x02000028};
    void *gpu;
    nvmlDeviceGetHandleByIndex_v2(index, &gpu);
    nvmlDeviceGetName(gpu, name, sizeof name);
    nvmlDeviceGetUUID(gpu, uuid, sizeof uuid);
    nvmlDeviceGetMemoryInfo_v2(gpu, &m);
    if (!strcmp(asked, "-q"))
      printf("<gpu><product_name>%s</product_name><uuid>%s</uuid><fb_memory_usage><total>%llu MiB</total><reserved>%llu MiB</reserved>"
             "<used>%llu MiB</used><free>%llu MiB</free></fb_memory_usage></gpu>\n", name, uuid, m.total >> 20, m.reserved >> 20, m.used >> 20, m.free >> 20);
    else if (!strncmp(asked, "--query-gpu", 11))
      printf("%s, 9.0\n", uuid);
    else
      printf("GPU %u: %s (UUID: %s)\n", index, name, uuid);
  }
  if (!strcmp(asked, "-q")) puts("</nvidia_smi_log>");
  return 0;
}
