/*
 * A stand-in for WinFsp's library, for tests where there is no WinFsp driver. It forwards all but a few calls to
 * the real library, which has to lie beside it as winfsp-real.dll: volumes are not made, and instead of waiting
 * for requests of the driver the "dispatcher" runs a scenario (scenario.c) that plays the kernel, on several
 * threads, through WinFsp's real checks and the file system's real table of operations.
 *
 * VHDFS_SCENARIO names the scenario. At its end a line "standin: N checks, M failed" goes to the standard output;
 * the volume stays "mounted" until the program takes it away.
 */

#include "standin.h"

#include <stdarg.h>
#include <stdio.h>

#define EXPORT __declspec(dllexport)

/* What the file system asks about the request at hand. */
static __thread FSP_FILE_SYSTEM_OPERATION_CONTEXT operation;
static HANDLE player;
static FSP_SERVICE *service;
static HANDLE token;
static LONG checks, failures, opens;
/* The calls that a file system has to make in this order, to be seen in the output. */
static LONG mounted;

void check_at(int line, BOOL holds, const char *format, ...)
{
    InterlockedIncrement(&checks);
    if (holds)
        return;
    InterlockedIncrement(&failures);
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    printf("standin: FAILED, line %d: %s\n", line, text);
    fflush(stdout);
}

void status_at(int line, NTSTATUS expected, NTSTATUS found, const char *call)
{
    check_at(line, expected == found, "%s: %#lx, not %#lx", call, (ULONG)found, (ULONG)expected);
}

/* A token for access checks, which want one of a client's. */
static HANDLE own_token(void)
{
    HANDLE primary, client = NULL;
    if (OpenProcessToken(GetCurrentProcess(), TOKEN_DUPLICATE | TOKEN_QUERY, &primary)) {
        DuplicateTokenEx(primary, TOKEN_QUERY | TOKEN_DUPLICATE | TOKEN_IMPERSONATE, NULL, SecurityImpersonation,
                         TokenImpersonation, &client);
        CloseHandle(primary);
    }
    return client;
}

NTSTATUS open_as(FSP_FILE_SYSTEM *fs, PCWSTR path, UINT32 disposition, UINT32 options, UINT32 access, OPENED *opened)
{
    static const SIZE_T request_size = FSP_FSCTL_TRANSACT_REQ_SIZEMAX, response_size = FSP_FSCTL_TRANSACT_RSP_SIZEMAX;
    FSP_FSCTL_TRANSACT_REQ *request = calloc(1, request_size);
    FSP_FSCTL_TRANSACT_RSP *response = calloc(1, response_size);
    SIZE_T length = (wcslen(path) + 1) * sizeof(WCHAR);
    memcpy(request->Buffer, path, length);
    request->FileName.Size = (UINT16)length;
    request->Size = (UINT16)(sizeof *request + length);
    request->Version = sizeof *request;
    request->Kind = FspFsctlTransactCreateKind;
    request->Req.Create.CreateOptions = disposition << 24 | options;
    request->Req.Create.AccessToken = (UINT64)(ULONG_PTR)token | (UINT64)GetCurrentProcessId() << 32;
    request->Req.Create.DesiredAccess = access;
    request->Req.Create.ShareAccess = FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE;
    request->Req.Create.UserMode = 1;
    /* As nearly everybody has it. Without it the directories on the way are checked, too. */
    request->Req.Create.HasTraversePrivilege = InterlockedIncrement(&opens) & 1;
    response->Size = sizeof *response;
    response->Kind = request->Kind;
    operation.Request = request;
    operation.Response = response;
    NTSTATUS status = FspFileSystemOpCreate(fs, request, response);
    operation.Request = NULL;
    operation.Response = NULL;
    memset(opened, 0, sizeof *opened);
    if (NT_SUCCESS(status)) {
        opened->context = (PVOID)(ULONG_PTR)response->Rsp.Create.Opened.UserContext2;
        opened->granted = response->Rsp.Create.Opened.GrantedAccess;
        opened->info = response->Rsp.Create.Opened.FileInfo;
        SIZE_T spelled = response->Rsp.Create.Opened.FileName.Size;
        if (spelled < sizeof opened->spelled)
            memcpy(opened->spelled, response->Buffer + response->Rsp.Create.Opened.FileName.Offset, spelled);
    }
    free(request);
    free(response);
    return status;
}

EXPORT NTSTATUS StandInVersion(PUINT32 version)
{
    /* Also lets this library depend on the real one, which then is there to be forwarded to. */
    return FspVersion(version);
}

