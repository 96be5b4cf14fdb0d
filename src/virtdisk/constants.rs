//! Windows' numbers: `virtdisk.h`, by their names there.

use uuid::Uuid;

/// A virtual disk file and who understands it, as [`super::open_virtual_disk`] is told
/// (`VIRTUAL_STORAGE_TYPE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtualStorageType {
    /// One of `VIRTUAL_STORAGE_TYPE_DEVICE_*`.
    pub device_id: u32,
    /// One of `VIRTUAL_STORAGE_TYPE_VENDOR_*`.
    pub vendor_id: Uuid,
}

impl VirtualStorageType {
    /// Whatever the file is.
    pub const UNKNOWN: Self = Self {
        device_id: VIRTUAL_STORAGE_TYPE_DEVICE_UNKNOWN,
        vendor_id: VIRTUAL_STORAGE_TYPE_VENDOR_UNKNOWN,
    };
    /// A VHD.
    pub const VHD: Self = Self {
        device_id: VIRTUAL_STORAGE_TYPE_DEVICE_VHD,
        vendor_id: VIRTUAL_STORAGE_TYPE_VENDOR_MICROSOFT,
    };
    /// A VHDX.
    pub const VHDX: Self = Self {
        device_id: VIRTUAL_STORAGE_TYPE_DEVICE_VHDX,
        vendor_id: VIRTUAL_STORAGE_TYPE_VENDOR_MICROSOFT,
    };
}

/// The vendor of both formats.
pub const VIRTUAL_STORAGE_TYPE_VENDOR_MICROSOFT: Uuid =
    uuid::uuid!("ec984aec-a0f9-47e9-901f-71415a66345b");
