//! The boot sector: how large the volume is, and where its two ends of string lie.

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::{Trouble, View};
use crate::units::u64_from;

/// Bytes of the boot sector that are used, whatever the sector size.
const BOOT_LEN: usize = 512;
/// The largest cluster since Windows 10 1709.
const MAX_CLUSTER_SIZE: u64 = 2 << 20;
/// The most clusters: what Windows formats, and $Bitmap then takes 512 MiB of memory here.
const MAX_CLUSTERS: u64 = (1 << 32) - 1;

/// The boot sector as it lies on the disk. [ntfs-3g `layout.h`, `NTFS_BOOT_SECTOR`]
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBoot {
    /// 0x00: a jump over the fields.
    jump: [u8; 3],
    /// 0x03: `NTFS` and four spaces.
    oem_id: [u8; 8],
    /// 0x0b: bytes in a sector.
    bytes_per_sector: U16,
    /// 0x0d: sectors in a cluster; above 0x80 two to the power of 256 minus it.
    sectors_per_cluster: u8,
    /// 0x0e: what FAT has here is 0.
    reserved_sectors: U16,
    /// 0x10: 0.
    fats: u8,
    /// 0x11: 0.
    root_entries: U16,
    /// 0x13: 0.
    sectors: U16,
    /// 0x15: 0xf8 for a hard disk.
    media: u8,
    /// 0x16: 0.
    sectors_per_fat: U16,
    /// 0x18: for the BIOS only, as all up to 0x20.
    geometry: [u8; 8],
    /// 0x20: 0.
    large_sectors: U32,
    /// 0x24: for the BIOS only.
    drive: [u8; 4],
    /// 0x28: sectors of the volume. One more lies behind them: the copy of this one.
    number_of_sectors: U64,
    /// 0x30: the cluster where $MFT begins.
    mft_lcn: U64,
    /// 0x38: the cluster where $MFTMirr begins.
    mftmirr_lcn: U64,
    /// 0x40: clusters in a record of $MFT; above 0x80 two to the power of 256 minus it is the bytes.
    clusters_per_mft_record: u8,
}

const _: () = assert!(size_of::<RawBoot>() == 0x41);

/// The measures of a volume, each checked against the others and against the part's length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Bytes in a cluster: a power of two, 512 to 2 MiB.
    pub(super) cluster_size: u64,
    /// Whole clusters of the volume.
    pub(super) clusters: u64,
    /// Bytes in a record of $MFT: a power of two, 1024 to 4096.
    pub(super) record_size: u64,
    /// The cluster where $MFT begins.
    pub(super) mft_lcn: u64,
    /// The cluster where $MFTMirr begins.
    pub(super) mirror_lcn: u64,
    /// Bytes of the volume, without the copy of the boot sector behind it.
    pub(super) size: u64,
}

impl Geometry {
    /// Where a cluster of the volume begins, in bytes.
    pub(super) fn byte(&self, lcn: u64) -> u64 {
        debug_assert!(lcn <= self.clusters, "cluster {lcn} of {}", self.clusters);
        lcn * self.cluster_size
    }
}

/// Whether a boot sector of NTFS lies here.
pub(super) fn is_here(view: &View<'_>) -> Result<bool, Trouble> {
    if view.len() < u64_from(BOOT_LEN) {
        return Ok(false);
    }
    let bytes = view.read(0, u64_from(BOOT_LEN))?;
    Ok(bytes[3..11] == *b"NTFS    ")
}

/// Reads the boot sector, which [`is_here`] found.
pub(super) fn read(view: &View<'_>) -> Result<Geometry, Trouble> {
    let bytes = view.read(0, u64_from(BOOT_LEN))?;
    let Ok((raw, _)) = RawBoot::ref_from_prefix(&bytes) else {
        return Err(Trouble::skip("has no boot sector"));
    };
    let geometry = geometry(raw).ok_or_else(|| {
        Trouble::skip("has a boot sector that makes no sense here (sizes, or places of $MFT)")
    })?;
    if geometry.clusters > MAX_CLUSTERS {
        return Err(Trouble::skip(format!(
            "has {} clusters, more than the {MAX_CLUSTERS} that are read",
            geometry.clusters
        )));
    }
    if geometry.size > view.len() {
        return Err(Trouble::skip(format!(
            "says that it has {} bytes, more than the {} of its place",
            geometry.size,
            view.len()
        )));
    }
    Ok(geometry)
}

