//! Whether the volume was left clean: the flags in $Volume, and the journal.

use zerocopy::byteorder::little_endian::{I16, I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::mft::{Mft, number};
use super::record::{kind, undo_fixups};
use super::stream::{PIECE, Stream};
use super::{Trouble, damaged};
use crate::units::{u64_from, usize_from};

/// The value of $Volume's VOLUME_INFORMATION. [ntfs-3g `layout.h`, `VOLUME_INFORMATION`]
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawVolumeInformation {
    /// 0x00: not known.
    reserved: U64,
    /// 0x08: of the format.
    major_ver: u8,
    /// 0x09: of the format.
    minor_ver: u8,
    /// 0x0a: see below.
    flags: U16,
}

const IS_DIRTY: u16 = 0x0001;
/// Mounted by Windows NT 4, and no names of the form 8.3: neither says anything of the content.
const HARMLESS: u16 = 0x0008 | 0x0080;

/// Checks version and flags of the volume.
pub(super) fn check_flags(mft: &Mft<'_, '_>) -> Result<(), Trouble> {
    let stream = mft.need(
        number::VOLUME,
        kind::VOLUME_INFORMATION,
        "the volume's version",
    )?;
    let value = stream.read_all(mft.view, 64)?;
    let Ok((information, _)) = RawVolumeInformation::ref_from_prefix(&value) else {
        return Err(damaged("the volume's version makes no sense"));
    };
    let (major, minor) = (information.major_ver, information.minor_ver);
    if !matches!((major, minor), (1, 2) | (3, 0 | 1)) {
        return Err(Trouble::skip(format!(
            "is of version {major}.{minor}, which is not known here"
        )));
    }
    let flags = information.flags.get();
    if flags & IS_DIRTY != 0 {
        return Err(unclean("is marked as dirty"));
    }
    if flags & !HARMLESS != 0 {
        return Err(Trouble::skip(format!(
            "has work to do at its next mount (flags {flags:#06x}): let Windows mount it once"
        )));
    }
    Ok(())
}

fn unclean(how: &str) -> Trouble {
    Trouble::skip(format!(
        "was not unmounted cleanly ({how}): let Windows mount it once and shut down"
    ))
}

/// A restart page of the journal. [ntfs-3g `logfile.h`, `RESTART_PAGE_HEADER`]
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRestartPage {
    /// 0x00: `RSTR`, or `CHKD` where chkdsk wrote it.
    signature: [u8; 4],
    /// 0x04: as in a record.
    usa_offset: U16,
    /// 0x06: as in a record.
    usa_count: U16,
    /// 0x08: of chkdsk.
    chkdsk_lsn: I64,
    /// 0x10: bytes in a restart page.
    system_page_size: U32,
    /// 0x14: bytes in the journal's other pages.
    log_page_size: U32,
    /// 0x18: where the restart area lies.
    restart_area_offset: U16,
    /// 0x1a: of the journal's format.
    minor_ver: I16,
    /// 0x1c: of the journal's format: 1, or 2 since Windows 8 while it is mounted.
    major_ver: I16,
}

/// The state of the journal. [ntfs-3g `logfile.h`, `RESTART_AREA`]
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRestartArea {
    /// 0x00: grows with each change.
    current_lsn: I64,
    /// 0x08: how many users of the journal there can be.
    log_clients: U16,
    /// 0x0a: the first that is not used.
    client_free_list: U16,
    /// 0x0c: the first that is used: up to Windows 2000 that is while it is mounted.
    client_in_use_list: U16,
    /// 0x0e: bit 1: not mounted since Windows XP left it.
    flags: U16,
}

const NO_CLIENT: u16 = 0xffff;
const VOLUME_IS_CLEAN: u16 = 2;

/// What a restart page says.
#[derive(Clone, Copy)]
struct Restart {
    lsn: i64,
    major: i16,
    minor: i16,
    clean: bool,
}

/// Bytes of the journal that are looked at to see that it was emptied.
const LOOK: u64 = u64_from(PIECE);
/// Bytes in a restart page, at most.
const MAX_PAGE: u64 = 0x1_0000;

/// Checks that the journal has nothing left to do.
pub(super) fn check_log(mft: &Mft<'_, '_>) -> Result<(), Trouble> {
    let log = mft.need(number::LOG, kind::DATA, "$LogFile")?;
    if log.size < 2 * MAX_PAGE {
        return Err(damaged("$LogFile is too short"));
    }
    let start = log.read_first(mft.view, log.size.min(LOOK))?;
    if start.iter().all(|byte| *byte == 0xff) {
        return Ok(());
    }
    let first = restart(mft, &log, 0)?;
    let second = restart(mft, &log, page_size(&start)?)?;
    let newest = first.lsn.max(second.lsn);
    // The two are the same after a clean unmount. Where they are not, the newer one counts.
    for page in [first, second].iter().filter(|page| page.lsn == newest) {
        if page.major == 2 {
            return Err(Trouble::hibernated(format!(
                "is still mounted by a Windows that sleeps, or was not unmounted cleanly (log \
                 version 2.{}): let Windows start and shut down fully, without fast startup",
                page.minor
            )));
        }
        if page.major != 1 {
            return Err(damaged(format!("$LogFile is of version {}", page.major)));
        }
        if !page.clean {
            return Err(unclean("its log is open"));
        }
    }
    Ok(())
}

/// Bytes in a restart page, of the first that lies in `log`.
fn page_size(log: &[u8]) -> Result<u64, Trouble> {
    let size = RawRestartPage::ref_from_prefix(log)
        .map_or(0, |(page, _)| u64::from(page.system_page_size.get()));
    if !size.is_power_of_two() || !(512..=MAX_PAGE).contains(&size) {
        return Err(damaged("$LogFile makes no sense"));
    }
    Ok(size)
}

/// Reads the restart page at `offset` of the journal.
fn restart(mft: &Mft<'_, '_>, log: &Stream, offset: u64) -> Result<Restart, Trouble> {
    let mut head = [0; size_of::<RawRestartPage>()];
    log.read_at(mft.view, &mut head, offset)?;
    match &head[..4] {
        b"RSTR" => {}
        b"CHKD" => {
            return Err(Trouble::skip(
                "was checked by chkdsk and not mounted since: let Windows mount it once",
            ));
        }
        _ => return Err(unclean("its log makes no sense")),
    }
    let mut bytes = vec![0; usize_from(page_size(&head)?)];
    log.read_at(mft.view, &mut bytes, offset)?;
    if !undo_fixups(&mut bytes) {
        return Err(unclean("its log was written in part"));
    }
    decode_restart(&bytes).ok_or_else(|| unclean("its log makes no sense"))
}

fn decode_restart(bytes: &[u8]) -> Option<Restart> {
    let (page, _) = RawRestartPage::ref_from_prefix(bytes).ok()?;
    let area_at = usize::from(page.restart_area_offset.get());
    let fixups_end = usize::from(page.usa_offset.get()) + 2 * usize::from(page.usa_count.get());
    if area_at < fixups_end {
        return None;
    }
    let (area, _) = RawRestartArea::ref_from_prefix(bytes.get(area_at..)?).ok()?;
    let (clients, used) = (area.log_clients.get(), area.client_in_use_list.get());
    if used != NO_CLIENT && used >= clients {
        return None;
    }
    Some(Restart {
        lsn: area.current_lsn.get(),
        major: page.major_ver.get(),
        minor: page.minor_ver.get(),
        clean: used == NO_CLIENT || area.flags.get() & VOLUME_IS_CLEAN != 0,
    })
}
