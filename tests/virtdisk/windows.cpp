// A program as it is written for Windows, but for its include: wide literals, flags as enums, macros.
#include "virtdisk.h"
#include <cstdio>

static DWORD Compact(_In_ LPCWSTR VirtualDiskPath, _In_ BOOLEAN FileSystemAware)
{
    VIRTUAL_STORAGE_TYPE storageType;
    storageType.DeviceId = VIRTUAL_STORAGE_TYPE_DEVICE_UNKNOWN;
    storageType.VendorId = VIRTUAL_STORAGE_TYPE_VENDOR_UNKNOWN;

    OPEN_VIRTUAL_DISK_PARAMETERS openParameters;
    ZeroMemory(&openParameters, sizeof(openParameters));
    openParameters.Version = OPEN_VIRTUAL_DISK_VERSION_1;
    openParameters.Version1.RWDepth = OPEN_VIRTUAL_DISK_RW_DEPTH_DEFAULT;

    VIRTUAL_DISK_ACCESS_MASK accessMask = VIRTUAL_DISK_ACCESS_METAOPS;
    if (FileSystemAware)
        accessMask |= VIRTUAL_DISK_ACCESS_ATTACH_RO | VIRTUAL_DISK_ACCESS_DETACH;

    HANDLE vhdHandle = INVALID_HANDLE_VALUE;
    DWORD opStatus = OpenVirtualDisk(&storageType, VirtualDiskPath, accessMask, OPEN_VIRTUAL_DISK_FLAG_NONE,
                                     &openParameters, &vhdHandle);
    if (opStatus != ERROR_SUCCESS)
        return opStatus;

    OVERLAPPED overlapped = {};
    overlapped.hEvent = CreateEvent(NULL, TRUE, FALSE, NULL);
    if (overlapped.hEvent == NULL) {
        opStatus = GetLastError();
        goto Cleanup;
    }
    if (FileSystemAware) {
        ATTACH_VIRTUAL_DISK_FLAG attachFlags = ATTACH_VIRTUAL_DISK_FLAG_NO_DRIVE_LETTER;
        attachFlags |= ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY;
        opStatus = AttachVirtualDisk(vhdHandle, NULL, attachFlags, 0, NULL, NULL);
        if (opStatus != ERROR_SUCCESS)
            goto Cleanup;
    }
    opStatus = CompactVirtualDisk(vhdHandle, COMPACT_VIRTUAL_DISK_FLAG_NONE, NULL, &overlapped);
    while (opStatus == ERROR_IO_PENDING) {
        VIRTUAL_DISK_PROGRESS progress;
        Sleep(1);
        opStatus = GetVirtualDiskOperationProgress(vhdHandle, &overlapped, &progress);
        if (opStatus == ERROR_SUCCESS)
            opStatus = progress.OperationStatus;
    }

Cleanup:
    if (overlapped.hEvent != NULL)
        CloseHandle(overlapped.hEvent);
    CloseHandle(vhdHandle);
    return opStatus;
}

int main()
{
    DWORD missing = Compact(L"missing.vhdx", FALSE);
    DWORD aware = Compact(L"disk.vhdx", TRUE);
    DWORD agnostic = Compact(L"disk.vhdx", FALSE);
    std::printf("%u %u %u\n", (unsigned)missing, (unsigned)aware, (unsigned)agnostic);
    return 0;
}
