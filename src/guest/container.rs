//! What a part may hold that no reader understands, known by a magic number: encrypted volumes, members
//! of arrays and pools, other filesystems. All of it is in use; and what holds the mark of one of these
//! besides that of a filesystem is in use as well, since one of the two is a remnant.

use super::Trouble;
use super::view::View;
use crate::units::{round_down, u64_from, usize_from};

/// What a mark means for the part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// What is free shows only from inside.
    Encrypted,
    /// A member of an array.
    Array,
    /// A member of a pool that others may belong to.
    Pool,
    /// A filesystem that is not read here.
    Filesystem,
    /// Partitions, as a virtual machine's disk in a logical volume has them.
    Table,
}

impl Meaning {
    /// Why the part is in use: the end of a sentence that begins with its name.
    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::Encrypted => {
                "is encrypted: only its own system knows what is free in it and can discard it (fstrim)"
            }
            Self::Array => "is a member of an array of disks",
            Self::Pool => "belongs to a storage pool",
            Self::Filesystem => "holds a filesystem that cannot be read here",
            Self::Table => "has partitions of its own, which are not read here",
        }
    }
}

/// Where a magic number lies.
#[derive(Clone, Copy)]
enum At {
    /// Bytes from the start.
    Start(u64),
    /// Bytes from the end, which is rounded down to a multiple of the second number.
    End(u64, u64),
}

/// A magic number.
struct Magic {
    name: &'static str,
    meaning: Meaning,
    at: At,
    bytes: &'static [u8],
}

/// A magic number that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mark {
    /// Whose it is.
    pub(super) name: &'static str,
    /// What that means.
    pub(super) meaning: Meaning,
    /// Where it lies, in bytes of the part.
    pub(super) at: u64,
}

const fn magic(name: &'static str, meaning: Meaning, at: At, bytes: &'static [u8]) -> Magic {
    Magic {
        name,
        meaning,
        at,
        bytes,
    }
}

const SECTOR: u64 = 512;
const KIB: u64 = 1024;
const MD: &[u8] = &[0xfc, 0x4e, 0x2b, 0xa9];
const MD_BIG_ENDIAN: &[u8] = &[0xa9, 0x2b, 0x4e, 0xfc];
const DDF: &[u8] = &[0xde, 0x11, 0xde, 0x11];
const DRBD: &[u8] = &[0x83, 0x74, 0x02];
const BCACHE: &[u8] = b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81";
const BCACHEFS: &[u8] = b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef";
/// {4967d63b-2e29-4ad8-8399-f6a339e3d001}, which every volume of BitLocker has in its boot sector.
const BITLOCKER: &[u8] = b"\x3b\xd6\x67\x49\x29\x2e\xd8\x4a\x83\x99\xf6\xa3\x39\xe3\xd0\x01";
/// {92a84d3b-dd80-4d0e-9e4e-b1e3284eaed8}: one that is encrypted as far as it was used.
const BITLOCKER_USED: &[u8] = b"\x3b\x4d\xa8\x92\x80\xdd\x0e\x4d\x9e\x4e\xb1\xe3\x28\x4e\xae\xd8";

/// The name of the one pool that can be read.
pub(super) const LVM2: &str = "LVM2";

use At::{End, Start};
use Meaning::{Array, Encrypted, Filesystem, Pool, Table};

