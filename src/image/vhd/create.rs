//! New VHDs.

use std::io;
use std::time::SystemTime;

use crate::format::DiskType;
use crate::format::vhd::{BAT_ENTRY_LEN, DynamicHeader, FOOTER_LEN, Footer, HEADER_LEN};
use crate::storage::Storage;
use crate::units::{FileOffset, SECTOR_SIZE, low_u32, round_up, u64_from_u32, usize_from};

/// Makes an empty disk of `disk_len` bytes in the empty file `storage`, durably. The caller has
/// checked the sizes.
///
/// # Errors
/// Where the host fails; the file is then to be removed.
pub(crate) fn create(
    storage: &dyn Storage,
    disk_type: DiskType,
    disk_len: u64,
    block_size: u32,
) -> io::Result<()> {
    let footer = Footer::new(disk_type, disk_len, SystemTime::now());
    let end = if disk_type == DiskType::Fixed {
        FileOffset::new(disk_len)
    } else {
        let table = FileOffset::new(FOOTER_LEN.saturating_add(HEADER_LEN));
        let blocks = low_u32(disk_len.div_ceil(u64_from_u32(block_size)));
        let table_len = round_up(
            u64_from_u32(blocks).saturating_mul(BAT_ENTRY_LEN),
            SECTOR_SIZE,
        );
        let header = DynamicHeader::new(blocks, block_size, table);
        storage.write_all_at(&header.to_bytes(), FileOffset::new(FOOTER_LEN))?;
        storage.write_all_at(&vec![0xff; usize_from(table_len)], table)?;
        storage.write_all_at(&footer.to_bytes(), FileOffset::new(0))?;
        table.plus(table_len)
    };
    storage.write_all_at(&footer.to_bytes(), end)?;
    storage.sync()
}