fn geometry(raw: &RawBoot) -> Option<Geometry> {
    let zero = [
        u32::from(raw.reserved_sectors.get()),
        u32::from(raw.fats),
        u32::from(raw.root_entries.get()),
        u32::from(raw.sectors.get()),
        u32::from(raw.sectors_per_fat.get()),
        raw.large_sectors.get(),
    ];
    if zero.iter().any(|field| *field != 0) {
        return None;
    }
    let sector_size = u64::from(raw.bytes_per_sector.get());
    if !sector_size.is_power_of_two() || !(512..=4096).contains(&sector_size) {
        return None;
    }
    let sectors_per_cluster = match raw.sectors_per_cluster {
        few @ 1..=0x80 => u64::from(few),
        log => power(log)?,
    };
    let cluster_size = sector_size.checked_mul(sectors_per_cluster)?;
    if !cluster_size.is_power_of_two() || cluster_size > MAX_CLUSTER_SIZE {
        return None;
    }
    let record_size = match raw.clusters_per_mft_record {
        few @ 1..=0x7f => cluster_size.checked_mul(u64::from(few))?,
        log => power(log)?,
    };
    if !record_size.is_power_of_two() || !(1024..=4096).contains(&record_size) {
        return None;
    }
    let sectors = raw.number_of_sectors.get();
    let clusters = sectors / sectors_per_cluster;
    let (mft_lcn, mirror_lcn) = (raw.mft_lcn.get(), raw.mftmirr_lcn.get());
    let inside = 1..clusters;
    if !inside.contains(&mft_lcn) || !inside.contains(&mirror_lcn) || mft_lcn == mirror_lcn {
        return None;
    }
    Some(Geometry {
        cluster_size,
        clusters,
        record_size,
        mft_lcn,
        mirror_lcn,
        size: sectors.checked_mul(sector_size)?,
    })
}

/// Two to the power of a byte that counts from 256 downward.
fn power(log: u8) -> Option<u64> {
    1_u64
        .checked_shl(256 - u32::from(log))
        .filter(|_| log > 0xc0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::low_u8;

    /// A boot sector of 512-byte sectors, the copy of $MFT at cluster 2.
    fn parse(per_cluster: u8, per_record: u8, sectors: u64, mft: u8) -> Option<Geometry> {
        let mut bytes = [0; size_of::<RawBoot>()];
        bytes[0x0b..0x0e].copy_from_slice(&[0, 2, per_cluster]);
        bytes[0x28..0x30].copy_from_slice(&sectors.to_le_bytes());
        (bytes[0x30], bytes[0x38], bytes[0x40]) = (mft, 2, per_record);
        let (raw, _) = RawBoot::ref_from_prefix(&bytes).unwrap();
        geometry(raw)
    }

    #[test]
    fn sizes() {
        let large = 1 << 20;
        for log in 9..=21_u8 {
            let per_cluster = match log {
                ..=16 => 1 << (log - 9),
                _ => low_u8(256 - u64::from(log - 9)),
            };
            let found = parse(per_cluster, 0xf6, large, 4).unwrap();
            assert_eq!(found.cluster_size, 1 << log);
            assert_eq!(found.clusters * found.cluster_size, large * 512);
        }
        assert_eq!(parse(0xf3, 0xf6, large, 4), None, "clusters of 4 MiB");
        assert_eq!(
            parse(0x81, 0xf6, large, 4),
            None,
            "clusters beyond any number"
        );
        assert_eq!(
            parse(0xc1, 0xf6, large, 4),
            None,
            "clusters beyond any number"
        );
        let record_size = |per_cluster, per_record| {
            parse(per_cluster, per_record, large, 4).map(|found| found.record_size)
        };
        assert_eq!(record_size(8, 1), Some(4096));
        assert_eq!(record_size(2, 1), Some(1024));
        for odd in [0, 0xf7, 0xf3, 0x80, 0x81, 3, 2] {
            assert_eq!(record_size(8, odd), None, "records of {odd:#x}");
        }
    }

    #[test]
    fn places() {
        assert!(parse(8, 0xf6, 8 * 5, 4).is_some());
        assert_eq!(
            parse(8, 0xf6, 8 * 5 - 1, 4),
            None,
            "behind the last whole cluster"
        );
        assert_eq!(parse(8, 0xf6, 8 * 5, 2), None, "on its copy");
        assert_eq!(parse(8, 0xf6, 8 * 5, 0), None, "on the boot sector");
        assert_eq!(parse(8, 0xf6, u64::MAX, 4), None, "no overflow");
        assert_eq!(parse(8, 0xf6, 0, 4), None, "no volume");
    }
}
