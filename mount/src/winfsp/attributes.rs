//! A node's attributes as Windows wants them.

use std::time::{Duration, SystemTime};

use vhdfs::library::{Attributes, NodeKind};
use windows_sys::Win32::Storage::FileSystem::FILE_ATTRIBUTE_NORMAL;
use winfsp::filesystem::FileInfo;

/// From the beginning of Windows' time, 1601, to that of Unix's, 1970.
const UNTIL_UNIX: Duration = Duration::from_secs(11_644_473_600);

/// A time in units of 100 ns since 1601; 0, which stands for none, for what was before.
pub(super) fn file_time(time: SystemTime) -> u64 {
    let since = match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(after) => UNTIL_UNIX.checked_add(after),
        Err(before) => UNTIL_UNIX.checked_sub(before.duration()),
    };
    let units = since.unwrap_or_default().as_nanos() / 100;
    u64::try_from(units).unwrap_or(u64::MAX)
}

/// `FILE_ATTRIBUTE_*` of a node. A number that says nothing else has to say that.
pub(super) fn flags(found: &Attributes) -> u32 {
    match found.file_attributes {
        0 => FILE_ATTRIBUTE_NORMAL,
        flags => flags,
    }
}

/// Tells all about a node.
pub(super) fn fill(info: &mut FileInfo, found: &Attributes) {
    let is_disk = found.kind == NodeKind::Disk;
    *info = FileInfo {
        file_attributes: flags(found),
        reparse_tag: 0,
        // A directory has neither, to Windows.
        allocation_size: if is_disk { found.allocated } else { 0 },
        file_size: if is_disk { found.size } else { 0 },
        creation_time: file_time(found.created),
        last_access_time: file_time(found.accessed),
        last_write_time: file_time(found.modified),
        change_time: file_time(found.changed),
        index_number: found.node.get(),
        hard_links: 0,
        ea_size: 0,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_count_from_1601() {
        let unix = SystemTime::UNIX_EPOCH;
        assert_eq!(file_time(unix), 116_444_736_000_000_000);
        let later = unix + Duration::from_micros(1);
        assert_eq!(file_time(later), 116_444_736_000_000_010);
        assert_eq!(file_time(unix - UNTIL_UNIX), 0);
    }
}