/// Places and numbers are those of libblkid (util-linux), where nothing else is said.
const MAGICS: &[Magic] = &[
    magic("LUKS", Encrypted, Start(0), b"LUKS\xba\xbe"),
    magic("LUKS", Encrypted, Start(16 * KIB), b"SKUL\xba\xbe"),
    magic("BitLocker", Encrypted, Start(3), b"-FVE-FS-"),
    magic("BitLocker", Encrypted, Start(160), BITLOCKER),
    magic("BitLocker", Encrypted, Start(160), BITLOCKER_USED),
    // To Go: the rest of the boot sector is a FAT volume's.
    magic("BitLocker", Encrypted, Start(424), BITLOCKER),
    magic("dm-integrity", Encrypted, Start(0), b"integrt\0"),
    magic("dm-verity", Encrypted, Start(0), b"verity\0\0"),
    // md: 1.1, 1.2, 1.0 and 0.90, the last in the byte order of its machine.
    magic("Linux RAID", Array, Start(0), MD),
    magic("Linux RAID", Array, Start(4 * KIB), MD),
    magic("Linux RAID", Array, End(8 * KIB, 4 * KIB), MD),
    magic("Linux RAID", Array, End(64 * KIB, 64 * KIB), MD),
    magic("Linux RAID", Array, End(64 * KIB, 64 * KIB), MD_BIG_ENDIAN),
    magic(
        "Intel RAID",
        Array,
        End(2 * SECTOR, SECTOR),
        b"Intel Raid ISM Cfg Sig. ",
    ),
    magic(
        "Intel RAID",
        Array,
        End(8 * KIB, 4 * KIB),
        b"Intel Raid ISM Cfg Sig. ",
    ),
    magic("DDF RAID", Array, End(SECTOR, SECTOR), DDF),
    magic("DDF RAID", Array, End(257 * SECTOR, SECTOR), DDF),
    magic("DRBD", Array, End(4 * KIB - 60, 4 * KIB), DRBD),
    magic("DRBD", Array, Start(0), b"DRBDdlh*"),
    magic("DRBD", Array, Start(0), b"$DRBDmgr=q"),
    magic("LVM1", Pool, Start(0), b"HM\x01\x00"),
    magic("LVM1", Pool, Start(0), b"HM\x02\x00"),
    magic("LVM snapshot", Pool, Start(0), b"SnAp"),
    magic("bcache", Pool, Start(4 * KIB + 24), BCACHE),
    magic("bcachefs", Filesystem, Start(4 * KIB + 24), BCACHEFS),
    magic(
        "Stratis",
        Pool,
        Start(SECTOR + 4),
        b"!Stra0tis\x86\xff\x02^\x41rh",
    ),
    magic(
        "Stratis",
        Pool,
        Start(9 * SECTOR + 4),
        b"!Stra0tis\x86\xff\x02^\x41rh",
    ),
    magic("VDO", Pool, Start(0), b"dmvdo001"),
    magic("Ceph BlueStore", Pool, Start(0), b"bluestore block device"),
    magic("Oracle ASM", Pool, Start(32), b"ORCLDISK"),
    // The database of dynamic disks, on those with an MBR. [libldm]
    magic("Windows LDM", Pool, Start(6 * SECTOR), b"PRIVHEAD"),
    magic("VMFS", Filesystem, Start(1024 * KIB), b"\x0d\xd0\x01\xc0"),
    magic("VMFS", Filesystem, Start(2048 * KIB), b"\x5e\xf1\xab\x2f"),
    magic("ReFS", Filesystem, Start(3), b"ReFS\0"),
    magic("APFS", Filesystem, Start(32), b"NXSB"),
    magic("HFS+", Filesystem, Start(KIB), b"H+\0\x04"),
    magic("HFS+", Filesystem, Start(KIB), b"HX\0\x05"),
    magic("ISO 9660", Filesystem, Start(32 * KIB + 1), b"CD001"),
    magic("UDF", Filesystem, Start(32 * KIB + 1), b"BEA01"),
    magic("UDF", Filesystem, Start(34 * KIB + 1), b"BEA01"),
    magic("UDF", Filesystem, Start(34 * KIB + 1), b"NSR02"),
    magic("UDF", Filesystem, Start(34 * KIB + 1), b"NSR03"),
    magic("SquashFS", Filesystem, Start(0), b"hsqs"),
    magic("SquashFS", Filesystem, Start(0), b"sqsh"),
    magic("EROFS", Filesystem, Start(KIB), b"\xe2\xe1\xf5\xe0"),
    magic("cramfs", Filesystem, Start(0), b"\x45\x3d\xcd\x28"),
    magic("romfs", Filesystem, Start(0), b"-rom1fs-"),
    magic("F2FS", Filesystem, Start(KIB), b"\x10\x20\xf5\xf2"),
    magic("F2FS", Filesystem, Start(5 * KIB), b"\x10\x20\xf5\xf2"),
    magic("NILFS2", Filesystem, Start(KIB), b"\x02\0\0\0\0\0\x34\x34"),
    magic("ReiserFS", Filesystem, Start(64 * KIB + 52), b"ReIsEr"),
    magic("ReiserFS", Filesystem, Start(8 * KIB + 52), b"ReIsErFs"),
    magic("Reiser4", Filesystem, Start(64 * KIB), b"ReIsEr4"),
    magic("JFS", Filesystem, Start(32 * KIB), b"JFS1"),
    magic("GFS2", Filesystem, Start(64 * KIB), b"\x01\x16\x19\x70"),
    magic("OCFS2", Filesystem, Start(KIB), b"OCFSV2"),
    magic("OCFS2", Filesystem, Start(2 * KIB), b"OCFSV2"),
    magic("OCFS2", Filesystem, Start(4 * KIB), b"OCFSV2"),
    magic("OCFS2", Filesystem, Start(8 * KIB), b"OCFSV2"),
    magic(
        "UFS",
        Filesystem,
        Start(8 * KIB + 1372),
        b"\x54\x19\x01\x00",
    ),
    magic(
        "UFS2",
        Filesystem,
        Start(64 * KIB + 1372),
        b"\x19\x01\x54\x19",
    ),
    magic("VxFS", Filesystem, Start(KIB), b"\xf5\xfc\x01\xa5"),
    magic("BeFS", Filesystem, Start(544), b"1SFB"),
    magic("HPFS", Filesystem, Start(8 * KIB), b"\x49\xe8\x95\xf9"),
    magic("ZoneFS", Filesystem, Start(0), b"SFOZ"),
    magic("UBI", Filesystem, Start(0), b"UBI#"),
    magic("Apple partition map", Table, Start(SECTOR), b"PM\0\0"),
    magic("Amiga partition table", Table, Start(0), b"RDSK"),
    magic("SGI disk label", Table, Start(0), b"\x0b\xe5\xa9\x41"),
    magic("AIX disk label", Table, Start(0), b"\xc9\xc2\xd4\xc1"),
    // FreeBSD's and NetBSD's. [sys/disklabel.h]
    magic("BSD disk label", Table, Start(SECTOR), b"\x57\x45\x56\x82"),
    magic(LVM2, Pool, Start(0), b"LABELONE"),
    magic(LVM2, Pool, Start(SECTOR), b"LABELONE"),
    magic(LVM2, Pool, Start(2 * SECTOR), b"LABELONE"),
    magic(LVM2, Pool, Start(3 * SECTOR), b"LABELONE"),
];

