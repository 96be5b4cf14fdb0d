//! How the driver and we talk: what kind of volume it is, threads, the mount point.

use std::path::Path;
use std::sync::Arc;

use vhdfs::library::{Library, NodeId};
use windows_sys::Win32::Foundation::{
    NTSTATUS, STATUS_ACCESS_DENIED, STATUS_OBJECT_NAME_COLLISION, STATUS_OBJECT_NAME_NOT_FOUND,
};
use winfsp::FspError;
use winfsp::host::{FileSystemHost, VolumeParams};

use super::{VhdFs, attributes};
use crate::Failure;
use crate::front::Brake;
use crate::text::shown;

/// What the volume says that it is.
const FILE_SYSTEM_NAME: &str = "vhdfs";

/// What reads and writes without a cache have to be aligned to, in bytes. Disks take any.
const SECTOR: u16 = 512;

/// Allocation sizes are told in units of that many sectors, 4 KiB.
const SECTORS_PER_UNIT: u16 = 8;

/// How long the kernel may believe attributes, in milliseconds. An open file's size is fixed, so only times and
/// stored bytes can be out of date. For ever would mean that it also keeps content, and writes later.
const ATTRIBUTES_VALID: u32 = 1000;

/// The longest name in UTF-16 units.
const LONGEST_NAME: u16 = 255;

/// A volume that is being served. Dropping it takes it away.
pub(super) struct Mounted {
    host: FileSystemHost<VhdFs>,
    brake: Brake,
}

impl Mounted {
    /// Serves a library at a mount point: a drive letter and a colon, or a directory that does not exist.
    ///
    /// # Errors
    /// What the driver says, in words.
    pub(super) fn new(
        library: Arc<Library>,
        source: &Path,
        mount_point: &Path,
        read_only: bool,
        threads: Option<u16>,
    ) -> Result<Self, Failure> {
        let created = library.attributes(NodeId::ROOT)?.created;
        let created = attributes::file_time(created);
        let name = source.file_name().unwrap_or(source.as_os_str());
        let file_system = VhdFs::new(library, name.to_string_lossy().into_owned(), read_only);
        let brake = file_system.brake();
        let mut volume = VolumeParams::new();
        volume
            .filesystem_name(FILE_SYSTEM_NAME)
            .sector_size(SECTOR)
            .sectors_per_allocation_unit(SECTORS_PER_UNIT)
            .max_component_length(LONGEST_NAME)
            .file_info_timeout(ATTRIBUTES_VALID)
            .volume_creation_time(created)
            .volume_serial_number(serial_number(created))
            .case_sensitive_search(false)
            .case_preserved_names(true)
            .unicode_on_disk(true)
            .persistent_acls(true)
            .read_only_volume(read_only)
            .post_cleanup_when_modified_only(true)
            .flush_and_purge_on_cleanup(true);
        let said = |action: &str, status: NTSTATUS| {
            let place = shown(mount_point);
            Failure::from(format!("cannot {action} {place}: {}", in_words(status)))
        };
        let mut host: FileSystemHost<VhdFs> = FileSystemHost::new(volume, file_system)
            .map_err(|error| said("make a volume for", status(&FspError::from(error))))?;
        host.mount(mount_point.as_os_str())
            .map_err(|error| said("mount at", status(&FspError::from(error))))?;
        host.start_with_threads(threads.map_or(0, u32::from))
            .map_err(|error| said("serve", status(&FspError::from(error))))?;
        Ok(Self { host, brake })
    }

    /// Refuses all further opening of disks if none is open; how many are, otherwise.
    pub(super) fn close_if_unused(&self) -> Result<(), usize> {
        self.brake.stop_if_unused()
    }

    /// Ends service. What is being done is finished; users that still have disks open get errors.
    pub(super) fn end(&mut self) {
        self.host.unmount();
        self.brake.stop();
        self.host.stop();
    }
}

/// Differs between volumes as far as 32 bits can.
fn serial_number(created: u64) -> u32 {
    let [a, b, c, d, e, f, g, h] = created.to_le_bytes();
    u32::from_le_bytes([a, b, c, d]) ^ u32::from_le_bytes([e, f, g, h])
}

/// The status in an error of the crate's.
fn status(error: &FspError) -> NTSTATUS {
    match error {
        FspError::NTSTATUS(status) => *status,
        other => other.to_ntstatus(),
    }
}

fn in_words(status: NTSTATUS) -> String {
    match status {
        STATUS_OBJECT_NAME_COLLISION => {
            "it exists; a mount point is a free drive letter, or a directory that does not exist yet"
                .to_owned()
        }
        STATUS_OBJECT_NAME_NOT_FOUND => "the driver of WinFsp is not there; install WinFsp anew, \
                                         and restart Windows where it asks for that"
            .to_owned(),
        STATUS_ACCESS_DENIED => "access is denied".to_owned(),
        other => format!("status {other:#010x}"),
    }
}
