/*
 * Does to a virtual disk what its first argument says, the way a program written for Windows does. Ends with 0
 * if all is as Windows has it, with 3 if an operation was over before it could be stopped, else with 1.
 */
#ifdef _WIN32
#include <windows.h>
#include <initguid.h>
#include <virtdisk.h>
#else
#include "virtdisk.h"
#endif
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                        \
    do {                                                                        \
        if (!(condition)) {                                                     \
            printf("%s:%d: %s\n", __FILE__, __LINE__, #condition);              \
            exit(1);                                                            \
        }                                                                       \
    } while (0)

#define EQUAL(found, wanted)                                                                        \
    do {                                                                                            \
        unsigned long long is = (unsigned long long)(found), should = (unsigned long long)(wanted); \
        if (is != should) {                                                                         \
            printf("%s:%d: %s is %#llx, not %s\n", __FILE__, __LINE__, #found, is, #wanted);        \
            exit(1);                                                                                \
        }                                                                                           \
    } while (0)

/* The layout of the structures on 64-bit Windows. */
#define AT(type, member, offset) typedef char at_##type[offsetof(type, member) == (offset) ? 1 : -1]
#define SIZE(type, bytes) typedef char size_of_##type[sizeof(type) == (bytes) ? 1 : -1]
#if !defined(_WIN32) && UINTPTR_MAX == UINT64_MAX
SIZE(DWORD, 4);
SIZE(ULONG, 4);
SIZE(BOOL, 4);
SIZE(WCHAR, 2);
SIZE(GUID, 16);
SIZE(OVERLAPPED, 32);
AT(OVERLAPPED, hEvent, 24);
SIZE(VIRTUAL_STORAGE_TYPE, 20);
AT(VIRTUAL_STORAGE_TYPE, VendorId, 4);
SIZE(VIRTUAL_DISK_ACCESS_MASK, 4);
SIZE(OPEN_VIRTUAL_DISK_PARAMETERS, 44);
AT(OPEN_VIRTUAL_DISK_PARAMETERS, Version2.ResiliencyGuid, 12);
SIZE(ATTACH_VIRTUAL_DISK_PARAMETERS, 24);
SIZE(COMPACT_VIRTUAL_DISK_PARAMETERS, 8);
AT(COMPACT_VIRTUAL_DISK_PARAMETERS, Version1.Reserved, 4);
SIZE(VIRTUAL_DISK_PROGRESS, 24);
AT(VIRTUAL_DISK_PROGRESS, CompletionValue, 16);
SIZE(GET_VIRTUAL_DISK_INFO, 32);
AT(GET_VIRTUAL_DISK_INFO, ParentLocation.ParentLocationBuffer, 12);
#endif

static WCHAR path[1024];
static VIRTUAL_STORAGE_TYPE unknown_type;

static DWORD open_disk(int access, HANDLE *handle)
{
    OPEN_VIRTUAL_DISK_PARAMETERS parameters;
    memset(&parameters, 0, sizeof(parameters));
    parameters.Version = OPEN_VIRTUAL_DISK_VERSION_1;
    parameters.Version1.RWDepth = OPEN_VIRTUAL_DISK_RW_DEPTH_DEFAULT;
    *handle = INVALID_HANDLE_VALUE;
    return OpenVirtualDisk(&unknown_type, path, (VIRTUAL_DISK_ACCESS_MASK)access, OPEN_VIRTUAL_DISK_FLAG_NONE,
                           &parameters, handle);
}

static HANDLE opened(int access)
{
    HANDLE handle;
    EQUAL(open_disk(access, &handle), ERROR_SUCCESS);
    CHECK(handle != NULL && handle != INVALID_HANDLE_VALUE);
    return handle;
}

static HANDLE attached(void)
{
    ATTACH_VIRTUAL_DISK_PARAMETERS parameters;
    HANDLE handle = opened(VIRTUAL_DISK_ACCESS_METAOPS | VIRTUAL_DISK_ACCESS_ATTACH_RO | VIRTUAL_DISK_ACCESS_DETACH);
    memset(&parameters, 0, sizeof(parameters));
    parameters.Version = ATTACH_VIRTUAL_DISK_VERSION_1;
    EQUAL(AttachVirtualDisk(handle, NULL, ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY, 0, &parameters, NULL), ERROR_SUCCESS);
    return handle;
}

static DWORD start(HANDLE handle, OVERLAPPED *overlapped)
{
    COMPACT_VIRTUAL_DISK_PARAMETERS parameters;
    memset(&parameters, 0, sizeof(parameters));
    parameters.Version = COMPACT_VIRTUAL_DISK_VERSION_1;
    memset(overlapped, 0, sizeof(*overlapped));
    /* Set, to begin with: the operation resets it. */
    overlapped->hEvent = CreateEvent(NULL, TRUE, TRUE, NULL);
    CHECK(overlapped->hEvent != NULL);
    return CompactVirtualDisk(handle, COMPACT_VIRTUAL_DISK_FLAG_NONE, &parameters, overlapped);
}

/* Blocks until it is done. Without attaching: file-system-agnostic. */
static void agnostic(void)
{
    HANDLE handle = opened(VIRTUAL_DISK_ACCESS_METAOPS);
    EQUAL(CompactVirtualDisk(handle, COMPACT_VIRTUAL_DISK_FLAG_NONE, NULL, NULL), ERROR_SUCCESS);
    CHECK(CloseHandle(handle));
}

/* Attached, with progress: file-system-aware. */
static void aware(void)
{
    HANDLE handle = attached();
    OVERLAPPED overlapped;
    VIRTUAL_DISK_PROGRESS progress;
    DWORD transferred = 1;
    EQUAL(start(handle, &overlapped), ERROR_IO_PENDING);
    for (;;) {
        DWORD waited = WaitForSingleObject(overlapped.hEvent, 1);
        BOOL completed = HasOverlappedIoCompleted(&overlapped);
        CHECK(waited == WAIT_OBJECT_0 || waited == WAIT_TIMEOUT);
        CHECK(waited != WAIT_OBJECT_0 || completed);
        EQUAL(GetVirtualDiskOperationProgress(handle, &overlapped, &progress), ERROR_SUCCESS);
        CHECK(progress.CompletionValue > 0 && progress.CurrentValue <= progress.CompletionValue);
        if (waited == WAIT_OBJECT_0)
            break;
        CHECK(progress.OperationStatus == ERROR_IO_PENDING || progress.OperationStatus == ERROR_SUCCESS);
        printf("%u%%\n", (unsigned)(progress.CurrentValue * 100 / progress.CompletionValue));
    }
    EQUAL(progress.OperationStatus, ERROR_SUCCESS);
    EQUAL(progress.CurrentValue, progress.CompletionValue);
    CHECK(GetOverlappedResult(handle, &overlapped, &transferred, FALSE));
    EQUAL(DetachVirtualDisk(handle, DETACH_VIRTUAL_DISK_FLAG_NONE, 0), ERROR_SUCCESS);
    CHECK(CloseHandle(handle));
    CHECK(CloseHandle(overlapped.hEvent));
}

/* With a handle of version 2, without an event: waits for the disk. */
static void version_2(void)
{
    HANDLE handle = INVALID_HANDLE_VALUE;
    OPEN_VIRTUAL_DISK_PARAMETERS parameters;
    OVERLAPPED overlapped;
    DWORD transferred;
    memset(&parameters, 0, sizeof(parameters));
    memset(&overlapped, 0, sizeof(overlapped));
    parameters.Version = OPEN_VIRTUAL_DISK_VERSION_2;
    EQUAL(OpenVirtualDisk(&unknown_type, path, VIRTUAL_DISK_ACCESS_NONE, OPEN_VIRTUAL_DISK_FLAG_NONE, &parameters,
                          &handle),
          ERROR_SUCCESS);
    EQUAL(AttachVirtualDisk(handle, NULL, ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY, 0, NULL, &overlapped),
          ERROR_IO_PENDING);
    CHECK(GetOverlappedResult(handle, &overlapped, &transferred, TRUE));
    EQUAL(CompactVirtualDisk(handle, COMPACT_VIRTUAL_DISK_FLAG_NONE, NULL, &overlapped), ERROR_IO_PENDING);
    EQUAL(WaitForSingleObject(handle, INFINITE), WAIT_OBJECT_0);
    CHECK(GetOverlappedResult(handle, &overlapped, &transferred, TRUE));
    EQUAL(transferred, 0);
    CHECK(CloseHandle(handle));
}

/* Stops an operation in one of three ways. */
static void stop(const char *how)
{
    HANDLE handle = attached();
    OVERLAPPED overlapped;
    VIRTUAL_DISK_PROGRESS progress;
    DWORD transferred;
    EQUAL(start(handle, &overlapped), ERROR_IO_PENDING);
    if (strcmp(how, "cancel") == 0) {
        if (!CancelIoEx(handle, &overlapped)) {
            EQUAL(GetLastError(), ERROR_NOT_FOUND);
            exit(3);
        }
        EQUAL(WaitForSingleObject(overlapped.hEvent, INFINITE), WAIT_OBJECT_0);
    } else if (strcmp(how, "detach") == 0) {
        EQUAL(DetachVirtualDisk(handle, DETACH_VIRTUAL_DISK_FLAG_NONE, 0), ERROR_SUCCESS);
    } else {
        CHECK(CloseHandle(handle));
        EQUAL(GetVirtualDiskOperationProgress(handle, &overlapped, &progress), ERROR_INVALID_HANDLE);
    }
    /* Detaching and closing have waited for it. */
    EQUAL(WaitForSingleObject(overlapped.hEvent, 0), WAIT_OBJECT_0);
    CHECK(HasOverlappedIoCompleted(&overlapped));
    if (overlapped.Internal == ERROR_SUCCESS)
        exit(3);
    CHECK(!GetOverlappedResult(handle, &overlapped, &transferred, TRUE));
    EQUAL(GetLastError(), ERROR_OPERATION_ABORTED);
    if (strcmp(how, "close") != 0) {
        EQUAL(GetVirtualDiskOperationProgress(handle, &overlapped, &progress), ERROR_SUCCESS);
        EQUAL(progress.OperationStatus, ERROR_OPERATION_ABORTED);
        CHECK(CloseHandle(handle));
    }
    CHECK(CloseHandle(overlapped.hEvent));
}

/* What must be refused, with pointers and handles that only a C program can have. */
static void refused(void)
{
    HANDLE handle, event, info;
    OVERLAPPED overlapped;
    VIRTUAL_DISK_PROGRESS progress;
    COMPACT_VIRTUAL_DISK_PARAMETERS compact;
    ATTACH_VIRTUAL_DISK_PARAMETERS attach;
    OPEN_VIRTUAL_DISK_PARAMETERS parameters;
    GET_VIRTUAL_DISK_INFO disk_info;
    ULONG size = sizeof(disk_info);
    DWORD transferred;
    const VIRTUAL_DISK_ACCESS_MASK all = VIRTUAL_DISK_ACCESS_ALL;
    const OPEN_VIRTUAL_DISK_FLAG none = OPEN_VIRTUAL_DISK_FLAG_NONE;

    EQUAL(OpenVirtualDisk(NULL, path, all, none, NULL, &handle), ERROR_INVALID_PARAMETER);
    EQUAL(OpenVirtualDisk(&unknown_type, NULL, all, none, NULL, &handle), ERROR_INVALID_PARAMETER);
    EQUAL(OpenVirtualDisk(&unknown_type, path, all, none, NULL, NULL), ERROR_INVALID_PARAMETER);
    memset(&parameters, 0, sizeof(parameters));
    EQUAL(OpenVirtualDisk(&unknown_type, path, all, none, &parameters, &handle), ERROR_INVALID_PARAMETER);
    parameters.Version = (OPEN_VIRTUAL_DISK_VERSION)3;
    EQUAL(OpenVirtualDisk(&unknown_type, path, all, none, &parameters, &handle), ERROR_INVALID_PARAMETER);

#ifndef _WIN32
    {
        /* Half of a pair, which is in no name here; and a name without an end. */
        static WCHAR half[] = {'a', 0xD800, 'b', 0}, endless[40000];
        EQUAL(OpenVirtualDisk(&unknown_type, half, all, none, NULL, &handle), ERROR_INVALID_NAME);
        for (size_t n = 0; n + 1 < sizeof(endless) / sizeof(WCHAR); n++)
            endless[n] = 'x';
        EQUAL(OpenVirtualDisk(&unknown_type, endless, all, none, NULL, &handle), ERROR_FILENAME_EXCED_RANGE);
    }
#endif
    handle = opened(VIRTUAL_DISK_ACCESS_ALL);
    memset(&attach, 0, sizeof(attach));
    EQUAL(AttachVirtualDisk(handle, NULL, ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY, 0, &attach, NULL),
          ERROR_INVALID_PARAMETER);
    memset(&compact, 0, sizeof(compact));
    EQUAL(CompactVirtualDisk(handle, COMPACT_VIRTUAL_DISK_FLAG_NONE, &compact, NULL), ERROR_INVALID_PARAMETER);
    compact.Version = (COMPACT_VIRTUAL_DISK_VERSION)2;
    EQUAL(CompactVirtualDisk(handle, COMPACT_VIRTUAL_DISK_FLAG_NONE, &compact, NULL), ERROR_INVALID_PARAMETER);
    compact.Version = COMPACT_VIRTUAL_DISK_VERSION_1;
    compact.Version1.Reserved = 1;
    EQUAL(CompactVirtualDisk(handle, COMPACT_VIRTUAL_DISK_FLAG_NONE, &compact, NULL), ERROR_INVALID_PARAMETER);
    EQUAL(CompactVirtualDisk(handle, (COMPACT_VIRTUAL_DISK_FLAG)4, NULL, NULL), ERROR_INVALID_PARAMETER);

    memset(&overlapped, 0, sizeof(overlapped));
    EQUAL(GetVirtualDiskOperationProgress(handle, &overlapped, &progress), ERROR_INVALID_PARAMETER);
    EQUAL(GetVirtualDiskOperationProgress(handle, NULL, &progress), ERROR_INVALID_PARAMETER);
    /* An event that is none: nothing begins. On Windows a disk's handle is one. */
#ifdef _WIN32
    overlapped.hEvent = GetStdHandle(STD_OUTPUT_HANDLE);
#else
    overlapped.hEvent = handle;
#endif
    EQUAL(CompactVirtualDisk(handle, COMPACT_VIRTUAL_DISK_FLAG_NONE, NULL, &overlapped), ERROR_INVALID_HANDLE);
    CHECK(HasOverlappedIoCompleted(&overlapped));
    CHECK(!CancelIoEx(handle, NULL));
    EQUAL(GetLastError(), ERROR_NOT_FOUND);

    disk_info.Version = GET_VIRTUAL_DISK_INFO_SIZE;
    EQUAL(GetVirtualDiskInformation(handle, NULL, &disk_info, NULL), ERROR_INVALID_PARAMETER);
    EQUAL(GetVirtualDiskInformation(handle, &size, NULL, NULL), ERROR_INVALID_PARAMETER);
    size = sizeof(disk_info) - 1;
    EQUAL(GetVirtualDiskInformation(handle, &size, &disk_info, NULL), ERROR_INSUFFICIENT_BUFFER);
    EQUAL(size, sizeof(disk_info));

    event = CreateEvent(NULL, FALSE, TRUE, NULL);
    CHECK(event != NULL);
    EQUAL(CompactVirtualDisk(event, COMPACT_VIRTUAL_DISK_FLAG_NONE, NULL, NULL), ERROR_VIRTDISK_NOT_VIRTUAL_DISK);
    EQUAL(WaitForSingleObject(event, 0), WAIT_OBJECT_0);
    EQUAL(WaitForSingleObject(event, 0), WAIT_TIMEOUT);
    CHECK(SetEvent(event) && ResetEvent(event));
    EQUAL(WaitForSingleObject(event, 1), WAIT_TIMEOUT);
#ifndef _WIN32
    CHECK(!SetEvent(handle));
    EQUAL(GetLastError(), ERROR_INVALID_HANDLE);
#endif
    CHECK(CloseHandle(event));
    CHECK(!CloseHandle(event));
    EQUAL(GetLastError(), ERROR_INVALID_HANDLE);
    EQUAL(WaitForSingleObject(event, 0), WAIT_FAILED);

    info = opened(VIRTUAL_DISK_ACCESS_GET_INFO);
    EQUAL(CompactVirtualDisk(info, COMPACT_VIRTUAL_DISK_FLAG_NONE, NULL, NULL), ERROR_ACCESS_DENIED);
    CHECK(CloseHandle(info));
    CHECK(CloseHandle(handle));

    /* A handle that was closed, and those that never were one. */
    for (int n = 0; n < 3; n++) {
        EQUAL(CompactVirtualDisk(handle, COMPACT_VIRTUAL_DISK_FLAG_NONE, NULL, NULL), ERROR_INVALID_HANDLE);
        EQUAL(GetVirtualDiskInformation(handle, &size, &disk_info, NULL), ERROR_INVALID_HANDLE);
        EQUAL(GetVirtualDiskOperationProgress(handle, &overlapped, &progress), ERROR_INVALID_HANDLE);
        EQUAL(AttachVirtualDisk(handle, NULL, ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY, 0, NULL, NULL),
              ERROR_INVALID_PARAMETER);
        EQUAL(DetachVirtualDisk(handle, DETACH_VIRTUAL_DISK_FLAG_NONE, 0), ERROR_INVALID_PARAMETER);
#ifndef _WIN32
        /* There the kernel answers these. */
        CHECK(!CancelIoEx(handle, NULL));
        CHECK(!CloseHandle(handle));
        EQUAL(GetLastError(), ERROR_INVALID_HANDLE);
#endif
        handle = n == 0 ? NULL : INVALID_HANDLE_VALUE;
    }
#ifdef _WIN32
    (void)transferred;
#else
    CHECK(!GetOverlappedResult(handle, NULL, &transferred, FALSE));
    EQUAL(GetLastError(), ERROR_INVALID_PARAMETER);
#endif
}

static DWORD ask(HANDLE handle, GET_VIRTUAL_DISK_INFO_VERSION version, GET_VIRTUAL_DISK_INFO **answer, ULONG *size)
{
    (*answer)->Version = version;
    return GetVirtualDiskInformation(handle, size, *answer, NULL);
}

/* Says what the disk is. */
static void info(void)
{
    ULONG size = sizeof(GET_VIRTUAL_DISK_INFO);
    GET_VIRTUAL_DISK_INFO *answer = (GET_VIRTUAL_DISK_INFO *)malloc(size);
    HANDLE handle = opened(VIRTUAL_DISK_ACCESS_GET_INFO);
    const WCHAR *at;
    CHECK(answer != NULL);
    EQUAL(ask(handle, GET_VIRTUAL_DISK_INFO_SIZE, &answer, &size), ERROR_SUCCESS);
    printf("virtual %llu\nphysical %llu\nblock %u\nsector %u\n", answer->Size.VirtualSize,
           answer->Size.PhysicalSize, (unsigned)answer->Size.BlockSize, (unsigned)answer->Size.SectorSize);
    EQUAL(ask(handle, GET_VIRTUAL_DISK_INFO_VIRTUAL_STORAGE_TYPE, &answer, &size), ERROR_SUCCESS);
    CHECK(memcmp(&answer->VirtualStorageType.VendorId, &VIRTUAL_STORAGE_TYPE_VENDOR_MICROSOFT, sizeof(GUID)) == 0);
    printf("device %u\n", (unsigned)answer->VirtualStorageType.DeviceId);
    EQUAL(ask(handle, GET_VIRTUAL_DISK_INFO_PROVIDER_SUBTYPE, &answer, &size), ERROR_SUCCESS);
    printf("subtype %u\n", (unsigned)answer->ProviderSubtype);
    EQUAL(ask(handle, GET_VIRTUAL_DISK_INFO_IDENTIFIER, &answer, &size), ERROR_SUCCESS);
    printf("identifier %08x-%04x-%04x-%02x%02x\n", (unsigned)answer->Identifier.Data1, answer->Identifier.Data2,
           answer->Identifier.Data3, answer->Identifier.Data4[0], answer->Identifier.Data4[1]);
    if (ask(handle, GET_VIRTUAL_DISK_INFO_PARENT_IDENTIFIER, &answer, &size) == ERROR_SUCCESS) {
        printf("parent %08x-%04x-%04x-%02x%02x\n", (unsigned)answer->ParentIdentifier.Data1,
               answer->ParentIdentifier.Data2, answer->ParentIdentifier.Data3, answer->ParentIdentifier.Data4[0],
               answer->ParentIdentifier.Data4[1]);
        EQUAL(ask(handle, GET_VIRTUAL_DISK_INFO_PARENT_LOCATION, &answer, &size), ERROR_INSUFFICIENT_BUFFER);
        CHECK(size > sizeof(GET_VIRTUAL_DISK_INFO));
        free(answer);
        answer = (GET_VIRTUAL_DISK_INFO *)malloc(size);
        CHECK(answer != NULL);
        EQUAL(ask(handle, GET_VIRTUAL_DISK_INFO_PARENT_LOCATION, &answer, &size), ERROR_SUCCESS);
        CHECK(answer->ParentLocation.ParentResolved);
        printf("location ");
        for (at = answer->ParentLocation.ParentLocationBuffer; *at != 0; at++)
            putchar((char)*at);
        putchar('\n');
    }
    free(answer);
    CHECK(CloseHandle(handle));
}

/* The caller may read the file, not write to it. */
static void denied(void)
{
    HANDLE handle;
    EQUAL(open_disk(VIRTUAL_DISK_ACCESS_METAOPS, &handle), ERROR_ACCESS_DENIED);
    EQUAL(open_disk(VIRTUAL_DISK_ACCESS_METAOPS | VIRTUAL_DISK_ACCESS_ATTACH_RO, &handle), ERROR_ACCESS_DENIED);
    handle = opened(VIRTUAL_DISK_ACCESS_ATTACH_RO | VIRTUAL_DISK_ACCESS_DETACH);
    EQUAL(AttachVirtualDisk(handle, NULL, ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY, 0, NULL, NULL), ERROR_SUCCESS);
    EQUAL(CompactVirtualDisk(handle, COMPACT_VIRTUAL_DISK_FLAG_NONE, NULL, NULL), ERROR_ACCESS_DENIED);
    EQUAL(DetachVirtualDisk(handle, DETACH_VIRTUAL_DISK_FLAG_NONE, 0), ERROR_SUCCESS);
    CHECK(CloseHandle(handle));
}

/* Has the disk attached, and says so, until its input ends. */
static void hold(void)
{
    HANDLE handle = attached();
    printf("attached\n");
    CHECK(fflush(stdout) == 0);
    while (getchar() != EOF)
        ;
    EQUAL(DetachVirtualDisk(handle, DETACH_VIRTUAL_DISK_FLAG_NONE, 0), ERROR_SUCCESS);
    EQUAL(DetachVirtualDisk(handle, DETACH_VIRTUAL_DISK_FLAG_NONE, 0), ERROR_NOT_READY);
    CHECK(CloseHandle(handle));
}

/* As Go programs open and attach a disk: with Microsoft's go-winio. */
static void as_go(void)
{
    HANDLE handle = INVALID_HANDLE_VALUE;
    OPEN_VIRTUAL_DISK_PARAMETERS parameters;
    ATTACH_VIRTUAL_DISK_PARAMETERS attach;
    memset(&parameters, 0, sizeof(parameters));
    memset(&attach, 0, sizeof(attach));
    parameters.Version = OPEN_VIRTUAL_DISK_VERSION_2;
    attach.Version = ATTACH_VIRTUAL_DISK_VERSION_2;
    EQUAL(OpenVirtualDisk(&unknown_type, path, VIRTUAL_DISK_ACCESS_NONE,
                          (OPEN_VIRTUAL_DISK_FLAG)(OPEN_VIRTUAL_DISK_FLAG_CACHED_IO |
                                                   OPEN_VIRTUAL_DISK_FLAG_IGNORE_RELATIVE_PARENT_LOCATOR),
                          &parameters, &handle),
          ERROR_SUCCESS);
    EQUAL(DetachVirtualDisk(handle, DETACH_VIRTUAL_DISK_FLAG_NONE, 0), ERROR_NOT_READY);
    attach.Version2.RestrictedLength = 1 << 20;
    EQUAL(AttachVirtualDisk(handle, NULL, ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY, 0, &attach, NULL),
          ERROR_INVALID_PARAMETER);
    attach.Version2.RestrictedLength = 0;
    EQUAL(AttachVirtualDisk(handle, NULL, ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY, 0, &attach, NULL), ERROR_SUCCESS);
    EQUAL(DetachVirtualDisk(handle, DETACH_VIRTUAL_DISK_FLAG_NONE, 0), ERROR_SUCCESS);
    CHECK(CloseHandle(handle));
}

/* Begins and does not care: the process ends while the operation runs. */
static void abandon(void)
{
    HANDLE handle = attached();
    OVERLAPPED overlapped;
    EQUAL(start(handle, &overlapped), ERROR_IO_PENDING);
    _Exit(0);
}

int main(int count, char **words)
{
    size_t n;
    CHECK(count == 3 && strlen(words[2]) < 1024);
    for (n = 0; words[2][n] != 0; n++)
        path[n] = (unsigned char)words[2][n];
    if (strcmp(words[1], "agnostic") == 0)
        agnostic();
    else if (strcmp(words[1], "aware") == 0)
        aware();
    else if (strcmp(words[1], "version-2") == 0)
        version_2();
    else if (strcmp(words[1], "refused") == 0)
        refused();
    else if (strcmp(words[1], "info") == 0)
        info();
    else if (strcmp(words[1], "denied") == 0)
        denied();
    else if (strcmp(words[1], "hold") == 0)
        hold();
    else if (strcmp(words[1], "as-go") == 0)
        as_go();
    else if (strcmp(words[1], "abandon") == 0)
        abandon();
    else
        stop(words[1]);
    return 0;
}