/// Whoever it is.
pub const VIRTUAL_STORAGE_TYPE_VENDOR_UNKNOWN: Uuid = Uuid::nil();

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident = $value:literal;)*) => {
        $($(#[$doc])* pub const $name: u32 = $value;)*
    };
}

numbers! {
    /// What the file itself says.
    VIRTUAL_STORAGE_TYPE_DEVICE_UNKNOWN = 0;
    /// An image of a CD; not supported.
    VIRTUAL_STORAGE_TYPE_DEVICE_ISO = 1;
    /// A VHD.
    VIRTUAL_STORAGE_TYPE_DEVICE_VHD = 2;
    /// A VHDX.
    VIRTUAL_STORAGE_TYPE_DEVICE_VHDX = 3;
    /// A VHD set; not supported.
    VIRTUAL_STORAGE_TYPE_DEVICE_VHDSET = 4;

    /// No right, or, with parameters of version 2, every one.
    VIRTUAL_DISK_ACCESS_NONE = 0;
    /// To attach the disk read-only.
    VIRTUAL_DISK_ACCESS_ATTACH_RO = 0x0001_0000;
    /// To attach the disk, read-only here too; opens the file for writing.
    VIRTUAL_DISK_ACCESS_ATTACH_RW = 0x0002_0000;
    /// To detach the disk.
    VIRTUAL_DISK_ACCESS_DETACH = 0x0004_0000;
    /// To ask what the disk is.
    VIRTUAL_DISK_ACCESS_GET_INFO = 0x0008_0000;
    /// To create a disk; here it only opens the file for writing.
    VIRTUAL_DISK_ACCESS_CREATE = 0x0010_0000;
    /// To compact the disk.
    VIRTUAL_DISK_ACCESS_METAOPS = 0x0020_0000;
    /// To attach it read-only, detach it, and ask what it is.
    VIRTUAL_DISK_ACCESS_READ = 0x000d_0000;
    /// Everything.
    VIRTUAL_DISK_ACCESS_ALL = 0x003f_0000;
    /// What the file is opened for writing for.
    VIRTUAL_DISK_ACCESS_WRITABLE = 0x0032_0000;

    /// Nothing special.
    OPEN_VIRTUAL_DISK_FLAG_NONE = 0;
    /// Does not look for the parents of a differencing disk; it can only be asked what it is.
    OPEN_VIRTUAL_DISK_FLAG_NO_PARENTS = 0x0001;
    /// Reserved; refused.
    OPEN_VIRTUAL_DISK_FLAG_BLANK_FILE = 0x0002;
    /// Reserved; refused.
    OPEN_VIRTUAL_DISK_FLAG_BOOT_DRIVE = 0x0004;
    /// Through the host's cache, as always here.
    OPEN_VIRTUAL_DISK_FLAG_CACHED_IO = 0x0008;
    /// Parents to be named one by one; refused.
    OPEN_VIRTUAL_DISK_FLAG_CUSTOM_DIFF_CHAIN = 0x0010;
    /// The parents through the host's cache, as always here.
    OPEN_VIRTUAL_DISK_FLAG_PARENT_CACHED_IO = 0x0020;
    /// The file of a VHD set; refused.
    OPEN_VIRTUAL_DISK_FLAG_VHDSET_FILE_ONLY = 0x0040;
    /// Not by the parents' relative paths.
    OPEN_VIRTUAL_DISK_FLAG_IGNORE_RELATIVE_PARENT_LOCATOR = 0x0080;
    /// Without some of the syncs; they are made all the same.
    OPEN_VIRTUAL_DISK_FLAG_NO_WRITE_HARDENING = 0x0100;
    /// On a compressed volume too, as always here.
    OPEN_VIRTUAL_DISK_FLAG_SUPPORT_COMPRESSED_VOLUMES = 0x0200;
    /// A file with holes too, as always here.
    OPEN_VIRTUAL_DISK_FLAG_SUPPORT_SPARSE_FILES_ANY_FS = 0x0400;
    /// An encrypted file too, as always here.
    OPEN_VIRTUAL_DISK_FLAG_SUPPORT_ENCRYPTED_FILES = 0x0800;

    /// How many files of a chain are opened for writing if nothing else is said: the child.
    OPEN_VIRTUAL_DISK_RW_DEPTH_DEFAULT = 1;

    /// Not set: refused.
    OPEN_VIRTUAL_DISK_VERSION_UNSPECIFIED = 0;
    /// [`super::OpenParameters::Version1`].
    OPEN_VIRTUAL_DISK_VERSION_1 = 1;
    /// [`super::OpenParameters::Version2`].
    OPEN_VIRTUAL_DISK_VERSION_2 = 2;
    /// For Windows' own use; refused.
    OPEN_VIRTUAL_DISK_VERSION_3 = 3;

    /// For reading and writing; not supported: there is no device.
    ATTACH_VIRTUAL_DISK_FLAG_NONE = 0;
    /// For reading alone.
    ATTACH_VIRTUAL_DISK_FLAG_READ_ONLY = 0x01;
    /// Without drive letters, as always here.
    ATTACH_VIRTUAL_DISK_FLAG_NO_DRIVE_LETTER = 0x02;
    /// Beyond the handle's life; not supported.
    ATTACH_VIRTUAL_DISK_FLAG_PERMANENT_LIFETIME = 0x04;
    /// Not for this machine to see, as always here.
    ATTACH_VIRTUAL_DISK_FLAG_NO_LOCAL_HOST = 0x08;
    /// Without a security descriptor, as always here.
    ATTACH_VIRTUAL_DISK_FLAG_NO_SECURITY_DESCRIPTOR = 0x10;
    /// Whatever the policy on encryption says; of no meaning here.
    ATTACH_VIRTUAL_DISK_FLAG_BYPASS_DEFAULT_ENCRYPTION_POLICY = 0x20;

    /// Not set: refused.
    ATTACH_VIRTUAL_DISK_VERSION_UNSPECIFIED = 0;
    /// Says nothing more.
    ATTACH_VIRTUAL_DISK_VERSION_1 = 1;
    /// A part of the disk; refused but where that is none.
    ATTACH_VIRTUAL_DISK_VERSION_2 = 2;

    /// The only way to detach.
    DETACH_VIRTUAL_DISK_FLAG_NONE = 0;

    /// All that compaction can do.
    COMPACT_VIRTUAL_DISK_FLAG_NONE = 0;
    /// Does not read blocks to find out whether they are zero.
    COMPACT_VIRTUAL_DISK_FLAG_NO_ZERO_SCAN = 1;
    /// Does not move blocks: the file is cut only where its end is free.
    COMPACT_VIRTUAL_DISK_FLAG_NO_BLOCK_MOVES = 2;

    /// Not set: refused.
    COMPACT_VIRTUAL_DISK_VERSION_UNSPECIFIED = 0;
    /// Says nothing more.
    COMPACT_VIRTUAL_DISK_VERSION_1 = 1;

    /// Reserved.
    GET_VIRTUAL_DISK_INFO_UNSPECIFIED = 0;
    /// [`super::VirtualDiskInfo::Size`].
    GET_VIRTUAL_DISK_INFO_SIZE = 1;
    /// [`super::VirtualDiskInfo::Identifier`].
    GET_VIRTUAL_DISK_INFO_IDENTIFIER = 2;
    /// [`super::VirtualDiskInfo::ParentLocation`].
    GET_VIRTUAL_DISK_INFO_PARENT_LOCATION = 3;
    /// [`super::VirtualDiskInfo::ParentIdentifier`].
    GET_VIRTUAL_DISK_INFO_PARENT_IDENTIFIER = 4;
    /// Not supported.
    GET_VIRTUAL_DISK_INFO_PARENT_TIMESTAMP = 5;
    /// [`super::VirtualDiskInfo::StorageType`].
    GET_VIRTUAL_DISK_INFO_VIRTUAL_STORAGE_TYPE = 6;
    /// [`super::VirtualDiskInfo::ProviderSubtype`].
    GET_VIRTUAL_DISK_INFO_PROVIDER_SUBTYPE = 7;
    /// Not supported.
    GET_VIRTUAL_DISK_INFO_IS_4K_ALIGNED = 8;
    /// Not supported.
    GET_VIRTUAL_DISK_INFO_PHYSICAL_DISK = 9;
    /// [`super::VirtualDiskInfo::PhysicalSectorSize`].
    GET_VIRTUAL_DISK_INFO_VHD_PHYSICAL_SECTOR_SIZE = 10;
    /// Not supported.
    GET_VIRTUAL_DISK_INFO_SMALLEST_SAFE_VIRTUAL_SIZE = 11;
    /// Not supported.
    GET_VIRTUAL_DISK_INFO_FRAGMENTATION = 12;
    /// [`super::VirtualDiskInfo::IsLoaded`].
    GET_VIRTUAL_DISK_INFO_IS_LOADED = 13;
    /// Not supported.
    GET_VIRTUAL_DISK_INFO_VIRTUAL_DISK_ID = 14;
    /// Not supported.
    GET_VIRTUAL_DISK_INFO_CHANGE_TRACKING_STATE = 15;
}
