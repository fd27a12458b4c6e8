/* A driver that is installed on a test host. What it pretends is the unit tests' stand-in, but told by a file, one NAME=VALUE a line, which can
 * change under a running host; FAKE_DRIVER and FAKE_CUDA are its versions. As with NVIDIA's, a process that may not open the driver's devices is
 * refused, and one that has the devices of some GPUs sees only those. */
#define nvmlInitWithFlags scripted_init
#define nvmlInit_v2 scripted_init_v2
#define nvmlSystemGetDriverVersion scripted_driver
#define nvmlSystemGetCudaDriverVersion_v2 scripted_cuda
#define nvmlDeviceGetCount_v2 scripted_count
#include "../../../tests/unit/data/fake_nvml.c"
#undef nvmlInitWithFlags
#undef nvmlInit_v2
#undef nvmlSystemGetDriverVersion
#undef nvmlSystemGetCudaDriverVersion_v2
#undef nvmlDeviceGetCount_v2
#include <errno.h>
#include <fcntl.h>

static void read_file(void) {
  char line[256];
  FILE *file = fopen("/var/lib/fake-nvidia/driver", "r");
  if (file == NULL) return;
  while (fgets(line, sizeof line, file)) {
    char *value = strchr(line, '=');
    if (value == NULL) continue;
    *value++ = '\0';
    value[strcspn(value, "\n")] = '\0';
    setenv(line, value, 1);
  }
  fclose(file);
}
static int opened(const char *path) {
  int device = open(path, O_RDWR);
  if (device >= 0) close(device);
  return device >= 0;
}

int nvmlInitWithFlags(unsigned flags) {
  read_file();
  if (!opened("/dev/nvidiactl")) return errno == ENOENT ? 9 : 999;
  return scripted_init(flags);
}
int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlSystemGetDriverVersion(char *text, unsigned size) { snprintf(text, size, "%s", getenv("FAKE_DRIVER")); return SUCCESS; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = number("FAKE_CUDA"); return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) {
  char path[32];
  for (*count = 0; *count < (unsigned)number("FAKE_GPUS"); ++*count) {
    snprintf(path, sizeof path, "/dev/nvidia%u", *count);
    if (!opened(path)) break;
  }
  return SUCCESS;
}