EXPORT NTSTATUS StandInCreate(PWSTR device, const FSP_FSCTL_VOLUME_PARAMS *volume,
                              const FSP_FILE_SYSTEM_INTERFACE *operations, FSP_FILE_SYSTEM **created)
{
    FSP_FILE_SYSTEM *fs = calloc(1, sizeof *fs);
    fs->Version = sizeof *fs;
    fs->Interface = operations;
    fs->VolumeHandle = INVALID_HANDLE_VALUE;
    fs->UmFileContextIsUserContext2 = volume->UmFileContextIsUserContext2;
    fs->UmFileContextIsFullContext = volume->UmFileContextIsFullContext;
    token = own_token();
    CHECK(token != NULL, "no token: %lu", GetLastError());
    CHECK(wcscmp(device, L"WinFsp.Disk") == 0, "device %ls", device);
    CHECK(!volume->CaseSensitiveSearch && volume->CasePreservedNames && volume->UnicodeOnDisk, "names");
    CHECK(volume->PersistentAcls && !volume->NamedStreams && !volume->ReparsePoints, "features");
    CHECK(volume->SectorSize == 512 && volume->SectorsPerAllocationUnit == 8, "sectors");
    /* For ever would let the kernel keep what was written. */
    CHECK(volume->FileInfoTimeout == 1000, "timeout %u", volume->FileInfoTimeout);
    CHECK(wcscmp(volume->FileSystemName, L"vhdfs") == 0, "name %ls", volume->FileSystemName);
    WCHAR scenario_name[64] = L"";
    GetEnvironmentVariableW(L"VHDFS_SCENARIO", scenario_name, 64);
    CHECK(volume->ReadOnlyVolume == (wcscmp(scenario_name, L"read-only") == 0), "read-only");
    *created = fs;
    return STATUS_SUCCESS;
}

EXPORT NTSTATUS StandInSetMountPoint(FSP_FILE_SYSTEM *fs, PWSTR place)
{
    WCHAR taken[8] = L"";
    GetEnvironmentVariableW(L"VHDFS_TAKEN", taken, 8);
    if (wcscmp(taken, place) == 0)
        return STATUS_OBJECT_NAME_COLLISION;
    CHECK(wcsncmp(place, L"\\\\?\\", 4) != 0, "%ls means the mount manager", place);
    CHECK(InterlockedIncrement(&mounted) == 1, "mounted twice");
    printf("standin: mount point %ls\n", place);
    fflush(stdout);
    return STATUS_SUCCESS;
}

EXPORT VOID StandInRemoveMountPoint(FSP_FILE_SYSTEM *fs)
{
    if (InterlockedExchange(&mounted, 0) == 1) {
        printf("standin: mount point removed\n");
        fflush(stdout);
    }
}

static DWORD WINAPI play(LPVOID fs)
{
    WCHAR name[64] = L"";
    GetEnvironmentVariableW(L"VHDFS_SCENARIO", name, 64);
    scenario(fs, name);
    printf("standin: %ld checks, %ld failed\n", checks, failures);
    fflush(stdout);
    return 0;
}

EXPORT NTSTATUS StandInServiceCreate(PWSTR name, FSP_SERVICE_START *start, FSP_SERVICE_STOP *stop,
                                     FSP_SERVICE_CONTROL *control, FSP_SERVICE **created)
{
    NTSTATUS status = FspServiceCreate(name, start, stop, control, created);
    service = *created;
    return status;
}

/* Stops the service when a file says so, as its manager would, or Ctrl-C. */
static DWORD WINAPI watch(LPVOID unused)
{
    WCHAR path[MAX_PATH] = L"";
    GetEnvironmentVariableW(L"VHDFS_EXPECTED", path, MAX_PATH - 32);
    wcscat(path, L"\\stop");
    while (!DeleteFileW(path))
        Sleep(50);
    FspServiceStop(service);
    return 0;
}

EXPORT NTSTATUS StandInStartDispatcher(FSP_FILE_SYSTEM *fs, ULONG threads)
{
    CreateThread(NULL, 0, watch, NULL, 0, NULL);
    player = CreateThread(NULL, 0, play, fs, 0, NULL);
    return player ? STATUS_SUCCESS : STATUS_INSUFFICIENT_RESOURCES;
}

EXPORT VOID StandInStopDispatcher(FSP_FILE_SYSTEM *fs)
{
    if (player == NULL)
        return;
    WaitForSingleObject(player, INFINITE);
    CloseHandle(player);
    player = NULL;
    printf("standin: stopped\n");
    fflush(stdout);
}

EXPORT VOID StandInDelete(FSP_FILE_SYSTEM *fs)
{
    free(fs);
}

EXPORT FSP_FILE_SYSTEM_OPERATION_CONTEXT *StandInGetOperationContext(VOID)
{
    return &operation;
}
