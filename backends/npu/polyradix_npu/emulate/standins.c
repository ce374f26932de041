/* What torch_npu's libraries ask of CANN: memory of the device is memory of the host, streams keep order because every
   call is done when it returns, and no kernel can be launched. Whatever else is asked for does nothing. */
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OUT_OF_MEMORY = 207001, NO_KERNELS = 507000 };

static const size_t total = (size_t)1 << 30;
static size_t used;
static int device;

static int take(void **p, size_t n) {
    if (posix_memalign(p, 512, n ? n : 512)) return OUT_OF_MEMORY;
    used += malloc_usable_size(*p);
    return 0;
}
static int give(void *p) {
    used -= malloc_usable_size(p);
    free(p);
    return 0;
}
static int handle(void **p) { return take(p, 8); }

const char *aclrtGetSocName(void) { return "Ascend910B2"; }
int aclrtGetDeviceCount(uint32_t *n) { *n = 1; return 0; }
int aclrtSetDevice(int d) { device = d; return 0; }
int aclrtGetDevice(int *d) { *d = device; return 0; }
int aclrtGetCurrentContext(void **c) { *c = &device; return 0; }
int aclGetDeviceCapability(uint32_t d, int what, int64_t *value) { *value = 1; return 0; }
int aclrtGetSysParamOpt(int what, int64_t *value) { *value = 0; return 0; }
int aclrtGetMemInfo(int kind, size_t *left, size_t *all) {
    *left = used < total ? total - used : 0;
    *all = total;
    return 0;
}

int aclrtMalloc(void **p, size_t n, int policy) { return take(p, n); }
int aclrtMallocAlign32(void **p, size_t n, int policy) { return take(p, n); }
int aclrtMallocHost(void **p, size_t n) { return take(p, n); }
int aclrtFree(void *p) { return give(p); }
int aclrtFreeHost(void *p) { return give(p); }
int aclrtMemcpy(void *to, size_t room, const void *from, size_t n, int kind) { memmove(to, from, n); return 0; }
int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t n, int kind, void *stream) {
    memmove(to, from, n);
    return 0;
}
int aclrtMemset(void *p, size_t room, int value, size_t n) { memset(p, value, n); return 0; }

int aclrtCreateStream(void **s) { return handle(s); }
int aclrtCreateStreamWithConfig(void **s, uint32_t priority, uint32_t flag) { return handle(s); }
int aclrtDestroyStream(void *s) { return give(s); }
int aclrtCreateEventWithFlag(void **e, uint32_t flag) { return handle(e); }
int aclrtCreateEventExWithFlag(void **e, uint32_t flag) { return handle(e); }
int aclrtDestroyEvent(void *e) { return give(e); }

int aclopCompileAndExecute(void) { return NO_KERNELS; }
int aclopCompileAndExecuteV2(void) { return NO_KERNELS; }
int rtKernelLaunch(void) { return NO_KERNELS; }

/* Looked up by name while the device starts, so the wheel's symbol tables do not have them. */
int aclSetCompileopt(void) { return 0; }
int aclrtCtxSetSysParamOpt(void) { return 0; }
int aclrtSetDeviceSatMode(void) { return 0; }
int aclrtSetOpExecuteTimeOut(void) { return 0; }
int aclrtSetOpWaitTimeout(void) { return 0; }
int aclrtSynchronizeStreamWithTimeout(void) { return 0; }
int aclrtSynchronizeDevice(void) { return 0; }
int aclrtSynchronizeDeviceWithTimeout(void) { return 0; }
int aclrtQueryEventStatus(void *e, int *status) { *status = 1; return 0; }
