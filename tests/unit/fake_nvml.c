/* Not the driver's library: what pynvml asks of libnvidia-ml.so.1 on a node with two whole GPUs (test_nvml.py). */
#include <string.h>

/* A test compiles other nodes, too. */
#ifndef DRIVER
#define DRIVER "570.00.fake"
#endif
#ifndef USED
#define USED 1ull
#endif

struct memory { unsigned long long total, free, used; };

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3 };
static char devices[2];

int nvmlInitWithFlags(unsigned flags) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int error) { return "said by the fake"; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) { strncpy(version, DRIVER, length); return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return SUCCESS; }
int nvmlDeviceGetName(char *device, char *name, unsigned length) { strncpy(name, "a fake GPU", length); return SUCCESS; }
int nvmlDeviceGetMigMode(char *device, unsigned *now, unsigned *next) { return NOT_SUPPORTED; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, char **device)
{
    if (index > 1)
        return INVALID_ARGUMENT;
    *device = &devices[index];
    return SUCCESS;
}

int nvmlDeviceGetUUID(char *device, char *uuid, unsigned length)
{
    strncpy(uuid, device == devices ? "GPU-fake-0" : "GPU-fake-1", length);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(char *device, struct memory *memory)
{
    *memory = (struct memory){80ull << 30, (80ull - USED) << 30, USED << 30};
    return SUCCESS;
}