/// All marks in the part.
///
/// # Errors
/// [`Trouble::Io`].
pub(super) fn marks(part: &View<'_>) -> Result<Vec<Mark>, Trouble> {
    // Most lie here.
    let head = part.read(0, part.len().min(8 * KIB))?;
    let mut found: Vec<Mark> = Vec::new();
    for magic in MAGICS {
        let len = u64_from(magic.bytes.len());
        let at = match magic.at {
            Start(at) => Some(at),
            End(back, step) => round_down(part.len(), step).checked_sub(back),
        };
        let Some(at) = at.filter(|at| at.saturating_add(len) <= part.len()) else {
            continue;
        };
        let here = match head.get(usize_from(at)..usize_from(at + len)) {
            Some(bytes) => bytes == magic.bytes,
            None => part.read(at, len)? == magic.bytes,
        };
        if here {
            found.push(Mark {
                name: magic.name,
                meaning: magic.meaning,
                at,
            });
        }
    }
    found.extend(zfs(part)?);
    Ok(found)
}

/// ZFS has four labels, two at either end, each with a list of names and values, in XDR. [OpenZFS
/// vdev_impl.h, nvpair.c]
fn zfs(part: &View<'_>) -> Result<Option<Mark>, Trouble> {
    const LABEL: u64 = 256 * KIB;
    const LIST: u64 = 16 * KIB;
    let end = round_down(part.len(), LABEL);
    let labels = [
        Some(0),
        Some(LABEL),
        end.checked_sub(2 * LABEL),
        end.checked_sub(LABEL),
    ];
    for label in labels.into_iter().flatten() {
        let at = label + LIST;
        if at + 12 > part.len() {
            continue;
        }
        let list = part.read(at, 12)?;
        // XDR, either byte order, version 0, unique names.
        if matches!(list[..], [1, 0 | 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]) {
            return Ok(Some(Mark {
                name: "ZFS",
                meaning: Pool,
                at,
            }));
        }
    }
    Ok(None)
}
